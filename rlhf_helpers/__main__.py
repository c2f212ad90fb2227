"""The command line, a thin dispatcher: `python -m rlhf_helpers <assistant|study|notebooks|train> --help`."""

import argparse
import ast
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# module -> its studies, called with out=None (and data, if they are about real data) and their settings; they
# write a CSV and a manifest into the folder `out`
_STUDIES_OF = {
    "lesson1": (
        "pairs_and_noise", "model_kinds", "label_formats", "label_budget",
        "reward_ensembles",
    ),
    "real_preferences": ("real_preferences",),
    "lesson2.methods": ("method_tuning", "methods"),
    "lesson2.overoptimisation": ("best_of_n_overoptimisation", "rl_overoptimisation"),
    "lesson2.sweeps": (
        "clip_and_kl", "exploration", "reward_design", "frontier", "ability_tax", "model_sizes",
    ),
    "lesson3.constitution": ("revisions", "constitutional_training"),
    "lesson3.attacks": ("red_team_campaign", "red_team_policy"),
    "lesson3.gradient_attacks": ("gradient_attacks",),
    "lesson3.tradeoffs": ("constraints", "safety_tax"),
    "lesson3.oversight": ("debate", "recursive_judges", "probes"),
    "lesson3.table": ("safety_table",),
    "lesson4.chat": ("chatbot", "personalities"),
    "lesson4.summaries": ("summaries",),
    "lesson4.code": ("code_rewards",),
    "real_model": ("real_model",),
}  # fmt: skip
STUDIES = {
    name: f"rlhf_helpers.lab.studies.{module}:{name}"
    for module, names in _STUDIES_OF.items()
    for name in names
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. Errors that name their mend come without a traceback."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:  # its flags come from the settings classes, which need torch
        from rlhf_helpers import train

        return train.main(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 1


def _assistant(arguments: argparse.Namespace) -> int:
    from rlhf_helpers.world import assistant

    assistant.main(quick=arguments.quick, seed=arguments.seed, out=arguments.out)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    if arguments.name not in STUDIES:
        raise ValueError(f"no study is named {arguments.name!r}; there are {', '.join(sorted(STUDIES))}")
    module, function = STUDIES[arguments.name].split(":")
    study = getattr(importlib.import_module(module), function)
    wants_data = "data" in inspect.signature(study).parameters
    if wants_data != (arguments.data is not None):
        raise ValueError(f"the study {arguments.name!r} {'needs' if wants_data else 'takes no'} --data")
    options = {"out": arguments.out, "data": arguments.data, "seeds": arguments.seeds}
    options = {name: value for name, value in options.items() if value is not None}
    options |= dict(arguments.settings)
    known = list(inspect.signature(study).parameters)
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"the study {arguments.name!r} has no {unknown}; its options are {known}")
    table = study(**options)
    if arguments.out is None:
        print(table.to_string(index=False))
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; the value is a Python literal, or else a string."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _notebooks(arguments: argparse.Namespace) -> int:
    from rlhf_helpers.lab.notebooks import run_notebooks

    changed = run_notebooks(arguments.paths, check=arguments.check)
    for path in changed:
        print(f"{'differs from its own re-execution' if arguments.check else 'written'}: {path}")
    if not changed:
        print("every notebook is as its re-execution makes it")
    return int(arguments.check and bool(changed))


def _parser() -> argparse.ArgumentParser:
    program = "python -m rlhf_helpers"
    parser = argparse.ArgumentParser(prog=program, description="Commands behind the lessons.")
    commands = parser.add_subparsers(dest="command", required=True)

    assistant = commands.add_parser("assistant", help="retrain the tiny assistant from a seed")
    assistant.add_argument("--quick", action="store_true", help="the 5-minute checkpoint for development")
    assistant.add_argument("--seed", type=int, default=0)
    assistant.add_argument("--out", type=Path, help="folder (default: the package's own)")
    assistant.set_defaults(run=_assistant)

    study = commands.add_parser("study", help="make a stored study: CSV and manifest")
    study.add_argument("name", help=f"one of: {', '.join(sorted(STUDIES))}")
    study.add_argument("--data", help="a preference file, for a study of real data")
    study.add_argument("--out", type=Path, help="folder for CSV and manifest (default: only print)")
    study.add_argument("--seeds", type=int, nargs="+", help="other seeds than those of the stored study")
    study.add_argument(
        "--set",
        dest="settings",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another setting than in the stored study, e.g. --set steps=6 --set 'clips=(0.1, 0.2)'",
    )
    study.set_defaults(run=_study)

    notebooks = commands.add_parser("notebooks", help="clear and re-execute lessons in place")
    notebooks.add_argument("paths", nargs="*", type=Path, help="default: every notebook of notebooks/")
    notebooks.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    notebooks.set_defaults(run=_notebooks)

    commands.add_parser("train", help="train your own model on your own data")  # see main
    return parser


if __name__ == "__main__":
    sys.exit(main())

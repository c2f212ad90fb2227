"""The command line, a thin dispatcher: `python -m rlhf_helpers --help` lists its commands."""

import argparse
import ast
import inspect
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent / "assets" / "studies"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. Errors that name their fix come without a traceback."""
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
    from rlhf_helpers.lab.studies import all_studies

    name, settings, studies = arguments.name, dict(arguments.settings), all_studies()
    if name not in studies:
        raise ValueError(f"no study is named {name!r}; there are {', '.join(sorted(studies))}")
    study = studies[name]
    # The first parameter is the data, or else the seed.
    signature = inspect.signature(study)
    wants_data = "data" in signature.parameters
    if wants_data != (arguments.data is not None):
        raise ValueError(f"the study {name!r} {'needs' if wants_data else 'takes no'} --data")
    try:
        signature.bind(arguments.data, **settings)
    except TypeError as error:
        raise ValueError(f"the study {name!r}: {error}; its settings are {signature}") from error
    if wants_data:
        settings["data"] = arguments.data
    if arguments.seeds:
        settings["seeds"] = arguments.seeds
    table = study(out=arguments.out, **settings)
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
    if arguments.export:
        from rlhf_helpers.lab.export import export_notebooks

        for path in export_notebooks(arguments.paths, kind=arguments.export, out=arguments.out):
            print(f"written: {path}")
        return 0
    from rlhf_helpers.lab.notebooks import run_notebooks

    changed = run_notebooks(arguments.paths, check=arguments.check)
    for path in changed:
        print(f"{'differs from its own re-execution' if arguments.check else 'written'}: {path}")
    if not changed:
        print("every notebook is as its re-execution makes it")
    return int(arguments.check and bool(changed))


def _student(arguments: argparse.Namespace) -> int:
    from rlhf_helpers.lab.classroom.edition import write_student_edition

    for path in write_student_edition(arguments.out, nbgrader=arguments.nbgrader, answers=arguments.answers):
        print(f"written: {path}")
    return 0


def _grade(arguments: argparse.Namespace) -> int:
    from rlhf_helpers.lab.classroom.report import write_grades

    points = write_grades(arguments.folder, arguments.out, due=arguments.due, report=arguments.report)
    print(points.to_string())
    return 0


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
    stored = sorted(file.stem for file in STORED.glob("*.csv"))
    study.add_argument("name", help=f"one of: {', '.join(stored)}")
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

    notebooks = commands.add_parser("notebooks", help="re-execute lessons in place, or export them")
    notebooks.add_argument("paths", nargs="*", type=Path, help="default: every notebook of notebooks/")
    notebooks.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    notebooks.add_argument(
        "--export", choices=("html", "slides", "pdf"), help="run nothing; write each lesson in this form"
    )
    notebooks.add_argument("--out", type=Path, default=Path("export"), help="folder for --export")
    notebooks.set_defaults(run=_notebooks)

    student = commands.add_parser("student", help="write the lessons without answers, for a class")
    student.add_argument("--out", type=Path, required=True, help="folder to write to")
    student.add_argument("--nbgrader", action="store_true", help="lay it out as a course of nbgrader")
    student.add_argument("--answers", action="store_true", help="keep the answers: your own working copy")
    student.set_defaults(run=_student)

    grade = commands.add_parser("grade", help="grade what a class handed in, each exercise in a sandbox")
    grade.add_argument("folder", type=Path, help="holds one folder per learner")
    grade.add_argument("--out", type=Path, required=True, help="the table of grades, a CSV file")
    grade.add_argument(
        "--due", type=datetime.fromisoformat, help="2026-12-01T12:00; what comes later is late"
    )
    grade.add_argument("--report", type=Path, help="HTML page about the class")
    grade.set_defaults(run=_grade)

    commands.add_parser("train", help="train your own model on your own data")  # see main
    return parser


if __name__ == "__main__":
    sys.exit(main())

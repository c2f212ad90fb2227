"""Is a program safe to run? Rules over its syntax tree, the bandit library, and a score that explains itself.

Unsafe here means: it reaches out of its own function, for files, processes, the network, the interpreter, or
runs text as code. Both methods read the program without running it, so both can be fooled: see
`evaluation.PROGRAMS`.
"""

import ast
import functools
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rlhf_helpers.world.tables import load_table

# What counts as reaching out, and why; besides calls, ways to the same things that show no such name.
TABLE = load_table("code_generation/code_safety")
RULES = TABLE["rules"]
# What one finding of a severity leaves of the score.
WEIGHTS = {"low": 0.1, "medium": 0.5, "high": 0.9}


@dataclass(frozen=True)
class Finding:
    """One reason to distrust a program: where, by which rule, how bad, why, and who says so."""

    line: int
    rule: str
    severity: str  # "low" | "medium" | "high"
    why: str
    source: str  # "ast" | "bandit"

    def __str__(self) -> str:
        """One line for people."""
        return f"line {self.line}: {self.rule} ({self.severity}, {self.source}): {self.why}"


def unsafe_calls(code: str) -> list[tuple[int, str]]:
    """(line, name) of each call that reaches out, in order; the names are read off the syntax tree.

    Calls of eval, exec, compile, open, __import__, and of anything under os, subprocess or socket, also as
    `__import__("os").system(...)`, which gives both "__import__" and "os.system". A name in a string or a
    comment does not count, nor does one put together at run time: see `CodeSafetyEvaluator` for more rules.
    Text that is no Python: [(line of the error, "SyntaxError")]. Never raises. Lesson 4.
    """
    tree = _parsed(code)
    if isinstance(tree, int):
        return [(tree, "SyntaxError")]
    calls = ((n.lineno, _dotted(n.func)) for n in ast.walk(tree) if isinstance(n, ast.Call))
    return sorted((line, name) for line, name in calls if name and _rule_of(name))


def _parsed(code: str) -> ast.Module | int:
    """The syntax tree, or the line on which it is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes and comparisons in the program
            return ast.parse(code)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):  # null bytes, or nested too deeply
        return 1


def _dotted(node: ast.AST) -> str | None:
    """`os.path.join` as text; `__import__("os").system` is os.system; None for anything else."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{base}.{name}" if (base := _dotted(value)) else None
        case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=str() as module), *_]):
            return module
    return None


def _rule_of(name: str) -> str | None:
    """Which rule a called name falls under: itself, or the module it is an attribute of."""
    module, _, attribute = name.partition(".")
    if name in TABLE["unsafe names"]:
        return name
    return module if attribute and module in TABLE["unsafe modules"] else None


def _ast_findings(code: str) -> Iterator[Finding]:
    for line, name in unsafe_calls(code):
        yield Finding(line, name, *RULES[_rule_of(name) or name], "ast")
    tree = _parsed(code)
    for node in ast.walk(tree) if isinstance(tree, ast.Module) else ():
        match node:
            case ast.alias(name=name) | ast.ImportFrom(module=str() as name):
                rule, listed = "import", name.split(".")[0]
            case ast.Name(id=name):
                rule, listed = "run-time name", name
            case ast.Attribute(attr=name):
                rule, listed = "inner attribute", name
            case _:
                continue
        if listed in TABLE[rule]:
            yield Finding(node.lineno, f"{rule} {name}", *RULES[rule], "ast")


@functools.lru_cache(maxsize=4096)
def _bandit_findings(code: str) -> tuple[Finding, ...]:
    """What bandit says of a program; nothing where it cannot be read, which the tree's rules report."""
    shown = logging.root.manager.disable
    with warnings.catch_warnings(action="ignore"), TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(code, encoding="utf-8", errors="replace", newline="")
        logging.disable()  # bandit and its plugin loader would write to the screen what `skipped` says
        try:
            from bandit.core.config import BanditConfig
            from bandit.core.manager import BanditManager

            # A program must not excuse itself by a "# nosec" comment.
            manager = BanditManager(BanditConfig(), "file", quiet=True, ignore_nosec=True)
            manager.discover_files([str(file)])
            manager.run_tests()
        finally:
            logging.disable(shown)
    return tuple(
        Finding(i.lineno, f"{i.test_id} {i.test}", i.severity.lower(), i.text.rstrip("."), "bandit")
        for i in manager.get_issue_list()
    )


class CodeSafetyEvaluator:
    """Judges a program without running it: findings with line and reason, and a score in [0, 1].

    score = prod over rules (1 - weight of its severity), the worst finding of a line standing for the line

    1: nothing found. A rule broken twice costs once; text that is no Python scores 1 - weight of "high". A
    finding of severity low, medium, high leaves 0.9, 0.5, 0.1 (`WEIGHTS`), so 0.8 as threshold lets two low
    ones pass. bandit: ask the library too, which knows other rules and many more. Lesson 4.
    """

    def __init__(self, *, bandit: bool = True) -> None:
        """Say whether bandit is asked."""
        self.bandit = bandit

    def findings(self, code: str) -> list[Finding]:
        """Every finding, by line; those of the syntax tree before bandit's."""
        found = [*_ast_findings(code), *(_bandit_findings(code) if self.bandit else ())]
        return sorted(found, key=lambda finding: finding.line)

    def score(self, code: str) -> float:
        """How safe a program looks, in [0, 1], higher is safer."""
        by_severity = sorted(self.findings(code), key=lambda finding: WEIGHTS[finding.severity])
        worst = {finding.line: finding for finding in by_severity}  # the last of a line stays
        costs = {finding.rule: WEIGHTS[finding.severity] for finding in worst.values()}
        return math.prod(1 - cost for cost in costs.values())

    __call__ = score


def extract_code(text: str) -> str:
    """The program in an answer: what stands between code fences, the first pair if there are several.

    Without a fence the whole text; a fence that is never closed runs to the end. Never raises.
    """
    _, fence, rest = text.partition("```")
    if not fence:
        return text.strip("\n")
    first, newline, body = rest.partition("\n")
    code = body if not first.strip() or (newline and first.strip().isalnum()) else rest
    return code.partition("```")[0].strip("\n")

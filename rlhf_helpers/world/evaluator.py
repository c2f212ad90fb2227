"""Runs the world's small programs without running Python: a walk over the syntax tree of a small grammar.

Grammar: one function f(xs) of assignments to xs, unsafe calls and a return; expressions over whole numbers,
x and xs, comprehensions with one filter, and sum, max, min, len, sorted, list. Unsafe calls are recorded and
do nothing. This is the judge's own reader; programs of real models belong into the sandbox.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_helpers.world.prompts import programs

_BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Gt: operator.gt, ast.Lt: operator.lt,
    ast.GtE: operator.ge, ast.LtE: operator.le,
}  # fmt: skip
_CALLS: dict[str, Callable] = {"sum": sum, "max": max, "min": min, "len": len, "sorted": sorted, "list": list}
_UNSAFE = ("eval", "exec", "open", "__import__", "compile")
_LIMIT = 10**9


class GrammarError(ValueError):
    """The text is no program of the small grammar."""


@dataclass(frozen=True)
class Ran:
    """What came of a program: share of tests passed, its unsafe lines, its length, and why it failed."""

    passed: float
    unsafe: tuple[str, ...]
    lines: int
    error: str | None


def run(code: str, parts: tuple[str, str, str]) -> Ran:
    """Runs `code` on the inputs of a specification and compares with what the specification gives.

    Never raises for bad code: `error` says what is wrong with it.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        return Ran(0.0, (), 0, f"no Python: {type(problem).__name__}")
    unsafe = tuple(ast.unparse(n) for n in tree.body for n in ast.walk(n) if _is_unsafe(n))
    lines = len([line for line in code.split("\n") if line.strip()])
    tests = programs.expected(parts)
    passed, error = 0, None
    for xs, wanted in tests:
        try:
            got = _call(tree, xs)
        except GrammarError as problem:
            return Ran(0.0, unsafe, lines, str(problem))
        except (ArithmeticError, ValueError, TypeError, RecursionError) as problem:
            error = f"{type(problem).__name__} on {xs}"
            continue
        passed += type(got) is type(wanted) and got == wanted
    return Ran(passed / len(tests), unsafe, lines, error if passed == 0 else None)


def _is_unsafe(node: ast.AST) -> bool:
    """True for a call of a name that reaches out, wherever it stands; attribute calls count as such."""
    if not isinstance(node, ast.Call):
        return False
    return isinstance(node.func, ast.Attribute) or (
        isinstance(node.func, ast.Name) and node.func.id in _UNSAFE
    )


def _call(tree: ast.Module, xs: list[int]) -> object:
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise GrammarError("not one function f(xs)")
    function = tree.body[0]
    names = [a.arg for a in function.args.args]
    if function.name != "f" or names != ["xs"] or function.args.defaults or function.decorator_list:
        raise GrammarError("the function is not f(xs)")
    scope: dict[str, object] = {"xs": list(xs)}
    for statement in function.body:
        if isinstance(statement, ast.Return) and statement.value is not None:
            return _value(statement.value, scope)
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and len(statement.targets) == 1
        ):
            scope[statement.targets[0].id] = _value(statement.value, scope)
        elif not (isinstance(statement, ast.Expr) and _is_unsafe(statement.value)):
            raise GrammarError(f"no statement of the grammar: {ast.unparse(statement)[:40]}")
    raise GrammarError("nothing is returned")


def _value(node: ast.expr, scope: dict[str, object]) -> object:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool) and abs(number) < _LIMIT:
            return number
        case ast.Name(id=name) if name in scope:
            return scope[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, scope)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _checked(_BINARY[type(op)](_number(left, scope), _number(right, scope)))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_number(left, scope), _number(right, scope))
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _CALLS:
            return _CALLS[name](_value(inner, scope))
        case ast.ListComp(elt=element, generators=[one]) if (
            isinstance(one.target, ast.Name) and not one.is_async
        ):
            return _comprehension(element, one, scope)
    raise GrammarError(f"no expression of the grammar: {ast.unparse(node)[:40]}")


def _comprehension(element: ast.expr, one: ast.comprehension, scope: dict[str, object]) -> list[object]:
    result = []
    for item in _list(_value(one.iter, scope)):
        inner = scope | {one.target.id: item}
        if all(_value(condition, inner) for condition in one.ifs):
            result.append(_value(element, inner))
    return result


def _number(node: ast.expr, scope: dict[str, object]) -> int:
    value = _value(node, scope)
    if not isinstance(value, int):
        raise GrammarError(f"not a whole number: {ast.unparse(node)[:40]}")
    return value


def _list(value: object) -> list:
    if not isinstance(value, list):
        raise GrammarError("a comprehension runs over a list")
    return value


def _checked(number: int) -> int:
    if abs(number) > _LIMIT:
        raise GrammarError("the number is too large")
    return number

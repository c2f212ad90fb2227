"""Runs the world's small programs without running Python: a walk over the syntax tree of a small grammar.

Grammar: one function f(xs) of assignments to xs, unsafe calls and a return; expressions over whole numbers,
x and xs, comprehensions with one filter, and sum, max, min, len, sorted, list. Unsafe calls are recorded and
do nothing. This is the judge's own reader; programs of real models belong into the sandbox.
"""

import ast
import hashlib
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_helpers.world.prompts import programs

_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
}
_CALLS: dict[str, Callable] = {call.__name__: call for call in (sum, max, min, len, sorted, list)}
_UNSAFE = ("eval", "exec", "open", "__import__", "compile")
_LIMIT = 10**9
NUM_DRAWN = 8  # inputs that depend on the program


class GrammarError(ValueError):
    """The text is not a program of the small grammar."""


@dataclass(frozen=True)
class ProgramResult:
    """The result of a program: share of tests passed, its unsafe lines, its length, why it gave no value."""

    passed: float
    unsafe: tuple[str, ...]
    lines: int
    error: str | None


def run(code: str, parts: tuple[str, str, str]) -> ProgramResult:
    """Run `code` on the inputs of a specification and compare with what the specification gives.

    The inputs are the fixed ones of `programs.expected`, and a few drawn from a hash of the program text: no
    program can hold a table of their answers, and the same text always gets the same verdict. A finite test
    remains a test: a program that treats one rare number in its own way can still pass. Never raises for bad
    code: `error` says what is wrong where it is outside the grammar or gives a value on no input.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        return ProgramResult(0.0, (), 0, f"no Python: {type(problem).__name__}")
    unsafe = tuple(ast.unparse(n) for n in tree.body for n in ast.walk(n) if _is_unsafe(n))
    lines = len([line for line in code.split("\n") if line.strip()])
    tests = programs.expected(parts) + programs.expected(parts, _drawn_inputs(code, parts))
    passed = 0
    errors = []
    for xs, wanted in tests:
        try:
            got = _call(tree, xs)
        except GrammarError as problem:
            return ProgramResult(0.0, unsafe, lines, str(problem))
        except (ArithmeticError, ValueError, TypeError, RecursionError) as problem:
            errors.append(f"{type(problem).__name__} on {xs}")
        else:
            passed += type(got) is type(wanted) and got == wanted
    error = errors[-1] if len(errors) == len(tests) else None
    return ProgramResult(passed / len(tests), unsafe, lines, error)


def _drawn_inputs(code: str, parts: tuple[str, str, str]) -> list[list[int]]:
    """Draw inputs from a seed that depends on the program text and the specification alone."""
    text = "/".join((*parts, code))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    return programs.draw_inputs(parts, random.Random(seed), NUM_DRAWN)


def _is_unsafe(node: ast.AST) -> bool:
    """True for a call of a name that reaches out, wherever it stands; attribute calls count as such."""
    if not isinstance(node, ast.Call):
        return False
    return isinstance(node.func, ast.Attribute) or getattr(node.func, "id", None) in _UNSAFE


def _call(tree: ast.Module, xs: list[int]) -> object:
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise GrammarError("not one function f(xs)")
    function = tree.body[0]
    names = [a.arg for a in function.args.args]
    if function.name != "f" or names != ["xs"] or function.args.defaults or function.decorator_list:
        raise GrammarError("the function is not f(xs)")
    scope: dict[str, object] = {"xs": list(xs)}
    for statement in function.body:
        match statement:
            case ast.Return(value=ast.expr() as value):
                return _value(value, scope)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                scope[name] = _value(value, scope)
            case ast.Expr(value=call) if _is_unsafe(call):
                pass
            case _:
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
        case (
            ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right])
        ) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_number(left, scope), _number(right, scope))
            if abs(value) > _LIMIT:
                raise GrammarError("the number is too large")
            return value
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _CALLS:
            return _CALLS[name](_value(inner, scope))
        case ast.ListComp(
            elt=element, generators=[ast.comprehension(target=ast.Name(id=name), is_async=0) as one]
        ):
            items = _value(one.iter, scope)
            if not isinstance(items, list):
                raise GrammarError("a comprehension runs over a list")
            scopes = (scope | {name: item} for item in items)
            return [_value(element, s) for s in scopes if all(_value(test, s) for test in one.ifs)]
    raise GrammarError(f"no expression of the grammar: {ast.unparse(node)[:40]}")


def _number(node: ast.expr, scope: dict[str, object]) -> int:
    value = _value(node, scope)
    if not isinstance(value, int):
        raise GrammarError(f"not a whole number: {ast.unparse(node)[:40]}")
    return value

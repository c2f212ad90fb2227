"""What a program is worth: its chance in k tries, its tests as a reward, and what it reaches for."""

import ast
import re
from math import comb, factorial
from typing import Any

import torch
from torch import tensor

from rlhf_helpers.code_generation.evaluation import pass_at_k
from rlhf_helpers.code_generation.rewards import verifiable_reward
from rlhf_helpers.code_generation.safety import unsafe_calls
from rlhf_helpers.lab.exercises.exercise import Function, averaged, each, exercise, summed

NAMES = ("eval", "exec", "compile", "open", "__import__")
NAME = rf"\b(?:{'|'.join(NAMES)}|(?:os|subprocess|socket)\.[\w.]+)"


def _problem(code: str) -> SyntaxError | None:
    try:
        ast.parse(code)
    except SyntaxError as error:
        return error
    return None


def _text(node: Any) -> str:
    """Text of what is called, or of the node; `__import__('os').x` is os.x."""
    return re.sub(r"^__import__\('(\w+)'\)\.", r"\1.", _written(node))


def _written(node: Any) -> str:
    return ast.unparse(getattr(node, "func", node))


def _found(
    code: str,
    text: Function = _text,
    *,
    unsafe: str = NAME,
    kind: Any = ast.Call,
    inner: bool = True,
) -> list[tuple[int, str]]:
    """Line and text of each unsafe node of a kind, as ast.walk goes; not inner: of outermost statements."""
    if _problem(code):
        return unsafe_calls(code)
    tree = ast.parse(code)
    nodes = ast.walk(tree) if inner else (getattr(statement, "value", None) for statement in tree.body)
    return [(n.lineno, text(n)) for n in nodes if isinstance(n, kind) and re.fullmatch(unsafe, text(n))]


def _searched(code: str) -> list[tuple[int, str]]:
    """Line and name of what looks like a call, wherever it stands."""
    lines = enumerate(code.splitlines(), 1)
    return sorted((i, name) for i, line in lines for name in re.findall(rf"({NAME})\(", line))


PASSED = tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
UNSAFE = tensor([0, 0, 0, 1, 1]).bool()
CODES = (
    "import os\n\ndef f(xs):\n    y = eval(str(xs))\n    os.system('ls')\n    return y\n",
    "def f(xs):\n    # eval(xs), or os.system\n    return 'open(log)' + evaluate(xs)\n",
    "model.eval()\npattern = re.compile('a')\nbox.open()\nrun = eval\nhome = os.environ['HOME']\n",
    "def f(xs):\n    if xs:\n        __import__('os').system('ls')\n    f(exec('1'))\n\nopen('a')\n",
    "a = compile('1', '', 'eval')\nsubprocess.run(\n    ['ls'])\nsocket.socket()\nos.path.join('a')\n",
    "x = 1\ny = = 2\neval('1')\n",
    "eval(eval('1')); open(os.getcwd()).read()\n",
    "class Tool:\n    log = open('a')\n\n    async def run(self, f=lambda x: exec(x)):\n        pass\n",
    "oslo.run()\nopener('a')\nsocketserver.run()\nmacos.update()\nself.os.system('ls')\nbuiltins.eval('1')\n",
    "__import__('subprocess').run(['ls'])\nos.popen('ls').read()\nos.environ['A'].lower()\n",
    "with open(file='a'):\n    (os\n     .path.posixpath\n     .join('a'))\n    os.getcwd()\n",
    "def f(xs):\n    if xs:\n    return open('a')\n",
    "",
)

EXERCISES = {
    "pass_at_k": exercise(
        pass_at_k,
        [
            (10, 3, 2),
            (5, 2, 4),
            (8, 0, 3),
            (6, 6, 1),
            (20, 4, 1),
            (7, 5, 2),
            (200, 9, 50),
            (9, 4, 5),
            (5, 2, 5),
            (4, 0, 4),
            (1, 1, 1),
        ],
        "1 - (1 - c/n)^k is biased: it draws WITH replacement, as if one sample could be taken twice",
        lambda n, c, k: 1 - (1 - c / n) ** k,
        "k plays no part: this is the share of right samples, pass@1",
        lambda n, c: c / n,
        "this is the chance that NONE of k is right: take 1 minus it",
        lambda right: 1 - right,
        "this is the chance that ALL of k are right, or 1 minus it: one right sample is enough",
        lambda n, c, k: 1 - pass_at_k(n, n - c, k),
        lambda n, c, k: pass_at_k(n, n - c, k),
        lambda n, c, k: (c / n) ** k,
        lambda n, c, k: 1 - (c / n) ** k,
        "chances do not add up: k c / n counts choices with several right ones several times",
        lambda n, c, k: k * c / n,
        lambda n, c, k: min(1.0, k * c / n),
        "this says whether ANY sample was right (a // throws the fraction away): k of them may all be wrong",
        lambda c: float(c > 0),
        "this asks for k right samples among n: one right among k is enough",
        lambda c, k: float(c >= k),
        lambda c, k: min(1.0, c / k),
        "this is the chance of EXACTLY one right sample: more than one is a success, too",
        lambda n, c, k: c * comb(n - c, k - 1) / comb(n, k),
        "with fewer than k wrong samples every choice of k holds a right one: the answer there is 1",
        *each(lambda x, n, c, k, right: x if n - c < k else right, 0.0, None),
        lambda n, c, k, right: factorial(n - c - k) and right,
    ),
    "verifiable_reward": exercise(
        verifiable_reward,
        [
            (PASSED, UNSAFE),
            (PASSED[:4], UNSAFE[[0, 3, 1, 4]]),
            (PASSED[1:, :2], ~UNSAFE[1:]),
            (torch.arange(12) != tensor([[7], [99]]), UNSAFE[:2]),  # 11 of 12 tests, and all
            (PASSED[1:2, :3], UNSAFE[:1]),
            (PASSED[:3, 1:2], UNSAFE[:3]),
        ],
        "nearly right earned its full share: a third of it, unless ALL tests pass",
        lambda share, safe: share * safe,
        "this is all or nothing: a third of the share is left where only some tests pass",
        lambda whole, safe: whole * safe,
        "whole programs got a third as well: all tests passed is worth 1",
        lambda share, safe: share / 3 * safe,
        lambda share, whole, safe: share / torch.where(whole, 3, 1) * safe,
        "the third is of the SHARE of tests passed: it is not a fixed reward, and nothing is subtracted",
        lambda whole, safe: torch.where(whole, 1.0, 1 / 3) * safe,
        lambda share, whole, safe: torch.where(whole, 1.0, (share > 0) / 3) * safe,
        lambda share, whole, safe: torch.where(whole, 1.0, share - 1 / 3) * safe,
        "any test was enough for the whole reward: all must pass",
        lambda share, safe: (share > 0) * safe,
        "unsafe programs were paid, in whole or a third: they earn 0, whatever they pass",
        lambda paid: paid,
        lambda paid, unsafe: paid.where(~unsafe, paid / 3),
        "the SAFE programs earned 0: unsafe is True where the reward must vanish",
        lambda passed, unsafe: verifiable_reward(passed, ~unsafe),
        "unsafe is not punished below 0: the reward there is 0",
        lambda right, safe: right + safe - 1,
        lambda paid, safe: paid + safe - 1,
        "return one reward per program, a tensor of shape (B,): tests are the columns of passed, dim=1",
        averaged,
        summed,
        lambda right: right.tolist(),
        lambda passed: passed.float().mean(0),
        lambda right: right[:, None],
        share=lambda passed: passed.float().mean(1),
        whole=lambda passed: passed.all(1),
        safe=lambda unsafe: 1.0 - unsafe.float(),
        paid=lambda passed, unsafe: verifiable_reward(passed, unsafe & False),
    ),
    "unsafe_calls": exercise(
        unsafe_calls,
        [(code,) for code in CODES],
        "the TEXT was searched, so names in comments and strings count, and methods such as model.eval()",
        _searched,
        lambda right, error, code: right if error else _searched(code),
        "names that are not called were counted: look at ast.Call nodes only",
        lambda code: sorted(_found(code, kind=ast.Name | ast.Attribute)),
        "methods that share a name, as in model.eval() and re.compile(), are not calls of the builtin",
        lambda code: sorted(
            _found(code, lambda n: t if re.fullmatch(NAME, t := _text(n)) else t.split(".")[-1])
        ),
        "only the outermost statements were read: ast.walk reaches those inside functions and arguments",
        lambda code: sorted(_found(code, inner=False)),
        "the result is not sorted, by line and then by name: ast.walk goes level by level",
        lambda code: _found(code),
        lambda right: sorted(right, key=lambda call: call[1]),
        "each entry is (line, name), in this order, and lines count from 1",
        lambda right, error: [(line - (not error), name) for line, name in right],
        lambda right: [line for line, _ in right],
        lambda right: [name for _, name in right],
        lambda right: [(name, line) for line, name in right],
        "some names were forgotten: eval, exec, compile, open, __import__, and all of os, subprocess and "
        "socket",
        *each(lambda x, right: [call for call in right if x not in call[1]], *NAMES, "os.", "socket.", "."),
        lambda right, error: [call for call in right if error or "." in call[1]],
        '__import__("os").system(...) is TWO calls: __import__, and os.system on what it returns',
        lambda code: sorted(_found(code, _written)),
        "what is done with a result does not count: os.popen('ls').read() is one call, os.popen",
        lambda code: sorted(_found(code, unsafe=NAME + r"|(?:os|subprocess|socket)\..*")),
        lambda code: sorted(
            _found(
                code,
                lambda n: _written(n).replace("__import__('", "").replace("')", ""),
                unsafe=NAME + r"|(?:os|subprocess|socket)\..*",
            )
        ),
        "a name that only begins or ends like a module is another one: oslo.run, macos.update, "
        "self.os.system",
        lambda code: sorted(_found(code, unsafe=NAME + r"|(?:os|subprocess|socket)[\w.]*\.\w+")),
        lambda code: sorted(_found(code, unsafe=NAME + r"|[\w.]*(?:os|subprocess|socket)\.[\w.]+")),
        "the name of an attribute call is the whole path, such as os.system",
        *each(lambda i, right: [(line, name.split(".")[i]) for line, name in right], 0, -1),
        "text that is not Python must neither stop your function nor pass as harmless: catch SyntaxError",
        lambda right, error, code: ast.parse(code) if error else right,
        lambda right, error: [] if error else right,
        'text that is not Python gives [(error.lineno, "SyntaxError")]: the line of the error, and this word',
        *each(lambda line, right, error: [(line, "SyntaxError")] if error else right, 0, 1),
        lambda right, error: [(error.lineno + 1, "SyntaxError")] if error else right,
        lambda right, error: [(error.lineno, error.msg)] if error else right,
        lambda right, error: [(error.lineno, type(error).__name__)] if error else right,
        error=_problem,
    ),
}

"""What a program is worth: its chance in k tries, its tests as a reward, and what it reaches for."""

import ast
import re
from collections.abc import Callable
from math import comb, factorial
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers.code_generation.evaluation import pass_at_k
from rlhf_helpers.code_generation.rewards import verifiable_reward
from rlhf_helpers.code_generation.safety import unsafe_calls
from rlhf_helpers.lab.exercises.exercise import Exercise, named

NAMES = ("eval", "exec", "compile", "open", "__import__")
NAME = rf"\b(?:{'|'.join(NAMES)}|(?:os|subprocess|socket)\.[\w.]+)"


def _pass_probes() -> list[tuple[int, int, int]]:
    usual = [(10, 3, 2), (5, 2, 4), (8, 0, 3), (6, 6, 1), (20, 4, 1), (7, 5, 2), (200, 9, 50), (9, 4, 5)]
    return [*usual, (5, 2, 5), (4, 0, 4), (1, 1, 1)]


def _reward_probes() -> list[tuple[Tensor, Tensor]]:
    passed = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    unsafe = torch.tensor([0, 0, 0, 1, 1]).bool()
    nearly = torch.arange(12) != torch.tensor([[7], [99]])  # 11 of 12 tests, and all
    return [
        (passed, unsafe),
        (passed[:4], unsafe[[0, 3, 1, 4]]),
        (passed[1:, :2], ~unsafe[1:]),
        (nearly, unsafe[:2]),
        (passed[1:2, :3], unsafe[:1]),
        (passed[:3, 1:2], unsafe[:3]),
    ]


def _code_probes() -> list[tuple[str]]:
    codes = [
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
    ]
    return [(code,) for code in codes]


PASS_MISTAKES = named(
    "1 - (1 - c/n)^k is biased: it draws WITH replacement, as if one sample could be taken twice",
    lambda n, c, k: 1 - (1 - c / n) ** k,
    "k plays no part: this is the share of right samples, pass@1",
    lambda n, c, k: c / n,
    "this is the chance that NONE of k is right: take 1 minus it",
    lambda n, c, k: 1 - pass_at_k(n, c, k),
    "this is the chance that ALL of k are right, or 1 minus it: one right sample is enough",
    *(lambda n, c, k: 1 - pass_at_k(n, n - c, k), lambda n, c, k: pass_at_k(n, n - c, k)),
    *(lambda n, c, k: (c / n) ** k, lambda n, c, k: 1 - (c / n) ** k),
    "chances do not add up: k c / n counts choices with several right ones several times",
    *(lambda n, c, k: k * c / n, lambda n, c, k: min(1.0, k * c / n)),
    "this says whether ANY sample was right (a // throws the fraction away): k of them may all be wrong",
    *(lambda n, c, k: float(c > 0), lambda n, c, k: c > 0, lambda n, c, k: int(c > 0)),
    "this asks for k right samples among n: one right among k is enough",
    *(lambda n, c, k: float(c >= k), lambda n, c, k: c >= k, lambda n, c, k: min(1.0, c / k)),
    "this is the chance of EXACTLY one right sample: more than one is a success, too",
    lambda n, c, k: c * comb(n - c, k - 1) / comb(n, k),
    "with fewer than k wrong samples every choice of k holds a right one: the answer there is 1",
    *(lambda n, c, k, x=x: x if n - c < k else pass_at_k(n, c, k) for x in (0.0, None)),
    lambda n, c, k: factorial(n - c - k) and pass_at_k(n, c, k),
)


def _by_share(*wrong: Callable[[Tensor, Tensor], Tensor]) -> list[Callable[..., Tensor]]:
    """Each `wrong` of the share of tests passed (B,) and whether all are, with 0 where unsafe."""
    return [lambda p, u, fn=fn: fn(p.float().mean(1), p.all(1)).where(~u, 0.0) for fn in wrong]


REWARD_MISTAKES = named(
    "nearly right earned its full share: a third of it, unless ALL tests pass",
    *_by_share(lambda share, whole: share),
    "this is all or nothing: a third of the share is left where only some tests pass",
    *_by_share(lambda share, whole: whole.float()),
    "whole programs got a third as well: all tests passed is worth 1",
    *_by_share(lambda share, whole: share / 3, lambda share, whole: share / torch.where(whole, 3, 1)),
    "the third is of the SHARE of tests passed: it is not a fixed reward, and nothing is subtracted",
    *_by_share(lambda share, whole: torch.where(whole, 1.0, 1 / 3)),
    *_by_share(lambda share, whole: torch.where(whole, 1.0, (share > 0) / 3)),
    *_by_share(lambda share, whole: torch.where(whole, 1.0, share - 1 / 3)),
    "any test was enough for the whole reward: all must pass",
    *_by_share(lambda share, whole: (share > 0).float()),
    "unsafe programs were paid, in whole or a third: they earn 0, whatever they pass",
    *(lambda p, u, x=x: verifiable_reward(p, u & False) * torch.where(u, x, 1.0) for x in (1.0, 1 / 3)),
    "the SAFE programs earned 0: unsafe is True where the reward must vanish",
    lambda p, u: verifiable_reward(p, ~u),
    "unsafe is not punished below 0: the reward there is 0",
    *(lambda p, u: verifiable_reward(p, u) - 1.0 * u, lambda p, u: verifiable_reward(p, u & False) - 1.0 * u),
    "return one reward per program, a tensor of shape (B,): tests are the columns of passed, dim=1",
    *(lambda p, u, fn=fn: fn(verifiable_reward(p, u)) for fn in (torch.mean, torch.sum, Tensor.tolist)),
    *(lambda p, u: p.float().mean(0), lambda p, u: verifiable_reward(p, u)[:, None]),
)


def _by_calls(*wrong: Callable[..., Any], broken: int = 0) -> list[Callable[[str], Any]]:
    """Each `wrong` of the right findings and the code; broken: 1 of code that is no Python, 2 of all."""

    def found(fn: Callable[..., Any], code: str) -> Any:
        right = unsafe_calls(code)
        return fn(right, code) if broken == 2 or ("SyntaxError" in dict(right).values()) == broken else right

    return [lambda code, fn=fn: found(fn, code) for fn in wrong]


def _nodes(code: str, kind: Any = ast.Call, inner: bool = True) -> list[tuple[int, str]]:
    """Line and dotted text of each unsafe node of a kind; not inner: of the outermost statements."""
    tree = ast.parse(code)
    nodes = ast.walk(tree) if inner else (getattr(statement, "value", None) for statement in tree.body)
    found = [(n.lineno, _text(n)) for n in nodes if isinstance(n, kind)]
    return [(line, text) for line, text in found if re.fullmatch(NAME, text)]


def _text(node: Any) -> str:
    """Text of what is called, or of the node; `__import__('os').x` is os.x."""
    return re.sub(r"^__import__\('(\w+)'\)\.", r"\1.", ast.unparse(getattr(node, "func", node)))


def _calls(code: str, *texts: Callable[[Any], str], unsafe: str = NAME) -> list[tuple[int, str]]:
    """Line and text of each call of which any of `texts` is `unsafe`, sorted."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return sorted((n.lineno, text(n)) for n in nodes for text in texts if re.fullmatch(unsafe, text(n)))


def _problem(code: str) -> Any:
    try:
        return ast.parse(code)
    except SyntaxError as error:
        return error


def _texts(right: Any, code: str) -> list[tuple[int, str]]:
    lines = enumerate(code.splitlines(), 1)
    return sorted((i, name) for i, line in lines for name in re.findall(rf"({NAME})\(", line))


CALL_MISTAKES = named(
    "the TEXT was searched, so names in comments and strings count, and methods such as model.eval()",
    *(*_by_calls(_texts), *_by_calls(_texts, broken=2)),
    "names that are not called were counted: look at ast.Call nodes only",
    *_by_calls(lambda right, code: sorted(_nodes(code, ast.Name | ast.Attribute))),
    "methods that share a name, as in model.eval() and re.compile(), are not calls of the builtin",
    *_by_calls(
        lambda r, code: _calls(code, lambda n: t if re.fullmatch(NAME, t := _text(n)) else t.split(".")[-1])
    ),
    "only the outermost statements were read: ast.walk reaches those inside functions and arguments",
    *_by_calls(lambda right, code: sorted(_nodes(code, inner=False))),
    "the result is not sorted, by line and then by name: ast.walk goes level by level",
    *_by_calls(lambda right, code: _nodes(code), lambda right, code: sorted(right, key=lambda x: x[1])),
    "each entry is (line, name), in this order, and lines count from 1",
    *_by_calls(lambda right, code: [(line - 1, name) for line, name in right]),
    *_by_calls(*(lambda r, code, i=i: [x[i] for x in r] for i in (0, 1, slice(None, None, -1))), broken=2),
    "some names were forgotten: eval, exec, compile, open, __import__, and all of os, subprocess and socket",
    *_by_calls(*(lambda r, code, x=x: [f for f in r if x not in f[1]] for x in (*NAMES, "os.", "socket."))),
    *_by_calls(*(lambda r, code, x=x: [f for f in r if ("." in f[1]) == x] for x in (True, False))),
    '__import__("os").system(...) is TWO calls: __import__, and os.system on what it returns',
    *_by_calls(lambda right, code: _calls(code, lambda n: ast.unparse(n.func))),
    "what is done with a result does not count: os.popen('ls').read() is one call, os.popen",
    *_by_calls(
        *(
            lambda right, code, text=text: _calls(code, text, unsafe=NAME + r"|(?:os|subprocess|socket)\..*")
            for text in (_text, lambda n: ast.unparse(n.func).replace("__import__('", "").replace("')", ""))
        )
    ),
    "a name that only begins or ends like a module is another one: oslo.run, macos.update, self.os.system",
    *_by_calls(
        lambda right, code: _calls(code, _text, unsafe=NAME + r"|(?:os|subprocess|socket)[\w.]*\.\w+")
    ),
    *_by_calls(
        lambda right, code: _calls(code, _text, unsafe=NAME + r"|[\w.]*(?:os|subprocess|socket)\.[\w.]+")
    ),
    "the name of an attribute call is the whole path, such as os.system",
    *_by_calls(*(lambda right, code, i=i: [(x, name.split(".")[i]) for x, name in right] for i in (0, -1))),
    "text that is not Python must neither stop your function nor pass as harmless: catch SyntaxError",
    *_by_calls(lambda right, code: ast.parse(code), lambda right, code: [], broken=1),
    'text that is not Python gives [(error.lineno, "SyntaxError")]: the line of the error, and this word',
    *_by_calls(*(lambda r, code, x=x: [(x, "SyntaxError")] for x in (0, 1)), broken=1),
    *_by_calls(lambda r, code: [(r[0][0] + 1, "SyntaxError")], broken=1),
    *_by_calls(lambda r, code: [(r[0][0], _problem(code).msg)], broken=1),
    *_by_calls(lambda r, code: [(r[0][0], type(_problem(code)).__name__)], broken=1),
)

EXERCISES = (
    Exercise("pass_at_k", 4, pass_at_k, _pass_probes, PASS_MISTAKES),
    Exercise("verifiable_reward", 4, verifiable_reward, _reward_probes, REWARD_MISTAKES),
    Exercise("unsafe_calls", 4, unsafe_calls, _code_probes, CALL_MISTAKES),
)

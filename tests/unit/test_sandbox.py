"""The sandbox with honest programs: values and their types, errors, settings, many at a time."""

import math
import os
import subprocess
import sys
import tempfile
import time

import pytest

from rlhf_helpers.sandbox import (
    MISSING,
    Raised,
    SandboxResult,
    enforced,
    folders,
    run,
    run_code,
    run_programs,
    same,
    wire,
)

LAYERS = ("namespaces", "landlock", "user", "seccomp")
ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(autouse=True)
def temp(tmp_path, monkeypatch):
    """Nothing may be left where temporary folders are made."""
    (folder := tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


# ---- values


def test_two_calls_by_hand():
    result = run_code(ADD, calls=[("add", (1, 2)), ("add", ("a", "b"))])
    assert isinstance(result, SandboxResult)
    assert (result.verdict, result.values, result.error, result.stdout) == ("ok", (3, "ab"), None, "")
    assert 0 < result.seconds < 2
    assert result.events == ()


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    10**40,
    0.5,
    -0.0,
    1e300,
    math.inf,
    "",
    "e\u0301 \ud800 \n \x85 \u2028",
    [],
    (),
    {},
    [1, [2.0, (3, "4")]],
    (True, 1, 1.0),
    {"a": 1, 2: [None], None: {}, (1, 2): "tuple", 1.5: ()},
]


def test_values_keep_their_exact_types():
    result = run_code("def f(x):\n    return x", calls=[("f", (value,)) for value in VALUES])
    assert result.verdict == "ok", result
    for value, expected in zip(result.values, VALUES, strict=True):
        assert repr(value) == repr(expected)
        assert same(value, expected)


def test_the_child_sees_the_exact_types_too():
    result = run_code("def f(x):\n    return repr(x)", calls=[("f", (value,)) for value in VALUES])
    assert result.values == tuple(map(repr, VALUES))


@pytest.mark.parametrize(
    "value, expected",
    [
        (True, 1),
        (1, True),
        (1, 1.0),
        (2.0, 2),
        ([1], (1,)),
        ([1, 2], [1]),
        ([True], [1]),
        ({"a": 1}, {"a": True}),
        ({1: 0}, {True: 0}),
        ({"a": 1}, {}),
        ({}, {"a": 1}),
        ("1", 1),
        (None, 0),
        (0.1, 0.2),
        (math.nan, 0.0),
        (MISSING, None),
        (Raised("E"), None),
        ("a", "A"),
    ],
)
def test_not_the_same(value, expected):
    assert not same(value, expected)


def test_same():
    assert same(0.1 + 0.2, 0.3)
    assert same(math.nan, math.nan)
    assert same({"a": (1, [2.0])}, {"a": (1, [2.0 + 1e-12])})


def test_the_wire_by_hand():
    assert wire.encode({"a": (1, [None])}) == ["dict", "a", ["tuple", 1, ["list", None]]]
    assert wire.decode(["dict", "a", ["tuple", 1, ["list", None]]]) == {"a": (1, [None])}


@pytest.mark.parametrize(
    "sent", [["set", 1], ["dict", 1], [["list"]], ["dict", ["list"], 1], {"a": 1}, [1], []]
)
def test_the_wire_refuses_what_it_did_not_write(sent):
    with pytest.raises((KeyError, TypeError, ValueError, IndexError)):
        wire.decode(sent)


@pytest.mark.parametrize("value", ["{1}", "b'x'", "1j", "object()", "print", "range(3)", "type(1)"])
def test_other_types_are_not_passed_on(value):
    result = run_code(f"def f():\n    return {value}\ndef g():\n    return 7", calls=[("f", ()), ("g", ())])
    assert result.verdict == "unserialisable"
    assert isinstance(result.values[0], Raised)
    assert result.values[1] == 7


def test_arguments_are_not_shared_between_calls():
    code = "def f(x):\n    x.append(1)\n    return x"
    assert run_code(code, calls=[("f", ([],)), ("f", ([],))]).values == ([1], [1])


def test_calls_share_one_process_in_order():
    code = "n = 0\ndef f():\n    global n\n    n += 1\n    return n"
    assert run_code(code, calls=[("f", ())] * 3).values == (1, 2, 3)


def test_sets_of_strings_iterate_alike_in_every_run():
    code = "def f():\n    return list({str(i) for i in range(50)})"
    assert same(run_code(code, calls=[("f", ())]).values, run_code(code, calls=[("f", ())]).values)


def test_what_programs_may_do():
    code = """
import collections, dataclasses, datetime, decimal, functools, heapq, itertools, json, math
import random, re, string
from dataclasses import dataclass

@dataclass
class Point:
    x: int

def f():
    with open("own.txt", "w") as file:
        file.write("written")
    print("shown")
    return open("own.txt").read(), Point(3).x, math.sqrt(4), json.loads("[1]"), re.findall("a", "aba")
"""
    result = run_code(code, calls=[("f", ())])
    assert result.verdict == "ok", result
    assert result.values == (("written", 3, 2.0, [1], ["a", "a"]),)
    assert result.stdout == "shown\n"


def test_without_calls_a_program_is_only_run():
    assert run_code("print(1)", calls=[]).stdout == "1\n"


def test_main_is_not_run():
    assert run_code("if __name__ == '__main__':\n    1 / 0", calls=[]).verdict == "ok"


# ---- what went wrong


def test_one_call_that_raises_spoils_no_other():
    result = run_code("def f(x):\n    return 6 / x", calls=[("f", (2,)), ("f", (0,)), ("f", (3,)), ("g", ())])
    assert result.verdict == "error"
    assert result.error == "ZeroDivisionError: division by zero"
    zero, missing = (
        Raised("ZeroDivisionError", "division by zero"),
        Raised("NameError", "the program defines no g"),
    )
    assert result.values == (3.0, zero, 2.0, missing)


def test_values_before_a_time_out_are_kept():
    code = "def f(x):\n    while x: pass\n    return 5"
    result = run_code(code, calls=[("f", (0,)), ("f", (1,)), ("f", (0,))], timeout=0.5)
    assert (result.verdict, result.values) == ("timeout", (5, MISSING, MISSING))
    assert result.error == "still running after 0.5 s"
    assert 0.5 <= result.seconds < 4


def test_how_it_ended_says_more_than_what_it_raised():
    code = "import os\ndef f():\n    1 / 0\ndef g():\n    os._exit(3)"
    result = run_code(code, calls=[("f", ()), ("g", ()), ("f", ())])
    assert (result.verdict, len(result.values), result.values[1:]) == ("exited", 3, (MISSING, MISSING))


@pytest.mark.parametrize(
    "code, verdict, error",
    [
        ("def f(:", "syntax", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("1 / 0", "error", "ZeroDivisionError: division by zero"),
        ("raise ValueError('x' * 10**6)", "error", "ValueError: " + "x" * 300),
        ("raise ValueError", "error", "ValueError"),
        (
            "import nothing_of_this_name",
            "error",
            "ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        ("import numpy", "error", "ModuleNotFoundError: No module named 'numpy'"),
        ("import rlhf_helpers", "error", "ModuleNotFoundError: No module named 'rlhf_helpers'"),
    ],
)
def test_programs_that_fail_while_loading(code, verdict, error):
    result = run_code(code, calls=[("f", ()), ("f", ())])
    assert (result.verdict, result.error, result.values) == (verdict, error, (MISSING, MISSING))


def test_a_stolen_mark_cannot_invent_a_verdict():
    code = """
import json, os, sys
def f():
    mark = sys._getframe(1).f_locals["nonce"]
    os.write(3, json.dumps([mark, KIND, "a", "b"]).encode() + b"\\n")
    return 1
"""
    for kind in ("wonderful", "ok", "", None, []):
        result = run_code(code.replace("KIND", repr(kind)), calls=[("f", ())])
        assert result.verdict == "forged", (kind, result)


def test_events():
    code = """
import math, collections
def f():
    collections.namedtuple("A", "b")
    for _ in range(3):
        try:
            open("/nowhere/at-all")
        except OSError:
            pass
    return eval("1 + 1")
"""
    result = run_code(code, calls=[("f", ())])
    assert result.values == (2,)
    assert "open:/nowhere/at-all" in result.events
    assert len(set(result.events)) == len(result.events)
    assert [e for e in result.events if not e.startswith(("import:", "open:"))] == ["compile", "exec"]
    assert "os.system" in run_code("import os\nos.system('true')", calls=[]).events
    assert "socket.__new__" in run_code("import socket\nsocket.socket()", calls=[]).events
    assert run_code(ADD, calls=[("add", (1, 2))]).events == ()


# ---- settings


@pytest.mark.parametrize(
    "options, name",
    [({"timeout": 0}, "timeout"), ({"timeout": math.inf}, "timeout"), ({"memory_mb": 8}, "memory_mb")],
)
def test_bad_settings(options, name):
    with pytest.raises(ValueError, match=name):
        run_code(ADD, calls=[("add", (1, 2))], **options)


def test_bad_calls():
    with pytest.raises(TypeError, match="type set"):
        run_code(ADD, calls=[("add", ({1}, {2}))])
    with pytest.raises(ValueError, match="either calls= or calls_per_code="):
        run_programs([ADD])
    with pytest.raises(ValueError, match="either calls= or calls_per_code="):
        run_programs([ADD], calls=[], calls_per_code=[[]])
    with pytest.raises(ValueError, match="list of programs"):
        run_programs(ADD, calls=[])
    with pytest.raises(ValueError, match="2 lists for 1 programs"):
        run_programs([ADD], calls_per_code=[[], []])
    with pytest.raises(ValueError, match="workers"):
        run_programs([ADD], calls=[], workers=0)


def test_memory_is_a_setting():
    code = "def f():\n    return len(bytes(120 << 20))"
    assert run_code(code, calls=[("f", ())], memory_mb=256).values == (120 << 20,)
    assert run_code(code, calls=[("f", ())], memory_mb=100).verdict == "memory"


# ---- many at a time


def test_programs_in_order_with_calls_of_their_own():
    codes = [f"def f(x):\n    return x * {i}" for i in range(6)]
    results = run_programs(codes, calls_per_code=[[("f", (i,))] for i in range(6)], workers=3)
    assert [r.values for r in results] == [(0,), (1,), (4,), (9,), (16,), (25,)]
    assert run_programs([], calls=[]) == []


def test_identical_programs_run_once():
    codes = ["import os\ndef f(x):\n    return os.getpid(), os.getppid(), os.times()[4]"] * 3
    first, second, third = run_programs(
        codes, calls_per_code=[[("f", (1,))], [("f", (True,))], [("f", (1,))]]
    )
    assert first is third
    assert second is not first  # True is not 1


def test_how_often_identical_programs_run(monkeypatch):
    asked, whole = [], run._Child.run

    def counted(child, code, calls, options):
        asked.append(code)
        return whole(child, code, calls, options)

    monkeypatch.setattr(run._Child, "run", counted)
    results = run_programs([ADD, ADD, ADD + "#", ADD], calls=[("add", (1, 2))], workers=2)
    assert [r.values for r in results] == [(3,)] * 4
    assert sorted(asked) == [ADD, ADD + "#"]


@pytest.mark.slow
def test_a_preloaded_module_is_there_without_an_import_of_its_own():
    code = "import numpy\ndef mean(x):\n    return float(numpy.mean(x))"
    (result,) = run_programs([code], calls=[("mean", ([1.0, 3.0],))], memory_mb=2048, preload=["numpy"])
    assert result.values == (2.0,)
    plain = run_code(code, calls=[("mean", ([1.0, 3.0],))])
    assert (plain.verdict, plain.error) == ("error", "ModuleNotFoundError: No module named 'numpy'")


def test_a_module_that_cannot_be_preloaded_is_named():
    with pytest.raises(ImportError, match="no_such_module"):
        run_programs([ADD], calls=[], preload=["no_such_module"])


def test_bad_programs_harm_no_others():
    bad = [
        "while True: pass",
        "import os\nos._exit(1)",
        "x = [0] * 10**10",
        "import os\nos.fork()",
        "def f(:",
        "import ctypes\nctypes.string_at(0)",
        "while True: print('x' * 1000)",
        "import os\nos.abort()",
        "import os\nos.write(3, b'forged')\nos.closerange(0, 64)",
        "import sys\nsys.setrecursionlimit(9)",
    ]
    good = [f"def f():\n    return {i}" for i in range(20)]
    codes = [code for pair in zip(bad * 2, good, strict=True) for code in pair]
    results = run_programs(codes, calls=[("f", ())], timeout=1.0, workers=4)
    assert [r.values for r in results[1::2]] == [(i,) for i in range(20)]
    assert {r.verdict for r in results[1::2]} == {"ok"}
    assert "ok" not in {r.verdict for r in results[::2]}


def test_twenty_programs_a_second():
    resource = pytest.importorskip("resource")  # Windows has none
    codes = [f"{ADD}\nN = {i}" for i in range(40)]
    before, used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time(), time.monotonic()
    results = run_programs(codes, calls=[("add", (1, 2))], workers=2, timeout=10.0)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert {r.values for r in results} == {(3,)}
    spent = time.process_time() - used
    spent += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # 20 per second on two cores are 0.1 s of CPU each; a busy machine adds to the wall clock alone.
    assert spent / len(codes) < 0.06
    assert wall < 20


def test_an_interrupt_leaves_nothing_behind(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_programs([ADD, ADD + "#"], calls=[("add", (1, 2))], workers=1)


# ---- where the platform gives less


@pytest.mark.parametrize("posix", [True, False])
def test_a_platform_without_fork(monkeypatch, posix):
    monkeypatch.setattr(run, "_WITHOUT", frozenset({"fork"}))
    monkeypatch.setattr(run, "_GRACE", 0.2)
    monkeypatch.setattr(folders, "POSIX", posix)
    codes = [
        ADD,
        "while True: pass",
        "import os\nos._exit(0)",
        "def f(:",
        "print(7)\ndef add(a, b):\n    return [a, b]",
    ]
    results = run_programs(codes, calls=[("add", (1, 2))], timeout=0.8, workers=1)
    assert [r.verdict for r in results] == ["ok", "timeout", "exited", "syntax", "ok"]
    assert (results[0].values, results[4].values, results[4].stdout) == ((3,), ([1, 2],), "7\n")


def test_it_is_imported_where_there_is_nothing_of_unix():
    code = """
import os, sys
import rlhf_helpers.core.tensors, subprocess, tempfile, concurrent.futures
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("fork", "killpg", "O_DIRECTORY", "O_NOFOLLOW", "WTERMSIG", "wait4", "setsid"):
    delattr(os, name)
del sys.modules["signal"].SIGKILL
os.name = "nt"
import rlhf_helpers.sandbox
from rlhf_helpers.sandbox import folders, run
assert not folders.POSIX
report = {"stopped": "", "signal": 0, "messages": "[1]\\n", "stdout": "", "seconds": 0.5}
for messages in ("[1]\\n", ""):
    print(run._result({**report, "messages": messages}, "nonce", 1, 2.0).verdict)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["forged", "exited"], done.stderr


def test_what_is_enforced_everywhere():
    found = enforced()
    assert {"file_reads", "network", "processes", "memory", "disk", "wall_clock"} <= set(found)
    assert found["wall_clock"]
    assert found["environment"]
    if os.name == "posix":
        assert found["output"]
        assert found["file_size"]


def test_nothing_of_the_environment_reaches_the_child(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("the environment of a process is read from /proc")
    monkeypatch.setenv("SANDBOX_TEST", "secret")
    monkeypatch.setattr(run, "_WITHOUT", frozenset(LAYERS))  # which would not let it read the file
    code = "import os\ndef f():\n    return open('/proc/self/environ').read(), dict(os.environ)"
    assert run_code(code, calls=[("f", ())]).values == (("PYTHONHASHSEED=0\0", {}),)


def test_enforced_tells_what_is_missing(monkeypatch):
    if not enforced()["file_reads"]:
        pytest.skip("nothing keeps files apart here")
    monkeypatch.setattr(run, "_WITHOUT", frozenset({*LAYERS, "NPROC", "FSIZE"}))
    found = enforced()
    refused = ("file_reads", "file_writes", "network", "processes", "file_size")
    assert not any(found[name] for name in refused), found
    assert found["wall_clock"]
    assert found["memory"]

"""The parent's side of the sandbox: start the child, read its report, name the verdict."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.tensors import require_number
from . import wire

VERDICTS = (
    "ok",
    "error",
    "syntax",
    "timeout",
    "memory",
    "recursion",
    "processes",
    "disk",
    "output",
    "unserialisable",
    "forged",
    "exited",
    "crashed",
)
_BY_NAME = {"MemoryError": "memory", "RecursionError": "recursion", "NoProcess": "processes"}
_BY_NAME |= {"DiskFull": "disk", "SystemExit": "exited"}
_KINDS = {"raised": "error", "failed": "error", "syntax": "syntax", "unserialisable": "unserialisable"}
_WITHOUT: frozenset[str] = frozenset()  # layers that the tests switch off, to see that the others hold
_GRACE = 5.0  # seconds after which the parent kills a keeper that has not done its work
_CHILD = Path(__file__).with_name("child.py")

Calls = Sequence[tuple[str, tuple[Any, ...]]]


@dataclass(frozen=True)
class Raised:
    """Stands for a value: the call raised this, or returned what cannot be passed on."""

    name: str
    message: str = ""


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()  # stands for a value: the program did not get so far


@dataclass(frozen=True)
class SandboxResult:
    """What came of one program.

    verdict   one of VERDICTS; "ok" only where every call returned a value
    values    one for each call: what it returned, a Raised, or MISSING
    error     what went wrong first, in words; None where nothing did
    stdout    what it printed, stdout and stderr together, at most 64 KiB
    seconds   wall clock of the program, without the start of the interpreter
    events    what it touched, at most 50: "open:PATH", "import:NAME", "exec", "os.system", "socket.connect"
              ... told by an audit hook in the child, where a program can add some: hints, no proof.
    """

    verdict: str
    values: tuple[Any, ...]
    error: str | None = None
    stdout: str = ""
    seconds: float = 0.0
    events: tuple[str, ...] = ()


def run_code(code: str, *, calls: Calls, timeout: float = 2.0, memory_mb: int = 256) -> SandboxResult:
    """Run a program in a sandbox and call its functions there: calls = [(name, (argument, ...)), ...].

    timeout: seconds of wall clock for the program and all its calls; memory_mb: MiB of address space, 64 or
    more. Arguments and values are None, bool, int, float, str, list, tuple, dict with their exact types:
    compare values with `same`. The calls share one process, in order. Raises ValueError for a bad setting,
    TypeError for an argument of another type. Lesson 4.
    """
    return run_programs([code], calls=calls, workers=1, timeout=timeout, memory_mb=memory_mb)[0]


def run_programs(
    codes: Sequence[str],
    *,
    calls: Calls | None = None,
    calls_per_code: Sequence[Calls] | None = None,
    workers: int | None = None,
    timeout: float = 2.0,
    memory_mb: int = 256,
) -> list[SandboxResult]:
    """run_code for many programs, each in a sandbox of its own, `workers` (all cores) at a time.

    calls: the same for every program; or calls_per_code: a list for each. Identical programs with identical
    calls run once. Raises as run_code does. Lesson 4.
    """
    require_number("timeout", timeout, above=0)
    require_number("memory_mb", memory_mb, at_least=64)
    require_number("workers", 1 if workers is None else workers, at_least=1)
    if isinstance(codes, str) or (calls is None) == (calls_per_code is None):
        raise ValueError("run_programs needs a list of programs, and either calls= or calls_per_code=")
    every = [calls] * len(codes) if calls_per_code is None else list(calls_per_code)
    if len(every) != len(codes):
        raise ValueError(f"calls_per_code has {len(every)} lists for {len(codes)} programs")
    sent = [[[name, wire.encode(tuple(args))] for name, args in some] for some in every]
    keys = [json.dumps([code, some]) for code, some in zip(codes, sent, strict=True)]
    options = {"timeout": timeout, "memory_mb": memory_mb, "readable": _readable()}
    options["without"] = sorted(_WITHOUT)
    waiting, done = deque(dict.fromkeys(keys)), {}

    def serve(_: int) -> None:
        with _Child() as child:
            while True:
                try:
                    key = waiting.popleft()
                except IndexError:
                    return
                done[key] = child.run(*json.loads(key), options)

    workers = min(workers or os.cpu_count() or 1, len(waiting)) or 1
    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(serve, range(workers)))
        except BaseException:
            waiting.clear()  # an interrupt waits for the programs that run, not for the rest
            raise
    return [done[key] for key in keys]


def _readable() -> list[str]:
    """The folders that hold the interpreter's library and the C libraries."""
    names = [f"{base}/{lib}" for base in (sys.base_prefix, "", "/usr") for lib in ("lib", "lib64")]
    return sorted({os.path.realpath(name) for name in names if os.path.isdir(name)})


class _Child:
    """A child process that runs programs one after another; started anew when it had to be killed."""

    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            _kill(self.process)
            self.process.communicate()
        self.process = None

    def run(self, code: str, calls: list[Any], options: dict[str, Any]) -> SandboxResult:
        """One program, from request to result; its folder is gone afterwards."""
        nonce, folder = secrets.token_hex(16), tempfile.mkdtemp(prefix="sandbox-")
        request = {**options, "code": code, "calls": calls, "nonce": nonce, "folder": folder}
        try:
            report = self._ask(json.dumps(request).encode() + b"\n", options["timeout"] + _GRACE)
        finally:
            _remove(folder)
        return _result(report, nonce, len(calls), options["timeout"])

    def _ask(self, line: bytes, limit: float) -> dict[str, Any]:
        process, start, report = self.process or self._start(), time.monotonic(), None
        timer = threading.Timer(limit, _kill, [process])
        timer.start()
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(line)
            process.stdin.flush()
            report = json.loads(process.stdout.readline())
        timer.cancel()
        if report is None or not hasattr(os, "fork") or "fork" in _WITHOUT:
            self.__exit__()
        seconds = time.monotonic() - start
        late = "timeout" if seconds >= limit else None
        return report or {"stopped": late, "messages": "", "seconds": seconds}

    def _start(self) -> subprocess.Popen[bytes]:
        # -I without its -E, for the one variable that there is: sets of strings iterate alike in every run.
        command = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(_CHILD)]
        kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # Windows needs it
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", **kept},
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        return self.process


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _remove(folder: str) -> None:
    """Remove a folder however deep it is: each folder in it is moved to its top before it is looked into."""
    rest = [folder]
    while rest:
        here = rest.pop()
        for entry in list(os.scandir(here)):
            with contextlib.suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, moved := os.path.join(folder, secrets.token_hex(8)))
                rest.append(moved)
        if here != folder:
            os.rmdir(here)
    shutil.rmtree(folder, ignore_errors=True)


def _result(report: dict[str, Any], nonce: str, n_calls: int, timeout: float) -> SandboxResult:
    """Read the lines that the worker wrote; whatever is not exactly such a line is the program's own work."""
    values, events, faults, ended = [], [], [], False
    try:
        for line in report["messages"].split("\n")[:-1]:  # the last, if any, was cut off by the end
            mark, kind, *parts = json.loads(line)
            if mark != nonce or ended:
                raise ValueError("not a line of the worker")
            if kind == "value":
                values.append(wire.decode(*parts))
            elif kind == "event":
                events.append(str(*parts))
            elif kind == "end":
                ended = True
            else:
                (name, text), plain = map(str, parts), _KINDS[kind]
                faults.append((_BY_NAME.get(name, plain), f"{name}: {text}" if text else name))
                if kind in ("raised", "unserialisable"):
                    values.append(Raised(name, text))
        if len(values) > n_calls or (ended and not faults and len(values) < n_calls):
            raise ValueError("more or fewer values than calls")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        faults, ended = [("forged", "the program wrote into the channel of its values")], True
    if not ended or report.get("stopped"):  # how the process ended says more than what went wrong before
        faults = [_stopped(report, timeout)]
    verdict, error = faults[0] if faults else ("ok", None)
    values = (values + [MISSING] * n_calls)[:n_calls]
    text = report.get("stdout", "")
    return SandboxResult(verdict, tuple(values), error, text, report["seconds"], tuple(events))


def _stopped(report: dict[str, Any], timeout: float) -> tuple[str, str]:
    """Verdict and words for a program that did not come to its end."""
    why, status = report.get("stopped"), report.get("status")
    if why is None and status:
        signalled = os.WTERMSIG(status)
        if signalled and report["cpu"] > int(timeout + 0.999) - 0.1:  # the kernel's limit on CPU seconds
            why = "timeout"
        elif signalled:
            return "crashed", f"killed by signal {signalled} ({signal.strsignal(signalled)})"
        elif os.WEXITSTATUS(status) == 111:
            return "memory", "MemoryError"
    return why or "exited", {
        "timeout": f"still running after {timeout:g} s",
        "output": "more output than a program may write",
        "disk": "more or larger files than a program may write",
        None: "ended by itself before all calls had returned",
    }[why]

"""The parent's side of the sandbox: start the child, read its report, name the verdict."""

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from ..core.tensors import require_number
from . import folders, wire

_BY_NAME = {
    "MemoryError": "memory",
    "RecursionError": "recursion",
    "NoProcess": "processes",
    "DiskFull": "disk",
    "SystemExit": "exited",
}
_KINDS = {"raised": "error", "failed": "error", "syntax": "syntax", "unserialisable": "unserialisable"}
_WITHOUT: frozenset[str] = frozenset()  # layers that the tests switch off, to see that the others hold
_GRACE = 5.0  # seconds after which the parent kills a supervisor that has not done its work
_CHILD = os.path.join(os.path.dirname(__file__), "child.py")
_MOST_BYTES, _MAX_STDOUT, _MAX_EVENTS = 1 << 20, 1 << 16, 50
_STOPPED = {
    "output": "more output than a program may write",
    "disk": "more or larger files than a program may write",
    "memory": "MemoryError",
    "timeout": "still running after {:g} s",
    "": "ended by itself before all calls had returned",
}

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

    verdict   "ok" only where every call returned a value; else "error", "syntax", "timeout", "memory",
              "recursion", "processes", "disk", "output", "unserialisable", "forged", "exited" or "crashed"
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
    preload: Sequence[str] = (),
) -> list[SandboxResult]:
    """run_code for many programs, each in a sandbox of its own, `workers` (all cores) at a time.

    calls: the same for every program; or calls_per_code: a list for each. Identical programs with identical
    calls run once. preload: modules, of the installed packages too, that each worker imports once and every
    program can use, with one thread; they are trusted. Raises as run_code does, and ImportError for a module
    that cannot be imported. Lesson 4.
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
    installed = [os.path.realpath(folder) for folder in sys.path if os.path.isdir(folder)] if preload else []
    readable = sorted({*_readable(), *installed})
    options = {"timeout": timeout, "memory_mb": memory_mb, "readable": readable}
    # The kernel counts whole seconds of CPU.
    options |= {"cpu_seconds": math.ceil(timeout), "without": sorted(_WITHOUT)}
    programs = list(dict.fromkeys(keys))
    workers = min(workers or os.cpu_count() or 1, len(programs)) or 1
    folders.remove_left()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        idle = SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(contextlib.closing(_Child(installed, preload))))

        def run_one(key: str) -> SandboxResult:
            child = idle.get()
            try:
                return child.run(*json.loads(key), options)
            finally:
                idle.put(child)

        # An interrupt waits for the programs that run; map gives up the rest.
        done = dict(zip(programs, pool.map(run_one, programs), strict=True))
    return [done[key] for key in keys]


def _readable() -> list[str]:
    """The folders that hold the interpreter's library and the C libraries."""
    names = [f"{base}/{lib}" for base in (sys.base_prefix, "", "/usr") for lib in ("lib", "lib64")]
    return sorted({os.path.realpath(name) for name in names if os.path.isdir(name)})


class _Child:
    """A child process that runs programs one after another; started anew when it had to be killed."""

    thread: threading.Thread

    def __init__(self, folders: Sequence[str], modules: Sequence[str]) -> None:
        """Note what the child imports, and from which folders, before it takes programs."""
        self.preload = {"folders": list(folders), "modules": list(modules)}

    def close(self) -> None:
        """Kill the child, if there is one."""
        process = self.__dict__.pop("process", None)
        if process is None:
            return
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        # Without fork, a process that the program has started may hold the pipe that the thread waits for.
        self.thread.join(1.0)
        if not self.thread.is_alive():
            with contextlib.suppress(OSError), process:
                pass

    def run(self, code: str, calls: list[Any], options: dict[str, Any]) -> SandboxResult:
        """One program, from request to result; its folder is gone afterwards."""
        nonce = secrets.token_hex(16)
        with folders.program_folder() as folder:
            request = {**options, "code": code, "calls": calls, "nonce": nonce, "folder": folder}
            report = self._ask(json.dumps(request).encode() + b"\n", options["timeout"] + _GRACE)
        return _result(report, nonce, len(calls), options["timeout"])

    def _ask(self, request: bytes, limit: float) -> dict[str, Any]:
        """A supervisor's report; without fork there is none, and the program may have written every line."""
        process, start, answer = self.process, time.monotonic(), []
        forks, report = hasattr(os, "fork") and "fork" not in _WITHOUT, None

        def exchange() -> None:
            with contextlib.suppress(OSError):
                process.stdin.write(request)
                process.stdin.flush()
                answer.append(process.stdout.readline() if forks else process.stdout.read(_MOST_BYTES))

        self.thread = threading.Thread(target=exchange, daemon=True)
        self.thread.start()
        self.thread.join(limit)
        late, text = self.thread.is_alive(), b"".join(answer).decode("latin-1")
        # A supervisor that was killed has written nothing or half a line.
        with contextlib.suppress(ValueError):
            report = json.loads(text) if forks else {"messages": text}
        if report is None or not forks:
            self.close()
        seconds, stopped = time.monotonic() - start, "timeout" if late else ""
        nothing = {"stopped": stopped, "signal": 0, "messages": "", "stdout": "", "seconds": seconds}
        return {**nothing, **(report or {})}

    @functools.cached_property
    def process(self) -> subprocess.Popen[bytes]:
        # -I without its -E, for the one variable that there is: sets of strings iterate alike in every run.
        command = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(_CHILD)]
        kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # Windows needs it
        if self.preload["modules"]:
            command.append(json.dumps(self.preload))
            # A program may start no thread, and a thread does not survive the fork.
            kept |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", **kept},
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        if self.preload["modules"] and process.stdout.readline() != b"null\n":
            with process:  # waits for it and closes its pipes
                process.kill()
            raise ImportError(f"the sandbox could not import {', '.join(self.preload['modules'])}")
        return process


def _text(text: Any, most: int) -> str:
    """Text of a program, short and such that it can be printed anywhere."""
    return str(text)[:most].encode("utf-8", "replace").decode()


def _result(report: dict[str, Any], nonce: str, n_calls: int, timeout: float) -> SandboxResult:
    """Read the lines that the worker wrote; whatever is not exactly such a line is the program's own work."""
    values, events, faults, ended = [], [], [], False
    stdout = report["stdout"]
    try:
        for line in report["messages"].split("\n")[:-1]:  # the last, if any, was cut off by the end
            mark, kind, *parts = json.loads(line)
            if mark != nonce or ended:
                raise ValueError("not a line of the worker")
            if kind == "value":
                (value,) = parts
                values.append(wire.decode(value))
            elif kind == "event":
                events.append(_text(*parts, 120))
            elif kind == "stdout":
                (stdout,) = parts
            elif kind == "end":
                ended = True
            else:
                (name, text), plain = [_text(part, 300) for part in parts], _KINDS[kind]
                faults.append((_BY_NAME.get(name, plain), f"{name}: {text}" if text else name))
                if kind in ("raised", "unserialisable"):
                    values.append(Raised(name, text))
        if len(values) > n_calls or (ended and not faults and len(values) < n_calls):
            raise ValueError("more or fewer values than calls")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        faults, ended = [("forged", "the program wrote into the channel of its values")], True
    if not ended or report["stopped"]:  # how the process ended says more than what went wrong before
        faults = [_stopped(report, timeout)]
    verdict, error = faults[0] if faults else ("ok", None)
    values = (values + [MISSING] * n_calls)[:n_calls]
    stdout, events = _text(stdout, _MAX_STDOUT), tuple(events[:_MAX_EVENTS])
    return SandboxResult(verdict, tuple(values), error, stdout, report["seconds"], events)


def _stopped(report: dict[str, Any], timeout: float) -> tuple[str, str]:
    """Verdict and words for a program that did not come to its end."""
    why, number = report["stopped"], report["signal"]
    if not why and number:
        return "crashed", f"killed by signal {number} ({signal.strsignal(number)})"
    return why or "exited", _STOPPED[why].format(timeout)

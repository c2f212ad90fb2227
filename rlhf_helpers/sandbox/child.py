"""What runs in the child: for each request a supervisor, and confined below it a worker with the program.

The server reads requests, a line each, and forks a supervisor for each. The supervisor stays unconfined: it
reads what the worker writes, measures and kills. The worker gives up all it can and runs the program in its
own interpreter, where the program can read all that the worker knows (code, arguments, nonce): nothing worth
stealing is sent here, above all no expected value. Run by path, without site packages. Lesson 4.
"""

import contextlib
import errno
import importlib
import io
import json
import os
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import wire  # noqa: E402

LINUX = frozenset({"namespaces", "landlock", "user", "seccomp"} if sys.platform == "linux" else ())
if LINUX:
    import confinement
if os.name == "posix":
    import resource
del sys.path[0]

FILE_BYTES, DISK_BYTES, MAX_FILES, MAX_PATH = 1 << 20, 8 << 20, 1000, 500
OUTPUT_BYTES, MESSAGE_BYTES, MAX_EVENTS = 1 << 16, 1 << 18, 50
NO_MEMORY = 111  # exit status of a worker that has none left to say so
CHILDREN = "/proc/self/task/{}/children"
FIRST_UID = 1_900_000_000  # plus the supervisor's process id: a user of its own for every program
# "module." comes from preloaded modules that a program is not to change.
WATCHED = (
    "open",
    "exec",
    "compile",
    "import",
    "os.",
    "shutil.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "module.",
)
COMMON = (
    "collections copy dataclasses datetime decimal functools heapq itertools math mmap operator random re "
    "socket statistics string subprocess threading typing"
)
LIMITS = {
    errno.EAGAIN: "NoProcess",
    errno.ENOMEM: "MemoryError",
    errno.ENOSPC: "DiskFull",
    errno.EFBIG: "DiskFull",
}


# ---- the worker


def describe(fault: BaseException) -> tuple[str, str]:
    """Name and message of an exception, whose methods may be hostile; the name says which limit it met."""
    kind, text = type(fault), ""
    name = type.__dict__["__name__"].__get__(kind)[:80]
    with contextlib.suppress(BaseException):
        text = str(fault)[:300]
    for known in (MemoryError, RecursionError, SystemExit):
        if issubclass(kind, known):
            name = known.__name__
    if text == "can't start new thread":
        name = "NoProcess"
    elif issubclass(kind, OSError):
        with contextlib.suppress(BaseException):
            name = LIMITS.get(fault.errno, name)
    return name, text


def watch(send: Callable[..., None]) -> Callable[[str, tuple], None]:
    """An audit hook that tells what the program touches, and not what every import of a module does."""
    seen: set[str] = set()

    def hook(event: str, args: tuple) -> None:
        if not event.startswith(WATCHED) or len(seen) >= MAX_EVENTS:
            return
        where = sys._getframe(1).f_code.co_filename
        library = where.startswith((HERE, "<frozen importlib"))
        library |= event in ("import", "exec", "compile") and where not in ("<program>", "<string>")
        text = f"{event}:{args[0]}"[:120] if event in ("open", "import") else event
        if not library and text not in seen:
            seen.add(text)
            send("event", text)

    return hook


def work(request: dict[str, Any], write: Callable[[bytes], None]) -> None:
    """Run the program, then its calls in order; a line for each outcome as soon as it is there."""
    nonce, code, calls = (request.pop(key) for key in ("nonce", "code", "calls"))

    def send(kind: str, *parts: Any) -> None:
        write(json.dumps([nonce, kind, *parts]).encode() + b"\n")

    module = sys.modules["program"] = types.ModuleType("program")
    sys.addaudithook(watch(send))
    kind = "syntax"
    try:
        program = compile(code, "<program>", "exec")
        kind = "failed"
        exec(program, module.__dict__)
    except BaseException as fault:
        send(kind, *describe(fault))
        calls = []
    for name, args in calls:
        kind = "raised"
        try:
            if name not in module.__dict__:
                raise NameError(f"the program defines no {name}")
            value = module.__dict__[name](*wire.decode(args))
            kind = "unserialisable"
            send("value", wire.encode(value))
        except BaseException as fault:
            send(kind, *describe(fault))
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    send("end")


def lock_up(request: dict[str, Any]) -> None:
    """Every layer that this kernel grants, in the order in which one can still take the next."""
    layers, reads = LINUX - request["without"], False
    if "landlock" in layers:
        with contextlib.suppress(OSError):
            confinement.landlock(request["folder"], request["readable"])
            reads = True
    if "user" in layers:
        with contextlib.suppress(OSError):
            if not reads and os.getuid() == 0:  # whom it becomes may not be allowed to read the library
                list(map(__import__, COMMON.split()))
            confinement.drop_privileges(request["uid"], reads)
    limits = {"CPU": request["cpu_seconds"], "AS": request["memory_mb"] << 20, "FSIZE": FILE_BYTES}
    # A core file of 1 byte is none, and of this size alone a program that collects them is not started.
    for name, most in {**limits, "NPROC": 0, "NOFILE": 64, "CORE": 1}.items():
        if name not in request["without"]:  # soft and hard limit: it cannot be raised again
            with contextlib.suppress(OSError, ValueError, AttributeError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    if "seccomp" in layers:
        with contextlib.suppress(OSError, KeyError):
            confinement.forbid_calls()


def worker(request: dict[str, Any], output: int, channel: int) -> None:
    """Give up everything, then run the program; never returns."""

    def write(data: bytes) -> None:
        while data:
            data = data[os.write(3, data) :]

    status = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), output, output, channel)):
            os.dup2(source, target, inheritable=target < 3)
        os.closerange(4, 256)
        os.chdir(request["folder"])
        lock_up(request)
        try:
            work(request, write)
            status = 0
        except MemoryError:
            status = NO_MEMORY
    os._exit(status)


# ---- the supervisor


def end_all(left: list[int]) -> None:
    """Kill the worker and what it left: orphans, whatever their session, were handed to the supervisor."""
    deadline = time.monotonic() + 3
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), open(CHILDREN.format(os.getpid())) as file:
                left = [int(child) for child in file.read().split()]
            for child in left:
                os.kill(child, signal.SIGKILL)
            left = left if os.waitpid(-1, os.WNOHANG)[0] == 0 else []


def nameless_files(process: int | str) -> int:
    """How many files a process holds, open or mapped, that are in no folder: deleted or made in memory."""
    found = 0
    with contextlib.suppress(OSError):
        with open(f"/proc/{process}/maps", "rb") as file:
            found = file.read().count(b" (deleted)\n")
        for name in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed while we looked
                found += os.readlink(f"/proc/{process}/fd/{name}").endswith(" (deleted)")
    return found


def too_much(folder: str, nameless: int) -> bool:
    """Whether files are more, larger or deeper than a program may write, or hidden from the supervisor."""
    files, used, hidden = 0, nameless * FILE_BYTES, []
    for root, folders, names in os.walk(folder, onerror=hidden.append):
        files += len(folders) + len(names)
        for name in names:
            try:
                used += os.lstat(os.path.join(root, name)).st_blocks * 512
            except OSError as fault:
                hidden.append(fault)
        if files > MAX_FILES or used > DISK_BYTES or len(root) - len(folder) > MAX_PATH:
            return True
    # What is gone or replaced was so while we looked; anything else keeps the supervisor from looking.
    return any(fault.errno not in (errno.ENOENT, errno.ENOTDIR) for fault in hidden)


def read_ready(ready: list[int], texts: dict[int, bytes], most: dict[int, int]) -> str:
    """Add what has arrived to texts and forget a source that has ended; "output" where one wrote too much."""
    stopped = ""
    for source in ready:
        data = os.read(source, 1 << 16)
        texts[source] += data
        if len(texts[source]) > most[source]:
            stopped = "output"
        elif not data:
            del most[source]
    return stopped


def watch_over(pid: int, output: int, channel: int, request: dict[str, Any]) -> dict[str, Any]:
    """Collect what the worker writes until it ends, or is too late, too loud or too large; then kill all."""
    texts, most = {output: b"", channel: b""}, {output: OUTPUT_BYTES, channel: MESSAGE_BYTES}
    start = time.monotonic()
    limit = request["timeout"] * (60 if "wall" in request["without"] else 1)
    usual = nameless_files("self")  # such as libraries that were updated since they were loaded
    stopped, ended, status = "", 0, 0
    while not stopped:
        if select.select([sys.stdin], [], [], 0)[0]:  # the caller has ended and will not read the report
            stopped = "timeout"
        ready = select.select(list(most), [], [], 0 if ended else 0.01)[0]
        if not most:
            time.sleep(0.001)
        stopped = read_ready(ready, texts, most) or stopped
        if too_much(request["folder"], 0 if ended else nameless_files(pid) - usual):
            stopped = stopped or "disk"
        if ended and not ready:
            break
        if not ended:
            ended, status, used = os.wait4(pid, os.WNOHANG)
            late = not ended and time.monotonic() - start > limit
            stopped = stopped or ("timeout" if late else "")
    end_all([] if ended else [pid])
    if os.WEXITSTATUS(status) == NO_MEMORY:
        stopped = stopped or "memory"
    if os.WTERMSIG(status) and used.ru_utime + used.ru_stime > request["cpu_seconds"] - 0.1:
        stopped = stopped or "timeout"
    return {
        "stopped": stopped,
        "signal": os.WTERMSIG(status),
        "messages": texts[channel].decode("latin-1"),
        "stdout": texts[output][:OUTPUT_BYTES].decode("utf-8", "replace"),
        "seconds": time.monotonic() - start,
    }


def supervisor(request: dict[str, Any]) -> None:
    """One program from request to report; never returns."""
    request["uid"], request["without"] = FIRST_UID + os.getpid(), frozenset(request["without"])
    layers = LINUX - request["without"]
    with contextlib.suppress(OSError):
        if layers:
            confinement.adopt()
        if "user" in layers and os.getuid() == 0:
            os.chown(request["folder"], request["uid"], -1, follow_symlinks=False)
        if "namespaces" in layers:
            confinement.enter_namespaces()
    (output, output_w), (channel, channel_w) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        worker(request, output_w, channel_w)
    os.close(output_w)
    os.close(channel_w)
    print(json.dumps(watch_over(pid, output, channel, request)), flush=True)
    os._exit(0)


def unguarded(request: dict[str, Any]) -> None:
    """Where there is no fork (Windows): run the program in this process, which the parent kills in time."""
    lines, text, nonce = [], io.StringIO(), request["nonce"]
    os.chdir(request["folder"])
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        work(request, lines.append)
    os.chdir(HERE)  # a folder that a process stands in cannot be removed
    print(json.dumps([nonce, "stdout", text.getvalue()[:OUTPUT_BYTES]]))
    print(b"".join(lines).decode(), end="", flush=True)


def preload(folders: list[str], modules: list[str]) -> None:
    """Import once what every program may use: they are forked from here and find it in memory."""
    sys.path += folders
    list(map(importlib.import_module, modules))
    print("null", flush=True)


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    if len(sys.argv) > 1:
        preload(**json.loads(sys.argv[1]))
    os.environ.clear()
    for line in sys.stdin:
        request = json.loads(line)
        if not hasattr(os, "fork") or "fork" in request["without"]:
            unguarded(request)
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            supervisor(request)
        if os.waitpid(pid, 0)[1]:
            print("null", flush=True)


if __name__ == "__main__":
    main()

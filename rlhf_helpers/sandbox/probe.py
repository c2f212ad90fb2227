"""What this platform really enforces, found by trying. Lesson 4."""

import functools
import os
import re
import socket
import subprocess
import sys
import tempfile

from . import run

# Each raises where its attempts are refused; `victim` is a process of the caller that only waits.
_TRIES = """
import os
def file_reads(path, port, pid, victim):
    try: open(path)
    except OSError: os.listdir("/")
def file_names(path, port, pid, victim):
    import ctypes
    c = ctypes.CDLL(None, use_errno=True)
    if c.inotify_add_watch(c.inotify_init1(0), os.path.dirname(path).encode(), 0xfff) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def file_writes(path, port, pid, victim):
    try: open(path, "w")
    except OSError: open("/dev/null", "w")
def environment(path, port, pid, victim): list(os.environ)[0]
def parent_memory(path, port, pid, victim): open(f"/proc/{pid}/environ")
def signals(path, port, pid, victim):
    r, w = os.pipe()
    try:
        import fcntl
        fcntl.fcntl(r, fcntl.F_SETOWN, victim)
        fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
        os.write(w, b"x")
    except (OSError, ImportError): pass
    os.kill(victim, 9)
def network(path, port, pid, victim):
    import socket
    socket.socket().connect(("127.0.0.1", port))
def memory(path, port, pid, victim): bytes(300 << 20)
def file_size(path, port, pid, victim): open("large", "wb").write(bytes(2 << 20))
def processes(path, port, pid, victim):
    if not hasattr(os, "fork"): os.system("exit")
    elif os.fork() == 0: os._exit(0)
"""
_NAMELESS = """
import os, time
held = []
for i in range(12):
    held.append(open(str(i), "w+b"))
    held[i].write(bytes(1 << 20))
    os.unlink(str(i))
time.sleep(0.2)
"""
_RUNS = (
    ("wall_clock", "while True: pass", 0.3, "timeout"),
    ("output", "for _ in range(1000): print('x' * 1000)", 5.0, "output"),
    ("disk", "for i in range(12): open(str(i), 'wb').write(bytes(1 << 20))", 5.0, "disk"),
    ("nameless", _NAMELESS, 5.0, "disk"),
)


def enforced() -> dict[str, bool]:
    """Test what a program cannot do here by small harmless attempts: about a second, once per process.

    file_reads, file_names (made or deleted elsewhere), file_writes (outside its folder), environment,
    parent_memory, signals (to processes of the caller), network, processes (and threads), orphans (no process
    outlives its program), memory, file_size, disk (all files together, with and without a name), output,
    wall_clock. True: the attempt failed or was stopped. Lesson 4.
    """
    return dict(_probe(run._WITHOUT))


@functools.cache
def _probe(without: frozenset[str]) -> dict[str, bool]:
    names = re.findall(r"^def (\w+)", _TRIES, re.MULTILINE)
    waits = [sys.executable, "-I", "-S", "-c", "input()"]
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as listener,
        subprocess.Popen(waits, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as victim,
    ):
        os.chmod(folder, 0o777)
        path = os.path.join(folder, "file")
        with open(path, "w") as file:
            file.write("probe")
        os.chmod(path, 0o666)
        args = (path, listener.getsockname()[1], os.getpid(), victim.pid)
        tried = run.run_code(_TRIES, calls=[(name, args) for name in names], timeout=5.0)
        killed = victim.poll() is not None
    # What is not there, such as /proc or fcntl, was not refused: other ways may lead to the same.
    absent = ("ModuleNotFoundError", "FileNotFoundError", "AttributeError")
    found = {
        name: isinstance(value, run.Raised) and value.name not in absent
        for name, value in zip(names, tried.values, strict=True)
    }
    found["signals"] = not killed
    found["orphans"] = found["processes"] or os.path.exists(f"/proc/self/task/{os.getpid()}/children")
    for name, code, timeout, verdict in _RUNS:
        found[name] = run.run_code(code, calls=[], timeout=timeout).verdict == verdict
    found["disk"] = found.pop("nameless") and found["disk"] and found["file_writes"]
    return found

"""What this platform really enforces, found by trying. Lesson 4."""

import functools
import os
import re
import socket
import sys
import tempfile

from . import run

_TRIES = """
import os
def file_reads(path, port, pid):
    try: open(path)
    except OSError: os.listdir("/")
def file_writes(path, port, pid):
    try: open(path, "w")
    except OSError: open("/dev/null", "w")
def environment(path, port, pid): os.environ["SANDBOX_PROBE"]
def parent_memory(path, port, pid): open(f"/proc/{pid}/environ")
def signals(path, port, pid): os.kill(pid, 0)
def network(path, port, pid):
    import socket
    socket.socket().connect(("127.0.0.1", port))
def memory(path, port, pid): bytes(300 << 20)
def file_size(path, port, pid): open("large", "wb").write(bytes(2 << 20))
def processes(path, port, pid):
    if not hasattr(os, "fork"): os.system("exit")
    elif os.fork() == 0: os._exit(0)
"""
_RUNS = (
    ("wall_clock", "while True: pass", 0.3, "timeout"),
    ("output", "for _ in range(1000): print('x' * 1000)", 5.0, "output"),
    ("disk", "for i in range(12): open(str(i), 'wb').write(bytes(1 << 20))", 5.0, "disk"),
)


def enforced() -> dict[str, bool]:
    """What a program cannot do here: one small harmless attempt for each, about a second, once a process.

    file_reads, file_writes (outside its folder), environment, parent_memory, signals, network, processes
    (and threads), orphans (no process outlives its program), memory, file_size, disk (all files together),
    output, wall_clock. True: the attempt failed or was stopped. Lesson 4.
    """
    return dict(_probe(run._WITHOUT))


@functools.cache
def _probe(without: frozenset[str]) -> dict[str, bool]:
    names = re.findall(r"^def (\w+)", _TRIES, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        os.chmod(folder, 0o777)
        path = os.path.join(folder, "file")
        with open(path, "w") as file:
            file.write("probe")
        os.chmod(path, 0o666)
        os.environ["SANDBOX_PROBE"] = "seen"
        try:
            args = (path, listener.getsockname()[1], os.getpid())
            tried = run.run_code(_TRIES, calls=[(name, args) for name in names], timeout=5.0)
        finally:
            del os.environ["SANDBOX_PROBE"]
    found = {
        name: isinstance(value, run.Raised) and "Module" not in value.name
        for name, value in zip(names, tried.values, strict=True)
    }
    found["orphans"] = found["processes"] or sys.platform == "linux"
    for name, code, timeout, verdict in _RUNS:
        found[name] = run.run_code(code, calls=[], timeout=timeout).verdict == verdict
    return found

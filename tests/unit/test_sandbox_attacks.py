"""Attacks on the sandbox: each ends in a named verdict and leaves neither a process nor a file behind.

Every attack is small even where nothing stops it: bombs fork six times, floods stop after some megabytes.
"""

import ctypes
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlhf_helpers.sandbox import MISSING, SandboxResult, enforced, folders, run, run_code, run_programs

SECRET = "kept-from-programs-7319"
OUR_WORK = Path(run.__file__).parent

# Name, what the platform must enforce for it, verdicts allowed; then the program, whose f is called with a
# dictionary of targets: secret and outside (a file and a folder of the learner), port (a listener), parent.
TABLE = r"""
#### never ends

## endless loop | wall_clock | timeout
def f(t):
    while True: pass

## endless import | wall_clock | timeout
while True: pass
def f(t):
    pass

## endless C loop | wall_clock | timeout
import itertools
def f(t):
    return sum(itertools.count())

## sleep | wall_clock | timeout
import time
def f(t):
    time.sleep(1000)

## deadlock | wall_clock | timeout
import _thread
def f(t):
    l = _thread.allocate_lock(); l.acquire(); l.acquire()

## slow regular expression | wall_clock | timeout
import re
def f(t):
    return re.match('(a+)+$', 'a' * 40 + 'b')

## huge power | wall_clock | timeout memory
def f(t):
    return (9 ** 9 ** 9) % 7

## loop that swallows all | wall_clock | timeout
def f(t):
    while True:
        try:
            while True: pass
        except BaseException: pass

## loop deaf to signals | wall_clock | timeout
import signal
def f(t):
    for s in range(1, 32):
        try: signal.signal(s, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True: pass

## endless trace | wall_clock | timeout
import sys
def trace(*a):
    while True: pass
def f(t):
    sys.settrace(trace); return len(str(t)) + g()
def g():
    return 1

## endless __del__ | wall_clock | timeout
class A:
    def __del__(self):
        while True: pass
def f(t):
    A()

## endless message of an error | wall_clock | timeout
class E(Exception):
    def __str__(self):
        while True: pass
def f(t):
    raise E

## waits for input | wall_clock | error
def f(t):
    return input()

#### processes and threads

## fork bomb | processes | processes
import os
def f(t):
    for _ in range(6): os.fork()

## patient fork bomb | processes | timeout
import os, time
def f(t):
    for i in range(10 ** 9):
        try:
            if i < 6: os.fork()
        except OSError: pass

## daemon in its own session | processes | processes
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(5)
def f(t):
    pass

## subprocess | processes | processes
import subprocess, sys
def f(t):
    subprocess.run([sys.executable, '-c', ''])

## shell | processes | ok
import os
def f(t):
    return os.system('echo broken > ' + t['outside'] + '/file')

## spawn | processes | processes error
import os, sys
def f(t):
    os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})

## exec | file_reads | error
import os, sys
def f(t):
    os.execv('/bin/sh', ['sh', '-c', 'sleep 5'])

## threads | processes | processes
import threading, time
def f(t):
    for _ in range(64): threading.Thread(target=time.sleep, args=(5,)).start()

## process pool | processes | processes error timeout
from multiprocessing import Pool
def f(t):
    return Pool(2).map(abs, [1])

## bare clone | processes | processes
import ctypes
def f(t):
    c = ctypes.CDLL(None, use_errno=True)
    if c.fork() < 0: raise OSError(ctypes.get_errno(), 'refused')

#### memory

## list flood | memory | memory
def f(t):
    return [0] * 10 ** 9

## bytes flood | memory | memory
def f(t):
    return bytes(10 ** 9)

## doubling string | memory | memory
def f(t):
    s = 'x'
    for _ in range(32): s += s

## large integer | memory | memory
def f(t):
    return 1 << (1 << 34)

## growing dictionary | memory | memory
def f(t):
    d = {}
    for i in range(10 ** 8): d[i] = bytes(10 ** 4)

## mapped memory | memory | memory
import mmap
def f(t):
    return [mmap.mmap(-1, 1 << 26) for _ in range(16)]

## flood while loading | memory | memory
x = [[0] * 10 ** 6 for _ in range(1000)]
def f(t):
    return 1

#### disk

## large file | file_size | disk
def f(t):
    open('large', 'wb').write(bytes(5 << 20))

## many files | disk | disk
def f(t):
    for i in range(1500): open(str(i), 'w').close()

## many large files | disk | disk
def f(t):
    for i in range(16): open(str(i), 'wb').write(bytes(1 << 20))

## very deep folders | disk | disk
import os
def f(t):
    for _ in range(600): os.mkdir('d'); os.chdir('d')

## sparse file | file_size | disk
def f(t):
    open('sparse', 'wb').truncate(1 << 40)

## unreadable folder | wall_clock | ok disk error
import os
def f(t):
    os.mkdir('d', 0)
    os.mkdir('e', 0)

## deleted files, still open | disk | disk
import os, time
def f(t):
    held = []
    for i in range(12):
        held.append(open('d', 'wb'))
        held[i].write(bytes(1 << 20))
        os.unlink('d')
    time.sleep(5)

## deleted files, still mapped | disk | disk
import mmap, os, time
def f(t):
    held = []
    for i in range(12):
        with open('d', 'w+b') as file:
            file.write(bytes(1 << 20)); file.flush()
            held.append(mmap.mmap(file.fileno(), 4096))
        os.unlink('d')
    time.sleep(5)

## many files in memory, mapped | disk | disk
import mmap, os, time
def f(t):
    held = []
    for i in range(40):
        fd = os.memfd_create('x')
        os.write(fd, bytes(1 << 20))
        held.append(mmap.mmap(fd, 4096))
        os.close(fd)
    time.sleep(5)

## large files among some that come and go | disk | disk
import os
def f(t):
    for i in range(12): open('large' + str(i), 'wb').write(bytes(1 << 20))
    while True:
        for i in range(50): open('small' + str(i), 'w').close()
        for i in range(50): os.unlink('small' + str(i))

## large files in a folder that cannot be listed | disk | disk
import os, time
def f(t):
    os.mkdir('hidden', 0o300)
    for i in range(12): open('hidden/' + str(i), 'wb').write(bytes(1 << 20))
    time.sleep(5)

## file in memory | file_size | disk
import os
def f(t):
    return os.write(os.memfd_create('x'), bytes(4 << 20)) + os.truncate(os.memfd_create('y'), 1 << 30)

#### output

## print flood | output | output
def f(t):
    for _ in range(10 ** 5): print('x' * 1000)

## error flood | output | output
import sys
def f(t):
    for _ in range(10 ** 5): sys.stderr.write('x' * 1000)

## raw flood | output | output
import os
def f(t):
    for _ in range(10 ** 5): os.write(1, bytes(1000))

## flood of the channel | output | output forged
import os
def f(t):
    for _ in range(10 ** 4): os.write(3, bytes(1000))

## very large value | output | output
def f(t):
    return 'x' * 10 ** 7

## flood of events | wall_clock | ok
def f(t):
    for i in range(3000):
        try: open('none' + str(i))
        except OSError: pass

#### files of others

## reads a file outside | file_reads | error
def f(t):
    return open(t['secret']).read()

## reads by a relative path | file_reads | error
import os
def f(t):
    return open(os.path.relpath(t['secret'])).read()

## reads through a link | file_reads | error
import os
def f(t):
    os.symlink(t['secret'], 'link'); return open('link').read()

## lists a folder outside | file_reads | error
import os
def f(t):
    return os.listdir(t['outside'])

## reads the list of users | file_reads | error
def f(t):
    return open('/etc/passwd').read()

## hard link to a file outside | file_writes | error
import os
def f(t):
    os.link(t['secret'], 'own')

## writes outside | file_writes | error
def f(t):
    open(t['outside'] + '/file', 'w').write('broken')

## appends outside | file_writes | error
def f(t):
    open(t['secret'], 'a').write('broken')

## truncates outside | file_writes | error
import os
def f(t):
    os.truncate(t['secret'], 0)

## deletes outside | file_writes | error
import os
def f(t):
    os.unlink(t['secret'])

## renames outside | file_writes | error
import os
def f(t):
    os.rename(t['secret'], t['outside'] + '/file')

## locks the owner out | file_writes | error
import os
def f(t):
    os.chmod(t['secret'], 0)

## watches a folder outside | file_names | error
import ctypes, os
def f(t):
    c = ctypes.CDLL(None, use_errno=True)
    if c.inotify_add_watch(c.inotify_init1(0), t['outside'].encode(), 0xfff) < 0:
        raise OSError(ctypes.get_errno(), 'refused')

## watches all files | file_names | error
import ctypes
def f(t):
    c = ctypes.CDLL(None, use_errno=True)
    if c.fanotify_init(0x200, 0) < 0: raise OSError(ctypes.get_errno(), 'refused')

## is told of changes in the library | file_names | error
import fcntl, os
def f(t):
    fcntl.fcntl(os.open(os.path.dirname(os.__file__), os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_CREATE)

## asks for the handle of a file outside | file_names | error
import ctypes
def f(t):
    c = ctypes.CDLL(None, use_errno=True)
    handle, mount = ctypes.create_string_buffer(b'\x80' + bytes(135)), ctypes.c_int()
    if c.name_to_handle_at(-100, t['secret'].encode(), handle, ctypes.byref(mount), 0) < 0:
        raise OSError(ctypes.get_errno(), 'refused')

## reads attributes of a file outside | file_names | error
import os
def f(t):
    os.listxattr(t['secret'])

## locks a file of the library | file_names | error
import fcntl, os
def f(t):
    fcntl.flock(open(os.__file__), fcntl.LOCK_EX)

## leases a file of the library | file_names | error
import fcntl, os
def f(t):
    fcntl.fcntl(open(os.__file__), fcntl.F_SETLEASE, fcntl.F_RDLCK)

## leaves the root | file_writes | error
import os
def f(t):
    os.chroot('/')

## writes into shared memory | file_writes | error
def f(t):
    open('/dev/shm/kept-from-programs', 'w').write('broken')

## patches the library | file_writes | error
import json
def f(t):
    open(json.__file__, 'a').write('#')

#### environment and other processes

## reads the environment | environment | ok
import os
def f(t):
    return dict(os.environ)

## reads it in C | environment | ok
import ctypes
def f(t):
    g = ctypes.CDLL(None).getenv; g.restype = ctypes.c_char_p; return str(g(b'SANDBOX_TEST'))

## reads the parent's environment | parent_memory | error
def f(t):
    return open(f"/proc/{t['parent']}/environ").read()

## writes the parent's memory | parent_memory | error
def f(t):
    open(f"/proc/{t['parent']}/mem", 'r+b')

## reads its supervisor's memory | parent_memory | error
import os
def f(t):
    open(f'/proc/{os.getppid()}/mem', 'rb')

## kills the parent | signals | error
import os
def f(t):
    os.kill(t['parent'], 15)

## kills its supervisor | signals | error
import os
def f(t):
    os.kill(os.getppid(), 9)

## has the kernel kill the parent | signals | error
import fcntl, os
def f(t):
    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_SETOWN, t['parent'])
    fcntl.fcntl(r, 10, 9)
    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.write(w, b'x')

## has the kernel stop the parent | signals | error
import fcntl, os, struct
def f(t):
    r, w = os.pipe()
    fcntl.fcntl(r, 15, struct.pack('ii', 1, t['parent']))
    fcntl.fcntl(r, 10, 19)
    fcntl.ioctl(r, 0x5452, struct.pack('i', 1))
    os.write(w, b'x')

## has the kernel kill the parent's group | signals | error
import fcntl, os
def f(t):
    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_SETOWN, -os.getpgid(t['parent']))
    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
    os.write(w, b'x')

## becomes the owner by another command | signals | error
import fcntl, os, struct
def f(t):
    r, w = os.pipe()
    fcntl.ioctl(r, 0x8901, struct.pack('i', t['parent']))

## has a timer of the kernel signal the parent | signals | error
import ctypes, struct
def f(t):
    c = ctypes.CDLL(None, use_errno=True)
    event = ctypes.create_string_buffer(struct.pack('qiii', 0, 9, 4, t['parent']) + bytes(64))
    if c.syscall(222, 1, event, ctypes.byref(ctypes.c_int())) < 0:
        raise OSError(ctypes.get_errno(), 'refused')

## means to survive its supervisor | orphans | error
import ctypes
def f(t):
    c = ctypes.CDLL(None, use_errno=True)
    if c.prctl(1, 0, 0, 0, 0) < 0: raise OSError(ctypes.get_errno(), 'refused')

## kills all | signals | error ok
import os
def f(t):
    os.kill(-1, 9)

## kills the parent's group | signals | error
import os
def f(t):
    os.killpg(os.getpgid(t['parent']), 9)

## traces the parent | signals | error
import ctypes
def f(t):
    c = ctypes.CDLL(None)
    if c.ptrace(16, t['parent'], 0, 0): raise OSError('refused')

## limits the parent | signals | error
import resource
def f(t):
    resource.prlimit(t['parent'], resource.RLIMIT_CORE, (0, 0))

## slows the parent | signals | error
import os
def f(t):
    os.setpriority(os.PRIO_PROCESS, t['parent'], 19)

## raises its limits | memory | error
import resource
def f(t):
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

#### network

## connects | network | error
import socket
def f(t):
    socket.create_connection(('127.0.0.1', t['port']), 1)

## sends a datagram | network | error
import socket
def f(t):
    socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', t['port']))

## asks a web server | network | error
import urllib.request
def f(t):
    urllib.request.urlopen(f"http://127.0.0.1:{t['port']}", timeout=1)

## listens | network | error
import socket
def f(t):
    socket.create_server(('127.0.0.1', 0))

#### leaves early

## leaves with success | wall_clock | exited
import os
def f(t):
    os._exit(0)

## leaves politely | wall_clock | exited
import sys
def f(t):
    sys.exit(0)

## leaves while loading | wall_clock | exited
raise SystemExit(0)

## is interrupted | wall_clock | error
def f(t):
    raise KeyboardInterrupt

## aborts | wall_clock | crashed
import os
def f(t):
    os.abort()

## reads address 0 | wall_clock | crashed
import ctypes
def f(t):
    ctypes.string_at(0)

## alarm | wall_clock | timeout crashed
import signal
def f(t):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while True: pass

## hook at exit | wall_clock | ok
import atexit, time
atexit.register(time.sleep, 1000)
def f(t):
    return 1

#### forges

## prints a result | wall_clock | exited
import os
def f(t):
    print('["", "value", 42]', flush=True)
    os._exit(0)

## writes a result to every file | wall_clock | forged
import os
for n in range(20):
    try: os.write(n, b'["", "value", 42]\n')
    except OSError: pass
def f(t):
    return 1

## writes half a line | wall_clock | forged
import os
def f(t):
    os.write(3, b'["')
    return 1

## writes a deep line | wall_clock | forged
import os
def f(t):
    os.write(3, b'[' * 100000 + b'\n')
    os._exit(0)

## guesses the mark | wall_clock | forged
import os
def f(t):
    os.write(3, b'["' + b'0' * 32 + b'", "value", 42]\n["' + b'0' * 32 + b'", "end"]\n')
    os._exit(0)

## steals the mark, gives too much | wall_clock | forged
import json, os, sys
def f(t):
    n = sys._getframe(1).f_locals['nonce']
    for _ in range(3): os.write(3, json.dumps([n, 'value', 1]).encode() + b'\n')
    return 1

## steals the mark, ends twice | wall_clock | forged
import json, os, sys
def f(t):
    n = sys._getframe(1).f_locals['nonce']
    os.write(3, json.dumps([n, 'end']).encode() + b'\n'); return 1

## steals the mark, ends early | wall_clock | forged
import json, os, sys
def f(t):
    n = sys._getframe(1).f_locals['nonce']
    os.write(3, json.dumps([n, 'end']).encode() + b'\n'); os._exit(0)

## steals the mark, sends a strange value | wall_clock | forged
import json, os, sys
def f(t):
    n = sys._getframe(1).f_locals['nonce']
    os.write(3, json.dumps([n, 'value', {'a': 1}]).encode() + b'\n'); os._exit(0)

## closes everything | wall_clock | exited
import os
def f(t):
    os.closerange(0, 64)
    return 1

## output in place of the channel | wall_clock | exited
import os
def f(t):
    os.dup2(1, 3)
    return 1

## turns assert off | wall_clock | ok
import builtins
builtins.AssertionError = Warning
builtins.bool = lambda x: True
def f(t):
    return 1

## breaks all builtins | wall_clock | exited error unserialisable
import builtins
def f(t):
    for name in dir(builtins):
        if name not in ('setattr', 'builtins'): setattr(builtins, name, lambda *a: True)
    return 1

## breaks json | wall_clock | error unserialisable exited forged
import json
json.dumps = lambda x: '42'
def f(t):
    return 1

## has no memory left to say so | wall_clock | memory
import json
def full(x):
    raise MemoryError
def f(t):
    json.dumps = full
    return 1

## clears what is loaded | wall_clock | ok
import sys
sys.modules.clear()
def f(t):
    return 1

#### hostile values

## number equal to all | wall_clock | unserialisable
class A(int):
    def __eq__(self, o):
        return True
    __hash__ = int.__hash__
def f(t):
    return A(1)

## text equal to all | wall_clock | unserialisable
class A(str):
    def __eq__(self, o):
        return True
def f(t):
    return [A('x')]

## false class | wall_clock | unserialisable
class A:
    __class__ = property(lambda s: int)
def f(t):
    return A()

## hostile metaclass | wall_clock | unserialisable
class M(type):
    def __eq__(s, o):
        return True
    def __hash__(s):
        return 1
    __name__ = property(lambda s: 1 / 0)
class A(metaclass=M): pass
def f(t):
    return A()

## dictionary of its own kind | wall_clock | unserialisable
class A(dict):
    def items(s):
        while True: pass
def f(t):
    return A()

## generator | wall_clock | unserialisable
import itertools
def f(t):
    return itertools.count()

## list in itself | wall_clock | unserialisable
def f(t):
    l = []; l.append(l); return l

## doubling list | wall_clock | unserialisable
def f(t):
    l = []
    for _ in range(40): l = [l, l]
    return l

## deep list | wall_clock | unserialisable
def f(t):
    l = []
    for _ in range(10 ** 5): l = [l]
    return l

## number of 5,000 digits | wall_clock | unserialisable
def f(t):
    return 10 ** 5000

## error that breaks its reader | wall_clock | error
class E(Exception):
    def __str__(s):
        return s.nothing
    __class__ = property(lambda s: 1 / 0)
def f(t):
    raise E

#### recursion

## recursion | wall_clock | recursion
def f(t):
    return f(t)

## recursion without limit | wall_clock | crashed memory recursion timeout
import sys
sys.setrecursionlimit(10 ** 9)
class A:
    def __getattr__(s, n):
        return getattr(s, n + 'x')
def f(t):
    return repr(A().a)
"""
ATTACKS = {
    "no source": ("wall_clock", "syntax", "\x00"),
    "deep source": ("wall_clock", "syntax memory recursion crashed", "(" * 50_000 + ")" * 50_000),
}
for part in re.split(r"^## ", re.sub(r"^#### .*$", "", TABLE, flags=re.M), flags=re.M)[1:]:
    title, _, program = part.partition("\n")
    name, need, verdicts = title.split(" | ")
    ATTACKS[name] = (need, verdicts, program.rstrip())
NAMES = sorted(ATTACKS)


@pytest.fixture
def targets(tmp_path, monkeypatch):
    """What attacks aim at; afterwards all of it must be as it was."""
    tmp_path.chmod(0o755)
    (temp := tmp_path / "temp").mkdir()
    (outside := tmp_path / "outside").mkdir()
    outside.chmod(0o777)
    (secret := tmp_path / "secret").write_text(SECRET)
    secret.chmod(0o644)
    (marked := tmp_path / f"marked-{os.getpid()}").symlink_to(OUR_WORK)
    monkeypatch.setattr(run, "_CHILD", marked / "child.py")  # a command line that is ours alone
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    monkeypatch.setenv("SANDBOX_TEST", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        yield {"secret": str(secret), "outside": str(outside), "port": port, "parent": os.getpid()}
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not list(outside.iterdir())
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == (SECRET, 0o644)
    assert not list(temp.iterdir())
    assert not processes(marked)


def processes(marked):
    """Processes whose command line names the marked folder, after a moment to end."""
    for _ in range(20):
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if str(marked).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        if not found:
            return []
        time.sleep(0.02)
    return found


def attack(name, targets):
    """Run an attack, if the platform can stop it; check the verdict and that nothing leaked."""
    need, verdicts, code = ATTACKS[name]
    if not enforced()[need]:
        pytest.skip(f"this platform does not enforce {need}")
    timeout = 0.4 if verdicts.startswith("timeout") else 6.0  # the machine may be busy
    result = run_code(code, calls=[("f", (targets,))], timeout=timeout, memory_mb=128)
    assert result.verdict in verdicts.split(), result
    assert SECRET not in repr(result)
    assert 42 not in result.values
    assert result.seconds < timeout + 4
    assert len(result.stdout) <= 1 << 16
    assert len(result.events) <= 50
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_attack(name, targets):
    attack(name, targets)


def test_there_are_many():
    assert len(ATTACKS) >= 40
    every = {verdict for _, verdicts, _ in ATTACKS.values() for verdict in verdicts.split()}
    assert every == set(re.findall(r'"(\w+)"', SandboxResult.__doc__.split("values")[0]))


# ---- each layer holds without the others

REACHES = ["reads a file outside", "writes outside", "appends outside", "reads the parent's environment"]
REACHES += ["kills the parent", "limits the parent", "connects", "sends a datagram"]
STARTS = ["fork bomb", "threads", "daemon in its own session", "shell"]


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["namespaces", "landlock", "user", "seccomp", "NPROC"])
@pytest.mark.parametrize("name", REACHES + STARTS)
def test_one_layer_less(name, layer, targets, monkeypatch):
    monkeypatch.setattr(run, "_WITHOUT", frozenset({layer}))
    need, verdicts, _ = ATTACKS[name]
    monkeypatch.setitem(ATTACKS, name, (need, f"{verdicts} error", ATTACKS[name][2]))
    attack(name, targets)


FLEES = """
import os, time
def f(t):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(30)
        os._exit(0)
    os.wait()
    return "fled"
"""


@pytest.mark.slow
@pytest.mark.parametrize("and_namespaces", [False, True])
@pytest.mark.parametrize("end", ["", "while True: pass", "os._exit(0)"])
def test_a_daemon_dies_with_its_program(targets, monkeypatch, end, and_namespaces):
    if not enforced()["orphans"]:
        pytest.skip("this platform cannot find processes that left their session")
    off = {"seccomp", "NPROC"} | ({"namespaces"} if and_namespaces else set())
    monkeypatch.setattr(run, "_WITHOUT", frozenset(off))
    code = FLEES.replace('return "fled"', end) if end else FLEES
    result = run_code(code, calls=[("f", (targets,))], timeout=0.5)
    expected = {"": "ok", "os._exit(0)": "exited"}.get(end, "timeout")
    assert result.verdict == expected, result
    assert result.values == (("fled",) if not end else (MISSING,))


def test_the_kernel_limits_cpu_where_no_clock_does(targets, monkeypatch):
    if os.name != "posix":
        pytest.skip("no limits of the kernel")
    # The supervisor's clock then runs 60 times longer.
    monkeypatch.setattr(run, "_WITHOUT", frozenset({"wall"}))
    monkeypatch.setattr(run, "_GRACE", 90.0)
    result = run_code("def f(t):\n    while True: pass", calls=[("f", (targets,))], timeout=1.0)
    assert result.verdict == "timeout"
    assert result.error == "still running after 1 s"
    assert result.seconds < 55


@pytest.mark.slow
def test_a_keeper_that_hangs_is_killed_with_its_program(targets, monkeypatch):
    monkeypatch.setattr(run, "_GRACE", 0.5)
    monkeypatch.setattr(run, "_WITHOUT", frozenset({"wall", "CPU"}))
    codes = ["while True: pass", "def f(t):\n    return 1"]
    bad, good = run_programs(codes, calls=[("f", (targets,))], timeout=1.0, workers=1)
    assert (bad.verdict, bad.values) == ("timeout", (MISSING,))
    assert (good.verdict, good.values) == ("ok", (1,))


# ---- a skipped attack must be the platform's fault, not ours


def test_a_capable_kernel_enforces_everything(monkeypatch):
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("not every layer exists here")
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
        pytest.skip("a kernel without Landlock")
    assert all(enforced().values()), enforced()
    monkeypatch.setattr(run, "_WITHOUT", frozenset({"seccomp"}))
    assert enforced()["processes"]


def test_namespaces_where_they_are_allowed(targets, monkeypatch):
    options = ["--pid", "--fork", "--net", "--ipc"] + ["--user"] * (os.name == "posix" and os.getuid() != 0)
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", *options, "true"], capture_output=True).returncode
    ):
        pytest.skip("namespaces are not allowed here")
    monkeypatch.setattr(run, "_WITHOUT", frozenset({"seccomp", "landlock", "user"}))
    code = """
import os, socket
def f(t):
    return os.getpid(), [name for _, name in socket.if_nameindex()]
def g(t):
    socket.create_connection(("127.0.0.1", t["port"]), 1)
"""
    result = run_code(code, calls=[("f", (targets,)), ("g", (targets,))])
    pid, networks = result.values[0]
    assert pid == 1
    assert set(networks) <= {"lo", "tunl0", "sit0", "ip6tnl0", "gre0"}
    assert result.values[1].name == "OSError"


def test_a_program_is_never_root(targets):
    if os.name != "posix" or os.getuid():
        pytest.skip("the tests do not run as root")
    code = "import os\ndef f(t):\n    return os.getuid(), os.geteuid(), os.getgid(), os.getgroups()"
    first, second = (run_code(code + end, calls=[("f", (targets,))]).values[0] for end in ("", "\n"))
    assert first[0] == first[1] == first[2] > 0
    assert first[3] == []
    assert first[0] != second[0]  # programs are strangers to each other


@pytest.mark.parametrize(
    "line", ["[1]", "5", '{"messages": ""}', '{"messages": 5, "seconds": 1}', "[" * 100_000]
)
def test_a_program_in_the_childs_own_process_loses_no_other_results(targets, monkeypatch, line):
    monkeypatch.setattr(run, "_WITHOUT", frozenset({"fork"}))
    codes = [f"import os\nos.write(1, {line!r}.encode() + b'\\n')", "def f(t):\n    return 7"]
    bad, good = run_programs(codes, calls=[("f", (targets,))], workers=1)
    assert (bad.verdict, bad.values) == ("forged", (MISSING,))
    assert (good.verdict, good.values) == ("ok", (7,))


def test_a_process_that_holds_the_pipe_does_not_stop_the_caller(targets, monkeypatch):
    if not hasattr(os, "fork"):
        pytest.skip("the process is started by fork")
    monkeypatch.setattr(run, "_WITHOUT", frozenset({"fork"}))
    monkeypatch.setattr(run, "_GRACE", 0.5)
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(4)\n    os._exit(0)\nos._exit(0)"
    start = time.monotonic()
    first, second = run_programs(
        [code, "def f(t):\n    return 7"], calls=[("f", (targets,))], timeout=0.5, workers=1
    )
    assert time.monotonic() - start < 4
    assert (first.verdict, second.values) == ("timeout", (7,))


def test_a_deep_value_is_not_taken(targets):
    code = """
import os, sys
def f(t):
    n = sys._getframe(1).f_locals["nonce"]
    value = '["list", ' * 60 + "1" + "]" * 60
    os.write(3, f'["{n}", "value", {value}]\\n["{n}", "end"]\\n'.encode())
    os._exit(0)
"""
    assert run_code(code, calls=[("f", (targets,))]).verdict == "forged"


def test_what_a_program_says_can_be_printed_and_is_short(targets):
    code = """
import json, os, sys
def f(t):
    n = sys._getframe(1).f_locals["nonce"]
    for kind in ("event", "stdout"):
        os.write(3, json.dumps([n, kind, "\\ud800" * 10_000]).encode() + b"\\n")
    raise ValueError("\\ud800")
"""
    result = run_code(code, calls=[("f", (targets,))])
    assert (result.verdict, result.error) == ("error", "ValueError: ?")
    for text in (*result.events, result.stdout):
        text.encode()
        assert len(text) <= 10_000


# ---- folders


def test_a_folder_in_whose_place_a_link_stands(targets, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "_WITHOUT", frozenset({"landlock"}))
    victim = tmp_path / "victim"
    (victim / "sub").mkdir(parents=True)
    (victim / "thesis").write_text("years of work")
    code = """
import os
def f(victim):
    here = os.getcwd()
    os.rename(here, here + "-moved")
    os.symlink(victim, here)
"""
    run_code(code, calls=[("f", (str(victim),))])
    assert sorted(entry.name for entry in victim.iterdir()) == ["sub", "thesis"]
    if os.getuid():  # the program is then the owner of all and may put its folder elsewhere
        for left in Path(tempfile.gettempdir()).iterdir():
            shutil.rmtree(left)


def swapped(tmp_path, name):
    """A folder that a run has left, with a link or a folder of another kind in the place of the program's."""
    (victim := tmp_path / "victim").mkdir(exist_ok=True)
    (victim / "thesis").write_text("years of work")
    (outer := Path(tempfile.gettempdir()) / f"{folders.PREFIX}{name}").mkdir()
    return victim, outer


def test_what_was_left_is_removed_without_following_links(targets, tmp_path):
    victim, outer = swapped(tmp_path, "left")
    deep = outer / folders.INSIDE
    (deep / "a" / "b").mkdir(parents=True)
    (deep / "a" / "b" / "file").write_text("x")
    (deep / "a" / "link").symlink_to(victim)
    (deep / "hard").hardlink_to(victim / "thesis")
    (deep / "closed").mkdir(0)
    folders.remove_left()
    assert not outer.exists()
    assert (victim / "thesis").read_text() == "years of work"


def test_what_is_not_a_programs_folder_is_left_alone(targets, tmp_path):
    victim, outer = swapped(tmp_path, "link")
    (outer / folders.INSIDE).symlink_to(victim)
    link = outer.with_name(f"{folders.PREFIX}victim")
    link.symlink_to(victim)
    _, other = swapped(tmp_path, "other")
    (other / "thesis").write_text("years of work")
    _, foreign = swapped(tmp_path, "foreign")
    (foreign / folders.INSIDE).mkdir()
    if os.getuid() == 0:
        os.chown(foreign, 65534, -1)
    with folders.program_folder() as used:
        (Path(used) / "file").write_text("x")
        folders.remove_left()
        assert (Path(used) / "file").exists()
    assert (victim / "thesis").exists()
    assert (other / "thesis").exists()
    assert foreign.exists() or os.getuid()
    for path in (link, outer / folders.INSIDE):
        path.unlink()
    for path in (outer, other, foreign):
        shutil.rmtree(path, ignore_errors=True)


CALLER = """
import tempfile
from pathlib import Path
from rlhf_helpers.sandbox import run, run_code
tempfile.tempdir, run._CHILD = {temp!r}, Path({child!r})
run_code("open('started', 'w').close()\\nwhile True: pass", calls=[], timeout=60.0)
"""


def test_a_killed_caller_takes_its_program_along(targets):
    temp = Path(tempfile.gettempdir())
    caller = subprocess.Popen([sys.executable, "-c", CALLER.format(temp=str(temp), child=str(run._CHILD))])
    for _ in range(600):
        if list(temp.glob("*/*/started")):
            break
        time.sleep(0.05)
    assert list(temp.glob("*/*/started"))
    caller.kill()
    caller.wait()
    assert not processes(run._CHILD.parent)
    assert list(temp.iterdir())
    assert run_code("def f(t):\n    return 1", calls=[("f", (targets,))]).values == (1,)
    assert not list(temp.iterdir())


# ---- as an ordinary user

AS_A_USER = """
import importlib.util, json, os, socket, sys, tempfile
from rlhf_helpers.sandbox import enforced, run, run_code, run_programs
spec = importlib.util.spec_from_file_location("attacks", sys.argv[1])
attacks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(attacks)
run._WITHOUT = frozenset(sys.argv[2:])
found = {"enforced": enforced()}
with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
    outside = os.path.join(folder, "outside")
    os.mkdir(outside)
    with open(os.path.join(folder, "secret"), "w") as file:
        file.write(attacks.SECRET)
    port = listener.getsockname()[1]
    targets = {"secret": file.name, "outside": outside, "port": port, "parent": os.getpid()}
    names = [name for name, attack in attacks.ATTACKS.items() if attack[0] in attacks.HARM]
    codes = [attacks.ATTACKS[name][2] for name in names]
    results = run_programs(codes, calls=[("f", (targets,))], timeout=1.0, workers=2)
    found["verdicts"] = {name: [r.verdict, r.error] for name, r in zip(names, results)}
    found["intact"] = open(file.name).read() == attacks.SECRET and not os.listdir(outside)
    found["left"] = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("rlhf-sandbox-")]
print(json.dumps(found))
"""
HARM = ("signals", "file_names", "file_reads", "file_writes", "parent_memory", "processes", "orphans", "disk")


@pytest.mark.parametrize("without", [[], ["namespaces"]])
def test_attacks_as_an_ordinary_user(tmp_path_factory, without):
    if not hasattr(os, "getuid") or os.getuid() or not shutil.which("setpriv"):
        pytest.skip("only root becomes an ordinary user, by setpriv")
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    package = str(OUR_WORK.parents[1])
    with tempfile.TemporaryDirectory(dir="/tmp") as temp:
        os.chmod(temp, 0o777)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": package, "TMPDIR": temp, "HOME": temp}
        options = {"env": environment, "cwd": "/", "capture_output": True, "text": True}
        # setpriv may start an interpreter that lies where the user itself may not start it again.
        starts = "import os, sys, rlhf_helpers.sandbox; os.execv(sys.executable, [sys.executable, '-c', ''])"
        tries = subprocess.run([*user, sys.executable, "-c", starts], **options)
        if tries.returncode:
            pytest.skip("an ordinary user may not read this interpreter or its packages")
        command = [*user, sys.executable, "-c", AS_A_USER, __file__, *without]
        done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "namespaces" in without and not found["enforced"]["signals"]:
        pytest.skip("a kernel without filters of system calls")
    assert found["intact"]
    assert not found["left"]
    for name, (verdict, error) in found["verdicts"].items():
        need, verdicts, _ = ATTACKS[name]
        if found["enforced"][need]:
            assert verdict in verdicts.split(), (name, verdict, error)

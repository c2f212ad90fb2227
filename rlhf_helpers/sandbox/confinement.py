"""What a Linux process can give up for good: namespaces, files, capabilities, system calls. Lesson 4.

Loaded by the child alone; `run` says what each layer is for. Whatever the kernel refuses raises OSError.
Numbers are those of its headers: unshare(2), prctl(2), capabilities(7), landlock(7), seccomp(2).
"""

import ctypes
import errno
import json
import os
import platform
import signal
import struct
from collections.abc import Iterable
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_USER, NEW_IPC_PID_NET = 0x10000000, 0x08000000 | 0x20000000 | 0x40000000
PDEATHSIG, DUMPABLE, KEEP_CAPS, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 8, 22, 36, 38
LOAD, AT_LEAST, EQUAL, ANSWER = 0x20, 0x35, 0x15, 0x06  # steps of a filter: operation, jumps, operand
REFUSE, ALLOW = 0x50000, 0x7FFF0000
NUMBER, MACHINE, SECOND_ARGUMENT = 0, 4, 24  # what a filter can load of a call, by its place
READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH
NEWER_CALLS = 470  # the first number that the table does not know
# System calls by machine: its number in a filter; calls that start processes and threads; calls of which only
# some commands are allowed (fcntl and ioctl can make the kernel signal any process of the user); calls that
# are allowed. What is not named reaches others (exec, sockets, signals, memory, names of files that others
# use, mounts, namespaces, limits, priorities, locks, queues, keys) or changes what a file may be used for.
_CALLS = os.path.join(os.path.dirname(__file__), "..", "assets", "sandbox", "system_calls.json")
with open(_CALLS, encoding="utf-8") as file:
    CALLS = json.load(file)


def libc(name: str, *args: Any) -> int:
    """Call a C function; its -1 becomes an OSError."""
    done = getattr(LIBC, name)(*args)
    if done == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return done


def adopt() -> None:
    """Become the parent of orphaned descendants, and closed to processes of the same user (ptrace, /proc)."""
    libc("prctl", SUBREAPER, 1, 0, 0, 0)
    libc("prctl", DUMPABLE, 0, 0, 0, 0)


def enter_namespaces() -> None:
    """Process ids, a network and System V objects of its own for the next child; its end ends all in them."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        libc("unshare", NEW_IPC_PID_NET)
        return
    libc("unshare", NEW_IPC_PID_NET | NEW_USER)
    libc("prctl", DUMPABLE, 1, 0, 0, 0)  # while it is not, its own files in /proc belong to root
    for name, text in {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    libc("prctl", DUMPABLE, 0, 0, 0, 0)


def landlock(folder: str, readable: list[str]) -> None:
    """Files: read below `readable`, everything but execution below `folder`, nothing elsewhere.

    From Linux 6.7 and 6.12 on also: no connection by TCP, no signal and no abstract socket to others.
    """
    libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    version = libc("syscall", 444, None, 0, 1)
    files = (1 << min(12 + version, 15)) - 1  # versions 2 and 3 know one right more each
    network = 3 if version >= 4 else 0
    scope = 3 if version >= 6 else 0
    ruleset = libc("syscall", 444, struct.pack("3Q", files, network, scope), 24, 0)
    for path, allowed in [(folder, files & ~1), *((path, 12) for path in readable)]:
        beneath = os.open(path, os.O_PATH)
        libc("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, beneath), 0)
        os.close(beneath)
    libc("syscall", 446, ruleset, 0)
    os.close(ruleset)


def drop_privileges(uid: int, reads: bool) -> None:
    """Become a user that owns nothing, without capabilities; reads: but reading, which landlock bounds.

    Landlock also keeps programs from looking into each other, so with it the supervisor may look into the
    worker.
    """
    if was_root := os.getuid() == 0:
        libc("prctl", KEEP_CAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    kept = READ_ANY_FILE if reads and was_root else 0
    libc("capset", struct.pack("II", 0x20080522, 0), struct.pack("6I", kept, kept, 0, 0, 0, 0))
    libc("prctl", DUMPABLE, int(reads), 0, 0, 0)
    libc("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def answers(numbers: Iterable[int], answer: int) -> list[tuple[int, int, int, int]]:
    """Steps of a filter that give this answer where the loaded word is one of the numbers."""
    steps = []
    for number in numbers:
        steps += [(EQUAL, 0, 1, number), (ANSWER, 0, 0, answer)]
    return steps


def forbid_calls() -> None:
    """A filter of system calls: EAGAIN for new processes and threads, EPERM for all that are not allowed."""
    table = CALLS[platform.machine()]
    refused = (ANSWER, 0, 0, REFUSE | errno.EPERM)
    steps = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, table["machine"]), refused, (LOAD, 0, 0, NUMBER)]
    # As a kernel that does not know a new call would answer; the x32 numbers of x86-64 are above as well.
    steps += [(AT_LEAST, 0, 1, NEWER_CALLS), (ANSWER, 0, 0, REFUSE | errno.ENOSYS)]
    steps += answers(table["new_processes"].values(), REFUSE | errno.EAGAIN)
    steps += answers(table["allowed"].values(), ALLOW)
    for name, call in table["commands"].items():
        block = [(LOAD, 0, 0, SECOND_ARGUMENT), *answers(CALLS["commands"][name].values(), ALLOW), refused]
        steps += [(EQUAL, 0, len(block), call), *block]
    steps.append(refused)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    libc("prctl", SECCOMP, 2, struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)), 0, 0)

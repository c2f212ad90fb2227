"""What a Linux process can give up for good: namespaces, files, capabilities, system calls. Lesson 4.

Loaded by the child alone; `run` says what each layer is for. Whatever the kernel refuses raises OSError.
Numbers are those of its headers: unshare(2), prctl(2), capabilities(7), landlock(7), seccomp(2).
"""

import ctypes
import os
import platform
import signal
import struct
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_USER, NEW_IPC_PID_NET = 0x10000000, 0x08000000 | 0x20000000 | 0x40000000
PDEATHSIG, DUMPABLE, KEEP_CAPS, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 8, 22, 36, 38
READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH
# System calls refused, by machine: its number in a filter; new processes and threads; what reaches others
# (exec, sockets, signals, memory of others, mounts, namespaces, limits and priorities of others, System V
# objects, queues, keys, perf, bpf, userfaultfd, io_uring); truncate, chmod, chown, utime, xattr.
# fmt: off
CALLS = {
    "x86_64": (0xC000003E, (56, 57, 58, 435), (
        59, 322, 41, 53, 62, 200, 234, 129, 297, 424, 434, 438, 101, 310, 311, 165, 272, 308, 302, 141, 142,
        144, 203, 251, 314, 29, 64, 68, 240, 248, 249, 250, 298, 321, 323, 425,
        76, 90, 91, 92, 93, 94, 132, 235, 260, 261, 268, 280, 452, 188, 189, 190, 197, 198, 199,
    )),
    "aarch64": (0xC00000B7, (220, 435), (
        221, 281, 198, 199, 129, 130, 131, 138, 240, 424, 434, 438, 117, 270, 271, 40, 97, 268, 261, 140, 118,
        119, 122, 30, 274, 194, 190, 186, 180, 217, 218, 219, 241, 280, 282, 425,
        45, 52, 53, 54, 55, 88, 452, 5, 6, 7, 14, 15, 16,
    )),
}
# fmt: on


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
    """Files: read below `readable`, everything but execution below `folder`, nothing elsewhere."""
    libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    version = libc("syscall", 444, None, 0, 1)
    handled = (1 << min(12 + version, 15)) - 1  # versions 2 and 3 know one right more each
    ruleset = libc("syscall", 444, struct.pack("Q", handled), 8, 0)
    for path, allowed in [(folder, handled & ~1), *((path, 12) for path in readable)]:
        beneath = os.open(path, os.O_PATH)
        libc("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, beneath), 0)
        os.close(beneath)
    libc("syscall", 446, ruleset, 0)
    os.close(ruleset)


def become(uid: int, reads: bool) -> None:
    """Become a user that owns nothing, without capabilities; reads: but reading, which landlock bounds."""
    if was_root := os.getuid() == 0:
        libc("prctl", KEEP_CAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    kept = READ_ANY_FILE if reads and was_root else 0
    libc("capset", struct.pack("II", 0x20080522, 0), struct.pack("6I", kept, kept, 0, 0, 0, 0))
    libc("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def forbid_calls() -> None:
    """A filter of system calls: EAGAIN for new processes and threads, EPERM for what reaches others."""
    number, starts, reaches = CALLS[platform.machine()]
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, number), (6, 0, 0, 1 << 31), (0x20, 0, 0, 0)]
    if number == CALLS["x86_64"][0]:
        steps += [(0x35, 0, 1, 1 << 30), (6, 0, 0, 1 << 31)]  # the same calls by their x32 numbers
    for call in starts + reaches:
        steps += [(0x15, 0, 1, call), (6, 0, 0, 0x50000 | (11 if call in starts else 1))]
    steps += [(6, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    libc("prctl", SECCOMP, 2, struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)), 0, 0)

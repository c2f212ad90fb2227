"""Run programs that nobody has read, and take nothing from them but values: run_code, run_programs. Lesson 4.

Everywhere: a process of its own, started with an empty environment in a temporary folder that is removed
afterwards; an interpreter that sees the standard library alone; values as JSON of exact builtin types, which
the parent compares, for it alone knows what is expected; killed after `timeout` seconds. Where there is more:

    layer                        stops                                    Linux           macOS   Windows
    resource limits              CPU, memory, file size; for users also   yes             (a)     no
                                 new processes and threads
    keeper's watch               floods of output and of files            yes             yes     no
    seccomp filter               processes, threads, exec, sockets,       x86-64, ARM 64  no      no
                                 signals, ptrace; for root too
    Landlock                     files outside: read, write, remove       from 5.13 (b)   no      no
    namespaces                   sockets; processes that outlive the      where allowed   no      no
                                 program, whatever their session          (c)
    a user of its own            files and processes of others            if root starts  no      no
    adopted orphans killed       the same processes, one by one           yes             no      no

(a) not memory; (b) if switched on; (c) root, or user namespaces: forbidden in most containers. `enforced()`
tries and tells what holds on this machine; nothing needs to be asked for or installed.

Not protected against: flaws of the kernel; side channels; what a program can see (the standard library, the
clock, the load, whether a file of a known name exists); use of `workers` cores for `timeout` seconds each; a
program that reads its caller's frame: in its process it can send any value as its own, but it cannot know
the right one. Without Landlock a program reads what its user may read; without seccomp and namespaces it
reaches the network: run the lesson in a container or a virtual machine there.
"""

from .probe import enforced
from .run import MISSING, VERDICTS, Raised, SandboxResult, run_code, run_programs
from .wire import same

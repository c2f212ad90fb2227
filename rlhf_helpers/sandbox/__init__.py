"""Run untrusted programs, and take nothing from them but values: run_code, run_programs. Lesson 4.

Everywhere: a process of its own, started with an empty environment in a temporary folder that is removed
afterwards; an interpreter that sees the standard library alone; values as JSON of exact builtin types, which
the parent compares, for it alone knows what is expected; killed after `timeout` seconds. Where there is more:

    layer                        stops                                    Linux           macOS   Windows
    resource limits              CPU, memory, file size; for users also   yes             (a)     no
                                 new processes and threads
    supervisor's watch           floods of output and of files, also of   yes             (b)     no
                                 deleted, nameless and hidden files
    seccomp filter               all system calls but a list of           x86-64, ARM 64  no      no
                                 harmless ones: no processes, threads,
                                 exec, sockets, signals by whatever way,
                                 names of files that others use, locks;
                                 for root too
    Landlock                     files outside: read, write, remove;      from 5.13 (c)   no      no
                                 signals to others                        from 6.12
    namespaces                   sockets; processes that outlive the      where allowed   no      no
                                 program, whatever their session          (d)
    a user of its own            files and processes of others            if root starts  no      no
    adopted orphans killed       the same processes, one by one           yes             no      no
    a folder in a folder         moving or replacing the program's own    yes             yes     no
                                 folder; what is removed is opened, and
                                 no link is followed

(a) not memory; (b) files with a name; (c) if switched on; (d) root, or user namespaces: forbidden in most
containers. Nothing needs to be asked for or installed: `enforced()` tries and tells what holds on this
machine and for this user. Windows is unverified: the sandbox was never run there.

A program ends with its caller, even with one that is killed; the folder that a killed caller leaves is
removed by the next run of the same user. Files are watched, not metered: what a program writes within some
hundredths of a second can exceed the limit before it is stopped; it is removed all the same.

Not protected against: flaws of the kernel; side channels; what a program can see (the standard library, the
clock, the load; of a file whose name it guesses, whether it exists, its size and times); use of `workers`
cores for `timeout` seconds each; a program that reads its caller's frame: in its process it can send any
value as its own, but it cannot know the right one. Without Landlock a program reads what its user may read,
and an ordinary user's program writes what its user may write, the memory of the caller by /proc among it;
without seccomp and namespaces it reaches the network. Run the lesson in a container or a virtual machine
there.
"""

from .probe import enforced
from .run import MISSING, Raised, SandboxResult, run_code, run_programs
from .wire import same

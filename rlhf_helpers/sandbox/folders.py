"""A folder for one program: locked by the caller, removed without following a link. Lesson 4."""

import contextlib
import glob
import os
import secrets
import tempfile
from collections.abc import Iterator

POSIX = os.name == "posix"
if POSIX:
    import fcntl

PREFIX, INSIDE = "rlhf-sandbox-", "program"


@contextlib.contextmanager
def _opened(name: str, parent: int | None = None) -> Iterator[int]:
    """Open a folder, not what a link of that name leads to, and close it afterwards."""
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def program_folder() -> Iterator[str]:
    """Make a folder and remove it afterwards, however deep it has become.

    It lies in one that stays the caller's: a program that owns its folder can neither rename it nor put
    a link in its place. The caller holds a lock on the outer folder as long as it lives.
    """
    if not POSIX:
        temporary = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        with contextlib.suppress(RecursionError), temporary as path:
            yield path
        return
    path = tempfile.mkdtemp(prefix=PREFIX)
    with _opened(path) as outer:
        with contextlib.suppress(OSError):  # a file system without locks: what is left there stays
            fcntl.flock(outer, fcntl.LOCK_EX)
        os.fchmod(outer, 0o711)  # the program, another user, passes through
        os.mkdir(INSIDE, 0o700, dir_fd=outer)
        try:
            yield os.path.join(path, INSIDE)
        finally:
            _remove(path, outer)


def remove_left() -> None:
    """Remove the folders that killed callers of this user left behind; their locks are free."""
    pattern = os.path.join(glob.escape(tempfile.gettempdir()), f"{PREFIX}*")
    for path in glob.glob(pattern) if POSIX else []:
        with contextlib.suppress(OSError), _opened(path) as outer:
            fcntl.flock(outer, fcntl.LOCK_EX | fcntl.LOCK_NB)
            names = os.listdir(outer)  # empty: another run has just made it
            ours = os.fstat(outer).st_uid == os.geteuid()
            if ours and names and all(name.startswith(INSIDE) for name in names):
                _remove(path, outer)


def _remove(path: str, outer: int) -> None:
    """Remove an open folder: each folder in it is moved to its top, then opened, then removed.

    Names are looked up in open folders and links are never followed, so that nothing outside is reached
    whatever else happens there.
    """
    with contextlib.suppress(OSError):
        waiting = os.listdir(outer)
        while waiting:
            name = waiting.pop()
            with _opened(name, outer) as here:
                for entry in list(os.scandir(here)):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=here)
                        continue
                    with contextlib.suppress(ValueError, NotImplementedError):  # older C libraries cannot
                        os.chmod(entry.name, 0o700, dir_fd=here, follow_symlinks=False)
                    waiting.append(f"{INSIDE}-{secrets.token_hex(8)}")
                    os.rename(entry.name, waiting[-1], src_dir_fd=here, dst_dir_fd=outer)
            os.rmdir(name, dir_fd=outer)
        if os.path.samestat(os.lstat(path), os.fstat(outer)):
            os.rmdir(path)

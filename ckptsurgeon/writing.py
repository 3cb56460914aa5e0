"""What everything that writes files asks of the system: all bytes, names that are on the disk, refusals in words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

from ckptsurgeon.errors import OutputError

PATIENCE = 10.0
"""Seconds for which a run waits for another one that is at its very end."""
_PAUSE = 0.02
_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file grows too large",
    errno.ELOOP: "is a link",
    errno.ENOTEMPTY: "exists; --force replaces it",
}


@contextlib.contextmanager
def failures(path: str, outcome: str = "nothing was written") -> Iterator[None]:
    """What the system refuses becomes an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        words = _WORDS.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(path, f"{words}; {outcome}") from error


def put(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`; OSError when it cannot be written."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[done:], offset + done


@contextlib.contextmanager
def alone(folder: str, path: str) -> Iterator[None]:
    """The only run that changes names of files that belong together in a folder.

    Another one is waited for, since it takes a moment; OutputError about `path` when it takes long.  File systems
    without locks do without.
    """
    with failures(path):
        descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + PATIENCE
        while not _taken(descriptor):
            if time.monotonic() > until:
                raise OutputError(path, "another run changes the files there just now; nothing was written")
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def sync_folder(path: str) -> None:
    """What was renamed and removed in a folder is on the disk when this returns, or the file system has no such
    thing to offer (some that lie on a network)."""
    folder = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)

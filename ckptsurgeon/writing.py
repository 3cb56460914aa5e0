"""What everything that writes files asks of the system: all bytes, names that are on the disk, refusals in words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from ckptsurgeon.errors import OutputError

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

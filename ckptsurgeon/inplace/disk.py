"""What in-place changes ask of the file system: locks, files that appear whole, folders that remember."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import PurePath

from ckptsurgeon.errors import OutputError
from ckptsurgeon.writing import alone, failures, put, sync_folder

PART = ".part"
"""Behind the name of a file that is being written; nobody reads it, and the next run takes its name."""
_TRIES = 20


class Lock:
    """The exclusive hold on a file, kept while the file is replaced by another."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self._open = [descriptor]

    def replace(self, text: bytes, mode: int) -> None:
        """Put another content in the file's place, in one step; the hold goes over to it before it is seen."""
        staged = staged_name(self.path)
        descriptor = _create(staged, mode)
        self._open.append(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        put(descriptor, text, 0)
        os.fsync(descriptor)
        os.replace(staged, self.path)
        sync_folder(os.path.dirname(self.path))
        self.descriptor = descriptor

    def close(self) -> None:
        for descriptor in self._open:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: str, is_index: bool = False) -> Iterator[Lock]:
    """Hold a file against other in-place changes; OutputError when one is under way, or it may not be written.

    With an index its folder is held too, against whoever puts other shards in their places.  The file at `path` may
    be replaced between opening and locking it, so that is looked at again.
    """
    for _ in range(_TRIES):
        with failures(path):
            descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with failures(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = os.stat(path)
        except OutputError as error:
            os.close(descriptor)
            if isinstance(error.__cause__, BlockingIOError):
                raise OutputError(path, "another in-place change of it is under way; nothing was written") from None
            raise
        if (there.st_dev, there.st_ino) == (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino):
            break
        os.close(descriptor)
    else:
        raise OutputError(path, "is replaced again and again; nothing was written")
    lock = Lock(path, descriptor)
    try:
        with alone(os.path.dirname(path), path) if is_index else contextlib.nullcontext():
            yield lock
    finally:
        lock.close()


def check_own(path: str) -> None:
    """OutputError for a file that has other names, which a change in place would change too."""
    with failures(path):
        found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        real = os.path.realpath(path)
        raise OutputError(
            path, f"is a link to {real}, which others may share (a Hugging Face cache does); write a copy with -o OUT"
        )
    if not stat.S_ISREG(found.st_mode):
        raise OutputError(path, "is no regular file")
    if found.st_nlink > 1:
        raise OutputError(
            path,
            f"has {found.st_nlink} names (hard links), and all would change; write a copy with -o OUT, or remove the "
            "other names",
        )


def read(descriptor: int, count: int, offset: int = 0) -> bytes:
    """`count` bytes, or fewer where the file ends."""
    made = b""
    while len(made) < count and (more := os.pread(descriptor, count - len(made), offset + len(made))):
        made += more
    return made


def staged_name(path: str) -> str:
    """Where a file is written before it takes its place: hidden, beside it, always the same."""
    name = PurePath(path).name
    return os.path.join(os.path.dirname(path), f"{'' if name.startswith('.') else '.'}{name}{PART}")


def store(path: str, data: bytes, mode: int) -> None:
    """A file with this content at `path`, whole and on the disk; its folder is not synced yet."""
    staged = staged_name(path)
    descriptor = _create(staged, mode)
    try:
        put(descriptor, data, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(staged, path)


def _create(path: str, mode: int) -> int:
    remove(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, mode & 0o666)
    return descriptor


def remove(path: str) -> bool:
    """Whether a file was there and is gone."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True

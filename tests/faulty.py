"""A file system that fails: every call that changes the disk is counted, and the n-th one goes wrong.

The calls are those of `os` (and `fcntl.flock`), which is all that the package writes with; a test makes sure of
that.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WRITES = ("write", "writev", "pwrite", "pwritev", "copy_file_range", "sendfile")
SYNCS = ("fsync", "fdatasync")
NAMES = ("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir")
OTHERS = ("ftruncate", "truncate", "posix_fallocate", "fchmod", "chmod", "fchown", "chown", "utime")
CHANGING = ("open", *WRITES, *SYNCS, *NAMES, *OTHERS)
READING = ("open", "read", "readv", "pread", "preadv", "stat", "lstat", "fstat", "scandir", "listdir")
"""Calls that look at the disk; `open` is among both, by its flags."""
_CREATING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
_REFUSED = (errno.EIO, errno.EPERM, errno.EROFS, errno.ENOSPC)

Tree = dict[str, tuple[int, bytes]]


def tree(folder: str | Path = ".") -> Tree:
    """Every file below a folder with its mode and bytes, every folder (with a `/`), every link with its target."""
    made: Tree = {}
    for place, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = os.path.join(place, name)
            inner, mode = os.path.relpath(path, folder), os.lstat(path).st_mode & 0o777
            if os.path.islink(path):
                made[inner] = mode, os.fsencode(os.readlink(path))
            elif os.path.isdir(path):
                made[inner + "/"] = mode, b""
            else:
                made[inner] = mode, Path(path).read_bytes()
    return made


def visible(found: Tree) -> Tree:
    """Without hidden files, which no reader looks for, and their content."""
    return {
        name: content for name, content in found.items() if not any(part[0] == "." for part in name.split("/") if part)
    }


@dataclass
class Faults:
    """What goes wrong, and when.

    `at` is the number of the call that fails (1 is the first), `how` is

    - `fail`: it raises an OSError, the later ones work: a full disk that has room again, a mended cable;
    - `dead`: it and all later ones raise: the disk is gone;
    - `full`: from it on no byte can be written, but names can be changed;
    - `short`: from it on a write takes half of what it is given, and at least a byte;
    - `stop`: KeyboardInterrupt comes instead of it; `stopped`: after it;
    - `torn`: half of it is done if it writes, and then the disk is gone;
    - `kill`: the process is killed in front of it.

    `seen` are the names of the calls so far.
    """

    how: str
    at: int
    calls: tuple[str, ...] = CHANGING
    seen: list[str] = field(default_factory=list)
    said: int = 0

    @property
    def reached(self) -> bool:
        """Whether the call was made at all."""
        return len(self.seen) >= self.at

    @property
    def last(self) -> str:
        """The name of the call that failed, if it was made."""
        return self.seen[self.at - 1] if self.reached else ""

    @contextmanager
    def active(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in self.calls:
                if hasattr(os, name):
                    patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            if self.calls is CHANGING:
                patch.setattr(fcntl, "flock", self._wrapped("flock", fcntl.flock))
            yield

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            if name == "open" and not self._counts(*args, **how):
                return real(*args, **how)
            self.seen.append(name)
            return self._step(name, real, *args, **how)

        return call

    def _counts(self, path: Any, flags: int, *rest: Any, **how: Any) -> bool:
        writes = bool(flags & (_CREATING | os.O_DIRECTORY))
        return writes is (self.calls is CHANGING)

    def _step(self, name: str, real: Callable[..., Any], *args: Any, **how: Any) -> Any:
        number = len(self.seen)
        if self.how == "short" and number >= self.at and name in WRITES:
            return self._half(name, real, *args)
        if number == self.at and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.at and self.how == "torn" and name in WRITES:
            self._half(name, real, *args)
        if number == self.at and self.how == "stop":
            raise KeyboardInterrupt
        if (number == self.at and self.how == "fail") or (number >= self.at and self.how in ("dead", "torn")):
            raise self._refusal(name)
        if number >= self.at and self.how == "full" and name in WRITES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        made = real(*args, **how)
        if number == self.at and self.how == "stopped":
            if name == "open":
                os.close(made)
            raise KeyboardInterrupt
        return made

    def _refusal(self, name: str) -> OSError:
        """Another one every time, so that all are met."""
        kinds = _NO_ROOM if name in WRITES else _REFUSED
        number = kinds[(len(self.seen) + self.said) % len(kinds)]
        self.said += 1
        return OSError(number, os.strerror(number))

    @staticmethod
    def _half(name: str, real: Callable[..., Any], *args: Any) -> Any:
        """The same call for half of the bytes."""
        words = list(args)
        if name in ("write", "pwrite"):
            words[1] = memoryview(words[1])[: max(1, len(words[1]) // 2)]
        elif name == "copy_file_range":
            words[2] = max(1, words[2] // 2)
        elif name == "sendfile":
            words[3] = max(1, words[3] // 2)
        return real(*words)


def in_a_child(do: Callable[[], Any]) -> int:
    """The pid of a fork that does it, and ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of torch are not touched in the child
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    return pid


def every(how: str, calls: tuple[str, ...] = CHANGING) -> Iterator[Faults]:
    """The faults of one kind, one after another, until one comes too late to happen."""
    for at in itertools.count(1):
        made = Faults(how, at, calls)
        yield made
        if not made.reached:
            assert at > 1, "nothing was written at all"
            return

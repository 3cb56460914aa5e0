"""Files that come into being beside their places, under names that nobody reads.

What is staged is locked as long as its writer lives: one file by itself, several in a folder of theirs
whose lock is the only one, since a thousand shards cannot all be held open.  What a killed writer left
behind is found by its name and by the lock that nobody holds, and removed by the next run that writes to
the same place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator

_SUFFIX = ".part"
OLD = "old-"
"""Before the name of what was there and is to be replaced, in the folder of what is staged: never swept."""
_STAGED = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(_SUFFIX)}", re.DOTALL)


def beside(place: str) -> str:
    """A new name for what is to become `place`."""
    return os.path.join(os.path.dirname(place), f".{_base(place)}.{secrets.token_hex(4)}{_SUFFIX}")


def _base(place: str) -> str:
    return os.fsencode(os.path.basename(place))[:200].decode("utf-8", "ignore")  # a name has at most 255 bytes


def create(place: str) -> tuple[str, int]:
    """A new locked file beside `place`: its path, and a descriptor whose end is the end of the lock."""
    while True:
        path = beside(place)
        with _gone_if_it_fails(path, os.unlink):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            if _locked(path, descriptor):
                return path, descriptor
        os.close(descriptor)  # somebody took it for a leftover in between


def create_folder(place: str) -> tuple[str, int]:
    """A new locked folder beside `place`."""
    while True:
        path = beside(place)
        with _gone_if_it_fails(path, os.rmdir):
            os.mkdir(path)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if _locked(path, descriptor):
                return path, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def _gone_if_it_fails(path: str, remove: Callable[[str], None]) -> Iterator[None]:
    """What has been made under a name of our own goes again when it cannot be used."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove(path)
        raise


def _locked(path: str, descriptor: int) -> bool:
    """Take the lock; False when another run is just about to sweep it away, or has done so.  File systems without
    locks do without."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sweep(places: Iterable[str], kin: Callable[[str], bool]) -> None:
    """Remove what killed runs left beside `places`, which lie in one folder, and beside the names that are `kin`;
    what a living run holds stays."""
    wanted = {_base(place): os.path.dirname(place) for place in places}
    folder = next(iter(wanted.values())) or "."
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _STAGED.fullmatch(entry.name)
            if found is not None and (found[1] in wanted or kin(found[1])) and not entry.is_symlink():
                _remove(entry.path, entry.is_dir())


def _remove(path: str, is_folder: bool) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_folder:
                os.unlink(path)
            elif not any(name.startswith(OLD) for name in os.listdir(path)):
                shutil.rmtree(path)
        finally:
            os.close(descriptor)


def is_staged(name: str) -> bool:
    """Whether a name is one that `beside` gives."""
    return _STAGED.fullmatch(name) is not None


def staged_for(name: str) -> str | None:
    """What a name that `beside` gives was to become, by name (of a long one, the beginning); None for other names."""
    found = _STAGED.fullmatch(name)
    return None if found is None else found[1]


def is_held(path: str) -> bool:
    """Whether a living run holds what is staged there."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # a file system without locks
        finally:
            os.close(descriptor)
    return False

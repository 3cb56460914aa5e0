"""Rewriting headers so that a kill at any moment leaves the old checkpoint or the new one.

1. Side files with the old and the new beginnings; for shards that of the index comes last, and with it the change
   begins.  Until here nothing is changed.
2. The new headers are written and synced, then the new index.  Readers take the old ones from the side files.
3. The side file (of the index, where there is one) is replaced by one that says `redo`: now the change is made.
4. What cannot be taken back: tensors at the end are cut off, shards without tensors go.
5. The side files go, that of the index last.

Without anything that cannot be taken back, and without shards, the side file's end is the moment of 3.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ckptsurgeon import writing
from ckptsurgeon.errors import CkptError, InputError, OutputError
from ckptsurgeon.formats import sidefile
from ckptsurgeon.formats.sidefile import Side
from ckptsurgeon.inplace import disk, recovery
from ckptsurgeon.inplace.changes import Changes, FileChange
from ckptsurgeon.sources import File

_MADE = "the change is made, and `ckpt verify --repair` completes it"


def carry_out(changes: Changes) -> None:
    """Rewrite what is to be rewritten, and sync it; when it fails, everything is as it was, or the error says that it
    is not.

    Raises OutputError when a file may not be written or another change of it is under way, InputError when one has
    changed since the plan was made.
    """
    changes.plan.check()
    if not changes.any:
        return
    with disk.locked(changes.path, changes.index is not None) as lock:
        recovery.refuse_pending(changes.path, [change.file.path for change in changes.files])
        sides = list(_sides(changes, lock))
        with _whole_or_not_at_all(changes.path, lock):
            _begin(changes, sides)
            for change in changes.files:
                _write(change)
            if changes.index is not None and changes.rewrites_index:
                lock.replace(changes.index[1], _mode(changes.path))
            _settle(changes, sides[-1])
        _complete(changes.path, lock)


def _mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def _sides(changes: Changes, lock: disk.Lock) -> Iterator[Side]:
    """The side files, that of the index last; all is looked at again now that it is held."""
    run = secrets.token_hex(8)
    base = os.path.basename
    for change in changes.files:
        disk.check_own(change.file.path)
        descriptor = change.file.open()
        try:
            old = disk.read(descriptor, len(change.region))
        finally:
            os.close(descriptor)
        part_of = None if changes.index is None else base(changes.path)
        name, before = base(change.file.path), change.file.size
        yield Side(name, run, before, change.size, old, change.region, part_of=part_of)
    if changes.index is not None:
        old, new = changes.index
        if disk.read(lock.descriptor, len(old) + 1) != old:
            raise InputError("changed since it was opened", path=changes.path, hint="open it again")
        for one in changes.emptied:
            disk.check_own(os.path.join(os.path.dirname(changes.path), one.name))
        shards = tuple(base(change.file.path) for change in changes.files)
        yield Side(base(changes.path), run, len(old), len(new), old, new, shards=shards, emptied=changes.emptied)


@contextmanager
def _whole_or_not_at_all(path: str, lock: disk.Lock) -> Iterator[None]:
    """Whatever fails, what was begun is taken back; where that fails too, the side files stay and are named."""
    try:
        yield
    except BaseException as failure:
        try:
            recovery.mend(path, lock)
        except CkptError:
            words = f"{getattr(failure, 'strerror', None) or failure}; `ckpt verify --repair` puts back what was begun"
            raise OutputError(path, words) from failure
        if isinstance(failure, OSError):
            with writing.failures(path):
                raise
        raise


def _begin(changes: Changes, sides: list[Side]) -> None:
    """The side files, on the disk; that of an index when all others are."""
    folder = os.path.dirname(changes.path)
    for side in sides:
        if side.part_of is None and len(sides) > 1:
            writing.sync_folder(folder)
        path = os.path.join(folder, side.name)
        disk.store(sidefile.beside(path), sidefile.encoded(side), _mode(path))
    writing.sync_folder(folder)


def _write(change: FileChange) -> None:
    path = change.file.path
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if File.of(path, os.fstat(descriptor)) != change.file:
            raise InputError("changed since it was opened", path=path, hint="open it again")
        writing.put(descriptor, change.region, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(changes: Changes, side: Side) -> None:
    """The moment from which the change is made."""
    place = sidefile.beside(changes.path)
    if changes.index is None and not changes.freed:
        disk.remove(place)
    else:
        disk.store(place, sidefile.encoded(replace(side, redo=True, old=b"")), _mode(changes.path))


def _complete(path: str, lock: disk.Lock) -> None:
    try:
        with writing.failures(path, _MADE):
            writing.sync_folder(os.path.dirname(path))
        recovery.mend(path, lock, _MADE)
    except InputError as error:
        raise OutputError(path, f"{error.cause}; {_MADE}") from error

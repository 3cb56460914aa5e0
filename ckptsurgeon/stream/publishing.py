"""Finished files take their places.

One file does so by one rename.  Several cannot: they are listed in a journal first, which is on the disk
before the first of them moves.  A run that is killed in between is carried on by the next one that writes
there, for all that is new is whole by then; one that fails puts back what was there.  Never is there an
old index over new shards.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from ckptsurgeon.errors import InputError, OutputError
from ckptsurgeon.formats import JOURNAL
from ckptsurgeon.stream import staging
from ckptsurgeon.writing import failures, put, sync_folder

Kin = Callable[[str], bool]
"""Tells by its name whether another file in the folder belongs to an earlier output of the same kind."""
Moves = Sequence[tuple[str, str, str]]
"""Where a file is, where it belongs, and what it is called in errors; an index is the last."""


def no_kin(name: str) -> bool:
    """The kin of an output that is one file."""
    return False


def kin_in(folder: str, kin: Kin) -> list[str]:
    """The names in a folder that belong to an earlier output."""
    if kin is no_kin:
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if kin(entry.name) and (entry.is_file() or entry.is_symlink()))


def publish(moves: Moves, force: bool, kin: Kin) -> None:
    """Give every file its place, the last one last; without `force` never over one that came in between.

    With `force` the older `kin` are gone then.  Without `kin` nobody looks into the folder yet.
    """
    beside, place, path = moves[-1]
    folder = os.path.dirname(place)
    old = kin_in(folder, kin) if force else []
    if kin is no_kin or (len(moves) == 1 and not set(old) - {os.path.basename(place)}):
        for beside, place, path in moves:
            with failures(path):
                _move(beside, place, path, force)
        with failures(path):
            sync_folder(folder)
        return
    aside = {os.path.join(folder, name): staging.beside(os.path.join(folder, name)) for name in old}
    listed = journal(place)
    with failures(path):
        _keep(listed, {"moves": [_names(move[:2]) for move in moves], "aside": _names(aside.values())})
    retired: list[str] = []
    published: list[str] = []
    try:
        for name in sorted(aside, key=lambda name: (not name.endswith(".json"), name)):
            with failures(name):
                os.rename(name, aside[name])
            retired.append(name)
        for beside, place, path in moves:
            fresh = not os.path.lexists(place)
            with failures(path):
                _move(beside, place, path, force)
            if fresh:
                published.append(place)
        with failures(path):
            sync_folder(folder)
    except BaseException:
        _undo(published, {name: aside[name] for name in retired}, listed)
        raise
    _finish(folder, list(aside.values()), listed)


def _names(paths: Any) -> list[str]:
    return [os.path.basename(path) for path in paths]


def journal(place: str) -> str:
    """The journal of files of which `place` is the last."""
    return os.path.join(os.path.dirname(place), f".{os.path.basename(place)}.journal")


def _keep(path: str, content: dict[str, Any]) -> None:
    """A journal that is on the disk, whole, when this returns."""
    made, descriptor = staging.create(path)
    try:
        put(descriptor, memoryview(json.dumps(content).encode()), 0)
        os.fsync(descriptor)
        os.replace(made, path)
        sync_folder(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(made)
        raise
    finally:
        os.close(descriptor)


def _move(beside: str, place: str, path: str, force: bool) -> None:
    if force:
        os.replace(beside, place)
        return
    try:
        os.link(beside, place)
    except FileExistsError:
        raise OutputError(path, "exists; --force replaces it") from None
    except OSError:
        os.rename(beside, place)
    else:
        os.unlink(beside)


def _undo(published: Sequence[str], retired: dict[str, str], journal: str) -> None:
    """What was there is there again, and nothing else."""
    with contextlib.suppress(OSError):
        os.unlink(journal)
    for name in published:
        with contextlib.suppress(OSError):
            os.unlink(name)
    for place, aside in reversed(retired.items()):
        with contextlib.suppress(OSError):
            os.rename(aside, place)


def _finish(folder: str, aside: Sequence[str], journal: str) -> None:
    """All is in its place; what is left are names that nobody needs."""
    for name in (*aside, journal):
        with contextlib.suppress(OSError):
            os.unlink(name)
    with contextlib.suppress(OSError):
        sync_folder(folder)


def recover(path: str, kin: Kin) -> tuple[str, ...]:
    """Carry on what a killed run began to publish at `path`, or under the name of its kin; the names of the outputs.

    Raises InputError when its journal cannot be understood, OutputError when that run is still alive.
    """
    folder = os.path.realpath(os.path.dirname(path))
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ()  # the writer says it
    done = []
    for found in map(JOURNAL.fullmatch, names):
        if found is not None and (found[1] == os.path.basename(path) or kin(found[1])):
            _carry_on(folder, os.path.join(folder, found[0]), path)
            done.append(found[1])
    return tuple(done)


def _carry_on(folder: str, journal: str, path: str) -> None:
    try:
        with open(journal, encoding="utf-8") as file:
            found = json.load(file)
        moves = [(_inside(folder, a), _inside(folder, b)) for a, b in found["moves"]]
        aside = [_inside(folder, name) for name in found["aside"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot be understood ({error})", path=journal, hint="remove it, and write again") from None
    with failures(path):
        left = [(beside, place) for beside, place in moves if os.path.lexists(beside)]
        if any(staging.is_held(beside) for beside, _ in left):
            raise OutputError(path, "another run puts its shards in their places there just now")
        for beside, place in left:
            os.replace(beside, place)
        sync_folder(folder)
    _finish(folder, aside, journal)


def _inside(folder: str, name: Any) -> str:
    if not isinstance(name, str) or not name or os.path.basename(name) != name or name in (".", ".."):
        raise ValueError(f"{name!r} is no file beside it")
    return os.path.join(folder, name)

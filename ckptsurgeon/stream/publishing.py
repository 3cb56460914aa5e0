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
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckptsurgeon.errors import InputError, OutputError, UsageError
from ckptsurgeon.formats import JOURNAL, output
from ckptsurgeon.stream import staging
from ckptsurgeon.writing import alone, failures, put, sync_folder

_MOST = 64 << 20
_PLACED = "the new file is in its place, whole, and a power failure may undo that"
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
    with failures(folder), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if kin(entry.name) and (entry.is_file() or entry.is_symlink()))


def publish(moves: Moves, force: bool, kin: Kin) -> None:
    """Give every file its place, the last one last; without `force` never over one that came in between.

    With `force` the older `kin` are gone then.  Without `kin` nobody looks into the folder yet.
    """
    if kin is no_kin:
        for beside, place, path in moves:
            _publish_alone(beside, place, path, force)
        return
    _, place, path = moves[-1]
    folder = os.path.dirname(place)
    with alone(folder, path):
        _recover(folder, os.path.basename(place), path, kin)  # of a run that was killed since this one began
        old = kin_in(folder, kin)
        if old and not force:
            raise OutputError(path, f"another run wrote {old[0]} there in the meantime; --force replaces it")
        if len(moves) == 1 and not set(old) - {os.path.basename(place)}:
            _publish_alone(*moves[0], force)
        else:
            _publish_together(moves, force, old)


def _publish_together(moves: Moves, force: bool, old: Iterable[str]) -> None:
    beside, place, path = moves[-1]
    folder = os.path.dirname(place)
    held = os.path.dirname(beside)  # the folder of what is staged, which takes what was there too
    aside = {os.path.join(folder, name): os.path.join(held, f"{staging.OLD}{name}.part") for name in old}
    listed = journal(place)
    with failures(path):
        _keep(listed, folder, [move[:2] for move in moves], aside.values())
    published: list[tuple[str, os.stat_result]] = []
    try:
        for name in sorted(aside, key=lambda name: (not name.endswith(".json"), name)):
            with failures(name):
                os.rename(name, aside[name])
        for beside, place, path in moves:
            with failures(path):
                if not os.path.lexists(place):
                    published.append((place, os.stat(beside)))
                _move(beside, place, path, force)
        with failures(path):
            sync_folder(folder)
    except BaseException:
        _undo(published, aside, listed)
        raise
    _finish(folder, list(aside.values()), listed)


def _publish_alone(beside: str, place: str, path: str, force: bool) -> None:
    """One file, by one rename; what did not replace another one is taken back when it cannot be synced."""
    with failures(path):
        made, fresh = os.stat(beside), not os.path.lexists(place)
    try:
        with failures(path):
            _move(beside, place, path, force)
        with failures(path, "nothing was written" if fresh else _PLACED):
            sync_folder(os.path.dirname(place))
    except BaseException:
        if fresh:
            _take_back(place, made)
        raise


def give_place(beside: str, place: str) -> None:
    """A new folder appears, whole; OSError when it cannot, and then it is where it was."""
    made = os.stat(beside)
    try:
        os.rename(beside, place)
        sync_folder(os.path.dirname(place))
    except BaseException:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(place), made):
                os.rename(place, beside)
        raise


def _take_back(place: str, made: os.stat_result) -> None:
    """Remove what was published, and nothing that came there from elsewhere."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.lstat(place), made):
            os.unlink(place)


def journal(place: str) -> str:
    """The journal of files of which `place` is the last."""
    return os.path.join(os.path.dirname(place), f".{os.path.basename(place)}.journal")


def _keep(path: str, folder: str, moves: Iterable[tuple[str, str]], aside: Iterable[str]) -> None:
    """A journal that is on the disk, whole, when this returns; its names count from the folder."""
    content = {
        "moves": [[os.path.relpath(name, folder) for name in move] for move in moves],
        "aside": [os.path.relpath(name, folder) for name in aside],
    }
    made, descriptor = staging.create(path)
    try:
        put(descriptor, json.dumps(content).encode(), 0)
        os.fsync(descriptor)
        os.replace(made, path)
        sync_folder(folder)
    except BaseException:
        for name in (made, path):
            with contextlib.suppress(OSError):
                os.unlink(name)
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
        with contextlib.suppress(OSError):  # whoever staged it tries again
            os.unlink(beside)


def _undo(published: Iterable[tuple[str, os.stat_result]], aside: Mapping[str, str], journal: str) -> None:
    """What was there is there again, and nothing else.

    The journal goes first: from here on nothing may be carried on.  What was put aside and cannot be put
    back stays where it is, and `sweep` leaves it there.
    """
    with contextlib.suppress(OSError):
        os.unlink(journal)
    for place, made in published:
        _take_back(place, made)
    for place, beside in reversed(list(aside.items())):
        if os.path.lexists(beside) and not os.path.lexists(place):
            with contextlib.suppress(OSError):
                os.rename(beside, place)


def _finish(folder: str, aside: Sequence[str], journal: str) -> None:
    """All is in its place; what is left are names that nobody needs.

    As long as one of those that were put aside cannot be removed the journal stays, so that the next run does.
    """
    with contextlib.suppress(OSError):
        for name in (*aside, journal):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        sync_folder(folder)


def recover(path: str, kin: Kin) -> tuple[str, ...]:
    """Carry on what a killed run began to publish at `path`, or under the name of its kin; the names of the outputs.

    Raises InputError when its journal cannot be understood, OutputError when that run is still alive.
    """
    folder = os.path.realpath(os.path.dirname(path))
    if not _begun(folder, os.path.basename(path), kin):
        return ()
    with alone(folder, path):
        return _recover(folder, os.path.basename(path), path, kin)


def _recover(folder: str, base: str, path: str, kin: Kin) -> tuple[str, ...]:
    found = _begun(folder, base, kin)
    for name in found:
        _carry_on(folder, journal(os.path.join(folder, name)), path)
    return tuple(found)


def _begun(folder: str, base: str, kin: Kin) -> list[str]:
    """The outputs in a folder for which there is a journal."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []  # the writer says it
    return [found[1] for found in map(JOURNAL.fullmatch, names) if found and (found[1] == base or kin(found[1]))]


def _carry_on(folder: str, journal: str, path: str) -> None:
    try:
        found = json.loads(_text(journal))
        moves = [(_staged(folder, a), _inside(folder, b)) for a, b in found["moves"]]
        aside = [_staged(folder, name) for name in found["aside"]]
        _prove(os.path.basename(journal), found["moves"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"cannot be understood ({error})", path=journal, hint="remove it, and write again") from None
    held = sorted({name for beside, _ in moves for name in (beside, os.path.dirname(beside)) if name != folder})
    if any(map(staging.is_held, held)):
        raise OutputError(path, "another run puts its shards in their places there just now")
    with failures(path):
        for beside, place in moves:
            if os.path.lexists(beside):
                os.replace(beside, place)
        sync_folder(folder)
    _finish(folder, aside, journal)
    for name in held:
        with contextlib.suppress(OSError):
            os.rmdir(name)


def _prove(journal: str, moves: Iterable[tuple[str, str]]) -> None:
    """ValueError where a staged file would get another name than its own, or one that is no part of the output: a
    journal may come from elsewhere, and must not replace what it does not belong to."""
    named = JOURNAL.fullmatch(journal)
    base = named[1] if named else ""
    try:
        kin = output(base).is_kin
    except UsageError:
        kin = no_kin
    for staged, name in moves:
        *_, last = staged.split("/")
        own = last.removesuffix(".part") if "/" in staged else staging.staged_for(last)
        if (own != name and not (own and name.startswith(own))) or not (name == base or kin(name)):
            raise ValueError(f"{staged!r} is not what {name!r} was staged as for {base!r}")


def _text(journal: str) -> bytes:
    """The content of a journal; ValueError for what is no regular file of a sensible size."""
    descriptor = os.open(journal, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        there = os.fstat(descriptor)
        if not stat.S_ISREG(there.st_mode) or there.st_size > _MOST:
            raise ValueError("no regular file of up to 64 MiB")
        return os.pread(descriptor, there.st_size, 0)
    finally:
        os.close(descriptor)


def _inside(folder: str, name: Any) -> str:
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{name!r} is no file beside it")
    return os.path.join(folder, name)


def _staged(folder: str, name: Any) -> str:
    """A name under which a run stages files: another one is no business of a journal."""
    first, *rest = str(name).split("/")
    fits = staging.is_staged(first) and len(rest) < 2 and all(part.endswith(".part") for part in rest)
    if not fits or "\0" in first + "".join(rest):
        raise ValueError(f"{name!r} is no staged file")
    if rest and os.path.islink(os.path.join(folder, first)):
        raise ValueError(f"{name!r} lies behind a link")
    return os.path.join(folder, first, *rest)

"""Writing layouts: beside their places, synced, and renamed into them.

A reader sees the old file or the whole new one, whatever fails.  Of several files that belong
together (shards and their index) all are complete before the first takes its place, and the index
takes its place last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ckptsurgeon.errors import InputError, OutputError
from ckptsurgeon.formats import Layout
from ckptsurgeon.stream import staging, workers
from ckptsurgeon.stream.budget import Budget
from ckptsurgeon.stream.filling import Named, Tick, fill
from ckptsurgeon.stream.publishing import Kin, give_place, journal, kin_in, no_kin, publish, recover
from ckptsurgeon.stream.spool import Spool
from ckptsurgeon.writing import failures, put

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of all files."""
_NAMES_SHOWN = 5
Files = Sequence[tuple[str, Layout]]
Seal = Callable[[Sequence[str]], Files]
"""Called when all files are filled, with where they are for now: their layouts with what only now is known."""
_USUAL = Budget()


def check(path: str, force: bool, kin: Kin = no_kin) -> str:
    """Where the output really goes; OutputError when it may not be written.

    A link is followed, but not among files of several: there it may lead into a cache that others
    share, so the link itself is replaced.
    """
    try:
        place = os.path.realpath(path)
        if kin is not no_kin:
            place = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        mode = os.stat(place).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise OutputError(path, getattr(error, "strerror", None) or str(error)) from None
    if mode is not None and not stat.S_ISREG(mode):
        raise OutputError(path, "is there and is no regular file")
    folder = os.path.dirname(place)
    there = [] if force else older(path, kin)
    if there and there != [os.path.basename(place)]:
        more = f" and {len(there) - _NAMES_SHOWN} more" if len(there) > _NAMES_SHOWN else ""
        words = f"there are {', '.join(there[:_NAMES_SHOWN])}{more} of an earlier output"
        raise OutputError(path, f"{words}; --force replaces it and removes them")
    if mode is not None and not force:
        raise OutputError(path, "exists; --force replaces it")
    if not os.path.isdir(folder):
        raise OutputError(path, f"the folder {folder} does not exist; make it first")
    return place


def older(path: str, kin: Kin) -> list[str]:
    """The files of an earlier output of the same kind, by name."""
    folder = os.path.realpath(os.path.dirname(path))
    return kin_in(folder, kin) if os.path.isdir(folder) else []


def is_new_folder(path: str, may_be: bool) -> bool:
    """Whether the folder of an output is to be made with it."""
    folder = os.path.dirname(path)
    return may_be and bool(folder) and not os.path.lexists(folder)


def write(
    files: Files,
    *,
    force: bool = False,
    progress: Progress | None = None,
    kin: Kin = no_kin,
    make_folder: bool = False,
    budget: Budget = _USUAL,
    seal: Seal | None = None,
) -> int:
    """Write files that belong together, the last one last, and return their size in bytes.

    With `force` what was there is replaced, and older `kin` are removed; with `make_folder` a
    folder that is not there is made, and appears with all files in it.  Raises OutputError when an
    output exists (without `force`), has no folder, or cannot be written; errors of the sources come
    through.  `seal` may change literal bytes of the layouts, and none of their sizes, once all is written.
    Whatever happens, no partial file stays; what a killed run left is removed by the next one.
    """
    path = files[-1][0]
    if not is_new_folder(path, make_folder):
        recover(path, kin)
        places = [check(path, force, kin) for path, _ in files]
        return _write(files, places, force, progress, kin, budget, seal)
    folder = os.path.dirname(path).rstrip("/")
    check(folder, force=False)
    place = os.path.realpath(folder)
    staging.sweep([place], no_kin)
    with failures(folder):
        beside, lock = staging.create_folder(place)
    try:
        inside = [os.path.join(beside, os.path.basename(path)) for path, _ in files]
        nbytes = _write(files, inside, False, progress, no_kin, budget, seal)
        with failures(folder):
            give_place(beside, place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    return nbytes


def _write(
    files: Files,
    places: Sequence[str],
    force: bool,
    progress: Progress | None,
    kin: Kin,
    budget: Budget,
    seal: Seal | None,
) -> int:
    total = sum(layout.nbytes for _, layout in files)
    with contextlib.ExitStack() as stack:
        staging.sweep([*places, journal(places[-1])], kin)
        spool = Spool(partial(_temporary, places[-1], files[-1][0], stack), budget.block)
        with failures(files[-1][0]):
            parts = [_ready(layout, spool) for _, layout in files]
        beside = _stage(places, files[-1][0], kin is no_kin, stack)
        staged = [
            _Staged(path, place, at, layout, ready)
            for (path, layout), place, at, ready in zip(files, places, beside, parts, strict=True)
        ]
        _fill_all(staged, budget, _ticks(progress, total))
        if seal is not None:
            for one, (_, sealed) in zip(staged, seal([one.beside for one in staged]), strict=True):
                _seal(one, sealed)
        publish([(one.beside, one.place, one.path) for one in staged], force, kin)
    return total


def _stage(places: Sequence[str], path: str, alone: bool, stack: contextlib.ExitStack) -> list[str]:
    """Where the files are until they are whole: in a folder, unless it is one `alone`.  What is left of that when
    the stack ends is removed."""
    if len(places) == 1 and alone:
        with failures(path):
            beside, descriptor = staging.create(places[0])
        stack.callback(os.close, descriptor)
        stack.callback(_remove, beside)
        return [beside]
    with failures(path):
        folder, descriptor = staging.create_folder(places[-1])
    stack.callback(os.close, descriptor)
    staged = [os.path.join(folder, os.path.basename(place) + ".part") for place in places]
    stack.callback(_remove, *staged, folder=folder)
    return staged


def _remove(*paths: str, folder: str | None = None) -> None:
    """Files that are still there, then their folder, unless it holds something else."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if folder is not None:
        with contextlib.suppress(OSError):
            os.rmdir(folder)


@dataclass(frozen=True)
class _Staged:
    """A file that is being made: what it is called, its place, and where it is until it goes there."""

    path: str
    place: str
    beside: str
    layout: Layout
    parts: list[Named]


def _temporary(place: str, path: str, stack: contextlib.ExitStack) -> tuple[str, int]:
    """A file that is gone when the stack ends."""
    with failures(path):
        beside, descriptor = staging.create(place)
    stack.callback(os.close, descriptor)
    stack.callback(_remove, beside)
    return beside, descriptor


def _ready(layout: Layout, spool: Spool) -> list[Named]:
    made: list[Named] = []
    for part in layout.parts:
        if isinstance(part, bytes):
            made.append(part)
            continue
        key = layout.keys.get(id(part))
        try:
            made.append((spool.ready(part), key))
        except InputError as error:
            error.key = error.key or key
            raise
    return made


def _ticks(progress: Progress | None, total: int) -> Tick:
    """The progress of one file as part of that of all."""
    done, lock = 0, threading.Lock()

    def tick(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    return tick


def _fill_all(staged: Sequence[_Staged], budget: Budget, tick: Tick) -> None:
    """Files side by side, each by as many threads as are left for it."""
    together = min(budget.jobs, len(staged))
    threads = budget.jobs // together
    workers.run((partial(_fill, one, budget.block, threads, tick) for one in staged), together)


def _fill(one: _Staged, block: int, threads: int, tick: Tick) -> None:
    """One file, complete and on the disk."""
    patches = one.layout.patches
    with failures(one.path):
        descriptor = os.open(one.beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            crcs = fill(descriptor, one.parts, block, threads, tick, patches is not None)
            for offset, raw in patches(crcs) if patches is not None else ():
                put(descriptor, raw, offset)
            _keep_mode(descriptor, one.place)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _seal(one: _Staged, sealed: Layout) -> None:
    """Write the literal bytes in which the two layouts of a file differ."""
    with failures(one.path):
        descriptor = os.open(one.beside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            at = 0
            for before, after in zip(one.layout.parts, sealed.parts, strict=True):
                nbytes = len(before) if isinstance(before, bytes) else before.nbytes
                if isinstance(before, bytes) and isinstance(after, bytes) and before != after:
                    if len(after) != nbytes:
                        raise AssertionError(f"{len(after)} bytes cannot take the place of {nbytes}")
                    put(descriptor, memoryview(after), at)
                at += nbytes
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _keep_mode(descriptor: int, place: str) -> None:
    """A file that is replaced keeps who may read it."""
    with contextlib.suppress(FileNotFoundError):
        os.fchmod(descriptor, stat.S_IMODE(os.stat(place).st_mode))

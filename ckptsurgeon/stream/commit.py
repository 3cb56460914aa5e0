"""Writing layouts: beside their places, synced, and renamed into them.

A reader sees the old file or the whole new one, whatever fails.  Of several files that belong
together (shards and their index) all are complete before the first takes its place, and the index
takes its place last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence

from ckptsurgeon.errors import InputError, OutputError
from ckptsurgeon.formats import Layout
from ckptsurgeon.stream import records
from ckptsurgeon.tensor import TensorRef

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of all files."""
Kin = Callable[[str], bool]
"""Tells by its name whether another file in the folder belongs to an earlier output of the same kind."""
_NAMES_SHOWN = 5
Files = Sequence[tuple[str, Layout]]


def no_kin(name: str) -> bool:
    return False


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
    return _older(folder, kin) if os.path.isdir(folder) else []


def is_new_folder(path: str, may_be: bool) -> bool:
    """Whether the folder of an output is to be made with it."""
    folder = os.path.dirname(path)
    return may_be and bool(folder) and not os.path.lexists(folder)


def _older(folder: str, kin: Kin) -> list[str]:
    if kin is no_kin:
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if kin(entry.name) and (entry.is_file() or entry.is_symlink()))


def write(
    files: Files,
    *,
    force: bool = False,
    progress: Progress | None = None,
    kin: Kin = no_kin,
    make_folder: bool = False,
) -> int:
    """Write files that belong together, the last one last, and return their size in bytes.

    With `force` what was there is replaced, and older `kin` are removed; with `make_folder` a
    folder that is not there is made, and appears with all files in it.  Raises OutputError when an
    output exists (without `force`), has no folder, or cannot be written; errors of the sources come
    through.  Whatever happens, no partial file stays.
    """
    path = files[-1][0]
    if not is_new_folder(path, make_folder):
        return _write(files, force, progress, kin)
    folder = os.path.dirname(path).rstrip("/")
    check(folder, force=False)
    beside = _beside(os.path.realpath(folder))
    with _failures(folder):
        os.mkdir(beside)
    try:
        nbytes = _write(files, False, progress, no_kin, into=beside)
        with _failures(folder):
            os.rename(beside, os.path.realpath(folder))
            _sync_folder(os.path.dirname(os.path.realpath(folder)))
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return nbytes


def _write(files: Files, force: bool, progress: Progress | None, kin: Kin, into: str | None = None) -> int:
    """`into` is the folder where they are put together, when it is not yet their own."""
    if into is None:
        places = [check(path, force, kin) for path, _ in files]
    else:
        places = [os.path.join(into, os.path.basename(path)) for path, _ in files]
    for _, layout in files:
        records.prove(layout)
    staged = [_beside(place) for place in places]
    published: list[str] = []
    fresh: list[str] = []
    retired: list[tuple[str, str]] = []
    total, done = sum(layout.nbytes for _, layout in files), 0
    try:
        for (path, layout), place, beside in zip(files, places, staged, strict=True):
            _stage(beside, place, layout, path, _shifted(progress, done, total))
            done += layout.nbytes
        if force:
            _retire(places, kin, retired)
        fresh = [place for place in places if not os.path.lexists(place)]
        for (path, _), place, beside in zip(files, places, staged, strict=True):
            with _failures(path):
                _publish(beside, place, path, force)
            published.append(place)
    except BaseException:
        _undo(staged, [place for place in published if place in fresh], retired)
        raise
    for _, aside in retired:
        with contextlib.suppress(OSError):
            os.unlink(aside)
    return total


def _undo(staged: Sequence[str], published: Sequence[str], retired: Sequence[tuple[str, str]]) -> None:
    """What was there is there again, and nothing else."""
    for name in (*staged, *published):
        with contextlib.suppress(OSError):
            os.unlink(name)
    for place, aside in reversed(retired):
        with contextlib.suppress(OSError):
            os.rename(aside, place)


def _beside(place: str) -> str:
    base = os.fsencode(os.path.basename(place))[:200].decode("utf-8", "ignore")  # a name has at most 255 bytes
    return os.path.join(os.path.dirname(place), f".{base}.{secrets.token_hex(4)}.part")


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    """The progress of one file as part of that of all."""
    return None if progress is None else lambda here, _: progress(done + here, total)


def _stage(beside: str, place: str, layout: Layout, path: str, progress: Progress | None) -> None:
    """One file, complete and on the disk, under a name that nobody reads."""
    with _failures(path):
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _fill(descriptor, layout, path, progress)
        with _failures(path):
            _keep_mode(descriptor, place)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retire(places: Sequence[str], kin: Kin, retired: list[tuple[str, str]]) -> None:
    """Put aside what was there of several files, its index first: never an old index over new shards.

    All of the new is on the disk by now, and only renames are left.
    """
    folder = os.path.dirname(places[-1])
    for name in sorted(_older(folder, kin), key=lambda name: (not name.endswith(".json"), name)):
        place = os.path.join(folder, name)
        with _failures(place):
            os.rename(place, aside := _beside(place))
        retired.append((place, aside))


@contextlib.contextmanager
def _failures(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        words = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the quota is used up",
            errno.EFBIG: "the file grows too large",
        }
        raise OutputError(
            path, f"{words.get(error.errno or 0, error.strerror or str(error))}; nothing was written"
        ) from error


def _fill(descriptor: int, layout: Layout, path: str, progress: Progress | None) -> None:
    total, done = layout.nbytes, 0
    crcs: list[int] = []
    for part in layout.parts:
        if isinstance(part, bytes):
            _put(descriptor, memoryview(part), path)
            done += len(part)
            continue
        crc, size = 0, 0
        for block in _blocks(part, layout):
            _put(descriptor, block, path)
            size += len(block)
            if layout.patches is not None:
                crc = zlib.crc32(block, crc)
            if progress is not None:
                progress(done + size, total)
        if size != part.nbytes:
            raise AssertionError(f"{size} bytes came where {part.nbytes} were planned ({part.spec})")
        crcs.append(crc)
        done += size
    if layout.patches is not None:
        with _failures(path):
            for offset, raw in layout.patches(crcs):
                os.pwrite(descriptor, raw, offset)


def _blocks(part: TensorRef, layout: Layout) -> Iterator[memoryview]:
    """The bytes of a part; its errors name the key."""
    try:
        yield from part.blocks()
    except InputError as error:
        error.key = error.key or layout.keys.get(id(part))
        raise


def _put(descriptor: int, data: memoryview, path: str) -> None:
    with _failures(path):
        while data:
            data = data[os.write(descriptor, data) :]


def _keep_mode(descriptor: int, place: str) -> None:
    """A file that is replaced keeps who may read it."""
    with contextlib.suppress(FileNotFoundError):
        os.fchmod(descriptor, stat.S_IMODE(os.stat(place).st_mode))


def _publish(beside: str, place: str, path: str, force: bool) -> None:
    """Into its place in one step; without `force` never over a file that came in between."""
    if force:
        os.replace(beside, place)
    else:
        try:
            os.link(beside, place)
        except FileExistsError:
            raise OutputError(path, "exists; --force replaces it") from None
        except OSError:
            os.rename(beside, place)
        else:
            os.unlink(beside)
    _sync_folder(os.path.dirname(place))


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

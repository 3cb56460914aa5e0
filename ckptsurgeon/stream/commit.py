"""Writing a layout: beside its place, synced, and renamed into it.

A reader sees the old file or the whole new one, whatever fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator

from ckptsurgeon.errors import InputError, OutputError
from ckptsurgeon.formats import Layout
from ckptsurgeon.stream import records
from ckptsurgeon.tensor import TensorRef

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of the whole file."""


def check(path: str, force: bool) -> str:
    """Where the output really goes (links followed); OutputError when it may not be written."""
    try:
        place = os.path.realpath(path)
        mode = os.stat(place).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise OutputError(path, getattr(error, "strerror", None) or str(error)) from None
    if mode is not None and not stat.S_ISREG(mode):
        raise OutputError(path, "is there and is no regular file")
    if mode is not None and not force:
        raise OutputError(path, "exists; --force replaces it")
    folder = os.path.dirname(place)
    if not os.path.isdir(folder):
        raise OutputError(path, f"the folder {folder} does not exist")
    return place


def write(layout: Layout, path: str, *, force: bool = False, progress: Progress | None = None) -> int:
    """Write the file that `layout` describes and return its size in bytes.

    Raises OutputError when `path` exists (without `force`), has no folder, or cannot be written;
    errors of the sources come through.  Whatever happens, no partial file stays.
    """
    place = check(path, force)
    records.prove(layout)
    beside = os.path.join(os.path.dirname(place), f".{os.path.basename(place)[:200]}.{secrets.token_hex(4)}.part")
    try:
        with _failures(path):
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _fill(descriptor, layout, path, progress)
            with _failures(path):
                _keep_mode(descriptor, place)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with _failures(path):
            _publish(beside, place, path, force)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    return layout.nbytes


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
    folder = os.open(os.path.dirname(place), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""A tensor read into memory that is there already, without a copy between where its bytes lie in a file as they are.

The reading is cut into calls that threads may make in any order.  A record that is read whole is held against its
checksum while its bytes are still in the processor's cache; by then they are in their place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from ckptsurgeon.evaluate.pieces import blocks, damaged
from ckptsurgeon.evaluate.reading import Handles, read_into
from ckptsurgeon.limits import BLOCK
from ckptsurgeon.sources import Apply, Extent, Pieces

if TYPE_CHECKING:
    from ckptsurgeon.tensor import TensorRef

_STEP = 16 << 20
"""Bytes of one call: what threads share among them."""
_SUMMED = 512 << 10
"""Bytes that are read and then summed up: they stay in the cache between."""

Call = Callable[[Handles], None]


def fill(ref: TensorRef, view: memoryview) -> None:
    """All calls, one after another."""
    with Handles() as handles:
        for _, call in calls(ref, view):
            call(handles)


def calls(ref: TensorRef, view: memoryview) -> Iterator[tuple[int, Call]]:
    """What fills `view`, of exactly `ref.nbytes`, with the contiguous little-endian bytes of `ref`: how many bytes each
    call brings, and the call.

    A call raises InputError when the file is gone, shorter, or damaged.
    """
    if len(view) != ref.nbytes:
        raise AssertionError(f"{len(view)} bytes of memory for a tensor of {ref.nbytes}")
    source = ref.source
    if isinstance(source, Pieces):
        at = 0
        for part in source.parts:
            yield from calls(part, view[at : at + part.nbytes])
            at += part.nbytes
    elif isinstance(source, Apply) and source.kernel.moves_only:
        yield from calls(source.inputs[0], view)
    elif isinstance(source, Extent) and _is_plain(ref, source):
        yield from _stretches(source, view)
    else:
        yield ref.nbytes, partial(_in_order, ref, view)


def _is_plain(ref: TensorRef, extent: Extent) -> bool:
    """Whether the bytes of an extent are those of its tensor, as they lie."""
    little = extent.byteorder == "little" or ref.spec.dtype.swap_unit == 1
    return ref.nbytes > 0 and extent.codec is None and extent.strides is None and little


def _stretches(extent: Extent, view: memoryview) -> Iterator[tuple[int, Call]]:
    record = extent.record
    starts = range(0, extent.nbytes, _STEP)
    summed = record is not None and record.crc is not None and extent.is_whole
    sums = _Sums(extent, len(starts)) if summed else None
    for index, start in enumerate(starts):
        part = view[start : start + _STEP]
        yield len(part), partial(_read, extent, start, part, sums, index)


def _read(extent: Extent, start: int, view: memoryview, sums: _Sums | None, index: int, handles: Handles) -> None:
    descriptor = handles.descriptor(extent.file)
    if sums is None:
        read_into(descriptor, view, extent.offset + start, extent.path)
        return
    from ckptsurgeon.checksum import crc32

    crc = 0
    for at in range(0, len(view), _SUMMED):
        part = view[at : at + _SUMMED]
        read_into(descriptor, part, extent.offset + start + at, extent.path)
        crc = crc32(part, crc)
    sums.put(index, crc, len(view))


class _Sums:
    """The checksums of the stretches of a record, from whatever thread; the last one proves it."""

    def __init__(self, extent: Extent, count: int) -> None:
        self._extent, self._left, self._lock = extent, count, threading.Lock()
        self._found: dict[int, tuple[int, int]] = {}

    def put(self, index: int, crc: int, nbytes: int) -> None:
        """The sum of one stretch; InputError when it is the last, and the record is damaged."""
        from ckptsurgeon.checksum import crc32_combine

        with self._lock:
            self._found[index] = crc, nbytes
            self._left -= 1
            if self._left:
                return
        whole = 0
        for _, (crc, nbytes) in sorted(self._found.items()):
            whole = crc32_combine(whole, crc, nbytes)
        record = self._extent.record
        if record is not None and whole != record.crc:
            raise damaged(self._extent)


def _in_order(ref: TensorRef, view: memoryview, handles: Handles) -> None:
    at = 0
    for block in blocks(ref, BLOCK, handles):
        view[at : at + len(block)] = block
        at += len(block)

"""A tensor read into memory that is there already, or handed over in stretches, by calls that threads may make in any
order.

What lies in a file as it is goes straight to its place, or through a buffer that stays in the processor's cache.  A
record that is read whole is held against its checksum on the way, where it is to be `proven`; by then its bytes are in
their place.  Summing up takes two thirds of the time of reading.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

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
_HANDED = 4 << 20
"""Bytes that are handed over at a time: torch's own threads share a cast, and a smaller one is not worth it."""
_local = threading.local()

Call = Callable[[Handles], None]
Take = Callable[[int, memoryview], None]
"""Takes bytes, and the place of the first of them in the tensor; they are only there as long as it does."""


def fill(ref: TensorRef, view: memoryview) -> None:
    """Fill `view` here and now."""
    with Handles() as handles:
        for _, call in calls(ref, view):
            call(handles)


def calls(ref: TensorRef, view: memoryview, proven: bool = True) -> Iterator[tuple[int, Call]]:
    """What fills `view`, of exactly `ref.nbytes`, with the contiguous little-endian bytes of `ref`: how many bytes each
    call brings, and the call.

    A call raises InputError when the file is gone, shorter, or damaged.
    """
    if len(view) != ref.nbytes:
        raise AssertionError(f"{len(view)} bytes of memory for a tensor of {ref.nbytes}")
    return _calls(ref, 0, _Memory(view), proven)


def handed(ref: TensorRef, take: Take, proven: bool = True) -> Iterator[tuple[int, Call]]:
    """The same, where `take` is given the bytes in stretches of whole elements, of any size and in any order."""
    return _calls(ref, 0, _Hands(take), proven)


class _Sink(Protocol):
    """Where bytes go: `room` for some that are to be read, which are `done` then; or `put` there as they are."""

    straight: bool

    def room(self, at: int, nbytes: int) -> memoryview: ...
    def done(self, at: int, data: memoryview) -> None: ...
    def put(self, at: int, data: memoryview) -> None: ...


class _Memory:
    straight = True

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def room(self, at: int, nbytes: int) -> memoryview:
        return self._view[at : at + nbytes]

    def done(self, at: int, data: memoryview) -> None:
        """They are there."""

    def put(self, at: int, data: memoryview) -> None:
        self._view[at : at + len(data)] = data


class _Hands:
    straight = False

    def __init__(self, take: Take) -> None:
        self.done = self.put = take

    def room(self, at: int, nbytes: int) -> memoryview:
        made: memoryview | None = getattr(_local, "buffer", None)
        if made is None:
            made = _local.buffer = memoryview(bytearray(_HANDED))
        return made[:nbytes]


def _calls(ref: TensorRef, at: int, sink: _Sink, proven: bool) -> Iterator[tuple[int, Call]]:
    source = ref.source
    if isinstance(source, Pieces):
        for part in source.parts:
            yield from _calls(part, at, sink, proven)
            at += part.nbytes
    elif isinstance(source, Apply) and source.kernel.moves_only:
        yield from _calls(source.inputs[0], at, sink, proven)
    elif isinstance(source, Extent) and _is_plain(ref, source):
        yield from _stretches(source, at, sink, proven)
    else:
        yield ref.nbytes, partial(_in_order, ref, at, sink)


def _is_plain(ref: TensorRef, extent: Extent) -> bool:
    """Whether the bytes of an extent are those of its tensor, as they lie."""
    little = extent.byteorder == "little" or ref.spec.dtype.swap_unit == 1
    return ref.nbytes > 0 and extent.codec is None and extent.strides is None and little


def _stretches(extent: Extent, at: int, sink: _Sink, proven: bool) -> Iterator[tuple[int, Call]]:
    record = extent.record
    starts = range(0, extent.nbytes, _STEP)
    summed = proven and record is not None and record.crc is not None and extent.is_whole
    sums = _Sums(extent, len(starts)) if summed else None
    for start in starts:
        nbytes = min(_STEP, extent.nbytes - start)
        yield nbytes, partial(_read, extent, start, nbytes, at, sink, sums)


def _read(extent: Extent, start: int, nbytes: int, at: int, sink: _Sink, sums: _Sums | None, handles: Handles) -> None:
    descriptor = handles.descriptor(extent.file)
    if sums is not None:
        from ckptsurgeon.checksum import crc32
    crc, step = 0, _HANDED if not sink.straight else nbytes if sums is None else _SUMMED
    for begin in range(start, start + nbytes, step):
        data = sink.room(at + begin, min(step, start + nbytes - begin))
        read_into(descriptor, data, extent.offset + begin, extent.path)
        if sums is not None:
            crc = crc32(data, crc)
        sink.done(at + begin, data)
    if sums is not None:
        sums.put(start, crc, nbytes)


class _Sums:
    """The checksums of the stretches of a record, from whatever thread; the last one proves it."""

    def __init__(self, extent: Extent, count: int) -> None:
        self._extent, self._left, self._lock = extent, count, threading.Lock()
        self._found: dict[int, tuple[int, int]] = {}

    def put(self, start: int, crc: int, nbytes: int) -> None:
        """The sum of one stretch; InputError when it is the last, and the record is damaged."""
        from ckptsurgeon.checksum import crc32_combine

        with self._lock:
            self._found[start] = crc, nbytes
            self._left -= 1
            if self._left:
                return
        whole = 0
        for _, (part, count) in sorted(self._found.items()):
            whole = crc32_combine(whole, part, count)
        record = self._extent.record
        if record is not None and whole != record.crc:
            raise damaged(self._extent)


def _in_order(ref: TensorRef, at: int, sink: _Sink, handles: Handles) -> None:
    for block in blocks(ref, BLOCK, handles):
        sink.put(at, block)
        at += len(block)

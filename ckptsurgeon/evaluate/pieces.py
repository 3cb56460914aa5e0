"""A tensor as pieces of its contiguous little-endian bytes: each says its size, and is made when it is asked for.

Pieces can be made by several threads and in any order.  Only two kinds must be made in order: those of a
compressed member, which has to be inflated from its beginning, and those that are held against a
checksum while they are read (`blocks`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ckptsurgeon.errors import InputError, LimitError
from ckptsurgeon.evaluate import gather, values
from ckptsurgeon.evaluate.reading import Handles, Inflating, read_exactly
from ckptsurgeon.limits import BLOCK, current
from ckptsurgeon.sources import Absent, Apply, Extent, Fill, Inline, Kernel, Pieces

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.dtypes import DType
    from ckptsurgeon.tensor import TensorRef, TensorSpec

ABSENT_HINT = "save it dense in torch, or drop it"


@dataclass(frozen=True, slots=True)
class Piece:
    """The next `nbytes` of a tensor, and how they are made."""

    nbytes: int
    make: Callable[[Handles], memoryview]


Reader = Callable[[Extent, "TensorSpec", int], Iterator[Piece]]
"""How an extent is read: its elements in order, contiguous, in the byte order of the file."""


def blocks(ref: TensorRef, size: int, handles: Handles | None = None) -> Iterator[memoryview]:
    """The contiguous little-endian bytes of `ref`, in order, in blocks of about `size` bytes.

    A record that is read whole is held against its checksum.  What was yielded before the last block is
    not yet proven.  `handles` are those of a pass that reads more than this tensor.
    """
    with Handles() as own:
        for piece in pieces(ref, size, _proven):
            yield piece.make(handles or own)


def pieces(ref: TensorRef, size: int, read: Reader | None = None) -> Iterator[Piece]:
    """`ref` in pieces of about `size` bytes, none of them held against a checksum (unless `read` does)."""
    source, read = ref.source, read or _stretches
    if isinstance(source, Absent):
        raise InputError(f"is {source.form}: the file does not hold its bytes", hint=ABSENT_HINT)
    if ref.nbytes == 0:
        return
    if isinstance(source, Extent):
        unit = ref.spec.dtype.swap_unit if source.byteorder == "big" else 1
        found = read(source, ref.spec, size)
        yield from found if unit == 1 else (Piece(p.nbytes, partial(_swapped, p.make, unit)) for p in found)
    elif isinstance(source, Inline):
        yield Piece(len(source.data), lambda handles: memoryview(source.data))
    elif isinstance(source, Pieces):
        for part in source.parts:
            yield from pieces(part, size, read)
    elif isinstance(source, Fill):
        yield Piece(ref.nbytes, lambda handles: values.to_bytes(source.init.make(ref.spec, source.seed), ref.spec))
    else:
        yield from _applied(ref, source, size, read)


def _applied(ref: TensorRef, source: Apply, size: int, read: Reader) -> Iterator[Piece]:
    if source.kernel.moves_only:
        yield from pieces(source.inputs[0], size, read)
    elif source.kernel.elementwise and len(source.inputs) == 1:
        yield from _elementwise(source, ref.spec.dtype, size, read)
    else:
        for made in _rows(ref, size):
            yield Piece(made.nbytes, partial(_computed, made))


def _elementwise(source: Apply, dtype: DType, size: int, read: Reader) -> Iterator[Piece]:
    (ref,) = source.inputs
    size = max(16, size // max(1, dtype.bits // ref.dtype.bits))
    for piece in pieces(ref, size, read):
        nbytes = piece.nbytes * 8 // ref.dtype.bits * dtype.bits // 8
        yield Piece(nbytes, partial(_changed, piece.make, source.kernel, ref.dtype))


def _changed(make: Callable[[Handles], memoryview], kernel: Kernel, dtype: DType, handles: Handles) -> memoryview:
    block = make(handles)
    made = kernel.on_bytes(block, dtype)
    return values.raw(kernel.run([values.from_buffer(block, dtype.name)])) if made is None else made


def _swapped(make: Callable[[Handles], memoryview], unit: int, handles: Handles) -> memoryview:
    import numpy as np

    return values.bytes_of(np.frombuffer(make(handles), dtype=f"u{unit}").byteswap())


def _rows(ref: TensorRef, size: int) -> Iterator[TensorRef]:
    """A computed tensor in parts along its first dimension, where its kernel can make them; else the whole."""
    count = ref.shape[0] if ref.shape else 0
    step = max(1, size // max(1, ref.nbytes // max(1, count)))
    if step >= count or ref.rows(0, step) is None:
        return iter((ref,))
    made = [ref.rows(begin, min(begin + step, count)) for begin in range(0, count, step)]
    some = [part for part in made if part is not None]
    return iter(some if len(some) == len(made) else (ref,))


def _computed(ref: TensorRef, handles: Handles) -> memoryview:
    assert isinstance(ref.source, Apply)
    return values.to_bytes(ref.source.kernel.run([_tensor(part) for part in ref.source.inputs]), ref.spec)


def _tensor(ref: TensorRef) -> torch.Tensor:
    """The values of an input; those of an initialiser as they are, without a copy."""
    source = ref.source
    return source.init.make(ref.spec, source.seed) if isinstance(source, Fill) else ref.read()


def holds(ref: TensorRef) -> int:
    """The bytes that making a tensor holds at once beside its blocks: 0 for all that can be done piece by piece."""
    source = ref.source
    if isinstance(source, Fill):
        return source.init.holds
    if isinstance(source, Pieces):
        return max(map(holds, source.parts), default=0)
    if not isinstance(source, Apply):
        return 0
    within = max(map(holds, source.inputs), default=0)
    kernel = source.kernel
    if kernel.moves_only or kernel.views or (kernel.elementwise and len(source.inputs) == 1):
        return within
    last = ref.shape[0] if ref.shape else 0
    row = ref.rows(0, 1) if last else None
    if row is not None and ref.rows(last - 1, last) is not None:
        taken = sum(part.nbytes for part in row.source.inputs) if isinstance(row.source, Apply) else 0
        return within + (row.nbytes + taken if row.nbytes > BLOCK else 0)  # a row may be large itself
    return within + ref.nbytes + sum(part.nbytes for part in source.inputs)


def _stretches(extent: Extent, spec: TensorSpec, size: int) -> Iterator[Piece]:
    """The elements in order, contiguous, in the byte order of the file."""
    if extent.strides is None:
        yield from _contiguous(extent, size)
        return
    item = spec.dtype.itemsize
    cuts = gather.cuts(spec.shape, extent.strides, item, size)
    if extent.codec is None:
        for cut in cuts:
            yield Piece(cut.numel * item, partial(_gathered, extent, cut, item, size))
        return
    whole = _Inflated(extent, size)
    for cut in cuts:
        yield Piece(cut.numel * item, partial(whole.gathered, cut, item))


def _gathered(extent: Extent, cut: gather.Cut, item: int, size: int, handles: Handles) -> memoryview:
    descriptor = handles.descriptor(extent.file)
    return gather.gathered(descriptor, extent.path, extent.offset, cut, item, size)


class _Inflated:
    """What a strided tensor spans of a compressed member, inflated once and held as long as its pieces are made; the
    writer puts such members on the disk first."""

    def __init__(self, extent: Extent, size: int) -> None:
        most = current().inflated_view
        if extent.nbytes > most:
            cause = f"a tensor that does not lie in order in {extent.nbytes} bytes of a compressed record"
            raise LimitError(cause, "inflated_view", most, path=extent.path)
        self.extent, self.size = extent, size
        self._lock = threading.Lock()
        self._data: bytearray | None = None

    def gathered(self, cut: gather.Cut, item: int, handles: Handles) -> memoryview:
        """The elements of a cut."""
        import numpy as np

        with self._lock:
            if self._data is None:
                self._data = self._inflated(handles)
        shape, strides = [count for count, _ in cut.dims], [stride * item for _, stride in cut.dims]
        view = np.ndarray(shape, f"V{item}", self._data, cut.offset * item, strides)
        return values.bytes_of(np.ascontiguousarray(view))

    def _inflated(self, handles: Handles) -> bytearray:
        data, at = bytearray(self.extent.nbytes), 0
        for piece in _contiguous(replace(self.extent, strides=None), self.size):
            data[at : at + piece.nbytes] = piece.make(handles)
            at += piece.nbytes
        return data


def _contiguous(extent: Extent, size: int) -> Iterator[Piece]:
    step = max(16, size - size % 16)
    inflating = None if extent.codec is None else Inflating(extent.file, extent.codec, step)
    for start in range(0, extent.nbytes, step):
        count = min(step, extent.nbytes - start)
        if inflating is None:
            yield Piece(count, partial(_read, extent, start, count))
        else:
            ends = extent.is_whole and start + count == extent.nbytes
            yield Piece(count, partial(_next, inflating, 0 if start else extent.offset, count, ends))


def _read(extent: Extent, start: int, count: int, handles: Handles) -> memoryview:
    descriptor = handles.descriptor(extent.file)
    return memoryview(read_exactly(descriptor, count, extent.offset + start, extent.path))


def _next(inflating: Inflating, skipped: int, count: int, ends: bool, handles: Handles) -> memoryview:
    inflating.skip(handles, skipped)
    block = inflating.read(handles, count)
    if ends:
        inflating.finish(handles)
    return memoryview(block)


def _proven(extent: Extent, spec: TensorSpec, size: int) -> Iterator[Piece]:
    return _checked(extent, _stretches(extent, spec, size))


def _checked(extent: Extent, found: Iterator[Piece]) -> Iterator[Piece]:
    """The same bytes, held against the checksum of their record when they are all of it."""
    record = extent.record
    if record is None or record.crc is None or not extent.is_whole:
        yield from found
        return
    from ckptsurgeon.checksum import crc32

    crc, left = 0, extent.nbytes

    def checked(make: Callable[[Handles], memoryview], handles: Handles) -> memoryview:
        nonlocal crc, left
        block = make(handles)
        crc, left = crc32(block, crc), left - len(block)
        if not left and crc != record.crc:
            raise damaged(extent)
        return block

    for piece in found:
        yield Piece(piece.nbytes, partial(checked, piece.make))


def damaged(extent: Extent) -> InputError:
    """The error of a record that does not have its checksum."""
    assert extent.record is not None
    return InputError(f"the record {extent.record.name} does not have its checksum: it is damaged", path=extent.path)


def check_record(extent: Extent) -> None:
    """Read the whole record that an extent is a part of; InputError when it is damaged."""
    record = extent.record
    if record is not None and record.crc is not None:
        read_through(replace(extent, offset=record.offset, nbytes=record.nbytes, strides=None))


def read_through(extent: Extent) -> None:
    """Read the bytes from the first to the last, and forget them; InputError when they cannot be
    read, or are a whole record that does not have its checksum."""
    for _ in whole(extent, BLOCK):
        pass


def whole(extent: Extent, size: int) -> Iterator[memoryview]:
    """The bytes from the first to the last as they lie in the file, in blocks of about `size`; InputError
    when they cannot be read, or are a whole record that does not have its checksum."""
    with Handles() as handles:
        for piece in _checked(extent, _contiguous(extent, size)):
            yield piece.make(handles)

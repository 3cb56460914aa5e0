"""From a source to bytes: the one place where tensors are read or computed.

It stands below `tensor`, because `TensorRef.read` and the streaming writer share it.  numpy and
torch are imported inside the functions that need them: plain copies need neither.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import InputError
from ckptsurgeon.limits import BLOCK
from ckptsurgeon.sources import Absent, Apply, Deflate, Extent, Fill, Inline, Pieces, contiguous_strides, span

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.tensor import TensorRef, TensorSpec

ABSENT_HINT = "save it dense in torch, or drop it"


def blocks(ref: TensorRef, size: int) -> Iterator[memoryview]:
    """The contiguous little-endian bytes of `ref`, in order, in blocks of about `size` bytes."""
    source = ref.source
    if isinstance(source, Absent):
        raise InputError(f"is {source.form}: the file does not hold its bytes", hint=ABSENT_HINT)
    if ref.nbytes == 0:
        return
    if isinstance(source, Extent):
        yield from _extent(source, ref.spec, size)
    elif isinstance(source, Inline):
        yield memoryview(source.data)
    elif isinstance(source, Pieces):
        for part in source.parts:
            yield from blocks(part, size)
    elif isinstance(source, Fill):
        yield _to_bytes(source.init.make(ref.spec, source.seed), ref.spec)
    elif source.kernel.moves_only:
        yield from blocks(source.inputs[0], size)
    elif source.kernel.elementwise and len(source.inputs) == 1:
        yield from _elementwise(source, size)
    else:
        made = source.kernel.run([part.read() for part in source.inputs])
        yield _to_bytes(made, ref.spec)


def _elementwise(source: Apply, size: int) -> Iterator[memoryview]:
    (ref,) = source.inputs
    for block in blocks(ref, size):
        flat = _frombuffer(block, ref.spec.dtype.name)
        yield _raw(source.kernel.run([flat]))


def _frombuffer(data: memoryview | bytearray, dtype: str) -> torch.Tensor:
    import torch

    buffer = bytearray(data) if isinstance(data, memoryview) and data.readonly else data
    if dtype == "float4_e2m1":
        dtype = "float4_e2m1fn_x2"
    element = getattr(torch, dtype, None)
    if element is None:
        raise InputError(f"torch {torch.__version__} has no dtype {dtype}")
    return torch.frombuffer(buffer, dtype=torch.uint8).view(element)


def to_torch(data: bytearray | memoryview, spec: TensorSpec) -> torch.Tensor:
    """Contiguous little-endian bytes as a tensor; the 4-bit type comes as torch packs it, two in one."""
    import torch

    if not data:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype.name))
    flat = _frombuffer(data, spec.dtype.name)
    if spec.dtype.name == "float4_e2m1":
        return flat.reshape(*spec.shape[:-1], spec.shape[-1] // 2)
    return flat.reshape(spec.shape)


def quantized(ref: TensorRef) -> torch.Tensor:
    """The values of a quantised tensor, as torch's own kind of it."""
    import torch

    found: Any = ref.quantizer
    dtype = getattr(torch, ref.dtype.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to replace this kind, and files have it
        if found.axis is None:
            made = torch._empty_affine_quantized(ref.shape, scale=found.scale, zero_point=found.zero_point, dtype=dtype)
        else:
            made = torch._empty_per_channel_affine_quantized(
                ref.shape, scales=found.scale.read(), zero_points=found.zero_point.read(), axis=found.axis, dtype=dtype
            )
        data = bytearray().join(blocks(ref, BLOCK))
        if data:
            made.untyped_storage().copy_(torch.frombuffer(data, dtype=torch.uint8).untyped_storage())
    return made


def _raw(tensor: torch.Tensor) -> memoryview:
    import torch

    if tensor.is_quantized:
        tensor = tensor.int_repr()
    dense = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # of one element, `contiguous` keeps any stride
    return _bytes_of(flat.view(torch.uint8).numpy())


def _bytes_of(array: Any) -> memoryview:
    return memoryview(array).cast("B")


def _to_bytes(tensor: torch.Tensor, spec: TensorSpec) -> memoryview:
    data = _raw(tensor)
    if data.nbytes != spec.nbytes:
        raise AssertionError(f"a kernel made {data.nbytes} bytes where the plan has {spec.nbytes} ({spec})")
    return data


def read_exactly(descriptor: int, nbytes: int, offset: int, path: str) -> bytearray:
    """`nbytes` from `offset` of a file; InputError when it ends before."""
    buffer = bytearray(nbytes)
    _read_into(descriptor, memoryview(buffer), offset, path)
    return buffer


def _read_into(descriptor: int, view: memoryview, offset: int, path: str) -> None:
    done, nbytes = 0, len(view)
    while done < nbytes:
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", path=path) from error
        if not got:
            raise InputError(f"ends at byte {offset + done}, {nbytes - done} bytes too early", path=path)
        done += got


def _extent(extent: Extent, spec: TensorSpec, size: int) -> Iterator[memoryview]:
    descriptor = extent.file.open()
    try:
        unit = spec.dtype.swap_unit if extent.byteorder == "big" else 1
        for block in _checked(_ordered(descriptor, extent, spec, size), extent):
            yield _swapped(block, unit) if unit > 1 else block
    finally:
        os.close(descriptor)


def _checked(parts: Iterator[memoryview], extent: Extent) -> Iterator[memoryview]:
    """The same bytes, held against the checksum of their record when they are all of it.

    What was yielded before the last byte is not yet proven: a writer publishes nothing until the end.
    """
    record = extent.record
    if record is None or record.crc is None or not extent.is_whole:
        yield from parts
        return
    crc = 0
    for block in parts:
        crc = zlib.crc32(block, crc)
        yield block
    if crc != record.crc:
        raise InputError(f"the record {record.name} does not have its checksum: it is damaged", path=extent.path)


def check_record(extent: Extent) -> None:
    """Read the whole record that an extent is a part of; InputError when it is damaged."""
    record = extent.record
    if record is not None and record.crc is not None:
        read_through(replace(extent, offset=record.offset, nbytes=record.nbytes, strides=None))


def read_through(extent: Extent) -> None:
    """Read the bytes from the first to the last, and forget them; InputError when they cannot be
    read, or are a whole record that does not have its checksum."""
    descriptor = extent.file.open()
    try:
        for _ in _checked(_contiguous(descriptor, extent, BLOCK), extent):
            pass
    finally:
        os.close(descriptor)


def _swapped(block: memoryview, unit: int) -> memoryview:
    import numpy as np

    return _bytes_of(np.frombuffer(block, dtype=f"u{unit}").byteswap())


def _ordered(descriptor: int, extent: Extent, spec: TensorSpec, size: int) -> Iterator[memoryview]:
    """The elements in order, contiguous, in the byte order of the file."""
    if extent.strides is None:
        yield from _contiguous(descriptor, extent, size)
    elif extent.codec is not None:
        data = b"".join(_inflated(descriptor, extent, extent.codec, size))
        yield _gathered(data, spec.shape, extent.strides, spec.dtype.itemsize)
    else:
        yield from _strided(descriptor, extent, spec, size)


def _contiguous(descriptor: int, extent: Extent, size: int) -> Iterator[memoryview]:
    if extent.codec is not None:
        yield from _whole_elements(_inflated(descriptor, extent, extent.codec, size))
        return
    step = max(16, size - size % 16)
    for start in range(0, extent.nbytes, step):
        count = min(step, extent.nbytes - start)
        yield memoryview(read_exactly(descriptor, count, extent.offset + start, extent.path))


def _whole_elements(parts: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes, cut where elements of every size end: a decompressor stops anywhere."""
    rest = b""
    for part in parts:
        data = rest + bytes(part) if rest else part
        cut = len(data) - len(data) % 16
        rest = bytes(data[cut:])
        if cut:
            yield memoryview(data)[:cut]
    if rest:
        yield memoryview(rest)


def _inflated(descriptor: int, extent: Extent, codec: Deflate, size: int) -> Iterator[memoryview]:
    """The extent's bytes out of a compressed member, block by block and no further than needed."""
    inflate, skip, wanted = zlib.decompressobj(-15), extent.offset, extent.nbytes
    at, left = codec.start, codec.nbytes
    while wanted:
        if inflate.unconsumed_tail:
            packed: bytes | bytearray = inflate.unconsumed_tail
        elif left:
            count = min(left, size)
            packed = read_exactly(descriptor, count, at, extent.path)
            at, left = at + count, left - count
        else:
            packed = b""  # all is taken in, and more may come out
        try:
            data = inflate.decompress(packed, min(size, skip + wanted))
        except zlib.error as error:
            raise InputError(f"a compressed record is damaged ({error})", path=extent.path) from error
        if not data and not packed:
            raise InputError("a compressed record is shorter than the archive says", path=extent.path)
        skipped = min(skip, len(data))
        skip, wanted = skip - skipped, wanted - (len(data) - skipped)
        if len(data) > skipped:
            yield memoryview(data)[skipped:]


def _strided(descriptor: int, extent: Extent, spec: TensorSpec, size: int) -> Iterator[memoryview]:
    """Strided elements, gathered in output order without holding more than a few blocks.

    The output is cut along its first dimension that is longer than 1; each cut reads its span of
    the file in pieces along the input's slowest dimension.
    """
    shape, strides = spec.shape, extent.strides or contiguous_strides(spec.shape)
    item = spec.dtype.itemsize
    lead = next((i for i, n in enumerate(shape) if n > 1), 0)
    if not shape or shape[lead] == 1:
        yield memoryview(read_exactly(descriptor, item, extent.offset, extent.path))
        return
    row = spec.nbytes // shape[lead]
    scattered = span(shape, strides) * item > 4 * size and strides[lead] != max(strides)
    step = max(1, (4 * size if scattered else size) // row)
    for start in range(0, shape[lead], step):
        count = min(step, shape[lead] - start)
        part = (*shape[:lead], count, *shape[lead + 1 :])
        offset = extent.offset + start * strides[lead] * item
        yield _gather(descriptor, extent.path, offset, part, strides, item, size)


def _gather(
    descriptor: int, path: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], item: int, size: int
) -> memoryview:
    """One cut of the output: read whole when its span is small, else slice by slice of its slowest dimension."""
    import numpy as np

    whole = span(shape, strides) * item
    slow = max(range(len(shape)), key=lambda i: strides[i] if shape[i] > 1 else -1)
    if whole <= 4 * size or strides[slow] == 0:
        return _gathered(read_exactly(descriptor, whole, offset, path), shape, strides, item)
    inner = tuple(1 if i == slow else n for i, n in enumerate(shape))
    used = span(inner, strides)
    if used * shape[slow] * item <= 8 * size and used < strides[slow]:
        return _packed(descriptor, path, offset, shape, strides, item, slow, used)
    out = np.empty(shape, dtype=f"V{item}")
    step = max(1, (4 * size - span(inner, strides) * item) // (strides[slow] * item))
    for start in range(0, shape[slow], step):
        count = min(step, shape[slow] - start)
        part = tuple(count if i == slow else n for i, n in enumerate(shape))
        data = read_exactly(descriptor, span(part, strides) * item, offset + start * strides[slow] * item, path)
        at = tuple(slice(start, start + count) if i == slow else slice(None) for i in range(len(shape)))
        out[at] = np.frombuffer(_gathered(data, part, strides, item), dtype=f"V{item}").reshape(part)
    return _bytes_of(out.view(np.uint8))


def _packed(
    descriptor: int,
    path: str,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    item: int,
    slow: int,
    used: int,
) -> memoryview:
    """A cut whose elements lie in short runs far apart: only the runs (of `used` elements) are read."""
    data = bytearray(used * shape[slow] * item)
    view, length, gap = memoryview(data), used * item, strides[slow] * item
    for index in range(shape[slow]):
        _read_into(descriptor, view[index * length : (index + 1) * length], offset + index * gap, path)
    return _gathered(data, shape, tuple(used if i == slow else s for i, s in enumerate(strides)), item)


def _gathered(data: bytes | bytearray, shape: Sequence[int], strides: Sequence[int], item: int) -> memoryview:
    import numpy as np

    view = np.ndarray(tuple(shape), dtype=f"V{item}", buffer=data, strides=tuple(s * item for s in strides))
    return _bytes_of(np.ascontiguousarray(view).view(np.uint8))

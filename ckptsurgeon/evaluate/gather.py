"""Strided elements of a file, gathered in output order without holding more than a few blocks.

The output is cut along its slowest dimensions.  Each cut reads the span of the file that it lies
in: whole where that is small, in stretches along the input's slowest dimension where little lies
between, and else only the runs that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptsurgeon.errors import InputError
from ckptsurgeon.evaluate.reading import read_exactly, read_into
from ckptsurgeon.evaluate.values import bytes_of
from ckptsurgeon.sources import span

_CALL = 8192
"""Bytes that are read in the time of one more system call: smaller gaps are read along."""
_TILE = 128
"""Rows and columns that are turned at a time: both sides of a tile stay in the cache."""
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}

Dims = tuple[tuple[int, int], ...]
"""Size and stride (in elements) of each dimension."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A stretch of the output: the elements of `dims` from the element `offset` on."""

    offset: int
    dims: Dims

    @property
    def numel(self) -> int:
        return prod(size for size, _ in self.dims)


def cuts(shape: Sequence[int], strides: Sequence[int], item: int, size: int) -> Iterator[Cut]:
    """The output in order, in cuts of about `size` bytes, of elements of `item` bytes.

    Where the fastest dimension of the file is not the output's last one, cuts are twice as large: then each
    row of the file gives one run to a cut, and short runs cost a system call each.
    """
    dims = _merged(shape, strides)
    if dims and min(stride for _, stride in dims) != dims[-1][1]:
        size *= 2
    yield from _cut(0, dims, item, size)


def cost(shape: Sequence[int], strides: Sequence[int], item: int) -> int:
    """About how many bytes are read for the elements, the time of a system call counted as `_CALL` of them."""
    read, runs = item, 1
    for size, stride in sorted(_merged(shape, strides), key=lambda dim: dim[1]):
        gap = stride * item
        if runs > 1 or gap - read > _CALL:
            runs *= size
        elif gap:
            read += (size - 1) * gap
    return read if runs == 1 else runs * (read + _CALL)


def _merged(shape: Sequence[int], strides: Sequence[int]) -> Dims:
    """Without dimensions of size 1; neighbours that lie in one row are one dimension."""
    made: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if made and made[-1][1] == size * stride:
            made[-1] = (made[-1][0] * size, stride)
        else:
            made.append((size, stride))
    return tuple(made)


def _cut(offset: int, dims: Dims, item: int, size: int) -> Iterator[Cut]:
    if prod(count for count, _ in dims) * item <= size or not dims:
        yield Cut(offset, dims)
        return
    (count, stride), inner = dims[0], dims[1:]
    row = prod(count for count, _ in inner) * item
    if row > size:
        for index in range(count):
            yield from _cut(offset + index * stride, inner, item, size)
        return
    step = size // row
    for start in range(0, count, step):
        yield Cut(offset + start * stride, ((min(step, count - start), stride), *inner))


def gathered(descriptor: int, path: str, start: int, cut: Cut, item: int, size: int) -> memoryview:
    """The elements of a cut, contiguous; `start` is the byte of the tensor's first element."""
    import numpy as np

    if item not in _WORDS:
        raise InputError(f"elements of {item} bytes cannot be gathered", path=path)
    out = np.empty([count for count, _ in cut.dims], dtype=_WORDS[item])
    _collect(descriptor, path, start + cut.offset * item, cut.dims, size, out)
    return bytes_of(out)


def _collect(descriptor: int, path: str, at: int, dims: Dims, size: int, out: Any) -> None:
    """Fill `out`, of the sizes of `dims`, reading at most about `size` bytes at a time."""
    item = out.dtype.itemsize
    whole = _span(dims) * item
    slow = max(range(len(dims)), key=lambda i: dims[i][1], default=0)
    if whole <= size and (not dims or whole <= max(_CALL, 4 * prod(out.shape) * item)):
        _put(out, read_exactly(descriptor, whole, at, path), dims)
        return
    count, stride = dims[slow]
    inner = tuple(dim for i, dim in enumerate(dims) if i != slow)
    used, gap = _span(inner) * item, stride * item
    if gap == 0:  # one row, over and over
        _collect(descriptor, path, at, inner, size, out[_at(slow, 0, 1)].squeeze(slow))
        out[...] = out[_at(slow, 0, 1)]
    elif gap - used <= _CALL and gap + used <= size:
        step = max(1, (size - used) // gap)
        for first in range(0, count, step):
            taken = min(step, count - first)
            part = tuple((taken, stride) if i == slow else dim for i, dim in enumerate(dims))
            data = read_exactly(descriptor, _span(part) * item, at + first * gap, path)
            _put(out[_at(slow, first, taken)], data, part)
    elif used <= size // 2:
        step = max(1, size // used)
        for first in range(0, count, step):
            taken = min(step, count - first)
            runs = _runs(descriptor, path, at + first * gap, taken, used, gap)
            part = tuple((taken, used // item) if i == slow else dim for i, dim in enumerate(dims))
            _put(out[_at(slow, first, taken)], runs, part)
    else:
        for index in range(count):
            _collect(descriptor, path, at + index * gap, inner, size, out[_at(slow, index, 1)].squeeze(slow))


def _span(dims: Dims) -> int:
    return span(tuple(count for count, _ in dims), tuple(stride for _, stride in dims))


def _at(dim: int, first: int, count: int) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(first, first + count))


def _runs(descriptor: int, path: str, at: int, count: int, used: int, gap: int) -> bytearray:
    """`count` runs of `used` bytes, `gap` bytes from one to the next, end to end."""
    data = bytearray(used * count)
    view = memoryview(data)
    for index in range(count):
        read_into(descriptor, view[index * used : (index + 1) * used], at + index * gap, path)
    return data


def _put(out: Any, data: bytearray, dims: Dims) -> None:
    """The elements of `dims` out of the bytes that they span."""
    import numpy as np

    item = out.dtype.itemsize
    view = np.ndarray(out.shape, out.dtype, data, strides=[stride * item for _, stride in dims])
    turned(out, view)


def turned(out: Any, view: Any) -> None:
    """`out[...] = view`, tile by tile where the two have other dimensions as their fastest."""
    last = out.ndim - 1
    fast = min(range(out.ndim), key=lambda i: view.strides[i], default=last)
    if fast == last or out.shape[fast] < _TILE or out.shape[last] < _TILE:
        out[...] = view
        return
    for i in range(0, out.shape[fast], _TILE):
        for j in range(0, out.shape[last], _TILE):
            at = tuple(
                slice(i, i + _TILE) if dim == fast else slice(j, j + _TILE) if dim == last else slice(None)
                for dim in range(out.ndim)
            )
            out[at] = view[at]

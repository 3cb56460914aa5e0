"""Free changes of shape: arithmetic on extents, no byte is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, ClassVar

from ckptsurgeon.sources import Apply, Extent, Fill, Inline, Kernel, Pieces, contiguous_strides, is_contiguous, span
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Contiguous(Kernel):
    """Takes a tensor as it is: its only work is to be an output of its own, in order."""

    moves_only: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0].contiguous()


@dataclass(frozen=True, slots=True)
class Permute(Kernel):
    """`torch.permute` where the source is no extent, whose strides could say the same."""

    dims: tuple[int, ...]
    views: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0].permute(self.dims).contiguous()

    def on_extent(self, ref: TensorRef) -> TensorRef:
        return permuted(ref, self.dims)


_SERIAL = count()


def strides_of(ref: TensorRef) -> tuple[int, ...] | None:
    """The strides of a tensor in its file, None where it is computed (and so contiguous)."""
    if not isinstance(ref.source, Extent):
        return None
    return ref.source.strides or contiguous_strides(ref.shape)


def _viewed(ref: TensorRef, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorRef:
    assert isinstance(ref.source, Extent)
    plain = is_contiguous(shape, strides) or 0 in shape
    return TensorRef(TensorSpec(ref.dtype, shape), replace(ref.source, strides=None if plain else strides), ref.stored)


def permuted(ref: TensorRef, dims: tuple[int, ...]) -> TensorRef:
    """The tensor with its dimensions in another order (`dims` not negative)."""
    shape = tuple(ref.shape[dim] for dim in dims)
    strides = strides_of(ref)
    if strides is not None:
        return _viewed(ref, shape, tuple(strides[dim] for dim in dims))
    if dims == tuple(range(len(dims))):
        return ref
    source = ref.source
    if isinstance(source, Apply) and source.kernel.elementwise and source.inputs[0].shape == ref.shape:
        return TensorRef(TensorSpec(ref.dtype, shape), Apply(source.kernel, (permuted(source.inputs[0], dims),)))
    return TensorRef(TensorSpec(ref.dtype, shape), Apply(Permute(dims), (ref,)))


def reshaped(ref: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    """The same elements in the same order as another shape."""
    strides = strides_of(ref)
    if isinstance(ref.source, Fill) or (isinstance(ref.source, Apply) and not ref.source.kernel.elementwise):
        # what is made has a shape of its own
        return TensorRef(TensorSpec(ref.dtype, shape), Apply(Contiguous(), (ref,)))
    if strides is None or is_contiguous(ref.shape, strides) or 0 in shape:
        return TensorRef(TensorSpec(ref.dtype, shape), ref.source, ref.stored)
    moved = _split_ones(ref.shape, strides, shape)
    if moved is not None:
        return _viewed(ref, shape, moved)
    return TensorRef(TensorSpec(ref.dtype, shape), Apply(Contiguous(), (ref,)))


def _split_ones(old: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides when only dimensions of size 1 come or go, else None."""
    kept = [(size, stride) for size, stride in zip(old, strides, strict=True) if size != 1]
    if [size for size, _ in kept] != [size for size in new if size != 1]:
        return None
    left = iter(stride for _, stride in kept)
    return tuple(0 if size == 1 else next(left) for size in new)


def duplicated(ref: TensorRef, name: str) -> TensorRef:
    """The same bytes as an output of their own: no longer tied to `ref`."""
    return TensorRef(ref.spec, Apply(Duplicate(name, next(_SERIAL)), (ref,)))


@dataclass(frozen=True, slots=True)
class Duplicate(Kernel):
    """A copy under a name; its number keeps two copies of one tensor apart."""

    name: str
    serial: int
    moves_only: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0]


Range = tuple[int, int, int]
"""The first index of a dimension, how many there are, and the step from one to the next (at least 1)."""


@dataclass(frozen=True, slots=True)
class Slice(Kernel):
    """A part of each dimension of a tensor that is computed."""

    ranges: tuple[Range, ...]
    moves: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0][tuple(slice(at, at + size * step, step) for at, size, step in self.ranges)].contiguous()

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        first, _, step = self.ranges[0]
        if step != 1 or first:  # `run` takes the same ranges of what it gets
            return None
        part = inputs[0].rows(begin, end)
        return None if part is None else (part,)


@dataclass(frozen=True, slots=True)
class Concat(Kernel):
    """`torch.cat` along another dimension than the first."""

    dim: int
    moves: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.cat(list(inputs), self.dim)

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        parts = [ref.rows(begin, end) for ref in inputs]
        made = tuple(part for part in parts if part is not None)
        return made if len(made) == len(parts) else None


def sliced(ref: TensorRef, ranges: tuple[Range, ...]) -> TensorRef:
    """A part of a tensor: one range for each dimension."""
    spec = TensorSpec(ref.dtype, tuple(size for _, size, _ in ranges))
    if spec.shape == ref.shape:
        return ref
    if 0 in spec.shape:
        return TensorRef(spec, Inline(b""))
    source = ref.source
    if isinstance(source, Extent):
        return _sliced_extent(ref, source, spec, ranges)
    if isinstance(source, Apply) and source.kernel.elementwise and source.inputs[0].shape == ref.shape:
        return TensorRef(spec, Apply(source.kernel, (sliced(source.inputs[0], ranges),)))
    first, count, step = ranges[0]
    if step == 1 and spec.shape[1:] == ref.shape[1:] and (rows := ref.rows(first, first + count)) is not None:
        return rows
    if isinstance(source, Pieces) and _are_rows(ref, source) and spec.shape[0] == ref.shape[0]:
        parts = tuple(sliced(part, ((0, part.shape[0], 1), *ranges[1:])) for part in source.parts)
        return TensorRef(spec, Pieces(parts))
    return TensorRef(spec, Apply(Slice(ranges), (ref,)))


def _are_rows(ref: TensorRef, source: Pieces) -> bool:
    """Whether the parts are rows of the whole."""
    return source.rows is not None and source.rows[1] == ref.shape[1:]


def _sliced_extent(ref: TensorRef, extent: Extent, spec: TensorSpec, ranges: tuple[Range, ...]) -> TensorRef:
    item = ref.dtype.itemsize
    strides = strides_of(ref)
    assert strides is not None
    first = sum(at * stride for (at, _, _), stride in zip(ranges, strides, strict=True))
    steps = tuple(step * stride for (_, _, step), stride in zip(ranges, strides, strict=True))
    part = replace(extent, offset=extent.offset + first * item, nbytes=span(spec.shape, steps) * item)
    plain = is_contiguous(spec.shape, steps)
    return TensorRef(spec, replace(part, strides=None if plain else steps), ref.stored)


def joined(refs: Sequence[TensorRef], dim: int, spec: TensorSpec) -> TensorRef:
    """Tensors end to end along a dimension; of its leading ones only sizes of 1 may lie before it."""
    if len(refs) == 1:
        return refs[0]
    if all(size == 1 for size in spec.shape[:dim]):
        parts: list[TensorRef] = []
        for ref in refs:
            parts += ref.source.parts if isinstance(ref.source, Pieces) else (ref,)
        return TensorRef(spec, Pieces(tuple(parts)))
    return TensorRef(spec, Apply(Concat(dim), tuple(refs)))


_MOST_RUNS = 4096


@dataclass(frozen=True, slots=True)
class Take(Kernel):
    """`torch.index_select`: indices of one dimension, in any order."""

    dim: int
    indices: tuple[int, ...]
    moves: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return inputs[0].index_select(self.dim, torch.tensor(self.indices, dtype=torch.int64))

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        part = inputs[0].rows(begin, end) if self.dim else None
        return None if part is None else (part,)


def taken(ref: TensorRef, dim: int, indices: Sequence[int]) -> TensorRef:
    """The entries of a dimension at `indices`; runs of neighbours along the first are arithmetic on extents."""
    shape = (*ref.shape[:dim], len(indices), *ref.shape[dim + 1 :])
    runs = _runs(indices)
    whole = tuple((0, size, 1) for size in ref.shape)
    if len(runs) == 1:
        return sliced(ref, (*whole[:dim], (*runs[0], 1), *whole[dim + 1 :]))
    spec = TensorSpec(ref.dtype, shape)
    if dim or len(runs) > _MOST_RUNS or not isinstance(ref.source, Extent | Pieces):
        return TensorRef(spec, Apply(Take(dim, tuple(indices)), (ref,)))
    parts = [sliced(ref, ((at, count, 1), *whole[1:])) for at, count in runs]
    return joined(parts, 0, spec)


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of neighbours: the first index and how many there are."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs or [(0, 0)]

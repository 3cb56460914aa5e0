"""Free changes of shape: arithmetic on extents, no byte is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, ClassVar

from ckptsurgeon.sources import Apply, Extent, Fill, Kernel, contiguous_strides, is_contiguous
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

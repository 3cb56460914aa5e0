"""Operations that change values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.dtypes import DType
from ckptsurgeon.ops import _casts
from ckptsurgeon.ops._patterns import matching
from ckptsurgeon.ops._registry import Args, Match, Operation, OperationError, Param, register
from ckptsurgeon.sources import Apply, Kernel
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Cast(Kernel):
    """`Tensor.to(dtype)`, block by block."""

    dtype: DType
    elementwise: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return inputs[0].to(getattr(torch, self.dtype.name))

    def on_bytes(self, data: memoryview, dtype: DType) -> memoryview | None:
        return _casts.cast(data, dtype, self.dtype)


def _castable(args: Args, keys: Sequence[str], target: Target | None) -> Iterable[Match]:
    dtype: DType = args["dtype"]
    if dtype.kind != "float" or dtype.bits < 8:
        raise OperationError(f"cast makes floating dtypes that torch computes; {dtype} is none")
    return matching(args, keys, target)


def _cast_spec(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,), dtype = specs, args["dtype"]
    if spec.dtype.bits < 8:
        raise OperationError(f"torch computes no {spec.dtype}, so it cannot be cast")
    return (TensorSpec(dtype if spec.dtype.kind == "float" else spec.dtype, spec.shape),)


def _cast_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    (ref,), (spec,) = refs, specs
    return (ref if spec.dtype == ref.dtype else TensorRef(spec, Apply(Cast(spec.dtype), (ref,)), ref.stored),)


def _undo(args: Args, specs: tuple[TensorSpec, ...]) -> None:
    return None


register(
    Operation(
        "cast",
        (Param("pattern", "pattern"), Param("dtype", "dtype")),
        "Change the dtype of floating tensors; integers, bool and complex stay as they are.",
        "cast . bf16",
        "lossy",
        _castable,
        _cast_spec,
        _cast_ref,
        _undo,
    )
)

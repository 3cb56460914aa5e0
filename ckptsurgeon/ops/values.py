"""Operations that change values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import InputError
from ckptsurgeon.ops import _casts
from ckptsurgeon.ops._patterns import matching
from ckptsurgeon.ops._registry import Args, Build, Match, Names, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import within
from ckptsurgeon.sources import Apply, Kernel
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Cast(Kernel):
    """`Tensor.to(dtype)`, block by block."""

    dtype: DType
    elementwise: ClassVar[bool] = True

    @property
    def slope(self) -> float:
        return 1.0

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return inputs[0].to(getattr(torch, self.dtype.name))

    def on_bytes(self, data: memoryview, dtype: DType) -> memoryview | None:
        return _casts.cast(data, dtype, self.dtype)


def _castable(args: Args, names: Names, target: Target | None) -> Iterable[Match]:
    dtype: DType = args["dtype"]
    if dtype.kind != "float" or dtype.bits < 8:
        raise OperationError(f"cast makes floating dtypes that torch computes; {dtype} is none")
    return matching(args, names, target)


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


_HOLDS = {
    "float64": ("float32", "float16", "bfloat16"),
    "float32": ("float16", "bfloat16"),
}
"""Which of the usual types a type holds without loss; all of them those of 8 bits."""


def _narrow_again(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]] | None:
    """Back, where nothing was lost: to a wider type, or to the same."""
    have, want = specs[0].dtype, args["dtype"]
    if want.name in _HOLDS and have.name in _HOLDS[want.name]:
        return "cast", {"dtype": have}
    return None


def _undo(args: Args, specs: tuple[TensorSpec, ...]) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Arithmetic(Kernel):
    """`torch.add`, `torch.mul` or `torch.clamp` with numbers, block by block; 8-bit floats by way of float32."""

    name: str
    numbers: tuple[int | float | None, ...]
    elementwise: ClassVar[bool] = True

    @property
    def slope(self) -> float | None:
        """Bounds and what is added move a weight in the same coordinates."""
        return float(self.numbers[0] or 0) if self.name == "mul" else 1.0

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        (tensor,) = inputs
        function = {"add": torch.add, "mul": torch.mul, "clamp": torch.clamp}[self.name]
        if not tensor.is_floating_point():
            return self._whole(tensor, function)
        wide = tensor.float() if tensor.itemsize == 1 else tensor
        made: torch.Tensor = function(wide, *self.numbers)  # type: ignore[operator]
        made = made.to(tensor.dtype)
        seen = made.float() if made.itemsize == 1 else made
        if not seen.isfinite().all() and not seen[wide.isfinite()].isfinite().all():
            raise InputError(f"comes to more than {tensor.dtype} holds", hint="cast it to a wider type first")
        return made

    def _whole(self, tensor: torch.Tensor, function: Any) -> torch.Tensor:
        """Whole numbers: what comes to more than the type holds is an error, no other number."""
        import torch

        about = function(tensor.to(torch.float64), *self.numbers)
        info = torch.iinfo(tensor.dtype)
        if about.numel() and not (info.min <= about.min() and about.max() <= info.max):
            raise InputError(f"comes to more than {tensor.dtype} holds", hint="cast it to a wider type first")
        made: torch.Tensor = function(tensor, *self.numbers)
        return made


_WHOLE = ("int8", "int16", "int32", "int64", "uint8")
"""The whole numbers that torch computes."""


def _numeric(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    named = [name for name in ("number", "min", "max") if args.get(name) is not None]
    if not named:
        raise OperationError("min=X, max=X or both must say the bounds")
    if spec.dtype.bits < 8 or (spec.dtype.kind != "float" and spec.dtype.name not in _WHOLE):
        raise OperationError(f"torch does no such arithmetic on {spec.dtype}")
    for name in named:
        if name == "number" or spec.dtype.kind != "float":  # a bound may lie beyond what a float holds
            within(args[name], spec.dtype, name)
    if len(named) == 2 and args["min"] > args["max"]:
        raise OperationError(f"min={args['min']} is more than max={args['max']}", "min")
    return specs


def _arithmetic(name: str, *numbers: str) -> Build:
    def build(
        args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
    ) -> tuple[TensorRef, ...]:
        kernel = Arithmetic(name, tuple(args.get(number) for number in numbers))
        return (TensorRef(specs[0], Apply(kernel, refs), refs[0].stored),)

    return build


def _unscale(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]] | None:
    if not args["number"] or specs[0].dtype.kind != "float" or abs(args["number"]) < _LEAST:
        return None
    return "scale", {"number": 1 / args["number"]}


_LEAST = 1e-300
"""A factor of which one by it is still a number."""
_PATTERN, _NUMBER = Param("pattern", "pattern"), Param("number", "number")

register(
    Operation(
        "cast",
        (_PATTERN, Param("dtype", "dtype")),
        "Change the dtype of floating tensors; integers, bool and complex stay as they are.",
        "cast . bf16",
        "lossy",
        _castable,
        _cast_spec,
        _cast_ref,
        _narrow_again,
        family="values",
    )
)
register(
    Operation(
        "add",
        (_PATTERN, _NUMBER),
        "Add a number to every element.",
        r"add norm\.weight$ 1",
        "rounded",
        matching,
        _numeric,
        _arithmetic("add", "number"),
        lambda args, specs: ("add", {"number": -args["number"]}),
        family="values",
    )
)
register(
    Operation(
        "scale",
        (_PATTERN, _NUMBER),
        "Multiply every element by a number.",
        r"scale \.alpha$ 0.5",
        "rounded",
        matching,
        _numeric,
        _arithmetic("mul", "number"),
        _unscale,
        family="values",
    )
)
register(
    Operation(
        "clamp",
        (_PATTERN,),
        "Bound every element, as torch.clamp does.",
        r"clamp \.weight$ min=0 where=rank==4,d2==1,d3==1",
        "lossy",
        matching,
        _numeric,
        _arithmetic("clamp", "min", "max"),
        _undo,
        options=(
            Param("min", "number", required=False, help="the least value"),
            Param("max", "number", required=False, help="the greatest value"),
        ),
        family="values",
    )
)

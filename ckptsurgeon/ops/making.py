"""Operations that make values: new tensors, and what is added around old ones.

The values of a new tensor follow from the seed and its name alone, so that they are the same whatever else is made.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.dtypes import DTYPES, DType
from ckptsurgeon.ops._patterns import matching
from ckptsurgeon.ops._registry import Args, Match, Names, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import bounded, divisible, within
from ckptsurgeon.ops._views import joined
from ckptsurgeon.sources import Fill
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

_FAMILY = "new values"
_NUMBERS = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_COUNTS = {
    "zeros": (0,),
    "ones": (0,),
    "eye": (0,),
    "constant": (1,),
    "normal": (0, 1, 2),
    "trunc_normal": (0, 1, 2),
    "uniform": (0, 1, 2),
    "kaiming_uniform": (0,),
    "kaiming_normal": (0,),
    "kaiming_fan_out": (0,),
    "xavier_uniform": (0,),
    "xavier_normal": (0,),
    "orthogonal": (0,),
}
"""How many numbers each scheme takes."""
_WHOLE = ("zeros", "ones", "eye", "constant", "values")
"""The schemes that make whole numbers too."""


@dataclass(frozen=True)
class Initial:
    """A named scheme of initial values and its numbers: `normal:0.02` is of mean 0 and deviation 0.02."""

    scheme: str
    numbers: tuple[int | float, ...] = ()

    @classmethod
    def of(cls, text: str) -> Initial:
        """The scheme that a word names; ValueError with the choices.

        >>> Initial.of("normal:0.02"), Initial.of("0.5")
        (Initial(scheme='normal', numbers=(0.02,)), Initial(scheme='constant', numbers=(0.5,)))
        """
        if _NUMBERS.fullmatch(text):
            return cls("constant", (_number(text),))
        scheme, colon, rest = text.partition(":")
        words = rest.split(",") if colon else []
        numbers = tuple(_number(word) for word in words if _NUMBERS.fullmatch(word))
        if scheme == "values" and numbers and len(numbers) == len(words):
            return cls(scheme, numbers)
        if scheme not in _COUNTS:
            raise ValueError(f"INIT is a number, values:1,2,…, or one of {', '.join(_COUNTS)}, not {text!r}")
        if len(numbers) != len(words) or len(numbers) not in _COUNTS[scheme]:
            counts = " or ".join(map(str, _COUNTS[scheme]))
            raise ValueError(
                f"{scheme} takes {counts} numbers behind a colon, not {rest!r}".replace(" 1 numbers", " 1 number")
            )
        return cls(scheme, numbers).sound()

    def sound(self) -> Initial:
        """The same; ValueError where its numbers make no sense."""
        if self.scheme in ("normal", "trunc_normal") and self.numbers:
            std = _deviation(self.numbers)[1]
            if std < 0 or (self.scheme == "trunc_normal" and not std):
                raise ValueError(f"{self}: a deviation is no less than 0, and that of trunc_normal more")
        if self.scheme == "uniform" and self.numbers and not _bounds(self.numbers)[0] <= _bounds(self.numbers)[1]:
            raise ValueError(f"{self}: the lower bound comes first")
        return self

    def __str__(self) -> str:
        words = ",".join(map(repr, self.numbers))
        return f"{self.scheme}:{words}" if words else self.scheme

    def check(self, spec: TensorSpec) -> None:
        """OperationError where such a tensor cannot be filled by this scheme."""
        if spec.dtype.bits < 8 or spec.dtype.kind in ("quantized", "complex"):
            raise OperationError(f"{spec.dtype} cannot be filled", "dtype")
        if spec.dtype.kind != "float" and self.scheme not in _WHOLE:
            raise OperationError(f"{self.scheme} makes fractions, and {spec.dtype} holds none", "init")
        for number in self.numbers:
            within(number, spec.dtype, "init")
        if self.scheme == "values" and len(self.numbers) != spec.numel:
            raise OperationError(
                f"{len(self.numbers)} values for the {spec.numel} elements of {list(spec.shape)}", "init"
            )
        if self.scheme.startswith(("kaiming", "xavier", "orthogonal")) and len(spec.shape) < 2:
            raise OperationError(f"{self.scheme} needs two dimensions or more, not {list(spec.shape)}", "init")
        if self.scheme == "eye" and len(spec.shape) != 2:
            raise OperationError(f"eye needs two dimensions, not {list(spec.shape)}", "init")


def _number(text: str) -> int | float:
    """A number as it is written: whole ones stay whole, however large; ValueError for one that is not finite."""
    made = int(text) if re.fullmatch(r"-?\d{1,30}", text, re.ASCII) else float(text)
    if not math.isfinite(made):
        raise ValueError(f"{text} is more than a number can be")
    return made


@dataclass(frozen=True)
class Named:
    """The initialiser of one tensor: its values follow from the seed and `name`; it makes `holds` bytes."""

    initial: Initial
    name: str
    holds: int

    def make(self, spec: TensorSpec, seed: int) -> torch.Tensor:
        """The values, computed in float32 where they are floating."""
        import torch

        digest = hashlib.sha256(f"{seed}\n{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        kind = getattr(torch, spec.dtype.name)
        scheme, numbers = self.initial.scheme, self.initial.numbers
        if scheme in ("zeros", "ones", "constant"):
            value = {"zeros": 0, "ones": 1}.get(scheme, numbers[0] if numbers else 0)
            return _exactly([value], spec)[0].expand(spec.shape)
        if scheme == "values":
            return _exactly(list(numbers), spec).reshape(spec.shape)
        if scheme == "eye":
            return torch.eye(*spec.shape).to(kind)
        made = torch.empty(spec.shape)
        if made.numel():
            _draw(scheme, made, numbers, generator)
        return made.to(kind)


def _exactly(numbers: list[int | float], spec: TensorSpec) -> torch.Tensor:
    """Numbers as elements of a type: whole ones never by way of fractions."""
    import torch

    kind = getattr(torch, spec.dtype.name)
    if spec.dtype.kind == "float":
        return torch.tensor([float(number) for number in numbers], dtype=torch.float64).to(kind)
    return torch.tensor([int(number) for number in numbers], dtype=kind)


def _deviation(numbers: tuple[int | float, ...]) -> tuple[float, float]:
    """Mean and deviation: of one number, the deviation."""
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0.0, numbers[0] if numbers else 1.0)


def _bounds(numbers: tuple[int | float, ...]) -> tuple[float, float]:
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    return (-numbers[0], numbers[0]) if numbers else (0.0, 1.0)


def _draw(scheme: str, tensor: torch.Tensor, numbers: tuple[int | float, ...], generator: torch.Generator) -> None:
    """Fill a tensor as torch.nn.init does."""
    from torch.nn import init

    if scheme == "normal":
        init.normal_(tensor, *_deviation(numbers), generator=generator)
    elif scheme == "trunc_normal":
        mean, std = _deviation(numbers or (0.02,))
        init.trunc_normal_(tensor, mean, std, mean - 2 * std, mean + 2 * std, generator=generator)
    elif scheme == "uniform":
        init.uniform_(tensor, *_bounds(numbers), generator=generator)
    elif scheme == "kaiming_uniform":  # as torch's own layers begin
        init.kaiming_uniform_(tensor, math.sqrt(5), generator=generator)
    elif scheme in ("kaiming_normal", "kaiming_fan_out"):
        mode: Any = "fan_out" if scheme == "kaiming_fan_out" else "fan_in"
        init.kaiming_normal_(tensor, mode=mode, nonlinearity="relu", generator=generator)
    elif scheme == "orthogonal":
        init.orthogonal_(tensor, generator=generator)
    else:
        draw = init.xavier_uniform_ if scheme == "xavier_uniform" else init.xavier_normal_
        draw(tensor, generator=generator)


def filled(spec: TensorSpec, initial: Initial, name: str, seed: int) -> TensorRef:
    """A new tensor of these values."""
    return TensorRef(spec, Fill(Named(initial, name, spec.nbytes), seed))


def _key(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    yield Match((), (args["key"],))


def _new(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    dtype: DType = args.get("dtype", DTYPES["float32"])
    spec = TensorSpec(dtype, tuple(args["shape"]))
    args["init"].check(spec)
    if not 0 <= args.get("seed", 0) < 1 << 64:
        raise OperationError(f"a seed is a whole number from 0 to 2**64 - 1, not {args['seed']}", "seed")
    bounded(spec)
    return (spec,)


def _new_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    return (filled(specs[0], args["init"], names[0], args.get("seed", 0)),)


# -- pad ---------------------------------------------------------------------------------------


def _padded(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,), pads = specs, args["spec"]
    divisible(spec)
    if len(pads) > len(spec.shape):
        raise OperationError(f"{len(pads)} pads for the {len(spec.shape)} dimensions of {list(spec.shape)}", "spec")
    pads = (*pads, *[(0, 0)] * (len(spec.shape) - len(pads)))
    made = TensorSpec(spec.dtype, tuple(a + size + b for size, (a, b) in zip(spec.shape, pads, strict=True)))
    Initial("constant", (args.get("value", 0),)).check(TensorSpec(spec.dtype, ()))
    bounded(made)
    return (made,)


def _pad_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    (made,) = refs
    initial = Initial("constant", (args.get("value", 0),))
    for dim, (before, after) in enumerate(args["spec"]):
        shape, parts = made.shape, [made]
        for count, at in ((before, 0), (after, len(parts))):
            if count:
                spec = TensorSpec(made.dtype, (*shape[:dim], count, *shape[dim + 1 :]))
                parts.insert(at if at == 0 else len(parts), filled(spec, initial, "", 0))
        whole = (*shape[:dim], before + shape[dim] + after, *shape[dim + 1 :])
        made = joined(parts, dim, TensorSpec(made.dtype, whole))
    return (made,)


def _unpad(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    sizes = zip(args["spec"], specs[0].shape, strict=False)
    return "slice", {"spec": tuple(slice(before, before + size) for (before, _), size in sizes)}


register(
    Operation(
        "pad",
        (Param("pattern", "pattern"), Param("spec", "pads")),
        "Add entries to dimensions: N at the end of each, or BEFORE:AFTER.",
        r"pad ^embed\.weight$ 64 value=0",
        "exact",
        matching,
        _padded,
        _pad_ref,
        _unpad,
        options=(Param("value", "number", required=False, help="what is added, 0 if not given"),),
        family=_FAMILY,
    )
)
register(
    Operation(
        "fill",
        (Param("key", "key"), Param("shape", "sizes"), Param("init", "init")),
        "Make a new tensor by a named scheme, from the seed and its name; '' is the shape of a scalar.",
        r"fill head.weight 10,768 trunc_normal:0.02",
        "initialisation",
        _key,
        _new,
        _new_ref,
        lambda args, specs: ("drop", {}),
        options=(
            Param("dtype", "dtype", required=False, help="float32 if not given"),
            Param("seed", "int", required=False, help="that of the whole surgery if not given"),
        ),
        family=_FAMILY,
    )
)

"""Operations that fold what training kept apart into one weight: norms of weights, and batch norms.

Sources: torch's `torch._weight_norm`, `torch.nn.utils.spectral_norm` and `torch.nn.utils.fusion`.  What would get a
NaN or an infinity that the weight did not have (a norm or a variance of zero) is an error when it is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.errors import InputError
from ckptsurgeon.ops._kernels import all_rows, finite, widened
from ckptsurgeon.ops._patterns import expanded, found, gathered, scattered
from ckptsurgeon.ops._registry import Args, Match, Matcher, Names, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import dim_of, floating
from ckptsurgeon.sources import Apply, Inline, Kernel
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

_PATTERN = Param("pattern", "pattern")
_PATTERNS = Param("patterns", "pattern", many=True)
_TEMPLATE = Param("template", "template", arrow=True)
_FAMILY = "folding"
_WHOLE = -1
"""The dimension that stands for the norm of the whole tensor, as torch's own kernel has it for `dim=None`."""
_WITHOUT_NORM = "no scale gives a direction to zeros: initialise it anew, or drop it"


def _several(name: str, count: int, what: str, matcher: Matcher) -> Matcher:
    """A matcher for exactly so many patterns or templates."""

    def match(args: Args, names: Names, target: Target | None) -> Iterable[Match]:
        if len(args[name]) != count:
            raise OperationError(f"{count} {name} are for {what}, not {len(args[name])}", name)
        return matcher(args, names, target)

    return match


# -- weight norm -------------------------------------------------------------------------------


def _norm(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The norm over all dimensions but one, which stay as dimensions of size 1; summed in float64."""
    import torch

    wide = tensor.to(torch.float64)
    others = tuple(other for other in range(tensor.ndim) if other != dim)
    if not others:  # which torch takes for all of them
        return wide.abs()
    made: torch.Tensor = torch.linalg.vector_norm(wide, dim=others, keepdim=dim != _WHOLE)
    return made


@dataclass(frozen=True, slots=True)
class WeightNorm(Kernel):
    """`g v / ‖v‖`, the norm over all dimensions but `dim`."""

    dim: int

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        magnitude, direction = inputs
        norm = _norm(direction, self.dim)
        made = (widened(direction) * (widened(magnitude) / norm.to(widened(direction).dtype))).to(direction.dtype)
        return finite(made, direction, f"the least norm of the direction is {float(norm.min()):g}", _WITHOUT_NORM)

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        return None if self.dim else all_rows(inputs, begin, end)


@dataclass(frozen=True, slots=True)
class Norm(Kernel):
    """The norm over all dimensions but `dim`, as the magnitude of a weight norm."""

    dim: int

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        (weight,) = inputs
        norm = _norm(weight, self.dim)
        zeros = int((norm == 0).sum())
        if zeros:
            raise InputError(f"has {zeros} norms of {norm.numel()} that are zero", hint=_WITHOUT_NORM)
        return finite(norm.to(weight.dtype), norm, f"the largest is {float(norm.max()):g}", "cast it to a wider dtype")

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        return None if self.dim else all_rows(inputs, begin, end)


def _norm_shape(dim: int, spec: TensorSpec) -> tuple[int, ...]:
    """The shape of the magnitudes."""
    if dim == _WHOLE:
        return ()
    if dim < 0 or not spec.shape:
        raise OperationError(f"dim is from 0 on, or {_WHOLE} for the norm of the whole tensor, not {dim}", "dim")
    dim = dim_of(dim, len(spec.shape), spec.shape)
    return tuple(size if at == dim else 1 for at, size in enumerate(spec.shape))


def _fitting_dim(spec: TensorSpec, shape: tuple[int, ...]) -> str:
    fits = [dim for dim in (_WHOLE, *range(len(spec.shape))) if _norm_shape(dim, spec) == shape]
    return f"; dim={fits[0]} fits" if fits else ""


def _fold_weight_norm(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    magnitude, direction = specs
    for spec in specs:
        floating(spec, "fold_weight_norm")
    wanted = _norm_shape(args.get("dim", 0), direction)
    if magnitude.shape != wanted:
        raise OperationError(
            f"the magnitude of a direction of {list(direction.shape)} is {list(wanted)}, not {list(magnitude.shape)}"
            f"{_fitting_dim(direction, magnitude.shape)}"
        )
    return (direction,)


def _fold_weight_norm_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    return (TensorRef(specs[0], Apply(WeightNorm(args.get("dim", 0)), refs), refs[1].stored),)


def _weight_norm(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    floating(spec, "weight_norm")
    return TensorSpec(spec.dtype, _norm_shape(args.get("dim", 0), spec)), spec


def _weight_norm_refs(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    return TensorRef(specs[0], Apply(Norm(args.get("dim", 0)), refs)), refs[0]


# -- spectral norm -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpectralNorm(Kernel):
    """`W / (u W v)`, where W is taken as a matrix with `dim` as its rows; the product is summed in float64."""

    dim: int

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        weight, left, right = inputs
        matrix = weight.to(torch.float64).movedim(self.dim, 0).flatten(1)
        sigma = left.to(torch.float64) @ matrix @ right.to(torch.float64)
        made = (widened(weight) / sigma.to(widened(weight).dtype)).to(weight.dtype)
        return finite(made, weight, f"the spectral norm is {float(sigma):g}", "check its vectors u and v")


def _fold_spectral_norm(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    weight, left, right = specs
    for spec in specs:
        floating(spec, "fold_spectral_norm")
    if len(weight.shape) < 2:
        raise OperationError(f"the weight needs two dimensions or more, not {list(weight.shape)}")
    dim = dim_of(args.get("dim", 0), len(weight.shape), weight.shape)
    have = (left.shape, right.shape)
    if have != _vectors(weight, dim):
        fits = [other for other in range(len(weight.shape)) if _vectors(weight, other) == have]
        hint = f"; dim={fits[0]} fits" if fits else ""
        (u,), (v,) = _vectors(weight, dim)
        raise OperationError(
            f"the vectors of a weight of {list(weight.shape)} with dim={dim} are [{u}] and [{v}], not "
            f"{list(left.shape)} and {list(right.shape)}{hint}"
        )
    return (weight,)


def _vectors(weight: TensorSpec, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of u and v."""
    return (weight.shape[dim],), (prod(weight.shape[:dim] + weight.shape[dim + 1 :]),)


def _fold_spectral_norm_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    dim = dim_of(args.get("dim", 0), len(specs[0].shape), specs[0].shape)
    return (TensorRef(specs[0], Apply(SpectralNorm(dim), refs), refs[0].stored),)


# -- batch norm --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchNormWeight(Kernel):
    """A weight times `gamma / sqrt(variance + eps)` of its outputs, which are along `dim` (in `groups` of rows where
    that is 1)."""

    eps: float
    dim: int
    groups: int

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        weight, variance = inputs[:2]
        wide = widened(weight)
        scale = _rsqrt(variance, self.eps, wide.dtype)
        if len(inputs) > 2:
            scale = inputs[2].to(wide.dtype) * scale
        if self.dim:
            grouped = wide.reshape(self.groups, -1, *wide.shape[1:])
            made = (grouped * scale.reshape(self.groups, 1, -1, *[1] * (wide.ndim - 2))).reshape(wide.shape)
        else:
            made = wide * scale.reshape(-1, *[1] * (wide.ndim - 1))
        return finite(made.to(weight.dtype), weight, *_cause(variance, self.eps))

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        if not self.dim:
            return all_rows(inputs, begin, end)
        part = inputs[0].rows(begin, end)
        return None if part is None or self.groups > 1 else (part, *inputs[1:])


@dataclass(frozen=True, slots=True)
class BatchNormBias(Kernel):
    """`(bias - mean) / sqrt(variance + eps) · gamma + beta`: the bias of such a weight.

    The inputs are an empty tensor of the dtype that is made, mean and variance; the old bias where there is one
    (`biased`); gamma and beta where there are such.
    """

    eps: float
    biased: bool

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        empty, mean, variance, *rest = inputs
        wide = widened(empty).dtype
        old = rest.pop(0) if self.biased else None
        made = -mean.to(wide) if old is None else old.to(wide) - mean.to(wide)
        made = made * _rsqrt(variance, self.eps, wide)
        if rest:
            made = made * rest[0].to(wide) + rest[1].to(wide)
        return finite(made.to(empty.dtype), old, *_cause(variance, self.eps))

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        made = all_rows(inputs[1:], begin, end)
        return None if made is None else (inputs[0], *made)


def _rsqrt(variance: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    return (variance.to(dtype) + eps).rsqrt()


def _cause(variance: torch.Tensor, eps: float) -> tuple[str, str]:
    """What may be wrong with a fold, and what to do."""
    least = float(widened(variance).min()) if variance.numel() else 0.0
    text = f"its batch norm divides by the square root of the variance, which is {least:g} or more, plus eps={eps:g}"
    return text, "eps=X is that of the batch norm"


def _norms(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    """Every module with a weight that the pattern finds, and for which the template names a batch norm."""
    pattern = args["pattern"]
    modules = {key.removesuffix(".weight"): ref for key, ref in names.items() if key.endswith(".weight")}
    for module, _ in found(args, modules):
        norm = expanded(pattern, args["template"], module, 1)
        if norm == module or f"{norm}.running_var" not in names:
            continue
        yield _norm_match(module, norm, names)


def _norm_match(module: str, norm: str, names: Names) -> Match:
    weight, bias = f"{module}.weight", f"{module}.bias"
    outputs = (weight, bias)
    if f"{norm}.running_mean" not in names:
        return Match((weight,), outputs, problem=f"{norm!r} has a running_var, but no running_mean")
    learned = [f"{norm}.{name}" for name in ("weight", "bias") if f"{norm}.{name}" in names]
    if len(learned) == 1:
        return Match((weight,), outputs, problem=f"of the batch norm {norm!r} there is only {learned[0]!r}")
    count = [name for name in (f"{norm}.num_batches_tracked",) if name in names]
    biased = bias in names
    inputs = (weight, f"{norm}.running_mean", f"{norm}.running_var", *([bias] if biased else []), *learned, *count)
    return Match(inputs, outputs, args={"biased": biased, "affine": bool(learned)})


def _fold_bn(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    weight, eps = specs[0], args.get("eps", 1e-5)
    parts = specs[: 3 + args["biased"] + 2 * args["affine"]]
    for spec in parts:
        floating(spec, "fold_bn")
    if eps < 0:
        raise OperationError(f"eps is not negative, as {eps} is", "eps")
    dim = _outputs_dim(args)
    if len(weight.shape) < 2:
        raise OperationError(
            f"a batch norm is folded into a weight of two dimensions or more, not {list(weight.shape)}"
        )
    shape = parts[1].shape
    other = next((spec for spec in parts[1:] if spec.shape != shape or len(shape) != 1), None)
    if other is not None:
        raise OperationError(
            f"mean, variance, bias, weight of the batch norm and its bias are one number for each channel, and not "
            f"{list(shape)} and {list(other.shape)}"
        )
    channels = shape[0]
    if not _fits(weight.shape, dim, channels):
        turned = "transposed=no" if dim else "transposed=yes"
        hint = f"; with {turned} they fit" if _fits(weight.shape, 1 - dim, channels) else ""
        raise OperationError(
            f"a batch norm of {channels} channels is none of the outputs of {list(weight.shape)}{hint}"
        )
    return weight, TensorSpec(parts[3].dtype if args["biased"] else weight.dtype, shape)


def _outputs_dim(args: Args) -> int:
    return 1 if args.get("transposed") == "yes" else 0


def _fits(shape: tuple[int, ...], dim: int, channels: int) -> bool:
    """Whether a weight has so many outputs; a transposed one has them for each of its groups."""
    if not dim:
        return shape[0] == channels
    if not shape[1] or channels % shape[1]:
        return False
    return shape[0] % (channels // shape[1]) == 0 if channels else False


def _fold_bn_refs(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    weight, mean, variance, *rest = refs
    eps, dim = args.get("eps", 1e-5), _outputs_dim(args)
    bias = (rest.pop(0),) if args["biased"] else ()
    learned = tuple(rest[:2]) if args["affine"] else ()
    groups = mean.shape[0] // weight.shape[1] if dim else 1
    scaled = Apply(BatchNormWeight(eps, dim, groups), (weight, variance, *learned[:1]))
    empty = TensorRef(TensorSpec(specs[1].dtype, (0,)), Inline(b""))
    shifted = Apply(BatchNormBias(eps, bool(bias)), (empty, mean, variance, *bias, *learned))
    return TensorRef(specs[0], scaled, weight.stored), TensorRef(specs[1], shifted, bias[0].stored if bias else None)


def _lossy(args: Args, specs: tuple[TensorSpec, ...]) -> None:
    return None


_DIM = Param(
    "dim", "int", required=False, help="the dimension that has a norm for each entry, 0 if not given; -1: one for all"
)

register(
    Operation(
        "fold_weight_norm",
        (_PATTERNS, _TEMPLATE),
        "Make one weight of the magnitude and the direction of a weight norm, which two patterns find in this order.",
        r"fold_weight_norm ^(.*)\.weight_g$ ^(.*)\.weight_v$ => \1.weight",
        "lossy",
        _several("patterns", 2, "magnitude and direction", gathered),
        _fold_weight_norm,
        _fold_weight_norm_ref,
        _lossy,
        options=(_DIM,),
        family=_FAMILY,
    )
)
register(
    Operation(
        "weight_norm",
        (_PATTERN, Param("templates", "template", arrow=True, many=True)),
        "Cut a weight into the magnitude and the direction of a weight norm.",
        r"weight_norm ^(.*)\.weight$ => \1.weight_g \1.weight_v",
        "rounded",
        _several("templates", 2, "magnitude and direction", scattered),
        _weight_norm,
        _weight_norm_refs,
        lambda args, specs: ("fold_weight_norm", {"dim": args["dim"]} if args.get("dim") else {}),
        options=(_DIM,),
        family=_FAMILY,
    )
)
register(
    Operation(
        "fold_spectral_norm",
        (_PATTERNS, _TEMPLATE),
        "Divide a weight by its spectral norm; three patterns find the weight and the vectors u and v, in this order.",
        r"fold_spectral_norm ^(.*)\.weight_orig$ ^(.*)\.weight_u$ ^(.*)\.weight_v$ => \1.weight",
        "lossy",
        _several("patterns", 3, "a weight, u and v", gathered),
        _fold_spectral_norm,
        _fold_spectral_norm_ref,
        _lossy,
        options=(
            Param(
                "dim", "int", required=False, help="the dimension of the outputs: 0 if not given, 1 where transposed"
            ),
        ),
        family=_FAMILY,
    )
)
register(
    Operation(
        "fold_bn",
        (_PATTERN, _TEMPLATE),
        "Fold batch norms into the layers before them: the pattern finds a layer, the template names its batch norm.",
        r"fold_bn ^(.*)conv(\d)$ => \1bn\2",
        "lossy",
        _norms,
        _fold_bn,
        _fold_bn_refs,
        _lossy,
        options=(
            Param("eps", "number", required=False, help="what is added to the variance, 1e-5 if not given"),
            Param("transposed", "choice", required=False, choices=("yes", "no"), help="for transposed convolutions"),
        ),
        family=_FAMILY,
        when_unused="the pattern finds no module with a weight for which the template names a batch norm",
    )
)

"""Operations that make one set of weights of several: averages, and low-rank adapters merged into their base.

Sources: `torch.optim.swa_utils`; Hu et al., "LoRA"; Kalajdzievski, "rank-stabilized LoRA" (alpha by the square root of
the rank); Liu et al., "DoRA" (the magnitudes), as peft computes them.  Sums are in float64 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.limits import BLOCK
from ckptsurgeon.ops._kernels import all_rows, finite, product
from ckptsurgeon.ops._patterns import expanded, found, gathered
from ckptsurgeon.ops._registry import Args, Match, Names, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import floating
from ckptsurgeon.ops._views import permuted, reshaped
from ckptsurgeon.sources import Apply, Kernel
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

_TEMPLATE = Param("template", "template", arrow=True)
_FAMILY = "merging"
_MOST_HINTS = 10
"""Nearest names are sought for so many keys: no more problems are shown."""


# -- average -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Average(Kernel):
    """The mean, or the sum with `weights`, in the dtype of the first."""

    weights: tuple[float, ...] | None

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        wide = torch.complex128 if inputs[0].is_complex() else torch.float64
        weights = self.weights or (1.0,) * len(inputs)
        made = torch.zeros(inputs[0].shape, dtype=wide)
        for tensor, weight in zip(inputs, weights, strict=True):
            made += tensor.to(wide) * weight
        return (made if self.weights else made / len(inputs)).to(inputs[0].dtype)

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        return all_rows(inputs, begin, end)


def _averaged(args: Args, names: Names, target: Target | None) -> Iterable[Match]:
    weights, count = args.get("weights"), len(args["patterns"])
    if count < 2:
        raise OperationError("an average is of two tensors or more: a pattern for each", "patterns")
    if weights is not None and len(weights) != count:
        raise OperationError(f"{len(weights)} weights for {count} patterns", "weights")
    if weights is not None and abs(sum(weights) - 1) > 1e-6:
        raise OperationError(f"the weights add up to {sum(weights):g}, not to 1", "weights")
    return gathered(args, names, target)


def _average(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    first = specs[0]
    for spec in specs:
        if spec.dtype.kind == "quantized" or (spec.dtype.kind == "float" and spec.dtype.bits < 8):
            raise OperationError(f"torch computes no {spec.dtype}, so it cannot be averaged")
        if spec.shape != first.shape:
            raise OperationError(f"tensors of one shape are averaged, not {list(first.shape)} and {list(spec.shape)}")
        if spec.dtype.kind != first.dtype.kind:
            raise OperationError(f"{first.dtype} and {spec.dtype} have no average; cast them first")
    return (first if _is_averaged(first) else specs[-1],)


def _is_averaged(spec: TensorSpec) -> bool:
    return spec.dtype.kind in ("float", "complex")


def _average_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    if not _is_averaged(specs[0]):
        return refs[-1:]
    weights = args.get("weights")
    kernel = Average(None if weights is None else tuple(map(float, weights)))
    return (TensorRef(specs[0], Apply(kernel, refs), refs[0].stored),)


# -- low-rank adapters -------------------------------------------------------------------------

_UP = {
    "lora_A": "lora_B",  # loralib, peft
    "lora_embedding_A": "lora_embedding_B",  # peft, of embeddings
    "lora_down": "lora_up",  # kohya's sd-scripts
    "lora.down": "lora.up",  # diffusers, until 0.21
}
"""How the matrix that reads the input is called in a key, and how the one beside it that makes the output."""
_REFUSED = {
    "lora_mid": "a decomposed convolution (lora_mid)",  # LyCORIS
    "dora_scale": "the magnitudes of LyCORIS (dora_scale)",
}
"""What may stand beside an adapter that is not supported."""


@dataclass(frozen=True)
class _Adapter:
    """The names of one adapter: the first part of a key, the word for its first matrix, and the rest."""

    start: str
    word: str
    rest: str

    @classmethod
    def of(cls, key: str, hit: re.Match[str], words: Iterable[str]) -> _Adapter | None:
        """The adapter that a key belongs to, by the last of the words in what was matched."""
        at, word = max((hit[0].rfind(word), word) for word in words)
        if at < 0:
            return None
        at += hit.start()
        return cls(key[:at], word, key[at + len(word) :])

    def key(self, word: str) -> str:
        return self.start + word + self.rest

    @property
    def up(self) -> str:
        return self.key(_UP[self.word])

    def magnitude(self, names: Names) -> str | None:
        """The magnitudes of DoRA, which peft saves without the name's end."""
        named = self.key("lora_magnitude_vector")
        return next((key for key in (named, named.removesuffix(".weight"), f"{named}.weight") if key in names), None)

    def problem(self, names: Names) -> str | None:
        """What about the adapter cannot be merged."""
        down, up, alpha = self.key(self.word), self.up, f"{self.start}alpha"
        if up not in names:
            return f"{down!r} has no {up!r} beside it"
        for word, what in _REFUSED.items():
            other = next((key for key in (self.start + word, self.key(word)) if key in names), None)
            if other is not None:
                return f"{other!r}: {what} cannot be merged"
        bias = up.removesuffix("weight") + "bias"
        if up.endswith("weight") and bias in names:
            return f"{bias!r}: the bias of an adapter cannot be merged"
        if alpha in names and names[alpha].shape:
            return f"{alpha!r} is no single number, but {list(names[alpha].shape)}"
        return None


@dataclass
class _Bases:
    """The keys that adapters may be merged into, by the names that a template makes."""

    names: Names
    underscores: bool
    hints: int = 0
    flat: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.names if self.underscores else ():
            self.flat.setdefault(key.replace(".", "_"), []).append(key)

    def find(self, name: str) -> tuple[str, str | None]:
        """The key that a name means, and what is wrong with it."""
        if not self.underscores:
            fits = [name] if name in self.names else []
        else:
            fits = self.flat.get(name.replace(".", "_"), [])
        if len(fits) == 1:
            return fits[0], None
        if fits:
            return name, f"{name!r} may be {' or '.join(map(repr, fits))}"
        return name, f"there is no {name!r} to merge it into{self._nearest(name)}"

    def _nearest(self, name: str) -> str:
        self.hints += 1
        if self.hints > _MOST_HINTS:
            return ""
        alike = self.flat or dict.fromkeys(self.names)
        end = re.split(r"[._]", name)[-1]
        keys = [key for key in alike if key.endswith(end) and not any(word in key for word in _WORDS)]
        near = get_close_matches(name.replace(".", "_") if self.flat else name, keys[:1000], 3, 0.4)
        shown = [key for flat in near for key in self.flat.get(flat, [flat])]
        return f"; the nearest keys are {', '.join(map(repr, shown))}" if shown else ""


_WORDS = (*_UP, *_UP.values())


def _adapters(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    """Every adapter whose first matrix the pattern finds, with the weight that the template names."""
    if args.get("alpha") is not None and args.get("scale") is not None:
        raise OperationError("scale=X is the whole factor, and alpha=X a part of it: one of them says it", "scale")
    bases = _Bases(names, args.get("names") == "underscores")
    taken: dict[str, str] = {}
    for key, hit in found(args, names):
        adapter = _Adapter.of(key, hit, _UP)
        if adapter is None:
            text = f"{key!r} is no first matrix of an adapter: what is matched holds none of {', '.join(_UP)}"
            yield Match((key,), (), problem=text)
            continue
        base, problem = bases.find(expanded(args["pattern"], args["template"], key, 1))
        if problem is None and base in taken:
            problem = (
                f"{taken[base]!r} and {key!r} would both be merged into {base!r}: drop one, or use a rule for each"
            )
        problem = adapter.problem(names) or (problem and f"{key!r}: {problem}")
        taken.setdefault(base, key)
        yield Match((key,), (base,), problem=problem) if problem else _adapter_match(args, adapter, base, names)
    yield from _halves(args, names)


def _adapter_match(args: Args, adapter: _Adapter, base: str, names: Names) -> Match:
    alpha, magnitude = f"{adapter.start}alpha", adapter.magnitude(names)
    if all(args.get(name) is None for name in ("alpha", "scale")) and alpha not in names:
        raise OperationError(
            f"alpha=X or scale=X must say how much the adapter counts, as there is no {alpha!r}: peft keeps it as "
            "lora_alpha in adapter_config.json"
        )
    parts = {"alpha": alpha if alpha in names else None, "magnitude": magnitude}
    there = {part: name for part, name in parts.items() if name is not None}
    extra = {"parts": tuple(there), "turned": adapter.word == "lora_embedding_A"}
    return Match((base, adapter.key(adapter.word), adapter.up, *there.values()), (base,), args=extra)


def _halves(args: Args, names: Names) -> Iterator[Match]:
    """Second matrices for which there is no first one that the pattern would find."""
    for word, up in _UP.items():
        for key in names:
            start, there, rest = key.rpartition(up)
            adapter = _Adapter(start, word, rest)
            down = adapter.key(word)
            if not there or down in names:
                continue
            hit = args["pattern"].search(down)
            if hit is not None and _Adapter.of(down, hit, _UP) == adapter:
                yield Match((key,), (), problem=f"{key!r} has no {down!r} beside it")


@dataclass(frozen=True, slots=True)
class LowRank(Kernel):
    """`W + scale · left right`, with `left` of shape (rows, rank) and `right` of (rank, columns).

    The scale is `factor`, times the input behind these where there is an `alpha`.  `magnitude` says the dimension of
    DoRA's magnitudes, which are the last input: the sum is divided by its norm over the others, and multiplied by them.
    """

    factor: float
    alpha: bool
    magnitude: int | None

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        base, left, right, *rest = inputs
        scale = self.factor * float(rest.pop(0)) if self.alpha else self.factor
        made = base.to(torch.float64) + product(left, right).reshape(base.shape) * scale
        if self.magnitude is not None:
            others = tuple(dim for dim in range(made.ndim) if dim != self.magnitude)
            norm = torch.linalg.vector_norm(made, dim=others, keepdim=True)
            made = made * (rest[0].to(torch.float64).reshape(norm.shape) / norm)
        cause = f"merged with a scale of {scale:g}, in {str(base.dtype).removeprefix('torch.')}"
        return finite(made.to(base.dtype), base, cause, "look for NaN in the adapter")

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        base, left, right, *rest = inputs
        if self.magnitude or right.nbytes > BLOCK:  # what is held for every slice must be small
            return None
        alpha, magnitude = rest[: int(self.alpha)], rest[int(self.alpha) :]
        made = all_rows((base, left, *magnitude), begin, end)
        return None if made is None else (*made[:2], right, *alpha, *made[2:])


def _is_turned(args: Args) -> bool:
    """Whether the base's rows are inputs, as those of embeddings and of `Conv1D` are."""
    return bool(args["turned"]) or args.get("transposed") == "yes"


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the dimensions of size 1 that kernels end in."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _lora(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    base, down, up = specs[:3]
    for spec in specs[:3]:
        floating(spec, "lora")
    shapes = f"{list(up.shape)} and {list(down.shape)}"
    if min(len(down.shape), len(up.shape)) < 2 or prod(up.shape[2:]) != 1 or up.shape[1] != down.shape[0]:
        raise OperationError(f"{shapes} are no two matrices of one rank, which is the second size and the first")
    if not down.shape[0]:
        raise OperationError(f"{shapes} have the rank 0")
    _fits(args, base.shape, (up.shape[0], *down.shape[1:]), shapes)
    if "magnitude" in args["parts"]:
        magnitude, outputs = specs[-1], base.shape[int(_is_turned(args))]
        if magnitude.numel != outputs:
            raise OperationError(f"magnitudes {list(magnitude.shape)} for {outputs} outputs of {list(base.shape)}")
    return (base,)


def _fits(args: Args, base: tuple[int, ...], made: tuple[int, ...], shapes: str) -> None:
    """OperationError where the product of the matrices is none that can be added to the weight."""
    turned = _is_turned(args)
    ways = {way: _trimmed(made[::-1] if way else made) == _trimmed(base) for way in (False, True)}
    ways[True] &= len(_trimmed(made)) == 2
    if not ways[turned]:
        hint = (
            f"; with transposed={'no' if turned else 'yes'} it fits" if ways[not turned] and not args["turned"] else ""
        )
        raise OperationError(
            f"{shapes} make {list(made[::-1] if turned else made)}, and the weight is {list(base)}{hint}"
        )


def _lora_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    base, down, up, *rest = refs
    rank = down.shape[0]
    left, right = reshaped(up, (up.shape[0], rank)), reshaped(down, (rank, down.numel // rank))
    if _is_turned(args):
        left, right = permuted(right, (1, 0)), permuted(left, (1, 0))
    alpha = (rest[0],) if "alpha" in args["parts"] and args.get("scale") is None else ()
    magnitude = tuple(rest[-1:]) if "magnitude" in args["parts"] else ()
    kernel = LowRank(_factor(args, rank, bool(alpha)), bool(alpha), int(_is_turned(args)) if magnitude else None)
    flat = tuple(reshaped(ref, (ref.numel,)) for ref in magnitude)
    return (TensorRef(specs[0], Apply(kernel, (base, left, right, *alpha, *flat)), base.stored),)


def _factor(args: Args, rank: int, alpha: bool) -> float:
    """The scale of an adapter, or what its alpha is to be multiplied with."""
    if args.get("scale") is not None:
        return float(args["scale"])
    divisor = sqrt(rank) if args.get("rslora") == "yes" else rank
    return (1.0 if alpha else float(args["alpha"])) / divisor


def _lossy(args: Args, specs: tuple[TensorSpec, ...]) -> Any:
    return None


register(
    Operation(
        "average",
        (Param("patterns", "pattern", many=True), _TEMPLATE),
        "Average tensors of which each pattern makes the same name; integers and bool are those of the last.",
        r"average ^a\.(.*)$ ^b\.(.*)$ => \1 weights=0.75,0.25",
        "lossy",
        _averaged,
        _average,
        _average_ref,
        _lossy,
        options=(
            Param(
                "weights", "numbers", required=False, help="one for each pattern, which add up to 1; equal if not given"
            ),
        ),
        family=_FAMILY,
    )
)
register(
    Operation(
        "lora",
        (Param("pattern", "pattern"), _TEMPLATE),
        "Merge low-rank adapters: the pattern finds their first matrices (A, down), the template names their weights.",
        r"lora ^lora\.base_model\.model\.(.*)\.lora_A(?:\.default)?\.weight$ => \1.weight alpha=16",
        "lossy",
        _adapters,
        _lora,
        _lora_ref,
        _lossy,
        options=(
            Param(
                "alpha", "number", required=False, help="divided by the rank; of those that have no alpha of their own"
            ),
            Param("scale", "number", required=False, help="the whole factor of all, in place of alpha and rank"),
            Param(
                "rslora",
                "choice",
                required=False,
                choices=("yes", "no"),
                help="alpha is divided by the rank's square root",
            ),
            Param(
                "transposed",
                "choice",
                required=False,
                choices=("yes", "no"),
                help="the weights are (in, out), as in GPT-2 (fan_in_fan_out)",
            ),
            Param(
                "names",
                "choice",
                required=False,
                choices=("dots", "underscores"),
                help="underscores: the adapter's names have them where the weights' have dots (kohya)",
            ),
        ),
        family=_FAMILY,
    )
)

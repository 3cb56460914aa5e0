"""What a surgery makes of one tensor of an optimizer's state: the same formula, as far as it is exact.

Where a weight is only moved (renamed, permuted, cut, joined), so is what was gathered of its gradient.  Where it is
multiplied, w′ = s·w, its gradient is g/s: what is linear in the gradient is divided by s, a square by s².  A sum of
several weights, an interpolation and the like have no exact second moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from ckptsurgeon.ops import Initial, making, reshaped
from ckptsurgeon.ops._views import Contiguous, Duplicate, Slice, Take, duplicated, sliced
from ckptsurgeon.ops.values import Arithmetic, Cast
from ckptsurgeon.optimizer.leaves import Leaf
from ckptsurgeon.planner import Overlap
from ckptsurgeon.sources import Apply, Fill, Kernel, Pieces
from ckptsurgeon.tensor import Rows, TensorRef, TensorSpec

MAGNITUDES = frozenset(("exp_inf", "step_size"))
"""Entries that are never negative, whatever sign a weight gets."""
DEGREES = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "exp_inf": 1,
    "exp_avg_diff": 1,
    "neg_pre_grad": 1,
    "momentum_buffer": 1,
    "square_avg": 2,
    "grad_avg": 1,
    "sum": 2,
    "acc_delta": -2,
    "prev": 1,
    "step_size": -1,
}
"""Entry of a state → the power of the gradient that it goes with; the weight itself goes with the power -1.  Of
torch.optim, and of timm's LAMB, LARS, Lion and Adan."""
WEIGHTS = frozenset(("ax", "slow_buffer", "lookahead_slow_buff", "x0"))
"""Entries that are weights themselves: averages of ASGD, Lookahead and MADGRAD."""


_LEAST = 1e-30
"""A factor by which a float32 is still a number, and one by it too."""


class Inexact(Exception):
    """A short cause why a formula cannot be followed exactly."""


@dataclass(frozen=True)
class Follower:
    """Carries one entry through formulas.

    `of` gives it for a key of the source, or raises Inexact; `values` tells that it is a weight, to which is done
    what is done to the weights.  `factor` is what it is multiplied by where the weight is multiplied by a number (None:
    not known), `fresh` what it begins with where that is as good as new (None: it is not).
    """

    of: Callable[[str], TensorRef]
    values: bool = False
    factor: Callable[[float], float] | None = None
    fresh: float | None = None

    def follow(self, formula: TensorRef) -> TensorRef:
        """What the formula makes of it; Inexact where it makes nothing of it."""
        return self._made(formula, {})

    def _made(self, ref: TensorRef, known: dict[int, TensorRef]) -> TensorRef:
        if id(ref) not in known:
            made = self._one(ref, known)
            if made.shape != ref.shape:
                raise AssertionError(f"what follows a tensor of {ref.shape} is {made.shape}")
            known[id(ref)] = made
        return known[id(ref)]

    def _one(self, ref: TensorRef, known: dict[int, TensorRef]) -> TensorRef:
        source = ref.source
        if isinstance(source, Fill) and isinstance(source.init, Leaf):
            return self.of(source.init.key)
        if isinstance(source, Pieces):
            parts = self._alike([self._made(part, known) for part in source.parts], source.parts)
            return TensorRef(TensorSpec(parts[0].dtype, ref.shape), Pieces(parts))
        if isinstance(source, Apply):
            if not self.values and _repeats(source.kernel):
                raise Inexact("it is a copy of another one")
            return self._applied(ref, source, known)
        if self.values or not ref.numel:
            return duplicated(ref, "") if ref.tie is not None else ref
        return self._new(ref)

    def _applied(self, ref: TensorRef, source: Apply, known: dict[int, TensorRef]) -> TensorRef:
        kernel = source.kernel
        moves = kernel.moves or kernel.moves_only or kernel.views
        if not self.values and not moves and kernel.slope is None and not isinstance(kernel, Overlap):
            raise Inexact(f"it is computed ({type(kernel).__name__}), and no exact second moment follows")
        inputs = tuple(self._made(part, known) for part in source.inputs)
        if isinstance(kernel, Overlap) or len(inputs) > 1:
            inputs = self._alike(list(inputs), source.inputs)
        if not self.values and kernel.slope is not None:
            made = self._scaled(inputs[0], kernel.slope)
            return made if made.shape == ref.shape else reshaped(made, ref.shape)
        return _again(kernel, inputs, ref, source.inputs)

    def _scaled(self, ref: TensorRef, slope: float) -> TensorRef:
        if slope == 1.0:
            return ref
        if self.factor is None:
            raise Inexact(f"the weight is multiplied by {slope}, and what this entry is, is not known")
        if not slope:
            raise Inexact("the weight is multiplied by 0")
        try:
            factor = self.factor(slope)
        except OverflowError:
            factor = inf
        if not _LEAST < abs(factor) < 1 / _LEAST:
            raise Inexact(f"the weight is multiplied by {slope}, and by what this entry would be is more than it holds")
        return ref if factor == 1.0 else TensorRef(ref.spec, Apply(Arithmetic("mul", (factor,)), (ref,)), ref.stored)

    def _new(self, ref: TensorRef) -> TensorRef:
        if self.fresh is None:
            raise Inexact("a part of it is new, while steps are counted for the whole")
        return making.filled(ref.spec, Initial("constant", (self.fresh,)), "", 0)

    def _alike(self, refs: list[TensorRef], of: tuple[TensorRef, ...]) -> tuple[TensorRef, ...]:
        """Parts of one tensor, of one dtype: what is new takes that of the others."""
        new = [isinstance(part.source, Fill) and not isinstance(part.source.init, Leaf) for part in of]
        if len({part.dtype for part in of}) > 1:  # the kernel takes several
            return tuple(refs)
        dtypes = {ref.dtype for ref, fresh in zip(refs, new, strict=True) if not fresh}
        if len(dtypes) > 1:
            raise Inexact(f"its parts are of several dtypes ({', '.join(sorted(dtype.name for dtype in dtypes))})")
        dtype = next(iter(dtypes), refs[0].dtype)
        return tuple(
            TensorRef(replace(ref.spec, dtype=dtype), Apply(Cast(dtype), (ref,))) if ref.dtype != dtype else ref
            for ref in refs
        )


def shifts(formula: TensorRef) -> bool:
    """Whether somewhere in a formula a number is added, or values are bounded."""
    todo, seen = [formula], set[int]()
    while todo:
        ref = todo.pop()
        if id(ref) in seen:
            continue
        seen.add(id(ref))
        if isinstance(ref.source, Apply):
            if isinstance(ref.source.kernel, Arithmetic) and ref.source.kernel.slope == 1.0:
                return True
            todo += ref.source.inputs
        elif isinstance(ref.source, Pieces):
            todo += ref.source.parts
    return False


def _repeats(kernel: Kernel) -> bool:
    """Whether a kernel gives some elements twice, which one gradient is not about."""
    return isinstance(kernel, Duplicate) or (
        isinstance(kernel, Take) and len(set(kernel.indices)) < len(kernel.indices)
    )


def _again(kernel: Kernel, inputs: tuple[TensorRef, ...], ref: TensorRef, old: tuple[TensorRef, ...]) -> TensorRef:
    """A kernel on other inputs, as arithmetic on extents where that is possible."""
    if isinstance(kernel, Contiguous):
        return reshaped(inputs[0], ref.shape)
    if isinstance(kernel, Slice):
        sizes = zip(kernel.ranges, ref.shape, strict=True)  # of some rows alone it is given fewer
        return sliced(inputs[0], tuple((at, size, step) for (at, _, step), size in sizes))
    if isinstance(kernel, Rows):
        part = inputs[0].rows(kernel.begin, kernel.end)
        if part is not None:
            return part
    dtype = inputs[0].dtype if ref.dtype == old[0].dtype else ref.dtype
    return TensorRef(TensorSpec(dtype, ref.shape), Apply(kernel, inputs))

"""What a surgery makes of one tensor of an optimizer's state: the same formula, as far as it is exact.

Where a weight is only moved (renamed, permuted, cut, joined), so is what was gathered of its gradient.  Where it is
multiplied, w′ = s·w, its gradient is g/s: what is linear in the gradient is divided by s, a square by s².  A sum of
several weights, an interpolation and the like have no exact second moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ckptsurgeon.ops import Initial, making, reshaped
from ckptsurgeon.ops._views import Contiguous, Duplicate, Slice, duplicated, sliced
from ckptsurgeon.ops.values import Arithmetic, Cast
from ckptsurgeon.optimizer.leaves import Leaf
from ckptsurgeon.planner import Overlap
from ckptsurgeon.sources import Apply, Fill, Kernel, Pieces
from ckptsurgeon.tensor import Rows, TensorRef, TensorSpec

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


class Inexact(Exception):
    """A short cause why a formula cannot be followed exactly."""


@dataclass(frozen=True)
class Follower:
    """Carries one entry through formulas.

    `of` gives it for a key of the source, or raises Inexact; `values` tells that it is a weight, to which is done
    what is done to the weights.  `degree` is the power of the gradient (None: not known), `fresh` what it begins with
    where that is as good as new (None: it is not).
    """

    of: Callable[[str], TensorRef]
    values: bool = False
    degree: int | None = None
    fresh: float | None = None

    def follow(self, formula: TensorRef) -> TensorRef:
        """What the formula makes of it; Inexact where it makes nothing of it."""
        return self._made(formula, {})

    def _made(self, ref: TensorRef, known: dict[int, TensorRef]) -> TensorRef:
        if id(ref) not in known:
            known[id(ref)] = self._one(ref, known)
        return known[id(ref)]

    def _one(self, ref: TensorRef, known: dict[int, TensorRef]) -> TensorRef:
        source = ref.source
        if isinstance(source, Fill) and isinstance(source.init, Leaf):
            return self.of(source.init.key)
        if isinstance(source, Pieces):
            parts = self._alike([self._made(part, known) for part in source.parts], source.parts)
            return TensorRef(TensorSpec(parts[0].dtype, ref.shape), Pieces(parts))
        if isinstance(source, Apply):
            if isinstance(source.kernel, Duplicate) and not self.values:
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
        if slope == 1.0 or self.degree == 0:
            return ref
        if self.degree is None:
            raise Inexact(f"the weight is multiplied by {slope}, and what this entry is, is not known")
        if not slope:
            raise Inexact("the weight is multiplied by 0")
        return TensorRef(ref.spec, Apply(Arithmetic("mul", (slope**-self.degree,)), (ref,)), ref.stored)

    def _new(self, ref: TensorRef) -> TensorRef:
        if self.fresh is None:
            raise Inexact("a part of it is new, while steps are counted for the whole")
        return making.filled(ref.spec, Initial("constant", (self.fresh,)), "", 0)

    def _alike(self, refs: list[TensorRef], of: tuple[TensorRef, ...]) -> tuple[TensorRef, ...]:
        """Parts of one tensor, of one dtype: what is new takes that of the others."""
        new = [isinstance(part.source, Fill) and not isinstance(part.source.init, Leaf) for part in of]
        dtypes = {ref.dtype for ref, fresh in zip(refs, new, strict=True) if not fresh}
        if len(dtypes) > 1:
            raise Inexact(f"its parts are of several dtypes ({', '.join(sorted(dtype.name for dtype in dtypes))})")
        dtype = next(iter(dtypes), refs[0].dtype)
        return tuple(
            TensorRef(replace(ref.spec, dtype=dtype), Apply(Cast(dtype), (ref,))) if ref.dtype != dtype else ref
            for ref in refs
        )


def _again(kernel: Kernel, inputs: tuple[TensorRef, ...], ref: TensorRef, old: tuple[TensorRef, ...]) -> TensorRef:
    """A kernel on other inputs, as arithmetic on extents where that is possible."""
    if isinstance(kernel, Contiguous):
        return reshaped(inputs[0], ref.shape)
    if isinstance(kernel, Slice):
        return sliced(inputs[0], kernel.ranges)
    if isinstance(kernel, Rows):
        part = inputs[0].rows(kernel.begin, kernel.end)
        if part is not None:
            return part
    dtype = inputs[0].dtype if ref.dtype == old[0].dtype else ref.dtype
    return TensorRef(TensorSpec(dtype, ref.shape), Apply(kernel, inputs))

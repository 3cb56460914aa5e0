"""`check_forward`: the source model with the source, the target model with the result, and the same inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import TargetError, UsageError
from ckptsurgeon.forward import inputs as making
from ckptsurgeon.forward import outputs
from ckptsurgeon.forward.inputs import Inputs
from ckptsurgeon.forward.outputs import DifferentError
from ckptsurgeon.forward.report import ForwardCheck, OutputCheck
from ckptsurgeon.forward.subjects import Subject, subject
from ckptsurgeon.plans import Plan

if TYPE_CHECKING:
    from ckptsurgeon.forward.subjects import Model

TOLERANCE = 1e-4


def check_forward(
    source_model: Model, target_model: Model, plan: Plan, inputs: Any = None, *, tolerance: float = TOLERANCE
) -> ForwardCheck:
    """Whether a surgery keeps what the network computes: `source_model` with the plan's source and `target_model` with
    its result, in eval mode, on the same inputs.

    A model is an `nn.Module`, which is left as it is, or a model spec.  `inputs` are a tensor, several, or a mapping by
    the names of the forward's parameters; without them random ones are made of what the models say of themselves, or
    of their first layers.  The error of an output is max|a - b| / max|b|; where it is over the tolerance in float32,
    both models count once more in float64: the rounding of deep networks alone may reach 1e-3.  Outputs of other
    shapes, or another number of them, are an answer (`.same` is false, `.reason` says why).

    Raises PlanError for a plan with problems, UsageError where no inputs can be made, and for a model that has nothing
    of its checkpoint, TargetError for a model whose own code fails.
    """
    if not isinstance(plan, Plan):
        raise UsageError(f"check_forward takes a plan, as cs.plan makes it, not {type(plan).__name__}")
    plan.check()
    if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not 0 <= tolerance < 1:
        raise UsageError(f"a tolerance is a number from 0 to 1, not {tolerance!r}")
    source = subject(source_model, plan.source, "source")
    target = subject(target_model, plan.result, "target")
    return check(source, target, inputs, tolerance, _notes(plan))


def check(source: Subject, target: Subject, given: Any, tolerance: float, notes: tuple[str, ...] = ()) -> ForwardCheck:
    """The check of two models that hold their values already; they may count in float64 afterwards."""
    told, *both = making.run(source, target, given)
    found, reason = _held(both[0], both[1])
    dtype = "float32"
    if found and max(one.error for one in found) > tolerance:
        first = max(one.error for one in found)
        again = _doubled(source, target, told)
        if again is None:
            notes += ("one of the models cannot count in float64; float32 is all there is",)
        else:
            found, reason = again
            dtype, notes = "float64", (*notes, f"in float32 the error is {first:.2g}")
    if found and not reason and (most := max(one.error for one in found)) > tolerance:
        reason = f"the relative error is {most:.2g}, over the tolerance of {tolerance:g}"
    lacking = {"source": source.kept, "target": target.kept}
    return ForwardCheck(not reason, found, dtype, float(tolerance), told.how, reason, lacking, source.dropped, notes)


def _held(source: Any, target: Any) -> tuple[tuple[OutputCheck, ...], str]:
    try:
        return outputs.compared(outputs.flat(source), outputs.flat(target)), ""
    except DifferentError as error:
        return (), str(error)


def _doubled(source: Subject, target: Subject, told: Inputs) -> tuple[tuple[OutputCheck, ...], str] | None:
    """The same in float64; None where a model has parts that cannot."""
    try:
        source.double()
        target.double()
        return _held(source.run(told), target.run(told))
    except (TargetError, RuntimeError):
        return None


def _notes(plan: Plan) -> tuple[str, ...]:
    made = []
    if plan.missing:
        first = next(iter(plan.missing))
        more = f" and {len(plan.missing) - 1:,} more" if len(plan.missing) > 1 else ""
        made.append(f"new in the result, and not of the source: {first}{more}")
    return tuple(made)

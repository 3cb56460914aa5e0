"""The state of a checkpoint's optimizer in a live one, by names: whatever groups it has, whatever was frozen since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon import formats, optimizer
from ckptsurgeon.errors import PlanError, Problem, UsageError
from ckptsurgeon.finetune import names
from ckptsurgeon.finetune.report import LoadReport
from ckptsurgeon.plans import Followed, Plan
from ckptsurgeon.tensor import TensorRef

if TYPE_CHECKING:
    import torch

_KINDS = frozenset(("alpha", "beta2_decay", "betas", "dampening", "etas", "lambd", "lr_decay", "momentum_decay", "rho"))
"""Options that tell one kind of optimizer from another."""
_ADAM = ("step", "exp_avg", "exp_avg_sq")
_NEEDED = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "RAdam": _ADAM,
    "NAdam": (*_ADAM, "mu_product"),
    "Adamax": ("step", "exp_avg", "exp_inf"),
    "RMSprop": ("step", "square_avg"),
    "Adagrad": ("step", "sum"),
    "Adadelta": ("step", "square_avg", "acc_delta"),
    "Rprop": ("step", "prev", "step_size"),
    "ASGD": ("step", "eta", "mu", "ax"),
}
"""Entries without which torch's optimizers fail at the next step."""
_ASKED = {
    "Adam": {"amsgrad": "max_exp_avg_sq"},
    "AdamW": {"amsgrad": "max_exp_avg_sq"},
    "RMSprop": {"centered": "grad_avg", "momentum": "momentum_buffer"},
}
"""The same, where an option asks for them."""


def load_optimizer(
    live: torch.optim.Optimizer, model: torch.nn.Module, report: LoadReport, *, place: str | None = None
) -> Followed:
    """Give an optimizer of `model` the state that the checkpoint's had, after the surgery that loaded the model.

    `report` is what `load_into` gave.  States are found by the names of parameters, not by position: `live` may have
    other groups, in another order, and leave frozen parameters out; its learning rates and other options stay.
    `place` is the dotted place of the optimizer in the file, where there are several.  Returns what was taken over
    (`exact`), what begins anew and why (`reset`), and parameters of `live` that the checkpoint's lacked (`fresh`).

    Raises UsageError when there is no such state, or it is of another kind of optimizer, PlanError when it cannot be
    told which parameter each state is about.
    """
    name, value = _chosen(report.plan, place)
    there = names.parameters(model)
    _check_model(there, report)
    change = optimizer.Change.of(report.plan)
    try:
        before = optimizer.known(change, value)
    except optimizer.Undecided as error:
        raise PlanError([Problem(f"the optimizer state at {name!r} cannot be used: {error}", kind="extras")]) from None
    _check_kind(live, before, name)
    carried = optimizer.carry(change, before)
    named = {id(parameter): key for key, parameter in there.items()}
    known = live.state_dict()
    ids = [one for group in known["param_groups"] for one in group["params"]]
    parameters = [parameter for group in live.param_groups for parameter in group["params"]]
    strange = [list(one.shape) for one in parameters if id(one) not in named]
    if strange:
        raise UsageError(f"the optimizer has a parameter of shape {strange[0]} that is none of the model")
    keys = [named[id(parameter)] for parameter in parameters]
    state = dict(known["state"])
    state |= {one: _read(carried.states[key]) for one, key in zip(ids, keys, strict=True) if key in carried.states}
    live.load_state_dict({**known, "state": state})
    here = set(keys)
    left = [key for key in carried.states if key not in here]
    count = f"{len(left)} parameter{'' if len(left) == 1 else 's'}"
    notes = (f"the state of {count} that this optimizer does not have is left out",) if left else ()
    found = Followed(name, "optimizer", tuple(key for key in keys if key in carried.states), notes=notes)
    reset = {key: why for key, why in carried.reset.items() if key in here}
    return replace(found, reset=reset, fresh=tuple(key for key in keys if key not in {*carried.states, *reset}))


def _chosen(made: Plan, place: str | None) -> tuple[str, Mapping[Any, Any]]:
    found = {".".join(map(str, path)) or ".": value for path, value in formats.optimizer_states(made.source.extras)}
    if place is None and len(found) == 1:
        return next(iter(found.items()))
    if place in found:
        return place, found[place]
    if not found:
        raise UsageError("the checkpoint has no optimizer state; look at it with `ckpt ls --tree`")
    raise UsageError(f"the checkpoint has optimizer states at {', '.join(map(repr, found))}; choose one with place=")


def _check_model(there: Mapping[str, torch.nn.Parameter], report: LoadReport) -> None:
    """UsageError for a model that is not the one of the report."""
    entries = report.plan.target.entries if report.plan.target is not None else {}
    for name, parameter in there.items():
        if name not in entries or tuple(parameter.shape) != entries[name].spec.shape:
            what = f"{name!r} {list(parameter.shape)}"
            raise UsageError(f"the report is not about this model: {what} is no parameter of it; load into it first")


def _check_kind(live: torch.optim.Optimizer, before: optimizer.Known, name: str) -> None:
    """UsageError where a state of these entries is none of such an optimizer."""
    kind = type(live).__name__
    saved = {option for group in before.options for option in group} & _KINDS
    here = {option for group in live.param_groups for option in group} & _KINDS
    if saved != here:
        raise UsageError(
            f"the optimizer state at {name!r} is of another kind than {kind}: "
            f"it has {', '.join(sorted(saved)) or 'none'} of the options that tell, and this one "
            f"{', '.join(sorted(here)) or 'none'}"
        )
    needed = set(_NEEDED.get(kind, ()))
    for option, entry in _ASKED.get(kind, {}).items():
        needed |= {entry} if any(group.get(option) for group in live.param_groups) else set()
    for state in before.states.values():
        if lacking := sorted(needed - set(state)):
            raise UsageError(f"the optimizer state at {name!r} has no {lacking[0]!r}, which {kind} as it is here needs")


def _read(state: Mapping[str, Any]) -> dict[str, Any]:
    return {entry: value.read() if isinstance(value, TensorRef) else value for entry, value in state.items()}

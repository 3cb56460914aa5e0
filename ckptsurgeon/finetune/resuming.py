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
    _check_kind(live, value, name)
    change = optimizer.Change.of(report.plan)
    try:
        carried = optimizer.carry(change, optimizer.known(change, value))
    except optimizer.Undecided as error:
        raise PlanError([Problem(f"the optimizer state at {name!r} cannot be used: {error}", kind="extras")]) from None
    named = {id(parameter): key for key, parameter in names.parameters(model).items()}
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
    there = set(keys)
    left = [key for key in carried.states if key not in there]
    notes = (f"the state of {len(left)} parameters that this optimizer does not have is left out",) if left else ()
    found = Followed(name, "optimizer", tuple(key for key in keys if key in carried.states), notes=notes)
    reset = {key: why for key, why in carried.reset.items() if key in there}
    return replace(found, reset=reset, fresh=tuple(key for key in keys if key not in {*carried.states, *reset}))


def _chosen(made: Plan, place: str | None) -> tuple[str, Mapping[Any, Any]]:
    found = {".".join(map(str, path)) or ".": value for path, value in formats.optimizer_states(made.source.extras)}
    if place is None and len(found) == 1:
        return next(iter(found.items()))
    if place in found:
        return place, found[place]
    there = ", ".join(map(repr, found)) or "none"
    raise UsageError(f"the checkpoint has these optimizer states: {there}; say which with place=, or keep it with it")


def _check_kind(live: torch.optim.Optimizer, value: Mapping[Any, Any], name: str) -> None:
    groups = value["param_groups"]
    saved = {option for group in groups if isinstance(group, dict) for option in group} & _KINDS
    here = {option for group in live.param_groups for option in group} & _KINDS
    if saved != here:
        raise UsageError(
            f"the optimizer state at {name!r} is of another kind than {type(live).__name__}: "
            f"it has {', '.join(sorted(saved)) or 'none'} of the options that tell, and this one "
            f"{', '.join(sorted(here)) or 'none'}"
        )


def _read(state: Mapping[str, Any]) -> dict[str, Any]:
    return {entry: value.read() if isinstance(value, TensorRef) else value for entry, value in state.items()}

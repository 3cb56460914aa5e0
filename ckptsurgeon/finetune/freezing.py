"""Freezing: which parameters of a live model do not train, and which norms keep their running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from ckptsurgeon.errors import UsageError
from ckptsurgeon.finetune import _checked, _sharing, names
from ckptsurgeon.finetune.frozen import Frozen, Parameter
from ckptsurgeon.finetune.report import LoadReport
from ckptsurgeon.finetune.selecting import Patterns, Selection, Slot, Type, slots

if TYPE_CHECKING:
    import torch


def freeze(
    model: torch.nn.Module,
    pattern: Patterns | None = None,
    *,
    types: Type | Sequence[Type] | None = None,
    until: int | None = None,
    children: int | None = None,
    modules: int | None = None,
    loaded: LoadReport | None = None,
    norm_stats: bool = False,
) -> Frozen:
    """Let parameters train no more (`requires_grad` false); what comes back prints what was done.

    At most one of these says which are meant, and none of them means all; for more, call again:

    - `pattern`: a regex, or several, searched for in the names of the parameters (`"^features"`);
    - `types`: what lies in modules of a class or a class name (`"BatchNorm2d"`), or of the kinds `"norm"` and
      `"embedding"`, `"prelu"` and `"bias"`; several may be given;
    - `until`: those whose index in `model.parameters()` is below a number;
    - `children`: those in the first n of `model.children()`;
    - `modules`: those that the first n of `model.modules()` own themselves; number 0 is the model;
    - `loaded`: what `load_into` loaded whole, by its report; what was replaced since by another shape is an error.

    Negative numbers count from the end: `children=-1` leaves out the last child.  Names and numbers are those of the
    network itself, whatever is wrapped around it.  A parameter of several names is frozen under all of them.  With
    `norm_stats` the norms among those that are meant are put into evaluation mode and stay in it when the model is put
    into training mode, until `unfreeze`, so that running means and variances do not move either.  Modules that
    `torch.jit.script` makes do not know of it.

    Raises UsageError for what matches nothing (with the nearest names), numbers past the end, and several ways at once.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> freeze(net, children=-1).trainable
    ('1.weight', '1.bias')
    """
    selection = Selection(pattern, types, until, children, modules, loaded)
    return _set(model, selection, "freeze", norm_stats)


def unfreeze(
    model: torch.nn.Module,
    pattern: Patterns | None = None,
    *,
    types: Type | Sequence[Type] | None = None,
    until: int | None = None,
    children: int | None = None,
    modules: int | None = None,
    loaded: LoadReport | None = None,
) -> Frozen:
    """Let parameters train again, chosen as for `freeze`; norms among them move their running statistics again.

    What has a dtype that cannot train (integers of quantised weights) stays as it is, and is said.
    """
    selection = Selection(pattern, types, until, children, modules, loaded)
    return _set(model, selection, "unfreeze", True)


@overload
def trainable(model: torch.nn.Module, named: Literal[False] = False) -> list[torch.nn.Parameter]: ...
@overload
def trainable(model: torch.nn.Module, named: Literal[True]) -> list[tuple[str, torch.nn.Parameter]]: ...
def trainable(
    model: torch.nn.Module, named: bool = False
) -> list[torch.nn.Parameter] | list[tuple[str, torch.nn.Parameter]]:
    """The parameters that train, each once, for an optimizer: `torch.optim.SGD(trainable(model), lr=0.1)`.

    With `named` they are (name, parameter) pairs, which optimizers keep in their state dicts.  Raises UsageError
    when none trains.
    """
    there = _sharing.sized(names.parameters(_checked.model(model, "trainable", scripted=True)))
    pairs = [(name, one) for name, one in there.items() if one.requires_grad]
    if not pairs:
        raise UsageError("no parameter of the model trains; unfreeze some")
    return pairs if named else [one for _, one in pairs]


def _set(model: torch.nn.Module, selection: Selection, what: str, norm_stats: bool) -> Frozen:
    found, thaw = slots(_checked.model(model, what)), what == "unfreeze"
    there = _sharing.sized(names.parameters(model))
    picked = selection.of(model, [slot for slot in found if norm_stats or not slot.is_statistics])
    chosen = {slot.index for slot in picked if not slot.is_statistics}
    before = [one.requires_grad for one in there.values()]
    stuck = []
    for index, (name, one) in enumerate(there.items()):
        if index in chosen and thaw and not (one.is_floating_point() or one.is_complex()):
            stuck.append(f"{name} is {str(one.dtype).removeprefix('torch.')}, which cannot train")
            chosen.discard(index)
        elif index in chosen:
            one.requires_grad_(thaw)
    norms = _statistics(found, picked, thaw) if norm_stats else ()
    owners = {slot.index: type(slot.owner).__name__ for slot in reversed(found) if not slot.is_statistics}
    parameters = tuple(
        Parameter(
            index,
            name,
            owners[index],
            str(one.dtype).removeprefix("torch."),
            tuple(one.shape),
            one.numel(),
            index in chosen,
            before[index],
            one.requires_grad,
        )
        for index, (name, one) in enumerate(there.items())
    )
    split = [(a, b) for a, b in _sharing.pairs(there) if there[a].requires_grad != there[b].requires_grad]
    return Frozen(parameters, thaw, norms, _sharing.tied_names(found), (*stuck, *_sharing.words(split)))


def _statistics(found: list[Slot], picked: list[Slot], thaw: bool) -> tuple[str, ...]:
    """Hold the running statistics of norms of which something is meant, or let them go."""
    owners = {id(slot.owner) for slot in picked}
    norms = {slot.name.rpartition(".")[0]: slot.owner for slot in reversed(found) if slot.is_statistics}
    meant = {name: norm for name, norm in reversed(norms.items()) if id(norm) in owners}
    for norm in meant.values():
        held = norm.__dict__.get("train")
        if thaw and isinstance(held, StaysInEvaluation):
            del norm.__dict__["train"]
            norm.train(held.mode)
        elif not thaw and not isinstance(held, StaysInEvaluation):
            mode = norm.training
            norm.eval()
            norm.__dict__["train"] = StaysInEvaluation(norm, mode)
    return tuple(() if thaw else meant)


class StaysInEvaluation:
    """Stands in for the method `train` of one module, and leaves it in evaluation mode; `mode` is the one that it would
    be in without: that before, or what was asked for since.

    It is an attribute of that module alone: its class, its state dict and its hooks are as they were, a copy of the
    module has a copy of it, and `torch.save` of a whole model names this class.
    """

    def __init__(self, module: torch.nn.Module, mode: bool) -> None:
        self.module, self.mode = module, mode

    def __call__(self, mode: bool = True) -> torch.nn.Module:
        self.mode = mode
        return self.module

"""Parameter groups for optimizers: which parameters learn at which rate, and which decay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptsurgeon import kinds
from ckptsurgeon.checkpoint import Target
from ckptsurgeon.errors import PlanError, Problem, UsageError
from ckptsurgeon.finetune import _checked, _sharing, depth, names
from ckptsurgeon.finetune._checked import rate
from ckptsurgeon.finetune.grouped import Group, Groups
from ckptsurgeon.finetune.grouprules import GroupRule, Rules, check_overlaps, read, settled
from ckptsurgeon.finetune.report import LoadReport
from ckptsurgeon.finetune.selecting import Slot, Type, by_type, is_of, loaded_whole, named, no_type, slots, types

if TYPE_CHECKING:
    import torch

NO_DECAY = ("norm", "bias", "prelu")
"""What usually does not decay."""


def param_groups(
    model: torch.nn.Module,
    lr: float | None,
    rules: Rules | None = None,
    *,
    weight_decay: float | None = None,
    no_decay: Type | Iterable[Type] | None = None,
    head: float | None = None,
    layer_decay: float | None = None,
    fresh: tuple[LoadReport | Iterable[str], float] | None = None,
) -> Groups:
    """The trainable parameters of a model in groups, each parameter in exactly one, for an optimizer.

    - `lr`: the base learning rate.  None: every parameter must get one from a rule.
    - `rules`: what is set for some, as a mapping or as pairs.  The key is a regex searched for in the names, a module
      class, or `"type=NAME"` with a class name or a kind (`norm`, `bias`, `prelu`, `embedding`).  The value is a
      multiple of `lr`, or options: `lr` or `lr_mult`, `weight_decay`, `name` of the group, others of the optimizer.
      Two rules may meet in a parameter when they set different things; where both set the same, that is an error,
      unless one has `"fallback": True` and so only fills in what no other rule sets.
    - `weight_decay` is for all but what `no_decay` names: module classes, class names or kinds, by default norms,
      biases and PReLU.  Without `weight_decay` the optimizer's own is for all but what `no_decay` names, if given.
    - `head`: the multiple of `lr` for the head, which is found by what timm says of its models, and by its name.
    - `layer_decay`: each layer below the head learns at this multiple of the one above; it multiplies what else is set,
      but for an absolute `lr`.  See `ckptsurgeon.finetune.depth` for how layers are counted.
    - `fresh`: a report of `load_into` and a multiple of `lr` for what it did not load, or loaded in part; or names.

    `head` and `fresh` count as rules.  Frozen parameters are left out, tied ones are there once.

    Raises UsageError for patterns and types that match nothing, and PlanError, with all of them, for parameters of two
    groups or of none.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    >>> groups = param_groups(net, 0.1, {"^2": 10}, weight_decay=0.01)
    >>> [(one["name"], one["lr"], one["weight_decay"]) for one in groups]
    [('base', 0.1, 0.01), ('base/no_decay', 0.1, 0.0), ('^2', 1.0, 0.01), ('^2/no_decay', 1.0, 0.0)]
    """
    found = [slot for slot in slots(_checked.model(model, "param_groups")) if not slot.is_statistics]
    there = _sharing.sized(names.parameters(model))
    listed = list(there)
    said = [*read(rules, found), *_head(model, head, listed), *_fresh(model, fresh, found)]
    check_overlaps(said, listed)
    spared = _spared(found, types(NO_DECAY if no_decay is None else no_decay))
    setting = _Setting(
        said,
        None if lr is None else rate("lr", lr),
        None if weight_decay is None else rate("weight_decay", weight_decay),
        _scales(model, layer_decay),
        frozenset() if weight_decay is None and no_decay is None else spared,
    )
    placed = {name: setting.place(at, name) for at, (name, one) in enumerate(there.items()) if one.requires_grad}
    without = [name for name, place in placed.items() if place is None]
    if without:
        text = "is in no group: lr is None, and no rule gives it one"
        raise PlanError([Problem(f"{name!r} {text}", key=name) for name in without])
    return Groups(
        _named_once([(place, name, there[name]) for name, place in placed.items() if place is not None]),
        tuple(name for name, one in there.items() if not one.requires_grad),
        tuple(_remarks(said, there)),
    )


@dataclass(frozen=True)
class _Setting:
    """What decides the group of a parameter: the rules, the base's rate and decay, depths and multiples by layer, and
    the indexes of what does not decay."""

    said: Sequence[GroupRule]
    base: float | None
    decay: float | None
    scales: Mapping[str, tuple[int, float]]
    spared: frozenset[int]

    def place(self, index: int, name: str) -> _Place | None:
        """Where a parameter belongs; None where nothing gives it a learning rate."""
        used, options = settled(index, self.said)
        scale = self.scales.get(name)
        found = _rate(self.base, options.pop("lr", None), scale[1] if scale else 1.0)
        if found is None:
            return None
        options = {"lr": found, **_decay(options, self.decay, index in self.spared), **options}
        is_spared = options.get("weight_decay") == 0 != self.decay
        title = _title(options.pop("name", None), used, scale, is_spared)
        order = (scale[0] if scale else 0, tuple(map(self.said.index, used)), is_spared)
        return _Place(order, title, repr(sorted(options.items())), options)


@dataclass(frozen=True, order=True)
class _Place:
    """Which group a parameter is in: by layer, rules and decay, in this order; `told` are its options in words."""

    order: tuple[int, tuple[int, ...], bool]
    title: str
    told: str
    options: Mapping[str, Any] = field(compare=False)


def no_decay(model: torch.nn.Module | Target, of: Type | Iterable[Type] = NO_DECAY) -> tuple[str, ...]:
    """The names of the parameters that usually do not decay: of norms and PReLU, and biases, told by module type.

    `of` are classes, class names or kinds, or one of them.  A `Target` (`cs.target_of("timm:resnet50")`) tells as much
    by its header as the model itself, where `of` are kinds, or names of the classes that own parameters.  Raises
    UsageError for a class that is not there.
    """
    wanted = types(of)
    if not isinstance(model, Target):
        found = [slot for slot in slots(_checked.model(model, "no_decay")) if not slot.is_statistics]
        spared = _spared(found, wanted)
        return tuple(name for index, name in enumerate(names.parameters(model)) if index in spared)
    return _of_header(model, wanted)


def _of_header(target: Target, wanted: Sequence[Type]) -> tuple[str, ...]:
    if not target.is_model:
        raise UsageError(f"norms are told by the types of modules, and {target.label} is a checkpoint; name a model")
    doubled = {name for tie in target.ties for name in tie[1:]}
    own = {key: one for key, one in target.entries.items() if one.role != "buffer" and key not in doubled}
    there = {one.module for one in own.values()}
    for one in wanted:
        if not isinstance(one, str):
            raise UsageError(f"a header knows the names of classes alone; give {one.__name__!r}")
        if one not in kinds.KINDS and one not in there:
            raise UsageError(no_type(one, there))
    return tuple(
        key
        for key, entry in own.items()
        if any(one == entry.module or one in tuple(kinds.of_kind(key, entry.kind)) for one in wanted)
    )


def _head(model: torch.nn.Module, multiple: float | None, listed: Sequence[str]) -> list[GroupRule]:
    if multiple is None:
        return []
    of = depth.head_of(model)
    if not of:
        raise UsageError(
            "no head was found: no child of the model has one of the usual names "
            f"({', '.join(depth.HEADS)}) and parameters of its own; give a rule with a pattern instead"
        )
    return [GroupRule("head", frozenset(map(listed.index, of)), None, rate("head", multiple), {})]


def _fresh(
    model: torch.nn.Module, fresh: tuple[LoadReport | Iterable[str], float] | None, found: Sequence[Slot]
) -> list[GroupRule]:
    if fresh is None:
        return []
    if not isinstance(fresh, Sequence) or isinstance(fresh, str) or len(fresh) != 2:
        raise UsageError("fresh is a pair: a report of cs.load_into, or names, and the multiple of lr")
    report, multiple = fresh
    if isinstance(report, LoadReport):
        whole = loaded_whole(report, model, found)
        indexes = {slot.index for slot in found} - {slot.index for slot in found if id(slot.tensor) in whole}
    else:
        meant = named(report, model, found, "the fresh")
        indexes = {slot.index for slot in found if id(slot.tensor) in meant}
    return [GroupRule("fresh", frozenset(indexes), None, rate("the multiple of fresh", multiple), {})]


def _scales(model: torch.nn.Module, layer_decay: float | None) -> dict[str, tuple[int, float]]:
    """Depth and multiple of every parameter; nothing without a decay."""
    if layer_decay is None:
        return {}
    decay = rate("layer_decay", layer_decay)
    found = depth.depths(model)
    last = max(found.values(), default=0)
    if not last:
        raise UsageError("layer_decay has no effect: all parameters of the model are in one layer")
    return {name: (at, decay ** (last - at)) for name, at in found.items()}


def _spared(found: Sequence[Slot], wanted: Sequence[Type]) -> frozenset[int]:
    """The indexes of what does not decay. UsageError for a type of which nothing is; for a kind, that is no error."""
    for one in wanted:
        if one not in kinds.KINDS:
            by_type(one, found)
    return frozenset(slot.index for slot in found if any(is_of(one, slot) for one in wanted))


def _rate(base: float | None, said: tuple[float | None, float | None] | None, scale: float) -> float | None:
    absolute, multiple = said or (None, None)
    if absolute is not None:
        return absolute
    return None if base is None else base * (1 if multiple is None else multiple) * scale


def _decay(options: Mapping[str, Any], decay: float | None, spared: bool) -> dict[str, Any]:
    if "weight_decay" in options:
        return {}
    if spared:
        return {"weight_decay": 0.0}
    return {} if decay is None else {"weight_decay": decay}


def _title(name: str | None, used: Sequence[GroupRule], scale: tuple[int, float] | None, spared: bool) -> str:
    parts = [name] if name else [rule.label for rule in used]
    parts = ([f"layer_{scale[0]}"] if scale else []) + parts
    return "/".join([*(parts or ["base"]), *(["no_decay"] if spared else [])])


def _named_once(placed: Sequence[tuple[_Place, str, torch.nn.Parameter]]) -> tuple[Group, ...]:
    """The groups in order; what has one name and the same options is one. UsageError where there is none, or two have
    one name."""
    if not placed:
        raise UsageError("no parameter of the model trains; unfreeze some")
    first: dict[tuple[str, str], _Place] = {}
    members: dict[tuple[str, str], dict[str, torch.nn.Parameter]] = {}
    for place, name, parameter in placed:
        key = place.title, place.told
        first[key] = min(place, first.get(key, place))
        members.setdefault(key, {})[name] = parameter
    groups = tuple(
        Group(place.title, members[place.title, place.told], place.options) for place in sorted(first.values())
    )
    titles = [one.name for one in groups]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice is not None:
        raise UsageError(f"two groups with other options would be called {twice!r}; give their rules other names")
    return groups


def _remarks(said: Sequence[GroupRule], there: Mapping[str, torch.Tensor]) -> Iterator[str]:
    trains = {index for index, one in enumerate(there.values()) if one.requires_grad}
    for rule in said:
        if not rule.indexes:
            yield f"{rule.label}: everything was loaded"
        elif not rule.indexes & trains:
            yield f"{rule.label}: all of its parameters are frozen"
    yield from _sharing.words(_sharing.pairs({name: one for name, one in there.items() if one.requires_grad}))

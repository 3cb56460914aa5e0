"""One optimizer's `state_dict()` after a surgery: positions, groups and states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.optimizer import groups as grouping
from ckptsurgeon.optimizer import states
from ckptsurgeon.optimizer.leaves import Change
from ckptsurgeon.optimizer.moments import Inexact
from ckptsurgeon.optimizer.naming import Naming, naming
from ckptsurgeon.optimizer.positions import Shape, Strange, Undecided, assigned
from ckptsurgeon.optimizer.states import States
from ckptsurgeon.plans import Followed
from ckptsurgeon.tensor import TensorRef


@dataclass(frozen=True)
class Known:
    """An optimizer whose parameters have names: the keys of the source by group, the state of each, and how its own
    names are made of keys (None: it counts)."""

    groups: tuple[tuple[str, ...], ...]
    options: tuple[Mapping[str, Any], ...]
    states: Mapping[str, Mapping[str, Any]]
    naming: Naming | None
    by_name: bool
    loose: tuple[Any, ...] = ()


def known(change: Change, value: Mapping[Any, Any]) -> Known:
    """What an optimizer's state is about; Undecided, with a short cause, where that cannot be told."""
    ids, state = _ids(value["param_groups"]), value["state"]
    groups = value["param_groups"]
    if not isinstance(state, dict) or not all(isinstance(one, dict) for one in state.values()):
        raise Undecided("its state is no table of parameters")
    if any(states.is_whole(one) for one in state.values()):
        raise Undecided("its one state is about all parameters laid end to end, as that of LBFGS")
    shapes = _shapes(ids, state)
    names, found = _names(groups, ids), None
    if names is None:
        keys = _counted(change, shapes)
    else:
        found = naming((name for group in names for name in group), change.made.source, change.prefixes)
        if found is None:
            raise Undecided(_strange(names, change))
        keys = [[found.key(name) or "" for name in group] for group in names]
        _check(keys, shapes, change)
        keys = [[change.first.get(key, key) for key in group] for group in keys]
    by_id = {one: key for group, named in zip(ids, keys, strict=True) for one, key in zip(group, named, strict=True)}
    if len(set(by_id.values())) < len(by_id):
        raise Undecided("a parameter is in it twice")
    return Known(
        tuple(map(tuple, keys)),
        tuple({name: option for name, option in group.items() if name != "params"} for group in groups),
        {by_id[one]: entry for one, entry in state.items() if one in by_id},
        found,
        any(isinstance(one, str) for group in ids for one in group),
        tuple(one for one in state if one not in by_id),
    )


def _shapes(ids: list[list[Any]], state: Mapping[Any, Any]) -> list[list[Shape | None]]:
    return [[states.shape_of(state[one]) if one in state else None for one in group] for group in ids]


def _counted(change: Change, shapes: list[list[Shape | None]]) -> list[list[str]]:
    """The keys of an optimizer that only counts."""
    if change.unordered:
        raise Undecided(change.unordered)
    keys = assigned(shapes, {key: ref.shape for key, ref in change.candidates.items()})
    if (buffer := change.buffer(key for group in keys for key in group)) is not None:
        raise Undecided(f"it seems to train {buffer!r}, which {change.label} has as a buffer")
    return keys


def may_be_of(value: Mapping[Any, Any], tensors: Mapping[str, TensorRef]) -> bool:
    """Whether an optimizer may be that of another state dict, as far as shapes tell."""
    try:
        ids, state = _ids(value["param_groups"]), value["state"]
        if not isinstance(state, dict) or not all(isinstance(one, dict) for one in state.values()):
            return False
        names = _names(value["param_groups"], ids)
        if names is not None:
            return all(name in tensors for group in names for name in group)
        floats = {key: ref.shape for key, ref in tensors.items() if ref.dtype.kind in ("float", "complex")}
        assigned(_shapes(ids, state), floats)
    except Strange:
        return False
    except Undecided:
        return True
    return True


def _ids(groups: Any) -> list[list[Any]]:
    if not isinstance(groups, list | tuple) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list | tuple) for group in groups
    ):
        raise Undecided("its param_groups are no lists of parameters")
    ids = [list(group["params"]) for group in groups]
    every = [one for group in ids for one in group]
    if not all(isinstance(one, int | str) and not isinstance(one, bool) for one in every):
        raise Undecided("its parameters are neither numbered nor named")
    if len(set(every)) < len(every):
        raise Undecided("a parameter is in it twice")
    return ids


def _names(groups: Sequence[Mapping[str, Any]], ids: list[list[Any]]) -> list[list[str]] | None:
    """The names that it says itself; None where it only counts."""
    if ids and all(isinstance(one, str) for group in ids for one in group) and any(ids):
        return ids
    found = [group.get("param_names") for group in groups]
    if not found or not all(isinstance(names, list | tuple) for names in found):
        return None
    made = [[name for name in names or () if isinstance(name, str)] for names in found]
    return made if [len(names) for names in made] == [len(group) for group in ids] else None


def _strange(names: list[list[str]], change: Change) -> str:
    strange = [name for group in names for name in group if name not in change.made.source]
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    return f"its parameter {strange[0]!r}{more} is no key of the checkpoint"


def _check(keys: list[list[str]], shapes: list[list[Shape | None]], change: Change) -> None:
    for group, wanted in zip(keys, shapes, strict=True):
        for key, shape in zip(group, wanted, strict=True):
            have = change.made.source[key].shape
            if shape is not None and shape != have:
                raise Undecided(
                    f"its state of {key!r} is {list(shape)}, and the tensor {list(have)}: it is the state of another "
                    "model"
                )


def follow(
    change: Change, place: str, value: Mapping[Any, Any], others: Mapping[str, Mapping[str, TensorRef]]
) -> tuple[Any, Followed]:
    """An optimizer's state for the result of a surgery, and what became of it; None where it is left out.

    `others` are state dicts of other networks in the file, by their places: one of theirs stays as it is.
    """
    theirs = next((name for name, tensors in others.items() if may_be_of(value, tensors)), None)
    try:
        before = known(change, value)
        if theirs is not None and before.naming is None:
            raise Undecided(f"it may as well be about the state dict at {theirs!r}")
        if change.unnumbered and not before.by_name:
            raise Undecided(change.unnumbered)
        after = grouping.grouped(change, before.groups, before.options)
    except Undecided as error:
        if theirs is not None and (isinstance(error, Strange) or _is_named(value)):
            note = f"it is about the state dict at {theirs!r}, and is kept as it was"
            return value, Followed(place, "optimizer", notes=(note,), kept=True)
        return None, Followed(place, "optimizer", left=str(error))
    carried = carry(change, before)
    ids = _numbered(after, before)
    made = {**value, "state": _state(value["state"], after, ids, carried, before, change)}
    made["param_groups"] = [
        _group(group, members, ids, before) for group, members in zip(value["param_groups"], after.groups, strict=True)
    ]
    notes = [*after.notes, *_gone(change, before)]
    if before.loose:
        notes.append(f"state of {', '.join(map(repr, before.loose[:3]))}, which no group has, is left out")
    exact = tuple(key for key in ids if key in carried.states)
    report = Followed(place, "optimizer", exact, carried.reset, after.fresh, tuple(notes))
    return OrderedDict(made) if isinstance(value, OrderedDict) else made, report


def _is_named(value: Mapping[Any, Any]) -> bool:
    try:
        return _names(value["param_groups"], _ids(value["param_groups"])) is not None
    except Undecided:
        return False


@dataclass(frozen=True)
class Carried:
    """The states by parameters of the result, and why others have none any more."""

    states: Mapping[str, dict[str, Any]]
    reset: Mapping[str, str]


def carry(change: Change, before: Known) -> Carried:
    """The state of every parameter of the result that is made of parameters of the optimizer."""
    options = {key: option for group, option in zip(before.groups, before.options, strict=True) for key in group}
    old = States(before.states, options)
    made: dict[str, dict[str, Any]] = {}
    reset: dict[str, str] = {}
    for key in change.parameters:
        keys = change.made_of.get(key, ())
        having = [leaf for leaf in keys if leaf in before.states]
        if not having:
            continue
        try:
            if key in change.parted:
                raise Inexact(change.parted[key])
            if len(having) < len(keys):
                lacking = next(leaf for leaf in keys if leaf not in before.states)
                raise Inexact(f"{lacking!r}, of which it is made too, has no state")
            made[key] = old.follow(key, change.formulas[key], keys)
        except Inexact as error:
            reset[key] = str(error)
    for key in change.made.kept:
        if any(leaf in before.states for leaf in change.made_of[key]):
            reset[key] = f"it is kept, though it is no parameter of {change.label}"
    return Carried(made, reset)


def _gone(change: Change, before: Known) -> list[str]:
    """States whose parameters are no more."""
    used = {leaf for key in (*change.parameters, *change.made.kept) for leaf in change.made_of.get(key, ())}
    gone = [key for key in before.states if key not in used]
    if not gone:
        return []
    more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
    return [f"the state of {', '.join(map(repr, gone[:3]))}{more} goes with them"]


def _numbered(after: grouping.Grouping, before: Known) -> dict[str, Any]:
    """Parameter of the result → its position, group after group, or its name."""
    members = [key for group in after.groups for key in group]
    if before.by_name:
        assert before.naming is not None
        return {key: before.naming.name(key) for key in members}
    return {key: place for place, key in enumerate(members)}


def _state(
    old: Mapping[Any, Any],
    after: grouping.Grouping,
    ids: Mapping[str, Any],
    carried: Carried,
    before: Known,
    change: Change,
) -> dict[Any, Any]:
    made: dict[Any, Any] = OrderedDict() if isinstance(old, OrderedDict) else {}
    for number, group in enumerate(after.groups):
        for key in group:
            if key in carried.states:
                made[ids[key]] = carried.states[key]
            elif before.states and (new := states.fresh(before.options[number], key, change.spec(key))):
                made[ids[key]] = new
    return made


def _group(group: Mapping[str, Any], members: Sequence[str], ids: Mapping[str, Any], before: Known) -> dict[str, Any]:
    made = {**group, "params": [ids[key] for key in members]}
    if "param_names" in made:
        named = before.naming or Naming()
        made["param_names"] = [named.name(key) for key in members]
    return made

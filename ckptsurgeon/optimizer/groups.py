"""Parameter groups after a surgery: who is in which, in which order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.optimizer.leaves import Change
from ckptsurgeon.optimizer.positions import Undecided
from ckptsurgeon.tensor import TensorRef

_LISTS = ("params", "param_names")


@dataclass(frozen=True)
class Grouping:
    """The parameters of the result by group, and those of them that are new."""

    groups: tuple[tuple[str, ...], ...]
    fresh: tuple[str, ...]
    notes: tuple[str, ...] = ()


def grouped(change: Change, old: Sequence[Sequence[str]], options: Sequence[Mapping[str, Any]]) -> Grouping:
    """The new groups, from the old ones by keys of the source; Undecided where a parameter may be in several."""
    home = {key: number for number, group in enumerate(old) for key in group}
    found: dict[str, int] = {}
    new: list[str] = []
    for key in change.parameters:
        made_of = [leaf for leaf in change.made_of.get(key, ()) if leaf in home]
        if made_of:
            found[key] = _one(key, {home[leaf]: leaf for leaf in reversed(made_of)}, options)
        elif not change.made_of.get(key):
            new.append(key)
    kept = dict(found)
    before = _replaced(change) if new and len(set(home.values())) > 1 else {}
    for key in new:
        found[key] = _of_new(key, home, kept, change, before)
    notes: list[str] = []
    groups = [[key for key in change.parameters if found.get(key) == number] for number in range(len(old))]
    for number, group in enumerate(groups):
        if not _in_order(old[number], change):
            groups[number] = _as_before(group, old[number], change)
            notes.append(f"group {number} was not in the model's order, and keeps its own")
        if old[number] and not group:
            notes.append(f"group {number} is empty now")
    return Grouping(tuple(map(tuple, groups)), tuple(new), tuple(notes))


def _one(key: str, homes: Mapping[int, str], options: Sequence[Mapping[str, Any]]) -> int:
    first = min(homes)
    for number, leaf in homes.items():
        differing = [
            name
            for name in {**options[first], **options[number]}
            if name not in _LISTS and _differ(options[first].get(name), options[number].get(name))
        ]
        if differing:
            raise Undecided(
                f"{key!r} is made of {homes[first]!r} of group {first} and {leaf!r} of group {number}, which differ in "
                f"{', '.join(map(str, differing))}"
            )
    return first


def _differ(one: Any, other: Any) -> bool:
    """Whether two options are not the same; a rate may be a tensor of one number."""
    if isinstance(one, TensorRef) and isinstance(other, TensorRef) and one.numel == other.numel == 1:
        return one.spec != other.spec or b"".join(one.blocks()) != b"".join(other.blocks())
    return bool(one != other)


def _replaced(change: Change) -> dict[str, tuple[str, ...]]:
    """Name that a tensor had when it was dropped → the keys of the source that it was made of."""
    made: dict[str, tuple[str, ...]] = {key: (key,) for key in change.made.source}
    gone: dict[str, tuple[str, ...]] = {}
    for step in change.made.steps:
        new: dict[str, tuple[str, ...]] = {}
        for inputs, outputs in step.edges:
            keys = tuple(dict.fromkeys(key for name in inputs for key in made.get(name, ())))
            new.update(dict.fromkeys(outputs, keys))
            if not outputs:
                gone.update((name, made.get(name, ())) for name in inputs)
        if not step.keeps:
            for inputs, _ in step.edges:
                for name in inputs:
                    made.pop(name, None)
        made.update(new)
    return gone


def _of_new(
    key: str,
    home: Mapping[str, int],
    found: Mapping[str, int],
    change: Change,
    before: Mapping[str, tuple[str, ...]],
) -> int:
    """The group of a parameter that is new: that of the one it takes the name of, the only one, or the one that all
    parameters of its kind are in."""
    there = set(home.values())
    replaced = {home[leaf] for leaf in before.get(key, ()) if leaf in home}
    for only in (there, replaced):
        if len(only) == 1:
            return next(iter(only))
    alike = _alike(key, found, change)
    if len(alike) == 1:
        return next(iter(alike))
    raise Undecided(f"{key!r} is new, and which of the {len(there)} groups it belongs to is not known")


def _alike(key: str, found: Mapping[str, int], change: Change) -> set[int]:
    """The groups of the parameters that have the same last name and as many dimensions."""
    name = key.rpartition(".")[2]
    rank = len(change.spec(key).shape)
    return {
        number
        for other, number in found.items()
        if other.rpartition(".")[2] == name and len(change.spec(other).shape) == rank
    }


def _in_order(group: Sequence[str], change: Change) -> bool:
    places = {key: place for place, key in enumerate(change.candidates)}
    numbers = [places[key] for key in group if key in places]
    return numbers == sorted(numbers)


def _as_before(group: Collection[str], old: Sequence[str], change: Change) -> list[str]:
    """In the order of what they are made of; what is new comes last."""
    places = {key: place for place, key in enumerate(old)}
    last = len(places)

    def place(key: str) -> int:
        return min((places[leaf] for leaf in change.made_of.get(key, ()) if leaf in places), default=last)

    return sorted(group, key=place)

"""Other tensors that are keyed by parameter: averages (EMA) by name, shadow parameters by position."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ckptsurgeon.optimizer.leaves import Change
from ckptsurgeon.optimizer.moments import Follower, Inexact
from ckptsurgeon.optimizer.naming import Naming, naming
from ckptsurgeon.plans import Followed
from ckptsurgeon.tensor import TensorRef

_HALF = 0.5


def follow(change: Change, place: str, value: Any) -> tuple[Any, Followed] | None:
    """A copy of the weights for the result of a surgery (None in its place where it is left out), and what became of
    it; None for what is no copy of them."""
    if isinstance(value, dict):
        return _by_name(change, place, value)
    return _by_position(change, place, value)


def _by_name(change: Change, place: str, value: dict[Any, Any]) -> tuple[Any, Followed] | None:
    source = change.made.source
    held = {name: ref for name, ref in value.items() if isinstance(name, str) and isinstance(ref, TensorRef)}
    found = naming(held, source, change.prefixes)
    if found is None:
        shared = sum(name in source and source[name].shape == ref.shape for name, ref in held.items())
        if shared < max(2, _HALF * len(held)):
            return None
        why = f"{len(held) - shared} of its {len(held)} tensors are no keys of the checkpoint"
        return value, Followed(place, "copy", left=why, kept=True)
    keys = {found.key(name) or "": ref for name, ref in held.items()}
    if not all("." in key for key in keys) and len(keys) < _HALF * len(source):
        return None  # a `weight` and a `bias` of their own
    other = next((key for key, ref in keys.items() if ref.shape != source[key].shape), None)
    if other is not None:
        why = f"its {other!r} is {list(keys[other].shape)}, and the checkpoint's {list(source[other].shape)}"
        return value, Followed(place, "copy", left=why, kept=True)
    try:
        made = _followed(change, keys, change.formulas)
    except Inexact as error:
        return None, Followed(place, "copy", left=str(error))
    rest = {name: member for name, member in value.items() if name not in held}
    items = {found.name(key): ref for key, ref in made.items()} | rest
    return _like(value, items, found, change), Followed(place, "copy", tuple(made))


def _like(old: dict[Any, Any], items: dict[Any, Any], found: Naming, change: Change) -> dict[Any, Any]:
    if not isinstance(old, OrderedDict):
        return items
    made = OrderedDict(items)
    if getattr(old, "_metadata", None):
        versions = change.made.result.versions
        made._metadata = {found.name(prefix): dict(one) for prefix, one in versions.items()}  # type: ignore[attr-defined]
    return made


def _followed(change: Change, held: Mapping[str, TensorRef], wanted: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """What the formulas make of a copy that has some of the keys: all of which it has everything."""
    first = {key: group[0] for group in change.made.source.tied() for key in group}
    there = {first.get(key, key): ref for key, ref in held.items()}
    all_parameters = all(key in there for key in change.candidates)
    every = all(first.get(key, key) in there for key in change.made.source)
    parameters = set(change.parameters)
    follower = Follower(lambda key: there[key], values=True)
    made: dict[str, TensorRef] = {}
    for key, formula in wanted.items():
        keys = change.made_of[key]
        lacking = [leaf for leaf in keys if leaf not in there]
        if keys and len(lacking) == len(keys):
            continue
        if lacking:
            raise Inexact(f"it has no {lacking[0]!r}, of which {key!r} is made")
        if keys or every or (all_parameters and key in parameters):
            made[key] = follower.follow(formula)
    return made


def _by_position(change: Change, place: str, value: Sequence[TensorRef]) -> tuple[Any, Followed] | None:
    candidates = list(change.candidates.items())
    if len(candidates) < 2 or [ref.shape for ref in value] != [ref.shape for _, ref in candidates]:
        return None
    held = {key: ref for (key, _), ref in zip(candidates, value, strict=True)}
    wanted = {key: change.formulas[key] for key in change.parameters if key in change.formulas}
    try:
        made = _followed(change, held, wanted)
    except Inexact as error:
        return None, Followed(place, "copy", left=str(error))
    return type(value)(made.values()), Followed(place, "copy", tuple(made))  # type: ignore[call-arg]

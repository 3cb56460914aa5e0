"""Other tensors that are keyed by parameter: averages (EMA) by name, shadow parameters by position."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ckptsurgeon.checkpoint import Step
from ckptsurgeon.optimizer.leaves import Change
from ckptsurgeon.optimizer.moments import Follower, Inexact, shifts
from ckptsurgeon.optimizer.naming import Naming, naming
from ckptsurgeon.optimizer.positions import Strange, Undecided, assigned
from ckptsurgeon.plans import Followed
from ckptsurgeon.tensor import TensorRef

Path = tuple[Step, ...]
_AVERAGES = re.compile(r"ema|av(era)?g|mean|shadow|swa|polyak|teacher|target|slow|momentum|copy|best", re.IGNORECASE)
"""What averages of weights are called.  Other things of the same shapes (gradients, their squares) change otherwise
than weights where a surgery changes values."""


def follow(change: Change, path: Path, value: Any) -> tuple[Any, Followed] | None:
    """A copy of the weights for the result of a surgery (None in its place where it is left out), and what became of
    it; None for what is no copy of them."""
    place = ".".join(map(str, path)) or "."
    values = any(_AVERAGES.search(str(step)) for step in path)
    if isinstance(value, dict):
        return _by_name(change, place, value, values)
    return _by_position(change, place, value, values)


def _by_name(change: Change, place: str, value: dict[Any, Any], values: bool) -> tuple[Any, Followed] | None:
    source = change.made.source
    every = {name: ref for name, ref in value.items() if isinstance(name, str) and isinstance(ref, TensorRef)}
    held = {name: ref for name, ref in every.items() if ref.shape or name in source}  # counters stand beside averages
    found = naming(held, source, change.prefixes) or naming(every, source, change.prefixes)
    if found is None:
        shared = sum(name in source and source[name].shape == ref.shape for name, ref in held.items())
        if shared < max(2, len(held) / 2):
            return None
        why = f"{len(held) - shared} of its {len(held)} tensors are no keys of the checkpoint"
        return value, Followed(place, "copy", left=why, kept=True)
    keys = {key: ref for name, ref in every.items() if (key := found.key(name)) is not None and key in source}
    if not keys or (not all("." in key for key in keys) and len(keys) < len(source) / 2):
        return None  # a `weight` and a `bias` of their own
    other = next((key for key, ref in keys.items() if ref.shape != source[key].shape), None)
    if other is not None:
        why = f"its {other!r} is {list(keys[other].shape)}, and the checkpoint's {list(source[other].shape)}"
        return value, Followed(place, "copy", left=why, kept=True)
    try:
        made = _followed(change, keys, change.formulas, values)
    except Inexact as error:
        return _not_followed(place, value, values, error)
    taken = {found.name(key) for key in keys}
    items = {found.name(key): ref for key, ref in made.items()}
    items |= {name: member for name, member in value.items() if name not in taken and name not in items}
    return _like(value, items, found, change), Followed(place, "copy", tuple(made))


def _not_followed(place: str, value: Any, values: bool, why: Inexact) -> tuple[Any, Followed]:
    """An average that cannot follow is left out; what may be something else stays as it was."""
    if values:
        return None, Followed(place, "copy", left=str(why))
    return value, Followed(place, "copy", left=f"it is called as no average is, and {why}", kept=True)


def _like(old: dict[Any, Any], items: dict[Any, Any], found: Naming, change: Change) -> dict[Any, Any]:
    if not isinstance(old, OrderedDict):
        return items
    made = OrderedDict(items)
    if getattr(old, "_metadata", None):
        versions = change.made.result.versions
        made._metadata = {found.name(prefix): dict(one) for prefix, one in versions.items()}  # type: ignore[attr-defined]
    return made


def _followed(
    change: Change, held: Mapping[str, TensorRef], wanted: Mapping[str, TensorRef], values: bool
) -> dict[str, TensorRef]:
    """What the formulas make of a copy that has some of the keys: all of which it has everything.

    Of what is no average (not `values`) nothing is known but that it goes with the elements.
    """
    there = {change.first.get(key, key): ref for key, ref in held.items()}
    all_parameters = all(key in there for key in change.candidates)
    every = all(change.first.get(key, key) in there for key in change.made.source)
    parameters = set(change.parameters)
    follower = Follower(lambda key: there[key], values=values)
    made: dict[str, TensorRef] = {}
    for key, formula in wanted.items():
        keys = change.made_of[key]
        lacking = [leaf for leaf in keys if leaf not in there]
        if keys and len(lacking) == len(keys):
            continue
        if lacking:
            raise Inexact(f"it has no {lacking[0]!r}, of which {key!r} is made")
        if keys or every or (all_parameters and key in parameters):
            if not values and shifts(formula):
                raise Inexact("the weight is shifted or bounded")
            made[key] = follower.follow(formula)
    return made


def _by_position(change: Change, place: str, value: Sequence[TensorRef], values: bool) -> tuple[Any, Followed] | None:
    shapes = {key: ref.shape for key, ref in change.candidates.items()}
    few = len(value) < 2 or (not values and len(value) < len(shapes) / 2)
    if few or not all(ref.shape for ref in value):
        return None  # losses, counters, states of random numbers
    try:
        (keys,) = assigned([[ref.shape for ref in value]], shapes)
        for why in (change.unordered, change.unnumbered):
            if why:
                raise Undecided(why)
    except Strange:
        return None
    except Undecided as error:
        return value, Followed(place, "copy", left=str(error), kept=True)
    held = dict(zip(keys, value, strict=True))
    wanted = {key: change.formulas[key] for key in change.parameters if key in change.formulas}
    try:
        made = _followed(change, held, wanted, values)
    except Inexact as error:
        return _not_followed(place, value, values, error)
    return type(value)(made.values()), Followed(place, "copy", tuple(made))  # type: ignore[call-arg]

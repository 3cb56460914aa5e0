"""One to one: the assignment of slots with the most points, and how much worse the next best one is.

Shapes say what may go together at all; slots that may are solved together by an exact solver (scipy), never one after
another.  For every match the cheapest cycle of exchanges tells what it would cost to have it otherwise: that is its
margin, and where it is no more than nothing, names do not tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from ckptsurgeon.aligner import scores
from ckptsurgeon.aligner.scores import TELLING, Roles
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.votes import Votes

if TYPE_CHECKING:
    from ckptsurgeon.aligner.scores import Matrix

_ROUNDS = 3
_MOST = 1500
_MANY = 8
_MOST_CYCLES = 300
_MOST_RIVALS = 64
_ORDER = 1e-3
Allowed = Callable[[Slot, Slot], bool]


@dataclass(eq=False)
class Pair:
    """Two slots that go together.

    `margin` is what the best assignment without it has fewer points; `rivals` are the slots of the source that could
    take its place as well; `points` are its own."""

    source: Slot
    target: Slot
    roles: Roles
    points: float = 0.0
    margin: float = float("inf")
    rivals: list[Slot] = field(default_factory=list)
    alone: bool = False
    """Whether no other slot of either side could go with one of them."""


@dataclass(eq=False)
class Outcome:
    """What went together, and the slots that are left on each side; `crowds` had too many alike to be told apart."""

    pairs: list[Pair]
    sources: list[Slot]
    targets: list[Slot]
    crowds: list[tuple[list[Slot], list[Slot]]] = field(default_factory=list)


def match(sources: Sequence[Slot], targets: Sequence[Slot], votes: Votes, allowed: Allowed | None = None) -> Outcome:
    """The best assignment; what is sure in one round helps to tell the rest in the next."""
    told = scores.rarity(sources, targets)
    buckets = _buckets(sources, targets)
    out = Outcome([], [], [])
    solved: list[Outcome] = []
    for number in range(_ROUNDS):
        before = {(id(pair.source), id(pair.target), pair.margin >= TELLING) for pair in out.pairs}
        for place, (some, others) in enumerate(buckets):
            if number and _is_sure(solved[place], votes, some, others):
                continue
            found = Outcome([], [], [])
            _solve(some, others, told, votes, allowed, found)
            solved[place : place + 1] = [found]
        out.pairs = [pair for one in solved for pair in one.pairs]
        out.crowds = [crowd for one in solved for crowd in one.crowds]
        now = {(id(pair.source), id(pair.target), pair.margin >= TELLING) for pair in out.pairs}
        if number and now == before:
            break
        for pair in out.pairs:
            if pair.margin >= TELLING and number < _ROUNDS - 1:
                votes.add(pair.source.path, pair.target.path)
    here, there = {id(pair.source) for pair in out.pairs}, {id(pair.target) for pair in out.pairs}
    out.sources = [slot for slot in sources if id(slot) not in here]
    out.targets = [slot for slot in targets if id(slot) not in there]
    return out


def _is_sure(found: Outcome, votes: Votes, some: list[Slot], others: list[Slot]) -> bool:
    """Whether another round would change nothing: there is one way only, or no module above has been met."""
    if found.crowds or (all(pair.alone for pair in found.pairs) and len(found.pairs) == len(some) == len(others)):
        return True
    return not votes.table([slot.path for slot in some], [slot.path for slot in others]).any()


def _buckets(sources: Sequence[Slot], targets: Sequence[Slot]) -> list[tuple[list[Slot], list[Slot]]]:
    """Slots of the same blocks whose main tensors have as many elements."""
    made: dict[object, tuple[list[Slot], list[Slot]]] = defaultdict(lambda: ([], []))
    for side, some in enumerate((sources, targets)):
        for slot in some:
            role = next((role for role in ("weight", "own", "v") if role in slot.shapes), next(iter(slot.shapes)))
            made[slot.present, tuple(map(prod, slot.shapes[role]))][side].append(slot)
    return [both for both in made.values() if both[0] and both[1]]


def _solve(
    some: list[Slot], others: list[Slot], told: dict[str, float], votes: Votes, allowed: Allowed | None, out: Outcome
) -> None:
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    if max(len(some), len(others)) > _MOST:
        _by_path(some, others, out)
        return
    if allowed is None and _is_same(some, others, out):
        return
    fits, costs = _fits(some, others)
    points = np.maximum(scores.matrix(some, others, told, votes) - costs, 0.0)
    if allowed is not None:
        points *= [[allowed(a, b) for b in others] for a in some]
    apart = np.abs(_places(some)[:, None] - _places(others)[None, :])
    rows, columns = linear_sum_assignment(points - _ORDER * apart * (points > 0), maximize=True)
    margins, alike = _margins(points, rows.tolist(), columns.tolist())
    made: dict[int, Pair] = {}
    rivals = (points > 0).sum(axis=1).tolist(), (points > 0).sum(axis=0).tolist()
    for at, (i, j) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        found = fits[signature(some[i]), signature(others[j])]
        if found is None or points[i, j] <= 0:
            continue
        alone = rivals[0][i] == 1 and rivals[1][j] == 1
        made[at] = Pair(some[i], others[j], found[0], float(points[i, j]), margins[at], alone=alone)
        made[at].rivals = [some[row] for row in alike[at] if row < len(some) and row != i]
    out.pairs += made.values()


Fits = Mapping[tuple[Hashable, Hashable], tuple[Roles, float] | None]


def signature(slot: Slot) -> Hashable:
    """All that decides whether shapes allow a match."""
    return slot.present, tuple(slot.shapes.items())


def _fits(some: list[Slot], others: list[Slot]) -> tuple[Fits, Matrix]:
    """What shapes allow, by signatures, and what it costs: without end where they do not."""
    import numpy as np

    ours, theirs = ([signature(slot) for slot in side] for side in (some, others))
    examples = [dict(zip(signs, side, strict=True)) for signs, side in ((ours, some), (theirs, others))]
    found = {(a, b): scores.fitting(one, other) for a, one in examples[0].items() for b, other in examples[1].items()}
    places = [{sign: place for place, sign in enumerate(side)} for side in examples]
    small = np.array([[np.inf if (one := found[a, b]) is None else one[1] for b in places[1]] for a in places[0]])
    costs: Matrix = small[np.ix_([places[0][sign] for sign in ours], [places[1][sign] for sign in theirs])]
    return found, costs


def _is_same(some: list[Slot], others: list[Slot], out: Outcome) -> bool:
    """Match slots of the same names, where all names and all shapes are the same on both sides."""
    named = {slot.path: slot for slot in some}
    if len(some) < _MANY or len(some) != len(others) or {slot.path for slot in others} != named.keys():
        return False
    if any(signature(named[slot.path]) != signature(slot) for slot in others):
        return False
    _by_path(some, others, out)
    return True


def _by_path(some: list[Slot], others: list[Slot], out: Outcome) -> None:
    """Too many to compare: what has the same name goes together, if all do."""
    named = {slot.path: slot for slot in some}
    pairs = []
    for other in others:
        slot = named.get(other.path)
        found = None if slot is None else scores.fitting(slot, other)
        if slot is None or found is None:
            out.crowds.append((some, others))
            return
        pairs.append(Pair(slot, other, found[0], scores.MATCH + scores.MEANING))
    out.pairs += pairs


def _places(some: Sequence[Slot]) -> Matrix:
    """The place of each slot among the others in the order of keys, from 0 to 1."""
    import numpy as np

    order = np.argsort(np.argsort([slot.at for slot in some]))
    places: Matrix = order / max(len(some) - 1, 1)
    return places


def _margins(points: Matrix, rows: list[int], columns: list[int]) -> tuple[list[float], list[list[int]]]:
    """For each match the loss of the best assignment without it, and the rows with which it could be exchanged for
    less than what tells."""
    import numpy as np

    size = max(points.shape)
    padded = np.zeros((size, size))
    padded[: points.shape[0], : points.shape[1]] = points
    taken = np.full(size, -1)
    taken[rows] = columns
    taken_columns = set(columns)
    free = [column for column in range(size) if column not in taken_columns]
    for row in range(size):
        if taken[row] < 0:
            taken[row] = free.pop()
    loss = padded[np.arange(size), taken][:, None] - padded[:, taken]
    np.fill_diagonal(loss, np.inf)
    back = loss.copy()
    if size <= _MOST_CYCLES:
        for middle in range(size):
            np.minimum(back, back[:, middle, None] + back[None, middle, :], out=back)
    cycles = np.maximum(loss + back.T, 0.0) if size > 1 else np.full((1, 1), np.inf)
    best = padded[np.arange(size), taken]  # nothing at all in its place
    margins = np.minimum(cycles.min(axis=1), np.where(best > 0, best, np.inf))
    near = cycles < TELLING
    alike = [np.nonzero(near[row])[0][:_MOST_RIVALS].tolist() for row in rows]
    return margins[rows].tolist(), alike

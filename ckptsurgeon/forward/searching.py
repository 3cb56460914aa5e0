"""The search for the assignment under which outputs are equal: all of them where they are few, else downhill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, permutations, product
from math import inf, perm, prod

from ckptsurgeon.aligner import Opening, Verdict
from ckptsurgeon.forward.bench import Bench, Pieces, State, pieces_of

_MOST = 128
"""Assignments up to which all are tried."""
_MOST_STARTS = 50
_MOST_RUNS = 512
"""Runs of the model that all ways downhill may take."""
_NOISE = 1e-2
"""What the rounding of float32 may come to in deep networks: the best is held against float64 afterwards."""
_APART = 10.0
"""By how much an error must be above that of the best to count as another."""


@dataclass(frozen=True)
class Found:
    """The assignments with equal outputs, the best first, the error of that and of the next that is not equal; `whole`
    tells that all were tried."""

    equal: tuple[State, ...]
    error: float
    next: float | None
    count: int
    whole: bool


def best(openings: Sequence[Opening], pieces: Pieces, bench: Bench, tolerance: float) -> Found:
    """Try assignments."""
    whole = prod(_count(one) for one in openings) <= _MOST
    if whole:
        for state in product(*(_all(one, pieces) for one in openings)):
            bench.error(state)
    else:
        _downhill(openings, pieces, bench, tolerance)
    ranked = sorted(bench.errors, key=bench.errors.__getitem__)
    if not ranked:
        return Found((), inf, None, 0, whole)
    least = bench.errors[ranked[0]]
    limit = max(tolerance, _APART * least)
    equal = tuple(one for one in ranked if bench.errors[one] <= limit) if least <= max(tolerance, _NOISE) else ()
    others = [error for error in bench.errors.values() if error > limit]
    return Found(equal, least, min(others, default=None), len(ranked), whole)


def _count(opening: Opening) -> int:
    return perm(len(opening.sources), len(opening.targets)) * prod(opening.turns)


def _all(opening: Opening, pieces: Pieces) -> Iterator[Verdict]:
    """Every decision about an opening."""
    for places in permutations(range(len(opening.sources)), len(opening.targets)):
        for turns in product(*map(range, opening.turns)):
            one = Verdict(opening, places, turns)
            if _is_there(one, pieces):
                yield one


def _is_there(one: Verdict, pieces: Pieces) -> bool:
    return all(piece in pieces for piece in pieces_of((one,)))


def _downhill(openings: Sequence[Opening], pieces: Pieces, bench: Bench, tolerance: float) -> None:
    """From one assignment after another to the best neighbour, until none is better; at the end all neighbours of the
    best, and what two changes in the same blocks make of it, which shows whether it alone is right: of branches side by
    side, all that belongs to one has to change at once."""
    for start in _starts(openings, pieces):
        if _descended(start, pieces, bench) <= tolerance or len(bench.errors) >= _MOST_RUNS:
            break
    if bench.errors:
        least = min(bench.errors, key=bench.errors.__getitem__)
        for one in islice(chain(_near(least, pieces), _beside(least, pieces)), _MOST_RUNS):
            bench.error(one)


def _descended(state: State, pieces: Pieces, bench: Bench) -> float:
    """The error at the end of a way downhill."""
    while len(bench.errors) < _MOST_RUNS:
        near = min(islice(_near(state, pieces), _MOST_RUNS), key=bench.distance, default=state)
        if bench.distance(near) >= bench.distance(state):
            break
        state = near
    return bench.error(state)


def _starts(openings: Sequence[Opening], pieces: Pieces) -> Iterator[State]:
    """The assignment in order, that with all squares turned, and others at random, the same every time."""
    import torch

    chance = torch.Generator().manual_seed(0)
    for number in range(_MOST_STARTS):
        made = []
        for one in openings:
            count = len(one.sources)
            places = torch.randperm(count, generator=chance).tolist() if number > 1 else list(range(count))
            drawn = torch.rand(len(one.turns), generator=chance).tolist()
            turns = (
                int(part * ways) if number > 1 else min(number, ways - 1)
                for part, ways in zip(drawn, one.turns, strict=True)
            )
            made.append(Verdict(one, tuple(places[: len(one.targets)]), tuple(turns)))
        if all(_is_there(one, pieces) for one in made):
            yield tuple(made)


def _near(state: State, pieces: Pieces) -> Iterator[State]:
    """Assignments that differ in one exchange, one spare source, or one turn."""
    for at, one in enumerate(state):
        for other in _moves(one):
            if _is_there(other, pieces):
                yield (*state[:at], other, *state[at + 1 :])


def _beside(state: State, pieces: Pieces) -> Iterator[State]:
    """Assignments that differ in two openings of one group."""
    for near in _near(state, pieces):
        at = next(at for at, one in enumerate(near) if one != state[at])
        for after in range(at + 1, len(state)):
            if state[after].opening.group == state[at].opening.group:
                for other in _near((near[after],), pieces):
                    yield (*near[:after], *other, *near[after + 1 :])


def _moves(one: Verdict) -> Iterator[Verdict]:
    places, opening = one.places, one.opening
    for here, place in enumerate(places):
        for there in range(here + 1, len(places)):
            made = list(places)
            made[here], made[there] = made[there], place
            yield Verdict(opening, tuple(made), one.turns)
        for spare in set(range(len(opening.sources))) - set(places):
            yield Verdict(opening, (*places[:here], spare, *places[here + 1 :]), one.turns)
        for turn in set(range(opening.turns[here])) - {one.turns[here]}:
            yield Verdict(opening, places, (*one.turns[:here], turn, *one.turns[here + 1 :]))

"""The search for the assignment under which outputs are equal: all of them where they are few, else downhill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations, product
from math import inf, perm, prod

from ckptsurgeon.aligner import Opening, Verdict
from ckptsurgeon.forward.bench import Bench, Pieces, State, pieces_of

_MOST = 64
"""Assignments up to which all are tried."""
_MOST_RUNS = 512
"""Runs of the model that a way downhill may take."""
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
    """From the assignment in order, and from that with all squares turned, to the best neighbour until none is better;
    then all neighbours of the best, which shows whether it alone is right."""
    for turned in (False, True):
        state = _start(openings, pieces, turned)
        if state is None:
            continue
        error = bench.error(state)
        while error > tolerance and len(bench.errors) < _MOST_RUNS:
            near = {one: bench.error(one) for one in islice(_near(state, pieces), _MOST_RUNS)}
            if not near or min(near.values()) >= error:
                break
            state, error = min(near.items(), key=_second)
    if bench.errors:
        least = min(bench.errors.items(), key=_second)[0]
        for one in islice(_near(least, pieces), _MOST_RUNS):
            bench.error(one)


def _second(pair: tuple[State, float]) -> float:
    return pair[1]


def _start(openings: Sequence[Opening], pieces: Pieces, turned: bool) -> State | None:
    made = []
    for one in openings:
        turns = tuple(min(1, ways - 1) if turned else 0 for ways in one.turns)
        plain = Verdict(one, tuple(range(len(one.targets))), turns)
        found = plain if _is_there(plain, pieces) else next(_all(one, pieces), None)
        if found is None:
            return None
        made.append(found)
    return tuple(made)


def _near(state: State, pieces: Mapping[tuple[Opening, int, int, int], object]) -> Iterator[State]:
    """Assignments that differ in one exchange, one spare source, or one turn."""
    for at, one in enumerate(state):
        for other in _moves(one):
            if all(piece in pieces for piece in pieces_of((other,))):
                yield (*state[:at], other, *state[at + 1 :])


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

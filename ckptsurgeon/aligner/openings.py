"""What is open and could be decided from outside, as by an experiment: which of a few twins goes where, and which way a
square lies; and how a decision is heeded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ckptsurgeon.aligner import layouts, reasons, scores
from ckptsurgeon.aligner.groups import Group
from ckptsurgeon.aligner.matching import Allowed, Pair
from ckptsurgeon.aligner.relations import Order
from ckptsurgeon.aligner.scores import TELLING
from ckptsurgeon.aligner.slots import Slot

if TYPE_CHECKING:
    from ckptsurgeon.aligner.finding import Decided

Asked = Sequence[tuple[Pair, str]]
"""Matches and the roles whose layout is open."""


class Spot(NamedTuple):
    """A slot by its name in its group, and the blocks that have it."""

    path: str
    present: tuple[int, ...]


@dataclass(frozen=True)
class Opening:
    """Slots of the target of which each may come from several of some slots of the source, and lie in several ways.

    `fits` are the places in `sources` that each of the `targets` could take, `turns` in how many ways it may lie,
    `keys` its keys; `group` is the place of the group among all.
    """

    group: int
    sources: tuple[Spot, ...]
    targets: tuple[Spot, ...]
    fits: tuple[tuple[int, ...], ...]
    turns: tuple[int, ...]
    keys: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Verdict:
    """A decision about an opening: which of its sources each target takes (-1 for none), and which way that
    lies."""

    opening: Opening
    places: tuple[int, ...]
    turns: tuple[int, ...]


def settle(groups: Sequence[Group], verdicts: Sequence[Verdict]) -> dict[int, int]:
    """Put the matches as they were decided; by the identity of each that was, which way it lies."""
    made: dict[int, int] = {}
    for one in verdicts:
        out, opening = groups[one.opening.group].outcome, one.opening
        sources = {_spot(slot): slot for slot in (*(pair.source for pair in out.pairs), *out.sources)}
        wanted = dict(zip(opening.targets, zip(one.places, one.turns, strict=True), strict=True))
        pairs = []
        for pair in out.pairs:
            place = wanted.get(_spot(pair.target))
            if place is not None and place[0] < 0:
                out.targets.append(pair.target)
                continue
            if place is not None:
                source = sources[opening.sources[place[0]]]
                found = scores.fitting(source, pair.target)
                assert found is not None, "an opening has only what fits"
                pair = Pair(source, pair.target, found[0], pair.points)
                made[id(pair)] = place[1]
            pairs.append(pair)
        taken = {id(pair.source) for pair in pairs}
        out.pairs, out.sources = pairs, [slot for slot in sources.values() if id(slot) not in taken]
    return made


def turn(asked: Asked, decided: Mapping[int, int], orders: dict[int, dict[str, Order]]) -> Asked:
    """Put the order of dimensions as it was decided; what is still asked."""
    left = []
    for pair, role in asked:
        if id(pair) not in decided:
            left.append((pair, role))
            continue
        ways = pair.roles[role][1].orders
        number = min(decided[id(pair)], _ways(pair, role) - 1)
        if len(ways) > 1:
            orders.setdefault(id(pair), {})[role] = ways[number]
        elif number:
            orders.setdefault(id(pair), {})[role + layouts.PARTS] = (1, 0)
    return left


def openings(
    decided: Sequence[Decided], groups: Sequence[Group], asked: Asked, allowed: Allowed | None
) -> Iterator[Opening]:
    """All that is open and could be decided from outside."""
    ways = {id(pair): _ways(pair, role) for pair, role in asked}
    for number, group in enumerate(groups):
        own = [one.pair for one in decided if one.group is group and one.grade == "open" and one.asked is not None]
        own = [pair for pair in own if pair in group.outcome.pairs and not group.doubt]
        twins = [pair for pair in own if pair.margin < TELLING]
        for some in _families(twins):
            yield _opening(number, some, _spare(some, group), ways, allowed)
        for pair in own:
            if pair.margin >= TELLING and id(pair) in ways and not reasons.is_weak(pair, group):
                yield _opening(number, [pair], [], ways, allowed)


def _opening(
    group: int, pairs: Sequence[Pair], spare: Sequence[Slot], ways: Mapping[int, int], allowed: Allowed | None
) -> Opening:
    sources = [*(pair.source for pair in pairs), *spare]
    fits = tuple(
        tuple(at for at, slot in enumerate(sources) if slot is pair.source or _may(slot, pair.target, allowed))
        for pair in pairs
    )
    keys = tuple(tuple(leaf.key for unit in pair.target.every() for leaf in unit.leaves.values()) for pair in pairs)
    turns = tuple(ways.get(id(pair), 1) for pair in pairs)
    return Opening(group, tuple(map(_spot, sources)), tuple(_spot(pair.target) for pair in pairs), fits, turns, keys)


def _may(source: Slot, target: Slot, allowed: Allowed | None) -> bool:
    return scores.fitting(source, target) is not None and (allowed is None or allowed(source, target))


def _families(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Matches that could be exchanged for each other, directly or by others between them."""
    made: list[list[Pair]] = []
    for pair in pairs:
        near = {id(pair.source), *map(id, pair.rivals)}
        joined = [pair]
        for family in [one for one in made if any(_near(other, near) for other in one)]:
            made.remove(family)
            joined = family + joined
        made.append(joined)
    return made


def _near(pair: Pair, slots: set[int]) -> bool:
    return not slots.isdisjoint((id(pair.source), *map(id, pair.rivals)))


def _spare(pairs: Sequence[Pair], group: Group) -> list[Slot]:
    """Slots of the source that no match has and some of these could."""
    free = {id(slot) for slot in group.outcome.sources}
    found = {id(slot): slot for pair in pairs for slot in pair.rivals if id(slot) in free}
    return list(found.values())


def _ways(pair: Pair, role: str) -> int:
    count = len(pair.roles[role][1].orders)
    return count if count > 1 else 2


def _spot(slot: Slot) -> Spot:
    return Spot(slot.path, slot.present)

"""Groups: pairs of runs, block by block, and what is outside of them; each is solved as one small problem."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.aligner import matching, runs, slots, vocabulary
from ckptsurgeon.aligner.matching import Allowed, Outcome
from ckptsurgeon.aligner.runs import Meeting, Run
from ckptsurgeon.aligner.scores import TELLING
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.units import Side, Unit
from ckptsurgeon.aligner.votes import Votes


@dataclass(eq=False)
class Group:
    """Blocks that go together, as pairs of their paths ("" for what is outside of blocks), and what was found in them.

    `doubt` says why the blocks themselves may be the wrong ones; `spare` are blocks of each side without a partner.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    outcome: Outcome
    computed: Outcome
    meeting: Meeting | None = None
    doubt: str = ""
    rivals: tuple[str, ...] = ()
    spare: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


@dataclass(eq=False)
class _Left:
    """The units of both sides that no group has taken yet."""

    sources: list[Unit]
    targets: list[Unit]
    votes: Votes = field(default_factory=Votes)
    any: bool = False
    """Whether runs have been taken already."""


def groups(source: Side, target: Side, allowed: Allowed | None = None) -> list[Group]:
    """All groups, those of blocks first and the rest last."""
    left = _Left(list(source.units), list(target.units))
    made = []
    while True:
        found = _next(left, allowed)
        if found is None:
            break
        made += [_blocks(left, one, source, doubt, rivals, allowed) for one, doubt, rivals in found]
    return [*made, _outside(left, made, allowed)]


def _outside(left: _Left, made: Sequence[Group], allowed: Allowed | None) -> Group:
    """The group of all that is in no block, and of what blocks have left: one library keeps in a block what the other
    numbers outside of them (`norm1`, the last norm of a stage)."""
    sure = [group for group in made if not group.doubt]
    over = [[unit for group in sure for slot in _over(group, side) for unit in slot.every()] for side in (0, 1)]
    ours = [*left.sources, *(over[0] if left.targets else ())]
    others = [*left.targets, *(over[1] if left.sources else ())]
    outcome, computed = _solved([("", ours)], [("", others)], left.votes, allowed)
    used = {id(unit) for pair in outcome.pairs for slot in (pair.source, pair.target) for unit in slot.every()}
    for group in sure:
        for side in (0, 1):
            _over(group, side)[:] = [
                one for one in _over(group, side) if not all(id(unit) in used for unit in one.every())
            ]
    kept = {id(unit) for unit in (*left.sources, *left.targets)}
    for some in (outcome.sources, outcome.targets):
        some[:] = [slot for slot in some if any(id(unit) in kept for unit in slot.every())]
    return Group("outside of blocks", (("", ""),), outcome, computed)


def _over(group: Group, side: int) -> list[Slot]:
    return group.outcome.targets if side else group.outcome.sources


def _next(left: _Left, allowed: Allowed | None) -> list[tuple[Meeting, str, tuple[str, ...]]] | None:
    """The runs that go together best, with why they may not; None where there are none."""
    found = runs.meetings(runs.runs(left.sources), runs.runs(left.targets))
    if not found:
        return None
    best = found[0]
    equal = [one for one in found if one.rank == best.rank and _sizes(one) == _sizes(best)]
    sources, targets = _outermost(one.source for one in equal), _outermost(one.target for one in equal)
    ours, others = ([_stand_in(run) for run in side] for side in (sources, targets))
    out = matching.match(ours, others, left.votes.copy(), allowed)
    by_slot = {id(slot): run for slot, run in zip((*ours, *others), (*sources, *targets), strict=True)}
    meetings = {(one.source.pattern, one.target.pattern): one for one in equal}
    made = []
    for pair in out.pairs:
        one = meetings.get((by_slot[id(pair.source)].pattern, by_slot[id(pair.target)].pattern))
        if one is None:
            continue
        several = len(sources) > 1 or len(targets) > 1
        doubt = "other blocks are as alike, and names do not tell" if several and pair.margin < TELLING else ""
        rivals = tuple(run.pattern for run in sources if run is not one.source) if doubt else ()
        if left.any and not doubt and _is_strange(one, left.votes):
            doubt = "their names have nothing in common, though others go together"
        if not one.unique:
            doubt = f"{len(one.source.blocks)} blocks fit {len(one.target.blocks)} in more than one way"
        made.append((one, doubt, rivals))
    if made:
        return made
    if allowed is not None:  # a hint forbids the best: what it allows may be worse
        for one in found:
            if allowed(_stand_in(one.source), _stand_in(one.target)):
                return [(one, "" if one.unique else "more than one way", ())]
    return None


def _is_strange(one: Meeting, votes: Votes) -> bool:
    """Whether the names of two runs both say something, and nothing of it is the same."""
    a, b = one.source.pattern, one.target.pattern
    known, wanted = (set(vocabulary.words(runs.way(run))) for run in (one.source, one.target))
    return bool(known) and bool(wanted) and not known & wanted and not votes.bonus(a, b)


def _sizes(one: Meeting) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return one.source.sizes, one.target.sizes


def _outermost(some: Iterable[Run]) -> list[Run]:
    """Runs that do not lie in each other."""
    made: list[Run] = []
    for run in sorted({run.pattern: run for run in some}.values(), key=lambda run: len(run.pattern)):
        if not any(run.pattern.startswith(other.pattern + ".") for other in made):
            made.append(run)
    return sorted(made, key=lambda run: min(unit.at for unit in run.blocks[0].units))


def _stand_in(run: Run) -> Slot:
    """A run as something that is matched by its name."""
    path = run.pattern.replace("{}", "0")
    return slots.described([Slot(path, (0,), tuple(run.blocks[0].units[:1]), {"own": ((1,),)}, is_run=True)])[0]


def _blocks(
    left: _Left, one: Meeting, source: Side, doubt: str, rivals: tuple[str, ...], allowed: Allowed | None
) -> Group:
    """The group of two runs; their units are taken."""
    ours = [one.source.blocks[here] for here, _ in one.pairs]
    others = [one.target.blocks[there] for _, there in one.pairs]
    taken = {id(unit) for block in (*ours, *others) for unit in block.units}
    left.sources = [unit for unit in left.sources if id(unit) not in taken]
    left.targets = [unit for unit in left.targets if id(unit) not in taken]
    left.any = True
    left.votes.add(one.source.pattern + ".", one.target.pattern + ".", sum(len(block.units) for block in others))
    if not doubt and source.in_order and one.source.is_shuffled and len(set(one.source.sizes)) < len(ours):
        doubt = "the file has the blocks in another order than that of their numbers"
    outcome, computed = _solved(
        [(block.path, block.units) for block in ours],
        [(block.path, block.units) for block in others],
        Votes(),
        allowed,
        (vocabulary.words(one.source.pattern), vocabulary.words(one.target.pattern)),
    )
    met = [{pair[side] for pair in one.pairs} for side in (0, 1)]
    spare = tuple(
        tuple(block.path for at, block in enumerate(run.blocks) if at not in met[side])
        for side, run in enumerate((one.source, one.target))
    )
    pairs = tuple((a.path, b.path) for a, b in zip(ours, others, strict=True))
    name = f"{one.source.pattern} → {one.target.pattern}"
    return Group(name, pairs, outcome, computed, one, doubt, rivals, (spare[0], spare[1]))


Blocks = Sequence[tuple[str, Sequence[Unit]]]
Ways = tuple[tuple[str, ...], tuple[str, ...]]


def _solved(
    ours: Blocks, others: Blocks, votes: Votes, allowed: Allowed | None, ways: Ways = ((), ())
) -> tuple[Outcome, Outcome]:
    """What goes together in blocks; where one assignment for all of them leaves something, each kind of block by
    itself."""
    a, b = slots.slots(ours), slots.slots(others)
    outcome = matching.match(*_worded(slots.joined(a, b), slots.joined(b, a), ways), votes, allowed)
    if outcome.targets and len(ours) > 1:
        kinds = _kinds(ours, others)
        if len(kinds) > 1:
            parts = []
            for numbers in kinds:
                some = [_only(side, set(numbers)) for side in (ours, others)]
                a, b = (_numbered(slots.slots(one), numbers) for one in some)
                parts.append(matching.match(*_worded(slots.joined(a, b), slots.joined(b, a), ways), votes, allowed))
            together = Outcome(
                [one for part in parts for one in part.pairs],
                [one for part in parts for one in part.sources],
                [one for part in parts for one in part.targets],
            )
            if _found(together) > _found(outcome):
                outcome = together
    return outcome, _computed(ours, others, outcome)


def _worded(ours: list[Slot], others: list[Slot], ways: Ways) -> tuple[list[Slot], list[Slot]]:
    """Slots with those words of the names of their blocks that the other side says inside of the blocks: `norm` of
    `patch_embed1` is the `patch_embeddings.norm` of `stages.0`."""
    said = [{word for slot in some for word in slot.words} for some in (ours, others)]
    for some, own, other, inside in ((ours, *ways, said[1]), (others, *ways[::-1], said[0])):
        over = [word for word in dict.fromkeys(own) if word not in other and word in inside]
        for slot in some if over else ():
            slot.words = (*slot.words, *(word for word in over if word not in slot.words))
    return ours, others


def _found(outcome: Outcome) -> int:
    return sum(pair.target.numel for pair in outcome.pairs)


def _kinds(ours: Blocks, others: Blocks) -> list[list[int]]:
    """The numbers of blocks that have the same units on both sides; the most frequent kind first."""
    made: dict[object, list[int]] = defaultdict(list)
    for number, blocks in enumerate(zip(ours, others, strict=True)):
        key = tuple(
            frozenset((unit.path[len(path) :], frozenset(unit.needed)) for unit in units) for path, units in blocks
        )
        made[key].append(number)
    return sorted(made.values(), key=len, reverse=True)


def _only(blocks: Blocks, numbers: set[int]) -> Blocks:
    return [(path, units) for number, (path, units) in enumerate(blocks) if number in numbers]


def _numbered(made: list[Slot], numbers: Sequence[int]) -> list[Slot]:
    """Slots of some of the blocks, with the numbers that these have among all."""
    for slot in made:
        slot.present = tuple(numbers[at] for at in slot.present)
    return made


def _computed(ours: Blocks, others: Blocks, outcome: Outcome) -> Outcome:
    """Buffers that are units of themselves, by the last words of their names."""
    votes = Votes()
    for pair in outcome.pairs:
        votes.add(pair.source.path, pair.target.path)
    return matching.match(_buffers(ours), _buffers(others), votes, _same_end)


def _same_end(source: Slot, target: Slot) -> bool:
    return source.path.rpartition(".")[2] == target.path.rpartition(".")[2]


def _buffers(blocks: Blocks) -> list[Slot]:
    """The slots of units that a model computes for itself."""
    found: dict[str, dict[int, Unit]] = defaultdict(dict)
    for number, (path, units) in enumerate(blocks):
        for unit in units:
            if not unit.needed:
                found[unit.path[len(path) + 1 if path else 0 :]][number] = unit
    made = []
    for path, numbered in found.items():
        units = tuple(numbered.values())
        if len({frozenset(unit.leaves) for unit in units}) == 1:
            shapes = {role: tuple(unit.leaves[role].shape for unit in units) for role in units[0].leaves}
            made.append(Slot(path, tuple(numbered), units, shapes))
    return slots.described(made)

"""What only the order of definition tells: a grade of its own, for names that say nothing.

Order is taken where the names of one side carry no information, the order of both sides may be that of their models,
and the one alignment that keeps the order of the whole explains every shape and contradicts nothing that names say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from math import lgamma, log

from ckptsurgeon.aligner import relations, scores, vocabulary
from ckptsurgeon.aligner.deeds import BEFORE, RENAME, Deed, in_place
from ckptsurgeon.aligner.groups import Group
from ckptsurgeon.aligner.matching import Pair
from ckptsurgeon.aligner.scores import TELLING
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.units import OWN, Leaf, Side

_BITS = 10.0
"""How improbable it must be that shapes fit in this order by chance, in bits."""


def settle(group: Group, source: Side, target: Side) -> list[Pair]:
    """Put right the matches that names do not tell, by order; those that it settles."""
    out = group.outcome
    open_ = [pair for pair in out.pairs if pair.margin < TELLING]
    if not open_ or not (source.in_order and target.in_order) or out.sources or out.targets:
        return []
    if not (_say_nothing([pair.source for pair in open_]) or _say_nothing([pair.target for pair in open_])):
        return []
    if any(pair.source.parts or pair.target.parts for pair in open_):
        return []
    if not _is_borne_out(source, [pair.source for pair in out.pairs]):
        return []
    if not _is_borne_out(target, [pair.target for pair in out.pairs]):
        return []
    ours = sorted((pair.source for pair in out.pairs), key=lambda slot: slot.at)
    others = sorted((pair.target for pair in out.pairs), key=lambda slot: slot.at)
    by_source = {id(pair.source): pair for pair in out.pairs}
    made = []
    for slot, other in zip(ours, others, strict=True):
        pair = by_source[id(slot)]
        if pair.margin >= TELLING:
            if pair.target is not other:
                return []
            continue
        found = scores.fitting(slot, other)
        if found is None:
            return []
        made.append(Pair(slot, other, found[0], pair.points, pair.margin, pair.rivals))
    kept = [pair for pair in out.pairs if pair.margin >= TELLING]
    out.pairs = kept + made
    return made


def _is_borne_out(side: Side, some: Sequence[Slot]) -> bool:
    """Whether more than the file itself says that its order is that of a model: it is one, its numbers count up, or so
    many shapes would hardly fit in another order."""
    if side.is_model:
        return True
    some = sorted(some, key=lambda slot: slot.at)
    numbers = [tuple(map(int, re.findall(r"\d+", slot.path))) for slot in some]
    if all(numbers) and numbers == sorted(numbers) and len(set(numbers)) == len(numbers) and all(map(_is_number, some)):
        return True
    return _bits([tuple(sorted(slot.shapes.items())) for slot in some]) >= _BITS


def _is_number(slot: Slot) -> bool:
    return not any(vocabulary.is_hashed(segment) for segment in slot.path.split("."))


def _say_nothing(some: Sequence[Slot]) -> bool:
    """Whether what tells slots apart is numbers or hashes alone."""
    paths = [slot.path.split(".") for slot in some]
    if len(paths) < 2:
        return vocabulary.is_opaque(some[0].path)
    shared = set.intersection(*(set(path) for path in paths))
    return all(vocabulary.is_opaque(".".join(part for part in path if part not in shared)) for path in paths)


def is_hashed(source: Side) -> bool:
    """Whether no key of a side says anything, not even which is a weight and which a bias."""
    leaves = list(source.leaves)
    nothing = sum(leaf.role == OWN and vocabulary.is_opaque(leaf.key) for leaf in leaves)
    return len(leaves) > 1 and nothing >= 0.9 * len(leaves)


def zipped(source: Side, target: Side) -> tuple[list[tuple[Leaf, Leaf]], str]:
    """The keys of two sides in their order, one to one, or why not."""
    if not source.in_order or not target.in_order:
        return [], "its names say nothing, and the order of its keys is not that of a model"
    ours, others = (sorted(side.leaves, key=lambda leaf: leaf.at) for side in (source, target))
    if len(ours) != len(others):
        ours, others = ([leaf for leaf in side if not leaf.computed] for side in (ours, others))
    if len(ours) != len(others):
        return [], f"its names say nothing, and {len(ours)} tensors are not {len(others)}"
    for a, b in zip(ours, others, strict=True):
        found = relations.relation(a.shape, b.shape)
        if found is None or found.flat or found.orders[:1] not in ((), (tuple(range(len(found.orders[0]))),)):
            return (
                [],
                f"its names say nothing, and in order {a.key!r} {list(a.shape)} would be {b.key!r} {list(b.shape)}",
            )
    if _bits([leaf.shape for leaf in others]) < _BITS:
        return [], "its names say nothing, and so many shapes are equal that their order proves nothing"
    return list(zip(ours, others, strict=True)), ""


def _bits(shapes: Sequence[Hashable]) -> float:
    """How many orders of these shapes there are, as a logarithm to the base of 2."""
    counts = Counter(shapes).values()
    return (lgamma(len(shapes) + 1) - sum(lgamma(count + 1) for count in counts)) / log(2)


def deeds(source: Leaf, target: Leaf) -> Iterator[Deed]:
    """A rename, after sizes of 1 are put right."""
    order = relations.relation(source.shape, target.shape)
    assert order is not None
    for step in relations.steps(source.shape, target.shape, order.orders[0]):
        yield in_place(BEFORE, step, source.key)
    yield Deed(RENAME, "rename", {}, (source.key,), (target.key,))

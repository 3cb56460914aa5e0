"""How well two slots go together by what their names say: a number for each pair, 0 where shapes forbid it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from math import log
from typing import TYPE_CHECKING

from ckptsurgeon.aligner import relations
from ckptsurgeon.aligner.relations import Relation
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.votes import Votes

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]

MATCH = 1.0
"""For two that fit at all."""
MEANING, OTHER_MEANING = 2.0, -1.0
WORDS = 1.5
RANK = 0.6
NORM, OTHER_NORM = 1.5, -0.5
KIND = -1.5
PATH = 0.5
ROLE = -0.6
_NO_NORMS = frozenset(("scale", "token", "cls", "pos", "embed", "bias", "table"))
TELLING = 0.3
"""A difference in points that is a reason."""

Roles = Mapping[str, tuple[str, Relation]]
"""Role of the target → role of the source, and what makes the one of the other."""


def fitting(source: Slot, target: Slot) -> tuple[Roles, float] | None:
    """Which tensors of two slots go together, and what that costs; None where shapes forbid it."""
    if source.present != target.present:
        return None
    if len(source.shapes) == 1 and len(target.shapes) == 1:
        pairs = [(next(iter(target.shapes)), next(iter(source.shapes)))]
    else:
        pairs = [(role, role) for role in target.shapes if role in source.shapes]
    if not pairs or any(role in target.shapes and role not in source.shapes for role in ("mean", "var", "v", "orig")):
        return None
    if len(source.shapes) > 1 < len(target.shapes) and ("weight" in source.shapes) != ("weight" in target.shapes):
        return None
    made: dict[str, tuple[str, Relation]] = {}
    cost = 0.0
    for there, here in pairs:
        found = relations.common(zip(source.shapes[here], target.shapes[there], strict=True))
        if found is None:
            return None
        made[there] = here, found
        cost += found.cost
    alone = len(source.shapes) + len(target.shapes) - 2 * len(pairs)
    if alone and not any(there in ("weight", "own") for there in made):
        return None
    return made, cost - ROLE * alone


def rarity(sources: Sequence[Slot], targets: Sequence[Slot]) -> dict[str, float]:
    """What a word tells: the more, the fewer slots have it."""
    count: Counter[str] = Counter()
    for slot in (*sources, *targets):
        count.update(set(slot.words))
    whole = len(sources) + len(targets)
    return {word: log(1 + whole / times) for word, times in count.items()}


def matrix(sources: Sequence[Slot], targets: Sequence[Slot], told: Mapping[str, float], votes: Votes) -> Matrix:
    """The points of every pair by names alone, whether shapes allow it or not."""
    made = MATCH + WORDS * _words(sources, targets, told)
    made += votes.table([slot.path for slot in sources], [slot.path for slot in targets])
    made += PATH * _equal([(slot.path, slot.kin) for slot in sources], [(slot.path, slot.kin) for slot in targets])
    what = [[slot.means.what.removesuffix(" by heads") or None for slot in side] for side in (sources, targets)]
    made += OTHER_MEANING * _both(*what) + (MEANING - OTHER_MEANING) * _equal(*what)
    norms = [[slot.norm for slot in side] for side in (sources, targets)]
    counts = [[norm and norm[1] for norm in side] for side in norms]
    same_count = _equal(*counts)
    made += OTHER_NORM * same_count + (NORM - OTHER_NORM) * _equal(*norms)
    made += RANK * (1 - same_count) * _ranks(sources, targets)
    for j, target in enumerate(targets):
        if target.units and target.units[0].kind:
            made[:, j] += [KIND * _other_kind(source, target) for source in sources]
    return made


def _ranks(sources: Sequence[Slot], targets: Sequence[Slot]) -> Matrix:
    """1 where two have one place: among all that differ in numbers alone, if these are as many; else among others."""
    whole = [
        [next((rank for rank in slot.ranks if rank[0] == "all"), None) for slot in side] for side in (sources, targets)
    ]
    as_many = _equal(*([rank and rank[2] for rank in side] for side in whole))
    partly = _meeting([slot.ranks for slot in sources], [slot.ranks for slot in targets])
    made: Matrix = as_many * _equal(*whole) + (1 - as_many) * partly
    return made


def _codes(*sides: Sequence[Hashable]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """A number for every value, the same for equal ones; -1 for None."""
    import numpy as np

    numbers: dict[Hashable, int] = {}
    return [
        np.array([-1 if value is None else numbers.setdefault(value, len(numbers)) for value in side]) for side in sides
    ]


def _equal(ours: Sequence[Hashable], others: Sequence[Hashable]) -> Matrix:
    """1 where two values are there and equal."""
    a, b = _codes(ours, others)
    made: Matrix = ((a[:, None] == b[None, :]) & (a >= 0)[:, None]).astype(float)
    return made


def _both(ours: Sequence[Hashable], others: Sequence[Hashable]) -> Matrix:
    """1 where two values are there."""
    a, b = _codes(ours, others)
    made: Matrix = ((a >= 0)[:, None] & (b >= 0)[None, :]).astype(float)
    return made


def _meeting(ours: Sequence[Collection[Hashable]], others: Sequence[Collection[Hashable]]) -> Matrix:
    """1 where two sets have something in common."""
    import numpy as np

    shared = sorted({one for some in ours for one in some} & {one for some in others for one in some}, key=repr)
    tables = [np.array([[one in some for one in shared] for some in side], dtype=float) for side in (ours, others)]
    made: Matrix = np.minimum(tables[0] @ tables[1].T, 1.0) if shared else np.zeros((len(ours), len(others)))
    return made


def _words(sources: Sequence[Slot], targets: Sequence[Slot], told: Mapping[str, float]) -> Matrix:
    """The weighted share of words that both have."""
    import numpy as np

    ours, others = ([set(slot.words) for slot in side] for side in (sources, targets))
    shared = set().union(*ours) & set().union(*others)
    places = {word: place for place, word in enumerate(sorted(shared))}
    weights = np.array([told[word] for word in places])

    def table(some: Sequence[set[str]]) -> Matrix:
        rows = np.zeros((len(some), len(places)))
        for row, words in enumerate(some):
            rows[row, [places[word] for word in words & shared]] = 1
        return rows

    both = (table(ours) * weights) @ table(others).T
    sums = [np.array([sum(told[word] for word in words) for words in side]) for side in (ours, others)]
    either = sums[0][:, None] + sums[1][None, :] - both
    shares: Matrix = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return shares


def _other_kind(source: Slot, target: Slot) -> bool:
    """Whether the target is a norm or an embedding, and the words of the source say that it is something else."""
    kind = target.units[0].kind if target.units else ""
    if not kind or not source.words or len(source.shapes) > 1:
        return False
    if kind == "norm":
        return bool(_NO_NORMS & set(source.words)) and "norm" not in source.words
    return kind == "embedding" and "norm" in source.words

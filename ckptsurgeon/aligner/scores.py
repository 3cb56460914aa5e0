"""How well two slots go together by what their names say: a number for each pair, 0 where shapes forbid it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
    import numpy as np

    made = np.full((len(sources), len(targets)), MATCH)
    made += WORDS * _words(sources, targets, told)
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            made[i, j] += _pair(source, target, votes)
    return made


def _words(sources: Sequence[Slot], targets: Sequence[Slot], told: Mapping[str, float]) -> Matrix:
    """The weighted share of words that both have."""
    import numpy as np

    places = {word: place for place, word in enumerate(told)}
    weights = np.array([told[word] for word in places])

    def table(some: Sequence[Slot]) -> Matrix:
        rows = np.zeros((len(some), len(places)))
        for row, slot in enumerate(some):
            rows[row, [places[word] for word in slot.words]] = 1
        return rows

    a, b = table(sources), table(targets)
    both = (a * weights) @ b.T
    either = (a @ weights)[:, None] + (b @ weights)[None, :] - both
    shares: Matrix = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return shares


def _pair(source: Slot, target: Slot, votes: Votes) -> float:
    points = votes.bonus(source.path, target.path)
    a, b = source.means.what, target.means.what
    if a and b:
        points += MEANING if a.removesuffix(" by heads") == b.removesuffix(" by heads") else OTHER_MEANING
    if source.norm and target.norm and source.norm[1] == target.norm[1]:
        points += NORM if source.norm == target.norm else OTHER_NORM
    elif source.rank and target.rank and source.rank == target.rank:
        points += RANK
    if source.path == target.path:
        points += PATH
    if _other_kind(source, target):
        points += KIND
    return points


def _other_kind(source: Slot, target: Slot) -> bool:
    """Whether the target is a norm or an embedding, and the words of the source say that it is something else."""
    kind = target.units[0].kind if target.units else ""
    if not kind or not source.words or len(source.shapes) > 1:
        return False
    if kind == "norm":
        return bool(_NO_NORMS & set(source.words)) and "norm" not in source.words
    return kind == "embedding" and "norm" in source.words

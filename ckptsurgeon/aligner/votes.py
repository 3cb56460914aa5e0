"""Which subtree goes with which: what the matches that are sure say of the others below the same modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

WEIGHT = 1.2


@lru_cache(1 << 16)
def ancestors(path: str) -> tuple[str, ...]:
    """The paths of the modules above.

    >>> ancestors("encoder.conv.weight")
    ('encoder', 'encoder.conv')
    """
    segments = path.split(".")[:-1]
    return tuple(".".join(segments[: depth + 1]) for depth in range(len(segments)))


class Votes:
    """How often units below one module went with units below another."""

    def __init__(self) -> None:
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._sources: Counter[str] = Counter()
        self._targets: Counter[str] = Counter()

    def copy(self) -> Votes:
        made = Votes()
        made._pairs, made._sources, made._targets = self._pairs.copy(), self._sources.copy(), self._targets.copy()
        return made

    def add(self, source: str, target: str, weight: int = 1) -> None:
        """One match more."""
        for above in ancestors(source):
            self._sources[above] += weight
        for above in ancestors(target):
            self._targets[above] += weight
        for pair in self._product(source, target):
            self._pairs[pair] += weight

    def bonus(self, source: str, target: str) -> float:
        """From 0 to WEIGHT: the best that two modules above them go together."""
        best = 0.0
        for pair in self._product(source, target):
            count = self._pairs.get(pair)
            if count:
                best = max(best, count / max(self._sources[pair[0]], self._targets[pair[1]]))
        return WEIGHT * best

    @staticmethod
    def _product(source: str, target: str) -> Iterator[tuple[str, str]]:
        return ((a, b) for a in ancestors(source) for b in ancestors(target))

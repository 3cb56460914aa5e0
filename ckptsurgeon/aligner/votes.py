"""Which subtree goes with which: what the matches that are sure say of the others below the same modules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]

WEIGHT = 1.2
_NONE: Counter[str] = Counter()


@lru_cache(1 << 16)
def ancestors(path: str) -> tuple[str, ...]:
    """The paths of the modules above.

    >>> ancestors("encoder.conv.weight")
    ('encoder', 'encoder.conv')
    """
    segments = path.split(".")[:-1]
    return tuple(".".join(segments[: depth + 1]) for depth in range(len(segments)))


def _below(paths: Sequence[str]) -> dict[str, list[int]]:
    """The places of the paths below each module."""
    made: dict[str, list[int]] = defaultdict(list)
    for place, path in enumerate(paths):
        for above in ancestors(path):
            made[above].append(place)
    return made


class Votes:
    """How often units below one module went with units below another."""

    def __init__(self) -> None:
        self._pairs: dict[str, Counter[str]] = defaultdict(Counter)
        self._sources: Counter[str] = Counter()
        self._targets: Counter[str] = Counter()

    def copy(self) -> Votes:
        made = Votes()
        made._pairs, made._sources, made._targets = deepcopy(self._pairs), self._sources.copy(), self._targets.copy()
        return made

    def add(self, source: str, target: str, weight: int = 1) -> None:
        """One match more."""
        for above in ancestors(source):
            self._sources[above] += weight
        for above in ancestors(target):
            self._targets[above] += weight
        for a, b in self._product(source, target):
            self._pairs[a][b] += weight

    def bonus(self, source: str, target: str) -> float:
        """From 0 to WEIGHT: the best that two modules above them go together."""
        best = 0.0
        for a, b in self._product(source, target):
            count = self._pairs[a][b] if a in self._pairs else 0
            if count:
                best = max(best, count / max(self._sources[a], self._targets[b]))
        return WEIGHT * best

    def table(self, sources: Sequence[str], targets: Sequence[str]) -> Matrix:
        """The bonus of every pair of paths."""
        import numpy as np

        made = np.zeros((len(sources), len(targets)))
        if not self._pairs:
            return made
        below = [_below(some) for some in (sources, targets)]
        met = [(a, b, count) for a in below[0] for b, count in self._pairs.get(a, _NONE).items() if b in below[1]]
        for a, b, count in met:
            if count:
                where = np.ix_(below[0][a], below[1][b])
                made[where] = np.maximum(made[where], count / max(self._sources[a], self._targets[b]))
        return WEIGHT * made

    @staticmethod
    def _product(source: str, target: str) -> Iterator[tuple[str, str]]:
        return ((a, b) for a in ancestors(source) for b in ancestors(target))

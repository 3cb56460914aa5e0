"""Repeated blocks: the numbered runs of each side, and which goes with which.

A run is all paths that differ in numbers alone and have several units below them: `layer{}.{}`, `encoder.layers.{}`.
Two runs go together where their blocks, in the order of their numbers, hold as many elements each, one after another:
that is left alone by every way to rename, fuse, split, transpose or stack what is in a block.  So runs that are cut
differently, begin at another number or are nested otherwise still meet.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ckptsurgeon.aligner.units import Unit

_NUMBER = re.compile(r"\d+")
_MOST_RUNS = 400
_MOST_STEPS = 250_000
_MOST_STEPS_IN_ALL = 5_000_000
_ALIKE = 0.6


@dataclass(eq=False, slots=True)
class Block:
    """One member of a run: its path, its numbers, and the units below it."""

    path: str
    numbers: tuple[int, ...]
    units: list[Unit] = field(default_factory=list)
    numel: int = 0


@dataclass(eq=False)
class Run:
    """Paths that differ in numbers, in numeric order."""

    pattern: str
    blocks: list[Block]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The elements of each block."""
        return tuple(block.numel for block in self.blocks)

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    @property
    def is_shuffled(self) -> bool:
        """Whether the file has the blocks in another order than that of their numbers, or of the numbers' text."""
        places = [min(unit.at for unit in block.units) for block in self.blocks]
        if places == sorted(places):
            return False
        spelt = sorted(range(len(places)), key=lambda at: self.blocks[at].path)
        return [places[at] for at in spelt] != sorted(places)


@dataclass(eq=False)
class Meeting:
    """Two runs that may go together, and which blocks do; `unique` tells that no others could as well."""

    source: Run
    target: Run
    pairs: tuple[tuple[int, int], ...]
    unique: bool
    exact: bool = True

    @property
    def whole(self) -> bool:
        """Whether every block of both has a partner."""
        return len(self.pairs) == len(self.source.blocks) == len(self.target.blocks)

    @property
    def covered(self) -> int:
        """The elements of the blocks that have a partner."""
        return sum(self.target.blocks[there].numel for _, there in self.pairs)

    @property
    def rank(self) -> tuple[bool, bool, bool, int, int]:
        return self.exact, self.whole, self.unique, len(self.pairs), self.covered


def pattern(path: str) -> str:
    """A path with `{}` for its numbers."""
    return _NUMBER.sub("{}", path)


def way(run: Run) -> str:
    """The names of a run and of what all that is in it lies below: `stages.{}.downsampling_layer`."""
    paths = [unit.path[len(block.path) + 1 :].split(".")[:-1] for block in run.blocks for unit in block.units]
    shared = []
    for segments in zip(*paths, strict=False):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    return ".".join((run.pattern, *shared))


def runs(units: Iterable[Unit]) -> list[Run]:
    """All runs of two and more blocks, of which some hold more than one unit."""
    found: dict[str, dict[str, Block]] = {}
    for unit in units:
        size, at = unit.numel, -1
        path = unit.path
        while at < len(path):
            begin, at = at + 1, path.find(".", at + 1)
            at = len(path) if at < 0 else at
            if not _NUMBER.search(path, begin, at):
                continue
            prefix = path[:at]
            blocks = found.setdefault(pattern(prefix), {})
            block = blocks.get(prefix)
            if block is None:
                block = blocks[prefix] = Block(prefix, tuple(map(int, _NUMBER.findall(prefix))))
            block.units.append(unit)
            block.numel += size
    made = []
    for form, blocks in found.items():
        if len(blocks) > 1 and sum(len(block.units) > 1 for block in blocks.values()) * 2 >= len(blocks):
            made.append(Run(form, sorted(blocks.values(), key=lambda block: block.numbers)))
    made.sort(key=lambda run: -run.numel)
    return made[:_MOST_RUNS]


def meetings(sources: Sequence[Run], targets: Sequence[Run]) -> list[Meeting]:
    """Every pair of runs that may go together, the best first."""
    made, steps = [], _MOST_STEPS_IN_ALL
    for source in sources:
        for target in targets:
            here = len(source.blocks) * len(target.blocks)
            found = _meeting(source, target, here <= min(steps, _MOST_STEPS))
            steps -= here if source.sizes != target.sizes else 0
            made += [found] if found is not None else []
    return sorted(made, key=lambda one: one.rank, reverse=True)


def _meeting(source: Run, target: Run, is_small: bool) -> Meeting | None:
    a, b = source.sizes, target.sizes
    if a == b:
        return Meeting(source, target, tuple((at, at) for at in range(len(a))), True)
    shared = (Counter(a) & Counter(b)).total()
    if shared >= 2 and is_small:
        pairs, unique = _subsequence(a, b)
        if not unique:  # blocks of as many elements by chance
            closer, closer_unique = _subsequence(_exactly(source), _exactly(target))
            pairs, unique = (closer, closer_unique) if len(closer) == len(pairs) else (pairs, unique)
        made = Meeting(source, target, pairs, unique)
        if len(pairs) >= 2 and 2 * made.covered >= min(source.numel, target.numel):
            return made
    if len(a) == len(b) and _likeness(source, target) >= _ALIKE:
        return Meeting(source, target, tuple((at, at) for at in range(len(a))), True, exact=False)
    return None


def _exactly(run: Run) -> list[frozenset[tuple[int, int]]]:
    """The sizes of the tensors in each block."""
    return [frozenset(_contents(block).items()) for block in run.blocks]


def _subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[tuple[tuple[int, int], ...], bool]:
    """The longest common subsequence as pairs of places, and whether it is the only one."""
    ahead = _lengths(a, b)
    behind = [row[::-1] for row in _lengths(a[::-1], b[::-1])[::-1]]
    best = behind[0][0]
    chosen: list[tuple[int, int]] = []
    all_pairs, at, there = 0, 0, 0
    for i, size in enumerate(a):
        for j, other in enumerate(b):
            if size == other and ahead[i][j] + 1 + behind[i + 1][j + 1] == best:
                all_pairs += 1
                if i >= at and j >= there and ahead[i][j] == len(chosen):
                    chosen.append((i, j))
                    at, there = i + 1, j + 1
    return tuple(chosen), all_pairs == best


def _lengths(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[list[int]]:
    """The longest common subsequence of every two beginnings."""
    rows = [[0] * (len(b) + 1)]
    for size in a:
        above, row = rows[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if size == other else max(above[j + 1], row[j]))
        rows.append(row)
    return rows


def _likeness(source: Run, target: Run) -> float:
    """The share of elements that lie in tensors of the same sizes, in the blocks that have least of them."""
    least, seen = 1.0, set()
    for one, other in zip(source.blocks, target.blocks, strict=True):
        if (one.numel, other.numel) in seen:
            continue
        seen.add((one.numel, other.numel))
        a, b = _contents(one), _contents(other)
        common = sum(sum(sizes) for sizes in ([size] * count for size, count in (a & b).items()))
        least = min(least, common / max(one.numel, other.numel, 1))
    return least


def _contents(block: Block) -> Counter[int]:
    """The sizes of the tensors of a block, each as often as it occurs."""
    return Counter(leaf.numel for unit in block.units for leaf in unit.needed.values())

"""Many keys in few lines, truthfully.

Only keys that carry the same label (shapes, dtypes, fate) are merged, and a merged name stands for
exactly its members: `layers.{0-5,7-11}.weight` has no layer 6, and a product of two ranges is
printed only when every pair exists.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

_NUMBER = re.compile(r"(0|[1-9]\d{0,8})(?!\d)")
Box = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Keys that share a label: their common name, and the keys themselves."""

    name: str
    keys: tuple[str, ...]
    label: Hashable


def group(labelled: Iterable[tuple[str, Hashable]]) -> list[Group]:
    """Merge keys that differ only in numbers and have equal labels, in order of appearance.

    >>> [g.name for g in group([("a.0.w", 1), ("a.1.w", 1), ("a.3.w", 1), ("b", 1)])]
    ['a.{0-1,3}.w', 'b']
    """
    buckets: dict[tuple[Hashable, tuple[str, ...]], dict[tuple[int, ...], str]] = {}
    for key, label in labelled:
        texts, numbers = _split(key)
        buckets.setdefault((label, texts), {})[numbers] = key
    found: list[Group] = []
    for (label, texts), members in buckets.items():
        for box in _boxes(sorted(members)):
            keys = tuple(members[numbers] for numbers in product(*box))
            found.append(Group(_name(texts, box), keys, label))
    return found


def _split(key: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The texts around the numbers of a key, and the numbers."""
    texts: list[str] = []
    numbers: list[int] = []
    at = 0
    for match in _NUMBER.finditer(key):
        if match.start() and key[match.start() - 1].isdigit():
            continue
        texts.append(key[at : match.start()])
        numbers.append(int(match[0]))
        at = match.end()
    return (*texts, key[at:]), tuple(numbers)


def _boxes(points: Sequence[tuple[int, ...]]) -> list[Box]:
    """Sorted distinct points as disjoint boxes (a set of values in each coordinate) that hold
    these points and no others."""
    if not points or not points[0]:
        return [()] * bool(points)
    axes = [tuple(sorted({point[i] for point in points})) for i in range(len(points[0]))]
    volume = 1
    for axis in axes:
        volume *= len(axis)
    if volume == len(points):
        return [tuple(axes)]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for point in points:
        rests.setdefault(point[0], []).append(point[1:])
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for value, rest in rests.items():
        alike.setdefault(tuple(rest), []).append(value)
    return [(tuple(values), *box) for rest, values in alike.items() for box in _boxes(rest)]


def _name(texts: tuple[str, ...], box: Box) -> str:
    parts = [texts[0]]
    for axis, text in zip(box, texts[1:], strict=True):
        parts += [str(axis[0]) if len(axis) == 1 else "{" + ranges(axis) + "}", text]
    return "".join(parts)


def ranges(values: Sequence[int]) -> str:
    """Sorted numbers as ranges with their holes.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

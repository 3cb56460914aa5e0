"""Which parameter each position of an optimizer's state is about.

torch counts parameters by position, group after group.  Within a group they come in the order of the model; which of
the model's they are follows from the shapes of their moments.  Where two answers would do as well, there is none: a
moment must never go to another weight by a guess.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, ...]
_MOST_ROUNDS = 100
"""What is not told apart by then is called open."""


class Undecided(Exception):
    """A short cause why positions cannot be told from one another."""


class Strange(Undecided):
    """A short cause why positions are about no parameters of these at all."""


def assigned(groups: Sequence[Sequence[Shape | None]], keys: Mapping[str, Shape]) -> list[list[str]]:
    """The key of each position of each group; a shape of None is not known, and may be any.

    Raises Strange where there is no such assignment in order, Undecided where there is more than one.

    >>> assigned([[(2, 3)], [(2,), None]], {"a.weight": (2, 3), "a.bias": (2,), "b.bias": (4,)})
    [['a.weight'], ['a.bias', 'b.bias']]
    """
    count = sum(map(len, groups))
    if count > len(keys):
        raise Strange(f"it has {count} parameters, and the checkpoint {len(keys)}")
    if len(groups) == 1 and count == len(keys):
        _check(groups[0], keys)
        return [list(keys)]
    if all(shape is None for group in groups for shape in group):
        raise Undecided(
            f"it has {count} parameters in {len(groups)} group{'' if len(groups) == 1 else 's'} and no moments whose "
            f"shapes could tell them, and the checkpoint has {len(keys)} that may be meant"
        )
    return _Search(groups, list(keys), list(keys.values())).run()


def _check(shapes: Sequence[Shape | None], keys: Mapping[str, Shape]) -> None:
    for position, (shape, (key, want)) in enumerate(zip(shapes, keys.items(), strict=True)):
        if shape is not None and shape != want:
            raise Strange(
                f"its state of parameter {position} is {list(shape)}, and {key!r} is {list(want)}: it is the state of "
                "another model, or of one whose parameters have another order"
            )


@dataclass
class _Search:
    """The first and the last key that each position can be, brought together as far as order and shapes allow."""

    groups: Sequence[Sequence[Shape | None]]
    keys: list[str]
    shapes: list[Shape]
    taken: dict[int, tuple[int, int]] = field(default_factory=dict)

    def run(self) -> list[list[str]]:
        self.places: dict[Shape | None, list[int]] = {None: list(range(len(self.keys)))}
        for index, shape in enumerate(self.shapes):
            self.places.setdefault(shape, []).append(index)
        self.low = [[0] * len(group) for group in self.groups]
        self.high = [[len(self.keys) - 1] * len(group) for group in self.groups]
        rounds = 1
        while self._narrowed() and rounds < _MOST_ROUNDS:
            rounds += 1
        for number, group in enumerate(self.groups):
            for at in range(len(group)):
                if self.low[number][at] != self.high[number][at]:
                    self._open(number, at)
        return [[self.keys[index] for index in group] for group in self.low]

    def _narrowed(self) -> bool:
        """Whether anything became narrower."""
        before = [list(row) for row in (*self.low, *self.high)]
        for number, group in enumerate(self.groups):
            least = 0
            for at, shape in enumerate(group):
                least = self.low[number][at] = self._first(shape, max(least, self.low[number][at]), (number, at))
                least += 1
            most = len(self.keys) - 1
            for at in range(len(group) - 1, -1, -1):
                most = self.high[number][at] = self._last(group[at], min(most, self.high[number][at]), (number, at))
                most -= 1
            for at in range(len(group)):
                if self.low[number][at] == self.high[number][at]:
                    self.taken.setdefault(self.low[number][at], (number, at))
        return before != [*self.low, *self.high]

    def _first(self, shape: Shape | None, least: int, who: tuple[int, int]) -> int:
        places = self.places.get(shape, [])
        for at in range(bisect_left(places, least), len(places)):
            if self.taken.get(places[at], who) == who:
                return places[at]
        raise Strange(self._none(shape, who))

    def _last(self, shape: Shape | None, most: int, who: tuple[int, int]) -> int:
        places = self.places.get(shape, [])
        for at in range(bisect_right(places, most) - 1, -1, -1):
            if self.taken.get(places[at], who) == who:
                return places[at]
        raise Strange(self._none(shape, who))

    def _none(self, shape: Shape | None, who: tuple[int, int]) -> str:
        position = sum(map(len, self.groups[: who[0]])) + who[1]
        what = "" if shape is None else f" ({list(shape)})"
        return (
            f"its parameter {position}{what} is no parameter of the checkpoint, in the order of the others: it is the "
            "state of another model, or of one whose parameters have another order"
        )

    def _open(self, number: int, at: int) -> None:
        position = sum(map(len, self.groups[:number])) + at
        names = " or ".join(repr(self.keys[index]) for index in (self.low[number][at], self.high[number][at]))
        raise Undecided(
            f"its parameter {position} may be {names}: the shapes do not tell; an optimizer that is made of "
            "model.named_parameters() says the names"
        )

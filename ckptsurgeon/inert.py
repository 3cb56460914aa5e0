"""What a pickle holds, as data: nothing here was imported, and nothing was called.

Plain values (None, bool, int, float, complex, str, bytes, list, tuple, set, dict, OrderedDict)
are themselves; tensors are `TensorRef`; every other object is an `Opaque` record.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sized
from typing import Any

UNKNOWN = object()
"""In place of the tensor that a record stands for, as long as nobody asked."""


class Opaque:
    """An object of a class that was not imported.

    `name` is the dotted name of the class or function, `args` what it was called with (None: it
    was only named, not called), `state` what was to be set on the result, `items` and `pairs`
    what was appended to it as to a list or a dict.  `tensor` is what it was found to stand for, by whoever asked first:
    a record may be used in many places.
    """

    __slots__ = ("args", "items", "name", "pairs", "state", "tensor")

    def __init__(self, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] | None = None
        self.pairs: dict[Any, Any] | None = None
        self.tensor: Any = UNKNOWN

    def fields(self) -> dict[Any, Any]:
        """What a reader may look into: the pairs, else the attributes that a dict of state gives."""
        if self.pairs is not None:
            return self.pairs
        return attributes(self.state)

    def __repr__(self) -> str:
        return f"<{self.name}>" if self.args is None else f"<{self.name} object>"


def attributes(state: Any) -> dict[Any, Any]:
    """The attributes in a pickled state: a dict, or a pair of dicts (the second for `__slots__`)."""
    if isinstance(state, dict):
        return state
    if isinstance(state, tuple) and len(state) == 2 and all(part is None or isinstance(part, dict) for part in state):
        first, second = state
        return {**first, **second} if first and second else first or second or {}
    return {}


def width(value: Any) -> int:
    """How many members a container of the inert tree has, all of them for an object."""
    if isinstance(value, Opaque):
        parts = (value.args, value.items, value.pairs, value.fields())
        return sum(len(part) for part in parts if part is not None)
    return len(value) if isinstance(value, Sized) else 1


def children(value: Any) -> Iterator[tuple[Hashable, Any]]:
    """The named members of a container of the inert tree: dict items, list members, attributes."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, Opaque):
        yield from value.fields().items()
        if value.items:
            yield from enumerate(value.items)

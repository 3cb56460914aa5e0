"""What a pickle holds, as data: nothing here was imported, and nothing was called.

Plain values (None, bool, int, float, complex, str, bytes, list, tuple, set, dict, OrderedDict)
are themselves; tensors are `TensorRef`; every other object is an `Opaque` record.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any


class Opaque:
    """An object of a class that was not imported.

    `name` is the dotted name of the class or function, `args` what it was called with (None: it
    was only named, not called), `state` what was to be set on the result, `items` and `pairs`
    what was appended to it as to a list or a dict.
    """

    __slots__ = ("args", "items", "name", "pairs", "state")

    def __init__(self, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] | None = None
        self.pairs: dict[Any, Any] | None = None

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
        return {**(state[0] or {}), **(state[1] or {})} if state[1] else state[0] or {}
    return {}


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

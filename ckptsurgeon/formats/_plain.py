"""Builders of plain data: what a pickle may call besides torch's own, done here and never called."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from ckptsurgeon.inert import Opaque
from ckptsurgeon.tensor import TensorRef

Builder = Callable[[tuple[Any, ...]], Any]
"""Makes data of the arguments that a pickle would call a global with."""
KEYS = (str, int, float, bytes, type(None), Opaque, complex, TensorRef)
"""What may be the key of a dict, or in a set."""
_LONGEST_KEY = 64
_LONGEST_INT = 1024
_MOST_CHOSEN = 1000
"""Keys whose hashes a file may choose: a dict takes time with the square of those that are the same."""
_HASHED = (1 << 61) - 1
"""Integers below are their own hashes (`sys.hash_info.modulus`)."""
_SMALL, _FEW = 1 << 16, 3


class Keys:
    """Makes keys of the values of one pickle: itself where that is safe, else a record in its place.

    The hash of a text cannot be foreseen; those of large integers and of what is made of numbers can, so that a file
    could make all of them the same.  A thousand of these are taken.
    """

    def __init__(self) -> None:
        self.chosen = 0

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if is_key(value):
            if not _is_chosen(value):
                return value
            self.chosen += 1
            if self.chosen <= _MOST_CHOSEN:
                return value
        return Opaque("a key that cannot be one here", (value,))


def _is_chosen(value: Any) -> bool:
    """Whether many values like this one could have the same hash."""
    if isinstance(value, int):
        return not -_HASHED < value < _HASHED
    if isinstance(value, tuple | frozenset):
        small = len(value) <= _FEW
        return not all(
            isinstance(part, str | bytes) or (small and isinstance(part, int) and -_SMALL < part < _SMALL)
            for part in value
        )
    return isinstance(value, complex)


def is_key(value: Any) -> bool:
    """Whether a value may be a key: nothing large, whose hash alone could run away."""
    todo, left = [value], _LONGEST_KEY
    while todo:
        part = todo.pop()
        left -= 1
        if isinstance(part, tuple | frozenset):
            if len(part) > left:
                return False
            todo.extend(part)
        elif not isinstance(part, KEYS) or (isinstance(part, int) and part.bit_length() > _LONGEST_INT):
            return False
        if left < 0:
            return False
    return True


class BadRecord(Exception):
    """A builder's arguments, or a persistent id, are not as they should be (a short cause).

    `key` is the name that the pickle gave last: that of the tensor it is about.
    """

    key: str | None = None


def _ordered_dict(args: tuple[Any, ...]) -> Any:
    if not args:
        return OrderedDict()
    if len(args) == 1 and isinstance(args[0], list):
        as_key = Keys()
        return OrderedDict((as_key(key), value) for key, value in args[0])
    raise BadRecord("an OrderedDict of something else than pairs")


def _counter(args: tuple[Any, ...]) -> Any:
    if len(args) == 1 and isinstance(args[0], dict) and all(type(value) is int for value in args[0].values()):
        made: Counter[Any] = Counter()
        dict.update(made, args[0])
        return made
    return Counter() if not args else Opaque("collections.Counter", args)


def _bytearray(args: tuple[Any, ...]) -> Any:
    if not args:
        return bytearray()
    if isinstance(args[0], bytes) and len(args) == 1:
        return bytearray(args[0])
    if isinstance(args[0], str) and args[1:] in (("latin-1",), ("latin1",)):
        return bytearray(args[0].encode("latin-1"))
    return Opaque("builtins.bytearray", args)


def _set(args: tuple[Any, ...]) -> Any:
    if len(args) == 1 and isinstance(args[0], list | tuple):
        return set(map(Keys(), args[0]))
    return set() if not args else Opaque("builtins.set", args)


def _encode(args: tuple[Any, ...]) -> Any:
    if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
        return args[0].encode("latin-1")
    return Opaque("_codecs.encode", args)


def _complex(args: tuple[Any, ...]) -> Any:
    if len(args) == 2 and all(isinstance(part, float) for part in args):
        return complex(*args)
    return Opaque("builtins.complex", args)


def _reconstructor(args: tuple[Any, ...]) -> Any:
    if args and isinstance(args[0], Opaque):
        return Opaque(args[0].name, args[1:])
    return Opaque("copyreg._reconstructor", args)


BUILDERS: dict[str, Builder] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda args: {},  # what an absent key gives is code, and no data
    "collections.Counter": _counter,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": lambda args: Opaque("builtins.bytes", args) if args else b"",
    "builtins.set": _set,
    "_codecs.encode": _encode,
    "builtins.complex": _complex,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
}

"""Builders of plain data: what a pickle may call besides torch's own, done here and never called."""

from __future__ import annotations

import sys
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
_OWN_HASH = sys.hash_info.modulus
"""Smaller integers are their own hashes."""
_MOST_ALIKE = 64


class Keys:
    """Makes keys of values, and notices when too many of them have one hash.

    Text and bytes have hashes that no file can foresee; those of numbers and tuples can be chosen so that
    each lookup takes as long as all that came before.
    """

    def __init__(self) -> None:
        self.alike: dict[int, list[Any]] = {}

    def of(self, value: Any) -> Any:
        """`value`, or a record in its place where its hash could not be taken, or could run away; BadRecord
        where others have the same hash."""
        if isinstance(value, str):
            return value
        if not is_key(value):
            return Opaque("a key that cannot be one here", (value,))
        if not (isinstance(value, tuple | frozenset | complex) or (isinstance(value, int) and abs(value) >= _OWN_HASH)):
            return value
        alike = self.alike.setdefault(hash(value), [])
        if value not in alike:
            alike.append(value)
            if len(alike) > _MOST_ALIKE:
                raise BadRecord(f"more than {_MOST_ALIKE} keys of dicts or sets with one hash")
        return value


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
    if len(args) == 1 and isinstance(args[0], dict):
        return OrderedDict(args[0])
    if len(args) == 1 and isinstance(args[0], list):
        keys = Keys()
        return OrderedDict((keys.of(key), value) for key, value in args[0])
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
        return set(map(Keys().of, args[0]))
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
    "collections.defaultdict": lambda args: dict(_ordered_dict(args[1:])),  # what an absent key gives is code
    "collections.Counter": _counter,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": lambda args: Opaque("builtins.bytes", args) if args else b"",
    "builtins.set": _set,
    "_codecs.encode": _encode,
    "builtins.complex": _complex,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
}

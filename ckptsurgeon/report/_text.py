"""Words, numbers and columns as reports show them.

Columns are aligned here, not by a table library: `ls` prints one row a key, and such a library's
import alone would cost a third of the time that a look takes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from itertools import islice
from typing import Any

from ckptsurgeon.errors import brief, shown

__all__ = ["WIDEST", "brief", "columns", "percent", "plural", "short", "shown", "size"]

_LONGEST_INT = 1000
WIDEST = 200
"""A column is padded to this width at most: one long name must not make every row as long."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(nbytes: int) -> str:
    """Bytes for people.

    >>> size(46796608)
    '44.6 MiB'
    """
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if not unit else f"{value:.1f} {_UNITS[unit]}"


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "tensor"), plural(1200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(part: float) -> str:
    """A share in percent, never rounded up to 100 nor down to 0.

    >>> percent(1.0), percent(0.99999), percent(0.5)
    ('100 %', '99.99 %', '50.00 %')
    """
    if part in (0.0, 1.0):
        return f"{100 * part:.0f} %"
    return f"{min(max(100 * part, 0.01), 99.99):.2f} %"


def columns(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Rows as lines with aligned columns; the last column is not padded."""
    if not rows:
        return []
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    forms = (
        f"{{:>{width}}}" if i in right else "{}" if i == last else f"{{:<{width}}}" for i, width in enumerate(widths)
    )
    line = "  ".join(forms).format
    return [line(*row).rstrip() for row in rows]


class _Short(reprlib.Repr):
    """Beginnings of what values are written as, made without writing the rest: a value may hold itself, or be as
    large as the file in every place."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = self.maxdeque = 64
        self.maxlevel, self.maxstring, self.maxother = 4, 200, 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < _LONGEST_INT else f"{x.bit_length()} bits"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: self.maxstring])

    def repr_bytearray(self, x: bytearray, level: int) -> str:
        return repr(x[: self.maxstring])

    def repr_set(self, x: set[Any], level: int) -> str:
        return (
            self._members("{", sorted(self.repr1(member, level - 1) for member in islice(x, self.maxset)), "}")
            if x
            else "set()"
        )

    def repr_frozenset(self, x: frozenset[Any], level: int) -> str:
        return f"frozenset({self.repr_set(set(islice(x, self.maxset)), level) if x else ''})"

    def _members(self, begin: str, parts: list[str], end: str) -> str:
        return begin + ", ".join(parts) + end


def short(value: Any) -> str:
    """The beginning of `repr(value)`, whatever its size.

    >>> short([1, "a", b"b"])
    "[1, 'a', b'b']"
    """
    return _SHORT.repr(value)


_SHORT = _Short()

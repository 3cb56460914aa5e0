"""Words, numbers and columns as reports show them.

Columns are aligned here, not by a table library: `ls` prints one row a key, and such a library's
import alone would cost a third of the time that a look takes.
"""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def shown(text: str) -> str:
    """A key or name with control, bidirectional and other unprintable characters escaped.

    >>> shown("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    forms = (
        f"{{:>{width}}}" if i in right else "{}" if i == last else f"{{:<{width}}}" for i, width in enumerate(widths)
    )
    line = "  ".join(forms).format
    return [line(*row).rstrip() for row in rows]

"""JSON as headers and indexes have it: one reading, or an error."""

from __future__ import annotations

import json
import re
from typing import Any

from ckptsurgeon.errors import quoted

_FREE = 1 << 20
"""Values that any text may have; beyond them each takes bytes of it."""
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of an escaped character: two of them are one, and one alone is none."""


def loads(raw: bytes) -> Any:
    """The value in UTF-8 text; ValueError (or RecursionError) for what is no JSON, for keys that stand twice,
    and for text that cannot be written."""
    _weigh(raw)
    return text(raw.decode("utf-8"))


def text(written: str) -> Any:
    """The value that a text of JSON says; the errors are those of `loads`."""
    made = json.loads(written, object_pairs_hook=_unique, parse_constant=_no_constant)
    if _SURROGATE.search(written):
        json.dumps(made, ensure_ascii=False).encode()
    return made


def _weigh(raw: bytes) -> None:
    """ValueError for text that is nearly nothing but brackets or small numbers, each of which takes many times
    its bytes in memory.  An entry of an index has one comma in more than sixteen bytes."""
    most = _FREE + len(raw) // 16
    if raw.count(b"[") + raw.count(b"{") + raw.count(b",") > most:
        bare = _TEXT.sub(b"", raw)  # names may hold what they like
        if bare.count(b"[") + bare.count(b"{") + bare.count(b",") > most:
            raise ValueError(f"more than {most} values in {len(raw)} bytes")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(doubled)} stands twice")
    return made


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")

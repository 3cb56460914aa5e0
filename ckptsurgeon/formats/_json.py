"""JSON as headers and indexes have it: one reading, or an error."""

from __future__ import annotations

import json
from typing import Any


def loads(raw: bytes) -> Any:
    """The value in UTF-8 text; ValueError (or RecursionError) for what is no JSON, and for keys that stand twice."""
    return text(raw.decode("utf-8"))


def text(written: str) -> Any:
    """The value that a text of JSON says; the errors are those of `loads`."""
    return json.loads(written, object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {doubled!r} stands twice")
    return made


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")

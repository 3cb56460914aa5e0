"""The entries of a safetensors header, one by one: a header never becomes a tree of objects.

What the library writes is recognised by one compiled pattern.  Any other spelling that JSON allows goes through the
`json` module, an entry at a time, and only after its length is known to be small: a header of brackets would otherwise
take thirty times its own size in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptsurgeon.errors import quoted
from ckptsurgeon.formats import _json

METADATA = "__metadata__"
_NUMBER = r"(?:0|[1-9][0-9]{0,18})"
_WRITTEN = re.compile(
    r'"([^"\\\x00-\x1f]*+)":\{"dtype":"([A-Z0-9_]{1,20})","shape":\[((?:'
    + _NUMBER
    + r"(?:,"
    + _NUMBER
    + r"){0,63})?)\],"
    r'"data_offsets":\[(' + _NUMBER + "),(" + _NUMBER + r")\]\}([,}])"
)
_BLANK = re.compile(r"[ \t\n\r]*+")
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_SMALL = re.compile(r"\{[^{}]{0,8192}+\}")
_FLAT = re.compile(r'\{(?:[ \t\n\r,:]|"(?:[^"\\]|\\.)*+")*+\}', re.DOTALL)

Entry = tuple[str, Any, Any, Any]
"""A key with its dtype, shape and data_offsets, as JSON has them."""


def entries(raw: bytes, metadata: dict[str, str]) -> Iterator[Entry]:
    """The entries of a header in its order; what `__metadata__` holds is put into `metadata`.

    Raises ValueError for what is no JSON, for keys that stand twice, and for anything but entries.
    """
    text = raw.decode("utf-8")
    seen: set[str] = set()
    at = _past(text, _past(text, 0), "{")
    mark = "}" if text[at : at + 1] == "}" else ","
    at += mark == "}"
    while mark == ",":
        found = _WRITTEN.match(text, at)
        if found is not None and found[1] != METADATA:
            key, dtype, shape, begin, end, mark = found.groups()
            entry = key, dtype, [*map(int, shape.split(","))] if shape else [], [int(begin), int(end)]
            at = found.end()
        else:
            key, value, at, mark = _pair(text, at)
            if key == METADATA:
                metadata |= _texts(value)
                entry = None
            else:
                entry = key, *_parts(key, value)
        if key in seen:
            raise ValueError(f"the key {quoted(key)} stands twice")
        seen.add(key)
        if entry is not None:
            yield entry
    if (at := _past(text, at)) != len(text):
        raise ValueError(f"{len(text) - at} characters follow its end")


def _past(text: str, at: int, mark: str = "") -> int:
    """The place behind blanks, and behind `mark`, which must be there."""
    found = _BLANK.match(text, at)
    assert found is not None
    at = found.end()
    if not mark:
        return at
    if text[at : at + 1] != mark:
        raise ValueError(f"{mark!r} is missing at character {at}")
    return _past(text, at + 1)


def _pair(text: str, at: int) -> tuple[str, Any, int, str]:
    """A key, its value, the place behind them, and the mark that followed."""
    at = _past(text, at)
    named = _TEXT.match(text, at)
    if named is None:
        raise ValueError(f"no key at character {at}")
    key = _json.text(named[0])
    at = _past(text, named.end(), ":")
    found = (_FLAT if key == METADATA else _SMALL).match(text, at)
    if found is None:
        if key == METADATA and text.startswith("null", at):
            value, end = {}, at + 4
        else:
            what = "no map of text to text" if key == METADATA else "no entry of dtype, shape and data_offsets"
            long = ", or a very long one" if key != METADATA and text.startswith("{", at) else ""
            raise ValueError(f"{quoted(key)} is {what}{long}")
    else:
        value, end = _json.text(found[0]), found.end()
    at = _past(text, end)
    mark = text[at : at + 1]
    if mark not in (",", "}"):
        raise ValueError(f"',' or '}}' is missing at character {at}")
    return key, value, at + 1, mark


def _texts(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{METADATA!r} is no map of text to text")
    return value


def _parts(key: str, value: Any) -> tuple[Any, Any, Any]:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{quoted(key)} is no entry of dtype, shape and data_offsets")
    return value["dtype"], value["shape"], value["data_offsets"]

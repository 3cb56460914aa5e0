"""The entries of a safetensors header, one by one: a header never becomes a tree of objects.

What the library writes is recognised by one compiled pattern.  Any other spelling that JSON allows goes through the
`json` module, an entry at a time, and only after its length is known to be small: a header of brackets would otherwise
take thirty times its own size in memory.  It is looked through as bytes, since one character can make a text of it
four times as large.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptsurgeon.errors import LimitError, quoted
from ckptsurgeon.formats import _json
from ckptsurgeon.limits import Limits

METADATA = "__metadata__"
_METADATA = METADATA.encode()
_NUMBER = rb"(?:0|[1-9][0-9]{0,18})"
_WRITTEN = re.compile(
    rb'"([^"\\\x00-\x1f]*+)":\{"dtype":"([A-Z0-9_]{1,20})","shape":\[((?:'
    + _NUMBER
    + rb"(?:,"
    + _NUMBER
    + rb"){0,63})?)\],"
    rb'"data_offsets":\[(' + _NUMBER + rb"),(" + _NUMBER + rb")\]\}([,}])"
)
_BLANK = re.compile(rb"[ \t\n\r]*+")
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_SMALL = re.compile(rb"\{[^{}]{0,8192}+\}")
_FLAT = re.compile(rb'\{(?:[ \t\n\r,:]|"(?:[^"\\]|\\.)*+")*+\}', re.DOTALL)

Entry = tuple[str, Any, Any, Any]
"""A key with its dtype, shape and data_offsets, as JSON has them."""


def entries(raw: bytes | bytearray, metadata: dict[str, str], limits: Limits) -> Iterator[Entry]:
    """The entries of a header in its order; what `__metadata__` holds is put into `metadata`.

    Raises ValueError for what is no JSON, for keys that stand twice, and for anything but entries; LimitError.
    """
    seen: set[str] = set()
    at = _past(raw, _past(raw, 0), b"{")
    mark = b"}" if raw[at : at + 1] == b"}" else b","
    at += mark == b"}"
    while mark == b",":
        entry: Entry | None = None
        found = _WRITTEN.match(raw, at)
        if found is not None and found[1] != _METADATA:
            name, dtype, shape, begin, end, mark = found.groups()
            key = name.decode()
            entry = key, dtype.decode(), [*map(int, shape.split(b","))] if shape else [], [int(begin), int(end)]
            at = found.end()
        else:
            key, value, at, mark = _pair(raw, at, limits)
            if key == METADATA:
                metadata |= _texts(value)
            else:
                entry = key, *_parts(key, value)
        if key in seen:
            raise ValueError(f"the key {quoted(key)} stands twice")
        seen.add(key)
        if len(seen) > limits.archive_members:
            raise LimitError("a header of more entries", "archive_members", limits.archive_members)
        if entry is not None:
            yield entry
    if (at := _past(raw, at)) != len(raw):
        raise ValueError(f"{len(raw) - at} bytes follow its end")


def _past(raw: bytes | bytearray, at: int, mark: bytes = b"") -> int:
    """The place behind blanks, and behind `mark`, which must be there."""
    found = _BLANK.match(raw, at)
    assert found is not None
    at = found.end()
    if not mark:
        return at
    if raw[at : at + 1] != mark:
        raise ValueError(f"{mark.decode()!r} is missing at byte {at}")
    return _past(raw, at + 1)


def _pair(raw: bytes | bytearray, at: int, limits: Limits) -> tuple[str, Any, int, bytes]:
    """A key, its value, the place behind them, and the mark that followed."""
    at = _past(raw, at)
    named = _TEXT.match(raw, at)
    if named is None:
        raise ValueError(f"no key at byte {at}")
    key = _json.text(named[0].decode())
    at = _past(raw, named.end(), b":")
    found = (_FLAT if key == METADATA else _SMALL).match(raw, at)
    if found is None:
        if key == METADATA and raw.startswith(b"null", at):
            value, end = {}, at + 4
        else:
            what = "no map of text to text" if key == METADATA else "no entry of dtype, shape and data_offsets"
            long = ", or a very long one" if key != METADATA and raw.startswith(b"{", at) else ""
            raise ValueError(f"{quoted(key)} is {what}{long}")
    else:
        if key == METADATA:
            _weigh(found.end() - at, raw.count(b'"', at, found.end()) // 4, limits)
        value, end = _json.text(found[0].decode()), found.end()
    at = _past(raw, end)
    mark = bytes(raw[at : at + 1])
    if mark not in (b",", b"}"):
        raise ValueError(f"',' or '}}' is missing at byte {at}")
    return key, value, at + 1, mark


def _weigh(nbytes: int, pairs: int, limits: Limits) -> None:
    """LimitError for metadata of so many bytes, and at most so many pairs, that would take too much memory."""
    if nbytes > limits.metadata_bytes:
        raise LimitError(f"metadata of {nbytes} bytes", "metadata_bytes", limits.metadata_bytes)
    if pairs > limits.archive_members:
        raise LimitError("metadata of more entries", "archive_members", limits.archive_members)


def _texts(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{METADATA!r} is no map of text to text")
    return value


def _parts(key: str, value: Any) -> tuple[Any, Any, Any]:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{quoted(key)} is no entry of dtype, shape and data_offsets")
    return value["dtype"], value["shape"], value["data_offsets"]

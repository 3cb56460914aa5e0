"""The entries of a safetensors header are what the json module reads of it, in every spelling."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.formats import _entries, _json
from ckptsurgeon.limits import DEFAULT

KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(0, 2**63 - 1)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "what\n"]),
        "shape": st.lists(NUMBERS, max_size=66),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)
HEADERS = st.builds(
    lambda entries, metadata: entries | ({} if metadata is None else {_entries.METADATA: metadata}),
    st.dictionaries(KEYS, ENTRIES, max_size=4),
    st.none() | st.dictionaries(KEYS, KEYS | st.just('{"a": [1]}'), max_size=3),
)
SPELLINGS = st.fixed_dictionaries(
    {
        "separators": st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r")]),
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 2]),
        "sort_keys": st.booleans(),
    }
)


def read(raw: bytes) -> Any:
    """The header as a dict again, its keys in order; or ValueError."""
    metadata: dict[str, str] = {}
    parts = ("dtype", "shape", "data_offsets")
    found = {key: dict(zip(parts, rest, strict=True)) for key, *rest in _entries.entries(raw, metadata, DEFAULT)}
    return list(found.items()), metadata


def by_json(raw: bytes) -> Any:
    found = _json.loads(raw)
    if not isinstance(found, dict):
        raise ValueError("no object")
    metadata = found.pop(_entries.METADATA, {})
    for value in (*found.values(), metadata):
        if not isinstance(value, dict):
            raise ValueError("no entry")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("no texts")
    for value in found.values():
        if value.keys() != {"dtype", "shape", "data_offsets"} or any(isinstance(part, dict) for part in value.values()):
            raise ValueError("no entry")
        if not {"{", "}"}.isdisjoint(json.dumps([*value.values()])):
            raise ValueError("no dtype")  # braces in it: both ways end in an error, the one sooner
    return list(found.items()), metadata


@given(HEADERS, SPELLINGS, st.sampled_from(["", " ", "\n  "]))
def test_every_spelling_of_a_header_is_read_as_json_reads_it(header: Any, spelling: Any, blank: str) -> None:
    raw = (blank + json.dumps(header, **spelling) + blank).encode()
    assert read(raw) == by_json(raw)


@given(HEADERS, SPELLINGS, st.data())
def test_a_header_with_a_change_is_refused_where_json_refuses_it(header: Any, spelling: Any, data: Any) -> None:
    """One character more, less or other: both read the same, or neither reads it."""
    text = json.dumps(header, **spelling)
    at = data.draw(st.integers(0, len(text)))
    length, more = (
        data.draw(st.integers(0, 2)),
        data.draw(st.sampled_from(["", *'{}[],:"\\ 0123-.eE\n\0', "null", "1.5", "٣"])),
    )
    raw = (text[:at] + more + text[at + length :]).encode()
    try:
        expected = by_json(raw)
    except (ValueError, RecursionError):
        expected = None
    try:
        found = read(raw)
    except (ValueError, RecursionError):
        found = None
    assert found == expected


def test_a_key_that_stands_twice_is_refused_in_both_spellings() -> None:
    entry = '"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    for raw in (f"{{{entry},{entry}}}", f"{{{entry}, {entry}}}", '{"__metadata__":{},"__metadata__":{}}'):
        for one in (read, by_json):
            try:
                one(raw.encode())
            except ValueError as error:
                assert "stands twice" in str(error)
            else:
                raise AssertionError(raw)

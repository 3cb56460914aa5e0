"""Headers of tar archives, one after the other: no file's contents are read.

Every header must have its checksum, every number its form, and pax records must agree with their
lengths.

Source: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual,
"Basic Tar Format" (long names, numbers in base 256).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

_BLOCK = 512
_MOST_HEADER = 1 << 20
_KINDS: dict[bytes, Literal["file", "link", "folder", "device"]] = {
    b"0": "file",
    b"\0": "file",
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "device",
    b"7": "file",
}


class BadTar(Exception):
    """The archive is damaged; the text says how."""


class Ended(BadTar):
    """The archive ends, without an end mark, where a header should be."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One member: the byte where its contents begin, and how many they are."""

    name: str
    kind: Literal["file", "link", "folder", "device"]
    offset: int
    size: int


Fetch = Callable[[int, int], bytes]
"""Bytes by offset and count, in ascending order of offsets; fewer where the archive ends."""


def is_header(block: bytes) -> bool:
    """Whether a block is the header of a tar member, by its checksum."""
    if len(block) < _BLOCK or not block.strip(b"\0"):
        return False
    try:
        return _number(block[148:156], "checksum") == _sum(block)
    except BadTar:
        return False


def entries(fetch: Fetch) -> Iterator[Entry]:
    """The members in order, up to the end mark (two blocks of zeros), which must be there.

    A member's contents may reach past the end of the archive: who uses them must look.
    """
    at, extra, everywhere = 0, dict[str, str](), dict[str, str]()
    while (block := _header(fetch, at)) is not None:
        kind, size, at = block[156:157], _number(block[124:136], "size"), at + _BLOCK
        if kind in b"xgLK":
            words = _contents(fetch, at, size)
            at += _padded(size)
            if kind == b"g":
                everywhere |= _pax(words)
            elif kind != b"K":  # the target of a link, whose name is enough
                extra |= _pax(words) if kind == b"x" else {"path": _text(words.rstrip(b"\0"))}
        else:
            entry = _entry(block, at, size, {**everywhere, **extra})
            yield entry
            extra = {}
            at = after(entry)


def _header(fetch: Fetch, at: int) -> bytes | None:
    """The header at a byte; None at the end mark."""
    block = fetch(at, _BLOCK)
    if len(block) < _BLOCK:
        raise Ended(f"the archive ends at byte {at + len(block)} without an end mark")
    if not block.strip(b"\0"):
        if len(second := fetch(at + _BLOCK, _BLOCK)) < _BLOCK or second.strip(b"\0"):
            raise BadTar(f"one block of zeros at byte {at} where two end an archive")
        return None
    if not is_header(block):
        raise BadTar(f"what lies at byte {at} is no header (its checksum is wrong)")
    return block


def _entry(block: bytes, at: int, size: int, known: dict[str, str]) -> Entry:
    kind = block[156:157]
    if any(key.startswith("GNU.sparse") for key in known) or kind not in _KINDS:
        raise BadTar(f"a member of the kind {kind!r}, which is no plain file")
    size = _decimal(known["size"]) if "size" in known else size
    return Entry(known.get("path") or _name(block), _KINDS[kind], at, size if _KINDS[kind] == "file" else 0)


def after(entry: Entry) -> int:
    """The byte where the next header, or the end mark, should be."""
    return entry.offset + _padded(entry.size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _sum(block: bytes) -> int:
    return sum(block[:148]) + 8 * ord(" ") + sum(block[156:])


def _number(field: bytes, what: str) -> int:
    """An octal number, or one in base 256 with the first bit set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits or digits.strip(b"01234567"):
        raise BadTar(f"a header's {what} is {field!r}, no number")
    return int(digits, 8)


def _decimal(digits: str) -> int:
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 20:
        raise BadTar(f"a pax size of {digits[:30]!r}")
    return int(digits)


def _name(block: bytes) -> str:
    name = _text(block[:100].split(b"\0", 1)[0])
    prefix = _text(block[345:500].split(b"\0", 1)[0]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _contents(fetch: Fetch, at: int, size: int) -> bytes:
    if size > _MOST_HEADER:
        raise BadTar(f"an extended header of {size} bytes")
    got = fetch(at, size)
    if len(got) < size:
        raise BadTar(f"the archive ends inside the extended header at byte {at}")
    return got


def _pax(words: bytes) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE` and a newline, end to end."""
    found: dict[str, str] = {}
    at = 0
    while at < len(words):
        blank = words.find(b" ", at, at + 21)
        digits = words[at:blank] if blank > at else b""
        end = at + int(digits) if digits.isdigit() else 0
        record = words[blank + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(words) or record[-1:] != b"\n" or not equals:
            raise BadTar("a pax header whose records do not fit their lengths")
        found[_text(key)] = _text(value)
        at = end
    return found

"""A strict reader of zip directories: one reading of an archive, or an error that says why not.

Names, sizes and checksums come from the central directory, data offsets from the local headers.
Whatever two readers could understand differently is refused: bytes outside of the archive,
doubled or differing names, overlapping members, counts that disagree.

Source: PKWARE's APPNOTE.TXT 6.3, sections 4.3.6–4.4.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import gt

from ckptsurgeon.errors import LimitError, quoted
from ckptsurgeon.limits import Limits

_EOCD = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL_SIZE, _LOCAL_SIZE = _CENTRAL.size, _LOCAL.size
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTORS = frozenset((0, 12, 16, 20, 24))
"""Bytes that may follow the data of a member that was written as a stream: its checksum and sizes, of 4 or 8 bytes,
behind a signature or not."""
_NEAR, _WINDOW = 1 << 10, 1 << 14
_ZIP64, _UNICODE_PATH = 1, 0x7075
_FAR = 1 << 62
"""No file reaches so far, and the system takes no number that is much larger."""


class BadZip(Exception):
    """The archive is damaged or ambiguous; the text says which."""


@dataclass(slots=True)
class Member:
    """One member: `offset` is the first byte of its data, `size` its bytes, `packed` what they
    take in the file; `deflated` tells whether the two differ in kind.  `crc` is None in archives
    whose every checksum is zero: torch can be told to leave them out.

    Not changed after the directory is read, but not frozen: a model has a hundred thousand of them.
    """

    name: str
    offset: int
    size: int
    packed: int
    crc: int | None
    deflated: bool


def read_directory(descriptor: int, size: int, limits: Limits) -> dict[str, Member]:
    """All members of the archive, by name, in the order of the central directory."""
    entries, start, length = _end(descriptor, size)
    if entries > limits.archive_members:
        raise LimitError(f"an archive of {entries} members", "archive_members", limits.archive_members)
    if length < entries * _CENTRAL.size:
        raise BadZip(f"the directory of {length} bytes cannot hold {entries} members")
    directory = _pread(descriptor, length, start)
    headers = _Headers(descriptor)
    members: dict[str, Member] = {}
    begins, streamed = array("Q"), bytearray()
    at = 0
    for _ in range(entries):
        at, member, header, stream = _entry(directory, at, headers, start)
        if member.name in members:
            raise BadZip(f"two members are named {quoted(member.name)}")
        members[member.name] = member
        begins.append(header)
        streamed.append(stream)
    if at != length:
        raise BadZip(f"{length - at} bytes are left in the directory after its {entries} entries")
    _tile(begins, list(members.values()), streamed, start)
    if not any(member.crc for member in members.values()):
        for member in members.values():
            member.crc = None
    return members


def _tile(begins: Sequence[int], members: list[Member], streamed: bytearray, end: int) -> None:
    """Members must lie one behind the other, from the first byte of the file; `begins` are their headers, and behind
    those that are `streamed` their sums and sizes follow."""
    order: Sequence[int] = range(len(begins))
    if any(map(gt, begins, begins[1:])):
        order = sorted(order, key=lambda number: (begins[number], members[number].offset + members[number].packed))
    stop, name, stream = 0, "", 0
    for number in order:
        member, start = members[number], begins[number]
        if not name and start:
            raise BadZip(f"the first member begins at byte {start}, not at 0")
        if stop > start:
            raise BadZip(f"{quoted(name)} runs into {quoted(member.name)}")
        if start != stop and not (stream and start - stop in _DESCRIPTORS):
            raise BadZip(f"{start - stop} bytes before {quoted(member.name)} belong to no member")
        stop, name, stream = member.offset + member.packed, member.name, streamed[number]
    if stop > end:
        raise BadZip(f"{quoted(name)} runs into 'the directory'")
    if end != stop and not (stream and end - stop in _DESCRIPTORS):
        raise BadZip(f"{end - stop} bytes before the directory belong to no member")


class _Headers:
    """Reads local headers; those of small members, which lie close together, many at once."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.begin, self.window = 0, b""

    def read(self, count: int, at: int) -> bytes:
        """`count` bytes at byte `at` of the file; BadZip when they are not there."""
        begin = at - self.begin
        if begin >= 0 and begin + count <= len(self.window):
            return self.window[begin : begin + count]
        near = 0 <= at - self.begin - len(self.window) < _NEAR
        self.begin, self.window = at, b""
        if near and at < _FAR:
            self.window = os.pread(self.descriptor, _WINDOW, at)
        if len(self.window) < count:
            self.window = _pread(self.descriptor, count, at)
        return self.window[:count]


def _pread(descriptor: int, count: int, offset: int) -> bytes:
    if not 0 <= offset < _FAR:
        raise BadZip(f"{count} bytes are announced at byte {offset}")
    data = os.pread(descriptor, count, offset)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), offset + len(data)) if data else b""
        if not more:
            raise BadZip(f"{count} bytes are announced at byte {offset}, {len(data)} are there")
        data += more
    return data


def _end(descriptor: int, size: int) -> tuple[int, int, int]:
    """Entries, start and length of the central directory."""
    base = max(0, size - _EOCD.size - _U16)
    tail = _pread(descriptor, size - base, base)
    signatures = _signatures(tail)
    found = [at for at in signatures if at + _EOCD.size + _EOCD.unpack_from(tail, at)[7] == len(tail)]
    if not found:
        raise BadZip("the end of the archive is missing (a truncated file?)")
    if len(found) > 1 or signatures[-1] != found[0]:  # of which others may take the last one
        raise BadZip("two directories end this archive")
    end = base + found[0]
    _, disk, first, here, entries, length, start, _ = _EOCD.unpack_from(tail, found[0])
    if disk not in (0, _U16) or first not in (0, _U16) or here != entries:
        raise BadZip("the archive is one part of several")
    directory_end = end
    if end >= _LOCATOR.size and (located := _pread(descriptor, _LOCATOR.size, end - _LOCATOR.size))[:4] == b"PK\6\7":
        place = _LOCATOR.unpack(located)[2]
        if place + _EOCD64.size + _LOCATOR.size != end:
            raise BadZip("the zip64 end record is not where its locator says")
        signature, rest, _, _, disk, first, here, entries64, length64, start64 = _EOCD64.unpack(
            _pread(descriptor, _EOCD64.size, place)
        )
        if signature != b"PK\6\6" or rest != _EOCD64.size - 12 or disk or first or here != entries64:
            raise BadZip("the zip64 end record is damaged")
        for narrow, wide, all_ones in ((entries, entries64, _U16), (length, length64, _U32), (start, start64, _U32)):
            if narrow not in (wide, all_ones):
                raise BadZip("the two end records disagree")
        entries, length, start, directory_end = entries64, length64, start64, place
    if start + length != directory_end:
        raise BadZip(
            f"the directory of {length} bytes at {start} does not end at byte {directory_end}, where the archive does"
        )
    return entries, start, length


def _signatures(tail: bytes) -> list[int]:
    found, at = [], tail.find(b"PK\5\6")
    while at >= 0:
        if at + _EOCD.size <= len(tail):
            found.append(at)
        at = tail.find(b"PK\5\6", at + 1)
    return found


def _entry(directory: bytes, at: int, headers: _Headers, end: int) -> tuple[int, Member, int, bool]:
    if at + _CENTRAL.size > len(directory):
        raise BadZip("the directory ends inside an entry")
    (signature, _, _, flags, method, _, _, crc, packed, size, n, m, k, disk, _, _, header) = _CENTRAL.unpack_from(
        directory, at
    )
    stop = at + _CENTRAL.size + n + m + k
    if signature != b"PK\1\2" or stop > len(directory) or disk:
        raise BadZip("the directory is damaged")
    start = at + _CENTRAL_SIZE
    raw = directory[start : start + n]
    name = _name(raw)
    extra = directory[start + n : start + n + m]
    if _U32 in (size, packed, header) or (m and b"\1\0" in extra):
        size, packed, header = _wide(extra, name, size, packed, header)
    if m and b"up" in extra and any(kind == _UNICODE_PATH and body[5:] != raw for kind, body in _fields(extra)):
        raise BadZip(f"{quoted(name)} has another name in a Unicode Path field")
    if flags & 0x2061:
        raise BadZip(f"{quoted(name)} is encrypted or patched")
    if method not in (0, 8) or (method == 0 and packed != size):
        raise BadZip(f"{quoted(name)} is packed in a way that torch does not use (method {method})")
    told = (crc, packed, size)
    offset = _data_offset(headers, header, raw, method, told)
    if offset + packed > end:
        raise BadZip(f"{quoted(name)} runs past the end of its archive")
    return stop, Member(name, offset, size, packed, crc, method == 8), header, bool(flags & 8)


def _fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of an extra block: their kinds and what they hold."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        yield kind, extra[at + 4 : at + 4 + length]
        at += 4 + length


def _name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadZip(f"a member's name is no UTF-8: {quoted(raw)}") from None
    if "\0" in name:
        raise BadZip(f"a member's name holds a NUL: {quoted(name)}")
    return name


def _wide(extra: bytes, name: str, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The three numbers, from the zip64 field where the narrow ones are all ones.

    A field that nobody needs may be there, if it says the same.
    """
    found, narrow = None, (size, packed, header)
    for kind, body in _fields(extra):
        if kind == _ZIP64:
            if found is not None:
                raise BadZip(f"{quoted(name)} has two zip64 fields")
            wide = [struct.unpack_from("<Q", body, i)[0] for i in range(0, len(body) - len(body) % 8, 8)]
            needed = sum(number == _U32 for number in narrow)
            if len(wide) < needed:
                break
            taken = iter(wide)
            found = tuple(next(taken) if number == _U32 else number for number in narrow)
            if len(wide) > needed and tuple(wide) != found[: len(wide)]:
                raise BadZip(f"{quoted(name)} has a zip64 field that says something else")
    if found is None and _U32 in narrow:
        raise BadZip(f"{quoted(name)} has no zip64 field for its size")
    return (size, packed, header) if found is None else (found[0], found[1], found[2])


def _data_offset(headers: _Headers, header: int, raw: bytes, method: int, told: tuple[int, int, int]) -> int:
    """The first byte of a member's data; `told` are checksum and sizes as the directory has them.

    A member that was written as a stream has them behind its data, and zeros in its place; large ones have
    their sizes in a zip64 field there.
    """
    local = headers.read(_LOCAL_SIZE + len(raw), header)
    signature, _, flags, packing, _, _, crc, packed, size, n, m = _LOCAL.unpack_from(local)
    if packed == size == _U32 and (packed, size) != told[1:]:
        extra = headers.read(_LOCAL_SIZE + len(raw) + m, header)[_LOCAL_SIZE + len(raw) :]
        wide = next((body for kind, body in _fields(extra) if kind == _ZIP64 and len(body) >= 16), b"")
        if wide:
            size, packed = struct.unpack_from("<QQ", wide)
        elif flags & 8:
            size = packed = 0
    same = all(here == there or (flags & 8 and not here) for here, there in zip((crc, packed, size), told, strict=True))
    if (
        signature != b"PK\3\4"
        or n != len(raw)
        or local[_LOCAL_SIZE:] != raw
        or packing != method
        or flags & 0x2061
        or not same
    ):
        raise BadZip(f"{quoted(_name(raw))} is described differently by the directory and in its place")
    return header + _LOCAL_SIZE + int(n) + int(m)

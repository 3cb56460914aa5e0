"""Zip archives put together field by field, any of which may lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from .draw import Draw, number, pick, text

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
NAMES = (
    b"a/data.pkl", b"a/data/0", b"a/byteorder", b"b/data.pkl", b"data.pkl", b"a/", b"a//data.pkl", b"/a", b"../a",
    b"a\0b", b"\xff\xfe", b"a/constants.pkl", b"a/.data/extern_modules", b"a\\data.pkl", b"\x1b[31m", b"", b"a/x\n.pkl",
    b"A/DATA.PKL", b"n" * 300, "a/é".encode(), b"a/data/1", b"a/.data/version", b"a/model.pkl", b"a/code/__torch__.py",
)  # fmt: skip


@dataclass
class Member:
    """What both headers of a member say: `fields` are those of the central directory that lie, `local` those of the
    local header; `gap` are bytes before it."""

    name: bytes
    data: bytes
    method: int = 0
    packed: bytes = b""
    fields: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    local_name: bytes | None = None
    extra: bytes = b""
    local_extra: bytes = b""
    comment: bytes = b""
    gap: bytes = b""
    wide: bool = False

    @property
    def flags(self) -> int:
        """That the name is UTF-8, where that matters."""
        return 0 if self.name.isascii() else 0x800


@dataclass
class End:
    """What the end of the archive says; `fields` lie."""

    fields: dict[str, int] = field(default_factory=dict)
    wide: dict[str, int] | None = None
    locator: int | None = None
    comment: bytes = b""
    before: bytes = b""
    after: bytes = b""
    first: bytes = b""


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def assembled(members: Sequence[Member], end: End) -> bytes:
    """The archive."""
    out, directory, at = [end.first], [], len(end.first)
    for one in members:
        crc, size = zlib.crc32(one.data), len(one.data)
        packed = one.packed or (_deflated(one.data) if one.method == 8 else one.data)
        near = one.local
        name = one.name if one.local_name is None else one.local_name
        header = at + len(one.gap)
        local = _LOCAL.pack(
            b"PK\3\4", 20, near.get("flags", one.flags) & _U16, near.get("method", one.method) & _U16, 0, 0,
            near.get("crc", crc) & _U32, near.get("packed", len(packed)) & _U32, near.get("size", size) & _U32,
            near.get("n", len(name)) & _U16, near.get("m", len(one.local_extra)) & _U16,
        )  # fmt: skip
        out += one.gap, local, name, one.local_extra, packed
        at = header + len(local) + len(name) + len(one.local_extra) + len(packed)
        directory.append(_central(one, crc, size, len(packed), header))
    table = b"".join(directory)
    out += end.before, table, _ended(end, len(members), len(table), at + len(end.before)), end.comment, end.after
    return b"".join(out)


def _central(one: Member, crc: int, size: int, packed: int, header: int) -> bytes:
    far, extra = one.fields, one.extra
    size, packed, header = far.get("size", size), far.get("packed", packed), far.get("header", header)
    if one.wide:
        extra = struct.pack("<HHQQQ", 1, 24, size % 2**64, packed % 2**64, header % 2**64) + extra
        size = packed = header = _U32
    return b"".join((
        _CENTRAL.pack(
            b"PK\1\2", 20, 20, far.get("flags", one.flags) & _U16, far.get("method", one.method) & _U16, 0, 0,
            far.get("crc", crc) & _U32, packed & _U32, size & _U32, far.get("n", len(one.name)) & _U16,
            far.get("m", len(extra)) & _U16, far.get("k", len(one.comment)) & _U16, far.get("disk", 0) & _U16, 0, 0,
            header & _U32,
        ),
        one.name, extra, one.comment,
    ))  # fmt: skip


def _ended(end: End, count: int, length: int, start: int) -> bytes:
    says, before = end.fields, b""
    if end.wide is not None:
        wide = end.wide
        words = [
            wide.get(key, value) % 2**64
            for key, value in (("here", count), ("entries", count), ("length", length), ("start", start))
        ]
        before = _END64.pack(b"PK\6\6", wide.get("rest", 44) % 2**64, 45, 45, wide.get("disk", 0) & _U32, 0, *words)
        place = start + length if end.locator is None else end.locator
        before += struct.pack("<4sLQL", b"PK\6\7", 0, place % 2**64, 1)
        if not says:
            count, length, start = _U16, _U32, _U32
    return before + _END.pack(
        b"PK\5\6", says.get("disk", 0) & _U16, says.get("first", 0) & _U16, says.get("here", count) & _U16,
        says.get("entries", count) & _U16, says.get("length", length) & _U32, says.get("start", start) & _U32,
        says.get("comment", len(end.comment)) & _U16,
    )  # fmt: skip


def lied(draw: Draw, members: list[Member], end: End) -> None:  # noqa: C901 - a line a lie
    """Make one thing of an archive a lie, a doubt, or a rare but sound form."""
    how = draw.below(12)
    if not members or how >= 8:
        _lied_end(draw, end, members)
        return
    one = pick(draw, members)
    if how == 0:
        one.fields[pick(draw, ("size", "packed", "header", "crc", "flags", "method", "n", "m", "k", "disk"))] = number(
            draw
        )
    elif how == 1:
        one.local[pick(draw, ("size", "packed", "crc", "flags", "method", "n", "m"))] = number(draw)
    elif how == 2:
        one.local_name = pick(draw, NAMES)
    elif how == 3:
        one.wide = True
        if draw.below(2):
            one.fields[pick(draw, ("size", "packed", "header"))] = number(draw)
    elif how == 4:
        one.extra = pick(draw, (b"\1\0\0\0", b"\1\0\x08\0" + bytes(8), b"\xff\xff\xff\xff", b"\1", b"AB\4\0abcd"))
        one.fields[pick(draw, ("size", "packed", "header", "x"))] = _U32
    elif how == 5:
        one.gap = draw.raw(draw.below(40)) if draw.below(2) else b"PK\3\4" + bytes(26)
    elif how == 6:
        one.method, one.fields["flags"] = pick(draw, ((8, 0), (0, 8), (8, 8), (8, 1), (12, 0), (9, 0), (14, 2)))
    elif draw.below(2):
        one.method, one.packed = (
            8,
            pick(draw, (b"\3\0", b"\xff" * 9, b"\1\5\0\xfa\xffhello", _deflated(one.data) + b"xx")),
        )
    else:
        one.local_extra, one.comment = draw.raw(draw.below(60)), draw.raw(draw.below(9))


def _lied_end(draw: Draw, end: End, members: list[Member]) -> None:
    how = draw.below(9)
    if how == 0:
        end.fields[pick(draw, ("disk", "first", "here", "entries", "length", "start", "comment"))] = number(draw)
    elif how == 1:
        end.wide = {}
    elif how == 2:
        end.wide = {pick(draw, ("rest", "disk", "here", "entries", "length", "start")): number(draw)}
    elif how == 3:
        end.wide, end.locator = {}, number(draw)
    elif how == 4:
        end.comment = pick(draw, (b"hello", b"PK\5\6" + bytes(18), bytes(22), b"PK\5\6" + bytes(16) + b"\1\0x"))
    elif how == 5:
        end.before = draw.raw(1 + draw.below(20))
    elif how == 6:
        end.after = pick(draw, (b"\0", b"PK\5\6" + bytes(18), b"garbage", bytes(100)))
    elif how == 7:
        end.first = pick(draw, (b"#!/bin/sh\n", b"PK\3\4", bytes(4)))
    elif members:
        one = pick(draw, members)
        members.insert(draw.below(len(members)), Member(one.name, one.data[: draw.below(9)]))


def member(draw: Draw) -> Member:
    """A small member of any name."""
    name = pick(draw, NAMES) if draw.below(3) else text(draw).encode("utf-8", "surrogatepass")
    return Member(name, draw.raw(draw.below(40)), 8 if draw.below(4) == 3 else 0)


def archive(draw: Draw) -> bytes:
    """An archive of a few small members, most of it sound."""
    members = [Member(b"a/%d" % at, draw.raw(draw.below(24)), 8 * (draw.below(4) == 3)) for at in range(draw.below(4))]
    if draw.below(2):
        members.append(member(draw))
    end = End()
    for _ in range(draw.below(3)):
        lied(draw, members, end)
    return assembled(members, end)

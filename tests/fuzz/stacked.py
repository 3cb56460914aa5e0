"""The kinds of torch before zip: stacked pickles with storages behind them, and tar archives."""

from __future__ import annotations

import io
import pickletools
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

from .draw import Draw, number, pick, scratched
from .pickles import Ops, changed, integer, parsed, pickled, tuple_of, utf8, value

_BLOCK = 512


def _split(raw: bytes, count: int | None = None) -> tuple[list[bytes], bytes]:
    """The pickles that a stretch begins with, and what follows them."""
    found: list[bytes] = []
    while raw and (count is None or len(found) < count):
        end = max(at for _, _, at in pickletools.genops(raw)) + 1
        found.append(raw[:end])
        raw = raw[end:]
    return found, raw


@dataclass
class Stacked:
    """A file of torch 0.4 to 1.5: magic number, protocol and system; the object; the keys of its storages; these, each
    with the number of its elements in 8 bytes before it."""

    pickles: list[Ops]
    storages: list[tuple[bytes, bytes]]

    @classmethod
    def of(cls, raw: bytes) -> Stacked:
        pickles, rest = _split(raw, 5)
        return cls([parsed(one) for one in pickles], _storages(rest) or [])


def _storages(rest: bytes) -> list[tuple[bytes, bytes]] | None:
    """The storages that fill a stretch, found by trying how wide their elements are."""
    if not rest:
        return []
    count = int.from_bytes(rest[:8], "little")
    for width in (4, 8, 1, 2, 16):
        end = 8 + count * width
        after = _storages(rest[end:]) if end <= len(rest) else None
        if after is not None:
            return [(rest[:8], rest[8:end]), *after]
    return None


def legacy(draw: Draw, seeds: Sequence[Stacked], pool: Sequence[Ops]) -> bytes:
    """Stacked pickles, one of them changed, then storages, one of them changed."""
    seed = pick(draw, seeds)
    parts = [b"".join(ops) for ops in seed.pickles]
    storages = list(seed.storages)
    how = draw.below(8)
    if how < 4:
        parts[3] = pickled(draw, [seed.pickles[3]] if how < 3 else pool)
    elif how == 4:
        at = draw.below(5)
        parts[at] = b"".join(changed(draw, seed.pickles[at], pool))
    elif how == 5 and storages:
        at, odd = draw.below(len(storages)), draw.below(5)
        count, data = storages[at]
        if odd == 0:
            del storages[at]
        elif odd == 1:
            storages.append(storages[at])
        elif odd == 2:
            storages[at] = struct.pack("<Q", number(draw) % 2**64), data
        elif odd == 3:
            storages[at] = count, data[: draw.below(len(data) + 1)]
        else:
            storages[at] = count, data + draw.raw(1 + draw.below(9))
    elif how == 6:
        keys = b"](" + b"".join(value(draw, 5) if draw.below(2) else utf8(str(draw.below(4))) for _ in range(3)) + b"e."
        parts[4] = b"\x80\2" + keys
    made = b"".join(parts) + b"".join(count + data for count, data in storages)
    return scratched(draw, made) if how == 7 else made


@dataclass
class Tape:
    """A tar archive of the earliest torch, its members in parts."""

    sys_info: bytes
    pickle: Ops
    storages: list[tuple[bytes, bytes, bytes]]
    views: bytes
    tensors: list[tuple[bytes, bytes]]

    @classmethod
    def of(cls, raw: bytes, widths: Sequence[int]) -> Tape:
        """`widths` are the bytes of an element of each storage."""
        with tarfile.open(fileobj=io.BytesIO(raw)) as opened:
            held = {info.name: opened.extractfile(info).read() for info in opened}  # type: ignore[union-attr]
        _, rest = _split(held["storages"], 1)
        storages = []
        for width in widths:
            (head,), rest = _split(rest, 1)
            size = 8 + width * int.from_bytes(rest[:8], "little")
            storages.append((head, rest[:8], rest[8:size]))
            rest = rest[size:]
        _, after = _split(held["tensors"], 1)
        tensors = []
        while after:
            (head,), after = _split(after, 1)
            size = 8 + 8 * (2 * int.from_bytes(after[:4], "little") + 1)
            tensors.append((head, after[:size]))
            after = after[size:]
        return cls(held["sys_info"], parsed(held["pickle"]), storages, rest, tensors)


def _count(draw: Draw, count: int) -> bytes:
    return b"\x80\2" + integer(number(draw) if draw.below(12) == 11 else count) + b"."


def _described(draw: Draw, head: bytes) -> bytes:
    """The pickled words before a storage or tensor, some of them others."""
    how = draw.below(4)
    if how == 0:
        return b"".join(changed(draw, parsed(head), [parsed(head)]))
    if how == 1:
        return b"\x80\2" + tuple_of(*(value(draw, 5) for _ in range(3))) + b"."
    return head if how == 2 else b"\x80\2" + value(draw) + b"."


def tape(draw: Draw, seeds: Sequence[Tape], pool: Sequence[Ops]) -> bytes:
    """The archive, with changes in one of its members or in its headers, whose checksums are right."""
    seed = pick(draw, seeds)
    storages, tensors, views = list(seed.storages), list(seed.tensors), seed.views
    raw, how = b"".join(seed.pickle), draw.below(8)
    if how in (1, 2):
        raw = pickled(draw, [seed.pickle] if draw.below(3) < 2 else pool)
    elif how == 3:
        at = draw.below(len(storages))
        head, count, data = storages[at]
        storages[at] = pick(draw, (
            (_described(draw, head), count, data), (head, struct.pack("<Q", number(draw) % 2**64), data),
            (head, count, data[:-1]), (head, count, data + b"x"),
        ))  # fmt: skip
    elif how == 4:
        at = draw.below(len(tensors))
        head, numbers = tensors[at]
        place = 8 * draw.below(len(numbers) // 8)
        lie = numbers[:place] + struct.pack("<Q", number(draw) % 2**64) + numbers[place + 8 :]
        tensors[at] = pick(draw, ((head, lie), (head, lie), (_described(draw, head), numbers), (head, numbers[:-8])))
    elif how == 5:
        four = tuple_of(*(integer(pick(draw, (101, 102, 104, 105, 0, number(draw)))) for _ in range(4)))
        views = b"\x80\2" + pick(draw, (b"](" + four + b"e", value(draw), b"](" + value(draw) + four + b"e")) + b"."
    stored = _count(draw, len(storages)) + b"".join(map(b"".join, storages)) + views
    held = _count(draw, len(tensors)) + b"".join(map(b"".join, tensors))
    members = [("sys_info", seed.sys_info), ("pickle", raw), ("tensors", held), ("storages", stored)]
    made = taped(draw, members, odd=how >= 6)
    return scratched(draw, made) if draw.below(16) == 15 else made


_FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
_WORDS = (
    b"", b"\0", b"7" * 12, b"x", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"../../x", b"/etc/passwd", b"5", b"1", b"2",
    b"3",
    b"g", b"x", b"L", b"K", b"S", b"A", b"00000000010\0", b"ustar\0", b"ustar  ", b"0" * 11, b"-0000000001", b" 1",
)  # fmt: skip


def header(name: bytes, size: int, kind: bytes = b"0") -> bytearray:
    """A header without its checksum."""
    made = bytearray(_BLOCK)
    made[: len(name)] = name[:100]
    made[100:108], made[124:136], made[136:148] = b"0000644\0", b"%011o\0" % size, b"00000000000\0"
    made[156:157], made[257:265] = kind, b"ustar\x0000"
    return made


def summed(made: bytearray) -> bytes:
    """A header with its checksum."""
    made[148:156] = b"%06o\0 " % (sum(made[:148]) + 8 * 32 + sum(made[156:]))
    return bytes(made)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _BLOCK)


def _pax(draw: Draw) -> bytes:
    words = pick(draw, (b"path=pickle", b"size=0", b"size=99999999999999999999", b"path=", b"size=x", b"GNU.sparse.a=1",
                        b"a", b"path=../x", b"size=-1", b"mtime=1.5"))  # fmt: skip
    record = b" " + words + b"\n"
    length = len(record) + 2
    return b"%d" % pick(draw, (length, length, length, length + 1, 0, 10**19)) + record


def taped(draw: Draw, members: list[tuple[str, bytes]], odd: bool) -> bytes:
    """A tar archive."""
    out: list[bytes] = []
    at = draw.below(len(members)) if odd else -1
    for number_, (name, data) in enumerate(members):
        made = header(name.encode(), len(data))
        if number_ == at:
            how = draw.below(5)
            if how < 2:
                begin, width = pick(draw, _FIELDS)
                word = pick(draw, _WORDS)[:width]
                made[begin : begin + width] = word + bytes(width - len(word))
            elif how == 2:
                words = _pax(draw)
                out += summed(header(b"pax", len(words), pick(draw, (b"x", b"g", b"L", b"K")))), _padded(words)
            elif how == 3:
                out += summed(header(name.encode(), len(data))), _padded(data)
            else:
                data = data[:-1] if draw.below(2) else data + bytes(_BLOCK)
        out += summed(made), _padded(data)
    end = bytes(pick(draw, (2, 2, 2, 0, 1, 20)) * _BLOCK) if odd else bytes(2 * _BLOCK)
    return b"".join(out) + end + (draw.raw(3) if odd and draw.below(6) == 5 else b"")

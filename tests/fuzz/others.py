"""Files of other kinds, checkpoints that are packed once more, metadata of distributed ones, and lines of rules."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Sequence

from ckptsurgeon.ops import OPERATIONS

from . import stacked, zips
from .draw import Draw, pick, scratched
from .pickles import Ops, changed, pickled


def dcp(draw: Draw, seeds: Sequence[Ops], pool: Sequence[Ops]) -> bytes:
    """The metadata of a distributed checkpoint; its beginning, by which it is told, stays as it is in most."""
    if draw.below(8) == 7:
        return pickled(draw, pool)
    ops = pick(draw, seeds)
    cut = draw.below(8)
    return b"".join(ops[:cut] + changed(draw, ops[cut:], [*seeds, ops]))


_FOREIGN = (
    b"version https://git-lfs.github.com/spec/v1\n", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"\x89HDF", b"GGUF", b"<html>",
    b"\x93NUMPY", b"\x7fELF", b"{\"a\": 1}", b"\x81\xa1a\x80", b"\xde\0\1\xa1a\x80", b"\x08\x01\x12\x02ab", b"\0" * 64,
    b"\x0a\x06\x0a\x01a\x12\x01b", b"\x80\2}q\0.", b"\x08\x07:\x02ab", b"\0\0\0\0TFL3", b"PK\5\6" + bytes(18), b"",
    b"\0",
)  # fmt: skip


def foreign(draw: Draw, files: list[bytes]) -> bytes:
    """A file of another program, or a checkpoint packed once more, in parts and whole."""
    raw = pick(draw, _FOREIGN) + draw.raw(draw.below(60)) if draw.below(3) == 0 else pick(draw, files)
    how = draw.below(8)
    if how in (1, 2):
        raw = pick(draw, (gzip.compress(raw, 1), bz2.compress(raw, 1), lzma.compress(raw, preset=0)))
    elif how == 3:
        raw = stacked.taped(
            draw, [(pick(draw, ("a.pth", "b", "\x1b[31m", "é", "../x")), raw), ("b", b"x")], odd=draw.below(2) == 1
        )
    elif how == 4:
        raw = gzip.compress(stacked.taped(draw, [("a.pth", raw)], odd=draw.below(2) == 1), 1)
    elif how == 5:
        raw = zips.assembled([zips.Member(pick(draw, zips.NAMES), raw[:200]), zips.member(draw)], zips.End())
    return scratched(draw, raw) if draw.below(3) == 2 else raw


_PATTERNS = (
    "a", "^module\\.", r"(\d+)", r"(?P<n>.)", "(", "[", "a{99999999999}", "(?i)a", ".*", "'a b'", '"a"', "''", "x=1",
    "=>",
    "((((a))))", "\\", "(?<=a)b", "(a*)*", "[[a]", r"\1", r"(?P=n)", "(?:" * 80, "drop", "\x1b[31m", "é", "\0", "'",
)  # fmt: skip
_VALUES = (r"\1", r"\g<n>", r"\g<99>", "x", "0,1", "-1", "1,2,3", "9" * 19, "bf16", "nothing", "when=target", "when=x",
           "0,0", "-1,-1", "''", r"\g<", "{i}", "=>", "dim=0", "1,", "NaN")  # fmt: skip


def rule(draw: Draw) -> bytes:
    """A line, its words in the order of the grammar or nearly."""
    operation = pick(draw, ("", *OPERATIONS, "drp"))
    words = [operation, pick(draw, _PATTERNS) if draw.below(4) else pick(draw, _VALUES)]
    if draw.below(2):
        words += ["=>"] * (1 + (draw.below(9) == 8)) + [pick(draw, _VALUES) for _ in range(draw.below(3))]
    words += [pick(draw, (*_VALUES, *_PATTERNS)) for _ in range(draw.below(3))]
    line = pick(draw, (" ", " ", "  ", "\t", "\u2003")).join(words).encode("utf-8", "surrogatepass")
    return scratched(draw, line) if draw.below(5) == 4 else line

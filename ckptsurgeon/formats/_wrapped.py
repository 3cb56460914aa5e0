"""A word for archives around checkpoints: what is inside, as far as a short look tells.

Compressed data is unpacked piece by piece and thrown away; the look ends after a few MiB of it,
so that a bomb costs no more than any other file.
"""

from __future__ import annotations

import bz2
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.formats import _tar
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._tar import BadTar, Ended
from ckptsurgeon.formats._zip import Member

_BUDGET = 16 << 20
"""Bytes, packed or unpacked, after which a look ends."""
_PIECE = 1 << 16
_HEAD = 512
_MOST_MEMBERS = 10_000
_MOST_HEADS = 32
_DICTIONARY = 96 << 20
"""The most that lzma may reserve: what the largest preset of `xz` needs, and no more."""
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".pth.tar", ".th", ".jit", ".ptl", ".pkl")
_TORCH_RECORD = re.compile(rb"([^/]+/)?(data\.pkl|data/|\.data/|\.format_version|byteorder|version|code/|extra/)")
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True)
class _Packing:
    """A compression: its name, how to begin unpacking, and the programs that unpack it."""

    name: str
    begin: Callable[[], Any]
    untar: str
    unpack: str


_PACKINGS: tuple[tuple[bytes, _Packing], ...] = (
    (b"\x1f\x8b", _Packing("a gzip archive", lambda: zlib.decompressobj(31), "tar xzf", "gunzip -k")),
    (b"BZh", _Packing("a bzip2 archive", bz2.BZ2Decompressor, "tar xjf", "bunzip2 -k")),
    (
        b"\xfd7zXZ\0",
        _Packing("an xz archive", lambda: lzma.LZMADecompressor(memlimit=_DICTIONARY), "tar xJf", "unxz -k"),
    ),
)


@dataclass(frozen=True)
class _Inside:
    """A file in an archive; `size` in bytes, None where it is not known; `kind` as `_kind` says."""

    name: str
    size: int | None
    kind: str | None


class _EnoughError(Exception):
    """The look took all that it may."""


def describe(probe: Probe) -> tuple[str, str | None] | None:
    """What the archive is and what to do with it; None for a file that is no archive."""
    for magic, packing in _PACKINGS:
        if probe.head.startswith(magic):
            return _packed(probe, packing)
    if _tar.is_header(probe.head[:512]):
        size = probe.file.size
        return _listed(
            "a tar archive", "tar xf", probe, lambda at, count: probe.read(max(0, min(count, size - at)), min(at, size))
        )
    if probe.head[257:262] == b"ustar":
        return "a tar archive whose first header is damaged", None
    return _zipped(probe) if probe.is_zip else None


def _packed(probe: Probe, packing: _Packing) -> tuple[str, str | None]:
    stream = _Stream(probe, packing.begin())
    try:
        head = stream.fetch(0, _HEAD)
        if _tar.is_header(head):
            return _listed(packing.name, packing.untar, probe, stream.fetch)
    except _EnoughError:
        head = b""
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        return f"{packing.name}, and damaged ({error})", None
    kind = _kind(head)
    return packing.name + (f" around a {kind} file" if kind else ""), _do(packing.unpack, probe)


def _listed(archive: str, unpack: str, probe: Probe, fetch: _tar.Fetch) -> tuple[str, str | None]:
    """What a tar archive holds, as far as it can be read."""
    found: list[_Inside] = []
    whole = True
    try:
        for entry in _tar.entries(fetch):
            if entry.kind == "file":
                found.append(_Inside(entry.name, entry.size, _kind(fetch(entry.offset, min(_HEAD, entry.size)))))
            if len(found) >= _MOST_MEMBERS:
                raise _EnoughError
    except (_EnoughError, Ended):
        whole = False
    except (BadTar, zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        return f"{archive}, and damaged ({error})", None
    return f"{archive}{_around(found, whole)}", _do(unpack, probe)


class _Stream:
    """Unpacked bytes by ascending offsets; what lies before an offset that was asked for is gone."""

    def __init__(self, probe: Probe, unpacker: Any) -> None:
        self.probe, self.unpacker = probe, unpacker
        self.buffer, self.start = b"", 0
        self.packed, self.unpacked = 0, 0
        self.ended = False
        self.waiting = b""

    def fetch(self, at: int, count: int) -> bytes:
        while self.start + len(self.buffer) < at + count and not self.ended:
            self.buffer += self.piece()
            if at > self.start:
                gone = min(at - self.start, len(self.buffer))
                self.buffer, self.start = self.buffer[gone:], self.start + gone
        skip = max(0, at - self.start)
        return self.buffer[skip : skip + count]

    def piece(self) -> bytes:
        """The next few unpacked bytes; _EnoughError when the look has taken its share."""
        if self.packed > _BUDGET or self.unpacked > _BUDGET:
            raise _EnoughError
        if not self.waiting and getattr(self.unpacker, "needs_input", True):
            count = min(_PIECE, self.probe.file.size - self.packed)
            self.waiting = self.probe.read(count, self.packed)
            self.packed += count
        made: bytes = self.unpacker.decompress(self.waiting, _PIECE)
        self.waiting = getattr(self.unpacker, "unconsumed_tail", b"")
        self.unpacked += len(made)
        if self.unpacker.eof or (not made and not self.waiting and self.packed == self.probe.file.size):
            self.ended = True
        return made


def _zipped(probe: Probe) -> tuple[str, str | None]:
    names = [name for name in probe.members if not name.endswith("/")]
    heads = {name: _kind(_head_of(probe, probe.members[name])) for name in names[:_MOST_HEADS]}
    found = [_Inside(name, probe.members[name].size, heads.get(name)) for name in names]
    if any(_likely(each) for each in found):
        return f"a zip archive{_around(found, True)}", _do("unzip", probe)
    inside = ", ".join(_shown(name) for name in names[:5]) or "nothing"
    return f"a zip archive, but no torch checkpoint: no data.pkl (it holds {inside})", None


def _head_of(probe: Probe, member: Member) -> bytes:
    raw = probe.read(min(member.packed, 4 * _HEAD), member.offset)
    if not member.deflated:
        return raw[:_HEAD]
    try:
        return zlib.decompressobj(-15).decompress(raw, _HEAD)
    except zlib.error:
        return b""


def _kind(head: bytes) -> str | None:
    """The kind of checkpoint that a file seems to be which begins with `head`."""
    if head[:4] == b"PK\3\4" and _TORCH_RECORD.match(head, 30):
        return "torch-zip"
    if _LEGACY in head[:32]:
        return "torch-legacy"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    return "tar" if _tar.is_header(head) else None


def _likely(file: _Inside) -> bool:
    return file.kind is not None or file.name.lower().endswith(_SUFFIXES)


def _around(found: list[_Inside], whole: bool) -> str:
    """` around 'a.pth' (a torch-zip, 44.6 MiB) and 3 other files`."""
    first = next(_candidates(found), None)
    if first is None:
        return " without a file" if whole else ""
    facts = ", ".join([*([f"a {first.kind}"] if first.kind else []), _size(first.size or 0)])
    more = len(found) - 1
    others = f" and {more} other file{'s' * (more != 1)}" if more else ""
    return f" around {_shown(first.name)} ({facts}){others if whole else others + ' and maybe more'}"


def _candidates(found: Iterable[_Inside]) -> Iterator[_Inside]:
    """The files that may be the checkpoint, the best first."""
    files = list(found)
    yield from (each for each in files if each.kind)
    yield from (each for each in files if _likely(each))
    yield from files


def _do(command: str, probe: Probe) -> str:
    path = probe.file.path
    return f"unpack it first: {command} {shlex.quote(path) if path.isprintable() else 'FILE'}"


def _shown(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:78]}…'"


def _size(nbytes: int) -> str:
    if nbytes < 1024:
        return f"{nbytes} bytes"
    return f"{nbytes / 1024:.1f} KiB" if nbytes < 1 << 20 else f"{nbytes / (1 << 20):.1f} MiB"

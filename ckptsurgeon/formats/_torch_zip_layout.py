"""The layout of a torch zip: records stored, 64-byte aligned, zip64 where needed.

Checksums come last: they are patched into headers whose every other byte is known beforehand.
Source: APPNOTE.TXT 6.3; `caffe2/serialize/inline_container.cc` for names, order and padding.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.formats import _pickler
from ckptsurgeon.formats._layout import Layout, shift
from ckptsurgeon.provenance import MEMBER
from ckptsurgeon.tensor import TensorRef

_ROOT = "archive"
_ALIGN = 64
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_DATE = 1 << 5 | 1  # the first day that zip knows, 1980-01-01: the same input gives the same bytes
_UTF8 = 0x800
_MOST_PADDING = 0xFFFF - 64  # what is left of an extra field beside the other ones
_ZIP64_VERSION = 45


@dataclass(frozen=True)
class _Record:
    name: str
    body: bytes | TensorRef

    @property
    def nbytes(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.nbytes

    @property
    def crc(self) -> int:
        return zlib.crc32(self.body) if isinstance(self.body, bytes) else 0


def layout(root: Any, provenance: str | None = None) -> Layout:
    """The archive whose object is `root`: cleaned data that holds the state dict; the `provenance` is ASCII."""
    bodies: list[TensorRef] = []
    keys: dict[tuple[Hashable, str], str] = {}

    def storage(ref: TensorRef) -> str:
        identity = (ref.tie or len(bodies), ref.dtype.name)
        key = keys.get(identity)
        if key is None:
            key = keys[identity] = str(len(bodies))
            bodies.append(ref)
        return key

    pickle = _pickler.dumps(root, storage)
    said = [] if provenance is None else [_Record(MEMBER, provenance.encode("ascii"))]
    records = [
        _Record("data.pkl", pickle),
        _Record(".format_version", b"1"),
        _Record(".storage_alignment", str(_ALIGN).encode()),
        _Record("byteorder", b"little"),
        *(_Record(f"data/{key}", ref) for key, ref in enumerate(bodies)),
        _Record("version", b"3\n"),
        *said,
    ]
    return _archive(records)


def _archive(records: Sequence[_Record]) -> Layout:
    parts: list[bytes | TensorRef] = []
    places: list[int] = []
    at = 0
    for record in records:
        header = _local(record, at)
        places.append(at)
        parts += [header, record.body]
        at += len(header) + record.nbytes
    central: list[bytes] = []
    entries: list[int] = []
    end = at
    for record, place in zip(records, places, strict=True):
        entries.append(end)
        central.append(_central(record, place))
        end += len(central[-1])
    parts += [*central, _finish(len(records), end - at, at)]
    late = [i for i, record in enumerate(records) if isinstance(record.body, TensorRef)]

    def patches(crcs: Sequence[int]) -> Iterable[tuple[int, bytes]]:
        return _patched([(places[i], entries[i]) for i in late], crcs)

    return Layout(tuple(parts), patches)


def _patched(headers: list[tuple[int, int]], crcs: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    for (local, central), crc in zip(headers, crcs, strict=True):
        raw = struct.pack("<L", crc)
        yield local + 14, raw
        yield central + 16, raw


def _local(record: _Record, at: int) -> bytes:
    name = f"{_ROOT}/{record.name}".encode()
    wide = record.nbytes >= _U32
    extra = struct.pack("<HHQQ", 1, 16, record.nbytes, record.nbytes) if wide else b""
    begin = at + 30 + len(name) + len(extra) + 4
    padding = -begin % _ALIGN
    if not isinstance(record.body, bytes):
        more = shift(record.body, begin + padding, _ALIGN)
        padding += more if padding + more <= _MOST_PADDING else 0
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    size = _U32 if wide else record.nbytes
    fixed = struct.pack(
        "<4s5H3L2H", b"PK\3\4", _version(wide), _UTF8, 0, 0, _DATE, record.crc, size, size, len(name), len(extra)
    )
    return fixed + name + extra


def _central(record: _Record, place: int) -> bytes:
    name = f"{_ROOT}/{record.name}".encode()
    wide = record.nbytes >= _U32
    far = place >= _U32
    numbers = [record.nbytes] * (2 if wide else 0) + [place] * far
    extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    size = _U32 if wide else record.nbytes
    version = _version(bool(numbers))
    fixed = struct.pack(
        "<4s6H3L5H2L",
        b"PK\1\2", version, version, _UTF8, 0, 0, _DATE, record.crc, size, size,
        len(name), len(extra), 0, 0, 0, 0, _U32 if far else place,
    )  # fmt: skip
    return fixed + name + extra


def _version(wide: bool) -> int:
    return _ZIP64_VERSION if wide else 20


def _finish(entries: int, length: int, start: int) -> bytes:
    out = b""
    if entries >= _U16 or length >= _U32 or start >= _U32:
        version = _ZIP64_VERSION
        out += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, version, version, 0, 0, entries, entries, length, start)
        out += struct.pack("<4sLQL", b"PK\6\7", 0, start + length, 1)
    few = min(entries, _U16)
    return out + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, min(length, _U32), min(start, _U32), 0)

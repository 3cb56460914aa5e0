"""The tar form of the earliest torch (before 0.1.10).

Four plain files: `sys_info`, `pickle` (the object; its persistent ids name tensors and storages),
`tensors` and `storages`.  `storages` is a count, then for each a pickled (key, location, type),
its number of elements in 8 bytes and its bytes, and at the end the pickled list of storages that
are views of others.  `tensors` is a count, then for each a pickled (key, storage, type), the
number of dimensions in 4 bytes, 4 bytes that mean nothing, sizes, strides and offset in 8 bytes
each.  All numbers are little-endian.

Source: `legacy_load` inside `_legacy_load` of `torch/serialization.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptsurgeon.errors import InputError, LimitError, brief
from ckptsurgeon.formats import _pickle, _tar
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._pickle import BadPickle, Truncated
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._rebuild import builders
from ckptsurgeon.formats._tar import BadTar, Entry
from ckptsurgeon.formats._tensors import Storage, count, storage_dtype, text, view
from ckptsurgeon.inert import Opaque
from ckptsurgeon.tensor import TensorRef

NAME = "torch-tar"
_MEMBERS = ("pickle", "storages", "tensors")
_WINDOW = 1 << 14
_MOST_PADDING = 1 << 20


def sniff(probe: Probe) -> bool:
    """Whether this is a tar archive that begins with a member of torch's."""
    if not _tar.is_header(probe.head[:512]):
        return False
    try:
        first = next(_tar.entries(lambda at, size: probe.head[at : at + size]), None)
    except BadTar:
        return False
    return first is not None and first.name in ("sys_info", *_MEMBERS)


def read(probe: Probe) -> Document:
    """The object in the archive; InputError when it is damaged."""
    try:
        members = _members(probe)
        storages = _storages(_Cursor(probe, members["storages"]))
        tensors = _tensors(_Cursor(probe, members["tensors"]), storages)
        cursor = _Cursor(probe, members["pickle"])
        tree = cursor.pickled(builders(probe.limits), _Persistent(tensors, storages))
        cursor.finish()
    except (BadTar, BadPickle, BadRecord) as error:
        key = getattr(error, "key", None)
        raise InputError(f"damaged torch tar: {error}", path=probe.file.path, key=key) from None
    return Document(probe.file.path, NAME, tree)


def _members(probe: Probe) -> dict[str, Entry]:
    size = probe.file.size
    found: dict[str, Entry] = {}
    end = 0
    for entry in _tar.entries(lambda at, count: probe.read(max(0, min(count, size - at)), min(at, size))):
        if entry.kind != "file" or entry.name not in ("sys_info", *_MEMBERS):
            raise BadTar(f"{entry.name!r} (a {entry.kind}) is no member that torch writes")
        if entry.name in found:
            raise BadTar(f"two members are named {entry.name!r}")
        if entry.offset + entry.size > size:
            raise BadTar(f"truncated: {entry.name!r} ends at byte {entry.offset + entry.size}, the file at {size}")
        found[entry.name] = entry
        end = _tar.after(entry)
    rest = size - end
    if rest > _MOST_PADDING or probe.read(rest, end).strip(b"\0"):
        raise BadTar(f"more follows the end of the archive at byte {end}")
    for name in _MEMBERS:
        if name not in found:
            raise BadTar(f"the member {name!r} is missing")
    return found


class _Cursor:
    """A place in a member, moved by what is read there."""

    def __init__(self, probe: Probe, entry: Entry) -> None:
        self.probe, self.name = probe, entry.name
        self.at, self.end = entry.offset, entry.offset + entry.size

    def take(self, size: int) -> bytes:
        self.skip(size)
        return self.probe.read(size, self.at - size)

    def skip(self, size: int) -> None:
        if size > self.end - self.at:
            raise BadTar(f"{self.name!r} announces {size} bytes at byte {self.at} and has {self.end - self.at}")
        self.at += size

    def number(self) -> int:
        return int.from_bytes(self.take(8), "little", signed=True)

    def pickled(self, known: Mapping[str, Any] | None = None, persistent: Any = _pickle.no_persistent) -> Any:
        """The pickle that begins here; it is looked for in ever larger windows."""
        limits, left = self.probe.limits, self.end - self.at
        window = min(_WINDOW, left, limits.pickle_bytes)
        while True:
            data = self.probe.read(window, self.at)
            try:
                value, used = _pickle.loads(data, builders=known, persistent=persistent, limits=limits)
            except Truncated:
                if window == left:
                    raise
                if window >= limits.pickle_bytes:
                    raise LimitError(f"a longer pickle in {self.name}", "pickle_bytes", limits.pickle_bytes) from None
                window = min(window * 4, left, limits.pickle_bytes)
            else:
                self.at += used
                return value

    def finish(self) -> None:
        if self.at != self.end:
            raise BadTar(f"{self.end - self.at} bytes follow the end of {self.name!r}")


def _record(cursor: _Cursor, what: str, parts: int) -> tuple[Any, ...]:
    value = cursor.pickled()
    if not isinstance(value, tuple) or len(value) != parts:
        raise BadRecord(f"{what} is described by {type(value).__name__}, not by {parts} values")
    return value


def _key(value: Any) -> int:
    """An object's key: an int, or its decimal digits."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 20:
        return int(value)
    return count(value, "the key of a tensor or storage")


def _storages(cursor: _Cursor) -> dict[int, Storage]:
    found: dict[int, Storage] = {}
    file = cursor.probe.file
    for _ in range(count(cursor.pickled(), "the number of storages")):
        key, device, kind = _record(cursor, "a storage", 3)
        dtype, nbytes = storage_dtype(kind), 0
        elements = count(cursor.number(), f"the size of the storage {brief(key)}")
        nbytes = elements * dtype.itemsize
        storage = Storage(file, cursor.at, nbytes, dtype, text(device, "a device"))
        cursor.skip(nbytes)
        _put(found, _key(key), storage)
    views = cursor.pickled()
    if not isinstance(views, list):
        raise BadRecord("the storage views are no list")
    for each in views:
        if not isinstance(each, tuple) or len(each) != 4:
            raise BadRecord("a storage view that torch does not write")
        _put(found, _key(each[0]), _part(found, *each[1:]))
    cursor.finish()
    return found


def _put(into: dict[int, Any], key: int, value: Any) -> None:
    if key in into:
        raise BadRecord(f"two objects have the key {key}")
    into[key] = value


def _part(storages: Mapping[int, Storage], root: Any, offset: Any, elements: Any) -> Storage:
    """A storage that is a view of another."""
    whole = storages.get(_key(root))
    if whole is None:
        raise BadRecord(f"the storage {brief(root)}, of which another is a view, is missing")
    item = whole.dtype.itemsize
    start, nbytes = count(offset, "a view offset") * item, count(elements, "a view size") * item
    if start + nbytes > whole.nbytes:
        raise BadRecord(f"a storage view of bytes {start}–{start + nbytes} of {whole.nbytes}")
    return replace(whole, offset=whole.offset + start, nbytes=nbytes)


def _tensors(cursor: _Cursor, storages: Mapping[int, Storage]) -> dict[int, TensorRef]:
    found: dict[int, TensorRef] = {}
    limits = cursor.probe.limits
    for _ in range(count(cursor.pickled(), "the number of tensors")):
        key, root, _ = _record(cursor, "a tensor", 3)
        storage = storages.get(_key(root))
        if storage is None:
            raise BadRecord(f"the storage {brief(root)} of the tensor {brief(key)} is missing")
        dimensions = int.from_bytes(cursor.take(8)[:4], "little", signed=True)
        if dimensions < 0:
            raise BadRecord(f"the tensor {brief(key)} has {dimensions} dimensions")
        if dimensions > limits.dimensions:
            raise LimitError(f"the tensor {brief(key)} has {dimensions} dimensions", "dimensions", limits.dimensions)
        numbers = struct.unpack(f"<{2 * dimensions + 1}q", cursor.take(16 * dimensions + 8))
        shape, strides = numbers[:dimensions], numbers[dimensions:-1]
        number = _key(key)
        if number in storages:
            raise BadRecord(f"two objects have the key {number}")
        _put(found, number, view(storage, storage.dtype, numbers[-1], shape, strides, limits))
    cursor.finish()
    return found


class _Persistent:
    """Persistent ids: the key of a tensor or storage, or a tuple that begins with a class."""

    def __init__(self, tensors: Mapping[int, TensorRef], storages: Mapping[int, Storage]) -> None:
        self.tensors, self.storages = tensors, storages

    def __call__(self, pid: Any) -> Any:
        if isinstance(pid, tuple):
            if not pid:
                raise BadRecord("a persistent id that torch does not write")
            return pid[0]
        key = _key(pid)
        if key in self.tensors:
            return self.tensors[key]
        if key not in self.storages:
            raise BadRecord(f"the tensor {key} is missing from the archive")
        return Opaque("torch storage", (key,))

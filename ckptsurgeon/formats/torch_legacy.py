"""Torch's stacked pickles: `torch.save` before 1.6, or with `_use_new_zipfile_serialization=False`.

Five pickles follow each other (magic number, protocol, system, the object, the storage keys), then
each storage in the order of those keys: its number of elements in 8 bytes, and its bytes, always
little-endian.  Source: `_legacy_save` and `_legacy_load` in `torch/serialization.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import InputError, LimitError, quoted
from ckptsurgeon.evaluate import read_exactly
from ckptsurgeon.formats import _pickle, _tree
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._pickle import BadPickle, Truncated
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._rebuild import builders
from ckptsurgeon.formats._tensors import Storage, Storages
from ckptsurgeon.limits import Limits, forgotten
from ckptsurgeon.sources import File, Record

NAME = "torch-legacy"
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_WINDOW = 1 << 20


def sniff(probe: Probe) -> bool:
    """Whether the file begins with torch's magic number."""
    try:
        return bool(_pickle.loads(probe.head[:64])[0] == _MAGIC)
    except (BadPickle, BadRecord):
        return False


def read(probe: Probe) -> Document:
    """The object in the file; InputError when it is damaged."""
    file, descriptor, limits = probe.file, probe.descriptor, probe.limits
    window = min(_WINDOW, file.size, limits.pickle_bytes)
    while True:
        data = bytes(read_exactly(descriptor, window, 0, file.path))
        try:
            return Document(file.path, NAME, _parse(file, descriptor, data, limits))
        except Truncated as error:
            if window == file.size:
                raise InputError(f"truncated: {error}", path=file.path) from None
            if window >= limits.pickle_bytes:
                raise LimitError("a longer pickle", "pickle_bytes", limits.pickle_bytes, path=file.path) from None
            window = min(window * 16, file.size, limits.pickle_bytes)
        except (BadPickle, BadRecord) as error:
            raise InputError(f"damaged: {error}", path=file.path, key=getattr(error, "key", None)) from None


def _parse(file: File, descriptor: int, data: bytes, limits: Limits) -> Any:
    """Twice: once to learn which storages there are and where they begin, once with their places."""
    _, at = _pickle.loads(data, limits=limits)
    protocol, at = _pickle.loads(data, start=at, limits=limits)
    if protocol != _PROTOCOL:
        raise BadPickle(f"protocol {quoted(protocol)} of torch's legacy format is not known")
    _, start = _pickle.loads(data, start=at, limits=limits)
    sizes: dict[str, tuple[int, DType]] = {}

    def note(key: str, dtype: DType, elements: int, device: str) -> Storage:
        nbytes = elements * dtype.itemsize
        known = sizes.setdefault(key, (elements, dtype))
        if known[0] * known[1].itemsize != nbytes:
            raise BadRecord(f"the storage {quoted(key)} has {known[0]} elements in one place and {elements} in another")
        return Storage(file, 0, nbytes, dtype, device, record=Record(key, 0, nbytes))

    with forgotten(limits):
        tree, at = _load(data, start, note, limits)
    keys, at = _pickle.loads(data, start=at, limits=limits)
    try:
        offsets = _storages(file, descriptor, keys, at, sizes)
    except _BadStorage as error:
        error.key = _user(tree, error.storage)
        raise
    del tree, keys  # a second tree is to come

    def place(key: str, dtype: DType, elements: int, device: str) -> Storage:
        if key not in offsets:
            raise BadRecord(f"the storage {quoted(key)} is missing from the file")
        nbytes = elements * dtype.itemsize
        record = Record(f"storage {key}", offsets[key], nbytes)
        return Storage(file, offsets[key], nbytes, dtype, device, record=record)

    return _load(data, start, place, limits)[0]


def _load(
    data: bytes, start: int, locate: Callable[[str, DType, int, str], Storage], limits: Limits
) -> tuple[Any, int]:
    return _pickle.loads(data, start=start, builders=builders(limits), persistent=Storages(locate), limits=limits)


class _BadStorage(BadRecord):
    """A storage that is not as the pickle says; `storage` is its key."""

    def __init__(self, storage: str, cause: str) -> None:
        super().__init__(cause)
        self.storage = storage


def _user(tree: Any, storage: str) -> str | None:
    """The tensor that lies on a storage, by its dotted place."""
    return next(
        (
            name
            for name, ref in _tree.tensors(tree)
            if any(extent.record is not None and extent.record.name == storage for extent in ref.extents())
        ),
        None,
    )


def _storages(file: File, descriptor: int, keys: Any, at: int, sizes: dict[str, tuple[int, DType]]) -> dict[str, int]:
    """Where each storage's bytes begin, proven to fill the file to its end."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise BadPickle("the list of storages is damaged")
    offsets: dict[str, int] = {}
    for key in keys:
        if key not in sizes:
            raise BadPickle(f"the storage {quoted(key)} belongs to no tensor")
        elements, dtype = sizes[key]
        if at + 8 > file.size:
            raise _BadStorage(key, f"truncated: the file ends before the storage {quoted(key)}")
        written = int.from_bytes(read_exactly(descriptor, 8, at, file.path), "little", signed=True)
        if written != elements:
            raise _BadStorage(key, f"the storage {quoted(key)} has {written} elements, the pickle says {elements}")
        offsets[key] = at + 8
        at += 8 + elements * dtype.itemsize
        if at > file.size:
            raise _BadStorage(key, f"truncated: the storage {quoted(key)} ends at byte {at}, the file at {file.size}")
    if at != file.size:
        raise BadPickle(f"{file.size - at} bytes follow the last storage")
    return offsets

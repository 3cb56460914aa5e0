"""Storages as torch pickles them, and the views on them that are tensors.

Every number is a claim: sizes, strides and offsets are checked against the storage's bytes.
Source: `torch/serialization.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, Literal

from ckptsurgeon.dtypes import DTYPES, DType
from ckptsurgeon.errors import LimitError, brief, quoted
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.inert import Opaque
from ckptsurgeon.limits import Limits
from ckptsurgeon.sources import Deflate, Extent, File, Record, is_contiguous, span
from ckptsurgeon.tensor import Stored, TensorRef, TensorSpec

_STORAGE_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}
_QUANTIZED = {"QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32"}
_PACKED = {"QUInt4x2Storage": "uint8", "QUInt2x4Storage": "uint8"}
_SCRIPTED = {
    "ComplexHalfStorage": "complex32",
    "UInt16Storage": "uint16",
    "UInt32Storage": "uint32",
    "UInt64Storage": "uint64",
    "Float8_e4m3fnStorage": "float8_e4m3fn",
    "Float8_e4m3fnuzStorage": "float8_e4m3fnuz",
    "Float8_e5m2Storage": "float8_e5m2",
    "Float8_e5m2fnuzStorage": "float8_e5m2fnuz",
    "Float8_e8m0fnuStorage": "float8_e8m0fnu",
}
"""No classes of torch: its C++ pickler (`torch/csrc/jit/serialization/pickler.cpp`) makes a name of every dtype."""
_ALL_TYPES = {**_STORAGE_TYPES, **_QUANTIZED, **_PACKED, **_SCRIPTED, "UntypedStorage": "uint8"}
STORAGE_OF: Mapping[str, str] = {dtype: storage for storage, dtype in (_STORAGE_TYPES | _QUANTIZED).items()}
"""dtype name → the storage class that torch pickles it with; other dtypes go untyped."""


_SHOWN = 8


@dataclass(slots=True)
class Storage:
    """The bytes behind one or more tensors: where they begin in the file and how many there are.

    Never changed, but not frozen: one is made for every tensor, and frozen ones take thrice the time.
    """

    file: File
    offset: int
    nbytes: int
    dtype: DType
    device: str
    byteorder: Literal["little", "big"] = "little"
    codec: Deflate | None = None
    record: Record | None = None


def storage_dtype(kind: Any) -> DType:
    """The element type of a pickled storage class; `uint8` stands for untyped bytes."""
    name = kind.name if isinstance(kind, Opaque) else ""
    last = name.rpartition(".")[2]
    if not name.startswith("torch.") or last not in _ALL_TYPES:
        raise BadRecord(f"a storage of the unknown type {brief(name) or type(kind).__name__}")
    return DTYPES[_ALL_TYPES[last]]


def count(value: Any, what: str) -> int:
    """`value` as a count: an int (no bool), not negative."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise BadRecord(f"{what} is {quoted(value, 80)}, no count")
    return value


def text(value: Any, what: str) -> str:
    """`value` as text."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        raise BadRecord(f"{what} is {quoted(value)}, no text")
    return value


def dtype_of(value: Any) -> DType | None:
    """The element type that a pickled `torch.dtype` names; None for one that cannot be held."""
    found = DTYPES.get(value.name.removeprefix("torch.")) if isinstance(value, Opaque) else None
    return found if found is not None and found.bits >= 8 else None  # torch has no names for those of safetensors


def view(storage: Storage, dtype: DType, offset: Any, shape: Any, strides: Any, limits: Limits) -> TensorRef:
    """The tensor of `shape` at `offset` (elements) of a storage, with `strides` in elements."""
    shape, strides = dims(shape, "shape", limits), dims(strides, "strides", limits)
    if len(shape) != len(strides):
        raise BadRecord(f"shape {list(shape)} with strides {list(strides)}")
    spec, first = TensorSpec(dtype, shape), count(offset, "a storage offset")
    item, used = dtype.itemsize, span(shape, strides)
    if used and (first + used) * item > storage.nbytes:
        raise BadRecord(
            f"shape {list(shape)} with strides {list(strides)} at element {first} needs "
            f"{(first + used) * item} bytes of a storage of {storage.nbytes}"
        )
    if spec.nbytes > limits.view_bytes and spec.nbytes > limits.view_ratio * storage.nbytes:
        cause = f"shape {list(shape)} is a view of {spec.nbytes} bytes on a storage of {storage.nbytes}"
        raise LimitError(cause, "view_bytes", limits.view_bytes)
    dense = not used or is_contiguous(shape, strides)
    extent = Extent(
        storage.file,
        storage.offset + first * item,
        used * item,
        None if dense else tuple(step if size > 1 else 0 for size, step in zip(shape, strides, strict=True)),
        storage.byteorder,
        storage.codec,
        storage.record,
    )
    return TensorRef(_one(spec) if used else spec, extent, _stored(storage.device, storage.nbytes))


@lru_cache(maxsize=4096)
def _one(spec: TensorSpec) -> TensorSpec:
    """One object for all equal specs: a model has many tensors of few shapes."""
    return spec


@lru_cache(maxsize=4096)
def _stored(device: str, nbytes: int) -> Stored:
    return Stored(device, nbytes)


def moved(ref: TensorRef, extent: Extent, shift: int, to: Storage) -> TensorRef:
    """The view `ref`, whose source `extent` begins `shift` bytes behind its storage, of another storage of
    the same type, size and device."""
    place = to.offset + shift if shift else to.offset
    source = Extent(to.file, place, extent.nbytes, extent.strides, to.byteorder, to.codec, to.record)
    return TensorRef(ref.spec, source, ref.stored)


def storage_tensor(storage: Storage) -> TensorRef:
    """A storage that stands by itself, as the tensor of one dimension that it holds."""
    item = storage.dtype.itemsize
    spec = TensorSpec(storage.dtype.plain, (storage.nbytes // item,))
    extent = Extent(storage.file, storage.offset, spec.nbytes, None, storage.byteorder, storage.codec, storage.record)
    return TensorRef(spec, extent, Stored(storage.device, storage.nbytes))


def dims(value: Any, what: str, limits: Limits) -> tuple[int, ...]:
    """`value`, a tuple or a `torch.Size`, as counts."""
    if isinstance(value, Opaque) and value.name == "torch.Size" and value.args and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple | list):
        raise BadRecord(f"{what} is no tuple of numbers")
    if len(value) > limits.dimensions:
        raise LimitError(f"{what} has {len(value)} dimensions", "dimensions", limits.dimensions)
    made = tuple(count(size, f"a number of the {what}") for size in value)
    if what == "shape" and prod(made) >= 1 << 63:
        raise BadRecord(f"shape {list(made[:_SHOWN])}{', …' * (len(made) > _SHOWN)} has more than 63 bits of elements")
    return made


Locate = Callable[[str, DType, int, str], Storage]


class Storages:
    """A reader of torch's persistent ids; `locate(key, dtype, elements, device)` finds the bytes."""

    def __init__(self, locate: Locate) -> None:
        self.locate = locate

    def __call__(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or not pid:
            raise BadRecord("a persistent id that torch does not write")
        kind = text(pid[0], "the kind of a persistent id")
        if kind == "module" and len(pid) > 1:
            return pid[1]
        if kind != "storage" or len(pid) not in (5, 6):
            raise BadRecord(f"a persistent id of the unknown kind {quoted(kind)}")
        dtype = storage_dtype(pid[1])
        storage = self.locate(
            text(pid[2], "a storage key"), dtype, count(pid[4], "a storage size"), text(pid[3], "a device")
        )
        return storage if len(pid) == 5 or pid[5] is None else _part(storage, pid[5])


def _part(storage: Storage, metadata: Any) -> Storage:
    """A storage that is a view of another (files before torch 0.4)."""
    if not isinstance(metadata, tuple) or len(metadata) != 3:
        raise BadRecord("a storage view that torch does not write")
    item = storage.dtype.itemsize
    start, size = count(metadata[1], "a view offset") * item, count(metadata[2], "a view size") * item
    if start + size > storage.nbytes:
        raise BadRecord(f"a storage view of bytes {start}–{start + size} of {storage.nbytes}")
    return replace(storage, offset=storage.offset + start, nbytes=size)

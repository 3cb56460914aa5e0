"""Records that stand for tensors: storages, numpy arrays, sharded tensors, parameters of early torch."""

from __future__ import annotations

from math import prod
from typing import Any

from ckptsurgeon.dtypes import DTYPES, DType
from ckptsurgeon.formats._numpy import Array
from ckptsurgeon.formats._rebuild import local_shards
from ckptsurgeon.formats._tensors import Storage, dtype_of, storage_tensor
from ckptsurgeon.inert import UNKNOWN, Opaque
from ckptsurgeon.limits import current
from ckptsurgeon.sources import Absent
from ckptsurgeon.tensor import Stored, TensorRef, TensorSpec

_VARIABLES = frozenset({"torch.nn.parameter.Parameter", "torch.autograd.variable.Variable"})


def tensor_of(value: Any, *, arrays: bool = False) -> TensorRef | None:
    """The tensor that `value` is or stands for, or None; numpy's arrays only with `arrays`."""
    if isinstance(value, TensorRef):
        return value
    if isinstance(value, Storage):
        return storage_tensor(value)
    if isinstance(value, Array):
        return value.ref if arrays else None
    if not isinstance(value, Opaque):
        return None
    if value.name in _VARIABLES and isinstance(value.state, tuple) and value.state:
        return value.state[0] if isinstance(value.state[0], TensorRef) else None
    if not value.name.endswith(".ShardedTensor"):
        return None
    if value.tensor is UNKNOWN:
        value.tensor = _sharded(value)
    found: TensorRef | None = value.tensor
    return found


def kind_of(value: Any) -> str:
    """What `value` is, in a word or a class name."""
    if isinstance(value, Storage):
        return "storage"
    return value.name if isinstance(value, Opaque) else type(value).__name__


def _sharded(value: Opaque) -> TensorRef | None:
    """A `ShardedTensor`: (local shards, metadata, …), of which the metadata has the whole size."""
    state = value.state if isinstance(value.state, tuple) else ()
    if len(state) < 2 or not isinstance(state[0], list):
        return None
    metadata = _state(state[1])
    size, properties = metadata.get("size"), _state(metadata.get("tensor_properties"))
    if isinstance(size, Opaque) and size.args:
        size = size.args[0]
    shape = tuple(size) if isinstance(size, list | tuple) else ()
    if len(shape) > current().dimensions or not all(type(length) is int and 0 <= length < 1 << 63 for length in shape):
        return None
    if prod(shape) >= 1 << 63:
        return None
    local = local_shards(state)
    first = next(iter(local.values()), None)
    if first is not None and first.shape == shape:
        return first
    dtype: DType = dtype_of(properties.get("dtype")) or (first.dtype if first else DTYPES["float32"])
    if prod(shape) * dtype.bits % 8:
        return None
    form = f"a ShardedTensor, here {len(local)} of its shards"
    stored = Stored("cpu", sum(part.nbytes for part in local.values()))
    return TensorRef(TensorSpec(dtype, shape), Absent(form, tuple(local.items())), stored)


def _state(value: Any) -> dict[Any, Any]:
    return value.fields() if isinstance(value, Opaque) else {}

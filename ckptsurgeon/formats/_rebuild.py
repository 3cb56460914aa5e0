"""What torch's `_rebuild_*` functions would make, as `TensorRef`s: the closed table of builders.

Forms that have no dense bytes (sparse, nested, meta, distributed, wrapper subclasses) are listed
with an `Absent` source.  Source: `torch/_utils.py`, `torch/_tensor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from ckptsurgeon.dtypes import DTYPES, DType
from ckptsurgeon.errors import LimitError
from ckptsurgeon.formats import _numpy
from ckptsurgeon.formats._plain import BadRecord, Builder
from ckptsurgeon.formats._tensors import Storage, count, dims, dtype_of, storage_tensor, view
from ckptsurgeon.inert import Opaque, attributes
from ckptsurgeon.limits import Limits
from ckptsurgeon.sources import Absent, Apply, Extent, Kernel
from ckptsurgeon.tensor import Quantizer, Stored, TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

_MOST_PARTS = 256
"""Tensors in the parts of one that has no dense bytes: they are compared and hashed with it, each as often as it is
used."""
_RESOLVED = frozenset(("float16", "float32", "float64", "complex32", "complex64", "complex128"))
_PACKED_FLOAT4 = "torch.float4_e2m1fn_x2"
_GRAPH_MODULES = frozenset(f"torch.fx.graph_module.reduce{kind}_graph_module" for kind in ("", "_package", "_deploy"))

_ZERO_POINTS = {"qint8": (-128, 127), "quint8": (0, 255), "qint32": (-(1 << 31), (1 << 31) - 1)}
_LARGEST_SCALE = float("inf")
_SCALES = frozenset(("float32", "float64"))
_OTHER_SIGN = bytes(byte ^ 0x80 for byte in range(256))
"""For the last byte of a number."""


@dataclass(frozen=True, slots=True)
class Resolved(Kernel):
    """The values that torch's lazy conjugate and negative bits stand for."""

    conjugate: bool
    negative: bool
    elementwise: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        made = inputs[0].conj_physical() if self.conjugate else inputs[0]
        return -made if self.negative else made

    def on_bytes(self, data: memoryview, dtype: DType) -> memoryview | None:
        if dtype.name != "complex32":
            return None
        made = bytearray(data)  # torch warns of what it does with these: the signs alone
        if self.negative:
            made[1::4] = made[1::4].translate(_OTHER_SIGN)
        if self.negative != self.conjugate:
            made[3::4] = made[3::4].translate(_OTHER_SIGN)
        return memoryview(made)


def builders(limits: Limits) -> dict[str, Builder]:
    """The closed table of what a torch pickle may build."""
    return _Builders(limits).table


class _Builders:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.expanded = self.looked = 0
        plain: dict[str, Builder] = {
            "_rebuild_tensor": self.tensor,
            "_rebuild_tensor_v2": self.tensor,
            "_rebuild_tensor_v3": self.tensor_v3,
            "_rebuild_parameter": _parameter,
            "_rebuild_parameter_with_state": _parameter,
            "_rebuild_qtensor": self.quantized,
            "_rebuild_sparse_tensor": self.sparse,
            "_rebuild_sparse_csr_tensor": self.sparse,
            "_rebuild_nested_tensor": _nested,
            "_rebuild_meta_tensor_no_storage": self.meta,
            "_rebuild_wrapper_subclass": self.wrapper,
            "_rebuild_device_tensor_from_cpu_tensor": _from_cpu,
            "_rebuild_device_tensor_from_numpy": _from_numpy,
            "_rebuild_xla_tensor": _from_numpy,
        }
        self.plain: dict[str, Builder] = {f"torch._utils.{name}": build for name, build in plain.items()}
        self.plain["torch.nested._internal.nested_tensor._rebuild_njt"] = _jagged
        self.table: dict[str, Builder] = {
            **_numpy.BUILDERS,
            **self.plain,
            "torch._tensor._rebuild_from_type_v2": self.typed,
            "torch._tensor._rebuild_from_type": self.typed,
            **{name: partial(graph_module, name) for name in _GRAPH_MODULES},
            "torch.nn.parameter.Parameter": _parameter,
            "torch.autograd.variable.Variable": lambda args: _variable("torch.autograd.variable.Variable", args),
        }

    def tensor(self, args: tuple[Any, ...], dtype: DType | None = None) -> Any:
        if len(args) < 4:
            raise BadRecord("a tensor with too few arguments")
        storage, offset, shape, strides = args[:4]
        if not isinstance(storage, Storage):
            raise BadRecord("a tensor without a storage")
        ref = view(storage, dtype or storage.dtype, offset, shape, strides, self.limits)
        if ref.nbytes > storage.nbytes:
            self.expanded += max(0, ref.nbytes - self.limits.view_ratio * storage.nbytes)
            if self.expanded > self.limits.view_bytes:
                most = self.limits.view_bytes
                raise LimitError(f"views that repeat their storages, of {self.expanded} bytes", "view_bytes", most)
        at = 7 if dtype else 6
        metadata = args[at] if len(args) > at else None
        if isinstance(metadata, dict) and any(metadata.values()):
            unknown = [key for key in metadata if key not in ("conj", "neg")]
            if unknown:
                return _absent(f"a tensor with {', '.join(map(str, unknown))}", ref.dtype, ref.shape, {"data": ref})
            kernel = Resolved(bool(metadata.get("conj")) and ref.dtype.kind == "complex", bool(metadata.get("neg")))
            if not kernel.conjugate and not kernel.negative:
                return ref
            if ref.dtype.name not in _RESOLVED:  # the bits come of complex numbers and of their parts
                raise BadRecord(
                    f"a tensor of {ref.dtype} whose values are conjugated or negated, which torch does not write"
                )
            return TensorRef(ref.spec, Apply(kernel, (replace(ref, stored=None),)), ref.stored)
        return ref

    def tensor_v3(self, args: tuple[Any, ...]) -> Any:
        if len(args) < 7:
            raise BadRecord("a tensor with too few arguments")
        if isinstance(args[6], Opaque) and args[6].name == _PACKED_FLOAT4:
            return _unpacked(self.tensor(args, DTYPES["uint8"]))
        dtype = dtype_of(args[6])
        return (
            Opaque(f"a tensor of {getattr(args[6], 'name', 'no dtype')}", args)
            if dtype is None
            else self.tensor(args, dtype)
        )

    def quantized(self, args: tuple[Any, ...]) -> Any:
        quantizer = args[4] if len(args) > 4 else None
        if not isinstance(quantizer, tuple) or not quantizer or not isinstance(quantizer[0], Opaque):
            raise BadRecord("a quantised tensor without a quantiser")
        if not isinstance(args[0], Storage):
            raise BadRecord("a quantised tensor that torch does not write")
        if args[0].dtype.kind != "quantized":  # two or four elements share a byte
            shape, data = dims(args[2], "shape", self.limits), storage_tensor(args[0])
            return _absent("a quantised tensor with packed elements", data.dtype, shape, {"data": data})
        ref = self.tensor(args[:4])
        found = _quantizer(quantizer, ref.dtype, ref.shape)
        return replace(ref, quantizer=found)

    def sparse(self, args: tuple[Any, ...]) -> Any:
        if len(args) != 2 or not isinstance(args[1], tuple):
            raise BadRecord("a sparse tensor that torch does not write")
        layout = args[0].args[0] if isinstance(args[0], Opaque) and args[0].args else args[0]
        word = layout.name if isinstance(layout, Opaque) else layout if isinstance(layout, str) else "of no layout"
        kind = word.rpartition(".")[2].removeprefix("sparse_").upper()
        parts = [part for part in args[1] if isinstance(part, TensorRef)]
        sizes = [part for part in args[1] if isinstance(part, tuple | Opaque)]
        if len(parts) < 2 or len(sizes) != 1:
            raise BadRecord("a sparse tensor that torch does not write")
        names = ("indices", "values") if len(parts) == 2 else ("compressed", "plain", "values")
        shape = dims(sizes[0], "shape", self.limits)
        form = f"a sparse tensor ({kind}, {parts[-1].numel} values stored)"
        return _absent(form, parts[-1].dtype, shape, dict(zip(names, parts, strict=False)), closed=True)

    def meta(self, args: tuple[Any, ...]) -> Any:
        dtype = dtype_of(args[0]) if args else None
        if dtype is None or len(args) < 2:
            return Opaque("torch._utils._rebuild_meta_tensor_no_storage", args)
        shape = dims(args[1], "shape", self.limits)
        return _absent("a meta tensor, which has no values", dtype, shape, {}, device="meta", closed=True)

    def typed(self, args: tuple[Any, ...]) -> Any:
        """A tensor of a class of its own, or with attributes: what it is inside."""
        function, inner = args[0] if args else None, args[2] if len(args) > 2 else None
        if isinstance(function, Opaque) and function.name in self.plain and isinstance(inner, tuple):
            if function.name.endswith("._rebuild_wrapper_subclass"):
                return self.wrapper(inner, args[3] if len(args) > 3 else None)
            return self.plain[function.name](inner)
        return Opaque("torch._tensor._rebuild_from_type_v2", args)

    def wrapper(self, args: tuple[Any, ...], state: Any = None) -> Any:
        """A subclass that wraps other tensors (DTensor, quantised ones of torchao): its parts are in its state."""
        dtype = dtype_of(args[1]) if len(args) > 2 else None
        if dtype is None or not isinstance(args[0], Opaque):
            return Opaque("torch._utils._rebuild_wrapper_subclass", args)
        shape = dims(args[2], "shape", self.limits)
        fields = attributes(state)
        self.looked += len(fields)
        if self.looked > self.limits.modules:
            raise LimitError("more attributes of tensors that wrap others", "modules", self.limits.modules)
        parts = local_shards(state) or {str(name): p for name, p in fields.items() if isinstance(p, TensorRef)}
        local = parts.get("_local_tensor") or next((part for part in parts.values() if part.shape == shape), None)
        sharded = args[0].name.endswith(".ShardedTensor")
        if local is not None and local.shape == shape and (sharded or _is_whole(fields.get("_spec"))):
            return local
        part = f", here the part {list(local.shape)} of it" if local is not None else ""
        return _absent(f"a {args[0].name.rpartition('.')[2]}{part}", dtype, shape, parts)


def local_shards(state: Any) -> dict[str, TensorRef]:
    """The tensors in a `ShardedTensor`'s state: (local shards, metadata, …)."""
    if not isinstance(state, tuple) or not state or not isinstance(state[0], list):
        return {}
    found = [part for shard in state[0] for part in _fields(shard).values() if isinstance(part, TensorRef)]
    return {str(i): part for i, part in enumerate(found)}


def _fields(value: Any) -> dict[Any, Any]:
    return value.fields() if isinstance(value, Opaque) else {}


def _is_whole(spec: Any) -> bool:
    """Whether the local tensor of this DTensorSpec, as large as the whole one, is the whole one."""
    placements = spec.fields().get("placements") if isinstance(spec, Opaque) else None
    if not isinstance(placements, tuple):
        return False
    names = [placement.name.rpartition(".")[2] for placement in placements if isinstance(placement, Opaque)]
    return len(names) == len(placements) and set(names) <= {"Shard", "Replicate"}


def _absent(
    form: str,
    dtype: DType,
    shape: tuple[int, ...],
    parts: dict[str, TensorRef],
    device: str | None = None,
    closed: bool = False,
) -> TensorRef:
    left = len(parts) + _MOST_PARTS
    for part in parts.values():
        left -= _parts(part, left)
    spec = TensorSpec(dtype, shape)
    if prod(shape) * dtype.bits % 8:
        raise BadRecord(f"a tensor of shape {list(shape)}, whose {dtype} elements do not end on a whole byte")
    stored = next((part.stored for part in parts.values() if part.stored), None)
    nbytes = sum(part.stored.nbytes if part.stored else part.nbytes for part in parts.values())
    where = Stored(device or (stored.device if stored else "cpu"), nbytes)
    return TensorRef(spec, Absent(form, tuple(parts.items()), closed), where)


def _parts(ref: TensorRef, most: int) -> int:
    """How many tensors there are in one, each as often as it is used; BadRecord for more than `most`."""
    todo, found = [ref], 0
    while todo:
        ref = todo.pop()
        found += 1
        if found > most:
            raise BadRecord(f"a tensor that is made of others in more than {_MOST_PARTS} places")
        if isinstance(ref.source, Absent):
            todo += [part for _, part in ref.source.parts]
        if ref.quantizer is not None:
            todo += [part for part in (ref.quantizer.scale, ref.quantizer.zero_point) if isinstance(part, TensorRef)]
    return found


def _parameter(args: tuple[Any, ...]) -> Any:
    made = _variable("torch.nn.parameter.Parameter", args)
    if not isinstance(made, TensorRef):
        return made
    stored = made.stored or Stored("cpu", made.nbytes)
    return replace(made, stored=replace(stored, role="parameter", frozen=len(args) > 1 and args[1] is False))


def _variable(name: str, args: tuple[Any, ...]) -> Any:
    return args[0] if args and isinstance(args[0], TensorRef) else Opaque(name, args)


def graph_module(name: str, args: tuple[Any, ...]) -> Opaque:
    """A record of a call; of one that makes a module of torch.fx, whose first argument is a dict of
    its attributes, with these as its state."""
    record = Opaque(name, args)
    if name in _GRAPH_MODULES and args and isinstance(args[0], dict):
        record.state = args[0]
    return record


def _unpacked(ref: Any) -> Any:
    """Bytes that hold two 4-bit numbers each, as a tensor of twice as many elements in its last dimension."""
    if not ref.shape:
        raise BadRecord(f"a tensor of {_PACKED_FLOAT4} without a dimension")
    spec = TensorSpec(DTYPES["float4_e2m1"], (*ref.shape[:-1], 2 * ref.shape[-1]))
    if not isinstance(ref.source, Extent) or ref.source.strides is not None:
        return _absent(f"a strided tensor of {_PACKED_FLOAT4}", spec.dtype, spec.shape, {"data": ref})
    return TensorRef(spec, ref.source, ref.stored)


def _quantizer(given: tuple[Any, ...], dtype: DType, shape: tuple[int, ...]) -> Quantizer:
    scheme = given[0].name
    if len(given) == 3 and type(given[1]) in (float, int) and type(given[2]) is int:
        least, most = _ZERO_POINTS[dtype.name]
        if not least <= given[2] <= most or not 0 < given[1] < _LARGEST_SCALE:
            raise BadRecord(f"a quantiser {scheme} of {dtype} with a scale or zero point that torch does not write")
        return Quantizer(scheme, float(given[1]), given[2])
    if len(given) != 4 or not all(map(_is_dense, given[1:3])):
        raise BadRecord(f"a quantiser {scheme} with parameters that torch does not write")
    axis = count(given[3], "the axis of a quantiser")
    if axis >= len(shape) or any(part.shape != (shape[axis],) for part in given[1:3]):
        raise BadRecord(f"a quantiser whose scales do not go along dimension {axis} of {list(shape)}")
    if _parts(given[1], _MOST_PARTS) + _parts(given[2], _MOST_PARTS) > 2:
        raise BadRecord(f"a quantiser {scheme} with parameters that are made of others")
    scale, zero = (replace(part, stored=None) for part in given[1:3])
    if scale.dtype.name not in _SCALES or zero.dtype.name not in (*_SCALES, "int32", "int64"):
        raise BadRecord(f"a quantiser {scheme} with scales of {scale.dtype} and zero points of {zero.dtype}")
    return Quantizer(scheme, scale, zero, axis)


def _is_dense(part: Any) -> bool:
    """Whether this is a tensor with bytes and no quantiser of its own, of which there could be no end."""
    return isinstance(part, TensorRef) and isinstance(part.source, Extent) and part.quantizer is None


def _nested(args: tuple[Any, ...]) -> Any:
    if len(args) != 4 or not all(isinstance(part, TensorRef) for part in args):
        return Opaque("torch._utils._rebuild_nested_tensor", args)
    form = f"a nested tensor of {args[1].shape[0] if args[1].shape else 0} tensors"
    names = ("values", "sizes", "strides", "offsets")
    return _absent(form, args[0].dtype, args[0].shape, dict(zip(names, args, strict=True)), closed=True)


def _jagged(args: tuple[Any, ...]) -> Any:
    inner = args[0] if args and isinstance(args[0], dict) else {}
    parts = {str(name): part for name, part in inner.items() if isinstance(part, TensorRef)}
    if "values" not in parts:
        return Opaque("torch.nested._internal.nested_tensor._rebuild_njt", args)
    return _absent("a nested tensor (jagged)", parts["values"].dtype, parts["values"].shape, parts)


def _from_cpu(args: tuple[Any, ...]) -> Any:
    name = "torch._utils._rebuild_device_tensor_from_cpu_tensor"
    if len(args) < 3 or not isinstance(args[0], TensorRef) or dtype_of(args[1]) != args[0].dtype:
        return Opaque(name, args)
    return _on_device(args[0], args[2])


def _from_numpy(args: tuple[Any, ...]) -> Any:
    ref = args[0].ref if len(args) > 2 and isinstance(args[0], _numpy.Array) else None
    if ref is None or dtype_of(args[1]) != ref.dtype:
        return Opaque("torch._utils._rebuild_device_tensor_from_numpy", args)
    return _on_device(ref, args[2])


def _on_device(ref: TensorRef, device: Any) -> TensorRef:
    return replace(ref, stored=Stored(device if isinstance(device, str) else "cpu", ref.nbytes))

"""numpy's arrays and scalars as they stand in pickles: data, made without numpy.

Source: `numpy/_core/src/multiarray/methods.c` (`array_reduce`, `array_setstate`), `descriptor.c`
(`arraydescr_reduce`), `scalartypes.c.src` (`gentype_reduce`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ckptsurgeon.dtypes import DTYPES
from ckptsurgeon.formats._plain import Builder
from ckptsurgeon.inert import UNKNOWN, Opaque
from ckptsurgeon.limits import current
from ckptsurgeon.sources import Apply, Inline, Kernel
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

_DTYPES = {
    **{f"f{n}": f"float{8 * n}" for n in (2, 4, 8)},
    **{f"i{n}": f"int{8 * n}" for n in (1, 2, 4, 8)},
    **{f"u{n}": f"uint{8 * n}" for n in (1, 2, 4, 8)},
    "b1": "bool",
    "c8": "complex64",
    "c16": "complex128",
}
_SCALARS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "b1": "?"} | {
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "c8": "ff", "c16": "dd",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Reversed(Kernel):
    """All dimensions in the opposite order: column-major elements as a row-major tensor."""

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0].permute(*reversed(range(inputs[0].dim())))


class Array(Opaque):
    """A numpy array: a record like others, that a tensor can be made of where torch has its dtype."""

    __slots__ = ()

    @property
    def ref(self) -> TensorRef | None:
        """The array as a tensor, made once; None for text, objects, records, and data of another size."""
        if self.tensor is UNKNOWN:
            self.tensor = self._made()
        found: TensorRef | None = self.tensor
        return found

    def _made(self) -> TensorRef | None:
        state = self.state
        if not isinstance(state, tuple) or len(state) != 5:
            return None
        _, shape, dtype, fortran, raw = state
        name = _DTYPES.get(_code(dtype))
        if (
            name is None
            or not isinstance(shape, tuple)
            or len(shape) > current().dimensions
            or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
        ):
            return None
        kind = DTYPES[name]
        raw = _raw(raw, prod(shape) * kind.itemsize)
        if raw is None:
            return None
        data = Inline(_little(raw, kind.swap_unit) if _big(dtype) else raw)
        if not fortran:
            return TensorRef(TensorSpec(kind, shape), data)
        turned = TensorRef(TensorSpec(kind, tuple(reversed(shape))), data)
        return TensorRef(TensorSpec(kind, shape), Apply(_Reversed(), (turned,)))


def _raw(value: Any, size: int) -> bytes | None:
    """`size` bytes; a `str` of Python 2 was read as text, as UTF-8 where that was possible."""
    spellings = (value.encode("utf-8", "replace"), value.encode("latin-1", "replace")) if isinstance(value, str) else ()
    for raw in spellings or (value,):
        if isinstance(raw, bytes | bytearray) and len(raw) == size:
            return bytes(raw)
    return None


def _code(dtype: Any) -> str:
    """numpy's short name of a pickled `numpy.dtype` (`f4`); empty for records and the like."""
    if not isinstance(dtype, Opaque) or dtype.name != "numpy.dtype" or not dtype.args:
        return ""
    code = dtype.args[0]
    if isinstance(code, bytes):
        code = code.decode("latin-1")
    return code.lstrip("<>=|") if isinstance(code, str) else ""


def _big(dtype: Opaque) -> bool:
    """Whether elements are big-endian: numpy pickles that as the dtype's state, without which its name says it."""
    state, name = dtype.state, dtype.args[0] if dtype.args else ""
    if isinstance(state, tuple) and len(state) > 1:
        return state[1] in (">", b">")
    return isinstance(name, str | bytes) and name[:1] in (">", b">")


def _little(raw: bytes, unit: int) -> bytes:
    """The elements' bytes turned around, `unit` at a time."""
    out = bytearray(len(raw))
    for i in range(unit):
        out[i::unit] = raw[unit - 1 - i :: unit]
    return bytes(out)


def _scalar(args: tuple[Any, ...]) -> Any:
    """A numpy scalar as the Python value that equals it."""
    if len(args) == 2:
        code, raw = _code(args[0]), args[1]
        form = _SCALARS.get(code)
        packed = _raw(raw, struct.calcsize(f"<{form}")) if form is not None else None
        if packed is not None:
            values = struct.unpack(f"{'>' if _big(args[0]) else '<'}{form}", packed)
            return values[0] if len(values) == 1 else complex(*values)
        if code[:1] == "U" and isinstance(raw, bytes) and not len(raw) % 4:
            return raw.decode("utf-32-be" if _big(args[0]) else "utf-32-le", "replace").rstrip("\0")
    return Opaque("numpy.generic", args)


def _from_buffer(args: tuple[Any, ...]) -> Any:
    """An array of pickle protocol 5: its bytes, dtype, shape and order."""
    made = Array("numpy.ndarray", args)
    if len(args) == 4:
        raw, dtype, shape, order = args
        made.state = (1, shape, dtype, order == "F", raw)
    return made


BUILDERS: dict[str, Builder] = {
    f"numpy.{core}.{name}": build
    for core in ("core", "_core")
    for name, build in (
        ("multiarray._reconstruct", lambda args: Array("numpy.ndarray", args)),
        ("multiarray.scalar", _scalar),
        ("numeric._frombuffer", _from_buffer),
    )
}

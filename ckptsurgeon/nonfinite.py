"""NaN and infinity by their bit patterns: no torch, no arithmetic, block by block.

Source: IEEE 754; the float8 types as in "8-bit Numerical Formats for Deep Neural Networks" (arXiv 2206.02915, the
`fnuz` types), "FP8 Formats for Deep Learning" (arXiv 2209.05433) and the OCP Microscaling specification (`e8m0`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ckptsurgeon import charges
from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import InputError
from ckptsurgeon.limits import BLOCK
from ckptsurgeon.tensor import TensorRef

if TYPE_CHECKING:
    import numpy as np

    Bools = np.ndarray[Any, np.dtype[np.bool_]]

_EXPONENT = {
    "float64": (8, 0x7FF << 52),
    "float32": (4, 0xFF << 23),
    "float16": (2, 0x1F << 10),
    "bfloat16": (2, 0xFF << 7),
    "float8_e5m2": (1, 0x1F << 2),
    "complex128": (8, 0x7FF << 52),
    "complex64": (4, 0xFF << 23),
    "complex32": (2, 0x1F << 10),
}
"""Bytes of a number, and an exponent of all ones: an infinity, and with a mantissa a NaN."""
_NAN = {
    "float8_e4m3fn": (0x7F, 0xFF),
    "float8_e4m3fnuz": (0x80,),
    "float8_e5m2fnuz": (0x80,),
    "float8_e8m0fnu": (0xFF,),
}
"""The bytes that are a NaN, in types without an infinity."""


def can_be(dtype: DType) -> bool:
    """Whether elements of a type may be a NaN or an infinity at all."""
    return dtype.name in _EXPONENT or dtype.name in _NAN


def nan_and_inf(data: memoryview, dtype: DType) -> tuple[Bools, Bools]:
    """Which elements are a NaN, and which an infinity (of a complex one: either part), of contiguous little-endian
    bytes; only for types that can be.

    >>> [found.tolist() for found in nan_and_inf(memoryview(bytes.fromhex("007c017c0000")), _HALF)]
    [[False, True, False], [True, False, False]]
    """
    import numpy as np

    known = _EXPONENT.get(dtype.name)
    if known is None:
        raw = np.frombuffer(data, dtype=np.uint8)
        return np.isin(raw, np.array(_NAN[dtype.name], np.uint8)), np.zeros(len(raw), bool)
    nbytes, ones = known
    numbers = np.frombuffer(data, dtype=f"<u{nbytes}")
    kind = numbers.dtype.type
    plain = numbers & kind((1 << (8 * nbytes - 1)) - 1)  # without the sign
    nan, inf = plain > kind(ones), plain == kind(ones)
    if dtype.kind == "complex":
        nan, inf = nan.reshape(-1, 2).any(1), inf.reshape(-1, 2).any(1)
    return nan, inf


def count(ref: TensorRef, tick: Callable[[int], None] | None = None) -> tuple[int, int]:
    """The elements of a tensor that are a NaN and that are an infinity; InputError when it cannot be read."""
    nans = infs = 0
    if not can_be(ref.dtype):
        return 0, 0
    for block in ref.blocks(BLOCK):
        nan, inf = nan_and_inf(block, ref.dtype)
        nans, infs = nans + int(nan.sum()), infs + int(inf.sum())
        if tick is not None:
            tick(len(block))
    return nans, infs


def count_all(
    tensors: Iterable[tuple[str, TensorRef]], progress: Callable[[int, int], None] | None = None
) -> tuple[tuple[str, int, int], ...]:
    """Names with their NaN and infinities, of every tensor whose file holds its bytes; InputError with the name."""
    there = [(name, ref) for name, ref in tensors if ref.absent is None]
    charges.reading(ref for _, ref in there)
    total = sum(ref.nbytes for _, ref in there if can_be(ref.dtype))
    done, made = 0, []

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    for name, ref in there:
        try:
            made.append((name, *count(ref, tick)))
        except InputError as error:
            error.key = error.key or name
            raise
    return tuple(made)


_HALF = DType("float16", 16, "float", "F16")

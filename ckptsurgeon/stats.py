"""Figures of a tensor's values, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptsurgeon import evaluate
from ckptsurgeon.errors import InputError
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch


_AT_ONCE = 1 << 20
"""Values that are computed with at a time: in float64 they are eight times as large as they may lie in the file."""

WIDTH = 8
"""Bytes of a value as it is computed with."""


@dataclass(frozen=True)
class Stats:
    """Over the finite values: `minimum`, `maximum`, `mean`, `std` (of the population); None where
    there are none, the dtype has no order, or the figure overflows.  `nan` and `inf` are counts; None
    where the values were not read."""

    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    nan: int | None
    inf: int | None


def of(ref: TensorRef) -> Stats:
    """The figures of one tensor, read block by block and computed in float64.

    Raises InputError for dtypes that torch cannot compute with.
    """
    if ref.dtype.kind == "complex" or ref.dtype.bits < 8 or ref.absent is not None:
        return Stats(None, None, None, None, None, None)
    low, high, total, squares, count, nan, inf = math.inf, -math.inf, 0.0, 0.0, 0, 0, 0
    for values in _numbers(ref):
        finite = values.isfinite()
        if not finite.all():
            nan += int(values.isnan().sum())
            inf += int(values.isinf().sum())
            values = values[finite]
        if values.numel():
            least, most = values.aminmax()
            variance, middle = values.var(correction=0), float(values.mean())
            low, high = min(low, float(least)), max(high, float(most))
            squares += float(variance) * values.numel()
            if count:
                shift = middle - total / count
                squares += shift * shift * count * values.numel() / (count + values.numel())
            total, count = total + middle * values.numel(), count + values.numel()
    if not count:
        return Stats(None, None, None, None, nan, inf)
    return Stats(low, high, _finite(total / count), _finite(math.sqrt(squares / count)), nan, inf)


def _numbers(ref: TensorRef) -> Iterator[torch.Tensor]:
    """The values in float64, block by block; those of a quantised tensor are what its integers stand for."""
    if ref.quantizer is not None:
        yield ref.read().dequantize().double().flatten()
        return
    for block in ref.blocks(ref.dtype.itemsize * _AT_ONCE):
        shape = (block.nbytes // ref.dtype.itemsize,)
        try:
            yield evaluate.to_torch(bytearray(block), TensorSpec(ref.dtype, shape)).double()
        except (RuntimeError, TypeError) as error:
            raise InputError(f"torch cannot compute with {ref.dtype}: {error}") from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

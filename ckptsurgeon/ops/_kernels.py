"""What the kernels that compute values have in common: how wide they compute, their rows, and what they must not make.

Kernels are run on slices of rows, as large as memory allows.  So that the slices make no difference, what is summed
is summed in float64 and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptsurgeon.errors import InputError
from ckptsurgeon.tensor import TensorRef

if TYPE_CHECKING:
    import torch


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A floating tensor as float32, or as the float64 that it is."""
    return tensor if tensor.itemsize == 8 else tensor.float()


def all_rows(inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
    """The same rows of every input; None where one of them must be made whole."""
    made = tuple(part for ref in inputs if (part := ref.rows(begin, end)) is not None)
    return made if len(made) == len(inputs) else None


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product in float64, of which each row comes out the same whatever rows there are beside it.

    BLAS sums the last rows and columns, which fill no whole block of its own, in another order: so all do.
    """
    import torch
    from torch.nn.functional import pad

    (rows, _), columns = left.shape, right.shape[1]
    left, right = left.to(torch.float64), right.to(torch.float64)
    made: torch.Tensor = pad(left, (0, 0, 0, -rows % 16)) @ pad(right, (0, -columns % 16))
    return made[:rows, :columns]


def finite(made: torch.Tensor, old: torch.Tensor | None, cause: str, hint: str) -> torch.Tensor:
    """`made`, the values that came of `old`; InputError when it has a NaN or an infinity where `old` has none."""
    right = _is_finite(made)
    if bool(right.all()):  # nearly always
        return made
    if old is not None:
        right |= ~_is_finite(old)
    count = int((~right).sum())
    if count:
        raise InputError(f"would get {count} NaN or infinite values of {made.numel()}: {cause}", hint=hint)
    return made


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() if tensor.itemsize == 1 else tensor).isfinite()

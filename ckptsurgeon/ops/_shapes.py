"""What shape rules have in common: dimensions, indices, and what an operation cannot take."""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.dtypes import DType
from ckptsurgeon.ops._registry import OperationError
from ckptsurgeon.tensor import TensorSpec

_MOST_INDICES = 1 << 21
_LARGEST = 1 << 44


def dim_of(dim: int, rank: int, shape: tuple[int, ...]) -> int:
    """A dimension counted from the first; OperationError when there is none such."""
    if not -rank <= dim < rank:
        raise OperationError(f"dimension {dim} is not one of the {rank} of {list(shape)}")
    return dim % rank if rank else 0


def dims_of(dims: tuple[int, ...], rank: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions counted from the first, each named once."""
    made = tuple(dim_of(dim, rank, shape) for dim in dims)
    if len(set(made)) != len(made):
        raise OperationError(f"the dimensions {list(dims)} name one of {list(shape)} twice")
    return made


def divisible(spec: TensorSpec) -> None:
    """OperationError for elements that share bytes, and so cannot be cut or joined."""
    if spec.dtype.bits < 8:
        raise OperationError(
            f"elements of {spec.dtype} share bytes, so the tensor cannot be cut, joined or put into another order"
        )


def one_dtype(specs: Sequence[TensorSpec]) -> None:
    """OperationError for tensors of several dtypes."""
    kinds = list(dict.fromkeys(spec.dtype.name for spec in specs))
    if len(kinds) > 1:
        raise OperationError(f"tensors of one dtype are joined, not of {' and '.join(kinds)}; cast them first")


def resolved(wanted: Sequence[int | slice], shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Indices and ranges of a dimension as indices from 0 on; OperationError outside of it."""
    size = shape[dim]
    made: list[int] = []
    for entry in wanted:
        bounds = (entry,) if isinstance(entry, int) else (entry.start, entry.stop)
        for bound in bounds:
            if bound is not None and not -size <= bound <= size - isinstance(entry, int):
                raise OperationError(
                    f"{bound} is outside of dimension {dim} of {list(shape)}, which is {size}", "indices"
                )
        more = [entry % size] if isinstance(entry, int) else range(*entry.indices(size))
        if len(made) + len(more) > _MOST_INDICES:
            raise OperationError(f"more than {_MOST_INDICES} indices", "indices")
        made += more
    return tuple(made)


def floating(spec: TensorSpec, what: str) -> None:
    """OperationError for tensors that are not of a floating dtype that torch computes."""
    if spec.dtype.kind != "float" or spec.dtype.bits < 8:
        raise OperationError(f"{what} is for floating tensors, not for {spec.dtype}")


def within(number: int | float, dtype: DType, argument: str | None = None) -> None:
    """OperationError for a number that an element of this type cannot be."""
    low, high = dtype.bounds
    if dtype.kind != "float" and isinstance(number, float) and number != int(number):
        raise OperationError(f"{number} is no whole number, and {dtype} holds no others", argument)
    if not low <= number <= high:
        raise OperationError(f"{number} is not between {low} and {high}, which is what {dtype} holds", argument)


def bounded(spec: TensorSpec) -> None:
    """OperationError for a new tensor of a size that is a slip of the hand."""
    if spec.nbytes > _LARGEST:
        raise OperationError(f"{list(spec.shape)} of {spec.dtype} takes {spec.nbytes:,} bytes, over {_LARGEST:,}")

"""What can be done to tensors: a registry, and its entries by family."""

from ckptsurgeon.ops import names, layout, values  # isort: skip  # the order of the documentation
from ckptsurgeon.ops._registry import OPERATIONS, Args, Match, Operation, OperationError, Param, register
from ckptsurgeon.ops._views import reshaped

__all__ = [
    "OPERATIONS",
    "Args",
    "Match",
    "Operation",
    "OperationError",
    "Param",
    "layout",
    "names",
    "register",
    "reshaped",
    "values",
]

"""What can be done to tensors: a registry, and its entries by family."""

from ckptsurgeon.ops import names, layout, parts, attention, values, making, stems, resize, folding, merging  # isort: skip  # the order of the documentation
from ckptsurgeon.ops._expressions import Expression, expression
from ckptsurgeon.ops._patterns import Numbered, expanded, nearest, template_parts
from ckptsurgeon.ops._registry import (
    OPERATIONS,
    Args,
    Match,
    Names,
    Operation,
    OperationError,
    Param,
    register,
)
from ckptsurgeon.ops._views import reshaped
from ckptsurgeon.ops.making import Initial

__all__ = [
    "OPERATIONS",
    "Args",
    "Expression",
    "Initial",
    "Match",
    "Names",
    "Numbered",
    "Operation",
    "OperationError",
    "Param",
    "attention",
    "expanded",
    "expression",
    "folding",
    "layout",
    "making",
    "merging",
    "names",
    "nearest",
    "parts",
    "register",
    "reshaped",
    "resize",
    "stems",
    "template_parts",
    "values",
]

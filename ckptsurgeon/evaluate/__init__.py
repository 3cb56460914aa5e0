"""From a source to bytes: the one place where tensors are read or computed.

It stands below `tensor`, because `TensorRef.read` and the streaming writer share it.  numpy and
torch are imported inside the functions that need them: plain copies need neither.
"""

from ckptsurgeon.evaluate.gather import cost
from ckptsurgeon.evaluate.into import calls, fill, handed
from ckptsurgeon.evaluate.pieces import (
    ABSENT_HINT,
    Piece,
    blocks,
    check_record,
    damaged,
    holds,
    pieces,
    read_through,
    whole,
)
from ckptsurgeon.evaluate.reading import Handles, read_exactly, read_into
from ckptsurgeon.evaluate.values import from_buffer, memory_of, quantized, to_torch

__all__ = [
    "ABSENT_HINT",
    "Handles",
    "Piece",
    "blocks",
    "calls",
    "check_record",
    "cost",
    "damaged",
    "fill",
    "from_buffer",
    "handed",
    "holds",
    "memory_of",
    "pieces",
    "quantized",
    "read_exactly",
    "read_into",
    "read_through",
    "to_torch",
    "whole",
]

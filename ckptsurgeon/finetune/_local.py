"""What of a live tensor lies in the memory of this process, and where."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _distributed(value: torch.Tensor) -> Any:
    """The tensor as a DTensor; None where it is none.  Its module is only looked at where somebody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return value if module is not None and isinstance(value, module.DTensor) else None


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is memory with a shape and strides, and not a class that computes as it likes."""
    import torch

    dispatch: Any = type(value).__torch_dispatch__
    usual: Any = torch.Tensor.__torch_dispatch__
    return value.layout is torch.strided and not value.is_quantized and dispatch is usual


def local(value: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """The part of a tensor that this process has, outside of autograd, and the place of its first element in the
    whole; None for a tensor that is no part of one."""
    shared = _distributed(value)
    if shared is None:
        return (
            value.detach() if is_plain(value) else value
        ), None  # a copy gives the latter other scales, and the like
    (chunk,) = shared.__create_chunk_list__()
    return shared.detach().to_local(), tuple(chunk.offsets)


def is_sharded(value: torch.Tensor) -> bool:
    """Whether it is spread over processes (a DTensor)."""
    return _distributed(value) is not None


def unplaced(value: torch.Tensor) -> str | None:
    """Why no values can be put into a tensor that is spread over processes; None where they can."""
    shared = _distributed(value)
    if shared is None:
        return None
    if any(placement.is_partial() for placement in shared.placements):
        return "is a sum that is not yet made (a DTensor with a Partial placement); redistribute it first"
    if len(shared.__create_chunk_list__()) != 1:
        return "has several stretches in one process (a DTensor); redistribute it first"
    return None


def storage(value: torch.Tensor) -> int | None:
    """A number that tensors over the same memory have in common, also on the meta device; None where a tensor does not
    say what it lies on."""
    try:
        return int(value.untyped_storage()._cdata) if is_plain(value) else None
    except (RuntimeError, NotImplementedError):
        return None

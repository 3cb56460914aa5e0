"""Arguments of the helpers on live modules, held against what they must be: UsageError for anything else."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import UsageError, quoted

if TYPE_CHECKING:
    import torch


def model(thing: Any, what: str, scripted: bool = False) -> torch.nn.Module:
    """A live module for the function `what`; modules of TorchScript, which do not tell their types, where `scripted`
    allows."""
    import torch

    if not isinstance(thing, torch.nn.Module):
        raise UsageError(f"{what} takes an nn.Module, not {'None' if thing is None else f'a {type(thing).__name__}'}")
    if not scripted and (inner := next((one for one in thing.modules() if _is_scripted(one)), None)) is not None:
        raise UsageError(
            f"{what} goes by the types of modules, and {type(inner).__name__} of torch.jit does not tell them; "
            "call it before the model is scripted or traced"
        )
    return thing


def _is_scripted(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction)


def real(what: str, value: Any) -> int | float:
    """A real number, inf among them: integers as they are, others (of numpy, tensors of one element) as a float."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise UsageError(f"{what} is a number, not {quoted(value)}")
    try:
        made = int(value) if isinstance(value, numbers.Integral) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors of several elements, complex ones
        raise UsageError(f"{what} is a number, not {quoted(value)}") from None
    if math.isnan(made):
        raise UsageError(f"{what} is a number, not nan: no number is at least that, and none at most")
    return made


def rate(what: str, value: Any) -> float:
    """A finite number that is not negative, as a float."""
    try:
        made = float(real(what, value))
    except (UsageError, OverflowError):
        made = math.nan
    if not math.isfinite(made) or made < 0:
        raise UsageError(f"{what} is a number of at least 0, not {quoted(value)}")
    return made

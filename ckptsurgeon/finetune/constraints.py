"""Bounds on the weights of a live model: once, or after every step of an optimizer."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import UsageError, quoted
from ckptsurgeon.finetune import _checked, _sharing
from ckptsurgeon.finetune._local import is_plain, is_sharded
from ckptsurgeon.finetune.names import parameters
from ckptsurgeon.finetune.selecting import Patterns, Slot, by_pattern, slots
from ckptsurgeon.report._text import columns, plural, shown

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

Bounds = tuple[int | float | None, int | float | None]
"""The least and the greatest value; None for none."""


@dataclass(frozen=True)
class Clamped:
    """What `clamp` did: parameter → how many of its elements were outside and are at a bound now."""

    changed: dict[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that were meant, whether or not anything of them changed."""
        return tuple(self.changed)

    def __str__(self) -> str:
        rows = [("parameter", "elements changed"), *((shown(name), f"{n:,}") for name, n in self.changed.items())]
        total = f"{plural(sum(self.changed.values()), 'element')} of {plural(len(self.changed), 'parameter')} changed"
        return "\n".join([*columns(rows, frozenset({1})), "", total])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def clamp(
    model: torch.nn.Module,
    pattern: Patterns | None = None,
    *,
    min: float | None = None,
    max: float | None = None,
    kernel_size: int | Sequence[int] | None = None,
) -> Clamped:
    """Bring live weights between `min` and `max`, in place; a NaN stays one.

    `pattern` is a regex, or several, searched for in the names of the parameters.  `kernel_size` means the weights of
    convolutions with such a kernel: `1`, or `(3, 1)`.  With both, a parameter must be meant by both.

    Raises UsageError, before anything is changed, for bounds that are no numbers or that a parameter's dtype cannot
    hold, for what matches nothing, for a model on the meta device, and for parameters that are no plain tensors of
    real numbers (complex, sparse, quantised, float8 ones).

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 1))
    >>> clamp(net, kernel_size=1, min=0).names
    ('1.weight',)
    """
    bounds = _bounds(min, max)
    return _clamped(_meant(_checked.model(model, "clamp"), pattern, kernel_size, bounds), bounds)


def _clamped(meant: Mapping[str, torch.Tensor], bounds: Bounds) -> Clamped:
    import torch

    changed = {}
    for name, value in meant.items():
        least, most = _of_dtype(bounds, value)
        with torch.inference_mode(value.is_inference()), torch.no_grad():
            outside = torch.zeros_like(value, dtype=torch.bool)
            outside |= value < least if least is not None else False
            outside |= value > most if most is not None else False
            changed[name] = int(outside.sum())
            value.clamp_(least, most)
    return Clamped(changed)


def keep_clamped(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    pattern: Patterns | None = None,
    *,
    min: float | None = None,
    max: float | None = None,
    kernel_size: int | Sequence[int] | None = None,
) -> RemovableHandle:
    """`clamp` now and after every step of the optimizer, until `.remove()` of what comes back.

    Raises UsageError as `clamp` does, and when the optimizer moves none of these parameters; then nothing is changed.
    """
    import torch

    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"keep_clamped takes an optimizer and its model, not a {type(optimizer).__name__}")
    bounds = _bounds(min, max)
    meant = _meant(_checked.model(model, "keep_clamped"), pattern, kernel_size, bounds)
    moved = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if not any(id(one) in moved for one in meant.values()):
        raise UsageError("the optimizer has none of these parameters; is it another model's, or are they frozen?")
    _clamped(meant, bounds)

    kept = [(one, _of_dtype(bounds, one)) for one in meant.values()]

    def bound(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for one, own in kept:
                one.clamp_(*own)

    return optimizer.register_step_post_hook(bound)


def _of_dtype(bounds: Bounds, value: torch.Tensor) -> Bounds:
    """The bounds as torch takes them for a tensor: of integers whole ones, of others floats."""
    kind = float if value.is_floating_point() else int
    least, most = (None if bound is None else kind(bound) for bound in bounds)
    return least, most


def _bounds(least: Any, most: Any) -> Bounds:
    """The bounds as numbers; UsageError for what is none."""
    if least is None and most is None:
        raise UsageError("clamp wants min, max or both")
    least = None if least is None else _checked.real("min", least)
    most = None if most is None else _checked.real("max", most)
    if least is not None and most is not None and least > most:
        raise UsageError(f"no number is at least min={least} and at most max={most}")
    return least, most


def _meant(
    model: torch.nn.Module, pattern: Patterns | None, kernel_size: int | Sequence[int] | None, bounds: Bounds
) -> dict[str, torch.nn.Parameter]:
    """The parameters that are to be clamped, by their first names."""
    if pattern is None and kernel_size is None:
        raise UsageError("clamp wants a pattern or a kernel_size; the pattern '' means every parameter")
    found = [slot for slot in slots(model) if not slot.is_statistics]
    meant = found if pattern is None else by_pattern(pattern, found)
    if kernel_size is not None:
        meant = list(_of_kernel(kernel_size, meant))
    indexes = {slot.index for slot in meant}
    made = _sharing.sized(
        {name: one for index, (name, one) in enumerate(parameters(model).items()) if index in indexes}
    )
    for name, one in made.items():
        if (why := _unbounded(one, bounds)) is not None:
            raise UsageError(f"{name!r} {why}")
    return made


def _unbounded(value: torch.Tensor, bounds: Bounds) -> str | None:
    """Why a tensor cannot be clamped in place; None where it can."""
    import torch

    dtype = str(value.dtype).removeprefix("torch.")
    is_float = value.is_floating_point() and value.dtype.itemsize > 1
    if value.is_meta:
        return "is on the meta device and has no values"
    if not (is_plain(value) or is_sharded(value)):
        return "is sparse or quantised, or of a class of its own, and cannot be clamped in place"
    if not is_float and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        return f"is {dtype}, which has no bounds that torch can keep; cast it, or leave it out by the pattern"
    if any(size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True)):
        return "repeats its memory (expand); give it memory of its own with .contiguous()"
    info = torch.finfo(value.dtype) if is_float else torch.iinfo(value.dtype)
    for bound in (one for one in bounds if one is not None):
        held = info.min <= bound <= info.max and (is_float or bound == int(bound))
        if not (held or (is_float and math.isinf(bound))):
            return f"is {dtype}, which cannot hold the bound {bound}"
    return None


def _of_kernel(wanted: int | Sequence[int], found: Sequence[Slot]) -> Iterator[Slot]:
    """The weights of convolutions with this kernel; UsageError, with the kernels that there are, for none."""
    there: dict[tuple[int, ...], list[Slot]] = {}
    for slot in found:
        kernel: Any = getattr(slot.owner, "kernel_size", None)
        if isinstance(kernel, tuple) and slot.name.rpartition(".")[2] != "bias":
            there.setdefault(kernel, []).append(slot)
    sizes = (wanted,) if isinstance(wanted, int) else tuple(wanted) if isinstance(wanted, Sequence) else ()
    if not sizes or any(type(size) is not int for size in sizes):
        raise UsageError(f"a kernel_size is a whole number, or several such as (3, 1), not {quoted(wanted)}")
    some = [
        slot
        for kernel, slots in there.items()
        if kernel == (sizes * len(kernel) if isinstance(wanted, int) else sizes)
        for slot in slots
    ]
    if not some:
        known = ", ".join(str(kernel) for kernel in sorted(there)) or "none"
        raise UsageError(f"no convolution that is meant has the kernel size {wanted}; there are {known}")
    return iter(some)

"""Bounds on the weights of a live model: once, or after every step of an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import UsageError
from ckptsurgeon.finetune.names import parameters
from ckptsurgeon.finetune.selecting import Patterns, Slot, by_pattern, slots
from ckptsurgeon.report._text import columns, plural, shown

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle


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
    convolutions with such a kernel: `1`, or `(3, 1)`.  With both, a parameter must be meant by both.  Raises UsageError
    for bounds that are none, for what matches nothing, and for a model on the meta device.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 1))
    >>> clamp(net, kernel_size=1, min=0).names
    ('1.weight',)
    """
    import torch

    meant = _meant(model, pattern, kernel_size, min, max)
    changed = {}
    with torch.no_grad():
        for name, value in meant.items():
            outside = torch.zeros_like(value, dtype=torch.bool)
            outside |= value < min if min is not None else False
            outside |= value > max if max is not None else False
            changed[name] = int(outside.sum())
            value.clamp_(min, max)
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

    Raises UsageError as `clamp` does, and when the optimizer moves none of these parameters.
    """
    import torch

    clamp(model, pattern, min=min, max=max, kernel_size=kernel_size)
    kept = list(_meant(model, pattern, kernel_size, min, max).values())
    moved = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if not any(id(one) in moved for one in kept):
        raise UsageError("the optimizer has none of these parameters; is it another model's, or are they frozen?")

    def bound(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for one in kept:
                one.clamp_(min, max)

    return optimizer.register_step_post_hook(bound)


def _meant(
    model: torch.nn.Module,
    pattern: Patterns | None,
    kernel_size: int | Sequence[int] | None,
    min: float | None,
    max: float | None,
) -> dict[str, torch.nn.Parameter]:
    """The parameters that are to be clamped, by their first names."""
    if min is None and max is None:
        raise UsageError("clamp wants min, max or both")
    if min is not None and max is not None and not min <= max:
        raise UsageError(f"no number is at least min={min} and at most max={max}")
    if pattern is None and kernel_size is None:
        raise UsageError("clamp wants a pattern or a kernel_size; the pattern '' means every parameter")
    found = [slot for slot in slots(model) if not slot.is_statistics]
    meant = found if pattern is None else by_pattern(pattern, found)
    if kernel_size is not None:
        meant = list(_of_kernel(kernel_size, meant))
    indexes = {slot.index for slot in meant}
    made = {name: one for index, (name, one) in enumerate(parameters(model).items()) if index in indexes}
    on_meta = next((name for name, one in made.items() if one.is_meta), None)
    if on_meta is not None:
        raise UsageError(f"{on_meta!r} is on the meta device and has no values")
    return made


def _of_kernel(wanted: int | Sequence[int], found: Sequence[Slot]) -> Iterator[Slot]:
    """The weights of convolutions with this kernel; UsageError, with the kernels that there are, for none."""
    there: dict[tuple[int, ...], list[Slot]] = {}
    for slot in found:
        kernel: Any = getattr(slot.owner, "kernel_size", None)
        if isinstance(kernel, tuple) and slot.name.rpartition(".")[2] != "bias":
            there.setdefault(kernel, []).append(slot)
    some = [
        slot
        for kernel, slots in there.items()
        if kernel == ((wanted,) * len(kernel) if isinstance(wanted, int) else tuple(wanted))
        for slot in slots
    ]
    if not some:
        sizes = ", ".join(str(kernel) for kernel in sorted(there)) or "none"
        raise UsageError(f"no convolution that is meant has the kernel size {wanted}; there are {sizes}")
    return iter(some)

"""Parameters that share memory: one parameter of two names, and different parameters over the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ckptsurgeon.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.finetune.selecting import Slot


def ties(found: Iterable[Slot]) -> tuple[tuple[str, ...], ...]:
    """The names of each parameter that has several."""
    groups: dict[int, list[str]] = {}
    for slot in found:
        if not slot.is_statistics:
            groups.setdefault(slot.index, []).append(slot.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def overlaps(parameters: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Pairs of different parameters whose bytes overlap, such as views of one tensor: a step on one moves the other."""
    spans = sorted(
        (begin, end, name) for name, value in parameters.items() for begin, end in [_span(value)] if begin < end
    )
    found = []
    reach, by = 0, ""
    for begin, end, name in spans:
        if begin < reach:
            found.append((by, name))
        if end > reach:
            reach, by = end, name
    return found


def _span(value: torch.Tensor) -> tuple[int, int]:
    """The first byte in memory and the one behind the last; (0, 0) for what has no memory of its own to speak of."""
    with suppress(RuntimeError, NotImplementedError):  # tensors of other classes (DTensor, quantised weights)
        if not value.is_sparse and value.numel() and value.data_ptr():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()
    return 0, 0


def words(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What to know of parameters that overlap."""
    return [f"{a} and {b} are two parameters over the same memory: what moves one moves the other" for a, b in pairs]


def sized(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
    """The parameters as they are; UsageError where one is lazy and has no shape yet."""
    import torch

    lazy = next((name for name, value in parameters.items() if torch.nn.parameter.is_lazy(value)), None)
    if lazy is not None:
        raise UsageError(f"{lazy!r} has no shape yet; put a batch through the model first, as lazy layers want it")
    return parameters

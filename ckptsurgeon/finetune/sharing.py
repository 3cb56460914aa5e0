"""Parameters that share memory: one parameter of two names, and different parameters over the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptsurgeon.errors import UsageError
from ckptsurgeon.finetune import _sharing

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
    same = [(group[0], name) for group in _sharing.ties(parameters) for name in group[1:]]
    return same + [(a.key, b.key) for a, b in _sharing.overlaps(parameters)]


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

"""Names of a model that share memory: what is loaded for one of them is loaded, or frozen, for the others."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptsurgeon import comparison
from ckptsurgeon.errors import InputError, Problem, UsageError
from ckptsurgeon.finetune._local import storage
from ckptsurgeon.sources import span

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.finetune.selecting import Slot
    from ckptsurgeon.tensor import TensorRef

_MOST = 256 << 20
"""Bytes of memory that several tensors share in parts, up to which what they are to hold is laid out and compared."""


@dataclass(frozen=True)
class View:
    """A tensor as a view of memory: offset, sizes and strides in elements."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """The element behind its last one."""
        return self.offset + span(self.shape, self.strides)


Overlap = tuple[View, View]


def ties(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """The groups of names that are one tensor: the same object, or another one over exactly the same memory."""
    groups: dict[Hashable, list[str]] = {}
    for key, value in tensors.items():
        groups.setdefault(memory(value), []).append(key)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def memory(value: torch.Tensor) -> Hashable:
    """What tensors over exactly the same memory have in common."""
    place = storage(value)
    if place is None or not value.numel():
        return id(value)
    return place, value.dtype, value.storage_offset(), tuple(value.shape), value.stride()


def overlaps(tensors: Mapping[str, torch.Tensor]) -> list[Overlap]:
    """Pairs of names that are different views of one storage, and whose first and last elements lie crosswise."""
    stored: dict[int, dict[Hashable, View]] = {}
    for key, value in tensors.items():
        if (place := storage(value)) is not None and value.numel():
            view = View(key, value.dtype, int(value.storage_offset()), tuple(value.shape), value.stride())
            stored.setdefault(place, {}).setdefault(memory(value), view)
    found = []
    for views in stored.values():
        begun: list[View] = []
        for view in sorted(views.values(), key=_begin):
            begun = [other for other in begun if _bytes(other.dtype, other.end) > _begin(view)]
            found += [(other, view) for other in begun]
            begun.append(view)
    return found


def tied_names(found: Iterable[Slot]) -> tuple[tuple[str, ...], ...]:
    """The names of each parameter that has several."""
    groups: dict[int, list[str]] = {}
    for slot in found:
        if not slot.is_statistics:
            groups.setdefault(slot.index, []).append(slot.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def pairs(parameters: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Pairs of different parameters whose bytes overlap, such as views of one tensor: a step on one moves the other."""
    same = [(group[0], name) for group in ties(parameters) for name in group[1:]]
    return same + [(a.key, b.key) for a, b in overlaps(parameters)]


def words(found: Sequence[tuple[str, str]]) -> list[str]:
    """What to know of parameters that overlap."""
    return [f"{a} and {b} are two parameters over the same memory: what moves one moves the other" for a, b in found]


def unsized(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """What is wrong with the first tensor that is lazy and has no shape yet; None where there is none."""
    import torch

    lazy = next((name for name, value in tensors if torch.nn.parameter.is_lazy(value)), None)
    if lazy is None:
        return None
    return f"{lazy!r} has no shape yet; put a batch through the model first, as lazy layers want it"


def sized(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
    """The parameters as they are; UsageError where one is lazy."""
    if (why := unsized(parameters.items())) is not None:
        raise UsageError(why)
    return parameters


def _bytes(dtype: torch.dtype, elements: int) -> int:
    return elements * dtype.itemsize


def _begin(view: View) -> int:
    return _bytes(view.dtype, view.offset)


def contradictions(
    label: str, groups: Sequence[tuple[str, ...]], pairs: Sequence[Overlap], refs: Mapping[str, TensorRef]
) -> Iterator[Problem]:
    """Where the checkpoint has two values for one place in memory; the tensors in question are read, block by block."""
    for group in groups:
        first, *others = [key for key in group if key in refs] or [""]
        for other in others:
            if not _equal(first, other, refs):
                text = f"{first!r} and {other!r} are one tensor in {label}, and two that differ in the checkpoint"
                hint = 'drop one of them by a rule, with missing="init": what is tied to it follows'
                yield Problem(f"{text}; {hint}", key=other, kind="tie")
    for a, b in pairs:
        if a.key in refs and b.key in refs and (why := _disagree(a, b, refs)):
            text = f"{a.key!r} and {b.key!r} share memory in {label}, and {why}"
            yield Problem(f"{text}; drop one of them by a rule", key=b.key, kind="tie")


def _equal(one: str, other: str, refs: Mapping[str, TensorRef]) -> bool:
    a, b = refs[one], refs[other]
    if a == b or (a.tie is not None and a.tie == b.tie):
        return True
    try:
        return comparison.compare(a, b).equal
    except InputError as error:
        error.key = error.key or other
        raise


def meet(one: View, other: View) -> bool:
    """Whether two views of one memory have an element in common; of very large ones, whether they may have."""
    import torch

    base, end = min(one.offset, other.offset), max(one.end, other.end)
    if one.dtype != other.dtype or _bytes(one.dtype, end - base) > _MOST:
        return True
    there = torch.zeros(end - base, dtype=torch.bool)
    there.as_strided(one.shape, one.strides, one.offset - base).fill_(True)
    return bool(there.as_strided(other.shape, other.strides, other.offset - base).any())


def _disagree(one: View, other: View, refs: Mapping[str, TensorRef]) -> str | None:
    """Why two views of one memory cannot both be loaded; None where they have nothing in common, or the same values."""
    import torch

    base, end = min(one.offset, other.offset), max(one.end, other.end)
    if one.dtype != other.dtype or _bytes(one.dtype, end - base) > _MOST:
        return "whether the checkpoint has the same values for both cannot be told"
    laid, there = torch.zeros(end - base, dtype=one.dtype), torch.zeros(end - base, dtype=torch.bool)

    def seen(of: torch.Tensor, view: View) -> torch.Tensor:
        return of.as_strided(view.shape, view.strides, view.offset - base)

    seen(there, one).fill_(True)
    both = seen(there, other)
    if not both.any():
        return None
    seen(laid, one).copy_(refs[one.key].read())
    have, want = seen(laid, other)[both], refs[other.key].read().to(one.dtype)[both]
    same = (have == want) | ((have != have) & (want != want))
    return None if same.all() else "the checkpoint has two values for the same elements"

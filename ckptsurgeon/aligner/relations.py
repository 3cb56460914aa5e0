"""What makes one shape of another without a look at the values: sizes of 1, the order of dimensions, flat kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from ckptsurgeon.aligner.units import Shape

Order = tuple[int, ...]
_ORDERS: dict[int, tuple[Order, ...]] = {
    2: ((0, 1), (1, 0)),
    3: ((0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)),
    4: ((0, 1, 2, 3), (3, 2, 0, 1), (2, 3, 1, 0), (0, 3, 1, 2), (0, 2, 3, 1), (1, 0, 2, 3)),
    5: ((0, 1, 2, 3, 4), (4, 3, 0, 1, 2), (2, 3, 4, 1, 0), (0, 4, 1, 2, 3), (0, 2, 3, 4, 1), (1, 0, 2, 3, 4)),
}
"""Orders of dimensions that frameworks use: outputs first (torch), last (JAX), channels last, transposed."""


@dataclass(frozen=True, slots=True)
class Relation:
    """How tensors become others: sizes of 1 removed, an order of dimensions, then another shape.

    `orders` are all orders of dimensions that the shapes allow, the plain one first; more than one leave it open.
    `flat` tells that several dimensions become one or one becomes several, row by row.
    """

    orders: tuple[Order, ...]
    ones: bool = False
    flat: bool = False

    @property
    def cost(self) -> float:
        """How much is changed: nothing costs nothing."""
        order = self.orders[0] if self.orders else ()
        return 0.05 * self.ones + 0.15 * self.flat + (0.2 if order != tuple(range(len(order))) else 0.0)


def bare(shape: Shape) -> Shape:
    """The shape without sizes of 1."""
    return tuple(size for size in shape if size != 1)


@lru_cache(1 << 16)
def relation(source: Shape, target: Shape) -> Relation | None:
    """What makes a tensor of one shape one of the other; None where nothing known does."""
    if prod(source) != prod(target):
        return None
    if sorted(bare(source)) != sorted(bare(target)):
        return _flattened(bare(source), bare(target))
    if len(source) == len(target) and len(source) in _ORDERS:
        orders = _fitting(source, target)
        if orders and (orders[0] == tuple(range(len(source))) or len(source) > 2 or 1 not in source):
            return Relation(orders)
    a, b = bare(source), bare(target)
    if a == b:
        return Relation(_fitting(a, b) or (tuple(range(len(a))),), ones=source != target)
    orders = _fitting(a, b) if len(a) == len(b) else ()
    return Relation(orders, ones=True) if orders else _flattened(a, b)


def _flattened(a: Shape, b: Shape) -> Relation | None:
    return Relation((tuple(range(len(a))),), flat=True) if _is_flat(a, b) or _is_flat(b, a) else None


def _fitting(a: Shape, b: Shape) -> tuple[Order, ...]:
    return tuple(order for order in _ORDERS.get(len(a), ()) if tuple(a[dim] for dim in order) == b)


def _is_flat(a: Shape, b: Shape) -> bool:
    """A kernel of a convolution whose input dimensions are one in a linear layer."""
    return len(a) >= 3 and len(b) == 2 and a[0] == b[0] and prod(a[1:]) == b[1] and a[-1] == a[-2]


def common(pairs: Iterable[tuple[Shape, Shape]]) -> Relation | None:
    """One relation for all pairs of shapes; None where there is none."""
    found: Relation | None = None
    for source, target in dict.fromkeys(pairs):
        one = relation(source, target)
        if one is None:
            return None
        if found is None:
            found = one
            continue
        orders = tuple(order for order in found.orders if order in one.orders)
        if not orders and len(found.orders[0]) == len(one.orders[0]):
            return None
        found = Relation(orders or found.orders, found.ones or one.ones, found.flat or one.flat)
    return found


def steps(source: Shape, target: Shape, order: Order) -> list[tuple[str, str]]:
    """The operations that make the one of the other, and their arguments as rules write them."""
    made: list[tuple[str, str]] = []
    if order == tuple(range(len(order))):
        return (
            _ones(source, target)
            if bare(source) == bare(target)
            else [("reshape", _joined((target[0], -1) if len(target) == 2 else target))]
        )
    if len(order) != len(source):
        made += _ones(source, bare(source))
        source = bare(source)
    made.append(("transpose", "") if order == (1, 0) else ("permute", _joined(order)))
    after = tuple(source[dim] for dim in order)
    return made + _ones(after, target)


def _ones(source: Shape, target: Shape) -> list[tuple[str, str]]:
    """Sizes of 1 taken out or put in; both at once is a reshape."""
    if source == target:
        return []
    if len(source) > len(target):
        dims = _extra(source, target)
        return [("squeeze", _joined(dims))] if dims is not None else [("reshape", _joined(target))]
    dims = _extra(target, source)
    return [("unsqueeze", _joined(dims))] if dims is not None else [("reshape", _joined(target))]


def _extra(longer: Shape, shorter: Shape) -> Sequence[int] | None:
    """The places of the sizes of 1 that the longer shape has and the shorter has not."""
    places, at = [], 0
    for dim, size in enumerate(longer):
        if at < len(shorter) and shorter[at] == size:
            at += 1
        elif size == 1:
            places.append(dim)
        else:
            return None
    return places if at == len(shorter) else None


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))

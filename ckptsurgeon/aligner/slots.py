"""What is to be matched in a group of blocks: the same unit of every block is one slot.

Where one side has joined what the other keeps apart (queries, keys and values; gate and up; stacked experts), slots of
that side that is apart are put together into one that could be joined, so that all that is left is one to one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Literal

from ckptsurgeon.aligner import vocabulary
from ckptsurgeon.aligner.meanings import Meaning, meaning
from ckptsurgeon.aligner.runs import pattern
from ckptsurgeon.aligner.units import Shape, Unit

_NUMBER = re.compile(r"\d+")
_JOINS = (
    ("qkv", ("q", "k", "v")),
    ("qkv by heads", ("q", "k", "v")),
    ("kv", ("k", "v")),
    ("gate and up", ("gate", "mlp up")),
)
"""What joined projections hold, in order."""


_NONE = Meaning()


@dataclass(eq=False)
class Slot:
    """The same unit of several blocks: `units[i]` is that of block `present[i]`.

    `parts` are slots that are joined in it, along the rows (`concat`) or as entries of a new dimension (`stack`)."""

    path: str
    present: tuple[int, ...]
    units: tuple[Unit, ...]
    shapes: dict[str, tuple[Shape, ...]] = field(default_factory=dict)
    parts: tuple[Slot, ...] = ()
    how: Literal["", "concat", "stack"] = ""
    means: Meaning = _NONE
    words: tuple[str, ...] = ()
    ranks: frozenset[tuple[str, int, int]] = frozenset()
    """The places among the units that differ from it in one number or in all of them, or have its shapes too, and how
    many they are: only places among families of one kind are compared."""
    kin: int = 1
    """How many units of its shapes differ from it in numbers alone, with itself."""
    norm: tuple[int, int] | None = None
    is_run: bool = False
    """Whether it stands for a run of blocks, which goes by its path alone."""

    @property
    def at(self) -> int:
        return self.parts[0].at if self.parts else self.units[0].at

    @property
    def module_name(self) -> str:
        """The type of the module, "" where it is not known."""
        return next(self.every()).module

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts) if self.parts else sum(unit.numel for unit in self.units)

    def every(self) -> Iterator[Unit]:
        """All units in it."""
        if self.parts:
            for part in self.parts:
                yield from part.every()
        else:
            yield from self.units


def slots(blocks: Sequence[tuple[str, Iterable[Unit]]]) -> list[Slot]:
    """The slots of blocks, given by their paths with their units."""
    found: dict[str, dict[int, Unit]] = {}
    for number, (path, units) in enumerate(blocks):
        begin = len(path) + 1 if path else 0
        for unit in units:
            found.setdefault(unit.path[begin:], {})[number] = unit
    made = []
    for path, numbered in found.items():
        by_roles: dict[frozenset[str], list[int]] = defaultdict(list)  # a bias that only some blocks have
        for number, unit in numbered.items():
            by_roles[frozenset(unit.needed)].append(number)
        members = [(tuple(numbers), tuple(numbered[number] for number in numbers)) for numbers in by_roles.values()]
        for present, own in members:
            needed = own[0].needed
            shapes = {role: tuple(unit.leaves[role].shape for unit in own) for role in needed}
            made.append(Slot(path, present, own, shapes))
    return described([slot for slot in made if slot.shapes])


def described(made: list[Slot]) -> list[Slot]:
    """The slots with what their names mean, and their places among each other."""
    siblings: dict[str, set[str]] = defaultdict(set)
    for slot in made:
        siblings[slot.path.rpartition(".")[0]].add(vocabulary.spelt(slot.path.rpartition(".")[2]))
    for slot in made:
        norm = _is_norm(slot)
        slot.means = meaning(slot.path, siblings[slot.path.rpartition(".")[0]], norm) if slot.path else Meaning()
        slot.words = vocabulary.words(slot.path)
    numbered = [slot for slot in made if _numbers(slot)]
    for slot in made:
        slot.ranks = frozenset()
    for slot, rank in _ranked(numbered, _pattern, _numbers):
        slot.ranks |= {("all", *rank)}
    for slot, rank in _ranked(numbered, lambda slot: (_pattern(slot), _form(slot)), _numbers):
        slot.ranks |= {("of a shape", *rank)}
        slot.kin = rank[1]
    for place in range(max((len(_numbers(slot)) for slot in numbered), default=0)):
        several = [slot for slot in numbered if len(_numbers(slot)) > max(place, 1)]
        for slot, rank in _ranked(several, partial(_all_but, place), _numbers):
            slot.ranks |= {("but one", *rank)}
    _beside(made)
    _complete(made)
    norms = [slot for slot in made if slot.means.order is not None]
    for slot, rank in _ranked(norms, _form, lambda slot: (slot.means.order or 0,)):
        slot.norm = rank
    return made


def _beside(made: list[Slot]) -> None:
    """The order of a norm whose name says nothing, told by what stands beside it: `0.norm` and `0.to_qkv`."""
    told = ("q", "qkv", "attention out")
    attention = {slot.path.partition(".")[0] for slot in made if slot.means.what in told}
    for slot in made:
        first, dot, _ = slot.path.partition(".")
        if (
            slot.means.order is None
            and dot
            and first in attention
            and len(attention) == 1
            and _is_norm(slot)
            and set(slot.words) <= {"norm"}
        ):
            slot.means = Meaning(slot.means.what, 10)


def _complete(made: list[Slot]) -> None:
    """The order of the one norm of a block whose name is `norm` and nothing else, told by the only other one: `ln`
    beside `attention.ln` is that of the MLP, `layer_norm` beside `final_layer_norm` that of attention."""
    families: dict[object, list[Slot]] = defaultdict(list)
    for slot in made:
        if _is_norm(slot):
            families[_form(slot)].append(slot)
    for family in families.values():
        bare = [slot for slot in family if slot.means.order is None and set(slot.words) <= {"norm"}]
        others = [slot for slot in family if slot.means.order is not None]
        if len(family) != 2 or len(bare) != 1 or len(others) != 1:
            continue
        if others[0].means.order in (10, 30):
            bare[0].means = Meaning(bare[0].means.what, 40 - (others[0].means.order or 0))
        elif others[0].means.order == 0 and _numbers(bare[0]) > _numbers(others[0]):  # `0.norm` and `1.net.0`
            bare[0].means = Meaning(bare[0].means.what, 30)


def _all_but(place: int, slot: Slot) -> object:
    """The path without one of its numbers."""
    numbers = _numbers(slot)
    return _pattern(slot), numbers[:place], numbers[place + 1 :]


def _form(slot: Slot) -> object:
    """The shapes of a slot, whatever the order in which the file has its tensors."""
    return tuple(sorted(slot.shapes.items()))


def _pattern(slot: Slot) -> str:
    return pattern(vocabulary.counted(slot.path))


def _numbers(slot: Slot) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(vocabulary.counted(slot.path))))


def _ranked(
    some: list[Slot], key: Callable[[Slot], object], order: Callable[[Slot], tuple[int, ...]]
) -> Iterator[tuple[Slot, tuple[int, int]]]:
    """The place of each slot among those of one key, and how many these are, where all places differ."""
    families: dict[object, list[Slot]] = defaultdict(list)
    for slot in some:
        families[key(slot)].append(slot)
    for family in families.values():
        values = sorted({order(slot) for slot in family})
        if len(values) == len(family) > 1:
            for slot in family:
                yield slot, (values.index(order(slot)), len(family))


def _is_norm(slot: Slot) -> bool:
    if slot.units and slot.units[0].kind:
        return slot.units[0].kind == "norm"
    one = all(len(shape) == 1 for shapes in slot.shapes.values() for shape in shapes)
    return one and "weight" in slot.shapes and ("bias" in slot.shapes or "norm" in slot.words)


# -- joined on one side, apart on the other ----------------------------------------------------


def joined(ours: list[Slot], others: list[Slot]) -> list[Slot]:
    """Our slots, with those put together that the other side has joined."""
    made = described(_stacked(ours, others))
    return described(_concatenated(made, others))


def _concatenated(ours: list[Slot], others: list[Slot]) -> list[Slot]:
    wanted = {slot.means.what for slot in others}
    have = {slot.means.what for slot in ours}
    made = list(ours)
    for across in ("", " across"):
        for what, names in _JOINS:
            if what + across not in wanted or what + across in have:
                continue
            if any(other + across in have for other in ("qkv", "qkv by heads")) and "kv" in what:
                continue
            sizes = [_size(slot) for slot in others if slot.means.what == what + across]
            for parts in _sets(
                made, [name + (across if name != "mlp up" and name != "gate" else "") for name in names]
            ):
                whole, alone = _merged(parts, what, across)
                if whole.shapes and _size(whole) in sizes:
                    made = [slot for slot in made if slot not in parts]
                    made += [whole, *alone]
    return made


def unsaid_joins(apart: list[Slot], joined: list[Slot]) -> Iterator[tuple[tuple[Slot, ...], Slot]]:
    """Parts of one side that together are as large as something of the other whose name does not say what it is."""
    for what, names in _JOINS:
        for parts in _sets(apart, names):
            whole, _ = _merged(parts, what, "")
            for slot in joined if whole.shapes else ():
                if slot.present == whole.present and _size(slot) == _size(whole):
                    yield parts, slot


def _size(slot: Slot) -> tuple[int, ...]:
    """The elements of the main tensor in each block."""
    role = "weight" if "weight" in slot.shapes else next(iter(slot.shapes))
    return tuple(map(prod, slot.shapes[role]))


def _sets(made: list[Slot], names: Sequence[str]) -> Iterator[tuple[Slot, ...]]:
    """Slots of one parent in the same blocks that mean these things, in this order."""
    by_parent: dict[tuple[str, tuple[int, ...]], dict[str, Slot]] = defaultdict(dict)
    for slot in made:
        if slot.means.what in names:
            parent = slot.path.rpartition(".")[0]
            found = by_parent[parent, slot.present]
            if slot.means.what not in found or "weight" not in found[slot.means.what].shapes:
                found[slot.means.what] = slot  # `q_bias` stands beside `q_proj.weight`
    for some in by_parent.values():
        if len(some) == len(names):
            yield tuple(some[name] for name in names)


def _merged(parts: tuple[Slot, ...], what: str, across: str) -> tuple[Slot, list[Slot]]:
    """The parts one below the other (behind the dimension of stacked entries), and what not all of them have: the
    biases of queries and values, where keys have none."""
    roles = [role for role in parts[0].shapes if all(role in part.shapes for part in parts)]
    first = parts[0]
    dim = 1 if first.how == "stack" else 0
    shapes = {}
    for role in roles:
        together = zip(*(part.shapes[role] for part in parts), strict=True)
        shapes[role] = tuple(_added(some, dim) for some in together)
    parent = first.path.rpartition(".")[0]
    name = what.split(" ")[0] if "qkv" in what or what == "kv" else "gate_up_proj"
    name = "query_key_value" if what.endswith("by heads") else name
    alone = [
        Slot(
            part.path, part.present, part.units, {role: some for role, some in part.shapes.items() if role not in roles}
        )
        for part in parts
        if not part.parts and set(part.shapes) - set(roles)
    ]
    return Slot(f"{parent}.{name}".lstrip("."), first.present, first.units, shapes, parts, "concat"), alone


def _added(shapes: Sequence[Shape], dim: int) -> Shape:
    first = shapes[0]
    if len(first) <= dim:
        return (-1,)
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])


def _stacked(ours: list[Slot], others: list[Slot]) -> list[Slot]:
    """Our slots, with numbered ones stacked where the other side has tensors of so many entries."""
    counts = {shape[0] for slot in others for shapes in slot.shapes.values() for shape in shapes if len(shape) >= 3}
    listed = {len(family) for family, _ in _numbered(others)}
    made = list(ours)
    for family, number in _numbered(ours):
        first = family[0]
        if len(family) not in counts or len(family) in listed or any(slot not in made for slot in family):
            continue
        shapes = {role: tuple((len(family), *shape) for shape in some) for role, some in first.shapes.items()}
        path = ".".join(part for part in (first.path[: number[0]] + first.path[number[1] :]).split(".") if part)
        made = [slot for slot in made if slot not in family]
        made.append(Slot(path, first.present, first.units, shapes, tuple(family), "stack"))
    return made


def _numbered(some: list[Slot]) -> Iterator[tuple[list[Slot], tuple[int, int]]]:
    """Slots of equal shapes that differ in one number alone, in numeric order, and where that is in the first path."""
    families: dict[object, list[tuple[int, Slot, tuple[int, int]]]] = defaultdict(list)
    for slot in some:
        for found in _NUMBER.finditer(slot.path):
            form = slot.path[: found.start()] + "{}" + slot.path[found.end() :]
            key = form, slot.present, tuple(sorted(slot.shapes.items()))
            families[key].append((int(found[0]), slot, found.span()))
    for family in families.values():
        if len(family) > 1 and len({number for number, _, _ in family}) == len(family):
            family.sort(key=lambda one: one[0])
            yield [slot for _, slot, _ in family], family[0][2]

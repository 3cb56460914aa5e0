"""What is to be done for each match: renames, reshapes, joins and cuts, key by key, in the order of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptsurgeon.aligner import relations
from ckptsurgeon.aligner.layouts import PARTS, Heads
from ckptsurgeon.aligner.matching import Pair
from ckptsurgeon.aligner.relations import Order
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.units import Shape
from ckptsurgeon.rules import condense
from ckptsurgeon.rules.condense import Names

BEFORE, STACK, JOIN, CUT, UNSTACK, AFTER, RENAME = range(7)
"""The turns: what is done in place, stacked, joined, cut, unstacked, done in place to what was made, renamed."""
_DIMS = ("squeeze", "unsqueeze", "permute")


@dataclass(frozen=True)
class Deed:
    """One operation on tensors of certain names; `members` are those that a numbered pattern stands for."""

    turn: int
    name: str
    args: Mapping[str, Any]
    there: Names
    made: Names = ()
    members: Names = ()


@dataclass(frozen=True)
class Choice:
    """What was decided about one match: the order of dimensions by role of the target, and heads where the layout is by
    heads; `rotary` is the convention to come to, with the number of heads."""

    orders: Mapping[str, Order] = field(default_factory=dict)
    heads: Heads | None = None
    here: str = ""
    """How the source has joined projections: `blocks` or `groups`."""
    there: str = ""
    rotary: tuple[str, int] | None = None


class NotSaidError(Exception):
    """Something that no rule can say, of a key of the target where it is about one alone."""

    def __init__(self, text: str, key: str | None = None) -> None:
        self.key = key
        super().__init__(text)


def deeds(pair: Pair, choice: Choice, named: Callable[[str], str]) -> Iterator[Deed]:
    """The deeds of one match; `named` gives the names that keys of the target have until the last renames."""
    source, target = pair.source, pair.target
    for number in range(len(source.present)):
        for there, (here, relation) in pair.roles.items():
            order = choice.orders.get(there, relation.orders[0])
            yield from _one(source, target, number, here, there, order, choice, named)
        if not source.parts and not target.parts:
            for there, name in companions(source, target, number):
                yield Deed(RENAME, "rename", {}, (there,), (named(name),))


def companions(source: Slot, target: Slot, number: int) -> Iterator[tuple[str, str]]:
    """Buffers of the same module, which go with it."""
    for role, leaf in target.units[number].leaves.items():
        other = source.units[number].leaves.get(role)
        if role in target.shapes or other is None or not (leaf.computed and other.computed):
            continue
        if leaf.shape == other.shape:
            yield other.key, leaf.key


def _one(
    source: Slot,
    target: Slot,
    number: int,
    here: str,
    there: str,
    order: Order,
    choice: Choice,
    named: Callable[[str], str],
) -> Iterator[Deed]:
    before, after = source.shapes[here][number], target.shapes[there][number]
    steps = relations.steps(before, after, order)
    if source.parts:
        whole = named(target.units[number].leaves[there].key) if not target.parts else _aside(source, number, here)
        yield from _joined(source, number, here, whole, choice)
        yield from (in_place(AFTER if not target.parts else BEFORE, step, whole) for step in steps)
        if target.parts:
            if steps:
                raise NotSaidError(
                    "what is joined anew cannot be changed before it is cut", _key(target, number, there)
                )
            yield from _cut(target, number, there, whole, named, choice)
        return
    key = source.units[number].leaves[here].key
    yield from (in_place(BEFORE, step, key) for step in steps)
    if choice.rotary is not None:
        yield Deed(BEFORE, "rotary", {"to": choice.rotary[0], "heads": choice.rotary[1]}, (key,))
    if choice.here != choice.there and choice.heads is not None and not target.parts:
        yield _regrouped(key, choice, len(after))
    if target.parts:
        yield from _cut(target, number, there, key, named, choice)
    else:
        yield Deed(RENAME, "rename", {}, (key,), (named(target.units[number].leaves[there].key),))


def in_place(turn: int, step: tuple[str, str], name: str) -> Deed:
    operation, words = step
    args: dict[str, Any] = {}
    if words:
        sizes = tuple(map(int, words.split(",")))
        args = {"shape": sizes} if operation == "reshape" else {"dims": sizes}
    return Deed(turn, operation, args, (name,))


def _aside(slot: Slot, number: int, role: str) -> str:
    """A name for what is only made on the way."""
    unit = next(slot.every()) if not slot.units else slot.units[number]
    block = (
        unit.path[: len(unit.path) - len(_innermost(slot).path)] if unit.path.endswith(_innermost(slot).path) else ""
    )
    return f"{block}{slot.path}.{role}~"


def _innermost(slot: Slot) -> Slot:
    return _innermost(slot.parts[0]) if slot.parts else slot


def _joined(slot: Slot, number: int, role: str, name: str, choice: Choice) -> Iterator[Deed]:
    """Put parts together under a name."""
    names = []
    for part in slot.parts:
        if part.parts:
            names.append(_aside(part, number, role))
            yield from _joined(part, number, role, names[-1], choice)
        else:
            own = next(iter(part.shapes)) if role not in part.units[number].leaves else role
            names.append(part.units[number].leaves[own].key)
            if role + PARTS in choice.orders:
                yield Deed(BEFORE, "transpose", {}, (names[-1],))
    if slot.how == "stack":
        yield from _stack(tuple(names), name)
    elif choice.there == "groups" and choice.heads is not None:
        yield Deed(JOIN, "join_qkv", _by_heads(choice.heads), tuple(names), (name,))
    else:
        dim = 1 if slot.parts[0].how == "stack" else 0
        yield Deed(JOIN, "concat", {"dim": dim} if dim else {}, tuple(names), (name,))


def _stack(names: Names, name: str) -> Iterator[Deed]:
    start = _start(names)
    marked = None if start is None else condense.marked(names, start)
    if marked is None:
        raise NotSaidError(f"the numbers of {names[0]!r} and the others have gaps")
    yield Deed(STACK, "stack", {"start": start} if start else {}, (marked,), (name,), names)


def _start(names: Names) -> int | None:
    first, last = (condense.numbers(names[end]) for end in (0, -1))
    found = [int(a) for a, b in zip(first, last, strict=False) if a != b]
    return found[0] if len(first) == len(last) and found else None


def _cut(slot: Slot, number: int, role: str, name: str, named: Callable[[str], str], choice: Choice) -> Iterator[Deed]:
    """Take a tensor apart under the names of the parts."""
    if slot.how == "stack":
        names = tuple(named(_key(part, number, role)) for part in slot.parts)
        start = _start(names)
        marked = None if start is None else condense.marked(names, start)
        if marked is None:
            raise NotSaidError(f"the numbers of {names[0]!r} and the others have gaps", _key(slot, number, role))
        yield Deed(UNSTACK, "unstack", {"start": start} if start else {}, (name,), (marked,), names)
        return
    made = []
    inner = []
    for part in slot.parts:
        if part.parts:
            made.append(_aside(part, number, role))
            inner.append((part, made[-1]))
        else:
            made.append(named(_key(part, number, role)))
    dim = 1 if slot.parts[0].how == "stack" else 0
    if choice.here == "groups" and choice.heads is not None:
        yield Deed(CUT, "split_qkv", _by_heads(choice.heads), (name,), tuple(made))
    else:
        sizes = tuple(_shape(part, number, role)[dim] for part in slot.parts)
        args: dict[str, Any] = {"dim": dim} if dim else {}
        args |= {"sizes": sizes} if len(set(sizes)) > 1 else {}
        yield Deed(CUT, "split", args, (name,), tuple(made))
    if role + PARTS in choice.orders:
        if inner:
            raise NotSaidError("parts of stacked tensors cannot be transposed one by one", _key(slot, number, role))
        yield from (Deed(AFTER, "transpose", {}, (name,)) for name in made)
    for part, temporary in inner:
        yield from _cut(part, number, role, temporary, named, choice)


def _key(slot: Slot, number: int, role: str) -> str:
    slot = _innermost(slot)
    leaves = slot.units[number].leaves
    return leaves[role if role in leaves else next(iter(slot.shapes))].key


def _shape(slot: Slot, number: int, role: str) -> Shape:
    return slot.shapes[role if role in slot.shapes else next(iter(slot.shapes))][number]


def _by_heads(heads: Heads) -> dict[str, Any]:
    return {"heads": heads.queries, "kv": heads.keys if heads.keys != heads.queries else None, "layout": "groups"}


def _regrouped(key: str, choice: Choice, rank: int) -> Deed:
    assert choice.heads is not None
    rest = "" if rank == 1 else " c"
    grouped, blocks = f"(h three d){rest}", f"(three h d){rest}"
    how = f"{grouped} -> {blocks}" if choice.here == "groups" else f"{blocks} -> {grouped}"
    return Deed(BEFORE, "rearrange", {"rearrangement": how, "axes": {"h": choice.heads.queries, "three": 3}}, (key,))

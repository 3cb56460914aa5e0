"""What a header cannot show: layouts, decided by their siblings and by conventions that are kept as data.

A square matrix may be transposed or not; its siblings that are not square tell.  Joined projections are blocks, or by
head; rotary embeddings turn halves, or pairs.  What neither siblings nor conventions tell is asked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptsurgeon.aligner import vocabulary
from ckptsurgeon.aligner.groups import Group
from ckptsurgeon.aligner.matching import Pair
from ckptsurgeon.aligner.relations import Order
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.units import OWN

_TRANSPOSED = ("Conv1D",)
"""Modules whose weight is (in, out): transformers' Conv1D of GPT-2."""
_EMBEDDINGS = frozenset(("embed", "pos", "token", "type", "table", "cls", "dist", "reg"))
_UNSAID = ("wqkv", "query_key_value")
_SHARDED = ("qkv_proj", frozenset(("fc_in", "fc_out")))
"""CodeGen's `qkv_proj`, told by the MLP beside it, holds queries, values and keys of each of four shards."""
_META = frozenset(("w1", "w2", "w3"))


@dataclass(frozen=True)
class Heads:
    """How many heads queries have, and keys and values."""

    queries: int
    keys: int


@dataclass(frozen=True)
class Open:
    """A role of a match whose shapes leave the order of dimensions open; `parts` tells that it is that of the parts of
    what is joined."""

    group: Group
    pair: Pair
    role: str
    parts: bool
    orders: tuple[Order, ...]


PARTS = " of the parts"
"""Behind a role: the order of dimensions of the parts before they are joined, or after they were cut."""
_TURNED: Order = (1, 0)


def orders(groups: Sequence[Group]) -> tuple[dict[int, dict[str, Order]], list[tuple[Pair, str]]]:
    """The order of dimensions of every match whose shapes leave it open, by the identity of the match, then by role;
    and the matches of which nothing tells."""
    votes: dict[object, Counter[Order]] = defaultdict(Counter)
    open_ = list(_counted(groups, votes))
    decided: dict[int, dict[str, Order]] = defaultdict(dict)
    asked: list[tuple[Pair, str]] = []
    for one in open_:
        order = _voted(one, votes)
        if order is None:
            asked.append((one.pair, one.role))
        elif not one.parts:
            decided[id(one.pair)][one.role] = order
        elif order != one.orders[0]:
            decided[id(one.pair)][one.role + PARTS] = _TURNED
    return decided, asked


def _counted(groups: Sequence[Group], votes: dict[object, Counter[Order]]) -> Iterator[Open]:
    """What is open; what is not is counted among the votes."""
    for group, pair in [(one, pair) for one in groups for pair in one.outcome.pairs]:
        for role, (_, relation) in pair.roles.items():
            first = relation.orders[0]
            if len(first) < 2 or relation.flat or _is_embedding(pair):
                continue
            if len(relation.orders) > 1:
                yield Open(group, pair, role, False, relation.orders)
            elif _has_square_parts(pair, role):
                yield Open(group, pair, role, True, (first, first[::-1]))
            else:
                for scope in _scopes(group, pair, role, len(first)):
                    votes[scope][first] += 1


def _voted(one: Open, votes: Mapping[object, Counter[Order]]) -> Order | None:
    """What the siblings say; None where they contradict each other, or where there are none and more than one order is
    usual."""
    length = len(one.orders[0])
    plain = tuple(range(length))
    for scope in _scopes(one.group, one.pair, one.role, length):
        said = votes.get(scope)
        if said:
            order = next(iter(said))
            fine = len(said) == 1 and order in one.orders and (order == plain or _is_near(scope))
            return order if fine else None
    if (not one.parts and one.orders[0] != plain) or _is_bare(one.pair, one.role, length):
        return None
    return None if _may_be_transposed(one.pair, length) else one.orders[0]


def _is_near(scope: object) -> bool:
    """Whether the siblings are in the same blocks, or such as lie one way in a whole library: elsewhere it may lie the
    other way round."""
    return isinstance(scope, tuple) and scope[0] != "model"


def _has_square_parts(pair: Pair, role: str) -> bool:
    parts = pair.source.parts or pair.target.parts
    if not parts or len(pair.roles[role][1].orders[0]) != 2:
        return False
    while parts[0].parts:
        parts = parts[0].parts
    own = [part.shapes[role if role in part.shapes else next(iter(part.shapes))][0] for part in parts]
    return all(len(shape) == 2 and shape[0] == shape[1] for shape in own)


def _is_bare(pair: Pair, role: str, length: int) -> bool:
    """Whether one side has a parameter of a module's own where the other has a linear layer: what is multiplied from
    the right (`x @ self.text_projection` of CLIP) lies the other way round."""
    return length == 2 and {role, pair.roles[role][0]} == {OWN, "weight"}


def _is_kernel(pair: Pair) -> bool:
    """Whether one side alone has kernels, which have inputs first in a whole file."""
    ends = [
        {leaf.key.replace("/", ".").rpartition(".")[2] for leaf in next(slot.every()).leaves.values()}
        for slot in (pair.source, pair.target)
    ]
    return ("kernel" in ends[0]) != ("kernel" in ends[1])


def _scopes(group: Group, pair: Pair, role: str, length: int) -> Iterator[object]:
    """Where the siblings are, the nearest first: the same kind of module in the block, the block, the model."""
    if _is_bare(pair, role, length):
        yield "bare", length
        return
    module = pair.target.module_name
    if group.meeting is not None:
        yield "block", id(group), module, length
    if group.meeting is not None and module not in _TRANSPOSED:
        yield "block", id(group), length
    if _is_kernel(pair):
        yield "kernel", length
    yield "model", module, length
    if module not in _TRANSPOSED:
        yield "model", length


def _is_embedding(pair: Pair) -> bool:
    unit = next(pair.target.every())
    if unit.kind:
        return unit.kind == "embedding"
    for slot in (pair.source, pair.target):
        last = slot.path.rpartition(".")[2]
        if slot.means.what in ("token embedding", "positions") or _EMBEDDINGS & set(vocabulary.words(last)):
            return "proj" not in vocabulary.words(last)
    return False


def _may_be_transposed(pair: Pair, length: int) -> bool:
    """Whether a module is of a kind that lies the other way round in one of the two libraries."""
    keys = [
        leaf.key.replace("/", ".").rpartition(".")[2] for unit in pair.source.every() for leaf in unit.leaves.values()
    ]
    return "kernel" in keys or (length == 2 and pair.target.module_name in _TRANSPOSED)


# -- heads -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How joined projections lie on each side (`blocks`, `groups`), and the convention to which rotary pairs turn."""

    here: str = ""
    there: str = ""
    rotary: str = ""
    which: str = ""

    @property
    def wants_heads(self) -> bool:
        return self.here != self.there or bool(self.rotary)


def layout(pair: Pair, group: Group) -> Layout:
    """What conventions say of a match."""
    if _is_unsaid(pair) or _is_sharded(pair, group):
        return Layout("unsaid", "blocks")
    here, there = (_joined(slot) for slot in (pair.source, pair.target))
    gates = [slot.means.what.startswith(("gate and up", "kv")) for slot in (pair.source, pair.target)]
    if bool(here) != bool(there) or gates[0] != gates[1]:
        return Layout("unknown", "blocks")
    if here or there:
        if not pair.source.parts and not pair.target.parts:
            return Layout(here, there) if here and there else Layout()
        return (
            Layout("groups" if here == "groups" else "", "")
            if pair.target.parts
            else Layout("", there if there == "groups" else "")
        )
    a, b = (slot.path.rpartition(".")[2] for slot in (pair.source, pair.target))
    for names, others, to in (
        (("wq", "wk"), ("q_proj", "k_proj"), "half"),
        (("q_proj", "k_proj"), ("wq", "wk"), "pairs"),
    ):
        if a in names and b in others and names.index(a) == others.index(b):
            return Layout(rotary=to, which=("q", "k")[names.index(a)])
    return Layout()


def _is_unsaid(pair: Pair) -> bool:
    """Grouped queries: `wqkv` of gpt-fast has all queries first, that of InternLM2 the queries, key and value of each
    group; so have `query_key_value` of ChatGLM, and of Falcon."""
    joined, apart = (pair.source, pair.target) if pair.target.parts else (pair.target, pair.source)
    if not apart.parts or not joined.means.what.startswith("qkv") or not joined.path.endswith(_UNSAID):
        return False
    return len({part.numel for part in apart.parts}) > 1


def _is_sharded(pair: Pair, group: Group) -> bool:
    """Whether one side alone is spelt as in CodeGen, whose joined projection is laid out as no other."""
    name, beside = _SHARDED
    told = []
    for slot, some in (
        (pair.source, [one.source for one in group.outcome.pairs]),
        (pair.target, [one.target for one in group.outcome.pairs]),
    ):
        ends = {one.path.rpartition(".")[2] for one in some}
        told.append(not slot.parts and slot.path.rpartition(".")[2] == name and ends >= beside)
    return told[0] != told[1]


def _joined(slot: Slot) -> str:
    what = slot.means.what
    if what.startswith("qkv by heads"):
        return "groups"
    return "blocks" if what.startswith("qkv") else ""


def is_meta(some: Iterable[Slot]) -> bool:
    """Whether blocks are spelt as in Meta's Llama, where rotary pairs lie side by side."""
    every = [inner for slot in some for inner in _leaves(slot)]
    return {slot.path.rpartition(".")[2] for slot in every} >= _META


def _leaves(slot: Slot) -> Iterator[Slot]:
    if slot.parts:
        for part in slot.parts:
            yield from _leaves(part)
    else:
        yield slot


def of_parts(heads: Heads, parts: Sequence[Slot]) -> Heads:
    """The heads, with as many of keys as their rows say where they are apart: a model may say one thing of its keys and
    mean another (Falcon's, which all queries share)."""
    if len(parts) != 3 or any(part.parts for part in parts):
        return heads
    rows = [next(iter(part.shapes.values()))[0][0] for part in parts]
    size, rest = divmod(rows[0], heads.queries)
    if rest or not size or rows[1] % size or rows[1] != rows[2]:
        return heads
    return Heads(heads.queries, rows[1] // size)


def heads(facts: Mapping[str, int]) -> Heads | None:
    """What a model says of its heads."""
    queries = facts.get("heads")
    return None if not queries else Heads(queries, facts.get("kv_heads") or queries)

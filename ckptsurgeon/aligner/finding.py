"""The whole of an alignment: groups, what only order tells, layouts, then edges, rules, questions and what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.aligner import groups as grouping
from ckptsurgeon.aligner import inorder, layouts, leftovers, openings, reasons, recipes, units
from ckptsurgeon.aligner.alignment import Alignment, Edge, Grade, Match, Question
from ckptsurgeon.aligner.deeds import Choice, Deed, NotSaidError, companions, deeds
from ckptsurgeon.aligner.groups import Group
from ckptsurgeon.aligner.hints import Hint, allowed, check
from ckptsurgeon.aligner.hints import names as named
from ckptsurgeon.aligner.matching import Pair
from ckptsurgeon.aligner.openings import Verdict
from ckptsurgeon.aligner.relations import Order
from ckptsurgeon.aligner.scores import TELLING
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.units import Side
from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.rules import Recipe, Rule

_MOST_LINES = 8


@dataclass(eq=False)
class Decided:
    """A match with all that was decided about it; `asked` is what keeps it open."""

    pair: Pair
    group: Group
    grade: Grade
    choice: Choice = field(default_factory=Choice)
    asked: Question | None = None


def align(
    source: Checkpoint, target: Target, hints: Sequence[Hint] = (), verdicts: Sequence[Verdict] = ()
) -> Alignment:
    """How `source` becomes what `target` wants, as far as names, shapes and order tell; `verdicts` decide what an
    alignment with the same hints had among its openings."""
    ours, others = units.of_checkpoint(source), units.of_target(target)
    check(hints, ours, others)
    ours, others = units.untied(ours, others)
    if not hints and (inorder.is_hashed(ours) or inorder.is_hashed(others)):
        return _hashed(source, target, ours, others)
    heeded = allowed(hints) if hints else None
    found = grouping.groups(ours, others, heeded)
    tried = openings.settle(found, verdicts)
    by_order = {id(pair) for group in found for pair in inorder.settle(group, ours, others)}
    orders, asked = layouts.orders(found)
    layouts_asked = openings.turn(asked, tried, orders)
    open_layouts = {id(pair) for pair, _ in layouts_asked}
    decided = [
        _decided(pair, group, tried, by_order, orders, open_layouts, others, ours, hints)
        for group in found
        for pair in (*group.outcome.pairs, *group.computed.pairs)
    ]
    taken = [one for one in decided if one.grade != "open"]
    ties = leftovers.ties(
        others, {leaf.key for one in taken for unit in one.pair.target.every() for leaf in unit.leaves.values()}
    )
    while True:
        edges = _edges(taken)
        try:
            rules, done = _rules(source, target, taken, edges, found, ties)
            break
        except NotSaidError as error:
            taken = [one for one in taken if not _given_up(one, error)]
    open_edges = [edge for one in decided if one.grade == "open" for edge in _open_edges(one)]
    matches = tuple(
        reasons.match(one.pair, one.group, one.grade, one.choice, one.asked) for one in decided if one.pair.roles
    )
    questions = tuple(reasons.questions(decided, found))
    left = leftovers.Left(ours, others, found, [*edges, *open_edges], ties)
    notes = reasons.notes(rules, done)
    return Alignment(
        source,
        target,
        Recipe(tuple(rules), description=f"From {ours.label} to {others.label}"),
        matches,
        (*edges, *open_edges),
        (*questions, *left.questions()),
        left.missing(),
        left.unused(),
        left.agreement(),
        left.agreement(left.asked),
        notes,
        openings=tuple(openings.openings(decided, found, layouts_asked, heeded)),
        hints=tuple(hints),
    )


def _given_up(one: Decided, error: NotSaidError) -> bool:
    """Keep a match open that no rule can say; all of them where it is not known which."""
    keys = {key for edge in _edges([one]) for key in edge.targets}
    if error.key is not None and error.key not in keys:
        return False
    one.grade, one.asked = "open", reasons.unsayable(one.pair, one.group, str(error))
    return True


def _decided(
    pair: Pair,
    group: Group,
    tried: Mapping[int, int],
    by_order: set[int],
    orders: Mapping[int, Mapping[str, Order]],
    open_layouts: set[int],
    target: Side,
    source: Side,
    hints: Sequence[Hint],
) -> Decided:
    own = orders.get(id(pair), {})
    grade: Grade = "order" if id(pair) in by_order else "certain" if pair.margin >= TELLING else "open"
    if grade == "open" and reasons.same_bytes(pair, source):
        grade = "certain"
    if id(pair) in tried:
        grade = "tried"
    made = Decided(pair, group, grade, Choice(own))
    hinted = named(hints, pair.source, pair.target)
    if group.doubt:
        made.grade = "open"
    elif grade == "open":
        made.asked = reasons.twins(pair, group)
    elif grade != "tried" and not hinted and reasons.is_weak(pair, group):
        made.grade, made.asked = "open", reasons.weak(pair, group)
    elif id(pair) in open_layouts and not (hinted and _is_plain(pair)):
        made.grade, made.asked = "open", reasons.square(pair, group)
    elif any(relation.flat for _, relation in pair.roles.values()):
        made.grade, made.asked = "open", reasons.flat(pair, group)
    else:
        _layout(made, target)
    return made


def _is_plain(pair: Pair) -> bool:
    """Whether tensors may go over as they are."""
    return all(relation.orders[0] == tuple(range(len(relation.orders[0]))) for _, relation in pair.roles.values())


def _layout(made: Decided, target: Side) -> None:
    """What conventions say of joined projections and rotary pairs."""
    told = layouts.layout(made.pair, made.group)
    if not told.wants_heads:
        return
    if told.here in ("unsaid", "unknown"):
        ask = reasons.unsaid if told.here == "unsaid" else reasons.unknown
        made.grade, made.asked = "open", ask(made.pair, made.group)
        return
    heads = layouts.heads(target.facts)
    own = made.choice.orders
    if told.rotary:
        pairs = made.group.outcome.pairs
        meta = layouts.is_meta([pair.source if told.rotary == "half" else pair.target for pair in pairs])
        if not meta and target.facts.get("rotary") == 0:
            return
        if not meta or heads is None:
            made.grade, made.asked = "open", reasons.rotary(made.pair, made.group, meta, told.rotary)
            return
        count = heads.queries if told.which == "q" else heads.keys
        made.choice = Choice(own, rotary=(told.rotary, count))
        return
    if heads is None:
        made.grade, made.asked = "open", reasons.by_heads(made.pair, made.group)
        return
    apart = made.pair.target.parts or made.pair.source.parts
    made.choice = Choice(own, layouts.of_parts(heads, apart), told.here or "blocks", told.there or "blocks")


def _open_edges(one: Decided) -> Iterator[Edge]:
    sources = tuple(leaf.key for unit in one.pair.source.every() for leaf in unit.needed.values())
    targets = tuple(leaf.key for unit in one.pair.target.every() for leaf in unit.needed.values())
    yield Edge(sources, targets, "open")


def _rules(
    source: Checkpoint,
    target: Target,
    taken: Sequence[Decided],
    edges: Sequence[Edge],
    found: Sequence[Group],
    ties: Sequence[tuple[str, str]],
) -> tuple[list[Rule], list[tuple[Deed, Decided]]]:
    """The shorter of the recipes in one step and in two, each held against the edges."""
    wanted = {key: (edge.sources, target.entries[key].spec.shape) for edge in edges for key in edge.targets}
    direct = [(deed, one) for one in taken for deed in deeds(one.pair, one.choice, lambda key: key)]
    best = recipes.lines([deed for deed, _ in direct], source, ties, {}, wanted)
    if len(best) > max(_MOST_LINES, len(taken) + 2):
        paths = {old: new for group in found if not group.doubt for old, new in _moved(group)}
        back = {new: old for old, new in paths.items()}
        staged = [
            (deed, one) for one in taken for deed in deeds(one.pair, one.choice, lambda key: _under_old(key, back))
        ]
        try:
            other = recipes.lines([deed for deed, _ in staged], source, ties, paths, wanted)
        except (NotSaidError, AssertionError):
            return best, direct
        if len(other) < len(best):
            return other, staged
    return best, direct


def _moved(group: Group) -> list[tuple[str, str]]:
    return [(old, new) for old, new in group.pairs if old and new]


def _under_old(key: str, back: Mapping[str, str]) -> str:
    """A key of the target with the old path of its block."""
    at = key.rfind(".")
    while at > 0:
        if key[:at] in back:
            return back[key[:at]] + key[at:]
        at = key.rfind(".", 0, at)
    return key


def _edges(taken: Sequence[Decided]) -> list[Edge]:
    """Key by key: which keys of the source every key of the target is made of."""
    made = []
    for one in taken:
        source, target = one.pair.source, one.pair.target
        for number in range(len(source.present)):
            for there, (here, _) in one.pair.roles.items():
                made.append(Edge(tuple(_keys(source, number, here)), tuple(_keys(target, number, there)), one.grade))
            if not source.parts and not target.parts:
                made += [Edge((a,), (b,), one.grade) for a, b in companions(source, target, number)]
    return made


def _keys(slot: Slot, number: int, role: str) -> Iterator[str]:
    if slot.parts:
        for part in slot.parts:
            yield from _keys(part, number, role)
    else:
        leaves = slot.units[number].leaves
        yield leaves[role if role in leaves else next(iter(slot.shapes))].key


def _hashed(source: Checkpoint, target: Target, ours: Side, others: Side) -> Alignment:
    """Names that say nothing: the order of all keys, or nothing."""
    pairs, why = inorder.zipped(ours, others)
    edges = [Edge((a.key,), (b.key,), "order") for a, b in pairs]
    rules = (
        recipes.lines(
            [deed for a, b in pairs for deed in inorder.deeds(a, b)],
            source,
            (),
            {},
            {b.key: ((a.key,), b.shape) for a, b in pairs},
        )
        if pairs
        else []
    )
    left = leftovers.Left(ours, others, [], edges, [])
    question = Question(f"{ours.label}: {why}; say by rules which is which") if why else None
    matches = tuple(
        Match(
            (a.key,),
            (b.key,),
            1,
            b.numel,
            "",
            "order",
            0.0,
            ("the order of all keys explains every shape",),
            "all keys",
        )
        for a, b in pairs
    )
    return Alignment(
        source,
        target,
        Recipe(tuple(rules)),
        matches,
        tuple(edges),
        (question,) if question else (),
        left.missing(),
        left.unused(),
        left.agreement(),
        left.agreement(left.asked),
    )

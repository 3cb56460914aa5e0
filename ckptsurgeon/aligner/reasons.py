"""Why: the evidence of each match in words, and the questions about what is open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptsurgeon.aligner import relations, vocabulary
from ckptsurgeon.aligner.alignment import Grade, Match, Question
from ckptsurgeon.aligner.deeds import Choice, Deed
from ckptsurgeon.aligner.groups import Group
from ckptsurgeon.aligner.matching import Pair
from ckptsurgeon.aligner.runs import pattern
from ckptsurgeon.aligner.scores import MATCH, TELLING
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.units import OWN, Side
from ckptsurgeon.rules import Rule

if TYPE_CHECKING:
    from ckptsurgeon.aligner.finding import Decided

_SHOWN = 4
TRIED = "by experiment alone"
_ALONE: Mapping[Grade, str] = {"order": "by the order of definition alone", "tried": TRIED}


def names(slot: Slot) -> tuple[str, ...]:
    """The modules of a slot, with `{}` for the numbers of blocks where there are several."""
    if slot.parts:
        return tuple(dict.fromkeys(name for part in slot.parts for name in names(part)))
    paths = [unit.path for unit in slot.units]
    if len(paths) == 1:
        return (paths[0],)
    block = len(paths[0]) - len(slot.path)
    return (pattern(paths[0][:block]) + paths[0][block:],) if paths[0].endswith(slot.path) else (pattern(paths[0]),)


def match(pair: Pair, group: Group, grade: Grade, choice: Choice, asked: Question | None) -> Match:
    """What is told of a match."""
    count = len(pair.roles) * len(pair.target.present) * (len(pair.target.parts) or 1)
    why = tuple(evidence(pair, group, grade, choice)) if asked is None else (asked.text,)
    return Match(
        names(pair.source),
        names(pair.target),
        count,
        pair.target.numel,
        how(pair, choice),
        grade,
        pair.margin,
        why,
        group.name,
    )


def how(pair: Pair, choice: Choice) -> str:
    """What is done besides a rename."""
    said = []
    if pair.source.parts:
        said.append(f"{pair.source.how} of {len(pair.source.parts)}")
    for role, (here, relation) in pair.roles.items():
        order = choice.orders.get(role, relation.orders[0])
        for operation, words in relations.steps(pair.source.shapes[here][0], pair.target.shapes[role][0], order):
            said.append(f"{operation} {words}".strip())
    if choice.rotary:
        said.append(f"rotary {choice.rotary[0]} heads={choice.rotary[1]}")
    if pair.target.parts:
        said.append("unstack" if pair.target.how == "stack" else f"split into {len(pair.target.parts)}")
    return ", ".join(dict.fromkeys(said))


def evidence(pair: Pair, group: Group, grade: Grade, choice: Choice) -> Iterator[str]:
    if len(pair.target.present) > 1:
        yield f"in {len(pair.target.present)} blocks alike"
    if pair.alone:
        yield "the only ones of this shape"
    a, b = pair.source, pair.target
    if a.path == b.path and a.path:
        yield "the same name"
    elif a.means.what and a.means.what.removesuffix(" by heads") == b.means.what.removesuffix(" by heads"):
        yield f"both are {a.means.what}"
    elif shared := [word for word in dict.fromkeys(a.words) if word in b.words]:
        yield f"both say {', '.join(shared)}"
    if a.norm and a.norm == b.norm:
        yield f"norm {a.norm[0] + 1} of {a.norm[1]}"
    elif shared_ranks := sorted(a.ranks & b.ranks):
        yield f"number {shared_ranks[0][1] + 1} of {shared_ranks[0][2]}"
    if choice.orders and grade != "tried":
        yield "layout as its siblings"
    if grade in _ALONE:
        yield _ALONE[grade]


def same_bytes(pair: Pair, source: Side) -> bool:
    """Whether all that could take its place is the same tensor."""
    ties = next(
        (
            set(group)
            for group in source.ties
            for unit in pair.source.every()
            for leaf in unit.needed.values()
            if leaf.key in group
        ),
        None,
    )
    rivals = {leaf.key for slot in pair.rivals for unit in slot.every() for leaf in unit.needed.values()}
    return ties is not None and bool(rivals) and rivals <= ties


def _own(slot: Slot) -> str:
    """The name of a slot in its blocks."""
    return slot.path or names(slot)[0]


def twins(pair: Pair, group: Group) -> Question:
    others = [slot for slot in pair.rivals if slot is not pair.source]
    which = ", ".join(repr(_own(slot)) for slot in (pair.source, *others[: _SHOWN - 1]))
    answers = tuple(f"--hint '{_own(slot)}={_own(pair.target)}'" for slot in (pair.source, *others[: _SHOWN - 1]))
    text = f"{_own(pair.target)!r} may be any of {which}{_where(group)}: their shapes are equal, and names do not tell"
    if not others:
        text = f"{_own(pair.target)!r} may be {which}{_where(group)}, or others as well: names do not tell"
    return Question(text, tuple(map(_own, (pair.source, *others))), (_own(pair.target),), answers)


def _where(group: Group) -> str:
    return f" in {group.name}" if group.meeting else ""


def is_weak(pair: Pair, group: Group) -> bool:
    """Whether nothing but a shape that many things have speaks for a match, while both sides have something over, or
    names say that the two are there for something else."""
    if group.meeting is not None or pair.points >= MATCH + TELLING / 2:
        return False
    a, b = (vocabulary.PURPOSES & set(slot.words) for slot in (pair.source, pair.target))
    if a and b and not a & b:
        return True
    if any(len(relations.bare(shape)) > 2 for shapes in pair.target.shapes.values() for shape in shapes):
        return False
    return bool(group.outcome.sources and group.outcome.targets)


def weak(pair: Pair, group: Group) -> Question:
    a, b = _own(pair.source), _own(pair.target)
    text = f"{b!r} may be {a!r}, which alone has its shape, but nothing in the names says so"
    return Question(text, (a,), (b,), (_hint(a, b),))


def _hint(a: str, b: str) -> str:
    return f"--hint '{a}={b}'"


def _last(slot: Slot) -> str:
    return slot.path.rpartition(".")[2]


def _weight(slot: Slot) -> str:
    """A pattern of the keys of a slot's main tensor."""
    leaves = next(slot.every()).leaves
    role = next((role for role in ("weight", OWN) if role in leaves), next(iter(leaves)))
    return f"{re.escape(_last(slot))}$" if role == OWN else f"\\.{re.escape(_last(slot))}\\.weight$"


def flat(pair: Pair, group: Group) -> Question:
    """torch unfolds channels, height, width; others height, width, channels."""
    a, b = _own(pair.source), _own(pair.target)
    text = f"{a!r} and {b!r} are as large, and nothing tells in which order dimensions were made one{_where(group)}"
    shape = next(iter(pair.target.shapes.values()))[0]
    sizes = ",".join(map(str, (*shape[:1], -1) if len(shape) == 2 else shape))
    key = _weight(pair.source)
    return Question(text, (a,), (b,), (f"--rule 'reshape {key} {sizes}'", f"--rule \"rearrange {key} '…'\""))


def _taken_apart(pair: Pair, options: str) -> str:
    """The rule that cuts or joins queries, keys and values, under the names of the target."""
    if pair.target.parts:
        here, names = _last(pair.source), [_last(part) for part in pair.target.parts]
        made = " ".join(f"\\1.{name}.\\2" for name in names)
        return f"--rule 'split_qkv ^(.*)\\.{here}\\.(weight|bias)$ => {made} {options}'"
    if pair.source.parts:
        patterns = " ".join(f"^(.*)\\.{_last(part)}\\.(weight|bias)$" for part in pair.source.parts)
        return f"--rule 'join_qkv {patterns} => \\1.{_last(pair.target)}.\\2 {options}'"
    return f"--rule 'rearrange {_weight(pair.source)} …' {_hint(_own(pair.source), _own(pair.target))}"


def unsaid(pair: Pair, group: Group) -> Question:
    a, b = _own(pair.source), _own(pair.target)
    text = f"{a!r} and {b!r}: such projections are joined block by block in some models and group by group in others"
    ways = (f"heads=N kv=N layout={layout}" for layout in ("blocks", "groups"))
    return Question(text, (a,), (b,), tuple(_taken_apart(pair, way) for way in ways))


def unknown(pair: Pair, group: Group) -> Question:
    a, b = _own(pair.source), _own(pair.target)
    text = f"{a!r} → {b!r}: one is several projections in one, and the other's name does not tell how they lie in it"
    answer = f"--rule '\\.{re.escape(_last(pair.source))}\\. => .{_last(pair.target)}.', if they lie alike"
    return Question(text, (a,), (b,), (answer,))


def joined(parts: Sequence[Slot], whole: Slot, is_cut: bool) -> Question:
    """What may be several projections in one, under a name that is in no table."""
    names, last = [_last(part) for part in parts], _last(whole)
    text = f"{_own(whole)!r} may be {', '.join(names)} in one, and how they lie in it its name does not tell"
    made = " ".join(f"\\1{name}.\\2" for name in names)
    found = " ".join(f"^(.*\\.|){name}\\.(weight|bias)$" for name in names)
    rule = f"split ^(.*\\.|){last}\\.(weight|bias)$ => {made}" if is_cut else f"concat {found} => \\1{last}.\\2"
    several, one = tuple(map(_own, parts)), (_own(whole),)
    sources, targets = (one, several) if is_cut else (several, one)
    return Question(text, sources, targets, (f"--rule '{rule}', if they lie one after another",))


def unsayable(pair: Pair, group: Group, why: str) -> Question:
    a, b = _own(pair.source), _own(pair.target)
    return Question(f"{a!r} → {b!r}{_where(group)}: no rule was found that does it: {why}", (a,), (b,))


def square(pair: Pair, group: Group) -> Question:
    a, b = _own(pair.source), _own(pair.target)
    text = f"{b!r} is square, and nothing tells whether {a!r} is to be transposed{_where(group)}"
    hint = _hint(a, b)
    return Question(text, (a,), (b,), (f"{hint} if not", f"--rule 'transpose {_weight(pair.source)}' {hint} if so"))


def by_heads(pair: Pair, group: Group) -> Question:
    a, b = _own(pair.source), _own(pair.target)
    text = f"{a!r} and {b!r}: queries, keys and values are joined head by head, and the number of heads is not known"
    return Question(text, (a,), (b,), (_taken_apart(pair, "heads=N layout=groups"),))


def rotary(pair: Pair, group: Group, meta: bool, to: str) -> Question:
    a, b = _own(pair.source), _own(pair.target)
    why = "and the number of heads is not known" if meta else "if this is Meta's layout"
    text = f"{a!r} → {b!r}: rotary pairs may lie side by side in the one and in halves in the other, {why}"
    rename = f"--rule '\\.{_last(pair.source)}\\. => .{_last(pair.target)}.'"
    turn = f"--rule 'rotary {_weight(pair.source)} {to} heads=N' {rename}"
    return Question(text, (a,), (b,), (turn, f"{rename} if they lie alike"))


def questions(decided: Sequence[Decided], groups: Sequence[Group]) -> Iterator[Question]:
    """All that is open, each thing once."""
    for group in groups:
        if group.doubt and group.meeting is not None:
            a, b = group.meeting.source.pattern, group.meeting.target.pattern
            also = f" (also {', '.join(group.rivals)})" if group.rivals else ""
            text = f"the blocks {a}{also} for {b}: {group.doubt}"
            yield Question(text, (a, *group.rivals), (b,), (f"--hint '{_plain(a)}={_plain(b)}'",))
    seen: set[frozenset[str]] = set()
    for one in decided:
        if one.asked is None:
            continue
        about = frozenset((*one.asked.sources, one.group.name))
        if about not in seen:
            seen.add(about)
            yield one.asked


def _plain(run: str) -> str:
    return run.partition(".{}")[0].rstrip(".{}_")


def notes(rules: Sequence[Rule], done: Sequence[tuple[Deed, Decided]]) -> Mapping[str, str]:
    """What each rule is for: the matches whose keys it takes first."""
    made: dict[str, str] = {}
    for rule in rules:
        patterns = rule.args.get("patterns") or (rule.args.get("pattern"),)
        first = patterns[0]
        search = getattr(first, "search", None)
        if search is None:
            continue
        for deed, one in done:
            if any(search(name) for name in (deed.members or deed.there)):
                grade = "" if one.grade == "certain" else f" ({one.grade})"
                why = "; ".join(evidence(one.pair, one.group, one.grade, one.choice))
                made[rule.text] = (
                    f"{', '.join(names(one.pair.source))} → {', '.join(names(one.pair.target))}{grade}: {why}"
                )
                break
    return made

"""From deeds to a small recipe: patterns with captures that do exactly what the deeds say, no line for each key.

Blocks whose numbers no arithmetic explains (four stages that were one list) are renamed in two steps: what is in a
block, under its old path, and then the paths.  The rules are applied to the names before they are given out: they must
make every key of what it is to be made of.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ckptsurgeon.aligner.deeds import RENAME, Deed, NotSaidError
from ckptsurgeon.aligner.votes import ancestors
from ckptsurgeon.applying import Applying
from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.rules import Rule, condense, parse, render
from ckptsurgeon.rules.condense import ASIDE, Edge

Wanted = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
"""Name → the keys of the source that it is made of, and its shape."""


def lines(
    deeds: Sequence[Deed],
    source: Checkpoint,
    ties: Sequence[tuple[str, str]],
    last: Mapping[str, str],
    wanted: Wanted,
) -> list[Rule]:
    """The rules that do the deeds; `ties` are names that get a second one, `last` renames of names that the deeds made,
    by their beginnings.  NotSaidError where they would not do what is wanted."""
    work = Applying(source, None, False, 0, None)
    rules: list[Rule] = []
    turns: dict[int, list[Deed]] = defaultdict(list)
    for deed in deeds:
        turns[deed.turn].append(deed)
    for turn in sorted(turns):
        made = _renames(turns[turn], work) if turn == RENAME else _operations(turns[turn], work)
        for rule in made:
            _apply(work, rule)
        rules += made
    for rule in _moves(last, list(work.refs)):
        _apply(work, rule)
        rules.append(rule)
    edges = [Edge((kept,), (alias,)) for kept, alias in ties]
    for line in condense.lines(edges, set(work.refs)) if edges else ():
        rule = parse(render("tie", condense.words("tie", line)))
        _apply(work, rule)
        rules.append(rule)
    for name, (keys, shape) in wanted.items():
        ref = work.refs.get(name)
        if ref is None or ref.shape != shape or set(work.origins(name)) != set(keys):
            raise NotSaidError(f"{name!r} would not be made of {', '.join(map(repr, keys))}", name)
    return rules


def _apply(work: Applying, rule: Rule) -> None:
    work.apply(rule)
    if work.problems:
        raise NotSaidError(str(work.problems[0]))


def _renames(deeds: Iterable[Deed], work: Applying) -> list[Rule]:
    goals = {deed.there[0]: deed.made[0] for deed in deeds if deed.there != deed.made}
    if not goals:
        return []
    return [
        parse(render("rename", {"pattern": re.compile(a), "template": b}))
        for a, b in condense.renames(goals, set(work.refs))
    ]


def _operations(deeds: Iterable[Deed], work: Applying) -> list[Rule]:
    groups: dict[str, tuple[Deed, list[Edge]]] = {}
    for deed in deeds:
        key = f"{deed.name} {deed.args!r} {len(deed.there)} {len(deed.made)}"
        groups.setdefault(key, (deed, []))[1].append(
            Edge(deed.there, deed.made, deed.members if deed.name == "stack" else ())
        )
    made = []
    universe = set(work.refs)
    for deed, edges in groups.values():
        found = condense.lines(edges, universe)
        made += [parse(render(deed.name, {**deed.args, **condense.words(deed.name, line)})) for line in found]
    return made


def _moves(paths: Mapping[str, str], names: Sequence[str]) -> list[Rule]:
    """Renames of beginnings: `features.3.` becomes `blocks.1.1.`; a rule for all where arithmetic says it, else one for
    each new list."""
    if not paths:
        return []
    lists: dict[str, dict[str, str]] = defaultdict(dict)
    for old, new in paths.items():
        if old != new:
            lists[re.sub(r"\d+(?=\D*$)", "{}", new)][f"{old}."] = f"{new}."
    whole = [f"{old}." for old in paths]
    aside = _collide(paths, names)
    made: list[tuple[str, str]] = []
    for part in lists.values():
        goals = {old: (ASIDE + new if aside else new) for old, new in part.items()}
        made += _beginnings(goals, whole)
    made += [(f"^{re.escape(ASIDE)}", "")] if aside and made else []
    return [parse(render("rename", {"pattern": re.compile(a), "template": b})) for a, b in made]


def _collide(paths: Mapping[str, str], names: Sequence[str]) -> bool:
    """Whether a new beginning is there already, or begins as an old one, so that the order of renames would matter."""
    there: set[str] = set()
    for name in names:
        at = name.find(".")
        while at >= 0:
            there.add(name[:at])
            at = name.find(".", at + 1)
    changed = [(old, new) for old, new in paths.items() if old != new]
    return any(new in there or any(above in paths for above in (*ancestors(new), new)) for _, new in changed)


def _beginnings(goals: Mapping[str, str], whole: Sequence[str]) -> list[tuple[str, str]]:
    """Patterns of beginnings and their templates."""
    edges = [Edge((old,), (new,)) for old, new in goals.items()]
    return [(line.patterns[0].removesuffix("$"), line.templates[0]) for line in condense.lines(edges, whole)]

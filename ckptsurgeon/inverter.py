"""The way back: from what a recipe did to a checkpoint, the recipe that undoes it.

Built from the edges of the plan, step by step from the last one: which names were made of which, and what their specs
were.  Regexes are never turned around, so that it holds for this header, whatever the patterns would do elsewhere.
The result is planned before it is given out: it must bring back every name, dtype and shape.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ckptsurgeon.applying import Applying, about, options_of
from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.errors import PlanError, Problem, RuleError
from ckptsurgeon.plans import Edge as Pair
from ckptsurgeon.plans import Step
from ckptsurgeon.rules import Recipe, Rule, condense, document, parse, render
from ckptsurgeon.rules.condense import ASIDE, MARK, Edge, Names
from ckptsurgeon.tensor import TensorSpec

_SHOWN = 3
Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Undoing:
    """The lines that undo one rule, in order; `rounded` where that gives values back but for rounding, `nothing` why
    there are none."""

    rule: Rule
    lines: tuple[str, ...] = ()
    rounded: bool = False
    nothing: str = ""


@dataclass(frozen=True)
class Inversion:
    """The way back of a recipe for one header.

    `undoings` are what its steps need, the last one first; `problems` name the lines that have no inverse, `expects`
    and `yields` are keys by which the result and the source are told apart.
    """

    recipe: Recipe
    label: str
    undoings: tuple[Undoing, ...]
    problems: tuple[Problem, ...] = ()
    expects: Mapping[str, TensorSpec] = field(default_factory=dict)
    yields: Mapping[str, TensorSpec] = field(default_factory=dict)

    @property
    def lines(self) -> tuple[str, ...]:
        """All lines of the way back."""
        return tuple(line for undoing in self.undoings for line in undoing.lines)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the recipe as YAML; OutputError if the file exists."""
        document.write(path, self.text(), force)

    def text(self) -> str:
        """The recipe as YAML; a comment over its lines names the rule that they undo."""
        from ruamel.yaml.comments import CommentedMap, CommentedSeq

        rules = CommentedSeq()
        for undoing in self.undoings:
            comment = f"undoes: {undoing.rule.text}"
            comment += "  (but for rounding)" if undoing.rounded else ""
            comment += f"  (no way back: {undoing.nothing})" if undoing.nothing else ""
            comment += f"\nits note: {undoing.rule.note}" if undoing.rule.note and undoing.lines else ""
            for number, line in enumerate(undoing.lines):
                rules.append(line)
                if not number:
                    rules.yaml_set_comment_before_after_key(len(rules) - 1, before=comment, indent=2)
        made = CommentedMap(version=1)
        name = self.recipe.name or "a recipe"
        made["description"] = f"The way back of {name}, for checkpoints with the header of {self.label}"
        for word, specs in (("expects", self.expects), ("yields", self.yields)):
            if specs:
                made[word] = CommentedMap({key: _flow(spec.shape) for key, spec in specs.items()})
        made["rules"] = rules
        gone = [f"{undoing.rule.text}: {undoing.nothing}" for undoing in self.undoings if undoing.nothing]
        if gone:
            made.yaml_set_start_comment("\n".join(["Not undone:", *gone]))
        return document.dumped(made)


def _flow(shape: tuple[int, ...]) -> Any:
    from ruamel.yaml.comments import CommentedSeq

    made = CommentedSeq(shape)
    made.fa.set_flow_style()
    return made


class _Watched(Applying):
    """Rules applied one by one, with the names before and after each, and what it did."""

    def __init__(self, source: Checkpoint, target: Target | None, allow_unused: bool, seed: int) -> None:
        super().__init__(source, target, allow_unused, seed, None)
        self.seen: list[tuple[Rule, Sequence[Pair], Specs, tuple[str, ...]]] = []

    def apply(self, rule: Rule, by: Literal["rule", "fit", "policy"] = "rule", name: str = "") -> None:
        before, steps = {key: ref.spec for key, ref in self.refs.items()}, len(self.steps)
        super().apply(rule, by, name)
        if len(self.steps) > steps:
            self.seen.append((rule, tuple(self.steps[-1].edges), before, tuple(self.refs)))


def invert(
    source: Checkpoint, recipe: Recipe, target: Target | None = None, *, allow_unused: bool = False, seed: int = 0
) -> Inversion:
    """The way back of the rules of `recipe`, as they apply to `source`; policies and targets are not rules.

    Raises PlanError when the recipe cannot be applied.
    """
    work = _Watched(source, target, allow_unused, seed)
    for rule in recipe.rules:
        work.apply(rule)
    if work.problems:
        raise PlanError(work.problems)
    undoings = tuple(_undone(work, *step) for step in reversed(work.seen))
    problems = tuple(replace(about(one.rule, one.nothing), kind="inverse") for one in undoings if one.nothing)
    label = source.origin.path if source.origin else "the checkpoint"
    made = source.replace(tensors=work.refs)
    found = Inversion(recipe, label, undoings, problems, _telling(made, source), _telling(source, made))
    if not problems:
        _check(found, made, source)
    return found


def _telling(one: Checkpoint, other: Checkpoint) -> dict[str, TensorSpec]:
    """A few keys that only one of two checkpoints has, or has in this shape."""
    alone = (key for key, ref in one.items() if key not in other or other[key].shape != ref.shape)
    return {key: one[key].spec for key, _ in zip(alone, range(_SHOWN), strict=False)}


def _check(found: Inversion, made: Checkpoint, source: Checkpoint) -> None:
    """The way back must bring back every name, dtype and shape; PlanError where names cannot be written as rules."""
    work = Applying(made, None, False, 0, None)
    try:
        for line in found.lines:
            work.apply(parse(line))
        problems = work.problems
    except RuleError as error:
        problems = list(error.problems)
    have, want = ({key: ref.spec for key, ref in refs.items()} for refs in (work.refs, source.tensors))
    if problems or have != want:
        other = next((key for key in {**have, **want} if have.get(key) != want.get(key)), "")
        why = problems[0].text if problems else f"it would not bring back {other!r} as it was"
        raise PlanError(
            [Problem(f"no way back was found: {why}", problems[0].rule if problems else None, kind="inverse")]
        )


def no_way_back(step: Step) -> Problem:
    """The problem of a policy, which has no inverse."""
    keys = ", ".join(repr((inputs or outputs)[0]) for inputs, outputs in step.edges[:_SHOWN])
    hint = (
        "give the rules that it found instead" if step.by == "fit" else "do the same by rules, where it can be undone"
    )
    return Problem(f"{step.rule} has no way back ({keys}); {hint}", kind="inverse")


# -- one step ----------------------------------------------------------------------------------


def _undone(work: _Watched, rule: Rule, edges: Sequence[Pair], before: Specs, after: tuple[str, ...]) -> Undoing:
    operation = rule.operation
    lost = [inputs for inputs, outputs in edges if not outputs]
    if lost:
        count = f"{len(lost)} tensors that it removes, such as" if len(lost) > 1 else "the tensor that it removes,"
        return Undoing(rule, nothing=f"`{operation.name}` has no inverse: {count} {lost[0][0]!r}, cannot come back")
    keeps = work.steps and any(step.made_by is rule and step.keeps for step in work.steps)
    if keeps or not all(inputs for inputs, _ in edges):
        return Undoing(rule, _drops([name for _, outputs in edges for name in outputs], after))
    if operation.exactness == "names":
        goals = {outputs[0]: inputs[0] for inputs, outputs in edges}
        return Undoing(rule, tuple(render("rename", _renaming(*pair)) for pair in condense.renames(goals, after)))
    args = rule.args if "seed" not in options_of(rule) else {**rule.args, "seed": work.seed}
    groups: dict[tuple[int, str], tuple[str, dict[str, Any], list[Edge]]] = {}
    for inputs, outputs in edges:
        specs = tuple(before[name] for name in inputs)
        inverse = operation.inverse(args, specs)
        if inverse is None:
            shapes = ", ".join(map(str, specs[:2]))
            return Undoing(rule, nothing=f"`{operation.name}` has no inverse for {inputs[0]!r} ({shapes})")
        for turn, name, given, edge in _ways(*inverse, inputs, outputs, specs):
            key = turn, f"{name} {given!r} {len(edge.there)} {len(edge.made)}"
            groups.setdefault(key, (name, given, []))[2].append(edge)
    lines: list[str] = []
    universe = {*after, *before}
    for _, (name, given, some) in sorted(groups.items(), key=lambda item: item[0][0]):
        aside, some = _set_aside(some, after)
        lines += aside
        universe.update(member for edge in some for member in edge.members)
        lines += [render(name, {**given, **condense.words(name, line)}) for line in condense.lines(some, universe)]
    return Undoing(rule, tuple(lines), operation.exactness == "rounded")


Way = tuple[int, str, dict[str, Any], Edge]
"""A turn, and the operation that is due in it."""


def _ways(
    name: str, given: dict[str, Any], inputs: Names, outputs: Names, specs: tuple[TensorSpec, ...]
) -> Iterable[Way]:
    """What undoes one edge: mostly one operation, two where numbers are not such as `{i}` can say."""
    start = given.get("start", 0)
    if name == "stack":
        marked, dim = condense.marked(outputs, start), given.get("dim", 0) % len(specs[0].shape)
        if marked is not None:
            yield 1, name, given, Edge((marked,), inputs, outputs)
            return
        yield from ((0, "unsqueeze", {"dims": (dim,)}, Edge((output,), ())) for output in outputs)
        yield 1, "concat", {"dim": dim}, Edge(outputs, inputs)
    elif name == "unstack":
        marked, dim = condense.marked(inputs, start), given.get("dim", 0) % (len(specs[0].shape) + 1)
        if marked is not None:
            yield 1, name, given, Edge(outputs, (marked,))
            return
        yield 1, "split", {"dim": dim}, Edge(outputs, inputs)
        yield from ((2, "squeeze", {"dims": (dim,)}, Edge((input_,), ())) for input_ in inputs)
    else:
        yield 1, name, given, Edge(outputs, inputs if outputs != inputs else ())


def _drops(names: list[str], universe: Iterable[str]) -> tuple[str, ...]:
    return tuple(render("drop", args) for args in condense.drops(names, set(universe)))


def _renaming(pattern: str, template: str) -> dict[str, Any]:
    return {"pattern": re.compile(pattern), "template": template}


def _set_aside(edges: list[Edge], names: tuple[str, ...]) -> tuple[list[str], list[Edge]]:
    """Rules that give rows of numbered names a beginning of their own, where other names are numbered alike; and the
    edges then."""
    goals: dict[str, str] = {}
    made = []
    for edge in edges:
        pattern = re.compile(r"\d+".join(map(re.escape, edge.there[0].split(MARK))))
        alike = {name for name in names if pattern.fullmatch(name)} if edge.members else set()
        if alike == set(edge.members):
            made.append(edge)
            continue
        moved = {name: ASIDE + name for name in edge.members}
        goals.update(moved)
        made.append(Edge((ASIDE + edge.there[0],), edge.made, tuple(moved.values())))
    return [render("rename", _renaming(*pair)) for pair in condense.renames(goals, names)] if goals else [], made

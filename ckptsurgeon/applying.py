"""Rules applied to names and specs, one after another: what a plan is made of.  Pure: no byte is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.errors import Problem
from ckptsurgeon.ops import Match, OperationError, nearest
from ckptsurgeon.plans import Edge, Edges, Step
from ckptsurgeon.rules import Rule
from ckptsurgeon.sources import Extent
from ckptsurgeon.tensor import TensorRef

Made = tuple[Match, tuple[TensorRef, ...]]
"""A match and the tensors that were made of it."""


_MOST_NAMES = 200_000
_MOST_PIECES = 1 << 16
_MOST_STEPS = 100


class Applying:
    """The names and tensors between two rules, and what the rules did so far.

    `origin` says of a name the key of the source that it was first (of one that is made of several, all of them),
    `parted` are keys of the source that were cut into several, `endless` tells that a rule would make names without
    end.  `again` gives the steps of the same plan made once more, for their edges.
    """

    def __init__(
        self,
        source: Checkpoint,
        target: Target | None,
        allow_unused: bool,
        seed: int,
        again: Callable[[], tuple[Step, ...]] | None,
    ) -> None:
        self.source, self.target, self.allow_unused, self.seed, self.again = source, target, allow_unused, seed, again
        self.refs: dict[str, TensorRef] = dict(source.tensors)
        self.origin: dict[str, str | tuple[str, ...]] = {key: key for key in source}
        self.parted: set[str] = set()
        self.steps: list[Step] = []
        self.problems: list[Problem] = []
        self.dropped: dict[str, str] = {}
        self.weights: dict[int, tuple[TensorRef, int, int]] = {}
        self.endless = False

    def apply(self, rule: Rule, by: Literal["rule", "fit", "policy"] = "rule", name: str = "") -> None:
        try:
            matches = self._matches(rule)
        except OperationError as error:
            self.problems.append(about(rule, str(error), error.argument))
            return
        wrong = [match for match in matches if match.problem is not None]
        for match in wrong:
            kind = "expected" if rule.operation.guards else "group"
            self.problems.append(replace(about(rule, match.problem or ""), key=match.inputs[0], kind=kind))
        used = [match for match in matches if match.refused is None and match.problem is None]
        if not used:
            tolerated = (self.allow_unused or rule.args.get("optional")) and not rule.operation.needed
            if not tolerated and not wrong and by == "rule" and rule.operation.when_unused:
                self.problems.append(_unused(rule, matches, list(self.refs)))
            return
        made = self._made(rule, self._disjoint(rule, used))
        if rule.operation.guards or not made:
            return
        changed = self._edges(
            (m.inputs, m.outputs) for m, outs in made if m.inputs != m.outputs or self._changed(m, outs)
        )
        if all(match.inputs == match.outputs and not match.keep for match, _ in made):  # no name changes
            self.refs.update(pair for match, outs in made for pair in zip(match.outputs, outs, strict=True))
        else:
            self._place(rule, made)
        self.steps.append(Step(name or rule.text, changed, by, rule.note, rule, used[0].keep))

    def _matches(self, rule: Rule) -> list[Match]:
        """What a rule takes and makes; OperationError when it would make names without end."""
        found, count, most = [], 0, max(_MOST_NAMES, 2 * len(self.source))
        for match in rule.operation.match(rule.args, self.refs, self.target):
            count += len(match.outputs)
            if count > most:
                self.endless = True
                raise OperationError(f"it would make more than {most} names")
            found.append(match)
        if found and found[0].keep and len(self.refs) + count > most:
            self.endless = True
            raise OperationError(f"there would be more than {most} names")
        return found

    def _weigh(self, refs: tuple[TensorRef, ...], outs: tuple[TensorRef, ...]) -> None:
        """Note of how many pieces, and by how many steps, tensors are made; OperationError for too many.

        A tensor that is joined with itself again and again would else take for ever to be looked through.
        """
        known = [self.weights.get(id(ref), (ref, 1, 0)) for ref in refs]
        pieces, steps = sum(one[1] for one in known), 1 + max((one[2] for one in known), default=0)
        if pieces > _MOST_PIECES or steps > _MOST_STEPS:
            what = f"more than {_MOST_PIECES} pieces" if pieces > _MOST_PIECES else f"more than {_MOST_STEPS} steps"
            raise OperationError(f"it would be made of {what}; write what comes before to a file first")
        for out in outs:
            if not isinstance(out.source, Extent):
                self.weights[id(out)] = out, pieces, steps

    def _disjoint(self, rule: Rule, matches: list[Match]) -> list[Match]:
        """The matches; one that takes a tensor which another one has taken is a problem."""
        if all(match.keep or len(match.inputs) < 2 for match in matches):
            return matches
        taken: dict[str, Match] = {}
        fine = []
        for match in matches:
            twice = next((name for name in match.inputs if name in taken), None)
            if twice is None:
                taken.update(dict.fromkeys(match.inputs, match))
                fine.append(match)
            else:
                both = " and ".join(repr(one.outputs[0]) for one in (taken[twice], match))
                self.problems.append(
                    replace(about(rule, f"{twice!r} would be a part of {both}"), key=twice, kind="group")
                )
        return fine

    def _edges(self, edges: Iterable[Edge]) -> Edges:
        number, again = len(self.steps), self.again
        return Edges(edges, None if again is None else lambda: again()[number].edges)

    def _changed(self, match: Match, outs: tuple[TensorRef, ...]) -> bool:
        return any(self.refs.get(name) is not ref for name, ref in zip(match.outputs, outs, strict=True))

    def _made(self, rule: Rule, matches: list[Match]) -> list[Made]:
        operation, given, here = rule.operation, rule.args, self.refs
        if operation.as_is:
            return [(match, tuple([here[name] for name in match.inputs]) if match.outputs else ()) for match in matches]
        made: list[Made] = []
        if "seed" in options_of(rule) and "seed" not in given:
            given = {**given, "seed": self.seed}
        for match in matches:
            args = {**given, **match.args} if match.args else given
            refs = tuple(self.refs[name] for name in match.inputs)
            if not match.outputs:
                made.append((match, ()))
                continue
            key = match.inputs[0] if match.inputs else match.outputs[0]
            try:
                specs = operation.shape(args, tuple(ref.spec for ref in refs))
                outs = operation.build(args, refs, specs, match.outputs)
                self._weigh(refs, outs)
            except OperationError as error:
                problem = about(rule, f"{_joint(match.inputs) or repr(key)}: {error}", error.argument)
                self.problems.append(replace(problem, key=key, kind="shape"))
                continue
            fixed = None if outs is refs else next((ref for ref in refs if ref.quantizer or ref.absent), None)
            if fixed is not None and any(out not in refs for out in outs):
                what = fixed.absent or f"quantised ({fixed.dtype})"
                text = f"{key!r} is {what}; such a tensor can be renamed or dropped, but not changed"
                self.problems.append(replace(about(rule, text), key=key))
                continue
            made.append((match, outs))
        return made

    def _place(self, rule: Rule, made: Sequence[Made]) -> None:
        """Put the outputs where the inputs were, the new ones behind; a doubled name is a problem that names both
        makers."""
        at: dict[str | None, list[Made]] = {}
        for one in made:
            at.setdefault(one[0].inputs[0] if one[0].inputs else None, []).append(one)
        gone = {name for match, _ in made if not match.keep for name in match.inputs}
        placing = _Placing(rule, self)
        placed = placing.refs
        for key, ref in self.refs.items():
            if key not in gone:
                if key in placed or not key:
                    placing.put(key, ref, key)
                else:  # nearly all
                    placed[key] = ref
            if key in at:
                for one in at[key]:
                    placing.all(one, key)
        for one in at.get(None, ()):
            placing.all(one, f"rule `{rule.text}`")
        self.refs = placed
        for name in gone:
            self.origin.pop(name, None)
        self.origin.update(placing.origin)

    def origins(self, name: str) -> tuple[str, ...]:
        """The keys of the source that a name is made of."""
        found = self.origin.get(name, ())
        return (found,) if isinstance(found, str) else found

    def drop(self, name: str, why: str) -> None:
        """Note of the keys of the source that a name is made of that it goes."""
        for key in self.origins(name):
            self.dropped[key] = f"{why}, its part {name!r}" if key in self.parted else why


class _Placing:
    """Names that are put in their new order."""

    def __init__(self, rule: Rule, work: Applying) -> None:
        self.rule, self.work = rule, work
        self.refs: dict[str, TensorRef] = {}
        self.origin: dict[str, str | tuple[str, ...]] = {}
        self.makers: dict[str, str] = {}

    def all(self, made: Made, source: str) -> None:
        match, refs = made
        if len(match.outputs) > 1:
            self.work.parted.update(self.work.origins(source))
        origin: str | tuple[str, ...] = self.work.origin.get(source, ())
        if len(match.inputs) > 1:
            origin = tuple(dict.fromkeys(key for name in match.inputs for key in self.work.origins(name)))
        if not match.outputs:
            self.work.drop(source, f"rule `{self.rule.text}`")
        for name, ref in zip(match.outputs, refs, strict=True):
            self.put(name, ref, source, origin)

    def put(self, name: str, ref: TensorRef, source: str, origin: str | tuple[str, ...] | None = None) -> None:
        """A tensor that was called `source` before the rule, or is made of it."""
        if name not in self.refs and name:
            self.refs[name] = ref
            self.origin[name] = self.work.origin.get(source, ()) if origin is None else origin
            self.makers[name] = source
            return
        if name:
            first, second = (self._told(maker) for maker in (self.makers.get(name, name), source))
            text = f"two tensors would be named {name!r}: {first} and {second}"
        else:
            text = f"{source!r} would have the empty name"
        problem = replace(about(self.rule, text), key=name or source, kind="collision")
        self.work.problems.append(problem)

    def _told(self, name: str) -> str:
        """A name as it was before the rule, and what it is made of where it was called otherwise at first."""
        origins = self.work.origins(name)
        return repr(name) if origins in ((), (name,)) else f"{name!r} (made of {_joint(origins) or repr(origins[0])})"


def options_of(rule: Rule) -> set[str]:
    """The names of the options that a rule may have."""
    return {option.name for option in rule.operation.options}


def _joint(names: tuple[str, ...]) -> str:
    """The names that an operation takes together; "" for one alone."""
    if len(names) < 2:
        return ""
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def about(rule: Rule, text: str, argument: str | None = None) -> Problem:
    """A problem of a rule, with the span of the argument that is at fault."""
    span = rule.spans.get(argument) if argument else None
    return Problem(f"{rule.place}: {text}" if rule.place else text, rule.text, span, kind="rule")


def _unused(rule: Rule, matches: list[Match], keys: list[str]) -> Problem:
    argument = next(name for name in ("pattern", "patterns", "prefix") if name in rule.spans)
    if matches:
        text = f"matches {len(matches)} keys, but makes no name of the target: {matches[0].refused}"
        return replace(about(rule, text, "template"), kind="unused")
    found = rule.args.get("prefix") or rule.args.get("patterns", (rule.args.get("pattern"),))[0]
    wanted = found if isinstance(found, str) else str(getattr(found, "pattern", ""))
    text = f"{rule.operation.when_unused}; {nearest(wanted, keys)}"
    return replace(about(rule, text, argument), kind="unused")

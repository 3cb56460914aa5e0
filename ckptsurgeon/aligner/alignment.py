"""`Alignment`, what `align` finds: a recipe, what goes where and why, what stays open, and what is left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ckptsurgeon import planner
from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.errors import Problem
from ckptsurgeon.plans import STRICT, Plan, Policies
from ckptsurgeon.rules import Recipe, condense, parse, render
from ckptsurgeon.tensor import only_ones_differ

if TYPE_CHECKING:
    from ckptsurgeon.aligner.hints import Hint
    from ckptsurgeon.aligner.openings import Opening

Grade = Literal["certain", "order", "tried", "open"]
LEAST = 0.5
"""The share of the target's parameters below which two are different architectures."""


@dataclass(frozen=True)
class Match:
    """Tensors of the source that become tensors of the target, in every block alike.

    `sources` and `targets` are the names of modules, with `{}` for the numbers of blocks; `count` is how many tensors
    of the target come of it, `numel` their elements.  `how` says what is done besides a rename.  `grade` is `certain`
    where no other assignment explains names as well, `order` where only the order of definition tells, `tried` where
    only an experiment does (`error` is the relative error of its outputs), `open` where nothing does; `margin` is how
    many points the next best assignment has less, and `why` the evidence.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    count: int
    numel: int
    how: str
    grade: Grade
    margin: float
    why: tuple[str, ...]
    group: str
    error: float | None = None


@dataclass(frozen=True)
class Edge:
    """Keys of the source and the keys of the target that are made of them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    grade: Grade


@dataclass(frozen=True)
class Question:
    """Something that is not told by what there is: what it is about, and lines that would answer it, of which one is to
    be given (`--hint …` or `--rule …`)."""

    text: str
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.answers:
            return self.text
        return f"{self.text}; give one of: {', '.join(self.answers[:4])}"


@dataclass(frozen=True)
class Leftover:
    """A key that has no partner, and why: `other size`, `computed`, `new`, `block`, `open`, `unused`, `again`."""

    key: str
    shape: tuple[int, ...]
    kind: str
    text: str


@dataclass(frozen=True, eq=False)
class Alignment:
    """How a checkpoint becomes what a target wants.

    `recipe` has the rules for what was matched; `matches` say why, `edges` key by key; `questions` are open; `missing`
    and `unused` are the keys of the target and of the source that are left; `agreement` is the share of the elements
    of the target's parameters that come from the source.
    """

    source: Checkpoint
    target: Target
    recipe: Recipe
    matches: tuple[Match, ...]
    edges: tuple[Edge, ...]
    questions: tuple[Question, ...]
    missing: tuple[Leftover, ...]
    unused: tuple[Leftover, ...]
    agreement: float
    possible: float
    """The share with what is open."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What each rule is for, by its text."""
    given: int = 0
    """How many rules of the recipe were given, and not found."""

    before: Checkpoint | None = None
    """The checkpoint before the rules that were given, where there were any; they stand first in the recipe."""

    openings: tuple[Opening, ...] = ()
    """What is open and could be decided by an experiment (`cs.try_alignment`)."""
    hints: tuple[Hint, ...] = ()
    tried: str = ""
    """What an experiment came to, where there was one."""

    @property
    def certain(self) -> bool:
        """Whether every key of the target is explained, every key of the source used, and nothing is open."""
        return not self.refusals()

    def refusals(self, fit: bool = False, *, missing: bool = False, unexpected: bool = False) -> tuple[Problem, ...]:
        """Why it is not applied by itself.

        With `fit` policies settle what is not there (or only what is `missing` in the source, only what is
        `unexpected` in the target); they never settle what is open, a block without a source, or a target of whose
        parameters less than half come from the source.
        """
        problems = [Problem(str(question), kind="ambiguous") for question in self.questions]
        if self.possible < LEAST or not self.target.entries:
            share = f"{100 * self.possible:.0f} % of the parameters of {self.target.label}"
            text = f"these are different architectures: no more than {share} could come from the source"
            problems.append(Problem(text, kind="different"))
        for left in self.missing:
            settled = (fit or missing) and left.kind not in ("block", "open")
            if not settled:
                way = "; --fit initialises it" if left.kind not in ("block", "open") else ""
                text = f"{left.key!r} {list(left.shape)} of {self.target.label} has no source: {left.text}{way}"
                problems.append(Problem(text, key=left.key, kind="missing"))
        for left in () if fit or unexpected else self.unused:
            if left.kind != "again":
                text = f"{left.key!r} {list(left.shape)} is not used: {left.text}; --fit drops it"
                problems.append(Problem(text, key=left.key, kind="unexpected"))
        return tuple(problems)

    def _would_pass(self, left: Leftover) -> bool:
        """Whether a key that has no place would be taken for one of the target by its name alone."""
        entry = self.target.entries.get(left.key)
        return entry is not None and only_ones_differ(left.shape, entry.spec.shape)

    def plan(self, fit: bool = False, *, seed: int = 0) -> Plan:
        """What the recipe comes to; its problems are the reasons not to apply it.

        The header-only plan of `cs.plan(…, auto=True)`, for what was aligned already.
        """
        policies = Policies("drop", "drop", "init") if fit else STRICT
        return self.planned(policies, seed=seed)

    def planned(self, policies: Policies, **how: Any) -> Plan:
        """The plan of the recipe under policies, with the refusals among its problems."""
        unexpected, _, missing = policies.settled()
        refused = self.refusals(policies.fit, missing=missing != "error", unexpected=unexpected != "error")
        drops = [left.key for left in self.unused if left.kind == "again" or self._would_pass(left)]
        rules = tuple(parse(render("drop", args)) for args in condense.drops(drops, set(self.source)))
        recipe = replace(
            self.recipe, rules=(*self.recipe.rules[: self.given], *rules, *self.recipe.rules[self.given :])
        )
        if policies.fit:  # wrappers are off, and every size-1 reshape is a rule by now
            policies = Policies(
                policies.unexpected or "drop", policies.mismatched or "drop", policies.missing or "init"
            )
        made = planner.plan(self.before or self.source, recipe, self.target, policies, **how)
        return replace(made, problems=refused) if refused else made

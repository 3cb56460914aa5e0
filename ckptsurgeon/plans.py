"""`Plan`, what a surgery comes to, and `Policies`, what settles the differences to a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.errors import PlanError, Problem, UsageError
from ckptsurgeon.rules import Rule

Unexpected = Literal["error", "drop", "keep"]
Mismatched = Literal["error", "drop", "reshape", "overlap"]
Missing = Literal["error", "init", "skip"]


@dataclass(frozen=True)
class Policies:
    """What settles the differences between the result of the rules and the target.

    None stands for `error`, or with `fit` for what `--fit` stands for: unexpected keys dropped,
    size-1 reshapes done, every other mismatch dropped, missing keys initialised, and the wrappers
    around names taken off.  `unwrap` stands for the last of these alone.
    """

    unexpected: Unexpected | None = None
    mismatched: Mismatched | None = None
    missing: Missing | None = None
    fit: bool = False
    unwrap: bool = False

    def __post_init__(self) -> None:
        for name, known in (("unexpected", Unexpected), ("mismatched", Mismatched), ("missing", Missing)):
            word = getattr(self, name)
            if word is not None and word not in get_args(known):
                raise UsageError(f"{name} is one of {', '.join(get_args(known))}, not {word!r}")

    def settled(self) -> tuple[Unexpected, Mismatched, Missing]:
        """The three policies with their defaults filled in."""
        usual: tuple[Unexpected, Mismatched, Missing] = (
            ("drop", "reshape", "init") if self.fit else ("error", "error", "error")
        )
        return self.unexpected or usual[0], self.mismatched or usual[1], self.missing or usual[2]

    @property
    def any(self) -> bool:
        """Whether any of them was asked for."""
        return self.fit or self.unwrap or bool(self.unexpected or self.mismatched or self.missing)


STRICT = Policies()
"""No policy: every difference to the target is a problem."""


Names = tuple[str, ...]


Edge = tuple[Names, Names]


class Edges(Sequence[Edge]):
    """Pairs of the names that were taken and the names that were made of them.

    A plan keeps only how many there are, and the first: the names of fifty rules over a hundred
    thousand keys would take half a gigabyte, and few ask for them.  `again` makes them when one does.
    """

    def __init__(self, edges: Iterable[Edge], again: Callable[[], Sequence[Edge]] | None = None) -> None:
        self._again = again
        self._edges: Sequence[Edge] | None = tuple(edges) if again is None else None
        if again is None:
            assert self._edges is not None
            self.first, self._count = next(iter(self._edges), None), len(self._edges)
        else:
            left = iter(edges)
            self.first = next(left, None)
            self._count = (self.first is not None) + sum(1 for _ in left)

    @property
    def _all(self) -> Sequence[Edge]:
        if self._edges is None:
            assert self._again is not None
            self._edges = self._again()
        return self._edges

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Edge]:
        return iter(self._all)

    def __getitem__(self, index: Any) -> Any:
        return self._all[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Edges({list(self)})"


@dataclass(frozen=True)
class Step:
    """What one rule or policy did: the names it took and the names it made from them.

    `made_by` is the rule as it was read, None for a policy; `keeps` tells that what it took stays.
    """

    rule: str
    edges: Edges
    by: Literal["rule", "fit", "policy"] = "rule"
    note: str = ""
    made_by: Rule | None = field(default=None, compare=False)
    keeps: bool = False


@dataclass(frozen=True, slots=True)
class Lineage:
    """How a tensor of the result came about: the keys of the source that it is made of, and the rules and policies
    that changed them, in order."""

    inputs: Names = ()
    rules: Names = ()


@dataclass(frozen=True)
class Followed:
    """What became of tensors beside the state dict that are about its parameters, when it was changed.

    `place` is where they are in the file, dotted; `kind` tells an optimizer's state from a copy of the weights (an
    average).  `exact` names the parameters of which all is kept, `reset` those that begin anew, and why, `fresh` those
    that are new; `notes` say more.  `left` is why it was left out as a whole, or with `kept` left as it was.
    """

    place: str
    kind: Literal["optimizer", "copy"]
    exact: Names = ()
    reset: Mapping[str, str] = field(default_factory=dict)
    fresh: Names = ()
    notes: tuple[str, ...] = ()
    left: str = ""
    kept: bool = False

    @property
    def label(self) -> str:
        """What it is, for a sentence."""
        what = "the optimizer state" if self.kind == "optimizer" else "the copy of the weights"
        return what if self.place == "." else f"{what} at {self.place!r}"


@dataclass(frozen=True)
class Plan:
    """The result, which is an ordinary Checkpoint, and how it came about.

    `dropped` maps a key of the source, `missing` and `mismatched` a key of the target to what was
    done about it and why, `overlapped` a key of which only a part was copied to how many elements
    that is; `problems` are all reasons not to carry the plan out, `warnings` are none.  `followed` is what became of
    the extras that go with the tensors, `order` the model whose parameters an optimizer counts, `beside` the names of
    other checkpoints that gave tensors; `on` plans the same surgery for another checkpoint.
    """

    source: Checkpoint
    target: Target | None
    result: Checkpoint
    steps: tuple[Step, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    mismatched: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    overlapped: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    followed: tuple[Followed, ...] = ()
    order: Target | None = None
    beside: Names = ()
    on: Callable[[Checkpoint], Plan] | None = field(default=None, compare=False, repr=False)

    @property
    def ok(self) -> bool:
        """Whether the plan may be carried out."""
        return not self.problems

    def loaded(self) -> dict[str, int]:
        """Key of the target → how many of its elements come from the checkpoint; {} without a target."""
        fresh = set(self.initialised)
        entries = self.target.entries if self.target is not None else {}
        return {
            key: self.overlapped.get(key, entry.spec.numel)
            for key, entry in entries.items()
            if key in self.result.tensors and key not in fresh
        }

    @property
    def passed(self) -> tuple[str, ...]:
        """The keys of the source that no rule and no policy touched."""
        made = self.result.tensors
        return tuple(key for key, ref in self.source.items() if made.get(key) is ref)

    def lineage(self) -> dict[str, Lineage]:
        """Key of the result → how it came about; what passed through is made of itself by no rule."""
        made = {key: Lineage((key,)) for key in self.source}
        for step in self.steps:
            taken: list[str] = []
            new: dict[str, Lineage] = {}
            for inputs, outputs in step.edges:
                known = [made[name] for name in inputs if name in made]
                names = tuple(dict.fromkeys(name for one in known for name in one.inputs))
                rules = tuple(dict.fromkeys(rule for one in known for rule in one.rules))
                new.update(dict.fromkeys(outputs, Lineage(names, (*rules, step.rule))))
                taken += () if step.keeps else inputs
            for name in taken:
                made.pop(name, None)
            made.update(new)
        return {key: made.get(key, Lineage()) for key in self.result}

    def check(self) -> Plan:
        """This plan; PlanError with every problem when there are any."""
        if self.problems:
            raise PlanError(self.problems)
        return self

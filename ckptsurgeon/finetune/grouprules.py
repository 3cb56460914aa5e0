"""The rules of `param_groups`: which parameters each is about, what it sets, and that no two set the same."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.errors import PlanError, Problem, UsageError, quoted
from ckptsurgeon.finetune.selecting import Slot, by_pattern, by_type

TYPE = "type="
_KEPT = ("params", "param_names")
_NAMES_SHOWN = 3

Wanted = str | re.Pattern[str] | type
Value = float | Mapping[str, Any]
Rules = Mapping[Wanted, Value] | Sequence[tuple[Wanted, Value]]


@dataclass(frozen=True)
class GroupRule:
    """A rule: its label in tables and errors, the indexes of its parameters, the learning rate (`lr`, or a multiple
    of the base's), other options, and whether it only sets what no other rule does."""

    label: str
    indexes: frozenset[int]
    lr: float | None
    multiple: float | None
    options: Mapping[str, Any]
    fallback: bool = False

    @property
    def sets(self) -> dict[str, Any]:
        """What it sets, by name; the learning rate is one thing, however it is given."""
        rate = {} if self.lr is None and self.multiple is None else {"lr": (self.lr, self.multiple)}
        return {**rate, **self.options}


def read(rules: Rules | None, found: Sequence[Slot]) -> list[GroupRule]:
    """The rules as they were given, each held against the model. UsageError with all that cannot be read."""
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules or ())
    made: list[GroupRule] = []
    problems: list[str] = []
    for pair in pairs:
        try:
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise UsageError(f"a rule is a pair of a pattern and a multiple or options, not {quoted(pair)}")
            made.append(_rule(*pair, found))
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return made


def _rule(wanted: Wanted, value: Value, found: Sequence[Slot]) -> GroupRule:
    if isinstance(wanted, type):
        label, some = wanted.__name__, by_type(wanted, found)
    elif isinstance(wanted, str) and wanted.startswith(TYPE):
        label, some = wanted, by_type(wanted.removeprefix(TYPE), found)
    else:
        label, some = wanted if isinstance(wanted, str) else wanted.pattern, by_pattern(wanted, found)
    indexes = frozenset(slot.index for slot in some)
    if not isinstance(value, Mapping):
        return GroupRule(label, indexes, None, number(f"the multiple of {label!r}", value), {})
    options = dict(value)
    kept = [name for name in _KEPT if name in options]
    if kept or {"lr", "lr_mult"} <= set(options) or not options:
        why = f"{kept[0]} is not for a rule to set" if kept else "give lr or lr_mult" if options else "it sets nothing"
        raise UsageError(f"the rule {label!r}: {why}")
    lr, multiple = options.pop("lr", None), options.pop("lr_mult", None)
    fallback = options.pop("fallback", False)
    if "weight_decay" in options:
        number(f"the weight_decay of {label!r}", options["weight_decay"])
    return GroupRule(
        label,
        indexes,
        None if lr is None else number(f"the lr of {label!r}", lr),
        None if multiple is None else number(f"the lr_mult of {label!r}", multiple),
        options,
        bool(fallback),
    )


def number(what: str, value: object) -> float:
    """A finite number that is not negative; UsageError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{what} is a number of at least 0, not {quoted(value)}")
    return value


def check_overlaps(rules: Sequence[GroupRule], names: Sequence[str]) -> None:
    """PlanError with every pair of rules that set the same thing of the same parameters."""
    firm = [rule for rule in rules if not rule.fallback]
    problems = []
    for place, later in enumerate(firm):
        for earlier in firm[:place]:
            both = sorted(earlier.indexes & later.indexes)
            same = [option for option in later.sets if option in earlier.sets and option != "name"]
            if both and same:
                problems.append(
                    Problem(
                        f"{_some(names[index] for index in both)} would be in two groups: `{earlier.label}` and "
                        f"`{later.label}` both set {' and '.join(same)}; make one of the patterns narrower, or give "
                        'the weaker rule {…, "fallback": True}',
                        key=names[both[0]],
                        kind="overlap",
                    )
                )
    if problems:
        raise PlanError(problems)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    words = ", ".join(map(repr, listed[:_NAMES_SHOWN]))
    return words + (f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else "")


def settled(index: int, rules: Sequence[GroupRule]) -> tuple[list[GroupRule], dict[str, Any]]:
    """The rules that a parameter is under, and what they set together; a fallback fills in what no other sets."""
    made: dict[str, Any] = {}
    used = []
    for rule in sorted(rules, key=lambda rule: rule.fallback):
        new = {option: value for option, value in rule.sets.items() if option not in made}
        if index in rule.indexes and new:
            used.append(rule)
            made |= new
    return used, made

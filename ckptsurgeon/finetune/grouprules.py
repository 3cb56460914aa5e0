"""The rules of `param_groups`: which parameters each is about, what it sets, and that no two set the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.errors import PlanError, Problem, UsageError, quoted
from ckptsurgeon.finetune._checked import rate
from ckptsurgeon.finetune.selecting import Slot, by_pattern, by_type

TYPE = "type="
_KEPT = ("params", "param_names")
_KNOWN = ("lr", "lr_mult", "weight_decay", "name", "fallback")
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
    if not (rules is None or isinstance(rules, Iterable)) or isinstance(rules, str):
        raise UsageError(f"rules are a mapping of patterns to multiples or options, or such pairs, not {quoted(rules)}")
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
    elif isinstance(wanted, str | re.Pattern):
        label, some = wanted if isinstance(wanted, str) else str(wanted.pattern), by_pattern(wanted, found)
    else:
        raise UsageError(f"a rule is for a regex, a module class or 'type=NAME', not {quoted(wanted)}")
    indexes = frozenset(slot.index for slot in some)
    if not isinstance(value, Mapping):
        return GroupRule(label, indexes, None, rate(f"the multiple of {label!r}", value), {})
    options = {name: one for name, one in value.items() if name not in ("lr", "lr_mult", "fallback")}
    _check_options(label, value)
    if "weight_decay" in options:
        options["weight_decay"] = rate(f"the weight_decay of {label!r}", options["weight_decay"])
    lr, multiple = value.get("lr"), value.get("lr_mult")
    made = GroupRule(
        label,
        indexes,
        None if lr is None else rate(f"the lr of {label!r}", lr),
        None if multiple is None else rate(f"the lr_mult of {label!r}", multiple),
        options,
        value.get("fallback", False),
    )
    if not made.sets:
        raise UsageError(f"the rule {label!r}: it sets nothing")
    return made


def _check_options(label: str, options: Mapping[Any, Any]) -> None:
    """UsageError for options that a rule may not set, or that are nearly, but not quite, one that it knows."""
    why = None
    if kept := [name for name in _KEPT if name in options]:
        why = f"{kept[0]} is not for a rule to set"
    elif {"lr", "lr_mult"} <= set(options):
        why = "give lr or lr_mult"
    elif not isinstance(options.get("name", ""), str):
        why = f"the name of a group is a text, not {quoted(options['name'])}"
    elif not isinstance(options.get("fallback", False), bool):
        why = f"fallback is True or False, not {quoted(options['fallback'])}"
    else:
        for name in options:
            if not isinstance(name, str):
                why = f"an option has a name, not {quoted(name)}"
            elif name not in _KNOWN and (meant := _meant(name)) is not None:
                why = f"{quoted(name)} is no option that it knows; {meant!r} is"
    if why is not None:
        raise UsageError(f"the rule {label!r}: {why}")


def _meant(name: str) -> str | None:
    """The option that another one's name is a slip of; None for one of an optimizer's own, such as `eps`."""
    from difflib import get_close_matches

    if name.lower().startswith("lr_mult"):
        return "lr_mult"
    return next(iter(get_close_matches(name.lower(), _KNOWN, 1, 0.75)), None)


def check_overlaps(rules: Sequence[GroupRule], names: Sequence[str]) -> None:
    """PlanError with every pair of rules that set the same thing of the same parameters."""
    firm = [rule for rule in rules if not rule.fallback]
    problems = []
    for place, later in enumerate(firm):
        for earlier in firm[:place]:
            both = sorted(earlier.indexes & later.indexes)
            same = [option for option in later.sets if option in earlier.sets]
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

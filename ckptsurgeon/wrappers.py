"""Prefixes that training code puts around a model's keys, found by what the target is called.

`nn.DataParallel`, `torch.compile`, FSDP, checkpoint wrappers, Lightning modules and the like nest
in any order.  Every candidate is scored by how many names of the target it reaches; nothing is
taken off that does not bring more of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckptsurgeon.rules import Rule, parse, render

INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module")
"""Wrappers that may stand anywhere in a key."""
LEADING = frozenset(
    (*INNER, "model", "net", "network", "encoder", "backbone", "base_model", "student", "teacher", "ema", "ema_model")
)
"""Wrappers that stand before a key."""
_DEEPEST = 6


@dataclass(frozen=True)
class Unwrapping:
    """Rules that take wrappers off (or put them on), and how many names of the target they reach,
    against `before` without them."""

    rules: tuple[Rule, ...]
    hits: int
    before: int


def find(keys: Sequence[str], names: Collection[str]) -> Unwrapping:
    """The shortest rules that bring the most `keys` to `names` of the target; none if none helps."""
    wanted = frozenset(names)
    before = sum(key in wanted for key in keys)
    best = Unwrapping((), before, before)
    for lines in _candidates(keys, wanted):
        rules = tuple(parse(line) for line in lines)
        changed = _changed(keys, rules)
        hits = sum(key in wanted for key in changed)
        if hits > best.hits and len(set(changed)) == len(changed):
            best = Unwrapping(rules, hits, before)
    return best


def _changed(keys: Sequence[str], rules: tuple[Rule, ...]) -> list[str]:
    for rule in rules:
        renamed = {match.inputs[0]: match.outputs[0] for match in rule.operation.match(rule.args, keys, None)}
        keys = [renamed.get(key, key) for key in keys]
    return list(keys)


def _candidates(keys: Sequence[str], wanted: frozenset[str]) -> Iterator[list[str]]:
    """Lists of rule lines, the simplest first."""
    additions = ["", *_chains(wanted)]
    for cleaning in _cleanings(keys, wanted):
        cleaned = _changed(keys, tuple(parse(line) for line in cleaning))
        for strip in ["", *_chains(cleaned)]:
            for addition in additions:
                prefixes = (("strip", strip), ("prefix", addition))
                lines = [*cleaning, *(render(name, {"prefix": prefix}) for name, prefix in prefixes if prefix)]
                if lines:
                    yield lines


def _cleanings(keys: Sequence[str], wanted: frozenset[str]) -> Iterator[list[str]]:
    yield []
    in_target = {segment for name in wanted for segment in name.split(".")}
    inner = [segment for segment in INNER if segment not in in_target]
    present = [segment for segment in inner if any(segment in key.split(".") for key in keys)]
    if present:
        words = "|".join(re.escape(segment) for segment in present)
        yield [rf"(?<![^.])(?:{words})\. => ''"]


def _chains(keys: Iterable[str]) -> list[str]:
    """The runs of leading segments that are known wrappers or stand before every key, shortest first."""
    split = [key.split(".") for key in keys]
    common = _common(split)
    found: set[tuple[str, ...]] = set()
    for segments in split:
        depth = 0
        while depth < min(len(segments) - 1, _DEEPEST) and (segments[depth] in LEADING or depth < len(common)):
            if not re.fullmatch(r"[\w-]+", segments[depth]):
                break
            depth += 1
            found.add(tuple(segments[:depth]))
    return [".".join(chain) + "." for chain in sorted(found, key=lambda chain: (len(chain), chain))]


def _common(split: list[list[str]]) -> list[str]:
    if not split:
        return []
    common = split[0][:-1]
    for segments in split[1:]:
        length = 0
        while length < min(len(common), len(segments) - 1) and common[length] == segments[length]:
            length += 1
        common = common[:length]
    return common

"""Prefixes that training code puts around a model's keys, found by what the target is called.

`nn.DataParallel`, `torch.compile`, FSDP, checkpoint wrappers, Lightning modules and the like nest
in any order.  Every candidate is scored by how many tensors of the target it reaches, by name and
shape; nothing is taken off that does not bring more of them, and nothing that fits is renamed away.
Where two of them do equally well with other tensors (a student and a teacher, in the checkpoint or in the model), none
is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckptsurgeon.rules import Rule, parse, render
from ckptsurgeon.tensor import only_ones_differ

INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module")
"""Wrappers that may stand anywhere in a key."""
LEADING = frozenset(
    (*INNER, "model", "net", "network", "encoder", "backbone", "base_model", "student", "teacher", "ema", "ema_model")
)
"""Wrappers that stand before a key."""
_DEEPEST = 6
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Unwrapping:
    """Rules that take wrappers off (or put them on), and how many tensors of the target they reach
    by name, against `before` without them.  `alternatives` are rules that would do as well with
    other tensors; then `rules` is empty."""

    rules: tuple[Rule, ...]
    hits: int
    before: int
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """Wrappers to take out of the middle, a prefix to strip, a prefix to add, each may be empty;
    `only` adds where that makes a name of the target."""

    inner: tuple[str, ...]
    strip: str
    add: str
    only: bool = False

    def names(self, keys: Iterable[str], wanted: Shapes) -> list[str]:
        """What the keys become."""
        made = list(keys)
        if self.inner:
            pattern = re.compile(_inner_pattern(self.inner))
            made = [pattern.sub("", key) for key in made]
        if self.strip:
            cut = len(self.strip)
            made = [key[cut:] if key.startswith(self.strip) and len(key) > cut else key for key in made]
        if self.add and self.only:
            made = [self.add + key if self.add + key in wanted else key for key in made]
        elif self.add:
            made = [self.add + key for key in made]
        return made

    def lines(self) -> list[str]:
        """The rules that do it."""
        lines = [f"{_inner_pattern(self.inner)} => ''"] if self.inner else []
        if self.strip:
            lines.append(render("strip", {"prefix": self.strip}))
        if self.add:
            lines.append(f"^ => {self.add} when=target" if self.only else render("prefix", {"prefix": self.add}))
        return lines


def _inner_pattern(segments: tuple[str, ...]) -> str:
    return rf"(?<![^.])(?:{'|'.join(map(re.escape, segments))})\."


def find(keys: Shapes, wanted: Shapes) -> Unwrapping:
    """The shortest rules that bring the most of `keys` to tensors of the target; none if none helps."""
    names = list(keys)
    start = _score(names, names, keys, wanted)
    best, chosen = start, None
    if start.count == (len(wanted), len(wanted)):
        return Unwrapping((), len(wanted), len(wanted))
    ways: dict[frozenset[tuple[str, str]], _Candidate] = {}
    for candidate in _candidates(names, wanted):
        score = _score(names, candidate.names(names, wanted), keys, wanted)
        if not start.hits <= score.hits:
            continue
        if score.count > best.count:
            best, chosen, ways = score, candidate, {score.hits: candidate}
        elif chosen is not None and score.count == best.count:
            ways.setdefault(score.hits, candidate)
    if chosen is None:
        return Unwrapping((), start.count[1], start.count[1])
    if len(ways) > 1:
        lines = (" and ".join(f"`{line}`" for line in candidate.lines()) for candidate in ways.values())
        return Unwrapping((), best.count[1], start.count[1], tuple(lines))
    return Unwrapping(tuple(parse(line) for line in chosen.lines()), best.count[1], start.count[1])


@dataclass(frozen=True)
class _Score:
    """How many tensors of the target are reached, by name and shape and by name alone, each counted
    once, and the keys that reach them by both, with what each is called then."""

    count: tuple[int, int]
    hits: frozenset[tuple[str, str]]


def _score(keys: list[str], names: list[str], shapes: Shapes, wanted: Shapes) -> _Score:
    named, fitting, hits = set[str](), set[str](), list[tuple[str, str]]()
    for key, name in zip(keys, names, strict=True):
        if name in wanted:
            named.add(name)
            if shapes[key] == wanted[name] or only_ones_differ(shapes[key], wanted[name]):
                fitting.add(name)
                hits.append((key, name))
    return _Score((len(fitting), len(named)), frozenset(hits))


def _candidates(keys: list[str], wanted: Shapes) -> Iterator[_Candidate]:
    """The simplest first."""
    in_target = {segment for name in wanted for segment in name.split(".")}
    present = {segment for key in keys for segment in key.split(".")[:-1]}
    inner = tuple(segment for segment in INNER if segment in present and segment not in in_target)
    additions = ["", *_chains(wanted)]
    for cleaning in ((), inner) if inner else ((),):
        cleaned = _Candidate(cleaning, "", "").names(keys, wanted)
        for strip in ["", *_chains(cleaned)]:
            for add in additions:
                if cleaning or strip or add:
                    yield _Candidate(cleaning, strip, add)
                    if add:
                        yield _Candidate(cleaning, strip, add, only=True)


def _chains(keys: Iterable[str]) -> list[str]:
    """The runs of leading segments that are known wrappers or stand before every key, shortest first."""
    keys = list(keys)
    common = _common(keys)
    found: set[tuple[str, ...]] = set()
    for key in keys:
        segments = key.split(".", _DEEPEST + 1)
        depth = 0
        while depth < min(len(segments) - 1, _DEEPEST) and (segments[depth] in LEADING or depth < len(common)):
            if not re.fullmatch(r"[\w-]+", segments[depth]):
                break
            depth += 1
            found.add(tuple(segments[:depth]))
    return [".".join(chain) + "." for chain in sorted(found, key=lambda chain: (len(chain), chain))]


def _common(keys: list[str]) -> list[str]:
    """The segments that stand before every key."""
    common = keys[0].split(".")[:-1] if keys else []
    for key in keys:
        if not common:
            break
        segments = key.split(".")
        length = 0
        while length < min(len(common), len(segments) - 1) and common[length] == segments[length]:
            length += 1
        common = common[:length]
    return common

"""Hints: `reduce=conv1` says that what is called `reduce` in the source is called `conv1` in the target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptsurgeon.aligner.matching import Allowed
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.units import Side
from ckptsurgeon.errors import UsageError


@dataclass(frozen=True)
class Hint:
    """Segments of keys of the source, and those of keys of the target that they stand for."""

    source: str
    target: str


def parsed(texts: Iterable[str | Hint | tuple[str, str]]) -> tuple[Hint, ...]:
    """Hints as they are given; UsageError for one that is none."""
    made = []
    for text in texts:
        if isinstance(text, Hint):
            made.append(text)
            continue
        source, equals, target = text.partition("=") if isinstance(text, str) else (text[0], "=", text[1])
        source, target = source.strip(" ."), target.strip(" .")
        if not equals or not source or not target:
            raise UsageError(
                f"a hint is a part of the source's keys, =, and the target's for it, as in 'reduce=conv1', not {text!r}"
            )
        made.append(Hint(source, target))
    return tuple(made)


def check(hints: Sequence[Hint], source: Side, target: Side) -> None:
    """UsageError for a hint that is about no key."""
    for hint in hints:
        for side, text in ((source, hint.source), (target, hint.target)):
            if not any(_has(leaf.key, text) for leaf in side.leaves):
                raise UsageError(f"--hint {hint.source}={hint.target}: no key of {side.label} has {text!r} in it")


def allowed(hints: Sequence[Hint]) -> Allowed:
    """Whether two slots may go together: a hint is about both of them or about none."""

    def made(source: Slot, target: Slot) -> bool:
        return all(_about(source, hint.source) == _about(target, hint.target) for hint in hints)

    return made


def names(hints: Sequence[Hint], source: Slot, target: Slot) -> bool:
    """Whether a hint is about these two and nothing around them: then what it says is settled."""
    return any(_ends(source, hint.source) and _ends(target, hint.target) for hint in hints)


def _ends(slot: Slot, text: str) -> bool:
    if slot.is_run:
        return f".{slot.path}".replace("0", "{}").rstrip(".{}_").endswith(f".{text}")
    return all(f".{unit.path}".endswith(f".{text}") for unit in slot.every())


def _about(slot: Slot, text: str) -> bool:
    if slot.is_run:
        return _has(slot.path, text)
    return any(_has(leaf.key, text) for unit in slot.every() for leaf in unit.leaves.values())


def _has(key: str, text: str) -> bool:
    return f".{text}." in f".{key}."

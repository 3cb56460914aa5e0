"""torch's `state_dict()._metadata`: module versions, whose prefixes are renamed with the keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptsurgeon.checkpoint import Versions


def renamed(versions: Versions, before: Iterable[str], pairs: Iterable[tuple[str, str]]) -> Versions:
    """torch's `_metadata`, with its module prefixes renamed as the keys were.

    `before` are all keys of the source, `pairs` (old key, new key).  A key that was renamed tells
    what became of every module around it, as far as the ends of the two names agree; modules
    without tensors follow the module around them; modules that lost all their tensors go.
    """
    if not versions:
        return {}
    moved: dict[str, str] = {}
    pairs = list(pairs)
    for exact in (True, False):
        seen: set[tuple[str, str, bool]] = set()
        for old, new in pairs:
            a, b = old.rpartition("."), new.rpartition(".")
            one = (a[0], b[0], a[2] == b[2])  # tensors of one module tell the same
            if one not in seen:
                seen.add(one)
                _note(moved, old.split("."), new.split("."), exact)
    had = {parent[:cut] for parent in {key.rpartition(".")[0] for key in before} for cut in (*_cuts(parent), None)}
    made: dict[str, Mapping[str, object]] = {}
    for module, entry in versions.items():
        if module in moved:
            made.setdefault(moved[module], entry)
        elif module not in had and (around := _around(module, moved)) is not None:
            made.setdefault(around, entry)
    return made


def _note(moved: dict[str, str], a: list[str], b: list[str], exact: bool) -> None:
    """What one renamed key tells of the modules around it; without `exact` its own name may change
    (`weight` to `gamma`)."""
    if not exact and a[-1] != b[-1]:
        a, b = a[:-1], b[:-1]
        moved.setdefault(".".join(a), ".".join(b))
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
        moved.setdefault(".".join(a), ".".join(b))


def _cuts(key: str) -> list[int]:
    return [0, *(at for at, char in enumerate(key) if char == ".")]


def _around(module: str, moved: Mapping[str, str]) -> str | None:
    """The new name of a module without tensors: its nearest renamed ancestor's, and the rest."""
    at = len(module)
    while at > 0:
        at = max(module.rfind(".", 0, at), 0)
        if module[:at] in moved:
            parent, rest = moved[module[:at]], module[at:].lstrip(".")
            return f"{parent}.{rest}" if parent else rest
    return None

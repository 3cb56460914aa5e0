"""What a file says of how it came about: in a line or two, and as JSON."""

from __future__ import annotations

from typing import Any

from ckptsurgeon.provenance import Provenance
from ckptsurgeon.report._text import plural, shown

_RULES_SHOWN = 3
_WIDTH = 60
_DIGITS = len("sha256:") + 12


def lines(found: Provenance) -> list[str]:
    """What the file says, as what it is: a claim."""
    if found.problem:
        return [f"provenance: cannot be read: {_short(found.problem, 2 * _WIDTH)}"]
    words = [f"by ckptsurgeon {_short(found.version)} {_of(found)}", *([how(found)] if how(found) else [])]
    made = f"provenance, as the file says: {', '.join(words)}"
    steps = len(found.history) + found.earlier
    made += f"; before that: {plural(steps, 'step')}" if steps else ""
    return [made] if found.content is None else [made, f"contents, as the file says: {found.content}"]


def _of(found: Provenance) -> str:
    place = "" if found.select == "." else f" at {_short(found.select)}"
    header = f" with the header {found.header[:_DIGITS]}…" if found.header else ""
    return f"of a {_short(found.format)}{place}{header}" if found.format else f"of tensors in memory{header}"


def how(found: Provenance) -> str:
    """The recipe, in a few words; nothing for a copy as it is."""
    rules = found.rules
    words = ["rules that are too many to be kept"] if rules is None else [f"`{_short(rule)}`" for rule in rules]
    left = len(words) - _RULES_SHOWN
    words = [*words[:_RULES_SHOWN], *([f"{plural(left, 'more rule')}"] if left > 0 else [])]
    for name, value in found.options.items():
        option = f"--{name.replace('_', '-')}"
        words.append(option if value is True else f"{option} {value}")
    words += ["to fit a target"] if found.target else []
    return ", ".join(words)


def _short(text: str, most: int = _WIDTH) -> str:
    return shown(text if len(text) <= most else f"{text[: most - 1]}…")


def data(found: Provenance) -> dict[str, Any]:
    """The record itself, with `problem` where it cannot be read."""
    return {"problem": found.problem} if found.problem else found.data()

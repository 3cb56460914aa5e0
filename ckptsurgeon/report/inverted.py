"""The way back of a recipe: `ckpt invert`."""

from __future__ import annotations

import os
from typing import Any

from ckptsurgeon.inverter import Inversion
from ckptsurgeon.report._text import plural, shown

SCHEMA = "ckptsurgeon.invert/1"


def text(found: Inversion, output: str | os.PathLike[str] | None) -> str:
    """The recipe, or where it was written."""
    if output is None:
        return found.text().rstrip()
    exact = "" if not any(one.rounded for one in found.undoings) else ", some of them but for rounding"
    lost = f"; {plural(len(found.problems), 'rule')} not undone" if found.problems else ""
    undone = plural(sum(bool(one.lines) for one in found.undoings), "step")
    return f"wrote {shown(os.fspath(output))}: {plural(len(found.lines), 'rule')} that undo {undone}{exact}{lost}"


def data(found: Inversion, output: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The JSON object of `ckpt invert --json`."""
    return {
        "schema": SCHEMA,
        "recipe": found.recipe.name or None,
        "source": found.label,
        "undoings": [
            {"rule": one.rule.text, "lines": list(one.lines), "rounded": one.rounded, "nothing": one.nothing or None}
            for one in found.undoings
        ],
        "problems": [problem.text for problem in found.problems],
        "text": found.text(),
        "written": None if output is None else os.fspath(output),
    }

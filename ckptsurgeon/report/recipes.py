"""The built-in recipes: `ckpt recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptsurgeon.cookbook import Builtin
from ckptsurgeon.report._text import columns

SCHEMA = "ckptsurgeon.recipes/1"


def text(found: Sequence[Builtin]) -> str:
    """A row a recipe."""
    rows = [("recipe", "variables", "for"), *((one.name, ", ".join(one.variables), one.description) for one in found)]
    return "\n".join([*columns(rows), "", "each is used as --recipe builtin:NAME; `ckpt recipes NAME` prints it"])


def data(found: Sequence[Builtin]) -> dict[str, Any]:
    """The JSON object of `ckpt recipes --json`."""
    return {
        "schema": SCHEMA,
        "recipes": [
            {
                "name": one.name,
                "description": one.description,
                "variables": [{"name": name, "help": help} for name, help in one.variables.items()],
                "text": one.text,
            }
            for one in found
        ],
    }

"""The operations that a rule can name: `ckpt rules`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from ckptsurgeon.errors import UsageError
from ckptsurgeon.ops import OPERATIONS, Operation
from ckptsurgeon.report._text import columns

SCHEMA = "ckptsurgeon.rules/1"
LOSS = {
    "exact": "exact",
    "names": "names only",
    "lossy": "lossy",
    "rounded": "rounding",
    "initialisation": "new values",
}
"""What is lost, as the documentation says it."""


def named(name: str | None) -> tuple[Operation, ...]:
    """The operation of a name, or all; UsageError with the names alike."""
    if name is None:
        return tuple(OPERATIONS.values())
    if name not in OPERATIONS:
        near = get_close_matches(name, OPERATIONS, 3) or list(OPERATIONS)
        raise UsageError(f"no operation is called {name!r}; there are {', '.join(near)}")
    return (OPERATIONS[name],)


def text(found: Sequence[Operation], whole: bool) -> str:
    """A row an operation; of one alone its options and an example too."""
    if not whole:
        families = dict.fromkeys(one.family for one in found)
        blocks = (
            "\n".join([f"{family}:", *columns([(f"  {op.usage()}", op.help) for op in found if op.family == family])])
            for family in families
        )
        return "\n\n".join([*blocks, "`ckpt rules NAME` tells of one: its options, an example"])
    (one,) = found
    options = [
        (f"  {option.name}={'|'.join(option.choices) or option.kind.upper()}", option.help) for option in one.options
    ]
    lines = [one.usage(), "", f"{one.help} ({LOSS[one.exactness]})", "", *columns(options)]
    return "\n".join([*lines, "", f"example: {one.example}"])


def data(found: Sequence[Operation]) -> dict[str, Any]:
    """The JSON object of `ckpt rules --json`."""
    return {
        "schema": SCHEMA,
        "operations": [
            {
                "name": one.name,
                "family": one.family,
                "usage": one.usage(),
                "help": one.help,
                "loss": LOSS[one.exactness],
                "example": one.example,
                "options": [
                    {"name": option.name, "kind": option.kind, "choices": list(option.choices), "help": option.help}
                    for option in one.options
                ],
            }
            for one in found
        ],
    }

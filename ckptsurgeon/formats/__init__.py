"""file ⇄ Checkpoint: the table of formats, and what all of them share."""

from __future__ import annotations

from typing import Any

from ckptsurgeon.formats import _tree
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._layout import Layout
from ckptsurgeon.formats._outputs import SHARD_SIZE, Output, Tied, check_extras, files, output, problems
from ckptsurgeon.formats._table import FORMATS, Format, inspect, members
from ckptsurgeon.formats._tree import Candidate, summary

__all__ = [
    "FORMATS",
    "SHARD_SIZE",
    "Candidate",
    "Document",
    "Format",
    "Layout",
    "Output",
    "Tied",
    "check_extras",
    "files",
    "inspect",
    "members",
    "optimizers",
    "output",
    "problems",
    "summary",
]


def optimizers(extras: Any) -> list[str]:
    """The places of optimizer state in the extras."""
    return _tree.optimizers(extras)

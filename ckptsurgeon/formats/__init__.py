"""file ⇄ Checkpoint: the table of formats, and what all of them share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptsurgeon.formats import _tree
from ckptsurgeon.formats._beside import gatherings, optimizer_states, put, taken_out
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._folder import JOURNAL
from ckptsurgeon.formats._layout import PAGES, Layout
from ckptsurgeon.formats._outputs import (
    SHARD_SIZE,
    Output,
    Tied,
    check_extras,
    check_readable,
    files,
    has_place,
    output,
    parse_size,
    problems,
)
from ckptsurgeon.formats._table import FORMATS, Format, inspect, members, probe
from ckptsurgeon.formats._tree import Candidate, summary
from ckptsurgeon.formats._values import kind_of, tensor_of
from ckptsurgeon.formats.safetensors import expanded
from ckptsurgeon.formats.sharded import numbered, parts_of
from ckptsurgeon.tensor import TensorRef

__all__ = [
    "FORMATS",
    "JOURNAL",
    "PAGES",
    "SHARD_SIZE",
    "Candidate",
    "Document",
    "Format",
    "Layout",
    "Output",
    "Tied",
    "check_extras",
    "check_readable",
    "expanded",
    "files",
    "gatherings",
    "has_place",
    "inspect",
    "kind_of",
    "members",
    "numbered",
    "optimizer_states",
    "optimizers",
    "output",
    "parse_size",
    "parts_of",
    "probe",
    "problems",
    "put",
    "summary",
    "taken_out",
    "tensor_of",
    "tensors",
]


def tensors(extras: Any) -> Iterator[tuple[str, TensorRef]]:
    """The tensors in the extras, with their dotted places."""
    return _tree.tensors(extras)


def optimizers(extras: Any) -> list[str]:
    """The places of optimizer state in the extras."""
    return _tree.optimizers(extras)

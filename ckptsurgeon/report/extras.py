"""What is in a file beside its state dict: `ckpt ls --extras`."""

from __future__ import annotations

import math
from typing import Any

from ckptsurgeon import formats
from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.formats import Document
from ckptsurgeon.inert import Opaque, width
from ckptsurgeon.report import tree as trees
from ckptsurgeon.report._text import short, shown
from ckptsurgeon.tensor import TensorRef

SCHEMA = "ckptsurgeon.extras/1"
_DEEPEST = 100
_MOST = 20_000
"""Values that are shown again, since they stand in several places."""
_CHARACTERS = 1 << 26
"""Of all texts and names together: one may stand in many places."""
_LONGEST_INT = 1024


def of(document: Document, select: str | None) -> tuple[Any, str | None]:
    """The extras, and where the state dict beside them is; the whole object where there is none, or
    where several could be meant."""
    if select is None and document.main is None:
        return document.root, None
    found: Checkpoint = document.checkpoint(select)
    return found.extras, found.origin.selected if found.origin else None


def text(document: Document, extras: Any, limit: int | None) -> str:
    """The extras as a tree."""
    if not extras:
        return f"{shown(document.path)}: nothing beside the tensors"
    root = trees.node(document.path, extras)
    root.text = f"{document.format}, beside the tensors: {root.text}"
    return trees.text(root, limit)


def data(document: Document, extras: Any, select: str | None) -> dict[str, Any]:
    """The JSON object of `ckpt ls --extras --json`."""
    return {
        "schema": SCHEMA,
        "file": document.path,
        "format": document.format,
        "select": select,
        "extras": _Plain().value(extras, 0),
    }


class _Plain:
    """Inert data as JSON: what JSON lacks is an object with one telling name."""

    def __init__(self) -> None:
        self.above: set[int] = set()
        self.seen: dict[int, Any] = {}
        self.again = 0
        self.characters = _CHARACTERS

    def value(self, value: Any, depth: int) -> Any:
        if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
            return {"int": f"{value.bit_length()} bits"}
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, complex):
            return {"complex": str(value)}
        if isinstance(value, bytes | bytearray):
            return {"bytes": len(value)}
        if isinstance(value, TensorRef):
            return {"tensor": value.dtype.name, "shape": list(value.shape)}
        ref = formats.tensor_of(value, arrays=True)
        if ref is not None:
            return {"array": ref.dtype.name, "shape": list(ref.shape)}
        return self.once(value, depth)

    def text(self, value: str) -> Any:
        self.characters -= len(value)
        return value if self.characters >= 0 else {"str": len(value)}

    def once(self, value: Any, depth: int) -> Any:
        """A container; one that was shown before counts with its members, and what occurs once costs nothing."""
        if id(value) in self.seen:
            self.again += 1 + width(value)
        self.seen[id(value)] = value
        if id(value) in self.above or depth > _DEEPEST or self.again > _MOST:
            return {"omitted": "it contains itself, or is too large"}
        self.above.add(id(value))
        made = self.container(value, depth + 1)
        self.above.discard(id(value))
        return made

    def container(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return self.mapping(value, depth)
        if isinstance(value, list | tuple):
            return [self.value(member, depth) for member in value]
        if isinstance(value, set | frozenset):
            return [self.value(member, depth) for member in sorted(value, key=short)]
        if isinstance(value, Opaque):
            return self.record(value, depth)
        return {"object": type(value).__name__}

    def mapping(self, value: dict[Any, Any], depth: int) -> Any:
        names = [key if isinstance(key, str) else short(key) for key in value]
        self.characters -= sum(map(len, names))
        if self.characters < 0:
            return {"omitted": "it is too large"}
        if len(set(names)) == len(names):
            return {name: self.value(member, depth) for name, member in zip(names, value.values(), strict=True)}
        return {"pairs": [[self.value(key, depth), self.value(member, depth)] for key, member in value.items()]}

    def record(self, value: Opaque, depth: int) -> Any:
        if value.name == "torch.Size" and value.args:
            return self.value(value.args[0], depth)
        if value.args is None:
            return {"class": value.name}
        made: dict[str, Any] = {"class": value.name}
        if value.args:
            made["args"] = [self.value(member, depth) for member in value.args]
        if value.items:
            made["items"] = [self.value(member, depth) for member in value.items]
        if value.pairs is not None:
            made["items"] = self.mapping(value.pairs, depth)
        if value.state is not None:
            made["state"] = self.value(value.fields() if value.pairs is None and value.fields() else value.state, depth)
        return made

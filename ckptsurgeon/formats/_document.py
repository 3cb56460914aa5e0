"""What a format module hands over: the object in a file, and the state dicts found in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ckptsurgeon.checkpoint import Checkpoint, Origin
from ckptsurgeon.errors import MOST_SHOWN, AmbiguousError, InputError, UsageError, brief, shown
from ckptsurgeon.formats import _select, _splice, _tree
from ckptsurgeon.formats._tree import Candidate
from ckptsurgeon.provenance import Provenance
from ckptsurgeon.sources import Source
from ckptsurgeon.tensor import TensorRef

_NAMES_SHOWN = 5


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
    """Errors of the tree get the name of the file."""
    try:
        yield
    except InputError as error:
        error.path = error.path or path
        raise


def _loose(found: Candidate) -> str:
    names = ", ".join(found.loose[:_NAMES_SHOWN])
    more = len(found.loose) - _NAMES_SHOWN
    return (
        f"its tensors at {names}{f' and {more} more' if more > 0 else ''} are neither parameters nor buffers (packed, "
        "or plain attributes) and are not taken; `ckpt ls --tree` shows them, and a saved state_dict() may have them"
    )


@dataclass(frozen=True)
class Document:
    """A whole file as inert data: `root` is the object it holds, `metadata` the str → str map of
    formats that have one, `lacks` why a file of its kind has no state dict, where that is known.

    A sharded one names its `shards`; `remarks` are what is odd about a file, though it can be read;
    `interrupted` says of in-place changes which were not finished; `provenance` is what the file says of itself.
    """

    path: str
    format: str
    root: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    lacks: str | None = None
    shards: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    interrupted: tuple[str, ...] = ()
    provenance: Provenance | None = None

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every state dict in the file, in file order; optimizer state is none."""
        if self.lacks is not None:
            return ()
        with _about(self.path):
            return _tree.candidates(self.root)

    @property
    def main(self) -> Candidate | None:
        """The state dict that is clearly meant, if one is."""
        return _tree.main(self.candidates)

    def checkpoint(self, select: str | None = None) -> Checkpoint:
        """The state dict at `select` (dotted; `.` is the root), or the main one.

        Raises AmbiguousError when several could be meant, InputError when there is none,
        UsageError when `select` names nothing.
        """
        if select is not None:
            return self._made(self._selected(select))
        main = self.main
        if main is not None:
            return self._made(main)
        if self.candidates:
            raise AmbiguousError([candidate.name for candidate in self.candidates], path=self.path)
        if isinstance(self.root, dict) and not self.root:
            return self._made(Candidate((), {}, {}, {}))
        raise InputError(
            self.lacks or f"holds no state dict, but {_tree.describe(self.root)}",
            path=self.path,
            hint="look at it with `ckpt ls --tree`",
        )

    def _selected(self, select: str) -> Candidate:
        for candidate in self.candidates:
            if candidate.name == select != ".":
                return candidate
        with _about(self.path):
            found = _select.at(self.root, select)
        if found is None:
            names = ", ".join(brief(candidate.name) for candidate in self.candidates[:MOST_SHOWN]) or "none"
            text = f"{self.path}: --select {select} names nothing with tensors in it; state dicts: {names}"
            raise UsageError(shown(text))
        return found

    def tensors(self) -> Iterator[tuple[str, TensorRef]]:
        """Every tensor in the file, with its key in its state dict, or else its dotted place."""
        seen: set[Source] = set()
        for candidate in self.candidates:
            for key, ref in candidate.tensors.items():
                seen.add(ref.source)
                yield key, ref
        with _about(self.path):
            for name, ref in _tree.tensors(self.root):
                if ref.source not in seen:
                    yield name, ref

    def node(self, select: str) -> Any:
        """The object at `select`; UsageError when there is none."""
        with _about(self.path):
            found = _select.node_of(self.root, select)
        if found is None:
            raise UsageError(f"{self.path}: --select {select} names nothing; look at the whole with `ckpt ls --tree`")
        return found

    def _made(self, found: Candidate) -> Checkpoint:
        if found.loose and not found.tensors:
            raise InputError(f"holds a module without parameters and buffers; {_loose(found)}", path=self.path)
        with _about(self.path):
            extras, place = _splice.remove(self.root, found.path, found.rest)
        origin = Origin(self.path, self.format, found.path, place)
        remarks = (*self.interrupted, *([_loose(found)] if found.loose else []))
        return Checkpoint(found.tensors, dict(self.metadata), found.versions, extras, origin, remarks, self.provenance)

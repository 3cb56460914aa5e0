"""`Checkpoint`, the type that everything speaks, and `Target`, what a checkpoint must fit."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

from ckptsurgeon.errors import UsageError
from ckptsurgeon.sources import Source
from ckptsurgeon.tensor import TensorRef, TensorSpec

Step = Hashable
"""One step into a container: a dict key, an attribute name, or a list index."""
Versions = Mapping[str, Mapping[str, Any]]
"""torch's `state_dict()._metadata`: module prefix → {"version": n}."""


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from: file, format, the steps to its state dict inside the file's
    object, and its place among its siblings there (None: what stood beside the tensors in it is
    still in its place, in the extras)."""

    path: str
    format: str
    select: tuple[Step, ...] = ()
    place: int | None = None

    @property
    def selected(self) -> str:
        """The place of the state dict as `--select` spells it; `.` is the file's root."""
        return ".".join(str(step) for step in self.select) or "."


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, TensorRef]):
    """An ordered mapping of key → `TensorRef`, with everything else that the file says.

    Immutable: every step makes a new one. `metadata` is the str → str map of safetensors,
    `versions` torch's `_metadata`, `extras` the rest of the file as inert data.
    """

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] = field(default_factory=_empty)
    versions: Versions = field(default_factory=_empty)
    extras: Any = field(default_factory=_empty)
    origin: Origin | None = None

    def __getitem__(self, key: str) -> TensorRef:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def numel(self) -> int:
        """The elements of all tensors together."""
        return sum(ref.numel for ref in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, each counted in full; no disk is touched."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The groups of keys that share one storage, in order."""
        groups: dict[Hashable, list[str]] = {}
        for key, ref in self.tensors.items():
            if ref.tie is not None:
                groups.setdefault(ref.tie, []).append(key)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def replace(self, **changes: Any) -> Checkpoint:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        where = "" if self.origin is None else f" of {self.origin.path} ({self.origin.format})"
        return f"<Checkpoint{where}: {len(self)} tensors, {self.numel:,} elements, {self.nbytes:,} bytes>"


Role = Literal["parameter", "buffer", "tensor"]


@dataclass(frozen=True)
class TargetEntry:
    """One key of a target: its spec, whether a model trains it (`tensor`: not known), and the
    type of the module that owns it ("" when not known)."""

    spec: TensorSpec
    role: Role = "tensor"
    module: str = ""


class InitialValues(Protocol):
    """Where the values of keys come from that a checkpoint does not bring."""

    def source(self, key: str, seed: int) -> Source: ...


@dataclass(frozen=True)
class Target:
    """What a checkpoint must fit: key → `TargetEntry`, in order.

    `label` names it in reports. `is_model` tells a model, whose dtypes are shown but do not
    count, from another checkpoint. `others` are keys of its state dict that are no tensors, `ties`
    the groups of keys that share one parameter. `tensors` are those that it holds; None for a model
    that is only named, whose values a seed would have to make.
    """

    label: str
    entries: Mapping[str, TargetEntry]
    is_model: bool
    others: tuple[str, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    initial: InitialValues | None = None
    tensors: Mapping[str, TensorRef] | None = None

    def initial_source(self, key: str, seed: int) -> Source:
        """How the value that the target itself would give `key` is made; UsageError if it has none."""
        if self.initial is None:
            raise UsageError(f"{self.label} has no values of its own to initialise {key!r} with")
        return self.initial.source(key, seed)

    @property
    def numel(self) -> int:
        """The elements of all keys together."""
        return sum(entry.spec.numel for entry in self.entries.values())

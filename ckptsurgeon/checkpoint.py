"""`Checkpoint`, the type that everything speaks, and `Target`, what a checkpoint must fit."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ckptsurgeon import charges
from ckptsurgeon.errors import InputError, UsageError
from ckptsurgeon.kinds import NORM_STATISTICS, OwnerKind
from ckptsurgeon.provenance import Derivation, Provenance
from ckptsurgeon.sources import Apply, Extent, Fill, Pieces, Source
from ckptsurgeon.tensor import Role, TensorRef, TensorSpec, printable

if TYPE_CHECKING:
    import torch

_NAMES_SHOWN = 8

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


def _in_order(refs: Iterable[TensorRef]) -> bool:
    """Whether each tensor begins behind the one before it in its file, so that no two share their bytes."""
    ends: dict[str, int] = {}
    for ref in refs:
        source = ref.source
        if not isinstance(source, Extent) or source.offset < ends.get(source.file.path, 0):
            return False
        ends[source.file.path] = source.offset + source.nbytes
    return True


def _place(ref: TensorRef) -> int:
    """The same number for tied tensors, and for few others: it saves most keys the comparison of sources."""
    source = ref.source
    if isinstance(source, Extent):
        return hash((source.file.path, source.offset))
    return hash(source) if isinstance(source, Apply | Fill | Pieces) else id(ref)


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, TensorRef]):
    """An ordered mapping of key → `TensorRef`, with everything else that the file says.

    Immutable: every step makes a new one. `metadata` is the str → str map of safetensors,
    `versions` torch's `_metadata`, `extras` the rest of the file as inert data, `remarks` what a
    reader should know of what was not taken.  `provenance` is what the file says of how it came about (of a plan's
    result, what the source's file says), `derived` what a plan made it of.
    """

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] = field(default_factory=dict)
    versions: Versions = field(default_factory=dict)
    extras: Any = field(default_factory=dict)
    origin: Origin | None = None
    remarks: tuple[str, ...] = ()
    provenance: Provenance | None = None
    derived: Derivation | None = None

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
        if _in_order(self.tensors.values()):
            return ()
        places = Counter(map(_place, self.tensors.values()))
        groups: dict[Hashable, list[str]] = {}
        for key, ref in self.tensors.items():
            if places[_place(ref)] > 1 and (tie := ref.tie) is not None:
                groups.setdefault(tie, []).append(key)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @property
    def in_order(self) -> bool:
        """Whether the keys come in the order of their model, as far as can be told: those who write safetensors and
        indexes sort them, and who sorts a dict loses torch's `_metadata`."""
        if self.origin is not None and ("safetensors" in self.origin.format or "sharded" in self.origin.format):
            return False
        keys = list(self.tensors)
        return bool(self.versions) or len(keys) < 2 or keys != sorted(keys)

    def replace(self, **changes: Any) -> Checkpoint:
        """A copy with some fields changed; one of other tensors no longer is what its provenance is about."""
        if "tensors" in changes:
            changes = {"provenance": None, "derived": None, **changes}
        return replace(self, **changes)

    def state_dict(self) -> OrderedDict[str, torch.Tensor]:
        """Every tensor read, as `model.load_state_dict` takes them: ordered, tied names sharing one
        storage, with torch's `_metadata` where the file has module versions.

        Raises InputError, with the key, when a tensor cannot be read.
        """
        charges.reading(self.tensors.values())
        state: OrderedDict[str, torch.Tensor] = OrderedDict()
        read: dict[Hashable, tuple[tuple[int, ...], torch.Tensor]] = {}
        for key, ref in self.tensors.items():
            storage = ref.tie and (ref.tie, ref.dtype)
            try:
                shape, shared = read.get(storage, (ref.shape, None))
                made = ref.read() if shared is None else shared if shape == ref.shape else shared.view(ref.shape)
            except InputError as error:
                error.key = error.key or key
                raise
            state[key] = made
            if storage is not None:
                read.setdefault(storage, (ref.shape, made))
        if self.versions:
            versions = OrderedDict((prefix, dict(version)) for prefix, version in self.versions.items())
            state._metadata = versions  # type: ignore[attr-defined]
        return state

    def __repr__(self) -> str:
        """One line: where it came from, how much is in it, of which dtypes, and what else is there."""
        where = "" if self.origin is None else f" of {printable(self.origin.path)} ({self._format})"
        ties = len(self.tied())
        parts = [f"{len(self)} tensors", f"{self.numel:,} elements", f"{self.nbytes:,} bytes"]
        parts += [", ".join(dict.fromkeys(ref.dtype.name for ref in self.tensors.values()))] if self.tensors else []
        parts += [f"{ties} tied group{'' if ties == 1 else 's'}"] if ties else []
        if isinstance(self.extras, Mapping) and self.extras:
            names = [printable(str(name)) for name in self.extras]
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            parts.append(f"extras: {', '.join(names[:_NAMES_SHOWN])}{more}")
        return f"<Checkpoint{where}: {'; '.join(parts)}>"

    @property
    def _format(self) -> str:
        assert self.origin is not None
        place = "" if self.origin.selected == "." else f", state dict at {printable(self.origin.selected)}"
        return f"{self.origin.format}{place}"


@dataclass(frozen=True, slots=True)
class TargetEntry:
    """One key of a target: its spec, whether a model trains it (`tensor`: not known), the type of the module that owns
    it ("" when not known), and what that is by its type and those it is made from ("" for no norm, embedding or
    PReLU)."""

    spec: TensorSpec
    role: Role = "tensor"
    module: str = ""
    kind: OwnerKind = ""


def buffer_words(key: str, role: Role, module: str) -> str:
    """What a buffer is, told by its role, its name and the type of its module; "" for what is none.

    Where the role is not known, as in a checkpoint, the names that torch's norms give tell.

    >>> buffer_words("bn1.running_var", "buffer", "BatchNorm2d"), buffer_words("bn1.num_batches_tracked", "tensor", "")
    ('buffer: running statistics of a BatchNorm2d', 'buffer: a count of batches')
    """
    if role == "parameter":
        return ""
    name = key.rpartition(".")[2]
    if name not in NORM_STATISTICS:
        return "buffer" if role == "buffer" else ""
    if name != "num_batches_tracked":
        article = "an" if module[:1] in tuple("AEIOU") else "a"
        return f"buffer: running statistics of {article} {module or 'norm'}"
    return "buffer: a count of batches"


class InitialValues(Protocol):
    """Where the values of keys come from that a checkpoint does not bring."""

    def source(self, key: str, seed: int) -> Source: ...


@dataclass(frozen=True)
class Target:
    """What a checkpoint must fit: key → `TargetEntry`, in order.

    `label` names it in reports. `is_model` tells a model, whose dtypes are shown but do not
    count, from another checkpoint. `others` are keys of its state dict that are no tensors, `ties`
    the groups of keys that share one parameter. `tensors` are those that it holds; None for a model
    that is only named, whose values a seed would have to make. `cached` tells that the model was not
    built: all of this was kept from an earlier time. `remarks` are those of a checkpoint, `in_order` too.
    `facts` are numbers that a model says of itself and no header shows: `heads`, `kv_heads`, `rotary`.
    """

    label: str
    entries: Mapping[str, TargetEntry]
    is_model: bool
    others: tuple[str, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    initial: InitialValues | None = None
    tensors: Mapping[str, TensorRef] | None = None
    remarks: tuple[str, ...] = ()
    cached: bool = False
    in_order: bool = True
    facts: Mapping[str, int] = field(default_factory=dict)

    def initial_source(self, key: str, seed: int) -> Source:
        """How the value that the target itself would give `key` is made; UsageError if it has none."""
        if self.initial is None:
            raise UsageError(f"{self.label} has no values of its own to initialise {key!r} with")
        return self.initial.source(key, seed)

    @property
    def numel(self) -> int:
        """The elements of all keys together."""
        return sum(entry.spec.numel for entry in self.entries.values())

"""Sharded checkpoints: an `index.json` that says which file has which tensor, over any other format.

Source: `save_torch_state_dict` in huggingface_hub, `load_sharded_checkpoint` in transformers.  As
there, the tensors come from the shards and the index is held against them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.errors import MOST_SHOWN, InputError, LimitError, brief, quoted
from ckptsurgeon.formats import _json, _provenance, sidefile
from ckptsurgeon.formats._aliases import restored
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._inside import is_inside, part
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.provenance import KEY, Provenance
from ckptsurgeon.sources import Extent, File
from ckptsurgeon.tensor import TensorRef

SAFETENSORS, TORCH_ZIP = "sharded-safetensors", "sharded-torch-zip"
_PREFIX = "sharded-"
_OWN = frozenset({"total_size", "total_parameters", KEY})
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
_FREE = 1 << 16
"""Quotes of an index beside those of its entries."""
Open = Callable[[str], Document]


@dataclass(frozen=True)
class Index:
    """What an `index.json` says: key → file name, and its own metadata; its whole `text`, what of an in-place
    change was `interrupted`, and the `phase` and run of that change."""

    path: str
    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]
    text: bytes = b""
    interrupted: tuple[str, ...] = ()
    phase: tuple[str, str] | None = None


def sniff(probe: Probe) -> bool:
    """Whether a file is a JSON object."""
    return probe.head.lstrip()[:1] == b"{"


def read(probe: Probe, open_shard: Open) -> Document:
    """The tensors of all shards that the index names; InputError where they disagree, or change meanwhile."""
    index = read_index(probe)
    try:
        made = _read(probe, index, open_shard)
    except InputError:
        _check_same([probe.file])
        _check_phase(probe, index)
        raise
    _check_same([*made.files(), probe.file])
    _check_phase(probe, index)
    return made.document()


def _check_phase(probe: Probe, index: Index) -> None:
    """InputError when an in-place change of the set began, or came to its turning point, since its index was read."""
    if _phase(sidefile.of_index(probe.file.path, probe.read(probe.file.size, 0), probe.limits)) != index.phase:
        raise InputError("changed while it was opened", path=probe.file.path, hint="try it again")


def _phase(pending: sidefile.Pending | None) -> tuple[str, str] | None:
    return None if pending is None else (pending.state, "" if pending.side is None else pending.side.run)


def _check_same(files: Iterable[File]) -> None:
    """InputError when one of the files is not what it was: then all of them may be of another output."""
    for file in files:
        try:
            file.check()
        except InputError as error:
            error.cause = "changed while it was opened"
            raise


def _read(probe: Probe, index: Index, open_shard: Open) -> _Assembled:
    file = probe.file
    folder = os.path.dirname(file.path)
    names = sorted(set(index.weight_map.values()))
    if not names:
        beside = [name for group in numbered(os.listdir(folder or ".")).values() for name in group.values()]
        if any(len(_state(open_shard, os.path.join(folder, name))[1]) for name in beside):
            raise InputError("names no tensor, and there are shards beside it", path=file.path)
    absent = [name for name in names if not os.path.exists(os.path.join(folder, name))]
    if absent:
        raise InputError(
            f"names {_shards(absent)} not there: {_listed(absent)}",
            path=file.path,
            key=next(key for key, name in index.weight_map.items() if name == absent[0]),
            hint="download or copy them beside it",
        )
    made = _Assembled(file.path)
    made.interrupted += index.interrupted
    for name in names:
        made.add(name, _state(open_shard, part(file.path, name)))
    made.compare(index)
    return made


def read_index(probe: Probe) -> Index:
    """The index alone; InputError when it is JSON of another kind, or names files outside of its folder."""
    file, limits = probe.file, probe.limits
    if file.size > limits.index_bytes:
        raise LimitError(f"JSON of {file.size} bytes", "index_bytes", limits.index_bytes, path=file.path)
    interrupted: tuple[str, ...] = ()
    text = probe.read(file.size, 0)
    pending = sidefile.of_index(file.path, text, limits)
    if pending is not None:
        interrupted = (pending.remark,)
        text = pending.side.old if pending.side is not None and pending.state == "before" else text
    most = limits.archive_members
    if text.count(b'"') > 4 * most + _FREE:
        raise LimitError("an index of more entries", "archive_members", most, path=file.path)
    try:
        found = _json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = None if pending is None else f"{pending.path} beside it does not belong to it and cannot mend it"
        raise InputError(f"damaged JSON: {error}", path=file.path, hint=hint) from None
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict):
        raise InputError("is JSON text, no checkpoint: an index of shards has a `weight_map`", path=file.path)
    if len(weight_map) > most:
        raise LimitError(f"an index of {len(weight_map)} entries", "archive_members", most, path=file.path)
    for key, name in weight_map.items():
        if not isinstance(name, str) or not is_inside(name):
            raise InputError(f"names {quoted(name)}, which is no file in its own folder", path=file.path, key=key)
    metadata = found.get("metadata")
    return Index(
        file.path, weight_map, metadata if isinstance(metadata, dict) else {}, text, interrupted, _phase(pending)
    )


def _state(open_shard: Open, path: str) -> tuple[Document, Checkpoint]:
    document = open_shard(path)
    if document.format.startswith(_PREFIX):
        raise nested(path)
    return document, document.checkpoint()


def nested(path: str) -> InputError:
    """The error of an index where a shard should be."""
    return InputError("is an index among the shards of another one", path=path)


class _Assembled:
    """Shards put together, with everything that is wrong about them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tensors: dict[str, TensorRef] = {}
        self.shard_of: dict[str, str] = {}
        self.shards: dict[str, Checkpoint] = {}
        self.format = ""
        self.metadata: dict[str, str] = {}
        self.versions: dict[str, Any] = {}
        self.rest: dict[Any, Any] = {}
        self.wrong: list[tuple[str, str]] = []
        self.remarks: list[str] = []
        self.interrupted: list[str] = []
        self.provenance: Provenance | None = None

    def add(self, name: str, opened: tuple[Document, Checkpoint]) -> None:
        document, ckpt = opened
        self.shards[name] = ckpt
        self.format = self.format or document.format
        self.interrupted += document.interrupted
        for key, ref in ckpt.items():
            if key in self.tensors:
                self.wrong.append((key, f"{quoted(key)} stands in {brief(self.shard_of[key])} and in {brief(name)}"))
            else:
                self.tensors[key], self.shard_of[key] = ref, name
        self.metadata = {**ckpt.metadata, **self.metadata}
        self.versions.update(ckpt.versions)
        if isinstance(ckpt.extras, dict):
            self.rest.update(ckpt.extras)

    def compare(self, index: Index) -> None:
        for key, name in index.weight_map.items():
            if key not in self.shards[name]:
                where = self.shard_of.get(key)
                found = f"it is in {brief(where)}" if where else "no shard has it"
                self.wrong.append((key, f"the index says that {quoted(key)} is in {brief(name)}, but {found}"))
        self.order(list(index.weight_map))
        texts = {k: v for k, v in index.metadata.items() if k not in _OWN and isinstance(v, str)}
        self.metadata = {**texts, **self.metadata}
        said = index.metadata.get(KEY)
        self.provenance = _provenance.read(said) if isinstance(said, str) else None
        odd = _of_another_dtype(index, self.shards)
        if odd is not None:
            self.wrong.append(odd)
        self.fail()
        names = Counter(map(id, self.tensors.values()))  # an alias is the very tensor of another name
        unnamed = [key for key, ref in self.tensors.items() if key not in index.weight_map and names[id(ref)] == 1]
        if unnamed:
            self.remarks.append(f"the index does not name {_listed(unnamed)}, which the shards have")
        total, refs = _whole(index.metadata.get("total_size")), list(self.tensors.values())
        if total is not None and total not in _totals(refs):
            self.remarks.append(f"the index says {total} bytes, the tensors have {nbytes(refs)}")

    def order(self, keys: list[str]) -> None:
        """The order of the index, where it has one of its own: many are sorted, and say nothing."""
        if keys != sorted(keys):
            known = {key: self.tensors[key] for key in keys if key in self.tensors}
            self.tensors = {**known, **{key: ref for key, ref in self.tensors.items() if key not in known}}

    def fail(self) -> None:
        """InputError with everything that is wrong, if anything is."""
        if self.wrong:
            words = "; ".join(text for _, text in self.wrong[:MOST_SHOWN])
            more = len(self.wrong) - MOST_SHOWN
            raise InputError(
                f"the shards do not fit together: {words}" + (f"; and {more} more" if more > 0 else ""), path=self.path
            )

    def document(self) -> Document:
        tensors, metadata = restored(self.tensors, self.metadata)
        root: OrderedDict[Any, Any] = OrderedDict(tensors)
        root.update({key: value for key, value in self.rest.items() if key not in root})
        if self.versions:
            root._metadata = self.versions  # type: ignore[attr-defined]
        format = f"{_PREFIX}{self.format}" if self.format else SAFETENSORS  # an index of no tensors names no shard
        interrupted = tuple(dict.fromkeys(self.interrupted))
        remarks = tuple(self.remarks)
        return Document(self.path, format, root, metadata, None, self.paths(), remarks, interrupted, self.provenance)

    def files(self) -> Iterator[File]:
        """The shards as they were when their headers were read, those that hold anything."""
        for ckpt in self.shards.values():
            for ref in ckpt.values():
                extent = next(iter(ref.extents()), None)
                if extent is not None:
                    yield extent.file
                    break

    def paths(self) -> tuple[str, ...]:
        """The shards' paths."""
        folder = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        return tuple(os.path.join(folder, name) for name in self.shards)


def _of_another_dtype(index: Index, shards: Mapping[str, Checkpoint]) -> tuple[str, str] | None:
    """A shard that must have had another element size when the index was written.

    The index has one number, the bytes of all tensors.  It is often stale (the whole model was
    cast afterwards, or ties were counted twice), which harms nobody; but where another element size
    in some of the shards, and not in all, gives exactly that number, they are not of one piece.
    """
    total = _whole(index.metadata.get("total_size"))
    refs = [ref for ckpt in shards.values() for ref in ckpt.values()]
    have = nbytes(refs)
    if total is None or total in _totals(refs):
        return None
    by_dtype: dict[str, list[str]] = {}
    for name, ckpt in shards.items():
        numel = {dtype: sum(ref.numel for ref in ckpt.values() if ref.dtype == dtype) for dtype in _floats(ckpt)}
        if numel:
            by_dtype.setdefault(max(numel, key=lambda dtype: numel[dtype]).name, []).append(name)
    if len(by_dtype) < 2:
        return None
    for dtype, names in by_dtype.items():
        held = {key: ref for name in names for key, ref in shards[name].items() if ref.dtype.name == dtype}
        key, size = next(iter(held)), next(iter(held.values())).dtype.itemsize
        numel_here = nbytes(held.values()) // size
        for other in (1, 2, 4, 8):
            if other != size and have + numel_here * (other - size) == total:
                return (
                    key,
                    f"{_listed(names)} holds {quoted(key)} as {dtype}, {size} bytes each, but the index counts {other}",
                )
    return None


def _whole(total: Any) -> int | None:
    """A size in an index as a whole number; some writers give 12.0, and some nothing sensible."""
    if isinstance(total, float) and total.is_integer():
        total = int(total)
    return total if type(total) is int and 0 <= total < 1 << 63 else None


def _floats(ckpt: Checkpoint) -> set[Any]:
    return {ref.dtype for ref in ckpt.values() if ref.dtype.kind == "float" and ref.dtype.bits >= 8}


def unindexed(path: str, names: Iterable[str], open_shard: Open) -> Document:
    """Shards that are numbered (`NAME-00001-of-00002`), without an index."""
    made = _Assembled(path)
    for name in names:
        made.add(name, _state(open_shard, part(path, name)))
    made.fail()
    _check_same(made.files())
    return made.document()


def numbered(names: Iterable[str]) -> dict[tuple[str, str, int], dict[int, str]]:
    """Names of shards by stem, suffix and count, each group by number."""
    groups: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in sorted(names):
        found = _NUMBERED.fullmatch(name)
        if found is not None:
            stem = (found["stem"], found["suffix"], int(found["count"]))
            groups.setdefault(stem, {})[int(found["number"])] = name
    return groups


def split(ckpt: Checkpoint, size: int, together: Literal["spec", "dtype"] | None) -> list[Checkpoint]:
    """The checkpoint in parts of at most `size` bytes, in order; a tensor that is larger has its own.

    With `together` names that share their storage, and have the same dtype or the same dtype and
    shape, go into one part, where they are written once.
    """
    parts: list[dict[str, TensorRef]] = [{}]
    used = 0
    place: dict[Hashable, int] = {}
    for key, ref in ckpt.items():
        one = (ref.tie, ref.spec if together == "spec" else ref.dtype)
        shared = place.get(one) if together and ref.tie is not None else None
        if shared is not None:
            parts[shared][key] = ref
            continue
        if parts[-1] and used + ref.nbytes > size:
            parts.append({})
            used = 0
        parts[-1][key] = ref
        used += ref.nbytes
        if ref.tie is not None:
            place[one] = len(parts) - 1
    return [ckpt.replace(tensors=part) for part in parts]


def nbytes(refs: Iterable[TensorRef], together: bool = True) -> int:
    """The bytes of tensors, what is shared counted once, or with `together` false as often as it has a name."""
    if not together:
        return sum(ref.nbytes for ref in refs)
    sizes: dict[Hashable, int] = {id(ref) if ref.tie is None else ref.tie: ref.nbytes for ref in refs}
    return sum(sizes.values())


def _totals(refs: Sequence[TensorRef]) -> set[int]:
    """What writers put down as the bytes of all tensors: ties once, ties in full, or whole storages
    (huggingface_hub of torch files, where a view may be a small part of its storage)."""
    storages: dict[Hashable, int] = {}
    for ref in refs:
        source = ref.source
        if isinstance(source, Extent) and source.record is not None and ref.stored is not None:
            storages[source.path, source.record.name, source.record.offset] = ref.stored.nbytes
        else:
            storages[id(ref)] = ref.nbytes
    return {nbytes(refs), nbytes(refs, together=False), sum(storages.values())}


def index_bytes(weight_map: Mapping[str, str], total: int, provenance: str | None = None) -> bytes:
    """The text of an `index.json`."""
    metadata = {"total_size": total} if provenance is None else {KEY: provenance, "total_size": total}
    return (json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2) + "\n").encode()


def shard_names(index: str, count: int) -> list[str]:
    """The names of `count` shards beside an index of this name (`model.safetensors.index.json`)."""
    stem, suffix = parts_of(index)
    return [f"{stem}-{i + 1:05}-of-{count:05}{suffix}" for i in range(count)]


def parts_of(index: str) -> tuple[str, str]:
    """The stem and the suffix that the shards of an index of this name have.

    >>> parts_of("model.safetensors.index.json"), parts_of("a.bin.INDEX.JSON"), parts_of("foo.index.json")
    (('model', '.safetensors'), ('a', '.bin'), ('foo', '.safetensors'))
    """
    stem, suffix = os.path.splitext(index[: -len(".index.json")])
    return stem, suffix or ".safetensors"


def _shards(names: list[str]) -> str:
    return "1 shard that is" if len(names) == 1 else f"{len(names)} shards that are"


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_SHOWN
    return ", ".join(map(brief, names[:MOST_SHOWN])) + (f" and {more} more" if more > 0 else "")

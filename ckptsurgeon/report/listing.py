"""What is in a checkpoint: `ckpt ls`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ckptsurgeon import formats
from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.formats import Document
from ckptsurgeon.report import provenance
from ckptsurgeon.report._text import WIDEST, brief, columns, plural, shown, size
from ckptsurgeon.sources import Absent
from ckptsurgeon.tensor import Quantizer, TensorRef, TensorSpec

if TYPE_CHECKING:
    from ckptsurgeon.stats import Stats

SCHEMA = "ckptsurgeon.ls/1"
_TIES_SHOWN = 5
_WASTE = 1 << 20


def selected(ckpt: Checkpoint, match: re.Pattern[str] | None, limit: int | None) -> tuple[list[str], int]:
    """The keys to show, and how many more match."""
    keys = [key for key in ckpt if match is None or match.search(key)]
    return (keys, 0) if limit is None else (keys[:limit], max(0, len(keys) - limit))


def figures(ckpt: Checkpoint, keys: list[str]) -> dict[str, Stats]:
    """The figures of the values; this is what reads them."""
    from ckptsurgeon import charges, stats

    charges.reading((ckpt[key] for key in keys), stats.WIDTH)
    made: dict[Hashable, Stats] = {}
    names = {key: (ckpt[key].tie or key, ckpt[key].dtype) for key in keys}
    for key, name in names.items():
        if name not in made:
            made[name] = stats.of(ckpt[key])
    return {key: made[name] for key, name in names.items()}


def text(ckpt: Checkpoint, keys: list[str], more: int, stats: Mapping[str, Stats] | None) -> str:
    """A row for each key, then what the file is as a whole."""
    return "\n".join(lines(ckpt, keys, more, stats))


def lines(ckpt: Checkpoint, keys: list[str], more: int, stats: Mapping[str, Stats] | None) -> Iterator[str]:
    """The same, line by line."""
    if keys:
        yield from _rows(ckpt, keys, stats)
    elif ckpt and not more:
        yield "no key matches"
    if more:
        yield f"… and {plural(more, 'more key')} (--limit)"
    if ckpt:
        yield ""
    yield from _summary(ckpt)


def _rows(ckpt: Checkpoint, keys: list[str], stats: Mapping[str, Stats] | None) -> Iterator[str]:
    """Most tensors are alike but for their names: what follows the name is laid out once for all that are."""
    head = ("dtype", "shape", "bytes", *(("min", "max", "mean", "std", "nan", "inf") if stats is not None else ()), "")
    rest: dict[tuple[str, ...], int] = {head: 0}
    numbers = []
    for key in keys:
        ref = ckpt[key]
        cells = (*_spec(ref.spec), *(_figures(stats[key]) if stats is not None else ()), shown(remark(ref)))
        numbers.append(rest.setdefault(cells, len(rest)))
    tails = columns(list(rest), right=frozenset(range(2, len(head) - 1)))
    names = [shown(key) or "''" for key in keys]
    width = min(WIDEST, max(len("key"), max(map(len, names))))
    for name, number in zip(("key", *names), (0, *numbers), strict=True):
        yield f"{name:{width}}  {tails[number]}"


def _spec(spec: TensorSpec) -> tuple[str, str, str]:
    return _made(spec) if 0 in spec.shape else _kept(spec)  # of sizes beside a 0 all hashes may be one


def _made(spec: TensorSpec) -> tuple[str, str, str]:
    return spec.dtype.name, str(list(spec.shape)), f"{spec.nbytes:,}"


_kept = lru_cache(maxsize=1024)(_made)


def remark(ref: TensorRef) -> str:
    """What else there is to say of a tensor: what it is to its model, and what kind of tensor."""
    if ref.quantizer is None and ref.role != "buffer" and not isinstance(ref.source, Absent):
        return "frozen parameter" if ref.stored is not None and ref.stored.frozen else ""
    words: list[str] = ["buffer"] if ref.role == "buffer" else []
    if ref.stored is not None and ref.stored.frozen:
        words.append("frozen parameter")
    if ref.absent is not None:
        words.append(f"{ref.absent}; its bytes are not here")
    found = ref.quantizer
    if found is not None and found.axis is None:
        words.append(f"scale {found.scale:.4g}, zero point {found.zero_point}")
    elif found is not None:
        words.append(f"a scale and a zero point for each index of dimension {found.axis}")
    return ", ".join(words)


def _figures(stats: Stats) -> list[str]:
    numbers = (stats.minimum, stats.maximum, stats.mean, stats.std)
    counts = ("–" if count is None else str(count) for count in (stats.nan, stats.inf))
    return [*("–" if number is None else f"{number:.4g}" for number in numbers), *counts]


def _summary(ckpt: Checkpoint) -> list[str]:
    origin = ckpt.origin
    lines = []
    if origin is not None:
        place = "" if origin.selected == "." else f", state dict at {shown(origin.selected)}"
        lines.append(f"{shown(origin.path)}: {origin.format}{place}")
    lines.append(f"{plural(len(ckpt), 'tensor')}, {plural(ckpt.numel, 'element')}, {size(ckpt.nbytes)}")
    lines += _unused(ckpt)
    lines += [f"note: {shown(remark)}" for remark in ckpt.remarks]
    ties = ckpt.tied()
    lines += [f"tied: {', '.join(shown(key) for key in group)}" for group in ties[:_TIES_SHOWN]]
    if len(ties) > _TIES_SHOWN:
        lines.append(f"tied: … {len(ties) - _TIES_SHOWN} more groups")
    if ckpt.extras:
        others = [ref for _, ref in formats.tensors(ckpt.extras)]
        held = f" ({plural(len(others), 'tensor')}, {size(sum(ref.nbytes for ref in others))})" if others else ""
        lines.append(f"extras: {shown(formats.summary(ckpt.extras))}{held}")
    if ckpt.metadata:
        shown_metadata = ", ".join(f"{brief(key)}={value[:60]}" for key, value in list(ckpt.metadata.items())[:8])
        lines.append(f"metadata: {shown(shown_metadata)}")
    return lines + ([] if ckpt.provenance is None else provenance.lines(ckpt.provenance))


def _unused(ckpt: Checkpoint) -> list[str]:
    """Why a file is larger than its tensors: views of storages that are mostly not used."""
    if not any(ref.stored is not None and ref.stored.nbytes > ref.nbytes for ref in ckpt.values()):
        return []
    storages: dict[Any, int] = {}
    users: dict[Any, dict[Any, tuple[str, int]]] = {}
    for key, ref in ckpt.items():
        for extent in ref.extents():
            if extent.record is not None:
                place = (extent.file.path, extent.record.offset, extent.codec)
                storages[place] = extent.record.nbytes
                users.setdefault(place, {}).setdefault((extent.offset, extent.nbytes), (key, extent.nbytes))
    idle = {place: nbytes - sum(used for _, used in users[place].values()) for place, nbytes in storages.items()}
    waste = sum(nbytes for nbytes in idle.values() if nbytes > 0)
    if waste < _WASTE or waste < ckpt.nbytes:
        return []
    worst = max(idle, key=lambda place: idle[place])
    key, used = next(iter(users[worst].values()))
    return [
        f"storages: {size(sum(storages.values()))}, of which these tensors use {size(ckpt.nbytes)}: {shown(key)} is "
        f"{size(used)} of {size(storages[worst])}; a written copy has the tensors alone"
    ]


def tensor(key: str, ref: TensorRef) -> dict[str, Any]:
    """One tensor as JSON."""
    entry: dict[str, Any] = {
        "key": key,
        "dtype": ref.dtype.name,
        "shape": list(ref.shape),
        "numel": ref.numel,
        "nbytes": ref.nbytes,
        "role": ref.role,
    }
    if ref.stored is not None:
        entry["device"], entry["storage_nbytes"] = ref.stored.device, ref.stored.nbytes
        if ref.role == "parameter":
            entry["requires_grad"] = not ref.stored.frozen
    if ref.absent is not None:
        entry["absent"] = ref.absent
    if ref.quantizer is not None:
        entry["quantizer"] = _quantizer(ref.quantizer)
    return entry


def _quantizer(found: Quantizer) -> dict[str, Any]:
    made: dict[str, Any] = {"scheme": found.scheme.removeprefix("torch."), "axis": found.axis}
    if found.axis is None:
        made |= {"scale": found.scale, "zero_point": found.zero_point}
    return made


def data(ckpt: Checkpoint, keys: list[str], more: int, stats: Mapping[str, Stats] | None) -> dict[str, Any]:
    """The JSON object of `ckpt ls --json`."""
    origin = ckpt.origin
    tensors = [tensor(key, ckpt[key]) for key in keys]
    if stats is not None:
        for entry in tensors:
            entry["stats"] = asdict(stats[entry["key"]])
    return {
        "schema": SCHEMA,
        "file": origin.path if origin else None,
        "format": origin.format if origin else None,
        "select": origin.selected if origin else None,
        "tensors": tensors,
        "not_shown": more,
        "totals": {"tensors": len(ckpt), "numel": ckpt.numel, "nbytes": ckpt.nbytes},
        "tied": [list(group) for group in ckpt.tied()],
        "extras": _names(ckpt.extras),
        "others": [tensor(name, ref) for name, ref in formats.tensors(ckpt.extras)],
        "metadata": dict(ckpt.metadata),
        "remarks": list(ckpt.remarks),
        "provenance": None if ckpt.provenance is None else provenance.data(ckpt.provenance),
    }


def _names(extras: Any) -> list[str]:
    return [str(key) for key in extras] if isinstance(extras, Mapping) else []


def candidates_text(document: Document) -> str:
    """The state dicts of a file in which none is clearly the main one."""
    rows = [["--select", "tensors", "elements", "bytes", "first key"]]
    for found in document.candidates:
        first = shown(next(iter(found.tensors), ""))
        rows.append([shown(found.name), str(len(found.tensors)), f"{found.numel:,}", size(found.nbytes), first])
    lines = columns(rows, right=frozenset({1, 2, 3}))
    count = plural(len(document.candidates), "state dict")
    note = f"{shown(document.path)}: {document.format}, {count}; choose one with --select"
    return "\n".join([*lines, "", note])


def candidates_data(document: Document) -> dict[str, Any]:
    """The same as JSON."""
    found = [
        {"select": c.name, "tensors": len(c.tensors), "numel": c.numel, "nbytes": c.nbytes} for c in document.candidates
    ]
    return {"schema": SCHEMA, "file": document.path, "format": document.format, "candidates": found}

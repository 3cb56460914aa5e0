"""The parameters of a model or a checkpoint with their indexes: `ckpt ls --params`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon import kinds
from ckptsurgeon.checkpoint import Checkpoint, Target, buffer_words
from ckptsurgeon.kinds import OwnerKind
from ckptsurgeon.report._text import columns, plural, shown
from ckptsurgeon.tensor import Role, TensorSpec

SCHEMA = "ckptsurgeon.params/1"

_Found = tuple[str, TensorSpec, Role, str, OwnerKind, bool | None]
"""Key, spec, role, class and kind of the owner, whether it was saved frozen."""


@dataclass(frozen=True)
class Row:
    """A parameter: its index in `model.parameters()` (None: not known), its first name and the others, its spec, what
    it is to a model, the class and the kind of its owner ("" where it is not known), whether it was saved frozen (None:
    not known)."""

    index: int | None
    key: str
    tied: tuple[str, ...]
    spec: TensorSpec
    role: Role
    module: str
    kind: OwnerKind
    frozen: bool | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it is to the network, by the class of its owner and its own name: norm, embedding, prelu, bias."""
        return tuple(kinds.of_kind(self.key, self.kind))


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model, or of a checkpoint as far as it tells which they are (`sure`: of all it does;
    `in_order`: they may stand in the order of the model)."""

    label: str
    is_model: bool
    is_cached: bool
    in_order: bool
    rows: tuple[Row, ...]

    @property
    def sure(self) -> bool:
        return all(row.role == "parameter" for row in self.rows)

    @property
    def numel(self) -> int:
        return sum(row.spec.numel for row in self.rows)


def of_model(target: Target) -> Parameters:
    """Of a model's header: its state dict has the order of `model.parameters()`."""
    some = (
        (key, one.spec, one.role, one.module, one.kind, None)
        for key, one in target.entries.items()
        if one.role != "buffer"
    )
    return Parameters(target.label, True, target.cached, True, _rows(some, target.ties))


def of_checkpoint(ckpt: Checkpoint) -> Parameters:
    """Of a file: what it calls buffers, and what has the name of a norm's statistics, is left out."""
    some: Iterator[_Found] = (
        (key, ref.spec, ref.role, "", "", ref.stored.frozen if ref.stored and ref.role == "parameter" else None)
        for key, ref in ckpt.items()
        if not buffer_words(key, ref.role, "")
    )
    label = ckpt.origin.path if ckpt.origin else "the checkpoint"
    return Parameters(label, False, False, ckpt.in_order, _rows(some, ckpt.tied(), ckpt.in_order))


def _rows(
    some: Iterable[_Found],
    ties: Sequence[tuple[str, ...]],
    in_order: bool = True,
) -> tuple[Row, ...]:
    others = {names[0]: names[1:] for names in ties}
    doubled = {name for names in ties for name in names[1:]}
    firsts = (one for one in some if one[0] not in doubled)
    return tuple(
        Row(index if in_order else None, key, others.get(key, ()), spec, role, module, kind, frozen)
        for index, (key, spec, role, module, kind, frozen) in enumerate(firsts)
    )


def selected(found: Parameters, match: re.Pattern[str] | None, limit: int | None) -> tuple[list[Row], int]:
    """The rows to show, with the indexes that they have among all, and how many more match."""
    rows = [row for row in found.rows if match is None or any(map(match.search, (row.key, *row.tied)))]
    return (rows, 0) if limit is None else (rows[:limit], max(0, len(rows) - limit))


def text(found: Parameters, rows: Sequence[Row], more: int) -> str:
    """A row for each parameter, then their sums."""
    cells: list[tuple[str, ...]] = [("index", "parameter", "dtype", "shape", "elements", "type", "")]
    for row in rows:
        words = [*row.kinds, *(["frozen"] if row.frozen else []), *(f"tied to {shown(name)}" for name in row.tied)]
        spec = row.spec
        cells.append(
            (
                "–" if row.index is None else str(row.index),
                shown(row.key),
                spec.dtype.name,
                str(list(spec.shape)),
                f"{spec.numel:,}",
                shown(row.module),
                ", ".join(words),
            )
        )
    if not found.is_model:
        cells = [(*row[:5], row[6]) for row in cells]
    lines = columns(cells, right=frozenset({0, 4})) if rows else [] if more else ["no parameter matches"]
    if more:
        lines.append(f"… and {plural(more, 'more parameter')} (--limit)")
    lines += ["", f"{shown(found.label)}: {plural(len(found.rows), 'parameter')}, {plural(found.numel, 'element')}"]
    if not found.sure:
        index = ", and the index is that of model.parameters() where no other tensor is a buffer"
        lines.append(
            "note: the file does not say which tensors are parameters; the names of norms' statistics are left out"
            + (index if found.in_order else "")
        )
    if not found.in_order:
        lines.append(
            "note: the keys are sorted, or in an order of the file's own, and the model's is not known; "
            "`ckpt ls --params MODEL` tells the index of each parameter"
        )
    return "\n".join(lines)


def data(found: Parameters, rows: Sequence[Row], more: int) -> dict[str, Any]:
    """The JSON object of `ckpt ls --params --json`."""
    return {
        "schema": SCHEMA,
        "of": found.label,
        "is_model": found.is_model,
        "is_cached": found.is_cached,
        "sure": found.sure,
        "parameters": [
            {
                "index": row.index,
                "key": row.key,
                "dtype": row.spec.dtype.name,
                "shape": list(row.spec.shape),
                "numel": row.spec.numel,
                "role": row.role,
                "module": row.module or None,
                "kinds": list(row.kinds),
                "requires_grad": None if row.frozen is None else not row.frozen,
                "tied": list(row.tied),
            }
            for row in rows
        ],
        "not_shown": more,
        "totals": {"tensors": len(found.rows), "numel": found.numel},
    }

"""What was frozen, and what trains: the answer of `freeze` and `unfreeze`, as a table and as JSON."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptsurgeon.report._text import columns, plural, shown
from ckptsurgeon.report.grouping import group

SCHEMA = "ckptsurgeon.freeze-plan/1"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a live model: its index in `model.parameters()`, its first name, the class of its owner, its
    dtype, shape and elements, whether the call meant it, whether it trained before, and whether it does now."""

    index: int
    name: str
    module: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    chosen: bool
    before: bool
    trains: bool


@dataclass(frozen=True)
class Frozen:
    """What `freeze` or `unfreeze` (`thawed`) did. `statistics` are the norms whose running statistics stay as they are,
    `ties` the names of parameters that have several, `remarks` what else to know."""

    parameters: tuple[Parameter, ...]
    thawed: bool
    statistics: tuple[str, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the call meant, which now are frozen, or after `unfreeze` train."""
        return tuple(one.name for one in self.parameters if one.chosen)

    @property
    def already(self) -> tuple[str, ...]:
        """Those of `names` that were so before."""
        return tuple(one.name for one in self.parameters if one.chosen and one.before == one.trains)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Every parameter of the model that does not train."""
        return tuple(one.name for one in self.parameters if not one.trains)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Every parameter of the model that trains."""
        return tuple(one.name for one in self.parameters if one.trains)

    @property
    def numel(self) -> int:
        """The elements of `names`."""
        return sum(one.numel for one in self.parameters if one.chosen)

    @property
    def numel_trainable(self) -> int:
        """The elements of `trainable`."""
        return sum(one.numel for one in self.parameters if one.trains)

    def __str__(self) -> str:
        total = sum(one.numel for one in self.parameters)
        already = (
            f" ({len(self.already)} of them already {'trained' if self.thawed else 'were'})" if self.already else ""
        )
        lines = [
            *columns(
                [("", "parameters", "type", "", "tensors", "elements"), *_rows(self.parameters)], frozenset({4, 5})
            ),
            "",
            f"{'unfrozen' if self.thawed else 'frozen'}: {len(self.names):,} of "
            f"{plural(len(self.parameters), 'parameter')}, {self.numel:,} of {plural(total, 'element')}{already}",
            f"training: {plural(len(self.trainable), 'parameter')}, {plural(self.numel_trainable, 'element')}",
        ]
        if self.statistics:
            lines.append(f"running statistics kept: {', '.join(_merged(self.statistics))}")
        lines += [f"tied: {', '.join(map(shown, names))}" for names in self.ties]
        return "\n".join([*lines, *(f"note: {shown(remark)}" for remark in self.remarks)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def data(self, label: str) -> dict[str, Any]:
        """The JSON object of `ckpt freeze-plan --json`; `label` names the model."""
        return {
            "schema": SCHEMA,
            "model": label,
            "chosen": {"tensors": len(self.names), "numel": self.numel},
            "trainable": {"tensors": len(self.trainable), "numel": self.numel_trainable},
            "totals": {"tensors": len(self.parameters), "numel": sum(one.numel for one in self.parameters)},
            "parameters": [
                {
                    "index": one.index,
                    "key": one.name,
                    "dtype": one.dtype,
                    "shape": list(one.shape),
                    "numel": one.numel,
                    "module": one.module,
                    "chosen": one.chosen,
                    "trains": one.trains,
                }
                for one in self.parameters
            ],
            "norm_stats": list(self.statistics),
            "tied": [list(names) for names in self.ties],
            "remarks": list(self.remarks),
        }


class _Alike(NamedTuple):
    """What modules have in common that are one row."""

    trains: bool
    module: str
    steps: str


def _rows(parameters: Iterable[Parameter]) -> list[tuple[str, ...]]:
    """A row for modules that are alike: whether they train, their merged names, their type, what they own."""
    modules: dict[tuple[str, bool], list[Parameter]] = {}
    for one in parameters:
        modules.setdefault((one.name.rpartition(".")[0], one.trains), []).append(one)
    labels = [
        (name, _Alike(trains, some[0].module, ", ".join(shown(one.name.rpartition(".")[2]) for one in some)))
        for (name, trains), some in modules.items()
    ]
    rows: list[tuple[str, ...]] = []
    for row in group(labels):
        assert isinstance(row.label, _Alike)
        trains, module, steps = row.label
        members = [one for name in row.keys for one in modules[name, trains]]
        numel = sum(one.numel for one in members)
        name = shown(row.name) or "the model itself"
        rows.append(("trains" if trains else "frozen", name, shown(module), steps, f"{len(members):,}", f"{numel:,}"))
    return rows


def _merged(names: Iterable[str]) -> list[str]:
    return [shown(one.name) or "the model itself" for one in group((name, None) for name in names)]

"""Parameter groups as optimizers take them and as a table: the answer of `param_groups`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from ckptsurgeon.report._text import columns, plural, shown
from ckptsurgeon.report.grouping import group

if TYPE_CHECKING:
    import torch

_EXAMPLES = 3
"""How many names of a group its row in the table shows."""


@dataclass(frozen=True, eq=False)
class Group:
    """One group: its name, its parameters by name, and its options (`lr`, perhaps `weight_decay`, others)."""

    name: str
    parameters: Mapping[str, torch.nn.Parameter]
    options: Mapping[str, Any]

    @property
    def numel(self) -> int:
        """The elements of its parameters."""
        return sum(one.numel() for one in self.parameters.values())

    def as_dict(self) -> dict[str, Any]:
        """The group as optimizers take it, made anew each time."""
        listed = {"params": list(self.parameters.values()), "param_names": list(self.parameters)}
        return {**listed, "name": self.name, **self.options}


@dataclass(frozen=True, eq=False)
class Groups(Sequence[dict[str, Any]]):
    """Parameter groups as `torch.optim` takes them: `torch.optim.AdamW(groups)`; printed, they are a table.

    Each member is a dict of `params`, `param_names`, `name`, `lr` and what else is set, and is made anew when it is
    asked for: optimizers and schedulers write into theirs.  `frozen` are the parameters that were left out, `remarks`
    what else to know.
    """

    groups: tuple[Group, ...]
    frozen: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return [one.as_dict() for one in self.groups[at]] if isinstance(at, slice) else self.groups[at].as_dict()

    def __str__(self) -> str:
        rows = [("group", "lr", "weight decay", "tensors", "elements", "parameters")]
        for one in self.groups:
            decay = one.options.get("weight_decay")
            merged = [found.name for found in group((name, None) for name in one.parameters)]
            more = f", … {len(merged) - _EXAMPLES} more" if len(merged) > _EXAMPLES else ""
            rows.append(
                (
                    shown(one.name),
                    f"{one.options['lr']:.4g}",
                    "the optimizer's" if decay is None else f"{decay:.4g}",
                    f"{len(one.parameters):,}",
                    f"{one.numel:,}",
                    ", ".join(map(shown, merged[:_EXAMPLES])) + more,
                )
            )
        tensors, numel = sum(len(one.parameters) for one in self.groups), sum(one.numel for one in self.groups)
        total = f"{plural(len(self), 'group')}, {plural(tensors, 'tensor')}, {plural(numel, 'element')}"
        rest = f"; {plural(len(self.frozen), 'frozen parameter')} left out" if self.frozen else ""
        notes = [f"note: {shown(remark)}" for remark in self.remarks]
        return "\n".join([*columns(rows, frozenset({1, 2, 3, 4})), "", total + rest, *notes])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

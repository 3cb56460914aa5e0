"""A checkpoint as a target: its keys, and its own values for what another one lacks."""

from __future__ import annotations

from dataclasses import dataclass

from ckptsurgeon.checkpoint import Checkpoint, Target, TargetEntry
from ckptsurgeon.sources import Source


@dataclass(frozen=True)
class _OwnValues:
    ckpt: Checkpoint

    def source(self, key: str, seed: int) -> Source:
        return self.ckpt[key].source


def target(ckpt: Checkpoint) -> Target:
    """The target that has the keys, dtypes and shapes of `ckpt`."""
    label = ckpt.origin.path if ckpt.origin else "the checkpoint"
    shared = {spec: TargetEntry(spec) for spec in {ref.spec for ref in ckpt.values()}}
    entries = {key: shared[ref.spec] for key, ref in ckpt.items()}
    return Target(
        label,
        entries,
        is_model=False,
        ties=ckpt.tied(),
        initial=_OwnValues(ckpt),
        tensors=ckpt.tensors,
        remarks=ckpt.remarks,
    )

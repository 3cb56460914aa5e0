"""A checkpoint as a target: its keys, and its own values for what another one lacks."""

from __future__ import annotations

from dataclasses import dataclass

from ckptsurgeon.checkpoint import Checkpoint, Target, TargetEntry
from ckptsurgeon.sources import Source
from ckptsurgeon.tensor import TensorSpec


@dataclass(frozen=True)
class _OwnValues:
    ckpt: Checkpoint

    def source(self, key: str, seed: int) -> Source:
        return self.ckpt[key].source


def _entry(spec: TensorSpec, shared: dict[TensorSpec, TargetEntry]) -> TargetEntry:
    """One entry for all equal specs; of sizes beside a 0 all hashes may be one, and they have their own."""
    if 0 in spec.shape:
        return TargetEntry(spec)
    found = shared.get(spec)
    if found is None:
        found = shared[spec] = TargetEntry(spec)
    return found


def target(ckpt: Checkpoint) -> Target:
    """The target that has the keys, dtypes and shapes of `ckpt`."""
    label = ckpt.origin.path if ckpt.origin else "the checkpoint"
    shared: dict[TensorSpec, TargetEntry] = {}
    entries = {key: _entry(ref.spec, shared) for key, ref in ckpt.items()}
    return Target(
        label,
        entries,
        is_model=False,
        ties=ckpt.tied(),
        initial=_OwnValues(ckpt),
        tensors=ckpt.tensors,
        remarks=ckpt.remarks,
        in_order=ckpt.in_order,
    )

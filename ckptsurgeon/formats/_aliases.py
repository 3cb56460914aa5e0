"""Tied names in a format that forbids sharing: one is kept, the others stand in the metadata.

The metadata maps each alias to the name that is kept, as `safetensors.torch.save_model` writes and
`load_model` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.provenance import KEY
from ckptsurgeon.tensor import TensorRef

FORMAT = "format"
"""Every file that torch reads has this entry."""
RESERVED = frozenset((FORMAT, KEY))
"""Entries that are never an alias."""


def collapsed(ckpt: Checkpoint) -> Checkpoint:
    """Without the names that are tied to an earlier one of the same dtype and shape; the metadata names them."""
    aliases: dict[str, str] = {}
    for group in ckpt.tied():
        kept: list[str] = []
        for key in group:
            same = next((first for first in kept if ckpt[first].spec == ckpt[key].spec), None)
            if same is None or key in ckpt.metadata or key in RESERVED:
                kept.append(key)
            else:
                aliases[key] = same
    if not aliases:
        return ckpt
    tensors = {key: ref for key, ref in ckpt.items() if key not in aliases}
    return ckpt.replace(tensors=tensors, metadata={**ckpt.metadata, **aliases})


def restored(
    tensors: dict[str, TensorRef], metadata: Mapping[str, str]
) -> tuple[dict[str, TensorRef], Mapping[str, str]]:
    """With the names that the metadata calls aliases of tensors in the file, behind all others."""
    aliases = {
        alias: kept
        for alias, kept in metadata.items()
        if kept in tensors and alias not in tensors and alias not in RESERVED
    }
    if not aliases:
        return tensors, metadata
    return (
        {**tensors, **{alias: tensors[kept] for alias, kept in aliases.items()}},
        {key: value for key, value in metadata.items() if key not in aliases},
    )

"""What a file may ask for before it is refused: one frozen value, given to every reader.

Real checkpoints stay far below; a file that meets a limit is damaged or hostile.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that readers keep. Sizes are bytes, the rest are counts."""

    safetensors_header: int = 100_000_000
    """The JSON header of a safetensors file (the format's own bound)."""
    pickle_bytes: int = 2 << 30
    """The pickle of a torch file, without its tensors."""
    opcodes: int = 200_000_000
    """Steps of one pickle."""
    code_bytes: int = 128 << 20
    """The code of a TorchScript archive, as far as its classes are looked up."""
    archive_members: int = 20_000_000
    """Members of one zip archive."""
    dimensions: int = 64
    """Dimensions of one tensor (torch's own bound)."""
    view_bytes: int = 4 << 30
    """A view that repeats its storage (`expand`) may always be this large …"""
    view_ratio: int = 64
    """… and beyond that, at most so many times as large as the storage."""
    modules: int = 100_000
    """Modules and values of one object, counted each time that they are met again in another place."""
    index_bytes: int = 1 << 28
    """The JSON index of a sharded checkpoint."""
    depth: int = 200
    """Nesting of containers in a file."""


DEFAULT = Limits()
BLOCK = 8 << 20
"""Bytes that are read, changed and written at a time: tuning, not a limit."""

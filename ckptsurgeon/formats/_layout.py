"""A file before its first byte is written: literal bytes and tensors, in order, all sizes known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.sources import Extent
from ckptsurgeon.tensor import TensorRef

Patches = Callable[[Sequence[int]], Iterable[tuple[int, bytes]]]
"""From the CRC-32 of each tensor part, in order, to the bytes that go to given offsets."""


PAGES = 64 << 10
"""A copy inside the kernel is a third faster where both files have the bytes at the same place within so many,
and a file system that can share blocks shares them only then."""
_WORTH = 8 << 20


def shift(ref: TensorRef, place: int, unit: int) -> int:
    """The bytes by which `place`, where a tensor would lie, should move on to lie as in its source; a
    multiple of `unit`, and 0 for what is not worth it."""
    source = ref.source
    if not isinstance(source, Extent) or source.codec is not None or ref.nbytes < _WORTH:
        return 0
    found = (source.offset - place) % PAGES
    return 0 if found % unit else found


@dataclass(frozen=True)
class Layout:
    """The parts of a file, end to end.

    `patches`, where a format stores checksums, is called with the CRC-32 of every tensor part
    once all are written, and gives the places of the finished header that depend on them.  `notes`
    say what the format made of tensors that it cannot hold as they are; `keys` are the names of
    tensor parts by their `id`, for errors.
    """

    parts: tuple[bytes | TensorRef, ...]
    patches: Patches | None = None
    notes: tuple[str, ...] = ()
    keys: Mapping[int, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.parts)

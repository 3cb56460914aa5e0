"""What must lie on a disk before it can be read in pieces: compressed members, and computed tensors that
are to be turned.

They are written once, in order and in bounded memory, into a file beside the output that goes with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ckptsurgeon import evaluate
from ckptsurgeon.sources import Apply, Deflate, Extent, File, Pieces
from ckptsurgeon.stream.schedule import leaves
from ckptsurgeon.tensor import TensorRef
from ckptsurgeon.writing import put


@dataclass(frozen=True)
class _Own(File):
    """A file of ours, which grows while it is read."""

    def open(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def check(self) -> None:
        pass


class Spool:
    """Rewrites tensors so that each can be read in pieces and in any order.

    `begin` makes the file when it is first needed and returns its path and descriptor.
    """

    def __init__(self, begin: Callable[[], tuple[str, int]], block: int) -> None:
        self._begin, self._block = begin, block
        self._file: _Own | None = None
        self._descriptor = self._size = -1
        self._members: dict[tuple[File, Deflate], int] = {}

    def ready(self, ref: TensorRef) -> TensorRef:
        """`ref`, or an equal tensor whose sources were put on the disk."""
        source = ref.source
        if isinstance(source, Extent):
            return ref if source.codec is None else replace(ref, source=self._inflated(source, source.codec))
        if isinstance(source, Pieces):
            return replace(ref, source=Pieces(tuple(map(self.ready, source.parts))))
        if not isinstance(source, Apply):
            return ref
        inputs = tuple(map(self.ready, source.inputs))
        if source.kernel.views and len(inputs) == 1 and ref.nbytes > self._block:
            return source.kernel.on_extent(self._on_disk(inputs[0]))
        return replace(ref, source=Apply(source.kernel, inputs)) if inputs != source.inputs else ref

    def _inflated(self, extent: Extent, codec: Deflate) -> Extent:
        record = extent.record
        begin, nbytes = (0, extent.offset + extent.nbytes) if record is None else (record.offset, record.nbytes)
        member = (extent.file, codec)
        if member not in self._members:
            whole = Extent(extent.file, begin, nbytes, codec=codec, record=record)
            self._members[member] = self._write(evaluate.whole(whole, self._block))
        assert self._file is not None
        place = self._members[member] + extent.offset - begin
        return replace(extent, file=self._file, offset=place, codec=None, record=None)

    def _on_disk(self, ref: TensorRef) -> TensorRef:
        plain = list(leaves(ref))
        if len(plain) == 1 and isinstance(plain[0].source, Extent) and plain[0].source.strides is None:
            return replace(ref, source=plain[0].source)
        begin = self._write(ref.blocks(self._block))
        assert self._file is not None
        return TensorRef(ref.spec, Extent(self._file, begin, ref.nbytes))

    def _write(self, blocks: Iterable[memoryview]) -> int:
        """Append `blocks`, and return where they begin."""
        if self._file is None:
            path, self._descriptor = self._begin()
            self._file, self._size = _Own(path, 0, 0, os.fstat(self._descriptor).st_ino), 0
        begin = self._size
        for block in blocks:
            put(self._descriptor, block, self._size)
            self._size += len(block)
        return begin

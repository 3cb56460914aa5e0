"""A schedule carried out on one open file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from ckptsurgeon.checksum import crc32
from ckptsurgeon.errors import InputError
from ckptsurgeon.evaluate import Handles, Piece, pieces, read_exactly, read_into
from ckptsurgeon.sources import Extent, File
from ckptsurgeon.stream import workers
from ckptsurgeon.stream.copying import Copier, buffer
from ckptsurgeon.stream.digests import Digest, Digests
from ckptsurgeon.stream.flushing import Flusher
from ckptsurgeon.stream.schedule import WINDOW, Assemble, Check, Compute, Copy, Job, Part, is_plain, schedule
from ckptsurgeon.tensor import TensorRef
from ckptsurgeon.writing import put

Named = bytes | tuple[TensorRef, str | None]
"""Literal bytes, or a tensor and its key."""
Tick = Callable[[int], None]
"""Called with the bytes of the output that were written just now."""
_GAP = 4096
"""Bytes between two small tensors that are read along with them."""
_ALONE = 1 << 20
"""Bytes of an output up to which a second thread is not worth its start."""


def fill(descriptor: int, parts: Sequence[Named], block: int, threads: int, tick: Tick, sums: bool) -> list[int]:
    """Write `parts` end to end into a new file, and return the CRC-32 of each tensor where `sums` are wanted.

    Tensors come with their keys, for errors.  `block` bytes are computed at a time by each of `threads`.
    Everything that was read out of a record with a checksum is proven by then.  InputError names the key;
    OSError is one of the output.
    """
    digests = Digests()
    placed: list[tuple[int, bytes | Part]] = []
    at = 0
    for part in parts:
        placed.append((at, part if isinstance(part, bytes) else Part(at, *part)))
        at += len(part) if isinstance(part, bytes) else part[0].nbytes
    jobs = schedule(placed, sums, digests, min(WINDOW, block))
    with Handles() as handles, Flusher(descriptor) as flusher:
        filling = _Filling(descriptor, handles, block, tick, flusher)
        workers.run(filling.work(jobs), threads if at > _ALONE else 1)
        digests.prove()
        for file in handles.files:
            file.check()
    if filling.written != at:
        raise AssertionError(f"{filling.written} bytes were written where {at} were planned")
    tensors = [part for _, part in placed if isinstance(part, Part)]
    return [Digest.joined(part.sums, part.ref.nbytes) for part in tensors] if sums else []


class _Filling:
    def __init__(self, descriptor: int, handles: Handles, block: int, tick: Tick, flusher: Flusher) -> None:
        self.descriptor, self.handles, self.block = descriptor, handles, block
        self.copier = Copier(descriptor)
        self.written = 0
        self._tick, self._flusher, self._lock = tick, flusher, threading.Lock()

    def work(self, jobs: Iterable[Job]) -> Iterator[Callable[[], None]]:
        """Each job, and each piece of a computed tensor, as a call of its own."""
        for job in jobs:
            if isinstance(job, Compute):
                with _about(job.key):
                    at = 0
                    for piece in pieces(job.ref, self.block):
                        yield partial(self._compute, job, piece, at)
                        at += piece.nbytes
            elif isinstance(job, Copy):
                yield partial(self._copy, job)
            elif isinstance(job, Check):
                yield partial(self._check, job)
            else:
                yield partial(self._assemble, job)

    def _done(self, nbytes: int) -> None:
        with self._lock:
            self.written += nbytes
            self._flusher.wrote(nbytes)
            self._tick(nbytes)

    def _copy(self, job: Copy) -> None:
        with _about(job.key):
            source = self.handles.descriptor(job.file)
            if job.digest is None:
                self.copier.copy(source, job.begin, job.nbytes, job.offset, job.file.path)
            else:
                self._pass_on(source, job, job.digest)
        self._done(job.nbytes)

    def _pass_on(self, source: int, job: Copy | Check, digest: Digest) -> None:
        """Sum up bytes, and write them too where they are to be copied."""
        crc, view = 0, buffer()
        for at in range(0, job.nbytes, len(view)):
            part = view[: job.nbytes - at]
            read_into(source, part, job.begin + at, job.file.path)
            crc = crc32(part, crc)
            if isinstance(job, Copy):
                put(self.descriptor, part, job.offset + at)
        digest.put(job.at, crc, job.nbytes)

    def _check(self, job: Check) -> None:
        self._pass_on(self.handles.descriptor(job.file), job, job.digest)

    def _compute(self, job: Compute, piece: Piece, at: int) -> None:
        with _about(job.key):
            made = piece.make(self.handles)
        if made.nbytes != piece.nbytes:
            raise AssertionError(f"{made.nbytes} bytes came where {piece.nbytes} were planned ({job.ref.spec})")
        for digest in job.digests:
            digest.put(at, crc32(made), made.nbytes)
        put(self.descriptor, made, job.offset + at)
        self._done(made.nbytes)

    def _assemble(self, job: Assemble) -> None:
        found = self._small(job)
        made = bytearray()
        for index, part in enumerate(job.parts):
            if isinstance(part, bytes):
                made += part
                continue
            data = found[index] if index in found else self._made(part)
            if part.digests:
                crc = crc32(data)
                for digest in part.digests:
                    digest.put(0, crc, len(data))
            made += data
        put(self.descriptor, memoryview(made), job.offset)
        self._done(len(made))

    def _made(self, part: Compute) -> bytes:
        with _about(part.key):
            return b"".join(piece.make(self.handles) for piece in pieces(part.ref, self.block))

    def _small(self, job: Assemble) -> dict[int, bytes]:
        """The bytes of the plain tensors in a window, by their index; what lies close together is read at once."""
        wanted = sorted(
            (extent.file.path, extent.offset, index, extent)
            for index, part in enumerate(job.parts)
            if isinstance(part, Compute) and is_plain(part.ref) and isinstance(extent := part.ref.source, Extent)
        )
        found: dict[int, bytes] = {}
        group: list[tuple[int, Extent]] = []
        begin = end = 0
        for _, _, index, extent in wanted:
            after = extent.offset + extent.nbytes
            if group and (extent.file != group[0][1].file or extent.offset > end + _GAP or after - begin > self.block):
                self._read(group, begin, end, found, job)
                group = []
            if not group:
                begin = end = extent.offset
            group.append((index, extent))
            end = max(end, after)
        if group:
            self._read(group, begin, end, found, job)
        return found

    def _read(
        self, group: list[tuple[int, Extent]], begin: int, end: int, found: dict[int, bytes], job: Assemble
    ) -> None:
        """Keep of a stretch of a file only what was asked for: much may lie between."""
        part = job.parts[group[0][0]]
        file: File = group[0][1].file
        with _about(part.key if isinstance(part, Compute) else None):
            data = memoryview(read_exactly(self.handles.descriptor(file), end - begin, begin, file.path))
        for index, extent in group:
            found[index] = bytes(data[extent.offset - begin : extent.offset - begin + extent.nbytes])


@contextmanager
def _about(key: str | None) -> Iterator[None]:
    """Errors of a source name the key."""
    try:
        yield
    except InputError as error:
        error.key = error.key or key
        raise

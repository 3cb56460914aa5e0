"""Which bytes go where: a layout as jobs, in the order in which their sources lie in their files.

Pure: no byte is read.  Bytes that stay as they are become copies, neighbours one copy; what is small
is put together in memory, window by window; the rest is computed piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.formats import PAGES
from ckptsurgeon.sources import Apply, Extent, File, Pieces
from ckptsurgeon.stream.digests import Digest, Digests, Range
from ckptsurgeon.tensor import TensorRef

SMALL = 64 << 10
"""Bytes of a part up to which a system call of its own costs more than the bytes."""
WINDOW = 4 << 20
"""Bytes that are put together in memory at most."""
STEP = 32 << 20
"""Bytes of one copy or checksum: what threads share among them."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor's place in the output; `key` is its name, for errors, and `sums` what its checksum is made
    of, in order, where the output has one."""

    offset: int
    ref: TensorRef
    key: str | None = None
    sums: list[Digest] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Copy:
    """`nbytes` from `begin` of a file to `offset` of the output; with a `digest` they are summed up on the
    way, at byte `at` of it."""

    file: File
    begin: int
    nbytes: int
    offset: int
    key: str | None
    digest: Digest | None = None
    at: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """`nbytes` from `begin` of a file are summed up, at byte `at` of a digest."""

    file: File
    begin: int
    nbytes: int
    at: int
    digest: Digest
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Compute:
    """A tensor that is made piece by piece, from `offset` of the output on; `digests` are to have its sum."""

    ref: TensorRef
    offset: int
    key: str | None
    digests: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True)
class Assemble:
    """Literal bytes and small tensors, end to end from `offset` on."""

    offset: int
    parts: tuple[bytes | Compute, ...]


Job = Copy | Check | Compute | Assemble


def leaves(ref: TensorRef) -> Iterator[TensorRef]:
    """What a tensor consists of, end to end, once everything is taken off that changes no byte."""
    source = ref.source
    if isinstance(source, Pieces):
        for part in source.parts:
            yield from leaves(part)
    elif isinstance(source, Apply) and source.kernel.moves_only:
        yield from leaves(source.inputs[0])
    else:
        yield ref


def is_plain(ref: TensorRef) -> bool:
    """Whether a tensor's bytes lie in a file as they are to be written."""
    source = ref.source
    return (
        isinstance(source, Extent)
        and ref.nbytes > 0
        and source.codec is None
        and source.strides is None
        and (source.byteorder == "little" or ref.dtype.bits <= 8)
    )


def schedule(parts: Iterable[tuple[int, bytes | Part]], sums: bool, digests: Digests, most: int = WINDOW) -> list[Job]:
    """The jobs that make a file of `parts`, each with its offset; `sums` tells whether tensors need checksums,
    and `most` are the bytes of a window."""
    made = _Jobs(sums, digests, most)
    for offset, part in parts:
        if isinstance(part, bytes):
            made.literal(offset, part)
        else:
            made.tensor(part)
    return _in_file_order(made.finish())


class _Jobs:
    def __init__(self, sums: bool, digests: Digests, most: int) -> None:
        self.sums, self.digests, self.most = sums, digests, most
        self.jobs: list[Job] = []
        self.window: list[bytes | Compute] = []
        self.begin = self.size = 0
        self.run: list[tuple[int, TensorRef, Extent, Part]] = []
        self.summed: set[Range] = set()

    def literal(self, offset: int, data: bytes) -> None:
        self._end_run()
        self._small(offset, data, len(data))

    def tensor(self, part: Part) -> None:
        for extent in part.ref.extents():
            self.digests.expect(extent, part.key)
        offset = part.offset
        for leaf in leaves(part.ref):
            if is_plain(leaf) and isinstance(leaf.source, Extent):
                if not self._goes_on(leaf.source, offset):
                    self._end_run()
                self.run.append((offset, leaf, leaf.source, part))
            else:
                self._end_run()
                self._computed(offset, leaf, part)
            offset += leaf.nbytes

    def finish(self) -> list[Job]:
        self._end_run()
        self._end_window()
        for place, digest in self.digests.ranges.items():
            if place not in self.summed and place[2]:
                self.jobs.append(Check(*place, 0, digest))
        return self.jobs

    def _goes_on(self, extent: Extent, offset: int) -> bool:
        """Whether bytes follow the last ones in both files."""
        if not self.run:
            return False
        at, _, last, _ = self.run[-1]
        return extent.file == last.file and extent.offset == last.offset + last.nbytes and offset == at + last.nbytes

    def _end_run(self) -> None:
        run, self.run = self.run, []
        total = sum(extent.nbytes for _, _, extent, _ in run)
        if total <= SMALL:
            for offset, leaf, extent, part in run:
                self._computed(offset, leaf, part, extent)
            return
        self._end_window()
        if self.sums:
            for _, _, extent, part in run:
                part.sums.append(self.digests.of(extent.file, extent.offset, extent.nbytes))
        offset, _, first, part = run[0]
        place = (first.file, first.offset, total)
        digest = self.digests.ranges.get(place) if (offset - first.offset) % PAGES else None
        if digest is not None:  # they are read for their sum anyway, and the kernel is slow where places differ
            self.summed.add(place)
        self.jobs.append(Copy(*place, offset, part.key, digest))

    def _computed(self, offset: int, leaf: TensorRef, part: Part, extent: Extent | None = None) -> None:
        digests = []
        if self.sums:
            digests.append(Digest())
            part.sums.append(digests[0])
        if extent is not None:
            place = (extent.file, extent.offset, extent.nbytes)
            if place in self.digests.ranges:  # its record is proven on the way
                digests.append(self.digests.ranges[place])
                self.summed.add(place)
        job = Compute(leaf, offset, part.key, tuple(digests))
        if leaf.nbytes <= SMALL:
            self._small(offset, job, leaf.nbytes)
        else:
            self._end_window()
            self.jobs.append(job)

    def _small(self, offset: int, part: bytes | Compute, nbytes: int) -> None:
        if self.window and self.size + nbytes > self.most:
            self._end_window()
        if not self.window:
            self.begin, self.size = offset, 0
        self.window.append(part)
        self.size += nbytes

    def _end_window(self) -> None:
        if self.window:
            self.jobs.append(Assemble(self.begin, tuple(self.window)))
        self.window = []


def _in_file_order(jobs: Sequence[Job]) -> list[Job]:
    """Reads go forward through each file; copies come in steps, each before the sum of the same bytes."""
    order: dict[str, int] = {}

    def place(job: Job) -> tuple[int, int, int]:
        extent = _first(job)
        if extent is None:
            return -1, 0, 0
        file, begin = extent
        return order.setdefault(file.path, len(order)), begin, isinstance(job, Check)

    cut: list[Job] = []
    for job in jobs:
        if not isinstance(job, Copy | Check) or job.nbytes <= STEP:
            cut.append(job)
            continue
        for at in range(0, job.nbytes, STEP):
            count = min(STEP, job.nbytes - at)
            if isinstance(job, Copy):
                cut.append(Copy(job.file, job.begin + at, count, job.offset + at, job.key, job.digest, at))
            else:
                cut.append(Check(job.file, job.begin + at, count, at, job.digest, job.key))
    return sorted(cut, key=place)


def _first(job: Job) -> tuple[File, int] | None:
    """Where the first source of a job lies."""
    if isinstance(job, Copy | Check):
        return job.file, job.begin
    refs = [job.ref] if isinstance(job, Compute) else [part.ref for part in job.parts if isinstance(part, Compute)]
    for ref in refs:
        for extent in ref.extents():
            return extent.file, extent.offset
    return None

"""Whether a checkpoint is whole: its header, its checksums, and every byte of its tensors.

What a header claims is checked when a file is opened, and an index is held against its shards
then; here the bytes themselves are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptsurgeon import charges, evaluate, formats
from ckptsurgeon.errors import InputError, Problem
from ckptsurgeon.formats import Document
from ckptsurgeon.provenance import Provenance
from ckptsurgeon.sources import Extent
from ckptsurgeon.tensor import TensorRef

if TYPE_CHECKING:
    from ckptsurgeon.differ import Diff
    from ckptsurgeon.orphans import Orphan
    from ckptsurgeon.proofs import Proof

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    """What was found: `tensors` that were read and their `nbytes` in the file, `checksums` that were
    held against their bytes, tensors whose bytes the file does not hold (`absent`: sparse, meta …),
    `remarks` on what is odd but can be read, and `problems`.  `against` is the comparison with another
    file, where one was asked for, and `proof` that with what a recipe makes of it; `repaired` says what a repair did
    before.  `orphans` lie beside the file and are no part of it; `provenance` is what the file says of itself; `digest`
    that of its contents, where it was asked for or recorded; `nan_inf` are names of tensors with the
    counts of their NaN and infinities; `made_of_it` tells, where values differ, whether the file says that the other
    one was its source."""

    path: str
    format: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    checksums: int
    absent: tuple[str, ...]
    remarks: tuple[str, ...]
    problems: tuple[Problem, ...]
    against: Diff | None = None
    repaired: tuple[str, ...] = ()
    proof: Proof | None = None
    orphans: tuple[Orphan, ...] = ()
    provenance: Provenance | None = None
    digest: str | None = None
    nan_inf: tuple[tuple[str, int, int], ...] | None = None
    made_of_it: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether the file is whole."""
        return not self.problems


def verify(document: Document, progress: Progress | None = None) -> Verification:
    """Read every member and every tensor of a file once; all problems are collected.

    Memory stays flat; nothing is run, and no torch is needed.
    """
    found = list(document.tensors())
    names = _names(found)
    files = document.shards or (document.path,)
    stretches = list(_stretches(files, found))
    charges.inflating(stretches)
    total, done = sum(extent.nbytes for extent in stretches), 0
    problems: list[Problem] = []
    for extent in stretches:
        try:
            _read(extent)
        except InputError as error:
            key = names.get(_identity(extent))
            error.key = error.key or key
            problems.append(Problem(str(error), key=key, kind="damaged"))
        done += extent.nbytes
        if progress is not None:
            progress(done, total)
    return Verification(
        document.path,
        document.format,
        files,
        len({id(ref.source) for _, ref in found if ref.absent is None}),
        total,
        sum(extent.record is not None and extent.record.crc is not None for extent in stretches),
        tuple(name for name, ref in found if ref.absent is not None),
        (*document.interrupted, *document.remarks),
        tuple(problems),
        provenance=document.provenance,
    )


def _stretches(files: tuple[str, ...], found: list[tuple[str, TensorRef]]) -> Iterator[Extent]:
    """All members of archives, then what tensors take of other files, each stretch once."""
    seen: set[Hashable] = set()
    for path in files:
        if os.path.isfile(path):
            for extent in formats.members(path):
                seen.add(_identity(extent))
                yield extent
    for _, ref in found:
        for extent in ref.extents():
            whole = _whole(extent)
            if _identity(whole) not in seen:
                seen.add(_identity(whole))
                yield whole


def _identity(extent: Extent) -> Hashable:
    whole = _whole(extent)
    return whole.file.path, whole.codec, whole.offset, whole.nbytes


def _whole(extent: Extent) -> Extent:
    """The storage that an extent is a part of, or the extent without strides where there are no storages."""
    record = extent.record
    begin, nbytes = (extent.offset, extent.nbytes) if record is None else (record.offset, record.nbytes)
    return Extent(extent.file, begin, nbytes, codec=extent.codec, record=record)


def _names(found: list[tuple[str, TensorRef]]) -> dict[Hashable, str]:
    names: dict[Hashable, str] = {}
    for name, ref in found:
        for extent in ref.extents():
            names.setdefault(_identity(extent), name)
    return names


def _read(extent: Extent) -> None:
    if extent.record is not None and extent.record.crc is not None:
        evaluate.check_record(extent)
    else:
        evaluate.read_through(extent)

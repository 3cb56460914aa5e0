"""Where the bytes of a tensor are, or how they are made.

`Source` is a closed union: `Extent` (in a file), `Pieces` (sources end to end), `Inline` (here),
`Fill` (made by an initialiser), `Apply` (made by an operation from other tensors), `Absent` (there
are no such bytes: sparse, meta and distributed tensors, which can be listed only).  All are
frozen and compare by value: two names whose sources are equal share their storage ("tied").
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from ckptsurgeon.errors import InputError

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.dtypes import DType
    from ckptsurgeon.tensor import TensorRef, TensorSpec


@dataclass(frozen=True)
class File:
    """A file as it was when it was opened, so that a later read notices a change.

    `size` in bytes, `mtime` in nanoseconds.
    """

    path: str
    size: int
    mtime: int
    inode: int

    @classmethod
    def of(cls, path: str, stat: os.stat_result) -> File:
        return cls(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def open(self) -> int:
        """A read-only descriptor; InputError when the file is gone or is no longer the same."""
        descriptor = -1
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            same = File.of(self.path, os.fstat(descriptor)) == self
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise InputError(f"cannot be read: {error.strerror}", path=self.path) from error
        if not same:
            os.close(descriptor)
            raise InputError("changed since it was opened", path=self.path, hint="open it again")
        return descriptor

    def check(self) -> None:
        """InputError when the path no longer leads to the file as it was."""
        try:
            same = File.of(self.path, os.stat(self.path)) == self
        except OSError:
            same = False
        if not same:
            raise InputError("changed while it was read", path=self.path, hint="try it again")


@dataclass(frozen=True)
class Deflate:
    """A compressed zip member: `start` and `nbytes` of its compressed bytes in the file."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """The stretch of a file that holds one whole storage: `nbytes` from byte `offset`, with the
    CRC-32 of them where the file has one.  In a compressed member `offset` is 0."""

    name: str
    offset: int
    nbytes: int
    crc: int | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes in a file.

    `offset` is the byte of the first element, `nbytes` the span up to the end of the last one.
    `strides` are in elements; None means that the elements lie contiguous and in order.
    With a `Deflate` codec, `offset` counts inside the inflated member.  `record` is the storage
    of which they are a part, where the format has storages.
    """

    file: File
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    byteorder: Literal["little", "big"] = "little"
    codec: Deflate | None = None
    record: Record | None = None

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def is_whole(self) -> bool:
        """Whether this is a whole record, read from its first byte to its last."""
        record = self.record
        return (
            record is not None and self.strides is None and (self.offset, self.nbytes) == (record.offset, record.nbytes)
        )


@dataclass(frozen=True)
class Pieces:
    """The bytes of several tensors, laid end to end."""

    parts: tuple[TensorRef, ...]

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Where each part begins, in rows, and the end; and the shape of a row.  None where parts are no rows alike."""
        shapes = {part.shape[1:] for part in self.parts}
        if len(shapes) != 1 or not all(part.shape for part in self.parts):
            return None
        starts = tuple(accumulate((part.shape[0] for part in self.parts), initial=0))
        return starts, next(iter(shapes))


@dataclass(frozen=True)
class Inline:
    """Bytes that are here: contiguous and little-endian."""

    data: bytes


class Initializer(Protocol):
    """Makes the values of a new tensor; `holds` says how many bytes of memory that takes at most (a model
    is built whole)."""

    @property
    def holds(self) -> int: ...
    def make(self, spec: TensorSpec, seed: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Fill:
    """Values made by an initialiser from a seed."""

    init: Initializer
    seed: int


class Kernel(Protocol):
    """What an operation does to values; a kernel inherits from it and says what applies.

    `elementwise` kernels make each output element from the input element at the same place, so that
    they can run block by block.  `moves_only` kernels change no byte at all: their output is their
    first input, under another identity.  `views` kernels give the elements of their input in another
    order, which `on_extent` says in strides once the input lies in a file.  The elements of kernels that
    `moves` are elements of their inputs, bit for bit.  `slope` is the derivative of an elementwise kernel's outputs by
    its inputs, where that is one number: what training knows of the input holds of the output, times powers of it.
    """

    __slots__ = ()
    elementwise: ClassVar[bool] = False
    moves_only: ClassVar[bool] = False
    views: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    @property
    def slope(self) -> float | None:
        return None

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The output, of whole inputs; of an elementwise kernel, of a flat block of them."""
        ...

    def on_bytes(self, data: memoryview, dtype: DType) -> memoryview | None:
        """An elementwise kernel on little-endian bytes, without torch; None where it needs torch."""
        return None

    def on_extent(self, ref: TensorRef) -> TensorRef:
        """The output of a `views` kernel for an input whose bytes lie in a file."""
        raise AssertionError(f"{type(self).__name__} makes no view")

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        """The inputs from which this kernel makes the rows `begin` to `end` of its output (along the first
        dimension); None where it needs all of them."""
        return None


@dataclass(frozen=True)
class Apply:
    """The result of an operation on other tensors."""

    kernel: Kernel
    inputs: tuple[TensorRef, ...]


@dataclass(frozen=True, eq=False)
class Absent:
    """A tensor that the file describes without holding its dense bytes.

    Compared by identity: parts may be made of parts, and those of the same ones again and again.

    `form` says what it is ("a sparse tensor (COO)"), `parts` name the tensors that it is made of;
    `closed` tells whether they are all that there is to it.
    """

    form: str
    parts: tuple[tuple[str, TensorRef], ...] = ()
    closed: bool = False


Source = Extent | Pieces | Inline | Fill | Apply | Absent


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor of `shape`.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in order without gaps; dimensions of size 1 never matter."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one, both included; 0 when there are none."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))

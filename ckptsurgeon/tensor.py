"""`TensorSpec` (dtype and shape) and `TensorRef` (spec and source).

Plans are made on specs alone; `TensorRef.read` and `TensorRef.blocks` are where bytes are touched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ckptsurgeon import evaluate, indexing
from ckptsurgeon.dtypes import DType
from ckptsurgeon.limits import BLOCK
from ckptsurgeon.sources import (
    Absent,
    Apply,
    Extent,
    Fill,
    Inline,
    Kernel,
    Pieces,
    Source,
    contiguous_strides,
    is_contiguous,
    span,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, without its values: element type and shape."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the contiguous tensor."""
        return self.dtype.nbytes(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"


Role = Literal["parameter", "buffer", "tensor"]
"""What a model does with a tensor: trains it, only keeps it, or not known."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How the tensor lay in its file: the device it was saved from, the bytes of its whole
    storage (of which it may be a small view), what it was to its model, and whether an
    `nn.Parameter` was frozen (`requires_grad` false)."""

    device: str
    nbytes: int
    role: Role = "tensor"
    frozen: bool = False


@dataclass(frozen=True)
class Quantizer:
    """What makes numbers of the integers of a quantised tensor: `scale * (integer - zero_point)`.

    `scheme` is torch's name. Per channel, `scale` and `zero_point` are tensors of shape (channels,)
    and `axis` is the dimension that they go along; per tensor they are numbers and `axis` is None.
    """

    scheme: str
    scale: float | TensorRef
    zero_point: int | TensorRef
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that has not been read: its spec and where its bytes are."""

    spec: TensorSpec
    source: Source
    stored: Stored | None = field(default=None, compare=False)
    quantizer: Quantizer | None = None

    @property
    def dtype(self) -> DType:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def numel(self) -> int:
        return self.spec.numel

    @property
    def nbytes(self) -> int:
        """The bytes of the contiguous tensor; no disk is touched."""
        return self.spec.nbytes

    @property
    def tie(self) -> Hashable | None:
        """What names that share this storage have in common; None where nothing can be shared.

        Equal sources are not enough: of two views with the same strides one may be longer.
        """
        if not isinstance(self.source, Extent | Apply | Fill | Pieces) or not self.nbytes:
            return None
        strided = isinstance(self.source, Extent) and self.source.strides is not None
        view = tuple(size for size in self.shape if size != 1) if strided else self.numel
        return self.source, view, self.quantizer

    @property
    def absent(self) -> str | None:
        """What the tensor is when the file does not hold its bytes, else None."""
        return self.source.form if isinstance(self.source, Absent) else None

    @property
    def role(self) -> Role:
        """What a model does with it, as far as the file tells."""
        return self.stored.role if self.stored else "tensor"

    @property
    def integers(self) -> TensorRef:
        """A quantised tensor as what is stored, without scale and zero point; any other as it is."""
        if self.quantizer is None:
            return self
        return TensorRef(TensorSpec(self.dtype.plain, self.shape), self.source, self.stored)

    def extents(self) -> Iterator[Extent]:
        """The stretches of files that the tensor is made of."""
        todo = [self]
        while todo:
            source = todo.pop().source
            if isinstance(source, Extent):
                yield source
            elif isinstance(source, Apply):
                todo.extend(source.inputs)
            elif isinstance(source, Pieces):
                todo.extend(source.parts)

    def blocks(self, size: int = BLOCK) -> Iterator[memoryview]:
        """The contiguous little-endian bytes, at most about `size` at a time where that is possible."""
        return evaluate.blocks(self, size)

    def read(self) -> torch.Tensor:
        """The values as a contiguous `torch.Tensor` of `.shape` on the CPU.

        Raises InputError when the file is gone, shorter than it was, no longer the same, or does not
        hold the tensor's bytes.
        """
        if self.quantizer is not None:
            return evaluate.quantized(self)
        buffer = bytearray(self.nbytes)
        self.read_into(memoryview(buffer))
        return evaluate.to_torch(buffer, self.spec)

    def read_into(self, view: memoryview) -> None:
        """Fill memory that is there already, of exactly `.nbytes`, with the contiguous little-endian bytes; of
        a quantised tensor with its integers.

        Raises InputError as `read` does; by then a part of the memory may be filled.
        """
        evaluate.fill(self, view)

    def rows(self, begin: int, end: int) -> TensorRef | None:
        """The rows `begin` to `end` along the first dimension as a tensor of their own; None where they
        cannot be told apart without making the whole."""
        spec, source = TensorSpec(self.dtype, (end - begin, *self.shape[1:])), self.source
        if isinstance(source, Extent):
            return self._part(slice(begin, end))
        if isinstance(source, Fill):
            return TensorRef(spec, Apply(Rows(begin, end), (self,)))
        if isinstance(source, Inline) and self.dtype.bits >= 8:
            row = self.nbytes // self.shape[0] if self.nbytes else 0
            return TensorRef(spec, Inline(source.data[begin * row : end * row]))
        if isinstance(source, Pieces):
            parts = self._rows_of(source, begin, end)
            return None if parts is None else TensorRef(spec, Pieces(parts))
        if not isinstance(source, Apply):
            return None
        inputs = source.kernel.rows(source.inputs, begin, end)
        if source.kernel.elementwise and source.inputs[0].shape == self.shape:
            part = source.inputs[0].rows(begin, end)
            inputs = None if part is None else (part,)
        return None if inputs is None else TensorRef(spec, Apply(source.kernel, inputs))

    def _rows_of(self, source: Pieces, begin: int, end: int) -> tuple[TensorRef, ...] | None:
        """The parts that hold some rows, where each part is rows of the whole."""
        found = source.rows
        if found is None or found[1] != self.shape[1:]:
            return None
        starts, parts = found[0], []
        for place in range(bisect_right(starts, begin) - 1, len(source.parts)):
            if starts[place] >= end:
                break
            part = source.parts[place]
            first, last = max(begin - starts[place], 0), min(end - starts[place], part.shape[0])
            if first < last:
                rows = part if (first, last) == (0, part.shape[0]) else part.rows(first, last)
                if rows is None:
                    return None
                parts.append(rows)
        return tuple(parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The values as a NumPy array, for `np.asarray`; TypeError for dtypes that NumPy lacks."""
        made = self.read().numpy()
        return made if dtype is None else made.astype(dtype)

    __iter__: ClassVar[None] = None
    """Not iterable: a loop over `ref[0]`, `ref[1]` … would read the file once for each of them."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """`read()[index]`, in memory of its own; a basic index (integers, slices, `...`, None) of an
        uncompressed tensor in a file reads only the bytes that it spans.

        Raises IndexError (naming the shape) and ValueError as torch does, and InputError as `read`.
        """
        part = self._part(index)
        return self.read()[index] if part is None else part.read()

    def _part(self, index: Any) -> TensorRef | None:
        """The part of the file that an index means; None where the tensor must be read as a whole."""
        extent = self.source
        if not isinstance(extent, Extent) or extent.codec is not None or self.quantizer is not None:
            return None
        if self.dtype.bits < 8 or not self.nbytes:
            return None
        view = indexing.view(self.shape, extent.strides or contiguous_strides(self.shape), index)
        if view is None:
            return None
        item = self.dtype.itemsize
        strides = None if 0 in view.shape or is_contiguous(view.shape, view.strides) else view.strides
        nbytes = span(view.shape, view.strides) * item
        source = replace(extent, offset=extent.offset + view.offset * item, nbytes=nbytes, strides=strides)
        return replace(self, spec=TensorSpec(self.dtype, view.shape), source=source)

    def __repr__(self) -> str:
        device = "" if self.stored is None or self.stored.device == "cpu" else f", {printable(self.stored.device)}"
        return f"TensorRef({self.spec}, {self.nbytes:,} bytes{device}, {self._where})"

    @property
    def _where(self) -> str:
        if isinstance(self.source, Extent):
            inflated = "" if self.source.codec is None else " of a compressed member"
            return f"{printable(self.source.path)} at byte {self.source.offset:,}{inflated}"
        if self.absent is not None:
            return f"no bytes: {printable(self.absent)}"
        return "in memory" if isinstance(self.source, Inline) else "computed"


@dataclass(frozen=True, slots=True)
class Rows(Kernel):
    """Some rows of a tensor that its initialiser can only make whole, and keeps."""

    begin: int
    end: int
    moves: ClassVar[bool] = True

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0][self.begin : self.end]


def printable(text: str) -> str:
    """`text`, quoted and escaped if it holds characters that do not print."""
    return text if text.isprintable() else ascii(text)


def only_ones_differ(a: Iterable[int], b: Iterable[int]) -> bool:
    """Whether two shapes are the same but for dimensions of size 1.

    >>> only_ones_differ((64, 3, 1, 7, 7), (64, 3, 7, 7)), only_ones_differ((2, 3), (3, 2))
    (True, False)
    """
    return [size for size in a if size != 1] == [size for size in b if size != 1]

"""Values put into live tensors, wherever they are and however they lie, none held twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from ckptsurgeon import evaluate
from ckptsurgeon.errors import InputError
from ckptsurgeon.evaluate import Handles
from ckptsurgeon.finetune._local import is_plain, local
from ckptsurgeon.limits import BLOCK
from ckptsurgeon.planner import Overlap
from ckptsurgeon.sources import Apply
from ckptsurgeon.stream import budget, workers
from ckptsurgeon.tensor import TensorRef

if TYPE_CHECKING:
    import torch

_ALONE = 1 << 20
"""Bytes up to which a second thread is not worth its start."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part of a tensor begins, and its sizes, in each dimension."""


@dataclass(frozen=True)
class Place:
    """A tensor of a model and what it is to hold.  `offset` is where its first element lies in `ref`."""

    key: str
    tensor: torch.Tensor
    ref: TensorRef
    offset: tuple[int, ...]


def part_of(ref: TensorRef) -> TensorRef | None:
    """What a checkpoint brings of a tensor that it brings a part of, from the first element of every dimension; None
    for what it brings whole."""
    if isinstance(ref.source, Apply) and isinstance(ref.source.kernel, Overlap):
        return ref.source.inputs[0]
    return None


def place(key: str, value: torch.Tensor, ref: TensorRef) -> Place:
    """Where `ref` goes: of a tensor that is spread over processes into the part that is here; of what a checkpoint
    brings a part of, into that part alone: the rest stays as it is, and is not rounded to the checkpoint's dtype."""
    ref = part_of(ref) or ref
    tensor, offset = local(value)
    if offset is None:
        return Place(key, tensor, ref, (0,) * len(ref.shape))
    if tensor.numel() and not any(offset[1:]) and tensor.shape[1:] == ref.shape[1:]:
        rows = ref.rows(offset[0], min(offset[0] + tensor.shape[0], ref.shape[0]))
        if rows is not None:
            return Place(key, tensor, rows, (0,) * len(ref.shape))
    return Place(key, tensor, ref, offset)


def fill(places: Sequence[Place], proven: bool = False) -> None:
    """Read everything into its place, in the order of the files, on as many threads as there are processors (up to
    four); records of zips are held against their checksums when they are to be `proven`.

    Raises InputError with the key, and says how much was loaded by then.
    """
    left, lock = {each.key: each.ref.nbytes for each in places}, threading.Lock()
    with Handles() as handles:

        def work() -> Iterator[workers.Work]:
            for each in sorted(places, key=_in_file):
                for nbytes, call in calls(each, proven):
                    yield partial(one, each.key, nbytes, call)

        def one(key: str, nbytes: int, call: Callable[[Handles], None]) -> None:
            try:
                call(handles)
            except InputError as error:
                error.key = error.key or key
                raise
            except Exception as error:
                error.add_note(f"while {key!r} was loaded")
                raise
            with lock:
                left[key] -= nbytes

        try:
            workers.run(work(), budget().jobs if sum(left.values()) > _ALONE else 1)
            for file in handles.files:
                file.check()
        except Exception as error:
            done = sum(not nbytes for nbytes in left.values())
            words = f"the model is partly loaded, {done} of {len(left)} tensors: load it again before it is used"
            if isinstance(error, InputError):
                error.hint = words if error.hint is None else f"{error.hint}; {words}"
            else:
                error.add_note(words)
            raise


def _in_file(each: Place) -> tuple[str, int]:
    return min(((extent.path, extent.offset) for extent in each.ref.extents()), default=("", 0))


def calls(each: Place, proven: bool) -> Iterator[tuple[int, Callable[[Handles], None]]]:
    """What fills a place: how many bytes of the source each call takes, and the call."""
    tensor, ref = each.tensor, each.ref
    if not tensor.numel():
        yield ref.nbytes, lambda handles: None
    elif not is_plain(tensor) or ref.quantizer is not None or ref.dtype.bits < 8:
        yield ref.nbytes, lambda handles: _changed(tensor, lambda: tensor.copy_(ref.read()))
    elif (view := _memory(tensor, ref)) is not None:
        for nbytes, call in evaluate.calls(ref, view, proven):
            yield nbytes, partial(_read, tensor, call)
    elif tuple(tensor.shape) == ref.shape and tensor.is_contiguous():
        for nbytes, call in evaluate.handed(ref, partial(_cast, tensor.view(-1), ref.dtype.name), proven):
            yield nbytes, partial(_read, tensor, call)
    else:
        yield ref.nbytes, lambda handles: _changed(tensor, lambda: _copied(each, handles))


def _memory(tensor: torch.Tensor, ref: TensorRef) -> memoryview | None:
    """The bytes of a tensor, to be read into; None where they are not those of `ref` in order."""

    same = str(tensor.dtype) == f"torch.{ref.dtype.name}" and tuple(tensor.shape) == ref.shape
    ready = tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    if not same or not ready:
        return None
    return evaluate.memory_of(tensor)


def _read(tensor: torch.Tensor, call: Callable[[Handles], None], handles: Handles) -> None:
    _changed(tensor, lambda: call(handles))


def _changed(tensor: torch.Tensor, change: Callable[[], object]) -> None:
    """Change a tensor as autograd must know of it: a backward pass that had saved it says so, and computes nothing."""
    import torch

    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        change()
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _cast(flat: torch.Tensor, dtype: str, at: int, data: memoryview) -> None:
    """Copy a stretch of bytes, with a cast, to any device."""
    block = evaluate.from_buffer(data, dtype)
    begin = at // block.itemsize
    flat[begin : begin + len(block)].copy_(block)


def _copied(each: Place, handles: Handles) -> None:
    """Copy block by block, with a cast, to any device and layout."""
    tensor, ref, offset = each.tensor, each.ref, each.offset
    taken = _Taken(evaluate.blocks(ref, BLOCK, handles))
    for starts, sizes in boxes(ref.shape, BLOCK // ref.dtype.itemsize):
        data = taken.next(prod(sizes) * ref.dtype.itemsize)
        begins = [max(a, b) for a, b in zip(starts, offset, strict=True)]
        ends = [min(a + size, b + there) for a, size, b, there in zip(starts, sizes, offset, tensor.shape, strict=True)]
        if all(begin < end for begin, end in zip(begins, ends, strict=True)):
            block = evaluate.from_buffer(data, ref.dtype.name).view(sizes)
            tensor[_slices(begins, ends, offset)].copy_(block[_slices(begins, ends, starts)])


def _slices(begins: Sequence[int], ends: Sequence[int], base: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(begin - at, end - at) for begin, end, at in zip(begins, ends, base, strict=True))


def boxes(shape: tuple[int, ...], most: int) -> Iterator[Box]:
    """Boxes of at most `most` elements that a tensor consists of, in the order in which its elements lie.

    >>> list(boxes((2, 3), 2))
    [((0, 0), (1, 2)), ((0, 2), (1, 1)), ((1, 0), (1, 2)), ((1, 2), (1, 1))]
    """
    if not shape:
        yield (), ()
        return
    first, inner = shape[0], shape[1:]
    row = prod(inner)
    if row <= most:
        step = most // max(1, row)
        for begin in range(0, first, step):
            yield (begin, *(0 for _ in inner)), (min(step, first - begin), *inner)
        return
    for begin in range(first):
        for starts, sizes in boxes(inner, most):
            yield (begin, *starts), (1, *sizes)


class _Taken:
    """Consecutive bytes in stretches of any size, copied only where blocks end within one."""

    def __init__(self, blocks: Iterator[memoryview]) -> None:
        self._blocks, self._block = blocks, memoryview(b"")

    def next(self, nbytes: int) -> memoryview | bytearray:
        """The next `nbytes`."""
        if not self._block:
            self._block = next(self._blocks)
        if len(self._block) >= nbytes:
            made, self._block = self._block[:nbytes], self._block[nbytes:]
            return made
        held = bytearray()
        while len(held) < nbytes:
            self._block = self._block or next(self._blocks)
            part = self._block[: nbytes - len(held)]
            held += part
            self._block = self._block[len(part) :]
        return held

"""What reading tensors, or writing each of them in full, may cost of what their files hold.

A few bytes in a file can be many tensors: views that overlap, or that repeat what they lie on; and what lies far behind
in a compressed record is inflated from its beginning, for each of them anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from ckptsurgeon.errors import LimitError
from ckptsurgeon.evaluate import cost
from ckptsurgeon.limits import current
from ckptsurgeon.sources import Extent
from ckptsurgeon.tensor import TensorRef


def reading(refs: Iterable[TensorRef], width: int = 0) -> None:
    """LimitError where reading these tensors one by one, tied ones once, takes many times what their files hold; each
    element counts as `width` bytes at least."""
    each = {ref.tie or id(ref): ref for ref in refs if ref.absent is None}
    total = sum(max(ref.nbytes, ref.numel * width, _read(ref)) for ref in each.values())
    _check(each.values(), total, "to read its tensors one by one takes {} bytes, of {} that the file has for them")


def writing(refs: Iterable[TensorRef], nbytes: int) -> None:
    """LimitError where an output of `nbytes` is many times what the files of these tensors hold, or takes as long."""
    each = list(refs)
    words = "its tensors, each in full (a .pth, or --tied alias, keeps what is shared), take {} bytes, of {} that the "
    total = nbytes + sum(max(0, _gathered(ref) - ref.nbytes) for ref in each)
    _check(each, total, f"{words}file has for them")


def inflating(extents: Iterable[Extent]) -> None:
    """LimitError where compressed records are many times as large as what they are compressed to."""
    limits = current()
    packed = {extent.codec: (extent.nbytes, extent.path) for extent in extents if extent.codec is not None}
    total, held = sum(nbytes for nbytes, _ in packed.values()), sum(codec.nbytes for codec in packed)
    if total > limits.view_bytes and total > limits.view_ratio * held:
        _, path = next(iter(packed.values()))
        cause = f"compressed records of {total} bytes, in {held} of the file"
        raise LimitError(cause, "view_bytes", limits.view_bytes, path=path)


def _read(ref: TensorRef) -> int:
    """What is read, and of compressed records what comes out before the last byte of a tensor."""
    return _gathered(ref) + sum(extent.offset + extent.nbytes for extent in ref.extents() if extent.codec is not None)


def _gathered(ref: TensorRef) -> int:
    """What is read of elements that do not lie in order."""
    extent = ref.source
    if not isinstance(extent, Extent) or extent.strides is None or extent.codec is not None:
        return 0
    return cost(ref.shape, extent.strides, ref.dtype.itemsize)


def _check(refs: Iterable[TensorRef], total: int, words: str) -> None:
    limits = current()
    if total <= limits.view_bytes:
        return
    there: dict[Hashable, int] = {}
    path = None
    for ref in refs:
        made_of_none = True
        for extent in ref.extents():
            made_of_none, path = False, path or extent.path
            place, nbytes = _storage(extent)
            there[place] = nbytes
        if made_of_none:
            there[id(ref)] = ref.nbytes
    held = sum(there.values())
    if total > limits.view_ratio * held:
        raise LimitError(words.format(total, held), "view_bytes", limits.view_bytes, path=path)


def _storage(extent: Extent) -> tuple[Hashable, int]:
    """The storage that an extent is a part of, and the bytes that it takes in its file."""
    if extent.codec is not None:
        return (extent.path, extent.codec), extent.codec.nbytes
    if extent.record is not None:
        return (extent.path, extent.record.offset, extent.record.nbytes), min(extent.record.nbytes, extent.file.size)
    return (extent.path, extent.offset, extent.nbytes), min(extent.nbytes, extent.file.size)

"""Basic indexing as arithmetic on offset and strides, so that a part of a tensor is read alone.

Sources: the torch documentation ("Tensor Indexing"), the Python reference on `slice.indices`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class View:
    """A part of a tensor: `offset` of its first element and `strides`, in elements, and its shape."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def view(shape: tuple[int, ...], strides: tuple[int, ...], index: Any) -> View | None:
    """What `tensor[index]` is of a tensor with these strides, for a basic index: integers, slices
    with a positive step, `...` (once) and None, alone or in a tuple.  None for any other index.

    Raises IndexError for a number that is out of range and for too many of them, and ValueError for
    a step that is not positive, as torch does.

    >>> view((4, 3), (3, 1), (slice(1, None, 2), -1))
    View(offset=5, shape=(2,), strides=(6,))
    """
    words = index if isinstance(index, tuple) else (index,)
    if not all(_is_basic(word) for word in words) or sum(word is ... for word in words) > 1:
        return None
    used = sum(word is not None and word is not ... for word in words)
    if used > len(shape):
        raise IndexError(f"too many indices for a tensor of shape {list(shape)}: {used}")
    rest = (slice(None),) * (len(shape) - used)
    at = next((i for i, word in enumerate(words) if word is ...), len(words))
    dims = iter(enumerate(zip(shape, strides, strict=True)))
    offset, sizes, steps = 0, [], []
    for word in (*words[:at], *rest, *words[at + 1 :]):
        if word is None:
            sizes.append(1)
            steps.append(0)
            continue
        dim, (size, stride) = next(dims)
        if isinstance(word, slice):
            start, count, step = _range(word, size)
            offset += start * stride
            sizes.append(count)
            steps.append(step * stride)
        elif not -size <= word < size:
            raise IndexError(f"index {word} is out of range for dimension {dim} of a tensor of shape {list(shape)}")
        else:
            offset += word % size * stride
    return View(offset if 0 not in sizes else 0, tuple(sizes), tuple(steps))


def _is_basic(word: Any) -> bool:
    if isinstance(word, slice):
        return all(part is None or type(part) is int for part in (word.start, word.stop, word.step))
    return word is None or word is ... or type(word) is int


def _range(part: slice, size: int) -> tuple[int, int, int]:
    """The first element, the number of elements and the step of a slice."""
    if part.step is not None and part.step <= 0:
        raise ValueError(f"the step of a slice must be greater than zero, not {part.step}")
    start, stop, step = part.indices(size)
    return start, len(range(start, stop, step)), step

"""The digest of a checkpoint's contents: names, dtypes, shapes and every byte, whatever file they lie in."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial

from ckptsurgeon import charges, formats
from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.errors import InputError
from ckptsurgeon.provenance import line
from ckptsurgeon.stream import workers
from ckptsurgeon.stream.budget import Budget
from ckptsurgeon.tensor import TensorRef

_USUAL = Budget()


def content_digest(
    ckpt: Checkpoint, budget: Budget = _USUAL, progress: Callable[[int, int], None] | None = None
) -> str:
    """The digest: SHA-256 over a line that names what it is, and then a line for each key.

    The first line is `ckptsurgeon.content/1`; the others are JSON without blanks and of ASCII alone,
    `["key","dtype",[sizes],"SHA-256 of the bytes"]`, sorted by key (by code points); each ends with a newline.  The
    bytes are contiguous and little-endian.  A quantised tensor counts as the integers, scale and zero point that
    safetensors has of it.  Kind, shards, order, ties and metadata do not matter.

    Tensors are read once each, by as many threads as `budget` has, `budget.block` bytes at a time; `progress` is
    called with the bytes read and those to read.  Raises InputError, with the key, for what cannot be read.
    """
    tensors = formats.expanded(ckpt).tensors
    charges.reading(tensors.values())
    one_of: dict[Hashable, str] = {}
    same = {key: one_of.setdefault((ref.tie or key, ref.spec), key) for key, ref in tensors.items()}
    todo = [key for key, first in same.items() if first == key]
    found: dict[str, str] = {}
    done, lock = 0, threading.Lock()
    total = sum(tensors[key].nbytes for key in todo)

    def digest(key: str) -> None:
        nonlocal done
        found[key] = _of(key, tensors[key], budget.block)
        with lock:
            done += tensors[key].nbytes
            if progress is not None:
                progress(done, total)

    workers.run((partial(digest, key) for key in todo), min(budget.jobs, max(1, len(todo))))
    made = hashlib.sha256(b"ckptsurgeon.content/1\n")
    for text in _lines(tensors, {key: found[first] for key, first in same.items()}):
        made.update(text.encode("ascii"))
    return f"sha256:{made.hexdigest()}"


def _of(key: str, ref: TensorRef, block: int) -> str:
    made = hashlib.sha256()
    try:
        for part in ref.blocks(block):
            made.update(part)
    except InputError as error:
        error.key = error.key or key
        raise
    return made.hexdigest()


def _lines(tensors: Mapping[str, TensorRef], found: dict[str, str]) -> Iterator[str]:
    for key in sorted(tensors):
        yield f'[{line(key, tensors[key].spec)},"{found[key]}"]\n'

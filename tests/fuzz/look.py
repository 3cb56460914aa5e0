"""What the program does with a file, and what may come of it: an answer that holds, or an error of our own.

`Broken` is a finding: an answer that contradicts itself, the file, or another reader.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from ckptsurgeon import formats, verifier
from ckptsurgeon.errors import AmbiguousError, CkptError, InputError
from ckptsurgeon.formats import Document
from ckptsurgeon.inert import Opaque
from ckptsurgeon.report import extras, listing, tree
from ckptsurgeon.report._text import shown
from ckptsurgeon.sources import Absent, Apply, Extent, Inline
from ckptsurgeon.tensor import TensorRef

MOST_READ = 1 << 16
_LONGEST_ERROR = 20_000


class Broken(Exception):
    """An answer that must not be."""


def refused(error: CkptError, path: str | None = None) -> None:
    """What an error must be: of the file, in words that can be shown."""
    text = "\n".join(shown(line) for line in str(error).split("\n"))
    if len(text) > _LONGEST_ERROR:
        raise Broken(f"an error of {len(text)} characters: {text[:200]}")
    text.encode()
    if path is not None and isinstance(error, InputError) and error.path is None:
        raise Broken(f"an error that names no file: {text}")


def printed(lines: Iterable[str]) -> None:
    """Lines that a terminal shows as they are, and that any file takes."""
    for line in lines:
        if not line.isprintable():
            raise Broken(f"a line that a terminal would obey: {line[:200]!r}")
        line.encode()


def placed(ref: TensorRef, size: int | None) -> None:
    """A tensor has the bytes that its spec needs, and they lie in its file."""
    spec, source = ref.spec, ref.source
    if not all(type(count) is int and count >= 0 for count in spec.shape):
        raise Broken(f"a shape of {spec.shape!r}")
    if isinstance(source, Inline) and len(source.data) != spec.nbytes:
        raise Broken(f"{spec} with {len(source.data)} bytes")
    if not isinstance(source, Extent):
        return
    if source.offset < 0 or source.nbytes < 0:
        raise Broken(f"bytes at {source.offset}, {source.nbytes} of them")
    end = source.offset + source.nbytes if source.codec is None else source.codec.start + source.codec.nbytes
    if size is not None and spec.nbytes and end > size:
        raise Broken(f"bytes up to {end} of a file of {size}")
    if source.strides is None and source.nbytes != ref.integers.nbytes:
        raise Broken(f"{spec} in {source.nbytes} bytes")


def read(ref: TensorRef) -> None:
    """A small tensor's bytes can be read, or are refused."""
    if ref.nbytes > MOST_READ or isinstance(ref.source, Absent):
        return
    if isinstance(ref.source, Apply) and "torch" not in sys.modules:
        return
    try:
        found = sum(len(block) for block in ref.blocks())
    except CkptError as error:
        refused(error)
        return
    if found != ref.nbytes:
        raise Broken(f"{ref.spec} gave {found} bytes")


def document(found: Document, size: int | None, deep: bool, reads: bool = True) -> list[tuple[str, TensorRef]]:
    """What `ckpt ls` shows of a file; with `deep` also the tree, the rest, the JSON, and what `verify` says."""
    refs: list[tuple[str, TensorRef]] = []
    try:
        ckpt = found.checkpoint()
    except CkptError as error:
        refused(error, found.path)
        if isinstance(error, AmbiguousError):
            printed(listing.candidates_text(found).split("\n"))
    else:
        refs = list(ckpt.items())
        keys, _ = listing.selected(ckpt, None, None)
        printed(listing.lines(ckpt, keys, 0, None))
        printed([repr(ckpt)])
        if deep:
            json.dumps(listing.data(ckpt, keys, 0, None)).encode()
            printed(extras.text(found, ckpt.extras, 20).split("\n"))
    for _, ref in refs[:12]:
        placed(ref, size)
        if reads:
            read(ref)
    if deep:
        _deep(found, reads)
    return refs


def _deep(found: Document, reads: bool) -> None:
    root = tree.tree(found)
    printed(tree.text(root).split("\n"))
    json.dumps(tree.data(found, root)).encode()
    try:
        rest, place = extras.of(found, None)
        json.dumps(extras.data(found, rest, place)).encode()
        found.checkpoint(".")
    except CkptError as error:
        refused(error, found.path)
    if reads:
        for problem in verifier.verify(found).problems:
            printed(shown(line) for line in str(problem).split("\n"))


def file(path: str, deep: bool) -> list[tuple[str, TensorRef]] | None:
    """The same for a path; None where the file is refused."""
    try:
        found = formats.inspect(path)
    except CkptError as error:
        refused(error, path)
        return None
    size = os.stat(path).st_size if os.path.isfile(path) and not found.shards else None
    return document(found, size, deep)


def fingerprint(root: Any, table: dict[Any, int]) -> int:
    """A number that is the same for two trees of equal contents and one `table`; each object is visited once."""
    known: dict[int, int] = {}
    keep: list[Any] = []
    todo: list[tuple[Any, bool]] = [(root, False)]
    while todo:
        value, seen = todo.pop()
        if id(value) in known and not seen:
            continue
        inner = _parts(value)
        if inner and not seen:
            known[id(value)] = -1
            keep.append(value)
            todo += [(value, True), *((part, False) for part in inner)]
            continue
        keep.append(value)
        word = (*_word(value), *(known[id(part)] for part in inner))
        keep.append(inner)
        known[id(value)] = table.setdefault(word, len(table))
    return known[id(root)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        metadata = value.__dict__.get("_metadata") if isinstance(value, OrderedDict) else None
        return [part for pair in value.items() for part in pair] + [metadata] * (metadata is not None)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Opaque):
        return [part for part in (value.args, value.state, value.items, value.pairs) if part is not None]
    return []


def _word(value: Any) -> tuple[Any, ...]:
    if isinstance(value, TensorRef):
        return "tensor", repr((value.spec, value.source, value.stored, value.quantizer))
    if isinstance(value, Opaque):
        parts = (value.args, value.state, value.items, value.pairs)
        return "record", value.name, tuple(part is None for part in parts)
    if isinstance(value, dict | list | tuple):
        return type(value).__name__, len(value)
    if isinstance(value, int) and value.bit_length() > 10_000:
        return "int", value.bit_length(), hash(value)
    if isinstance(value, set | frozenset):
        return type(value).__name__, len(value)
    return type(value).__name__, repr(value)

"""safetensors: an 8-byte length, a JSON header of names, dtypes, shapes and ranges, the bytes.

Source: https://github.com/huggingface/safetensors (README, `safetensors/src/tensor.rs`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import InputError, LimitError, Problem
from ckptsurgeon.evaluate import read_exactly
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._layout import Layout
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.limits import Limits
from ckptsurgeon.sources import Extent, File
from ckptsurgeon.tensor import TensorRef, TensorSpec

NAME = "safetensors"
_UNSUPPORTED = frozenset({"C128", "C32"})
_ALIGN = 8


class _Bad(Exception):
    """A header that the specification forbids (a short cause)."""


def sniff(probe: Probe) -> bool:
    """Whether the file begins with a JSON header behind a plausible length."""
    head = probe.head
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def read(probe: Probe) -> Document:
    """The tensors in the file; InputError when the header is not what the specification allows."""
    file, descriptor, limits = probe.file, probe.descriptor, probe.limits
    length = int.from_bytes(read_exactly(descriptor, 8, 0, file.path), "little")
    if length > limits.safetensors_header:
        raise LimitError(f"a header of {length} bytes, over the limit of {limits.safetensors_header}", path=file.path)
    if 8 + length > file.size:
        raise InputError(f"truncated: a header of {length} bytes in a file of {file.size}", path=file.path)
    raw = bytes(read_exactly(descriptor, length, 8, file.path))
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if not isinstance(header, dict):
            raise _Bad("it is no object")
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = {key: _entry(file, key, entry, 8 + length, limits) for key, entry in header.items()}
        _tile(tensors, 8 + length, file.size)
    except (_Bad, ValueError, RecursionError) as error:
        raise InputError(f"damaged safetensors header: {error}", path=file.path) from None
    return Document(file.path, NAME, tensors, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        raise _Bad(f"the key {next(key for key in names if names.count(key) > 1)!r} stands twice")
    return made


def _no_constant(word: str) -> Any:
    raise _Bad(f"{word} is no JSON")


def _metadata(value: Any) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _Bad("__metadata__ is no map of text to text")
    return value


def _entry(file: File, key: str, entry: Any, base: int, limits: Limits) -> TensorRef:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Bad(f"{key!r} is no entry of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BY_CODE or dtype in _UNSUPPORTED:
        raise _Bad(f"{key!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > limits.dimensions or not all(_is_count(size) for size in shape):
        raise _Bad(f"{key!r} has the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _Bad(f"{key!r} has the data_offsets {offsets!r}")
    begin, end = offsets
    spec = TensorSpec(BY_CODE[dtype], tuple(shape))
    if end < begin or base + end > file.size:
        raise _Bad(f"{key!r} lies at bytes {begin}–{end} of {file.size - base} (a truncated file?)")
    if spec.nbytes != end - begin:
        raise _Bad(f"{key!r} is {spec}, {spec.nbytes} bytes, but lies at bytes {begin}–{end}")
    return TensorRef(spec, Extent(file, base + begin, end - begin))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tile(tensors: Mapping[str, TensorRef], base: int, size: int) -> None:
    """The ranges must fill the file without a hole or an overlap."""
    at = base
    extents = sorted(
        (ref.source.offset, ref.nbytes, key) for key, ref in tensors.items() if isinstance(ref.source, Extent)
    )
    for offset, nbytes, key in extents:
        if offset != at:
            raise _Bad(f"{key!r} begins at byte {offset - base}, where the one before it ends at {at - base}")
        at += nbytes
    if at != size:
        raise _Bad(f"the tensors end at byte {at}, the file at {size}")


def problems(ckpt: Checkpoint) -> list[Problem]:
    """What this format cannot hold."""
    found = [
        Problem(f"safetensors has no dtype {ref.dtype}: {key!r} {list(ref.shape)}; cast it, or write a .pth", key=key)
        for key, ref in ckpt.items()
        if ref.dtype.code in _UNSUPPORTED
    ]
    found += [
        Problem(f"safetensors holds names that are UTF-8, which {key!r} is not; rename it", key=key)
        for key in ckpt
        if not _is_utf8(key)
    ]
    if "__metadata__" in ckpt:
        found.append(Problem("safetensors reserves the key '__metadata__'; rename it", key="__metadata__"))
    return found


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def layout(ckpt: Checkpoint, root: Any) -> Layout:
    """The header, then every tensor in full; `root` is not used (this format holds no extras).

    Tensors lie in the checkpoint's order where that leaves each aligned to its element size;
    otherwise the largest elements come first, as safetensors itself writes them.
    """
    order = list(ckpt)
    if not _aligned(ckpt, order):
        order.sort(key=lambda key: -ckpt[key].dtype.bits)
    begins, at = {}, 0
    for key in order:
        begins[key] = at
        at += ckpt[key].nbytes
    header: dict[str, Any] = {"__metadata__": {**ckpt.metadata, "format": "pt"}}
    for key, ref in ckpt.items():
        place = [begins[key], begins[key] + ref.nbytes]
        header[key] = {"dtype": ref.dtype.code, "shape": list(ref.shape), "data_offsets": place}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % _ALIGN)
    return Layout((len(raw).to_bytes(8, "little") + raw, *(ckpt[key] for key in order)))


def _aligned(ckpt: Checkpoint, order: list[str]) -> bool:
    at = 0
    for key in order:
        if at * 8 % ckpt[key].dtype.bits:
            return False
        at += ckpt[key].nbytes
    return True

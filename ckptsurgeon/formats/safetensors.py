"""safetensors: an 8-byte length, a JSON header of names, dtypes, shapes and ranges, the bytes.

Source: https://github.com/huggingface/safetensors (README, `safetensors/src/tensor.rs`).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import Any

from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.dtypes import BY_CODE, DTYPES
from ckptsurgeon.errors import InputError, LimitError, Problem, brief, quoted
from ckptsurgeon.evaluate import read_exactly
from ckptsurgeon.formats import _provenance, sidefile
from ckptsurgeon.formats._aliases import restored
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._entries import entries
from ckptsurgeon.formats._layout import Layout, shift
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.limits import Limits
from ckptsurgeon.provenance import KEY
from ckptsurgeon.sources import Extent, File, Inline
from ckptsurgeon.tensor import Quantizer, TensorRef, TensorSpec

NAME = "safetensors"
_UNSUPPORTED = frozenset({"C128", "C32"})
_ALIGN = 8
_SHOWN = 8


class _Bad(Exception):
    """A header that the specification forbids (a short cause)."""


def sniff(probe: Probe) -> bool:
    """Whether the file begins with a JSON header behind a plausible length."""
    head = probe.head
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


@dataclass(frozen=True)
class Header:
    """The header of a file that counts: its JSON has `length` bytes; the `tensors` that lie in the file, without
    aliases; the `size` that it gives the file; what was `pending` beside it, in words."""

    length: int
    tensors: dict[str, TensorRef]
    metadata: Mapping[str, str]
    size: int
    pending: str | None = None


def read(probe: Probe) -> Document:
    """The tensors in the file; InputError when the header is not what the specification allows."""
    found = header(probe)
    interrupted = () if found.pending is None else (found.pending,)
    metadata, provenance = _provenance.taken(found.metadata)
    tensors, metadata = restored(found.tensors, metadata)
    return Document(probe.file.path, NAME, tensors, metadata, interrupted=interrupted, provenance=provenance)


def header(probe: Probe) -> Header:
    """The file's own header, or the one that it had before a change that was interrupted (`sidefile`)."""
    file = probe.file
    pending = sidefile.of_file(file.path, file.size, probe.read, probe.limits)
    old = pending.side.old if pending is not None and pending.side is not None and pending.state == "before" else None
    size = file.size if pending is None else pending.size
    try:
        raw = _own(probe) if old is None else _before(old)
        tensors, metadata = parse(raw, file, size, probe.limits)
        if old is not None:
            tensors = {key: _as_it_was(ref, old) for key, ref in tensors.items()}
    except InputError as error:
        error.path = error.path or file.path
        if pending is not None and pending.state == "stale":
            error.hint = f"{pending.path} beside it, of an in-place change, does not belong to it and cannot mend it"
        raise
    if File.of(file.path, os.fstat(probe.descriptor)) != file:
        raise InputError("changed while it was opened", path=file.path, hint="open it again")
    return Header(len(raw), tensors, metadata, size, None if pending is None else pending.remark)


def _before(old: bytes) -> bytearray:
    """The header in the beginning that a side file keeps, which must be all there: it is what is put back."""
    length = int.from_bytes(old[:8], "little")
    if 8 + length > len(old):
        raise InputError("the side file of an in-place change ends inside of a header, and cannot be its own")
    return bytearray(old[8 : 8 + length])


def _as_it_was(ref: TensorRef, old: bytes) -> TensorRef:
    """A tensor that the new header grows over has its bytes in the side file."""
    extent = ref.source
    assert isinstance(extent, Extent)
    if not ref.nbytes or extent.offset >= len(old):
        return ref
    if extent.offset + extent.nbytes > len(old):
        raise InputError("the side file of an in-place change ends inside of a tensor, and cannot be its own")
    return TensorRef(ref.spec, Inline(old[extent.offset : extent.offset + extent.nbytes]))


def _own(probe: Probe) -> bytearray:
    file, limits = probe.file, probe.limits
    length = int.from_bytes(read_exactly(probe.descriptor, 8, 0, file.path), "little")
    if length > limits.safetensors_header:
        most = limits.safetensors_header
        raise LimitError(f"a header of {length} bytes", "safetensors_header", most, path=file.path)
    if 8 + length > file.size:
        raise InputError(f"truncated: a header of {length} bytes in a file of {file.size}", path=file.path)
    return read_exactly(probe.descriptor, length, 8, file.path)


def parse(
    raw: bytes | bytearray, file: File, size: int, limits: Limits
) -> tuple[dict[str, TensorRef], Mapping[str, str]]:
    """The tensors and the metadata of a header's JSON, for a file of `size` bytes; InputError."""
    metadata: dict[str, str] = {}
    try:
        base = 8 + len(raw)
        tensors = {entry[0]: _entry(file, *entry, base, size, limits) for entry in entries(raw, metadata, limits)}
        _tile(tensors, base, size)
    except LimitError as error:
        error.path = error.path or file.path
        raise
    except (_Bad, ValueError, RecursionError) as error:
        raise InputError(f"damaged safetensors header: {error}", path=file.path) from None
    return tensors, metadata


def _entry(
    file: File, key: str, dtype: Any, shape: Any, offsets: Any, base: int, size: int, limits: Limits
) -> TensorRef:
    if not isinstance(dtype, str) or dtype not in BY_CODE or dtype in _UNSUPPORTED:
        raise _Bad(f"{quoted(key)} has the unknown dtype {quoted(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _Bad(f"{quoted(key)} has the shape {_listed(shape)}")
    if len(shape) > limits.dimensions:
        raise LimitError(f"{quoted(key)} has {len(shape)} dimensions", "dimensions", limits.dimensions, path=file.path)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _Bad(f"{quoted(key)} has the data_offsets {_listed(offsets)}")
    begin, end = offsets
    spec, nbytes = _spec(dtype, tuple(shape))
    if end < begin or base + end > size:
        raise _Bad(f"{quoted(key)} lies at bytes {begin}–{end} of {size - base} (a truncated file?)")
    if nbytes != end - begin:
        raise _Bad(f"{quoted(key)} is {spec}, {nbytes} bytes, but lies at bytes {begin}–{end}")
    return TensorRef(spec, Extent(file, base + begin, end - begin))


def _listed(value: Any) -> str:
    """What should be a list of numbers, for an error: the beginning of a longer one."""
    if not isinstance(value, list):
        return quoted(value)
    more = f", … {len(value)} in all" if len(value) > _SHOWN else ""
    return brief(f"[{', '.join(map(quoted, value[:_SHOWN]))}{more}]")


def _spec(code: str, shape: tuple[int, ...]) -> tuple[TensorSpec, int]:
    """The spec and its bytes; where there is none, sizes may be such that all hashes are one, and nothing is kept."""
    return _made(code, shape) if 0 in shape else _kept(code, shape)


@lru_cache(maxsize=4096)
def _kept(code: str, shape: tuple[int, ...]) -> tuple[TensorSpec, int]:
    """One object for all equal specs: a model has many tensors of few shapes."""
    return _made(code, shape)


def _made(code: str, shape: tuple[int, ...]) -> tuple[TensorSpec, int]:
    spec = TensorSpec(BY_CODE[code], shape)
    if 0 in shape and any(count >= 1 << 64 for count in accumulate(shape, mul)):
        raise _Bad(f"the shape {list(shape)} has more elements before its 0 than 64 bits count")
    return spec, spec.nbytes


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tile(tensors: Mapping[str, TensorRef], base: int, size: int) -> None:
    """The ranges must fill the file without a hole or an overlap."""
    at = base
    extents = [(ref.source, key) for key, ref in tensors.items() if isinstance(ref.source, Extent)]
    extents.sort(key=_place)
    for extent, key in extents:
        if extent.offset != at:
            raise _Bad(
                f"{quoted(key)} begins at byte {extent.offset - base}, where the one before it ends at {at - base}"
            )
        at += extent.nbytes
    if at != size:
        raise _Bad(f"the tensors end at byte {at}, the file at {size}")


def _place(one: tuple[Extent, str]) -> tuple[int, int, str]:
    return one[0].offset, one[0].nbytes, one[1]


def problems(ckpt: Checkpoint) -> list[Problem]:
    """What this format cannot hold."""
    found = [
        Problem(
            f"safetensors has no dtype {ref.dtype}: {quoted(key)} {list(ref.shape)}; cast it, or write a .pth", key=key
        )
        for key, ref in ckpt.items()
        if ref.dtype.code in _UNSUPPORTED
    ]
    found += [
        Problem(f"safetensors holds names that are UTF-8, which {quoted(key)} is not; rename it", key=key)
        for key in ckpt
        if not _is_utf8(key)
    ]
    for key, ref in ckpt.items():
        if ref.quantizer is not None:
            found += [
                Problem(
                    f"{quoted(key)} is quantised, and safetensors needs the name {name!r} for its scale; rename it",
                    key=key,
                )
                for name in (f"{key}.{part}" for part in _parameters(ref.quantizer))
                if name in ckpt
            ]
    if "__metadata__" in ckpt:
        found.append(Problem("safetensors reserves the key '__metadata__'; rename it", key="__metadata__"))
    return found


def expanded(ckpt: Checkpoint) -> Checkpoint:
    """The tensors as this format can hold them: quantised ones as integers, with `NAME.scale` and
    `NAME.zero_point` (and per channel `NAME.axis`) beside them."""
    if all(ref.quantizer is None for ref in ckpt.values()):
        return ckpt
    made: dict[str, TensorRef] = {}
    for key, ref in ckpt.items():
        made[key] = ref.integers
        if ref.quantizer is not None:
            for name, part in _parameters(ref.quantizer).items():
                made[f"{key}.{name}"] = part
    return ckpt.replace(tensors=made)


def _parameters(quantizer: Quantizer) -> dict[str, TensorRef]:
    scale, zero = quantizer.scale, quantizer.zero_point
    if isinstance(scale, TensorRef) and isinstance(zero, TensorRef):
        return {"scale": scale, "zero_point": zero, "axis": _number("<q", "int64", quantizer.axis or 0)}
    return {"scale": _number("<d", "float64", scale), "zero_point": _number("<q", "int64", zero)}


def _number(form: str, dtype: str, value: Any) -> TensorRef:
    return TensorRef(TensorSpec(DTYPES[dtype], ()), Inline(struct.pack(form, value)))


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def layout(ckpt: Checkpoint, root: Any, provenance: str | None = None) -> Layout:
    """The header, then every tensor in full; `root` is not used (this format holds no extras).

    Tensors lie in the checkpoint's order where that leaves each aligned to its element size;
    otherwise the largest elements come first, as safetensors itself writes them.  Where that
    serves most of the bytes, the header ends with blanks, so that they lie as in their source (`shift`).
    The text of the `provenance` stands in the metadata.
    """
    tensors = expanded(ckpt)
    order = list(tensors)
    if not _aligned(tensors, order):
        order.sort(key=lambda key: -tensors[key].dtype.bits)
    begins, at = {}, 0
    for key in order:
        begins[key] = at
        at += tensors[key].nbytes
    record = {} if provenance is None else {KEY: provenance}
    raw = header_json(tensors, begins, {**ckpt.metadata, "format": "pt", **record})
    raw += b" " * (-len(raw) % _ALIGN)
    shifts: dict[int, int] = {}
    for key in order:
        found = shift(tensors[key], 8 + len(raw) + begins[key], _ALIGN)
        shifts[found] = shifts.get(found, 0) + tensors[key].nbytes
    usual = max(shifts, key=lambda found: shifts[found], default=0)
    raw += b" " * (usual if 2 * shifts.get(usual, 0) > at else 0)
    parts: tuple[bytes | TensorRef, ...] = (len(raw).to_bytes(8, "little") + raw, *(tensors[key] for key in order))
    return Layout(parts)


def header_json(tensors: Mapping[str, TensorRef], begins: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The JSON of a header, without blanks; `begins` are the tensors' first bytes behind it."""
    made: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, ref in tensors.items():
        place = [begins[key], begins[key] + ref.nbytes]
        made[key] = {"dtype": ref.dtype.code, "shape": list(ref.shape), "data_offsets": place}
    return json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def notes(ckpt: Checkpoint) -> list[str]:
    """What this format makes of tensors that it cannot hold as they are."""
    quantized = sum(ref.quantizer is not None for ref in ckpt.values())
    note = (
        f"{quantized} quantised tensors are written as integers, with NAME.scale and NAME.zero_point beside them; "
        "a .pth keeps them as they are"
    )
    return [note] if quantized else []


def _aligned(tensors: Mapping[str, TensorRef], order: list[str]) -> bool:
    at = 0
    for key in order:
        if at * 8 % tensors[key].dtype.bits:
            return False
        at += tensors[key].nbytes
    return True

"""From the tensors that a file is to have to its new header, where the bytes can stay as they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckptsurgeon.errors import InputError, Problem
from ckptsurgeon.formats import safetensors
from ckptsurgeon.formats._aliases import FORMAT, RESERVED, restored
from ckptsurgeon.limits import Limits
from ckptsurgeon.provenance import KEY, Provenance
from ckptsurgeon.sources import Extent, File, Pieces, is_contiguous
from ckptsurgeon.tensor import TensorRef

MOST_GROWN = 8 << 20
"""Bytes by which a header grows over tensors dropped at the beginning: every reader reads all of it."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a file's path, the first byte, the number of bytes."""

    path: str
    offset: int
    nbytes: int


def place_of(ref: TensorRef) -> Place | None:
    """The one stretch of a file that a tensor is, in order; None where bytes would have to move or be made."""
    source = ref.source
    if isinstance(source, Extent):
        plain = source.strides is None or is_contiguous(ref.shape, source.strides)
        if not plain or source.codec is not None or source.byteorder != "little" or ref.quantizer is not None:
            return None
        return Place(source.path, source.offset, ref.nbytes)
    if not isinstance(source, Pieces) or not source.parts:
        return None
    first, *rest = (place_of(part) for part in source.parts)
    for place in rest:
        if first is None or place is None or (place.path, place.offset) != (first.path, first.offset + first.nbytes):
            return None
        first = replace(first, nbytes=first.nbytes + place.nbytes)
    return first


@dataclass(frozen=True)
class Rewritten:
    """A file's new header: `region` are its first bytes, the length included; `size` is what the file has then.
    `region` is None where nothing changes; `said` tells whether the provenance is in it."""

    region: bytes | None
    size: int
    aliases: Mapping[str, str]
    said: bool = False


class Misfit(Exception):
    """Why a header cannot be rewritten in place."""

    def __init__(self, text: str, key: str | None = None) -> None:
        self.problem = Problem(text, key=key, kind="in-place")
        super().__init__(text)


def rewritten(
    file: File,
    header: safetensors.Header,
    wanted: Mapping[str, tuple[TensorRef, Place]],
    metadata: Mapping[str, str],
    provenance: Provenance | None,
    limits: Limits,
    ordered: bool,
) -> Rewritten:
    """The header of a file that is to have the tensors `wanted` and this metadata; raises Misfit.

    The `provenance` is written as far as there is room: without its oldest steps, or not at all.  Where only the order
    of tensors differs it changes if it is `ordered`; among shards the index says the order.
    """
    kept, aliases = _without_aliases(header, wanted, metadata)
    base = 8 + header.length
    begin, end = _tiled(file, header, kept, base)
    length = header.length + begin - base
    if begin - base > MOST_GROWN or length > limits.safetensors_header:
        first = min((ref.source.offset, key) for key, ref in header.tensors.items() if isinstance(ref.source, Extent))
        raise Misfit(
            f"{first[1]!r} lies at the beginning of {file.path}, and dropping it would leave {begin - base} bytes "
            f"there, over the {MOST_GROWN} that a header may grow by",
            first[1],
        )
    bounds = {place.offset for _, place in kept.values()} | {end}
    starts = {key: place.offset if place.offset in bounds else begin for key, (_, place) in kept.items()}
    refs = {key: ref for key, (ref, _) in kept.items()}
    tensors = {key: TensorRef(ref.spec, Extent(file, starts[key], ref.nbytes)) for key, ref in refs.items()}
    texts = {**metadata, FORMAT: "pt", **aliases}
    if _same(header, tensors, texts, ordered) and end == header.size:
        return Rewritten(None, header.size, aliases)
    begins = {key: start - begin for key, start in starts.items()}
    raw, said = b"", provenance
    while said is not None:
        raw = safetensors.header_json(refs, begins, {**texts, KEY: said.text()})
        if len(raw) <= length:
            break
        said = said.shorter()
    if said is None:
        raw = safetensors.header_json(refs, begins, texts)
    if len(raw) > length and FORMAT not in header.metadata:
        raw = safetensors.header_json(refs, begins, {key: text for key, text in texts.items() if key != FORMAT})
    if len(raw) > length:
        raise Misfit(f"the new header of {file.path} has {len(raw)} bytes, and there is room for {length}")
    raw = raw.ljust(length)
    _prove(raw, file, end, limits, wanted)
    return Rewritten(length.to_bytes(8, "little") + raw, end, aliases, said is not None)


def _without_aliases(
    header: safetensors.Header, wanted: Mapping[str, tuple[TensorRef, Place]], metadata: Mapping[str, str]
) -> tuple[dict[str, tuple[TensorRef, Place]], dict[str, str]]:
    """One name for each stretch of bytes, the one that it has in the file where that is among them, and the
    other names of it."""
    groups: dict[Place | str, list[str]] = {}
    for key, (_, place) in wanted.items():
        groups.setdefault(place if place.nbytes else key, []).append(key)
    aliases: dict[str, str] = {}
    for group in groups.values():
        first = next((key for key in group if key in header.tensors), group[0])
        for key in group:
            if key == first:
                continue
            if wanted[key][0].spec != wanted[first][0].spec:
                raise Misfit(f"{first!r} and {key!r} are the same bytes in two shapes", key)
            if key in metadata or key in RESERVED:
                raise Misfit(f"{key!r} would be an alias of {first!r}, and the metadata has an entry of that name", key)
            aliases[key] = first
    return {key: found for key, found in wanted.items() if key not in aliases}, aliases


def _tiled(
    file: File, header: safetensors.Header, kept: Mapping[str, tuple[TensorRef, Place]], base: int
) -> tuple[int, int]:
    """The first byte and the end of the data that is kept; Misfit where it has a hole or an overlap."""
    places = sorted((place.offset, place.nbytes, key) for key, (_, place) in kept.items() if place.nbytes)
    if not places:
        return base, base
    begin = at = places[0][0]
    for offset, nbytes, key in places:
        if offset < at:
            raise Misfit(f"{key!r} would share bytes of {file.path} with another name in part", key)
        if offset > at:
            gone = next(k for k, ref in _in_order(header) if ref.offset + ref.nbytes > at and ref.nbytes)
            raise Misfit(
                f"dropping {gone!r} leaves a hole of {offset - at} bytes before {key!r} in {file.path}, "
                "which safetensors forbids",
                gone,
            )
        at += nbytes
    return begin, at


def _in_order(header: safetensors.Header) -> Sequence[tuple[str, Extent]]:
    found = [(key, ref.source) for key, ref in header.tensors.items() if isinstance(ref.source, Extent)]
    return sorted(found, key=lambda item: item[1].offset)


def _same(
    header: safetensors.Header, tensors: Mapping[str, TensorRef], texts: Mapping[str, str], ordered: bool
) -> bool:
    """Whether nothing changes but that the entry `format: pt` would come, and another provenance."""

    def told(metadata: Mapping[str, str]) -> dict[str, str]:
        return {key: text for key, text in metadata.items() if key not in RESERVED}

    if ordered and list(header.tensors) != list(tensors):
        return False
    return header.tensors == tensors and told(header.metadata) == told(texts)


def _prove(raw: bytes, file: File, size: int, limits: Limits, wanted: Mapping[str, tuple[TensorRef, Place]]) -> None:
    """Read the header that is to be written as a reader will: it must be what was wanted, no more and no less."""
    try:
        tensors, metadata = safetensors.parse(raw, file, size, limits)
    except InputError as error:
        raise Misfit(f"the new header of {file.path} would not be read: {error.cause}") from None
    found = restored(tensors, metadata)[0]
    odd = sorted(set(found) ^ set(wanted))
    if odd:
        raise Misfit(f"the metadata of {file.path} would make {odd[0]!r} an alias, which it is not now", odd[0])
    for key, (ref, place) in wanted.items():
        source = found[key].source
        assert isinstance(source, Extent)
        if found[key].spec != ref.spec or (place.nbytes and source.offset != place.offset):
            raise AssertionError(f"{key!r} is {found[key].spec} at {source.offset}, not {ref.spec} at {place.offset}")

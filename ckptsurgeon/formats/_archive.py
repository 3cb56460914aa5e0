"""What the zip kinds of torch share: members with their checksums, and storages among them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import InputError, LimitError, quoted
from ckptsurgeon.formats import _pickle
from ckptsurgeon.formats._pickle import BadPickle
from ckptsurgeon.formats._plain import BadRecord, Builder
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._tensors import Storage
from ckptsurgeon.formats._zip import Member
from ckptsurgeon.sources import Deflate, Record

_LONGEST_WORD = 16


def roots(members: Mapping[str, Member], name: str) -> list[str]:
    """The top folders (with their slash; empty for none at all) that hold a member called `name`."""
    below = f"/{name}"
    found = [member.removesuffix(name) for member in members if member.endswith(below)]
    found += [""] * (name in members)
    return [root for root in found if root.count("/") <= 1]


def content(probe: Probe, member: Member, most: int, limit: str = "pickle_bytes") -> bytes:
    """The bytes of a member, proven by its checksum; LimitError when they are more than `most`, which `limit` says.

    What is compressed may be no larger than `inflated_bytes` either: its size costs a file nothing.
    """
    path = probe.file.path
    large = max(member.size, member.packed)
    if member.deflated and most > probe.limits.inflated_bytes:
        limit, most = "inflated_bytes", probe.limits.inflated_bytes
    if large > most:
        raise LimitError(f"{member.name} has {large} bytes", limit, most, path=path)
    data = probe.read(member.packed, member.offset)
    if member.deflated:
        inflate = zlib.decompressobj(-15)
        try:
            data = inflate.decompress(data, member.size + 1)
        except zlib.error as error:
            raise InputError(f"{member.name} is damaged ({error})", path=path) from None
        if len(data) == member.size and (not inflate.eof or inflate.unused_data):
            raise InputError(f"{member.name} does not end where its compressed data ends", path=path)
    if len(data) != member.size:
        raise InputError(f"{member.name} has other bytes than its directory says", path=path)
    if member.crc is not None and zlib.crc32(data) != member.crc:
        raise InputError(f"{member.name} does not have its checksum", path=path)
    return data


def byteorder(probe: Probe, root: str) -> Literal["little", "big"]:
    """The byte order of the archive's tensors, from its `byteorder` record; little without one."""
    member = probe.members.get(f"{root}byteorder")
    if member is None:
        return "little"
    if member.size > _LONGEST_WORD:
        raise InputError(f"{member.name} has {member.size} bytes, neither little nor big", path=probe.file.path)
    word = content(probe, member, _LONGEST_WORD)
    if word == b"big":
        return "big"
    if word != b"little":
        raise InputError(f"{member.name} is {word!r}, neither little nor big", path=probe.file.path)
    return "little"


def locator(
    probe: Probe, place: Callable[[str], str], order: Literal["little", "big"]
) -> Callable[[str, DType, int, str], Storage]:
    """Finds the storage of a key; `place` names the member that should hold it."""

    members, file = probe.members, probe.file

    def locate(key: str, dtype: DType, elements: int, device: str) -> Storage:
        nbytes = elements * dtype.itemsize
        member = members.get(place(key))
        if member is None:
            raise BadRecord(f"the storage {quoted(key)} is missing from the archive")
        if member.size != nbytes:
            raise BadRecord(f"the storage {quoted(key)} has {member.size} bytes, the pickle says {nbytes}")
        begin = 0 if member.deflated else member.offset
        codec = Deflate(member.offset, member.packed) if member.deflated else None
        record = Record(member.name, begin, nbytes, member.crc)
        return Storage(file, begin, nbytes, dtype, device, order, codec, record)

    return locate


def unpickled(probe: Probe, name: str, builders: Mapping[str, Builder], persistent: Callable[[Any], Any]) -> Any:
    """The object in the pickle that the member `name` is, to its last byte."""
    pickled = content(probe, probe.members[name], probe.limits.pickle_bytes)
    try:
        tree, end = _pickle.loads(pickled, builders=builders, persistent=persistent, limits=probe.limits)
    except (BadPickle, BadRecord) as error:
        raise InputError(f"damaged {name}: {error}", path=probe.file.path, key=getattr(error, "key", None)) from None
    if end != len(pickled):
        raise InputError(f"{len(pickled) - end} bytes follow the pickle in {name}", path=probe.file.path)
    return tree

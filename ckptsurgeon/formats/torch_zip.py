"""Torch zip archives: `torch.save` since 1.6.

One root folder of any name holds `data.pkl`, the storages as `data/KEY`, and `byteorder`.  Reading
takes the directory, the pickle and one local header a storage; writing lays out the same records,
64-byte aligned, without torch.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any, Literal

from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import InputError, LimitError, Problem
from ckptsurgeon.evaluate import read_exactly
from ckptsurgeon.formats import _pickle
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._layout import Layout
from ckptsurgeon.formats._pickle import BadPickle
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.formats._rebuild import builders
from ckptsurgeon.formats._tensors import Storage, persistent_loader
from ckptsurgeon.formats._zip import BadZip, Member, read_directory
from ckptsurgeon.limits import Limits
from ckptsurgeon.sources import Deflate, File, Record

NAME = "torch-zip"


def problems(ckpt: Checkpoint) -> list[Problem]:
    """What this format cannot hold."""
    return [
        Problem(f"torch files have no dtype {ref.dtype}: {key!r} {list(ref.shape)}; write safetensors", key=key)
        for key, ref in ckpt.items()
        if ref.dtype.bits < 8 and ref.dtype.name != "float4_e2m1"
    ]


def layout(ckpt: Checkpoint, root: Any) -> Layout:
    """The archive whose object is `root`: cleaned data that holds the state dict."""
    from ckptsurgeon.formats import _torch_zip_layout

    return _torch_zip_layout.layout(root)


def sniff(head: bytes) -> bool:
    """Whether a file that begins like this is a zip archive."""
    return head[:4] in (b"PK\3\4", b"PK\5\6")


def read(file: File, descriptor: int, limits: Limits) -> Document:
    """The object in the archive; InputError when it is damaged or holds something else."""
    try:
        members = read_directory(descriptor, file.size, limits)
    except BadZip as error:
        raise InputError(f"damaged zip archive: {error}", path=file.path) from None
    root = _root(members, file.path)
    pickled = _content(members[f"{root}data.pkl"], descriptor, file, limits)
    locate = partial(_locate, file, members, root, _byteorder(members, root, descriptor, file, limits))
    try:
        tree, end = _pickle.loads(
            pickled, builders=builders(limits), persistent=persistent_loader(locate), limits=limits
        )
    except (BadPickle, BadRecord) as error:
        raise InputError(f"damaged {root}data.pkl: {error}", path=file.path) from None
    if end != len(pickled):
        raise InputError(f"{len(pickled) - end} bytes follow the pickle in {root}data.pkl", path=file.path)
    return Document(file.path, NAME, tree)


def _root(members: dict[str, Member], path: str) -> str:
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
    roots = [root for root in roots if root.count("/") <= 1]
    if len(roots) > 1:
        raise InputError(f"holds {len(roots)} pickles named data.pkl", path=path)
    if not roots:
        inside = ", ".join(list(members)[:5]) or "nothing"
        raise InputError(f"a zip archive, but no torch checkpoint: no data.pkl (it holds {inside})", path=path)
    root = roots[0]
    if f"{root}constants.pkl" in members:
        raise InputError("a TorchScript archive, which this version does not read", path=path)
    return root


def _content(member: Member, descriptor: int, file: File, limits: Limits) -> bytes:
    if member.size > limits.pickle_bytes:
        raise LimitError(
            f"{member.name} has {member.size} bytes, over the limit of {limits.pickle_bytes}", path=file.path
        )
    data: bytes = bytes(read_exactly(descriptor, member.packed, member.offset, file.path))
    if member.deflated:
        inflate = zlib.decompressobj(-15)
        try:
            data = inflate.decompress(data, member.size + 1)
        except zlib.error as error:
            raise InputError(f"{member.name} is damaged ({error})", path=file.path) from None
    if len(data) != member.size:
        raise InputError(f"{member.name} has other bytes than its directory says", path=file.path)
    if member.crc is not None and zlib.crc32(data) != member.crc:
        raise InputError(f"{member.name} does not have its checksum", path=file.path)
    return data


def _byteorder(
    members: dict[str, Member], root: str, descriptor: int, file: File, limits: Limits
) -> Literal["little", "big"]:
    member = members.get(f"{root}byteorder")
    if member is None:
        return "little"
    word = _content(member, descriptor, file, limits)
    if word == b"big":
        return "big"
    if word != b"little":
        raise InputError(f"{member.name} is {word[:16]!r}, neither little nor big", path=file.path)
    return "little"


def _locate(
    file: File,
    members: dict[str, Member],
    root: str,
    byteorder: Literal["little", "big"],
    key: str,
    dtype: DType,
    elements: int,
    device: str,
) -> Storage:
    nbytes = elements * dtype.itemsize
    member = members.get(f"{root}data/{key}")
    if member is None:
        raise BadRecord(f"the storage {key!r} is missing from the archive")
    if member.size != nbytes:
        raise BadRecord(f"the storage {key!r} has {member.size} bytes, the pickle says {nbytes}")
    begin = 0 if member.deflated else member.offset
    codec = Deflate(member.offset, member.packed) if member.deflated else None
    return Storage(file, begin, nbytes, dtype, device, byteorder, codec, Record(member.name, begin, nbytes, member.crc))

"""Torch zip archives: `torch.save` since 1.6.

One root folder of any name holds `data.pkl`, the storages as `data/KEY`, and `byteorder`.  Reading
takes the directory, the pickle and one local header a storage; writing lays out the same records,
64-byte aligned, without torch.
"""

from __future__ import annotations

from typing import Any

from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.errors import InputError, Problem
from ckptsurgeon.formats import _archive, _provenance
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._layout import Layout
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._rebuild import builders
from ckptsurgeon.formats._tensors import Storages
from ckptsurgeon.provenance import MEMBER, MOST, Provenance

NAME = "torch-zip"


def problems(ckpt: Checkpoint) -> list[Problem]:
    """What this format cannot hold."""
    return [
        Problem(f"torch files have no dtype {ref.dtype}: {key!r} {list(ref.shape)}; write safetensors", key=key)
        for key, ref in ckpt.items()
        if ref.dtype.bits < 8 and ref.dtype.name != "float4_e2m1"
    ]


def layout(ckpt: Checkpoint, root: Any, provenance: str | None = None) -> Layout:
    """The archive whose object is `root`, cleaned data that holds the state dict; the text of the `provenance` is a
    record of its own."""
    from ckptsurgeon.formats import _torch_zip_layout

    return _torch_zip_layout.layout(root, provenance)


def sniff(probe: Probe) -> bool:
    """Whether this is a zip archive with the pickle of an object in its top folder."""
    return bool(_archive.roots(probe.members, "data.pkl"))


def read(probe: Probe) -> Document:
    """The object in the archive; InputError when it is damaged."""
    roots = _archive.roots(probe.members, "data.pkl")
    if len(roots) > 1:
        raise InputError(f"holds {len(roots)} pickles named data.pkl", path=probe.file.path)
    root = roots[0]
    locate = _archive.locator(probe, lambda key: f"{root}data/{key}", _archive.byteorder(probe, root))
    tree = _archive.unpickled(probe, f"{root}data.pkl", builders(probe.limits), Storages(locate))
    return Document(probe.file.path, NAME, tree, provenance=_said(probe, f"{root}{MEMBER}"))


def _said(probe: Probe, name: str) -> Provenance | None:
    member = probe.members.get(name)
    if member is None:
        return None
    if (nbytes := max(member.size, member.packed)) > MOST:
        return _provenance.too_long(nbytes)
    try:
        return _provenance.read(_archive.content(probe, member, MOST))
    except InputError as error:  # what it is about can be read nevertheless
        return Provenance(problem=error.cause)

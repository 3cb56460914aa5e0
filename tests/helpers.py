"""Builders and comparisons that do without the code under test, but for the last. Comparing helpers assert."""

from __future__ import annotations

import random
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgeon as cs

KEY = "ckptsurgeon.provenance"
"""The entry of the metadata, and of an index, that says how a file came about."""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN and negative zero compare as they are."""
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


def assert_same_tensor(got: torch.Tensor, want: torch.Tensor, name: str = "") -> None:
    assert got.dtype == want.dtype, f"{name}: {got.dtype} is not {want.dtype}"
    assert got.shape == want.shape, f"{name}: {list(got.shape)} is not {list(want.shape)}"
    assert torch.equal(bits(got), bits(want)), f"{name}: other bytes"


def assert_same_tensors(got: Mapping[str, Any], want: Mapping[str, Any], *, ordered: bool = True) -> None:
    """Equal keys (in order), dtypes, shapes and bytes; `got` may be a Checkpoint."""
    if ordered:
        assert list(got) == list(want)
    else:
        assert set(got) == set(want)
    for key, value in want.items():
        found = got[key]
        assert_same_tensor(found if isinstance(found, torch.Tensor) else found.read(), value, key)


def save_legacy(obj: object, path: str | Path, protocol: int = 2) -> None:
    """The stacked pickles that torch wrote before 1.6, by torch itself."""
    torch.save(obj, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file by hand."""
    return struct.pack("<Q", len(header)) + header + data


def damaged_in(path: str | Path, record: str) -> None:
    """Change one byte in the middle of a record of a zip archive."""
    (info,) = [info for info in zipfile.ZipFile(path).infolist() if info.filename.endswith(f"/{record}")]
    raw = bytearray(Path(path).read_bytes())
    name, extra = struct.unpack_from("<HH", raw, info.header_offset + 26)
    raw[info.header_offset + 30 + name + extra + info.file_size // 2] ^= 0x10
    Path(path).write_bytes(raw)


def deflated(path: str | Path) -> None:
    """The same archive with its records compressed, as programs that pack directories make it."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)


def assert_never_crashes(raw: bytes, step: int) -> None:
    """Every `step`-th beginning of a file is refused by name, and 500 files with one byte changed are
    read or refused by name."""
    for cut in range(0, len(raw), step):
        Path("cut").write_bytes(raw[:cut])
        with pytest.raises(cs.InputError, match="^cut: "):
            cs.open("cut")
    chance = random.Random(0)
    for _ in range(500):
        damaged = bytearray(raw)
        damaged[chance.randrange(len(raw))] = chance.randrange(256)
        Path("flipped").write_bytes(damaged)
        try:
            cs.open("flipped")
        except cs.CkptError as error:
            assert str(error).startswith("flipped: ")

"""safetensors files, written by safetensors itself and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors, safetensors_bytes
from safetensors.torch import save_file

import ckptsurgeon as cs

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64,
)  # fmt: skip


def test_every_dtype_is_read_as_safetensors_wrote_it() -> None:
    want = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    save_file(want, "a.safetensors", metadata={"format": "pt", "note": "é"})
    ckpt = cs.open("a.safetensors")
    assert_same_tensors(ckpt, want, ordered=False)
    assert ckpt.metadata == {"format": "pt", "note": "é"}
    assert ckpt.origin.format == "safetensors"


def test_scalars_and_empty_tensors() -> None:
    want = {"a": torch.tensor(1.5), "b": torch.empty(0, 3), "c": torch.empty(0)}
    save_file(want, "a.safetensors")
    assert_same_tensors(cs.open("a.safetensors"), want, ordered=False)


def entry(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


BAD = {
    "no JSON": (b"{", b""),
    "not an object": (b"[]", b""),
    "a key twice": (f'{{"w":{entry()},"w":{entry()}}}'.encode(), bytes(8)),
    "an unknown dtype": (f'{{"w":{entry("F99")}}}'.encode(), bytes(8)),
    "a negative size": (f'{{"w":{entry(shape="[-2]")}}}'.encode(), bytes(8)),
    "a size that is no number": (f'{{"w":{entry(shape="[true,2]")}}}'.encode(), bytes(8)),
    "a size of other bytes": (f'{{"w":{entry(shape="[3]")}}}'.encode(), bytes(8)),
    "an end before its begin": (f'{{"w":{entry(offsets="[8,0]")}}}'.encode(), bytes(8)),
    "a range past the end": (f'{{"w":{entry()}}}'.encode(), bytes(7)),
    "bytes that belong to nobody": (f'{{"w":{entry()}}}'.encode(), bytes(9)),
    "a hole": (f'{{"w":{entry()},"v":{entry(offsets="[12,20]")}}}'.encode(), bytes(20)),
    "an overlap": (f'{{"w":{entry()},"v":{entry(offsets="[4,12]")}}}'.encode(), bytes(12)),
    "metadata of numbers": (b'{"__metadata__":{"a":1}}', b""),
    "an entry too many words": (b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1}}', bytes(4)),
    "a product beyond 64 bits": (f'{{"w":{entry(shape="[4294967296,4294967296,2]")}}}'.encode(), bytes(8)),
    "NaN": (b'{"w":NaN}', b""),
    "deep nesting": (b'{"w":' + b"[" * 5000 + b"]" * 5000 + b"}", b""),
    "no UTF-8": (b'{"\xff":1}', b""),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_specification_forbids_is_refused(case: str) -> None:
    Path("a.safetensors").write_bytes(safetensors_bytes(*BAD[case]))
    with pytest.raises(cs.InputError, match=r"a\.safetensors: "):
        cs.open("a.safetensors")


def test_a_header_larger_than_the_limit_is_refused() -> None:
    Path("a.safetensors").write_bytes(safetensors_bytes(b'{"__metadata__":{"a":"' + b"x" * 200 + b'"}}'))
    with pytest.raises(cs.LimitError, match="header of 225 bytes, over the limit of 100"):
        cs.inspect("a.safetensors", cs.Limits(safetensors_header=100))


def test_only_the_header_of_a_huge_file_is_read() -> None:
    """100 GB that take no room on the disk."""
    import os

    size = 100 * 1000**3
    header = f'{{"w":{entry("U8", f"[{size}]", f"[0,{size}]")}}}'.encode()
    Path("a.safetensors").write_bytes(safetensors_bytes(header))
    os.truncate("a.safetensors", 8 + len(header) + size)
    assert cs.open("a.safetensors").nbytes == size

"""A checkpoint as a mapping: parts of tensors, the state dict, and what its repr says."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensor, assert_same_tensors, safetensors_bytes, save_legacy
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, Tied
from resnet18 import telling
from safetensors.torch import save_file
from strategies import tensors

import ckptsurgeon as cs
from ckptsurgeon import indexing

NUMBERS = st.none() | st.integers(-6, 6)
WORDS = (
    st.integers(-5, 5)
    | st.builds(slice, NUMBERS, NUMBERS, st.none() | st.integers(1, 3))
    | st.just(None)
    | st.just(Ellipsis)
)
INDICES = WORDS | st.lists(WORDS, max_size=5).map(tuple)


def of_torch(value: torch.Tensor, index: Any) -> torch.Tensor | type[Exception]:
    try:
        return value[index]
    except (IndexError, ValueError) as error:
        return type(error)


@given(tensors(), INDICES)
@settings(max_examples=300)
def test_the_arithmetic_of_an_index_is_that_of_torch(value: torch.Tensor, index: Any) -> None:
    """Offset, shape and strides, over every layout; errors of the same kinds."""
    want = of_torch(value, index)
    try:
        view = indexing.view(tuple(value.shape), value.stride(), index)
    except (IndexError, ValueError) as error:
        assert type(error) is want
        return
    if view is None:
        assert isinstance(index, tuple)
        assert index.count(Ellipsis) > 1
        return
    assert isinstance(want, torch.Tensor)
    assert view.shape == tuple(want.shape)
    assert torch.equal(value.as_strided(view.shape, view.strides, value.storage_offset() + view.offset), want)


@given(tensors(), INDICES)
@settings(max_examples=100)
def test_a_part_of_a_tensor_is_what_torch_cuts_out_of_it(value: torch.Tensor, index: Any) -> None:
    """Of a view that begins inside of a storage that is transposed, padded or neither."""
    torch.save({"w": value}, "a.pth")
    ref, want = cs.open("a.pth")["w"], of_torch(value, index)
    if isinstance(want, torch.Tensor):
        assert_same_tensor(ref[index], want)
    else:
        with pytest.raises(want):
            ref[index]


ODD = {
    "a list": [0, 2],
    "a mask": torch.tensor([True, False, True]),
    "a tensor": torch.tensor(1),
    "a bool": True,
    "two ellipses": (..., ...),
}


@pytest.mark.parametrize("name", ODD)
def test_other_indices_are_left_to_torch(name: str) -> None:
    value = torch.arange(12.0).reshape(3, 4)
    torch.save({"w": value}, "a.pth")
    assert indexing.view((3, 4), (4, 1), ODD[name]) is None
    assert_same_tensor(cs.open("a.pth")["w"][ODD[name]], value[ODD[name]])


def test_computed_and_compressed_tensors_are_read_and_cut() -> None:
    value = torch.arange(12.0).reshape(3, 4)
    torch.save({"w": value}, "a.pth")
    made = cs.plan("a.pth", ["cast . bf16"]).check().result["w"]
    assert_same_tensor(made[1:, 2], value.bfloat16()[1:, 2])
    with zipfile.ZipFile("a.pth") as plain, zipfile.ZipFile("b.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert_same_tensor(cs.open("b.pth")["w"][1:, 2], value[1:, 2])
    save_legacy({"w": value}, "c.pth")
    assert_same_tensor(cs.open("c.pth")["w"][-1, ::2], value[-1, ::2])


def test_a_bad_index_is_an_error_that_names_the_shape_before_anything_is_read() -> None:
    torch.save({"w": torch.zeros(3, 4)}, "a.pth")
    ref = cs.open("a.pth")["w"]
    os.unlink("a.pth")
    with pytest.raises(IndexError, match=r"index 4 is out of range for dimension 1 of a tensor of shape \[3, 4\]"):
        ref[0, 4]
    with pytest.raises(IndexError, match=r"too many indices for a tensor of shape \[3, 4\]: 3"):
        ref[0, 0, 0]
    with pytest.raises(ValueError, match="must be greater than zero, not -1"):
        ref[::-1]
    with pytest.raises(TypeError, match="not iterable"):
        list(ref)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What each read of a file brought, in bytes."""
    seen: list[int] = []
    preadv = os.preadv

    def counted(*args: Any) -> int:
        seen.append(preadv(*args))
        return seen[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return seen


def test_a_part_of_a_tensor_of_100_gb_is_read_alone(bytes_read: list[int]) -> None:
    rows, columns = 250_000, 100_000
    size = rows * columns * 4
    header = f'{{"w":{{"dtype":"F32","shape":[{rows},{columns}],"data_offsets":[0,{size}]}}}}'.encode()
    Path("w.safetensors").write_bytes(safetensors_bytes(header))
    os.truncate("w.safetensors", 8 + len(header) + size)
    start = 8 + len(header)
    with open("w.safetensors", "r+b") as file:
        file.seek(start + (3 * columns + 1) * 4)
        file.write(torch.tensor([5.0, 6.0]).numpy().tobytes())
    ref = cs.open("w.safetensors")["w"]
    for index, shape, most in (
        (slice(0, 10), (10, columns), 10 * columns * 4),
        (3, (columns,), columns * 4),
        ((3, slice(1, 3)), (2,), 8),
        ((slice(3, None, 50_000), slice(1, 4)), (5, 3), 5 * 3 * 4),
        ((slice(3, 2003), 1), (2000,), 2000 * 4),
    ):
        bytes_read.clear()
        made = ref[index]
        assert tuple(made.shape) == shape
        assert float(made.max()) in (5.0, 6.0)
        assert sum(bytes_read) == most


def test_the_state_dict_is_what_a_model_loads() -> None:
    """Strictly, out of every format, with torch's versions where the file has them."""
    model = telling(Net())
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, "a.pth")
    save_file(dict(model.state_dict()), "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        mine = Net()
        state = cs.open(name).state_dict()
        assert type(state) is OrderedDict
        mine.load_state_dict(state, strict=True)
        assert_same_tensors(mine.state_dict(), model.state_dict())
    assert cs.open("a.pth").state_dict()._metadata == model.state_dict()._metadata
    assert not hasattr(cs.open("b.safetensors").state_dict(), "_metadata")


def test_tied_names_of_the_state_dict_share_one_storage() -> None:
    torch.save(telling(Tied()).state_dict(), "a.pth")
    state = cs.open("a.pth").state_dict()
    assert state["embed.weight"].untyped_storage().data_ptr() == state["head.weight"].untyped_storage().data_ptr()
    flat = torch.arange(6.0)
    torch.save({"a": flat, "b": flat.reshape(2, 3), "c": flat.reshape(2, 3).t(), "d": flat.clone()}, "b.pth")
    state = cs.open("b.pth").state_dict()
    assert state["a"].data_ptr() == state["b"].data_ptr() != state["d"].data_ptr()
    assert_same_tensors(state, {"a": flat, "b": flat.reshape(2, 3), "c": flat.reshape(2, 3).t(), "d": flat})


def test_the_state_dict_names_the_key_that_cannot_be_read() -> None:
    torch.save({"a": torch.ones(2)}, "a.pth")
    ckpt = cs.open("a.pth")
    os.unlink("a.pth")
    with pytest.raises(cs.InputError, match=r"^a\.pth: 'a': cannot be read"):
        ckpt.state_dict()


def test_the_repr_of_a_checkpoint_tells_its_story_in_a_line() -> None:
    torch.save({"epoch": 3, "a\x1bb": 1, "state_dict": telling(Tied()).state_dict()}, "a.pth")
    assert repr(cs.open("a.pth")) == (
        "<Checkpoint of a.pth (torch-zip, state dict at state_dict): 2 tensors; 128 elements; 512 bytes; float32; "
        "1 tied group; extras: epoch, 'a\\x1bb'>"
    )
    torch.save({"w": torch.ones(2), "n": torch.tensor(3)}, "b.pth")
    assert repr(cs.open("b.pth")) == (
        "<Checkpoint of b.pth (torch-zip): 2 tensors; 3 elements; 16 bytes; float32, int64>"
    )


def test_the_repr_of_a_tensor_says_where_it_is() -> None:
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    Path("a.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    ckpt = cs.open("a.safetensors")
    assert repr(ckpt["w"]) == f"TensorRef(float32 [2], 8 bytes, a.safetensors at byte {8 + len(header)})"
    made = cs.plan(ckpt, ["cast . bf16"]).result
    assert repr(made["w"]) == "TensorRef(bfloat16 [2], 4 bytes, computed)"
    save_legacy({"w": torch.ones(2)}, "cpu.pth")
    raw = Path("cpu.pth").read_bytes()
    Path("gpu.pth").write_bytes(raw.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3"))
    assert repr(cs.open("gpu.pth")["w"]).startswith("TensorRef(float32 [2], 8 bytes, cuda:3, gpu.pth at byte ")

"""First layers for other inputs, with timm as the truth."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from helpers import assert_same_tensor
from hypothesis import given
from hypothesis import strategies as st
from timm.models import adapt_input_conv

import ckptsurgeon as cs

FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def made(rule: str, tensor: torch.Tensor, path: str = "stem.pth") -> cs.TensorRef:
    torch.save({"w": tensor}, path)
    return cs.plan(path, [rule]).check().result["w"]


def assert_in_slices(ref: cs.TensorRef, want: torch.Tensor) -> None:
    """The tensor is `want`, with the shape that was planned, and the same in slices of a few rows."""
    whole = ref.read()
    assert (ref.dtype.name, ref.shape) == (str(want.dtype).removeprefix("torch."), tuple(want.shape))
    assert_same_tensor(whole, want)
    assert b"".join(map(bytes, ref.blocks(160))) == whole.view(torch.uint8).numpy().tobytes()


@given(st.integers(1, 9), st.integers(1, 9), FLOATS)
def test_channels_are_what_timm_makes_of_them(have: int, count: int, dtype: torch.dtype) -> None:
    w = torch.randn(8, have, 3, 2).to(dtype)
    assert_in_slices(made(f"channels w {count}", w), adapt_input_conv(count, w, base_chans=have).contiguous())


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=3), FLOATS)
def test_the_mean_goes_to_every_channel(have: int, count: int, size: list[int], dtype: torch.dtype) -> None:
    """In kernels of one to three dimensions."""
    w = torch.randn(5, have, *size).to(dtype)
    want = torch.cat([w.float().mean(1, keepdim=True)] * count, 1).to(dtype)
    assert_in_slices(made(f"channels w {count} how=mean", w), want)


def test_float64_is_computed_as_such() -> None:
    w = torch.randn(4, 3, 7, dtype=torch.float64)
    assert_in_slices(made("channels w 1", w), w.sum(1, keepdim=True))
    assert_in_slices(made("channels w 2", w), w[:, :2] * 1.5)
    assert_in_slices(made("inflate w 3", w[None]), torch.stack([w[None] / 3] * 3, 2))


@pytest.mark.parametrize("count", [1, 2, 4, 6, 13])
def test_a_model_of_timm_takes_the_stem_as_its_own(count: int) -> None:
    """The stem is what timm makes when it loads the same weights into a model of so many channels."""
    source = timm.create_model("resnet10t", num_classes=2)
    torch.save(source.state_dict(), "a.pth")
    target = timm.create_model("resnet10t", num_classes=2, in_chans=count)
    plan = cs.plan("a.pth", [rf"channels ^conv1\.0\.weight$ {count}"], to=target).check()
    want = timm.models.adapt_input_conv(count, source.conv1[0].weight.detach())
    assert_same_tensor(plan.result["conv1.0.weight"].read(), want)


def test_as_many_channels_as_there_are_is_no_change() -> None:
    torch.save({"w": torch.randn(4, 3, 7, 7)}, "a.pth")
    ckpt = cs.open("a.pth")
    assert cs.plan(ckpt, ["channels w 3"]).result["w"] is ckpt["w"]


@given(st.integers(1, 6), FLOATS)
def test_an_inflated_kernel_sums_to_the_flat_one(frames: int, dtype: torch.dtype) -> None:
    w = torch.randn(4, 3, 2, 5).to(dtype)
    assert_in_slices(made(f"inflate w {frames}", w), torch.stack([(w.float() / frames).to(dtype)] * frames, 2))
    center = torch.zeros(4, 3, frames, 2, 5, dtype=dtype)
    center[:, :, frames // 2] = w
    assert_in_slices(made(f"inflate w {frames} how=center", w), center)


@pytest.mark.parametrize("how", ["mean", "center"])
def test_a_still_film_looks_like_its_picture(how: str) -> None:
    """The 3-D convolution of a picture that is repeated gives what the 2-D one gives."""
    conv = torch.nn.Conv2d(3, 8, 5, bias=False)
    w = made(f"inflate w 3 how={how}", conv.weight.detach()).read()
    picture = torch.randn(2, 3, 9, 9)
    film = torch.nn.functional.conv3d(picture.unsqueeze(2).expand(-1, -1, 3, -1, -1), w).squeeze(2)
    torch.testing.assert_close(film, conv(picture).detach())


BAD: dict[str, tuple[Any, str]] = {
    "channels w 0": (torch.ones(2, 3, 7, 7), "one channel or more, not 0"),
    "channels w -1": (torch.ones(2, 3, 7, 7), "one channel or more, not -1"),
    "channels w 4": (torch.ones(2, 3), r"\[2, 3\] is no kernel of a convolution, which is \(out, in, width\)"),
    "channels w 5": (torch.ones(2, 0, 7), r"\[2, 0, 7\] is no kernel"),
    "channels w 6": (torch.ones(2, 3, 7).int(), r"channels is for floating tensors, not for int32"),
    "inflate w 0": (torch.ones(2, 3, 7, 7), "one frame or more, not 0"),
    "inflate w 4": (torch.ones(2, 3, 7), r"\[2, 3, 7\] is no kernel of two dimensions"),
    "inflate w 5": (torch.ones(2, 3, 7, 7).bool(), "inflate is for floating tensors, not for bool"),
}


@pytest.mark.parametrize("rule", BAD)
def test_what_is_no_kernel_is_a_problem_that_names_the_key(rule: str) -> None:
    tensor, cause = BAD[rule]
    torch.save({"w": tensor}, "a.pth")
    (problem,) = cs.plan("a.pth", [rule]).problems
    assert re.search(cause, str(problem))
    assert problem.key == "w"

"""Positions and patches of another size, with timm, transformers and torch as the truth."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from helpers import assert_same_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resample_patch_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

import ckptsurgeon as cs

FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SIDES = st.tuples(st.integers(1, 7), st.integers(1, 7))


def made(rule: str, tensor: torch.Tensor) -> torch.Tensor:
    """What a rule makes of a tensor `w`, which has the spec that was planned."""
    torch.save({"w": tensor}, "resize.pth")
    ref = cs.plan("resize.pth", [rule]).check().result["w"]
    whole = ref.read()
    assert (ref.dtype.name, ref.shape) == (str(whole.dtype).removeprefix("torch."), tuple(whole.shape))
    assert whole.dtype == tensor.dtype
    assert b"".join(map(bytes, ref.blocks(160))) == whole.view(torch.uint8).numpy().tobytes()
    return whole


def text(size: tuple[int, int]) -> str:
    return f"{size[0]},{size[1]}"


@given(SIDES, SIDES, st.integers(0, 5), FLOATS, st.sampled_from(["bicubic", "bilinear"]), st.booleans())
def test_a_grid_is_what_timm_makes_of_it(
    old: tuple[int, int], new: tuple[int, int], prefix: int, dtype: torch.dtype, mode: str, antialias: bool
) -> None:
    w = torch.randn(1, prefix + old[0] * old[1], 6).to(dtype)
    options = f"prefix={prefix} from={text(old)} mode={mode} antialias={'yes' if antialias else 'no'}"
    want = resample_abs_pos_embed(w, list(new), list(old), prefix, mode, antialias)
    assert_same_tensor(made(f"resize w {text(new)} {options}", w), want.contiguous())
    assert_same_tensor(made(f"resize w {text(new)} {options}", w[0]), want[0].contiguous())


@given(st.integers(2, 7), SIDES, st.integers(0, 2))
def test_a_grid_is_square_and_sampled_as_in_timm_if_nothing_is_said(
    side: int, new: tuple[int, int], prefix: int
) -> None:
    w = torch.randn(1, prefix + side * side, 6)
    want = resample_abs_pos_embed(w, list(new), [side, side], prefix)
    assert_same_tensor(made(f"resize w {text(new)} prefix={prefix}", w), want.contiguous())


@given(SIDES, SIDES, FLOATS)
def test_an_image_of_positions_has_its_channels_first_or_last(
    old: tuple[int, int], new: tuple[int, int], dtype: torch.dtype
) -> None:
    w = torch.randn(1, *old, 6).to(dtype)
    want = resample_abs_pos_embed_nhwc(w, list(new)).contiguous()
    assert_same_tensor(made(f"resize w {text(new)} channels=last", w), want)
    image = w.permute(0, 3, 1, 2).contiguous()
    want = torch.nn.functional.interpolate(image.float(), new, mode="bicubic", antialias=True).to(dtype)
    assert_same_tensor(made(f"resize w {text(new)} channels=first", image), image if old == new else want)


def test_nearest_is_torchs() -> None:
    w = torch.randn(1, 16, 6)
    image = w.reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(image, (7, 3), mode="nearest").permute(0, 2, 3, 1).reshape(1, 21, 6)
    assert_same_tensor(made("resize w 7,3 mode=nearest", w), want.contiguous())


@pytest.mark.filterwarnings("ignore")
def test_without_antialiasing_it_is_what_transformers_does() -> None:
    """`ViTEmbeddings.interpolate_pos_encoding`, up and down."""
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    config = ViTConfig(hidden_size=12, image_size=64, patch_size=8, num_attention_heads=2, intermediate_size=8)
    embeddings = ViTEmbeddings(config)
    w = torch.randn(1, 65, 12)
    embeddings.position_embeddings.data = w
    for height, width in ((12, 12), (5, 9), (3, 3)):
        patches = torch.zeros(1, 1 + height * width, 12)
        want = embeddings.interpolate_pos_encoding(patches, height * 8, width * 8).detach()
        got = made(f"resize w {height},{width} prefix=1 antialias=no", w)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_model_of_timm_takes_what_is_resized_as_its_own() -> None:
    """Position embeddings and patch kernel of a ViT, as its own `load_pretrained` filter makes them."""
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    source = timm.create_model("vit_base_patch16_224", **options)
    target = timm.create_model("vit_base_patch16_224", **options, img_size=(96, 160), patch_size=8)
    torch.nn.init.normal_(source.pos_embed)
    torch.save(source.state_dict(), "a.pth")
    rules = [r"resize ^pos_embed$ 12,20 prefix=1", r"resize ^patch_embed\.proj\.weight$ 8,8 as=patch"]
    plan = cs.plan("a.pth", rules, to=target).check()
    want = timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), target)
    assert_same_tensor(plan.result["pos_embed"].read(), want["pos_embed"])
    kernel = plan.result["patch_embed.proj.weight"].read()
    torch.testing.assert_close(kernel, want["patch_embed.proj.weight"], rtol=0, atol=1e-6)


@given(st.integers(2, 7), SIDES, st.sampled_from([0, 3]))
def test_a_table_is_what_timm_makes_of_it(window: int, new: tuple[int, int], extra: int) -> None:
    """With the three rows behind that BEiT has, too."""
    w = torch.randn((2 * window - 1) ** 2 + extra, 4)
    shape = ((2 * new[0] - 1) * (2 * new[1] - 1) + extra, 4)
    want = resize_rel_pos_bias_table_simple(w, new, shape)
    assert_same_tensor(made(f"resize w {text(new)} as=table prefix={extra}", w), want.contiguous())


@given(SIDES, SIDES)
def test_a_table_with_an_image_for_each_head_is_what_timm_makes_of_it(
    window: tuple[int, int], new: tuple[int, int]
) -> None:
    """And a flat one of windows that are no square is the same, turned."""
    w = torch.randn(4, 2 * window[0] - 1, 2 * window[1] - 1)
    want = resize_rel_pos_bias_table_simple(w, new, (4, 2 * new[0] - 1, 2 * new[1] - 1)).contiguous()
    assert_same_tensor(made(f"resize w {text(new)} as=table", w), want)
    flat = made(f"resize w {text(new)} as=table from={text(window)}", w.reshape(4, -1).t().contiguous())
    torch.testing.assert_close(flat, want.reshape(4, -1).t(), rtol=0, atol=1e-6)


@settings(max_examples=50)
@given(SIDES, SIDES, FLOATS, st.sampled_from(["bicubic", "bilinear"]), st.booleans())
def test_a_patch_kernel_is_what_timm_makes_of_it(
    old: tuple[int, int], new: tuple[int, int], dtype: torch.dtype, mode: str, antialias: bool
) -> None:
    """Up to the rounding of float32, in which timm inverts."""
    w = torch.randn(5, 3, *old).to(dtype)
    got = made(f"resize w {text(new)} as=patch mode={mode} antialias={'yes' if antialias else 'no'}", w)
    want = resample_patch_embed(w, list(new), mode, antialias)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, float(want.float().abs().max())))


def test_a_larger_patch_kernel_sees_larger_patches_as_the_old_one_saw_the_small() -> None:
    """FlexiViT's own law: kernels and patches resized up together give the same tokens."""
    w, patch = torch.randn(8, 3, 8, 8), torch.randn(2, 3, 8, 8)
    large = torch.nn.functional.interpolate(patch, (16, 16), mode="bilinear")
    kernel = made("resize w 16,16 as=patch mode=bilinear antialias=no", w)
    want = torch.nn.functional.conv2d(patch, w)
    torch.testing.assert_close(torch.nn.functional.conv2d(large, kernel), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [((1, 17, 6), "4,4 prefix=1"), ((1, 6, 4, 5), "4,5"), ((49, 2), "4,4 as=table"), ((2, 3, 8, 8), "8,8 as=patch")],
)
def test_what_has_the_size_is_not_changed(shape: tuple[int, ...], rule: str) -> None:
    torch.save({"w": torch.randn(shape)}, "a.pth")
    ckpt = cs.open("a.pth")
    assert cs.plan(ckpt, [f"resize w {rule}"]).check().result["w"] is ckpt["w"]


BAD: dict[str, tuple[tuple[int, ...], str]] = {
    "16,16": (
        (1, 197, 8),
        r"197 tokens of \[1, 197, 8\], 0 of them .* no square \(197 = 14×14 \+ 1: prefix=1\); .* from=H,W",
    ),
    "16,16 prefix=1": ((1, 201, 8), r"\(201 = 14×14 \+ 5: prefix=5\)"),
    "16,16 prefix=0": ((1, 190, 8), r"make no square; of another grid"),
    "16,16 from=13,14": ((1, 197, 8), r"197 tokens of \[1, 197, 8\] are not 13×14 \+ 0 \(197 = 14×14 \+ 1: prefix=1\)"),
    "16,16 prefix=-1": ((1, 16, 8), "none or more tokens without a place, not -1"),
    "1,2,3": ((1, 16, 8), "one number for both, not 1,2,3"),
    "0,4": ((1, 16, 8), "one number for both, not 0,4"),
    "4,4 from=0": ((1, 16, 8), "one number for both, not 0,0"),
    "8,8 mode=nearest antialias=yes": ((1, 16, 8), "nothing to antialias"),
    "8,8": ((2, 16, 8), r"\[2, 16, 8\] is no position embedding, which is \(1, tokens, dim\)"),
    "8,9": ((1, 4, 4, 8), r"\[1, 4, 4, 8\] looks like \(1, height, width, dim\): channels=last says so"),
    "8,9 prefix=1": ((1, 8, 4, 4), r"prefix says nothing of \[1, 8, 4, 4\], where every vector has a place"),
    "8,9 from=4,5": ((1, 8, 4, 4), r"\[1, 8, 4, 4\] is of height and width 4,4"),
    "8,9 channels=last": ((1, 16, 4), "channels says nothing of"),
    "8,8 as=table": ((732, 4), r"732 rows of \[732, 4\], 0 .*\(732 = 27×27 \+ 3: prefix=3\)"),
    "9,9 as=table": ((16, 4), r"make no square \(16 = 3×3 \+ 7: prefix=7\)"),
    "8,9 as=table": ((4, 4, 5), "has odd sides"),
    "8,7 as=table prefix=3": ((4, 5, 5), "prefix says nothing of"),
    "9,8 as=table": ((4,), r"\[4\] is no table of relative positions"),
    "8,8 as=patch": ((4, 3, 16), r"\[4, 3, 16\] is no kernel of patches"),
    "8,8 as=patch prefix=1": ((4, 3, 16, 16), "prefix says nothing of a kernel of patches"),
    "3,3": ((1, 0, 16), r"\[1, 0, 16\] holds no values"),
}


@pytest.mark.parametrize("options", BAD)
def test_what_cannot_be_resized_is_a_problem_that_says_what_would_fit(options: str) -> None:
    shape, cause = BAD[options]
    torch.save({"w": torch.ones(shape)}, "a.pth")
    (problem,) = cs.plan("a.pth", [f"resize w {options}"]).problems
    assert re.search(cause, str(problem)), str(problem)
    assert problem.key == "w"


def test_integers_are_not_resized() -> None:
    torch.save({"w": torch.ones(1, 16, 8).int()}, "a.pth")
    (problem,) = cs.plan("a.pth", ["resize w 8,8"]).problems
    assert "resize is for floating tensors, not for int32" in str(problem)


def test_one_number_is_height_and_width() -> None:
    torch.save({"pos": torch.randn(1, 17, 4)}, "a.pth")
    made = [cs.plan("a.pth", [f"resize pos {size} prefix=1"]).check().result["pos"].read() for size in ("6", "6,6")]
    assert made[0].shape == (1, 37, 4)
    assert torch.equal(*made)

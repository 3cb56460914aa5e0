"""Norms folded into weights, with torch, torchvision and transformers as the truth."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torchvision
from helpers import assert_same_tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import ckptsurgeon as cs
from ckptsurgeon.ops import OPERATIONS

FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
FOLD = r"fold_weight_norm ^(.*)\.weight_g$ ^(.*)\.weight_v$ => \1.weight"


def folded(state: Any, *rules: str) -> cs.Checkpoint:
    torch.save(dict(state), "fold.pth")
    result = cs.plan("fold.pth", list(rules)).check().result
    for ref in result.values():
        whole = ref.read()
        assert tuple(whole.shape) == ref.shape
        assert b"".join(map(bytes, ref.blocks(160))) == whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return result


def close(got: cs.TensorRef, want: torch.Tensor) -> None:
    """Equal but for the last place."""
    tolerance = 1e-6 if want.dtype in (torch.float32, torch.float64) else torch.finfo(want.dtype).eps
    torch.testing.assert_close(got.read(), want.detach(), rtol=tolerance, atol=tolerance)


# -- weight norm


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(-1, 3), FLOATS)
def test_a_weight_norm_is_folded_as_torch_computes_it(shape: list[int], dim: int, dtype: torch.dtype) -> None:
    dim = min(dim, len(shape) - 1)
    v = torch.randn(shape, dtype=torch.float64).to(dtype)
    v[v == 0] = 1
    g = torch.norm_except_dim(v.double(), 2, dim).to(dtype) * 3
    want = torch._weight_norm(v.double(), g.double(), dim)
    result = folded({"a.weight_g": g, "a.weight_v": v}, f"{FOLD} dim={dim}")
    assert list(result) == ["a.weight"]
    assert result["a.weight"].dtype.name == str(dtype).removeprefix("torch.")
    tolerance = 1e-6 if dtype in (torch.float32, torch.float64) else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(result["a.weight"].read().double(), want, rtol=tolerance, atol=tolerance)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(-1, 3))
def test_a_weight_is_cut_into_norm_and_direction_and_back(shape: list[int], dim: int) -> None:
    dim = min(dim, len(shape) - 1)
    w = torch.randn(shape)
    cut = rf"weight_norm ^(.*)\.weight$ => \1.weight_g \1.weight_v dim={dim}"
    parts = folded({"a.weight": w}, cut)
    assert list(parts) == ["a.weight_g", "a.weight_v"]
    close(parts["a.weight_g"], torch.norm_except_dim(w, 2, dim))
    assert parts["a.weight_v"].source == cs.open("fold.pth")["a.weight"].source, "not a byte of it changes"
    close(folded({"a.weight": w}, cut, f"{FOLD} dim={dim}")["a.weight"], w)
    spec = cs.open("fold.pth")["a.weight"].spec
    given = {"dim": dim} if dim else {}
    assert OPERATIONS["weight_norm"].inverse({"dim": dim}, (spec,)) == ("fold_weight_norm", given)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3), nn.ConvTranspose1d(6, 4, 5)], ids=repr)
def test_both_weight_norms_of_torch_are_folded(layer: nn.Module, dim: int | None) -> None:
    x = torch.randn(2, 6, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(2, 6, 6)
    given = -1 if dim is None else dim
    new: Any = weight_norm(copy.deepcopy(layer), dim=dim)  # type: ignore[arg-type]
    old: Any = nn.utils.weight_norm(copy.deepcopy(layer), dim=dim)  # type: ignore[arg-type]
    new.parametrizations.weight.original0.data *= 1.5
    old.weight_g.data *= 1.5
    rule = r"fold_weight_norm ^parametrizations\.weight\.original0$ ^parametrizations\.weight\.original1$ => weight"
    for normed, text in ((new, rule), (old, "fold_weight_norm ^weight_g$ ^weight_v$ => weight")):
        result = folded(normed.state_dict(), f"{text} dim={given}")
        plain = copy.deepcopy(layer)
        plain.load_state_dict({key: ref.read() for key, ref in result.items()})
        torch.testing.assert_close(plain(x), normed(x))  # the old kind makes its weight when it is called
        close(result["weight"], normed.weight)


@pytest.mark.filterwarnings("ignore")
def test_the_weight_norm_of_wav2vec2_is_along_the_last_dimension() -> None:
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2PositionalConvEmbedding

    config = Wav2Vec2Config(hidden_size=8, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    layer = Wav2Vec2PositionalConvEmbedding(config)
    start = r"^(.*)parametrizations\.weight\."
    rule = rf"fold_weight_norm {start}original0$ {start}original1$ => \1weight"
    close(folded(layer.state_dict(), f"{rule} dim=2")["conv.weight"], layer.conv.weight)
    (problem,) = cs.plan("fold.pth", [rule]).problems
    assert "is [8, 1, 1], not [1, 1, 4]; dim=2 fits" in str(problem)
    assert "'conv.parametrizations.weight.original0', 'conv.parametrizations.weight.original1'" in str(problem)


def test_a_direction_of_zeros_is_an_error_and_not_a_nan() -> None:
    v = torch.randn(4, 3)
    v[2] = 0
    torch.save({"a.weight_g": torch.ones(4, 1), "a.weight_v": v, "a.weight": v}, "a.pth")
    with pytest.raises(cs.InputError, match="would get 3 NaN or infinite values of 12: the least norm .* is 0"):
        cs.plan("a.pth", ["drop ^a.weight$", FOLD]).check().result["a.weight"].read()
    rule = r"weight_norm ^a.weight$ => g v"
    with pytest.raises(cs.InputError, match="has 1 norms of 4 that are zero; no scale gives a direction to zeros"):
        cs.plan("a.pth", [rule]).check().result["g"].read()
    with pytest.raises(cs.InputError) as failed:
        cs.save(cs.plan("a.pth", ["drop ^a.weight$", FOLD]).check().result, "b.safetensors")
    assert failed.value.key == "a.weight"


def test_a_nan_that_was_there_is_kept() -> None:
    v = torch.randn(4, 3)
    v[2] = float("nan")
    made = folded({"a.weight_g": torch.ones(4, 1), "a.weight_v": v}, FOLD)["a.weight"].read()
    assert made.isnan().sum(1).tolist() == [0, 0, 3, 0]


# -- spectral norm


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3), nn.ConvTranspose2d(6, 4, 3), nn.Embedding(5, 7)], ids=repr
)
def test_both_spectral_norms_of_torch_are_folded_as_they_are_in_eval_mode(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    layer.reset_parameters()  # after the seed
    dim = int(isinstance(layer, nn.ConvTranspose2d))
    new: Any = spectral_norm(copy.deepcopy(layer)).eval()
    old: Any = nn.utils.spectral_norm(copy.deepcopy(layer)).eval()
    old(torch.ones(1, dtype=torch.long) if isinstance(layer, nn.Embedding) else torch.randn(2, 6, 6, 6))
    mine = r"fold_spectral_norm ^weight_orig$ ^weight_u$ ^weight_v$ => weight"
    start = r"^parametrizations\.weight\."
    rule = rf"fold_spectral_norm {start}original$ {start}0\._u$ {start}0\._v$ => weight"
    for normed, text in ((new, rule), (old, mine)):
        result = folded(normed.state_dict(), f"{text} dim={dim}")
        assert sorted(result) == sorted(layer.state_dict())
        close(result["weight"], normed.weight)


SN = r"fold_spectral_norm ^w$ ^u$ ^v$ => w"
SPECTRAL: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    SN: (
        {"w": torch.ones(4, 6), "u": torch.ones(6), "v": torch.ones(4)},
        r"of a weight of \[4, 6\] with dim=0 are \[4\] and \[6\], not \[6\] and \[4\]; dim=1 fits",
    ),
    f"{SN} dim=2": ({"w": torch.ones(4, 6), "u": torch.ones(6), "v": torch.ones(4)}, "dimension 2 is not one of the 2"),
    f"{SN} dim=0": ({"w": torch.ones(4), "u": torch.ones(4), "v": torch.ones(1)}, "two dimensions or more"),
    f"{SN} dim=1": ({"w": torch.ones(4, 1), "u": torch.ones(4), "v": torch.ones(1).int()}, "not for int32"),
    "fold_spectral_norm ^w$ ^u$ => w": (
        {"w": torch.ones(4), "u": torch.ones(4)},
        "3 patterns are for a weight, u and v",
    ),
    "fold_weight_norm ^w$ ^u$ ^v$ => w": ({"w": torch.ones(4)}, "2 patterns are for magnitude and direction, not 3"),
    "fold_weight_norm ^w$ ^u$ => w dim=-2": ({"w": torch.ones(4), "u": torch.ones(4)}, "dim is from 0 on, or -1"),
    "fold_weight_norm ^w$ ^u$ => w": ({"w": torch.ones(3), "u": torch.ones(4)}, r"of \[4\] is \[4\], not \[3\]"),
    "weight_norm ^w$ => g": ({"w": torch.ones(4)}, "2 templates are for magnitude and direction, not 1"),
    "weight_norm ^w$ => g v": ({"w": torch.ones(4).int()}, "weight_norm is for floating tensors"),
    "weight_norm ^w$ => g v dim=1": ({"w": torch.ones(4)}, "dimension 1 is not one of the 1"),
}


@pytest.mark.parametrize("rule", SPECTRAL)
def test_what_cannot_be_folded_is_a_problem(rule: str) -> None:
    state, cause = SPECTRAL[rule]
    torch.save(state, "a.pth")
    (problem,) = cs.plan("a.pth", [rule]).problems
    assert re.search(cause, str(problem)), str(problem)


def test_a_spectral_norm_of_zero_is_an_error() -> None:
    torch.save({"w": torch.zeros(4, 6), "u": torch.ones(4), "v": torch.ones(6)}, "a.pth")
    with pytest.raises(cs.InputError, match="24 NaN or infinite values of 24: the spectral norm is 0"):
        cs.plan("a.pth", [SN]).check().result["w"].read()


# -- batch norm


def trained(norm: Any) -> Any:
    """A batch norm with statistics that tell channels apart, in eval mode."""
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.5 if name != "running_mean" else torch.randn(value.shape))
    return norm.eval()


LAYERS = [
    (nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8)),
    (nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)),
    (nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8, affine=False)),
    (nn.Conv3d(6, 8, 3, bias=False), nn.BatchNorm3d(8, affine=False, eps=0.01)),
    (nn.ConvTranspose2d(6, 8, 3), nn.BatchNorm2d(8)),
    (nn.Linear(6, 8), nn.BatchNorm1d(8)),
    (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)),
]


@pytest.mark.parametrize(("layer", "norm"), LAYERS, ids=repr)
def test_a_batch_norm_is_folded_as_torch_fuses_it(layer: Any, norm: Any) -> None:
    transposed = isinstance(layer, nn.ConvTranspose2d)
    model = nn.Sequential(layer, trained(norm)).eval()
    options = f"eps={norm.eps} transposed={'yes' if transposed else 'no'}"
    result = folded(model.state_dict(), rf"fold_bn ^0$ => 1 {options}")
    assert list(result) == ["0.weight", "0.bias"]
    if isinstance(layer, nn.Linear):
        want = fuse_linear_bn_eval(layer, norm)
    else:
        want = fuse_conv_bn_eval(layer, norm, transpose=transposed)
    assert_same_tensor(result["0.weight"].read(), want.weight)
    close(result["0.bias"], want.bias)


def test_a_transposed_convolution_of_groups_is_folded_too() -> None:
    """Where torch's own fusion fails: the outputs of a group are beside each other."""
    layer, norm = nn.ConvTranspose2d(6, 8, 3, groups=2), trained(nn.BatchNorm2d(8))
    result = folded(nn.Sequential(layer, norm).state_dict(), "fold_bn ^0$ => 1 transposed=yes")
    x, plain = torch.randn(2, 6, 5, 5), copy.deepcopy(layer)
    plain.load_state_dict({key.removeprefix("0."): ref.read() for key, ref in result.items()})
    torch.testing.assert_close(plain(x), norm(layer(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtypes_are_those_of_the_layer(dtype: torch.dtype) -> None:
    """The batch norm may be of another one, as it is under mixed precision."""
    layer, norm = nn.Conv2d(3, 8, 3, bias=False).to(dtype), trained(nn.BatchNorm2d(8))
    result = folded(nn.Sequential(layer, norm).state_dict(), "fold_bn 0 => 1")
    want = fuse_conv_bn_eval(layer.double().eval(), copy.deepcopy(norm).double())
    for name, value in want.state_dict().items():
        close(result[f"0.{name}"], value.to(dtype))


def identities(module: nn.Module) -> nn.Module:
    """The model with nothing in the place of its batch norms, and with a bias in each convolution."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        elif isinstance(child, nn.Conv2d) and child.bias is None:
            child.bias = nn.Parameter(torch.zeros(child.out_channels))
        else:
            identities(child)
    return module


def test_a_whole_resnet_without_its_batch_norms_gives_what_it_gave() -> None:
    model = torchvision.models.resnet18(num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            trained(module)
    torch.save(model.state_dict(), "a.pth")
    plain: Any = identities(copy.deepcopy(model))
    rules = [r"fold_bn ^(.*)conv(\d)$ => \1bn\2", r"fold_bn ^(.*downsample)\.0$ => \1.1"]
    plan = cs.plan("a.pth", rules, to=plain).check()
    plain.load_state_dict({key: ref.read() for key, ref in plan.result.items()})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got, want = plain(x), model(x)
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_where_and_layers_without_a_batch_norm_are_left() -> None:
    state = {**nn.Conv2d(3, 4, 1).state_dict(prefix="a.conv."), **nn.Conv2d(3, 4, 1).state_dict(prefix="b.conv.")}
    state |= nn.BatchNorm2d(4).state_dict(prefix="a.bn.")
    result = folded(state, r"fold_bn ^(.*)\.conv$ => \1.bn")
    assert list(result) == ["a.conv.weight", "a.conv.bias", "b.conv.weight", "b.conv.bias"]
    assert result["b.conv.weight"] == cs.open("fold.pth")["b.conv.weight"]
    (problem,) = cs.plan("fold.pth", [r"fold_bn ^(.*)\.conv$ => \1.bn where=d3==3"]).problems
    assert "finds no module with a weight for which the template names a batch norm" in str(problem)


def bn(**changes: Any) -> dict[str, torch.Tensor]:
    """A convolution `c` and its batch norm `n`; None leaves one out."""
    state = {**nn.Conv2d(3, 4, 1).state_dict(prefix="c."), **trained(nn.BatchNorm2d(4)).state_dict(prefix="n.")}
    state |= {key.replace("_", ".", 1): value for key, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


BN: list[tuple[str, dict[str, torch.Tensor], str]] = [
    (
        "",
        bn(c_weight=torch.ones(3, 4, 1, 1)),
        r"of 4 channels is none of the outputs of \[3, 4, 1, 1\]; with transposed=yes",
    ),
    ("transposed=yes", bn(), r"none of the outputs of \[4, 3, 1, 1\]; with transposed=no they fit"),
    ("", bn(c_weight=torch.ones(3, 5, 1, 1)), r"none of the outputs of \[3, 5, 1, 1\]$"),
    ("", bn(c_weight=torch.ones(4)), r"two dimensions or more, not \[4\]"),
    ("", bn(c_weight=torch.ones(4, 3).int()), "fold_bn is for floating tensors, not for int32"),
    ("", bn(c_bias=torch.ones(3)), r"one number for each channel, and not \[4\] and \[3\]"),
    ("", bn(n_running_mean=None), "'n' has a running_var, but no running_mean"),
    ("", bn(n_bias=None), "of the batch norm 'n' there is only 'n.weight'"),
    ("eps=-1", bn(), "eps is not negative, as -1 is"),
]


@pytest.mark.parametrize(("options", "state", "cause"), BN, ids=[case[2] for case in BN])
def test_a_batch_norm_that_does_not_fit_is_a_problem(options: str, state: Any, cause: str) -> None:
    torch.save(state, "a.pth")
    (problem,) = cs.plan("a.pth", [f"fold_bn ^c$ => n {options}"]).problems
    assert re.search(cause, str(problem)), str(problem)
    assert problem.key == "c.weight"


def test_two_layers_before_one_batch_norm_are_a_problem() -> None:
    torch.save({**bn(), **nn.Conv2d(3, 4, 1).state_dict(prefix="d.")}, "a.pth")
    (problem,) = cs.plan("a.pth", ["fold_bn ^[cd]$ => n"]).problems
    assert "'n.running_mean' would be a part of 'c.weight' and 'd.weight'" in str(problem)


def test_a_variance_of_zero_without_eps_is_an_error_and_not_an_infinity() -> None:
    torch.save(bn(n_running_var=torch.tensor([1.0, 0, 1, 1])), "a.pth")
    result = cs.plan("a.pth", ["fold_bn ^c$ => n eps=0"]).check().result
    for key, count in (("c.weight", "3 NaN or infinite values of 12"), ("c.bias", "1 NaN or infinite values of 4")):
        with pytest.raises(cs.InputError, match=f"{count}: .* variance, which is 0 or more, plus eps=0; eps=X"):
            result[key].read()
    assert cs.plan("a.pth", ["fold_bn ^c$ => n"]).check().result["c.weight"].read().isfinite().all()

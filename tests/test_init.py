"""Initialising what a checkpoint did not bring, on live models and in files."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import assert_same_tensor, assert_same_tensors
from models import Net, Tied
from resnet18 import telling
from test_targets import MODELS
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.schemes import Scheme

NOTHING = cs.Checkpoint({})


def initialised(model: nn.Module, scheme: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a model into which nothing was loaded."""
    cs.init_missing(model, cs.load_into(model, NOTHING, missing="init"), scheme, seed)
    return {key: value.clone() for key, value in model.state_dict().items()}


def std(value: torch.Tensor) -> float:
    return float(value.double().std())


@pytest.mark.parametrize(
    ("scheme", "conv", "linear"),
    [
        ("kaiming_fan_out", math.sqrt(2 / (128 * 9)), math.sqrt(2 / 1000)),
        ("kaiming_normal", math.sqrt(2 / (64 * 9)), math.sqrt(2 / 512)),
        ("xavier_uniform", math.sqrt(2 / (192 * 9)), math.sqrt(2 / 1512)),
        ("normal_0.02", 0.02, 0.02),
        ("normal:0.02", 0.02, 0.02),
        ("torchvision", math.sqrt(2 / (128 * 9)), 0.01),
        ("timm", math.sqrt(2 / (128 * 9)), 0.02),
        ("trunc_normal", 0.0176, 0.0176),
    ],
)
def test_weights_have_the_deviation_of_their_scheme_and_norms_and_biases_begin_anew(
    scheme: str, conv: float, linear: float
) -> None:
    made = initialised(telling(torchvision.models.resnet18()), scheme)
    assert std(made["layer2.0.conv1.weight"]) == pytest.approx(conv, rel=0.02)
    assert std(made["fc.weight"]) == pytest.approx(linear, rel=0.02)
    for key, want in {
        "bn1.weight": 1,
        "bn1.bias": 0,
        "bn1.running_mean": 0,
        "bn1.running_var": 1,
        "fc.bias": 0,
    }.items():
        assert_same_tensor(made[key], torch.full_like(made[key], want))
    assert_same_tensor(made["bn1.num_batches_tracked"], torch.tensor(0))


def test_timms_scheme_has_the_deviation_that_timms_own_code_gives() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    model.init_weights("")
    want = std(model.blocks[0].attn.qkv.weight.detach())
    assert std(initialised(model, "timm")["blocks.0.attn.qkv.weight"]) == pytest.approx(want, rel=0.02)


def test_only_what_was_not_loaded_is_changed() -> None:
    torch.save(telling(torchvision.models.resnet18()).state_dict(), "a.pth")
    model = telling(torchvision.models.resnet18(num_classes=5), seed=3)
    done = cs.init_missing(model, cs.load_into(model, "a.pth", fit=True), {"Linear": "normal:0.01", "*": "zeros"})
    assert done.made == {"fc.weight": "normal:0.01", "fc.bias": "zeros"}
    assert not done.partly
    assert not done.left
    state, source = model.state_dict(), torch.load("a.pth")
    head = [state.pop("fc.weight"), state.pop("fc.bias")]
    assert_same_tensors(state, {key: source[key] for key in state})
    assert std(head[0]) == pytest.approx(0.01, rel=0.1)
    assert not head[1].any()


@pytest.mark.parametrize("scheme", ["kaiming_fan_out", "timm", "zeros", "BatchNorm2d=constant:0.5 *=normal:0.02"])
def test_a_file_gets_the_bytes_that_a_live_model_gets(scheme: str, ckpt: Any) -> None:
    torch.save(telling(torchvision.models.resnet18()).state_dict(), "a.pth")
    rules = ["drop ^conv1", r"drop ^layer4\.1\.bn1"]
    model = telling(torchvision.models.resnet18(num_classes=5), seed=3)
    report = cs.load_into(model, "a.pth", rules, mismatched="overlap", missing="init")
    cs.init_missing(model, report, scheme, 7)
    words = [word for rule in rules for word in ("--rule", rule)]
    words += [word for one in scheme.split() for word in ("--init", one)]
    out = ckpt(
        "remap", "a.pth", "-o", "b.pth", *words, "--seed", "7", "--mismatched", "overlap", "--missing", "init",
        "--to", "torchvision:resnet18,num_classes=5",
    )  # fmt: skip
    assert out.code == 0, out.err
    assert_same_tensors(torch.load("b.pth"), model.state_dict())
    assert cs.open("b.pth").provenance.options["init"] == scheme
    args = ("verify", "b.pth", "--against", "a.pth", "--recorded", "--to", "torchvision:resnet18,num_classes=5")
    assert ckpt(*args).code == 0


def test_new_channels_are_initialised_and_the_loaded_ones_stay_bit_for_bit() -> None:
    torch.save(telling(Net(channels=3, width=8)).state_dict(), "a.pth")
    source, model = torch.load("a.pth"), telling(Net(channels=5, width=12), seed=2)
    report = cs.load_into(model, "a.pth", mismatched="overlap")
    done = cs.init_missing(model, report, "xavier_uniform", 4)
    full = initialised(Net(channels=5, width=12), "xavier_uniform", 4)
    assert done.partly["stem.weight"] == 12 * 5 * 9 - 8 * 3 * 9
    assert done.partly["norm.running_var"] == 4
    assert "norm.num_batches_tracked" not in done.made
    for key, value in model.state_dict().items():
        want = full[key] if value.dim() else source[key]
        want[tuple(slice(0, size) for size in source[key].shape)] = source[key]
        assert_same_tensor(value, want, key)
    written = cs.remap(
        "a.pth", "b.pth", to=Net(channels=5, width=12), mismatched="overlap", init="xavier_uniform", seed=4
    )
    assert_same_tensors(cs.open(written.path), model.state_dict())


def test_a_tensor_has_the_same_bytes_whatever_else_is_made() -> None:
    whole = initialised(Net(), "trunc_normal", 5)
    model = telling(Net(), seed=8)
    torch.save({key: value for key, value in model.state_dict().items() if key != "fc.weight"}, "a.pth")
    cs.init_missing(model, cs.load_into(model, "a.pth", missing="init"), "trunc_normal", 5)
    assert_same_tensor(model.fc.weight.detach(), whole["fc.weight"])
    other = initialised(Net(), "trunc_normal", 6)
    assert not torch.equal(other["fc.weight"], whole["fc.weight"])


def test_what_no_rule_covers_keeps_what_the_model_gave_and_is_named() -> None:
    model = telling(timm.create_model("vit_tiny_patch16_224", init_values=1e-3, depth=1, num_classes=3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    done = cs.init_missing(model, cs.load_into(model, NOTHING, missing="init"), "timm")
    assert set(done.left) == {"cls_token", "pos_embed", "blocks.0.ls1.gamma", "blocks.0.ls2.gamma"}
    for key in done.left:
        assert_same_tensor(model.state_dict()[key], before[key], key)
    assert "left: cls_token (no rule of the scheme is about it)" in str(done)
    table = {"VisionTransformer": "normal:0.02", "LayerScale": 1e-5}
    done = cs.init_missing(model, cs.load_into(model, NOTHING, missing="init"), table)
    assert torch.equal(model.blocks[0].ls1.gamma, torch.full((192,), 1e-5))
    assert std(model.pos_embed.detach()) == pytest.approx(0.02, rel=0.02)
    assert "head.weight" in done.left
    assert "blocks.0.norm1.weight" not in done.left


def test_a_table_goes_by_type_then_kind_then_the_rest() -> None:
    layers = [("conv", nn.Conv2d(3, 8, 3)), ("norm", nn.GroupNorm(2, 8)), ("act", nn.PReLU(8)), ("fc", nn.Linear(8, 2))]
    model = nn.Sequential(OrderedDict(layers))
    made = initialised(model, {nn.Conv2d: 0.5, "norm": "zeros", "prelu": 0.1, "bias": 0.75, "*": "ones"})
    want = {"conv.weight": 0.5, "conv.bias": 0.75, "norm.weight": 0, "norm.bias": 0, "act.weight": 0.1, "fc.weight": 1}
    for key, value in {**want, "fc.bias": 0.75}.items():
        assert_same_tensor(made[key], torch.full_like(made[key], value), key)
    before = telling(model).conv.weight.detach().clone()
    assert_same_tensor(initialised(model, {"Conv2d": "keep", "*": "zeros"})["conv.weight"], before)
    assert torch.equal(initialised(telling(model), "zeros")["act.weight"], torch.full((8,), 0.25))


def test_a_function_fills_in_place_by_a_random_state_of_its_own() -> None:
    def mine(name: str, tensor: torch.Tensor, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and name.endswith("weight"):
            nn.init.normal_(tensor, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(tensor, 0.5)

    models = [telling(Net(width=64)) for _ in range(2)]
    state = torch.get_rng_state()
    first, again = initialised(models[0], mine, 3), initialised(models[1], {"*": mine}, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_tensors(first, again)
    assert std(first["fc.weight"]) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(first["norm.weight"], torch.full((64,), 0.5))
    assert_same_tensor(first["stem.weight"], telling(Net(width=64)).stem.weight.detach())


def test_of_a_partly_copied_tensor_a_function_decides_the_new_part_alone() -> None:
    torch.save(telling(Net(num_classes=6)).state_dict(), "a.pth")
    model, source = Net(num_classes=10), torch.load("a.pth")
    report = cs.load_into(model, "a.pth", mismatched="overlap")
    done = cs.init_missing(model, report, lambda name, tensor, module: tensor.fill_(module.in_features))
    assert done.partly == {"fc.weight": 32, "fc.bias": 4}
    assert torch.equal(model.fc.weight, torch.cat([source["fc.weight"], torch.full((4, 8), 8.0)]))
    assert torch.equal(model.fc.bias, torch.cat([source["fc.bias"], torch.full((4,), 8.0)]))


def test_nothing_is_made_of_a_tensor_that_was_only_cut() -> None:
    torch.save(telling(Net(num_classes=10)).state_dict(), "a.pth")
    model = Net(num_classes=6)
    done = cs.init_missing(model, cs.load_into(model, "a.pth", mismatched="overlap"), "zeros")
    assert str(done) == "initialised 0 tensors, 0 left as they were"
    assert torch.equal(model.fc.weight, torch.load("a.pth")["fc.weight"][:6])


def test_tied_names_are_made_once_and_a_loaded_one_is_not_made_anew() -> None:
    model = Tied(1000, 64)
    done = cs.init_missing(model, cs.load_into(model, NOTHING, missing="init"), "xavier_uniform")
    assert done.made == {"embed.weight": "normal:0.02"}
    assert done.left == {"head.weight": "shares its memory with 'embed.weight'"}
    assert model.head.weight is model.embed.weight
    assert std(model.embed.weight.detach()) == pytest.approx(0.02, rel=0.02)
    torch.save({"head.weight": torch.ones(1000, 64)}, "a.pth")
    assert not cs.init_missing(model, cs.load_into(model, "a.pth", missing="skip")).made
    assert torch.equal(model.embed.weight, torch.ones(1000, 64))
    torch.save({"head.weight": torch.ones(900, 64)}, "b.pth")
    for missing in ("init", "skip"):
        model = telling(Tied(1000, 64))
        done = cs.init_missing(model, cs.load_into(model, "b.pth", mismatched="overlap", missing=missing), "zeros")
        assert done.partly == {"embed.weight": 100 * 64}
        assert torch.equal(model.embed.weight, torch.cat([torch.ones(900, 64), torch.zeros(100, 64)]))


def test_values_are_made_in_float32_and_cast_and_wrapped_models_have_the_same_names() -> None:
    want = initialised(Net(), "kaiming_fan_out", 2)
    half = initialised(Net().to(torch.bfloat16), "kaiming_fan_out", 2)
    assert_same_tensors(half, {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in want.items()})
    wrapped = initialised(nn.DataParallel(torch.compile(Net())), "kaiming_fan_out", 2)
    assert_same_tensors(dict(zip(want, wrapped.values(), strict=True)), want)


def test_norms_that_count_from_zero_keep_what_their_model_gives() -> None:
    class GemmaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

    assert torch.equal(initialised(nn.Sequential(GemmaRMSNorm()), "timm")["0.weight"], torch.zeros(4))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("kaiming_fanout", "the nearest is 'kaiming_fan_out'"),
        ("normal:x", "normal takes 0 or 1 or 2 numbers"),
        ({"Conv3d": "zeros"}, "the Net has no tensors of a Conv3d; the nearest are 'Conv2d'"),
        ({"norm": "kaiming_fan_out"}, "'norm.weight' of a BatchNorm2d: kaiming_fan_out needs two dimensions"),
        ("Linear=zeros timm", "'timm': write TYPE=SCHEME"),
        ({}, "a table of them by type"),
        ({3: "zeros"}, "not by 3"),
        ("", "this is empty"),
    ],
)
def test_wrong_schemes_are_named_and_nothing_is_changed(scheme: Any, words: str) -> None:
    model = telling(Net())
    report = cs.load_into(model, NOTHING, missing="init")
    with pytest.raises(cs.UsageError, match=words):
        cs.init_missing(model, report, scheme)
    assert_same_tensors(model.state_dict(), telling(Net()).state_dict())


def test_other_wrong_use_is_refused() -> None:
    report = cs.load_into(Net(), NOTHING, missing="init")
    with pytest.raises(cs.UsageError, match=r"'fc.weight' \[10, 8\], and the Net has it as \[4, 8\]"):
        cs.init_missing(Net(4), report)
    with torch.device("meta"):
        bare = Net()
    with pytest.raises(cs.UsageError, match="'stem.weight' is on the meta device; give load_into assign=True"):
        cs.init_missing(bare, report)
    with pytest.raises(cs.UsageError, match="a seed is a whole number"):
        cs.init_missing(Net(), report, seed=-1)
    with pytest.raises(cs.UsageError, match="takes a model and the report"):
        cs.init_missing(report, Net())
    with pytest.raises(cs.UsageError, match="goes with --missing init"):
        cs.plan(NOTHING, to=Net(), missing="skip", init="timm")
    with pytest.raises(cs.UsageError, match="goes with --missing init"):
        cs.plan(NOTHING, init="timm")
    with pytest.raises(cs.UsageError, match="a function initialises live models alone"):
        cs.plan(NOTHING, to=Net(), missing="init", init={"*": print})
    with pytest.raises(cs.UsageError, match="the checkpoint is a checkpoint; name a model"):
        cs.plan(NOTHING, to=NOTHING, missing="init", init="timm")


def test_the_plan_says_the_scheme_and_records_it_only_where_it_decided_anything() -> None:
    plan = cs.plan(NOTHING, to=Net(), missing="init", init={"Linear": "normal_0.01"})
    assert plan.missing["fc.weight"] == "initialised by normal:0.01"
    assert plan.missing["stem.weight"] == "initialised as the Net does"
    assert plan.result.derived.options["init"] == "Linear=normal:0.01"
    torch.save(Net().state_dict(), "a.pth")
    assert "init" not in cs.plan("a.pth", to=Net(), missing="init", init="timm").result.derived.options


def test_the_command_says_what_is_wrong_with_a_scheme(ckpt: Any) -> None:
    torch.save(Net().state_dict(), "a.pth")
    to = ("remap", "a.pth", "-o", "b.pth", "--to", f"{MODELS}:Net")
    for words, error in {
        ("--init", "timm"): "goes with --missing init",
        ("--fit", "--init", "tim"): "the nearest is 'timm'",
        ("--fit", "--init", "Conv2d=timm", "--init", "Conv2d=zeros"): "each type once",
        ("--fit", "--init", ""): "this is empty",
    }.items():
        out = ckpt(*to, *words)
        assert out.code == 2
        assert error in " ".join(out.err.split())


def test_a_scalar_can_be_filled() -> None:
    made = cs.plan(NOTHING, ["fill count '' 3 dtype=int64"]).check().result["count"].read()
    assert_same_tensor(made, torch.tensor(3))


def test_a_scheme_is_read_from_what_it_writes() -> None:
    scheme = Scheme.of({"Conv2d": "normal:0.0,1e-05", "*": 1})
    assert str(scheme) == "Conv2d=normal:0.0,1e-05 *=constant:1"
    assert Scheme.of(str(scheme)) == scheme


class Lapped(nn.Module):
    """Two parameters over one memory: `a` lies over the first elements of `b` as well."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(6.0)
        self.a, self.b = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
        self.fc = nn.Linear(2, 2)


def test_what_lies_over_a_part_of_another_parameter_is_left_as_it_was() -> None:
    model = Lapped()
    torch.save({"b": torch.full((4,), 7.0)}, "a.pth")
    done = cs.init_missing(model, cs.load_into(model, "a.pth", missing="skip"), {"Lapped": "zeros", "Linear": "ones"})
    assert done.left["a"] == "shares its memory in part with 'b', which was loaded"
    assert done.made == {"fc.weight": "ones", "fc.bias": "zeros"}
    assert model.b.tolist() == [7, 7, 7, 7]
    assert model.a.tolist() == [0, 1, 7, 7]
    model = Lapped()
    done = cs.init_missing(model, cs.load_into(model, NOTHING, missing="skip"), {"Lapped": "ones"})
    assert {"a", "b"} <= set(done.left)
    assert model.a.tolist() == [0, 1, 2, 3]


def test_views_that_lie_crosswise_without_a_common_element_are_made() -> None:
    model, whole = nn.Module(), torch.ones(3, 4)
    model.left, model.right = nn.Parameter(whole[:, :2]), nn.Parameter(whole[:, 2:])
    done = cs.init_missing(model, cs.load_into(model, NOTHING, missing="skip"), {"Module": "zeros"})
    assert set(done.made) == {"left", "right"}
    assert not whole.any()


@pytest.mark.parametrize(
    "function",
    [
        lambda name, tensor, module: torch.zeros_like(tensor),
        lambda name, tensor, module: tensor.resize_(1) and None,
    ],
    ids=["a new tensor", "another shape"],
)
def test_a_function_that_does_not_fill_its_tensor_is_refused_and_nothing_is_changed(function: Any) -> None:
    model = telling(Net())
    report = cs.load_into(model, NOTHING, missing="init")
    with pytest.raises(cs.UsageError, match="the function (returns a new tensor for|made .* of) 'stem.weight'"):
        cs.init_missing(model, report, function)
    assert_same_tensors(model.state_dict(), telling(Net()).state_dict())
    done = cs.init_missing(model, report, lambda name, tensor, module: nn.init.zeros_(tensor))
    assert len(done.made) == len(report.kept)


def test_a_function_that_fails_leaves_the_model_as_it_was() -> None:
    def mine(name: str, tensor: torch.Tensor, module: nn.Module) -> None:
        tensor.zero_()
        if name == "fc.bias":
            raise RuntimeError("enough")

    model = telling(Net())
    report = cs.load_into(model, NOTHING, missing="init")
    with pytest.raises(RuntimeError, match="enough") as caught:
        cs.init_missing(model, report, {"Linear": mine, "*": "zeros"})
    assert caught.value.__notes__ == ["while 'fc.bias' was initialised; the model is as it was"]
    assert_same_tensors(model.state_dict(), telling(Net()).state_dict())


def test_a_module_that_came_after_the_load_is_not_the_reports() -> None:
    model = Net()
    report = cs.load_into(model, NOTHING, missing="init")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(cs.UsageError, match="the Net has 'extra.weight', and the model of the report had none"):
        cs.init_missing(model, report)


def test_a_number_is_a_scheme_and_one_tensor_is_one() -> None:
    model = nn.Linear(2, 2, bias=False)
    done = cs.init_missing(model, cs.load_into(model, NOTHING, missing="init"), 0.5)
    assert str(done).splitlines()[0] == "initialised 1 tensor, 0 left as they were"
    assert model.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert done._repr_html_() == f"<pre>{done}</pre>"


def test_names_with_control_characters_are_shown_escaped() -> None:
    model = nn.Module()
    model.register_parameter("w\x1b[31m", nn.Parameter(torch.ones(2)))
    report = cs.load_into(model, NOTHING, missing="init")
    assert "kept as it was: w\\x1b[31m (" in str(report)
    for scheme in ("ones", {"Module": "ones"}):
        assert "w\\x1b[31m" in str(cs.init_missing(model, report, scheme))

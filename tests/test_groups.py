"""Parameter groups: who learns how fast and who decays, with real optimizers and the trainers that people have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as lightning
import timm
import timm.optim
import torch
import torchvision
import transformers
from helpers import assert_same_tensor
from models import Net, Tied
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from resnet18 import telling
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

import ckptsurgeon as cs
from ckptsurgeon import targets
from ckptsurgeon.finetune.depth import depths, head_of


class Face(nn.Module):
    """A network as those for faces are: the names of its norms and PReLUs are numbers."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4)]
        self.input = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.GroupNorm(2, 4), nn.PReLU(4))
        self.body = nn.ModuleList([nn.ModuleDict({"res_layer": nn.Sequential(*block)})])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body[0]["res_layer"](self.input(x)).mean((2, 3)))


def rates(groups: cs.Groups) -> dict[str, float]:
    """Parameter → learning rate; every name stands in one group."""
    found = {name: one["lr"] for one in groups for name in one["param_names"]}
    assert len(found) == sum(len(one["params"]) for one in groups)
    return found


def decays(groups: cs.Groups) -> dict[str, float]:
    return {name: one["weight_decay"] for one in groups for name in one["param_names"]}


def assert_whole(groups: cs.Groups, model: nn.Module) -> None:
    """Each trainable parameter is in exactly one group, under its own name."""
    names = {id(value): name for name, value in model.named_parameters()}
    pairs = [(id(value), name) for one in groups for value, name in zip(one["params"], one["param_names"], strict=True)]
    assert sorted(pairs) == sorted(
        (key, name) for key, name in names.items() if dict(model.named_parameters())[name].requires_grad
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """How far one step on gradients of one moves each parameter."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = torch.ones_like(value) if value.requires_grad else None
    optimizer.step()
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


def test_s14_the_head_learns_ten_times_faster() -> None:
    """The rates are those by which a real step moves the weights."""
    model = telling(torchvision.models.resnet18(num_classes=4))
    for multiple in (10, 100):
        groups = cs.param_groups(model, 0.001, {"^fc": multiple})
        assert_whole(groups, model)
        assert [one["name"] for one in groups] == ["base", "^fc"]
        assert rates(groups) == {
            name: 0.001 * (multiple if name.startswith("fc") else 1) for name, _ in model.named_parameters()
        }
        assert rates(cs.param_groups(model, 0.001, head=multiple)) == rates(groups)
        for name, moved in step(model, torch.optim.SGD(groups)).items():
            torch.testing.assert_close(moved, torch.full_like(moved, rates(groups)[name]), atol=1e-6, rtol=1e-4)


def test_s14_biases_at_twice_the_rate_and_a_named_layer_at_20_and_10() -> None:
    model = torchvision.models.alexnet()
    groups = cs.param_groups(
        model,
        0.01,
        [
            (r"^classifier\.6\.weight", 10),
            (r"^classifier\.6\.bias", {"lr_mult": 20, "name": "last/bias"}),
            ("type=bias", {"lr_mult": 2, "fallback": True}),
        ],
    )
    assert_whole(groups, model)
    got = rates(groups)
    assert got.pop("classifier.6.weight") == pytest.approx(0.1)
    assert got.pop("classifier.6.bias") == pytest.approx(0.2)
    assert got == {name: 0.02 if name.endswith("bias") else 0.01 for name in got}
    assert "last/bias" in [one["name"] for one in groups]


def test_s14_what_is_fresh_learns_at_its_own_rate() -> None:
    """By the report of the load: what it did not bring, and what it brought in part."""
    torch.save(telling(Net(num_classes=100)).state_dict(), "a.pth")
    model = nn.DataParallel(Net(num_classes=10))
    report = cs.load_into(model, "a.pth", fit=True)
    groups = cs.param_groups(model, 0.1, fresh=(report, 10))
    assert {name for name, lr in rates(groups).items() if lr == 1.0} == {"fc.weight", "fc.bias"}
    assert {one["name"] for one in groups} == {"base", "fresh"}
    model = Net(num_classes=120)
    report = cs.load_into(model, "a.pth", mismatched="overlap", missing="init")
    assert {name for name, lr in rates(cs.param_groups(model, 0.1, fresh=(report, 10))).items() if lr == 1.0} == {
        "fc.weight",
        "fc.bias",
    }
    assert rates(cs.param_groups(model, 0.1, fresh=(["norm.weight"], 3)))["norm.weight"] == pytest.approx(0.3)
    model = Net(num_classes=100)
    groups = cs.param_groups(model, 0.1, fresh=(cs.load_into(model, "a.pth"), 10))
    assert groups.remarks == ("fresh: everything was loaded",)


def test_s15_norms_biases_and_prelu_do_not_decay_told_by_module_type() -> None:
    model = Face()
    groups = cs.param_groups(model, 0.1, weight_decay=5e-4)
    assert_whole(groups, model)
    decaying = {"input.0.weight", "body.0.res_layer.1.weight", "head.weight"}
    assert {name for name, decay in decays(groups).items() if decay} == decaying
    assert set(decays(groups).values()) == {0.0, 5e-4}
    assert set(cs.no_decay(model)) == set(decays(groups)) - decaying
    assert [one["name"] for one in groups] == ["base", "base/no_decay"]


def test_s15_a_real_step_shrinks_what_decays_alone() -> None:
    model = telling(Face())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(cs.param_groups(model, 0.5, weight_decay=0.1))
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in model.named_parameters():
        want = before[name] if name in cs.no_decay(model) else before[name] * 0.95
        torch.testing.assert_close(value.detach(), want)


@pytest.mark.parametrize(
    "spec", ["torchvision:resnet18", "timm:vit_tiny_patch16_224", "timm:convnext_atto", "torchvision:swin_t"]
)
def test_s15_the_header_of_a_model_tells_as_much_as_the_model(spec: str, ckpt: Any) -> None:
    library, _, name = spec.partition(":")
    with torch.device("meta"):
        model = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    want = cs.no_decay(model)
    assert want
    assert cs.no_decay(cs.target_of(spec)) == want
    rows = ckpt("ls", "--params", spec, "--json").json["parameters"]
    assert [row["key"] for row in rows if {"norm", "bias", "prelu"} & set(row["kinds"])] == list(want)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"])
def test_s15_what_decays_is_what_timm_says_but_for_its_vectors(name: str) -> None:
    """timm spares every vector: ours spares those of norms and PReLU and biases, and not ConvNeXt's layer scales."""
    with torch.device("meta"):
        model = timm.create_model(name)
    spared = {id(one): key for key, one in model.named_parameters()}
    theirs = timm.optim.param_groups_weight_decay(model, 0.05)
    want = {spared[id(one)] for group in theirs if not group["weight_decay"] for one in group["params"]}
    got = set(cs.no_decay(model))
    assert got <= want
    assert {key.rpartition(".")[2] for key in want - got} == ({"gamma"} if name == "convnext_atto" else set())


def test_s15_what_decays_is_what_the_trainer_of_transformers_says() -> None:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    with torch.device("meta"):
        models = [
            transformers.BertForSequenceClassification(config),
            timm.create_model("vit_tiny_patch16_224", depth=2),
        ]
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    for model in models:
        decaying = set(get_parameter_names(model, [nn.LayerNorm], patterns))
        assert set(cs.no_decay(model)) == {name for name, _ in model.named_parameters()} - decaying


NORMS = """
from torch import nn
class Act(nn.BatchNorm2d):
    pass
class Table(nn.Embedding):
    pass
class Made(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), Act(4), Table(5, 4), nn.PReLU(4))
"""


def test_s15_a_class_that_is_made_from_a_norm_is_one_in_headers_and_in_files_as_well(ckpt: Any) -> None:
    """Whatever it is called: for no_decay, for schemes and in what the command line lists, from the cache or not."""
    Path("made.py").write_text(NORMS)
    model = targets.built("made.py:Made").to_empty(device="cpu")
    want = ("0.bias", "1.weight", "1.bias", "3.weight")
    assert cs.no_decay(model) == want == cs.no_decay(cs.target_of(model)) == cs.no_decay(cs.target_of("made.py:Made"))
    for _ in range(2):
        rows = ckpt("ls", "--params", "made.py:Made", "--json").json["parameters"]
        assert {row["key"]: row["kinds"] for row in rows} == {
            "0.weight": [], "0.bias": ["bias"], "1.weight": ["norm"], "1.bias": ["norm", "bias"],
            "2.weight": ["embedding"], "3.weight": ["prelu"],
        }  # fmt: skip
    torch.save({"0.bias": torch.ones(4)}, "a.pth")
    done = cs.init_missing(model, cs.load_into(model, "a.pth", missing="init"), "kaiming_fan_out")
    assert done.made["1.weight"] == "ones"
    assert done.made["2.weight"] == "normal:0.02"
    to = ("--to", "made.py:Made", "--missing", "init", "--init", "kaiming_fan_out")
    assert ckpt("remap", "a.pth", "-o", "b.pth", *to).code == 0
    for key, value in torch.load("b.pth").items():
        assert_same_tensor(value, model.state_dict()[key], key)


def test_a_type_that_a_header_does_not_have_is_an_error() -> None:
    target = cs.target_of(Face())
    assert cs.no_decay(target, ["GroupNorm"]) == ("input.1.weight", "input.1.bias")
    assert cs.no_decay(target, "embedding") == ()
    with pytest.raises(cs.UsageError, match="in modules of the type GropNorm; the nearest types in it are GroupNorm"):
        cs.no_decay(target, ["GropNorm"])
    with pytest.raises(cs.UsageError, match="a header knows the names of classes alone; give 'GroupNorm'"):
        cs.no_decay(target, nn.GroupNorm)
    with pytest.raises(cs.UsageError, match="the checkpoint is a checkpoint; name a model"):
        cs.no_decay(cs.target_of(cs.Checkpoint({})))


def test_no_decay_may_name_other_types_and_rules_may_set_it() -> None:
    model = Tied()
    groups = cs.param_groups(model, 0.1, weight_decay=0.1, no_decay=["norm", "bias", "embedding"])
    assert decays(groups) == {"embed.weight": 0.0}
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    groups = cs.param_groups(model, 0.1, {"pos_embed|cls_token": {"weight_decay": 0}, "^head": 10}, weight_decay=0.1)
    assert_whole(groups, model)
    got = decays(groups)
    assert (got["pos_embed"], got["cls_token"], got["head.weight"], got["head.bias"]) == (0, 0, 0.1, 0.0)
    assert decays(cs.param_groups(model, 0.1, weight_decay=0.1, no_decay=[nn.Linear]))["blocks.0.attn.qkv.weight"] == 0
    with pytest.raises(cs.UsageError, match="of the type BatchNorm2d; the nearest types"):
        cs.param_groups(model, 0.1, weight_decay=0.1, no_decay=["BatchNorm2d"])


def test_without_a_weight_decay_it_is_the_optimizers_own() -> None:
    groups = cs.param_groups(Net(), 0.1)
    assert [one["name"] for one in groups] == ["base"]
    assert "weight_decay" not in groups[0]
    assert torch.optim.AdamW(groups).param_groups[0]["weight_decay"] == 0.01
    groups = cs.param_groups(Net(), 0.1, no_decay=["norm"])
    assert [one.get("weight_decay") for one in groups] == [None, 0.0]


SAME_AS_TIMM = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "resnet18",
    "resnet50",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
    "regnety_002",
    "mixer_s32_224",
]


@pytest.mark.parametrize("name", SAME_AS_TIMM)
def test_layer_decay_is_that_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    names = {id(one): key for key, one in model.named_parameters()}
    theirs = timm.optim.param_groups_layer_decay(model, layer_decay=0.75)
    want = {names[id(one)]: 0.01 * group["lr_scale"] for group in theirs for one in group["params"]}
    groups = cs.param_groups(model, 0.01, layer_decay=0.75, weight_decay=0.05)
    assert_whole(groups, model)
    assert rates(groups) == pytest.approx(want)


def test_layer_decay_differs_from_timm_in_the_norm_behind_the_blocks_of_a_beit() -> None:
    """timm counts its `fc_norm` with the head; ours with the last block, as both do for a ViT's `norm`."""
    with torch.device("meta"):
        model = timm.create_model("beit_base_patch16_224")
    theirs = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    ours = depths(model)
    assert {name for name in ours if ours[name] != theirs[name]} == {"fc_norm.weight", "fc_norm.bias"}
    assert ours["fc_norm.weight"] == ours["blocks.11.mlp.fc2.weight"]


def test_depth_is_found_from_the_keys_of_other_libraries() -> None:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    with torch.device("meta"):
        bert = depths(transformers.BertForSequenceClassification(config))
        vit = depths(torchvision.models.vit_b_16())
        resnet = depths(torchvision.models.resnet18())
        alexnet = depths(torchvision.models.alexnet())
    assert bert["bert.embeddings.LayerNorm.weight"] == 0
    assert bert["bert.encoder.layer.1.output.dense.weight"] == bert["bert.pooler.dense.bias"] == 2
    assert bert["classifier.weight"] == 3
    assert (vit["class_token"], vit["encoder.layers.encoder_layer_11.ln_1.bias"], vit["encoder.ln.bias"]) == (0, 12, 12)
    assert vit["heads.head.weight"] == 13
    assert [resnet[f"layer{n}.{m}.conv1.weight"] for n in range(1, 5) for m in (0, 1)] == list(range(1, 9))
    assert [alexnet[f"features.{n}.bias"] for n in (0, 3, 6, 8, 10)] == list(range(5))
    assert [alexnet[f"classifier.{n}.bias"] for n in (1, 4, 6)] == [5, 6, 7]
    plain = depths(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Linear(1, 1)))
    assert list(plain.values()) == [0, 0, 0, 0, 1, 1]

    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.hidden, self.fc = (
                nn.Conv2d(1, 1, 1),
                nn.BatchNorm2d(1),
                nn.Linear(1, 1),
                nn.Linear(1, 1),
            )

    assert list(depths(LeNet()).values()) == [0, 0, 0, 0, 1, 1, 2, 2]


def test_the_head_is_what_the_model_says_or_the_last_child_of_a_usual_name() -> None:
    with torch.device("meta"):
        assert head_of(torchvision.models.alexnet()) == ["classifier.6.weight", "classifier.6.bias"]
        assert head_of(torchvision.models.vit_b_16()) == ["heads.head.weight", "heads.head.bias"]
        assert head_of(timm.create_model("convnext_atto")) == ["head.fc.weight", "head.fc.bias"]
        inside = Lit()
        inside.net = torchvision.models.resnet18()
        assert head_of(torch.compile(inside)) == ["net.fc.weight", "net.fc.bias"]
        assert depths(inside) == {f"net.{name}": at for name, at in depths(inside.net).items()}
    with pytest.raises(cs.UsageError, match="no head was found"):
        cs.param_groups(nn.Sequential(nn.Linear(1, 1)), 0.1, head=10)


def test_layer_decay_multiplies_what_rules_give_but_not_an_absolute_rate() -> None:
    model = torchvision.models.resnet18()
    groups = cs.param_groups(model, 1.0, {"^conv1": 2, "^bn1": {"lr": 0.3}}, layer_decay=0.5)
    got = rates(groups)
    assert got["conv1.weight"] == pytest.approx(2 * 0.5**9)
    assert got["bn1.weight"] == 0.3
    assert (got["layer4.1.conv1.weight"], got["fc.weight"]) == (0.5, 1.0)


def test_frozen_parameters_are_left_out_and_tied_ones_are_there_once() -> None:
    model = Net()
    cs.freeze(model, "^stem|^norm")
    groups = cs.param_groups(model, 0.1, {"^fc": 10, "^stem": 2})
    assert_whole(groups, model)
    assert groups.frozen == ("stem.weight", "norm.weight", "norm.bias")
    assert "; 3 frozen parameters left out" in str(groups)
    assert groups.remarks == ("^stem: all of its parameters are frozen",)
    before = model.stem.weight.detach().clone()
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model.stem.weight, before)
    assert rates(cs.param_groups(Tied(), 0.1, {"^head": 10})) == {"embed.weight": 1.0}
    cs.freeze(model)
    with pytest.raises(cs.UsageError, match="no parameter of the model trains"):
        cs.param_groups(model, 0.1)


def test_views_of_one_tensor_are_said() -> None:
    model = nn.Module()
    whole = torch.randn(4)
    model.a, model.b = nn.Parameter(whole[:3]), nn.Parameter(whole[1:])
    assert cs.param_groups(model, 0.1).remarks == (
        "a and b are two parameters over the same memory: what moves one moves the other",
    )


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_names_are_those_of_the_network_inside_of_wrappers(wrap: Any) -> None:
    groups = cs.param_groups(wrap(Net()), 0.1, {"^fc": 10}, weight_decay=0.1)
    assert [one["param_names"] for one in groups] == [
        one["param_names"] for one in cs.param_groups(Net(), 0.1, {"^fc": 10}, weight_decay=0.1)
    ]


def test_rules_that_overlap_are_all_named() -> None:
    with pytest.raises(cs.PlanError) as caught:
        cs.param_groups(Net(), 0.1, {"^fc": 10, "bias$": 2, r"^blocks": {"lr": 1}}, head=3)
    assert [problem.key for problem in caught.value.problems] == ["fc.bias", "blocks.0.bias", "fc.weight", "fc.bias"]
    first, _, third, _ = map(str, caught.value.problems)
    assert first.startswith("'fc.bias' would be in two groups: `^fc` and `bias$` both set lr; make one of the patterns")
    assert third.startswith("'fc.weight', 'fc.bias' would be in two groups: `^fc` and `head` both set lr")


def test_a_parameter_in_no_group_is_named() -> None:
    with pytest.raises(cs.PlanError) as caught:
        cs.param_groups(Net(), None, {"^fc|^blocks|^norm": {"lr": 0.1}})
    assert [str(problem) for problem in caught.value.problems] == [
        "'stem.weight' is in no group: lr is None, and no rule gives it one"
    ]
    whole = cs.param_groups(Net(), None, {"": {"lr": 0.1}})
    assert set(rates(whole).values()) == {0.1}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "matches nothing": (
        {"rules": {"^blokcs": 2, "x9": 2}},
        r"`\^blokcs` matches no parameter; the nearest.*\n`x9`",
    ),
    "no type": ({"rules": {"type=BatchNrm2d": 2}}, "the nearest types in it are BatchNorm2d"),
    "no class": ({"rules": [(nn.PReLU, 2)]}, "of the type PReLU"),
    "no regex": ({"rules": {"(": 2}}, "is not a regular expression"),
    "no pair": ({"rules": ["^fc"]}, "a rule is a pair"),
    "no multiple": ({"rules": {"^fc": "10"}}, "the multiple of '^fc' is a number of at least 0, not '10'"),
    "negative": ({"lr": -0.1}, "lr is a number of at least 0, not -0.1"),
    "not finite": ({"weight_decay": float("nan")}, "weight_decay is a number"),
    "two rates": ({"rules": {"^fc": {"lr": 1, "lr_mult": 2}}}, "the rule '^fc': give lr or lr_mult"),
    "nothing set": ({"rules": {"^fc": {}}}, "the rule '^fc': it sets nothing"),
    "a slip": (
        {"rules": {"^fc": {"lr_multi": 10}}},
        "the rule '^fc': 'lr_multi' is no option that it knows; 'lr_mult' is",
    ),
    "another": ({"rules": {"^fc": {"LR": 10}}}, "'LR' is no option that it knows; 'lr' is"),
    "a third": ({"rules": {"^fc": {"lr": 1, "weight_dacay": 0}}}, "'weight_decay' is"),
    "a multiplier": ({"rules": {"^fc": {"lr_multiplier": 10}}}, "'lr_mult' is"),
    "a fallback for nothing": ({"rules": {"^fc": {"fallback": True}}}, "it sets nothing"),
    "no rate": ({"rules": {"^fc": {"lr": None}}}, "it sets nothing"),
    "a fallback in words": ({"rules": {"^fc": {"lr": 1, "fallback": "no"}}}, "fallback is True or False, not 'no'"),
    "a number as a name": ({"rules": {"^fc": {"name": 5}}}, "the name of a group is a text, not 5"),
    "a number as an option": ({"rules": {"^fc": {5: 5}}}, "an option has a name, not 5"),
    "a number as a rule": ({"rules": {3: 2}}, "a rule is for a regex, a module class or 'type=NAME', not 3"),
    "a tuple as a rule": ({"rules": {("a", "b"): 2}}, "a rule is for a regex, a module class or 'type=NAME', not a tu"),
    "a number for rules": ({"rules": 5}, "rules are a mapping of patterns .* not 5"),
    "fresh without a multiple": ({"fresh": ["fc.weight"]}, "fresh is a pair"),
    "a number as fresh": ({"fresh": (5, 10)}, "the fresh 5 is no name of a parameter"),
    "a number as a type": ({"no_decay": [5]}, "a module type is a class, .* not 5"),
    "params": ({"rules": {"^fc": {"params": []}}}, "params is not for a rule to set"),
    "one name, two rates": (
        {"rules": {"^fc": {"lr_mult": 2, "name": "x"}, "^stem": {"lr_mult": 3, "name": "x"}}},
        "two groups with other options would be called 'x'",
    ),
    "another model's report": (
        {"fresh": (["layer1.weight"], 10)},
        "the fresh 'layer1.weight' is no name of this model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_groups_say_what_is_wrong(case: str) -> None:
    options, words = BAD[case]
    with pytest.raises(cs.UsageError, match=words.replace("'^", r"'\^")):
        cs.param_groups(Net(), **{"lr": 0.1, **options})


def test_layer_decay_wants_layers() -> None:
    with pytest.raises(cs.UsageError, match="layer_decay has no effect"):
        cs.param_groups(nn.Linear(2, 2), 0.1, layer_decay=0.5)


def test_the_table_shows_every_group() -> None:
    groups = cs.param_groups(torchvision.models.resnet18(), 0.01, head=10, weight_decay=1e-4)
    lines = str(groups).splitlines()
    assert lines[0].split() == ["group", "lr", "weight", "decay", "tensors", "elements", "parameters"]
    assert lines[1].split()[:6] == ["base", "0.01", "0.0001", "20", "11,166,912", "conv1.weight,"]
    assert lines[4].split() == ["head/no_decay", "0.1", "0", "1", "1,000", "fc.bias"]
    assert lines[6] == "4 groups, 62 tensors, 11,689,512 elements"
    assert groups._repr_html_().startswith("<pre>group ")


@pytest.mark.parametrize("make", [lambda groups: torch.optim.SGD(groups, momentum=0.9), torch.optim.AdamW])
def test_an_optimizer_takes_them_saves_them_and_loads_them(make: Any) -> None:
    """Names of groups and parameters are in its state dict, and what it writes into its groups is not in ours."""
    model = telling(Net())
    groups = cs.param_groups(model, 0.1, {"^fc": 10}, weight_decay=0.01)
    optimizer = make(groups)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(model, optimizer)
    scheduler.step()
    state = optimizer.state_dict()
    assert [one["name"] for one in state["param_groups"]] == ["base", "base/no_decay", "^fc", "^fc/no_decay"]
    assert state["param_groups"][2]["param_names"] == ["fc.weight"]
    assert [one["lr"] for one in state["param_groups"]] == [0.05, 0.05, 0.5, 0.5]
    assert [one["lr"] for one in groups] == [0.1, 0.1, 1.0, 1.0]
    assert "initial_lr" not in groups[0]
    torch.save(state, "optimizer.pth")
    other = copy.deepcopy(model)
    again = make(cs.param_groups(other, 0.1, {"^fc": 10}, weight_decay=0.01))
    again.load_state_dict(torch.load("optimizer.pth", weights_only=True))
    want, got = step(model, optimizer), step(other, again)
    for name, moved in want.items():
        assert_same_tensor(got[name], moved, name)


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((3, 4, 4), float(at)), "labels": torch.tensor(at % 2)}


class WithLoss(nn.Module):
    """A model as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = telling(Net(num_classes=2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_trainer_of_transformers_takes_them(hook: str) -> None:
    model = WithLoss()
    cs.freeze(model, r"^net\.stem")
    groups = cs.param_groups(model, 0.1, {r"\.fc\.": 10}, weight_decay=0.01)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    given: dict[str, Any] = (
        {"optimizers": (torch.optim.SGD(groups), None)}
        if hook == "optimizers"
        else {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"params": groups, "lr": 0.1})}
    )
    options = transformers.TrainingArguments(
        "out", max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no"
    )
    trainer = transformers.Trainer(model, options, train_dataset=Batches(), **given)
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert [(one["name"], one["initial_lr"]) for one in inner.param_groups] == [
        ("base", 0.1),
        ("base/no_decay", 0.1),
        (r"\.fc\.", 1.0),
        (r"\.fc\./no_decay", 1.0),
    ]
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still == {"net.stem.weight"}


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = telling(Net(num_classes=2))
        cs.freeze(self, "stem|norm", norm_stats=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(cs.param_groups(self, 0.1, {r"\.fc\.": 10}, weight_decay=0.01))

    def training_step(self, batch: dict[str, torch.Tensor], at: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["labels"])


@pytest.mark.filterwarnings("ignore")
def test_lightning_takes_them_and_logs_each_by_its_name() -> None:
    """And its loop leaves frozen statistics where they are."""
    model = Lit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger("logs"),
        callbacks=[LearningRateMonitor("step")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, torch.utils.data.DataLoader(Batches(), batch_size=2))
    assert set(trainer.callbacks[0].lrs) == {
        f"lr-AdamW/{name}" for name in ("base", "base/no_decay", r"\.fc\.", r"\.fc\./no_decay")
    }
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert still == {name for name in before if "stem" in name or "norm" in name}


def test_two_names_for_one_parameter_are_an_error() -> None:
    with pytest.raises(cs.PlanError, match="`\\^fc` and `bias` both set name"):
        cs.param_groups(Net(), 0.1, {"^fc": {"lr_mult": 2, "name": "x"}, "bias": {"weight_decay": 0, "name": "y"}})


def test_rules_of_one_name_and_the_same_options_are_one_group() -> None:
    model = Net()
    groups = cs.param_groups(model, 0.1, {"^fc": {"lr": 1, "name": "x"}, "^stem": {"lr": 1.0, "name": "x"}})
    assert [(one["name"], one["lr"], one["param_names"]) for one in groups if one["name"] == "x"] == [
        ("x", 1.0, ["stem.weight", "fc.weight", "fc.bias"])
    ]
    assert_whole(groups, model)


def test_whole_numbers_numbers_of_numpy_and_tensors_are_numbers() -> None:
    for lr, decay in ((1, 0), (np.float32(1), np.int64(0)), (torch.tensor(1.0), torch.tensor(0))):
        groups = cs.param_groups(Net(), lr, {"^fc": {"weight_decay": 0}}, weight_decay=decay)
        assert set(rates(groups).values()) == {1.0}
        assert set(decays(groups).values()) == {0.0}
        assert all(type(one["lr"]) is float for one in groups)


def test_one_type_needs_no_list() -> None:
    model = Net()
    assert cs.no_decay(model, "norm") == ("norm.weight", "norm.bias") == cs.no_decay(model, nn.BatchNorm2d)
    found = decays(cs.param_groups(model, 0.1, weight_decay=0.5, no_decay="norm"))
    assert {name for name, decay in found.items() if not decay} == {"norm.weight", "norm.bias"}
    with pytest.raises(cs.UsageError, match="a module type is a class"):
        cs.no_decay(model, [5])  # type: ignore[list-item]


def test_options_of_an_optimizer_are_no_slips() -> None:
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "lr_decay": 0.1, "decoupled_weight_decay": True, "momentum": 0.9}
    (_, one) = sorted(cs.param_groups(Net(), 0.1, {"^fc": options}), key=len)
    assert options.items() <= one.items()

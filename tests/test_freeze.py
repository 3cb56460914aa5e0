"""Freezing: what is chosen, what moves in training afterwards, and what the command line says of it."""

from __future__ import annotations

import copy
import multiprocessing
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from helpers import assert_same_tensor, assert_same_tensors
from models import Net, Tied
from resnet18 import telling
from safetensors.torch import save_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.finetune.names import parameters
from ckptsurgeon.finetune.selecting import slots

WRAPS: list[Callable[[Any], Any]] = [lambda model: model, nn.DataParallel, torch.compile]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def moved(model: nn.Module, x: torch.Tensor, steps: int = 2) -> set[str]:
    """The keys whose values some real steps of training change."""
    before = state(model)
    optimizer = torch.optim.SGD(cs.trainable(model), lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("wrap", WRAPS, ids=["bare", "DataParallel", "compile"])
def test_s11_the_index_is_that_of_model_parameters(wrap: Callable[[Any], Any], ckpt: Any) -> None:
    """`ls --params` gives the index, `until` freezes what is below it, whatever is around the model."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    listed = ckpt("ls", "--params", "torchvision:resnet50", "--json").json
    live = list(model.named_parameters())
    assert [(row["index"], row["key"], row["shape"]) for row in listed["parameters"]] == [
        (index, name, list(value.shape)) for index, (name, value) in enumerate(live)
    ]
    assert len(live) == 161
    done = cs.freeze(wrap(model), until=159)
    assert done.names == tuple(name for name, _ in live[:159])
    assert [value.requires_grad for _, value in live] == [False] * 159 + [True] * 2
    assert done.trainable == ("fc.weight", "fc.bias")
    assert done.numel_trainable == 2048 * 1000 + 1000
    assert done.numel == sum(value.numel() for _, value in live[:159])


def test_s11_the_first_165_of_a_larger_model(ckpt: Any) -> None:
    """As in the scenario; and the plan on the command line says the same."""
    with torch.device("meta"):
        model = torchvision.models.inception_v3(init_weights=False)
    done = cs.freeze(model, until=165)
    assert [value.requires_grad for value in model.parameters()] == [n >= 165 for n in range(len(done.parameters))]
    plan = ckpt("freeze-plan", "torchvision:inception_v3,init_weights=False", "--until", "165", "--json").json
    assert [row["key"] for row in plan["parameters"] if row["chosen"]] == list(done.names)
    assert plan["trainable"] == {"tensors": len(done.trainable), "numel": done.numel_trainable}


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "vit_b_16", "swin_t", "densenet121", "mobilenet_v3_small"])
def test_s11_headers_have_the_order_of_parameters(name: str, ckpt: Any) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    listed = ckpt("ls", "--params", f"torchvision:{name}", "--json").json["parameters"]
    assert [row["key"] for row in listed] == [name for name, _ in model.named_parameters()]


def test_s11_of_a_file_buffers_are_left_out_by_their_names_and_ties_are_there_once(ckpt: Any) -> None:
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), "a.pth")
    found = ckpt("ls", "--params", "a.pth", "--json").json
    assert [row["key"] for row in found["parameters"]] == [name for name, _ in model.named_parameters()]
    assert found["sure"] is False
    assert "the file does not say which tensors are parameters" in ckpt("ls", "--params", "a.pth").out
    torch.save(Tied().state_dict(), "b.pth")
    (row,) = ckpt("ls", "--params", "b.pth", "--json").json["parameters"]
    assert (row["key"], row["tied"]) == ("embed.weight", ["head.weight"])
    limited = ckpt("ls", "--params", "a.pth", "--match", "fc", "--limit", "1")
    assert limited.out.splitlines()[1].split()[:2] == ["60", "fc.weight"]
    assert "… and 1 more parameter (--limit)" in limited.out


def test_s11_a_file_in_an_order_of_its_own_tells_no_index(ckpt: Any) -> None:
    """Neither safetensors, nor shards, nor a dict whose keys are sorted have the order of the model."""
    model = torchvision.models.resnet18()
    save_file(model.state_dict(), "a.safetensors")
    torch.save(dict(sorted((name, value.detach()) for name, value in model.named_parameters())), "a.pth")
    cs.save(cs.open("a.pth"), "shards", shard_size=20_000_000)
    for path in ("a.safetensors", "a.pth", "shards"):
        found = ckpt("ls", "--params", path, "--json").json["parameters"]
        assert sorted(row["key"] for row in found) == sorted(name for name, _ in model.named_parameters())
        assert {row["index"] for row in found} == {None}
        text = ckpt("ls", "--params", path, "--match", "^fc").out
        assert text.splitlines()[1].split()[:2] in (["–", "fc.bias"], ["–", "fc.weight"])
        assert "the model's is not known; `ckpt ls --params MODEL` tells the index" in text
        assert "the index is that of model.parameters()" not in text
    torch.save({name: value.detach() for name, value in model.named_parameters()}, "b.pth")
    assert [row["index"] for row in ckpt("ls", "--params", "b.pth", "--json").json["parameters"]] == list(range(62))


def test_s12_by_name_by_child_and_by_module() -> None:
    model = torchvision.models.alexnet()
    done = cs.freeze(model, "features")
    assert done.names == tuple(name for name, _ in model.named_parameters() if name.startswith("features"))
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == list(done.names)

    model = torchvision.models.resnet18()
    done = cs.freeze(model, children=6)
    want = {id(value) for child in list(model.children())[:6] for value in child.parameters()}
    assert [id(value) in want for value in model.parameters()] == [
        not value.requires_grad for value in model.parameters()
    ]
    assert done.trainable[0] == "layer3.0.conv1.weight"

    model = torchvision.models.resnet18()
    cs.freeze(model, modules=50)
    want = {id(value) for module in list(model.modules())[:50] for value in module.parameters(recurse=False)}
    assert [id(value) in want for value in model.parameters()] == [
        not value.requires_grad for value in model.parameters()
    ]
    assert 0 < len(want) < 62


@pytest.mark.parametrize("wrap", WRAPS, ids=["bare", "DataParallel", "compile"])
def test_s12_numbers_are_those_of_the_network_inside_of_wrappers(wrap: Callable[[Any], Any]) -> None:
    bare = torchvision.models.resnet18()
    wrapped = wrap(torchvision.models.resnet18())
    for ways in ({"children": 6}, {"modules": 50}, {"pattern": r"^layer1\."}, {"types": "BasicBlock"}):
        cs.unfreeze(bare)
        cs.unfreeze(wrapped)
        assert cs.freeze(bare, **ways).names == cs.freeze(wrapped, **ways).names


def test_s12_only_the_last_layer_trains() -> None:
    """Frozen weights do not move in real steps, and those of the head do."""
    model = telling(torchvision.models.resnet18(num_classes=4))
    done = cs.freeze(model, children=-1)
    assert done.trainable == ("fc.weight", "fc.bias")
    statistics = {key for key in model.state_dict() if "running" in key or "num_batches" in key}
    assert moved(model, torch.randn(4, 3, 32, 32)) == {"fc.weight", "fc.bias"} | statistics
    assert str(done).splitlines()[-2:] == [
        "frozen: 60 of 62 parameters, 11,176,512 of 11,178,564 elements",
        "training: 2 parameters, 2,052 elements",
    ]
    again = cs.freeze(model, "^conv1")
    assert again.already == ("conv1.weight",)
    assert "(1 of them already were)" in str(again)


def test_s12_what_is_frozen_is_shown_by_module() -> None:
    lines = str(cs.freeze(torchvision.models.alexnet(), "features")).splitlines()
    assert lines[1].split() == ["frozen", "features.{0,3,6,8,10}", "Conv2d", "weight,", "bias", "10", "2,469,696"]
    assert lines[2].split() == ["trains", "classifier.{1,4,6}", "Linear", "weight,", "bias", "6", "58,631,144"]


def test_s12_the_plan_of_the_command_line_is_what_freeze_does(ckpt: Any) -> None:
    ran = ckpt("freeze-plan", "torchvision:alexnet", "features")
    assert ran.code == 0
    assert ran.out.rstrip("\n") == str(cs.freeze(torchvision.models.alexnet(), "features"))
    plan = ckpt("freeze-plan", "torchvision:resnet18", "--children", "-1", "--norm-stats", "--json").json
    assert [row["key"] for row in plan["parameters"] if row["trains"]] == ["fc.weight", "fc.bias"]
    assert len(plan["norm_stats"]) == 20


def test_s13_an_optimizer_over_what_trains() -> None:
    model = Net()
    cs.freeze(model, ["^stem", "^norm"])
    assert [id(one) for one in cs.trainable(model)] == [id(one) for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(cs.trainable(model, named=True), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [
        *(f"blocks.{n}.{step}" for n in range(3) for step in ("weight", "bias")),
        "fc.weight",
        "fc.bias",
    ]
    assert len(cs.trainable(Tied())) == 1
    cs.freeze(model)
    with pytest.raises(cs.UsageError, match="no parameter of the model trains"):
        cs.trainable(model)


def test_everything_that_was_loaded_is_frozen_whole_tensors_alone() -> None:
    """By the report of a load into a bare, a wrapped or a compiled model; what was loaded in part still trains."""
    torch.save(telling(Net(num_classes=100)).state_dict(), "a.pth")
    for wrap in WRAPS:
        model = wrap(Net(num_classes=10))
        report = cs.load_into(model, "a.pth", fit=True)
        done = cs.freeze(model, loaded=report)
        assert done.trainable == ("fc.weight", "fc.bias")
    model = Net(num_classes=120)
    report = cs.load_into(model, "a.pth", mismatched="overlap", missing="init")
    assert report.partly == ("fc.weight", "fc.bias")
    assert cs.freeze(model, loaded=report).trainable == ("fc.weight", "fc.bias")
    with pytest.raises(cs.UsageError, match=r"'stem.weight' is no name of this model.*another model\?"):
        cs.freeze(torchvision.models.resnet18(), loaded=report)


def test_types_are_classes_names_and_kinds() -> None:
    model = torchvision.models.resnet18()
    norms = [
        f"{name}.{step}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for step in ("weight", "bias")
    ]
    for types in (nn.BatchNorm2d, "BatchNorm2d", "norm", [nn.modules.batchnorm._BatchNorm], "_BatchNorm"):
        cs.unfreeze(model)
        assert list(cs.freeze(model, types=types).names) == norms
    model = torchvision.models.resnet18()
    assert len(cs.freeze(model, types=["BasicBlock", nn.Linear]).names) == 59
    assert cs.freeze(Net(), types=[nn.Linear, nn.BatchNorm2d]).names == (
        "norm.weight",
        "norm.bias",
        "fc.weight",
        "fc.bias",
    )


def test_a_norm_is_told_by_its_class_and_not_by_its_name() -> None:
    """`body.3.res_layer.1.weight` is of a norm; `norm.weight` of a Linear is not; wrappers called PreNorm own none."""

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fn = nn.Linear(2, 2)

    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.ones(2))

    model = nn.Module()
    model.body = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.PReLU(), nn.BatchNorm2d(2)))
    model.norm = nn.Linear(2, 2)
    model.pre = PreNorm()
    model.own = RMSNorm()
    assert cs.freeze(model, types="norm").names == ("body.1.1.weight", "body.1.1.bias", "own.g")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(config)
        convnext = timm.create_model("convnext_atto")
    assert cs.freeze(llama, types="norm").names == (
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    )
    assert cs.freeze(llama, types="embedding").names == ("model.embed_tokens.weight",)
    norms = [name for name, one in convnext.named_modules() if isinstance(one, nn.LayerNorm)]
    assert cs.freeze(convnext, types="norm").names == tuple(
        f"{name}.{step}" for name in norms for step in ("weight", "bias")
    )


def test_running_statistics_stay_in_training_until_they_are_let_go() -> None:
    model = telling(torchvision.models.resnet18(num_classes=4))
    done = cs.freeze(model, children=6, norm_stats=True)
    frozen = [name for name, one in model.named_modules() if isinstance(one, nn.BatchNorm2d) and name < "layer3"]
    assert list(done.statistics) == frozen
    x = torch.randn(4, 3, 32, 32)
    changed = moved(model, x)
    assert not {key for key in changed if key.startswith(("bn1", "layer1", "layer2", "conv1"))}
    assert {"layer3.0.bn1.running_mean", "layer3.0.bn1.num_batches_tracked", "fc.weight"} <= changed
    assert model.training
    assert not model.bn1.training
    assert cs.unfreeze(model, "^bn1").names == ("bn1.weight", "bn1.bias")
    assert model.bn1.training
    assert "bn1.running_var" in moved(model, x)


def test_without_norm_stats_they_move() -> None:
    model = telling(torchvision.models.resnet18(num_classes=4))
    done = cs.freeze(model, children=6)
    assert done.statistics == ()
    assert "bn1.running_mean" in moved(model, torch.randn(4, 3, 32, 32))


def test_held_statistics_survive_copies_pickles_and_wrappers() -> None:
    """The state dict, the class and the original are as they were."""
    model = telling(Net())
    plain = telling(Net())
    cs.freeze(model, "^norm", norm_stats=True)
    assert_same_tensors(model.state_dict(), plain.state_dict())
    assert type(model.norm) is nn.BatchNorm2d
    ours, theirs = multiprocessing.Pipe()
    ours.send(model)  # pickled, as for another process
    for other in (copy.deepcopy(model), theirs.recv()):
        x = torch.randn(4, 3, 8, 8)
        assert not {key for key in moved(other, x) if key.startswith("norm")}
        assert not other.norm.training
        cs.unfreeze(other, "^norm")
        assert other.norm.training
        assert not model.norm.train().training
    compiled = torch.compile(model, backend="eager")
    assert not {key for key in moved(compiled, torch.randn(4, 3, 8, 8)) if "norm" in key}
    assert_same_tensor(model.norm.running_mean, plain.norm.running_mean)


def test_norms_without_parameters_are_held_where_they_lie() -> None:
    def net() -> nn.Module:
        return telling(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)))

    for ways in ({"children": 2}, {"until": 2}, {"modules": 3}, {"pattern": r"^[01]\."}, {"types": "norm"}, {}):
        model = net()
        done = cs.freeze(model, norm_stats=True, **ways)
        assert done.statistics == ("1",), ways
        model.train()
        model(torch.randn(2, 3, 4, 4))
        assert_same_tensor(model[1].running_mean, net()[1].running_mean)


def test_a_tied_parameter_is_frozen_under_all_its_names() -> None:
    for pattern in ("^embed", "^head"):
        model = Tied()
        done = cs.freeze(model, pattern)
        assert done.names == ("embed.weight",)
        assert not model.head.weight.requires_grad
        assert done.ties == (("embed.weight", "head.weight"),)
        assert "tied: embed.weight, head.weight" in str(done)


def test_different_parameters_over_the_same_memory_are_said() -> None:
    model = nn.Module()
    whole = torch.randn(6, 2)
    model.a, model.b, model.c = nn.Parameter(whole[:4]), nn.Parameter(whole[2:]), nn.Parameter(torch.randn(3))
    assert cs.freeze(model, "^a$").remarks == (
        "a and b are two parameters over the same memory: what moves one moves the other",
    )
    assert cs.freeze(model, "^b$").remarks == ()
    halves = nn.Module()
    halves.a, halves.b = nn.Parameter(whole[:3]), nn.Parameter(whole[3:])
    assert cs.freeze(halves, "a").remarks == ()


def test_unfreeze_says_what_cannot_train() -> None:
    model = nn.Module()
    model.q = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    model.w = nn.Parameter(torch.ones(2), requires_grad=False)
    done = cs.unfreeze(model)
    assert done.names == ("w",)
    assert done.remarks == ("q is int8, which cannot train",)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such name": (
        {"pattern": ["^conv1", "layer9", "^fcc"]},
        r"`layer9` matches no parameter; the nearest .*\n`\^fcc` m",
    ),
    "no such type": ({"types": "BatchNrm2d"}, "type BatchNrm2d; the nearest types in it are BatchNorm2d"),
    "no such class": ({"types": nn.PReLU}, "no parameters in modules of the type PReLU"),
    "a kind that is not there": ({"types": "embedding"}, "of the type embedding"),
    "past the end": ({"until": 63}, "until=63 means the first 63 of 62 parameters; give 1 to 62"),
    "past the beginning": ({"until": -62}, "until=-62 means none of 62 parameters"),
    "past the children": ({"children": 11}, "children=11 means the first 11 of 10 children"),
    "past the modules": ({"modules": 500}, "modules=500 means the first 500 of 68 modules"),
    "none": ({"until": 0}, "until=0 means none of 62"),
    "children that own nothing": (
        {"children": -9, "pattern": None},
        "the children that children=-9 means have no parameters",
    ),
    "no number": ({"until": "165"}, "until is a number of parameters, not '165'"),
    "true": ({"children": True}, "children is a number of children, not True"),
    "two ways": ({"pattern": "fc", "until": 3}, "pattern and until are 2 ways"),
    "no regex": ({"pattern": "("}, "is not a regular expression"),
    "no patterns": ({"pattern": []}, "an empty list of patterns"),
    "a number for a pattern": ({"pattern": 3}, "a pattern is a regular expression, or several, not 3"),
    "bytes for a pattern": ({"pattern": [b"fc"]}, "names are text and no bytes"),
    "a number for a type": ({"types": 3}, "a module type is a class, its name or one of norm, .* not 3"),
    "a number among types": ({"types": ["norm", 3]}, "a module type is a class, .* not 3"),
    "names for a report": ({"loaded": ["0.weight"]}, "told by the report of cs.load_into, not by a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_selectors_change_nothing_and_say_what_is_wrong(case: str) -> None:
    ways, words = BAD[case]
    model = torchvision.models.resnet18()
    if case == "children that own nothing":
        model = nn.Sequential(nn.ReLU(), *(nn.Linear(1, 1) for _ in range(9)))
    with pytest.raises(cs.UsageError, match=words):
        cs.freeze(model, **ways)
    assert all(one.requires_grad for one in model.parameters())


def test_lazy_parameters_have_no_shape_yet() -> None:
    with pytest.raises(cs.UsageError, match=r"'0.weight' has no shape yet; put a batch through"):
        cs.freeze(nn.Sequential(nn.LazyLinear(3)))


def test_the_command_line_says_the_same_and_exits_with_2(ckpt: Any) -> None:
    ran = ckpt("freeze-plan", "torchvision:resnet18", "layer9")
    assert (ran.code, ran.out) == (2, "")
    assert "ckpt: error: `layer9` matches no parameter; the nearest parameters are 'layer" in ran.err
    assert "2 ways of saying" in ckpt("freeze-plan", "torchvision:resnet18", "fc", "--until", "3").err
    assert "wants a model, since a file has no modules" in ckpt("freeze-plan", "a.pth").err
    assert "the parameters of a model are listed with --params" in ckpt("ls", "torchvision:resnet18").err
    assert "--params stands alone" in ckpt("ls", "--params", "--tree", "a.pth").err
    assert "a model has one state dict" in ckpt("ls", "--params", "torchvision:resnet18", "--select", "a").err
    assert ckpt("freeze-plan", "torchvision:resnet18", "--quiet").out == ""


@pytest.mark.parametrize(
    "make", [Tied, Net, torchvision.models.resnet18, lambda: nn.Sequential(*[nn.Linear(1, 1)] * 2)]
)
def test_slots_number_parameters_as_the_model_does(make: Callable[[], nn.Module]) -> None:
    """Shared parameters and shared modules included."""
    model = make()
    live = {id(value): index for index, value in enumerate(model.parameters())}
    for slot in slots(model):
        if not slot.is_statistics:
            assert slot.index == live[id(slot.tensor)]
    assert [id(value) for value in parameters(model).values()] == list(live)


def test_what_was_replaced_since_it_was_loaded_is_not_taken_for_loaded() -> None:
    torch.save(telling(Net(num_classes=10)).state_dict(), "a.pth")
    model = Net(num_classes=10)
    report = cs.load_into(model, "a.pth")
    model.fc = nn.Linear(8, 3)
    for call in (lambda: cs.freeze(model, loaded=report), lambda: cs.param_groups(model, 0.1, fresh=(report, 10))):
        with pytest.raises(cs.UsageError, match=r"a model with 'fc.weight' \[10, 8\], and the Net has it as \[3, 8\]"):
            call()
    assert all(one.requires_grad for one in model.parameters())
    torch.save(telling(Net(num_classes=100)).state_dict(), "b.pth")
    model = Net(num_classes=10)
    report = cs.load_into(model, "b.pth", fit=True)
    model.fc = nn.Linear(8, 3)  # it was not loaded, and no matter
    assert cs.freeze(model, loaded=report).trainable == ("fc.weight", "fc.bias")


class Stateful(nn.Module):
    """A module whose extra state is a tensor that is made for the state dict alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.scale = 1.0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.scale)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scale = float(state)


def test_a_report_may_name_what_a_module_makes_for_its_state_dict() -> None:
    model = nn.Sequential(Stateful(), nn.Linear(2, 2))
    torch.save({"0.weight": torch.zeros(2), "0._extra_state": torch.tensor(3.0)}, "a.pth")
    report = cs.load_into(model, "a.pth", missing="init")
    assert model[0].scale == 3
    assert report.loaded == ("0.weight", "0._extra_state")
    assert rates_of(cs.param_groups(model, 0.1, fresh=(report, 10))) == {"base": 0.1, "fresh": 1.0}
    assert cs.freeze(model, loaded=report).names == ("0.weight",)


def rates_of(groups: cs.Groups) -> dict[str, float]:
    return {one["name"]: one["lr"] for one in groups}


@pytest.mark.parametrize("call", [cs.freeze, cs.unfreeze, cs.trainable, cs.no_decay, lambda m: cs.param_groups(m, 1)])
def test_only_models_have_parameters(call: Any) -> None:
    for thing in (None, 3, "resnet18", [nn.Linear(1, 1)]):
        with pytest.raises(cs.UsageError, match="takes an nn.Module, not"):
            call(thing)
    if call is not cs.trainable:
        with pytest.raises(cs.UsageError, match=r"RecursiveScriptModule of torch\.jit does not tell them"):
            call(scripted())


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(torch.jit.script(nn.Linear(1, 1)))


def test_lazy_parameters_are_not_given_to_an_optimizer() -> None:
    with pytest.raises(cs.UsageError, match="'weight' has no shape yet"):
        cs.trainable(nn.LazyLinear(2))


def test_names_are_given_as_they_are_where_a_pattern_matches_nothing() -> None:
    model = nn.Module()
    model.keys = nn.Linear(1, 1)
    with pytest.raises(cs.UsageError, match=r"the nearest parameters are 'keys\.\w+', 'keys\.\w+'"):
        cs.freeze(model, "kesy")


def test_norms_are_let_go_into_the_mode_that_they_would_be_in() -> None:
    norm = nn.BatchNorm1d(2)
    cs.freeze(norm, norm_stats=True)
    cs.unfreeze(norm)
    assert norm.training
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[0].eval()
    cs.freeze(model, norm_stats=True)
    cs.unfreeze(model)
    assert (model[0].training, model[1].training) == (False, True)
    cs.freeze(model, norm_stats=True)
    model.eval()
    cs.unfreeze(model)
    assert not model[1].training
    cs.freeze(model, norm_stats=True)
    model.train()
    assert not model[1].training
    cs.unfreeze(model)
    assert model[0].training
    assert model[1].training

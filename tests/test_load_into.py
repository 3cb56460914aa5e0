"""Loading into live modules."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensor, assert_same_tensors, damaged_in
from kinds import KINDS
from models import Net, Tied
from resnet18 import telling
from safetensors.torch import save_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.finetune import _placing


def test_what_fits_is_loaded_and_the_rest_stays() -> None:
    source, model = telling(Net(num_classes=100)), telling(Net(num_classes=10), seed=5)
    torch.save({f"module.{key}": value for key, value in source.state_dict().items()}, "a.pth")
    head = model.fc.weight.detach().clone()
    report = cs.load_into(model, "a.pth", fit=True)
    want = {**source.state_dict(), "fc.weight": head, "fc.bias": telling(Net(), seed=5).fc.bias.detach()}
    assert_same_tensors(model.state_dict(), want)
    assert report.kept == ("fc.weight", "fc.bias")
    assert report.dropped == ("module.fc.weight", "module.fc.bias")
    assert len(report.loaded) == 12
    assert report.coverage == pytest.approx(465 / 555)
    assert "loaded 12 of 14 tensors, 83.78 %" in str(report)


def test_without_a_policy_nothing_is_changed() -> None:
    torch.save(telling(Net(num_classes=100)).state_dict(), "a.pth")
    model = telling(Net(), seed=5)
    with pytest.raises(cs.PlanError) as caught:
        cs.load_into(model, "a.pth")
    assert len(caught.value.problems) == 2
    assert_same_tensors(model.state_dict(), telling(Net(), seed=5).state_dict())


def test_values_are_cast_to_the_models_dtype_and_gradients_stay_wanted() -> None:
    source = telling(Net())
    torch.save(source.state_dict(), "a.pth")
    model = Net().to(torch.bfloat16)
    cs.load_into(model, "a.pth")
    assert_same_tensors(model.state_dict(), telling(Net()).to(torch.bfloat16).state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rules_overlap_and_ties() -> None:
    torch.save({"e.weight": torch.ones(10, 4)}, "a.pth")
    model = telling(Tied())
    before = model.embed.weight.detach().clone()
    report = cs.load_into(model, "a.pth", ["^e => embed"], mismatched="overlap", missing="init")
    assert torch.equal(model.head.weight[:10], torch.ones(10, 4))
    assert torch.equal(model.head.weight[10:], before[10:])
    assert report.partly == ("embed.weight",)
    assert report.plan.missing == {"head.weight": "tied to 'embed.weight', as in the Tied"}


def test_wrapped_and_compiled_models_need_no_stripping() -> None:
    source = telling(Net())
    torch.save(source.state_dict(), "a.pth")
    for wrap in (torch.nn.DataParallel, torch.compile):
        model = Net()
        cs.load_into(wrap(model), "a.pth", fit=True)
        assert_same_tensors(model.state_dict(), source.state_dict())


def test_values_that_a_cast_would_cut_are_refused() -> None:
    model = Net()
    torch.save({**model.state_dict(), "norm.num_batches_tracked": torch.tensor(2.7)}, "a.pth")
    with pytest.raises(cs.PlanError, match="'norm.num_batches_tracked' is float32 in the checkpoint and int64"):
        cs.load_into(model, "a.pth")


def test_a_model_without_memory_is_refused() -> None:
    torch.save(telling(Net()).state_dict(), "a.pth")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(cs.UsageError, match=r"meta device \('stem.weight', …\).*assign=True.*model.to_empty\("):
        cs.load_into(model, "a.pth")
    model.to_empty(device="cpu")
    cs.load_into(model, "a.pth")
    assert_same_tensors(model.state_dict(), telling(Net()).state_dict())


def test_arguments_the_wrong_way_round() -> None:
    with pytest.raises(cs.UsageError, match="comes second"):
        cs.load_into("a.pth", Net())


# -- values, wherever they come from and whatever they become ------------------------------------


class Holder(nn.Module):
    """Tensors as parameters (floating) and buffers, under the names that they are given."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, value in tensors.items():
            if value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].holds is None])
def test_every_kind_of_checkpoint_is_loaded_bit_for_bit(kind: str) -> None:
    want = telling(Net(num_classes=100, width=16)).state_dict()
    path = KINDS[kind].save(want, Path("folder", "a"))
    model = telling(Net(num_classes=100, width=16), seed=5)
    report = cs.load_into(model, path, select=".".join(cs.open(path).origin.select) or None)
    assert report.coverage == 1
    assert_same_tensors(model.state_dict(), want)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("block", [256, 1 << 20], ids=["small blocks", "one block"])
def test_casts_are_those_of_torch_bit_for_bit(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between all floating dtypes, in blocks, NaN, infinities, subnormals and ties to even among the values.

    Blocks are of whole vectors, since torch itself makes other NaN of what is left over.
    """
    monkeypatch.setattr(_placing, "BLOCK", block)
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, 6e-8, 1.00390625, 65520.0, 3e38, 448.0])
    values = torch.cat((odd, torch.randn(101)))
    for have in DTYPES:
        source = values.to(have)
        torch.save({"w": source.view(7, 16)}, "a.pth")
        for want in DTYPES:
            model = Holder(w=torch.zeros(7, 16, dtype=want))
            cs.load_into(model, "a.pth")
            assert_same_tensor(model.w.detach(), source.view(7, 16).to(want), f"{have} → {want}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 1 << 20], ids=["small blocks", "one block"])
def test_memory_that_does_not_lie_in_order_is_filled_too(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned, channels last, a part of another tensor, of one element, of none, without a dimension."""
    monkeypatch.setattr(_placing, "BLOCK", block)
    want = {
        "turned": torch.randn(9, 7), "last": torch.randn(4, 3, 5, 5), "part": torch.randn(6, 3),
        "one": torch.randn(1, 1, 1), "none": torch.randn(3, 0), "scalar": torch.randn(()),
    }  # fmt: skip
    save_file(want, "a.safetensors")
    model = Holder(
        turned=torch.zeros(7, 9).t(),
        last=torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last),
        part=torch.zeros(6, 8)[:, 2:5],
        one=torch.zeros(5, 5, 5)[1:2, 1:2, 1:2],
        none=torch.zeros(3, 0),
        scalar=torch.zeros(()),
    ).to(dtype)
    strides = {key: value.stride() for key, value in model.state_dict().items()}
    cs.load_into(model, "a.safetensors")
    assert_same_tensors(model.state_dict(), {key: value.to(dtype) for key, value in want.items()})
    assert {key: value.stride() for key, value in model.state_dict().items()} == strides


def test_what_rules_compute_is_loaded() -> None:
    """Kernels, views that do not lie in order, pieces of several tensors, and tensors of a checkpoint beside."""
    torch.save({"a": torch.randn(6, 4), "b": torch.randn(2, 4), "t": torch.randn(5, 3)}, "a.pth")
    torch.save({"c": torch.randn(3)}, "b.pth")
    a, b = (torch.load(path, weights_only=True) for path in ("a.pth", "b.pth"))
    model = Holder(w=torch.zeros(8, 4), t=torch.zeros(3, 5), c=torch.zeros(3))
    rules = ["concat ^a$ ^b$ => w", "transpose ^t$", "scale ^t$ 2", r"^x\.c$ => c"]
    cs.load_into(model, "a.pth", rules, beside={"x": "b.pth"})
    assert_same_tensors(model.state_dict(), {"w": torch.cat((a["a"], a["b"])), "t": a["t"].t() * 2, "c": b["c"]})


def test_what_is_kept_of_a_partly_loaded_tensor_is_not_rounded() -> None:
    torch.save({"w": torch.randn(2, 5).bfloat16()}, "a.pth")
    before = torch.randn(4, 3)
    model = Holder(w=before.clone())
    cs.load_into(model, "a.pth", mismatched="overlap")
    want = before.clone()
    want[:2] = torch.load("a.pth", weights_only=True)["w"][:, :3].float()
    assert_same_tensor(model.w.detach(), want)


def test_a_backward_pass_notices_that_its_weights_were_loaded_over() -> None:
    torch.save(nn.Linear(3, 3).state_dict(), "a.pth")
    model = nn.Linear(3, 3)
    made = model(model(torch.randn(2, 3))).sum()
    cs.load_into(model, "a.pth")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.backward()


def test_models_made_in_inference_mode_are_loaded() -> None:
    want = telling(Net()).state_dict()
    torch.save(want, "a.pth")
    with torch.inference_mode():
        model = Net().bfloat16()
        cs.load_into(model, "a.pth")
    cs.load_into(model, "a.pth")
    assert_same_tensors(model.state_dict(), telling(Net()).bfloat16().state_dict())


# -- damage --------------------------------------------------------------------------------------


def test_a_failure_on_the_way_names_the_key_and_says_that_the_model_is_partly_loaded() -> None:
    os.mkdir("folder")
    save_file({"a": torch.ones(3)}, "folder/model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, "folder/model-00002-of-00002.safetensors")
    index = {"weight_map": {key: f"model-0000{n}-of-00002.safetensors" for n, key in ((1, "a"), (2, "b"))}}
    Path("folder/model.safetensors.index.json").write_text(json.dumps(index))
    ckpt = cs.open("folder")
    os.truncate("folder/model-00002-of-00002.safetensors", 90)
    model = Holder(a=torch.zeros(3), b=torch.zeros(3))
    with pytest.raises(cs.InputError) as caught:
        cs.load_into(model, ckpt)
    assert caught.value.key == "b"
    assert "the model is partly loaded, 1 of 2 tensors: load it again before it is used" in str(caught.value)
    assert model.a.tolist() == [1, 1, 1]


@pytest.mark.parametrize("rows", [3, 5_000_000], ids=["small", "of several stretches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_record_is_noticed_where_that_is_asked_for(rows: int, dtype: torch.dtype) -> None:
    torch.save({"w": torch.ones(rows)}, "a.pth")
    damaged_in("a.pth", "data/0")
    with pytest.raises(cs.InputError, match="'w': the record .*data/0 does not have its checksum") as caught:
        cs.load_into(Holder(w=torch.zeros(rows, dtype=dtype)), "a.pth", verify=True)
    assert "partly loaded, 0 of 1" in str(caught.value)
    torch.save({"w": torch.ones(rows)}, "b.pth")
    model = Holder(w=torch.zeros(rows))
    cs.load_into(model, "b.pth", verify=True)
    assert model.w.sum() == rows


# -- names of one memory -------------------------------------------------------------------------


class Views(nn.Module):
    """Parameters over one memory: `a` and `b` the same rows, `c` some of them, `d` others."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(6, 4)
        self.a, self.b = nn.Parameter(whole[:4]), nn.Parameter(whole[:4])
        self.c, self.d = nn.Parameter(whole[2:4]), nn.Parameter(whole[4:])


def test_ties_are_loaded_from_a_file_that_has_them_twice() -> None:
    want = torch.randn(16, 4)
    save_file({"embed.weight": want, "head.weight": want.clone()}, "a.safetensors")
    model = Tied()
    assert cs.load_into(model, "a.safetensors").coverage == 1
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, want)


def test_two_values_for_one_tensor_are_refused() -> None:
    one, two = torch.randn(16, 4), torch.randn(16, 4)
    save_file({"embed.weight": one, "head.weight": two}, "a.safetensors")
    model = telling(Tied())
    before = model.embed.weight.detach().clone()
    words = "'embed.weight' and 'head.weight' are one tensor in the Tied, and two that differ in the checkpoint"
    with pytest.raises(cs.PlanError, match=words):
        cs.load_into(model, "a.safetensors")
    assert torch.equal(model.embed.weight, before)
    report = cs.load_into(model, "a.safetensors", ["drop ^embed"], missing="init")
    assert torch.equal(model.embed.weight, two)
    assert report.kept == ()


def test_parameters_over_the_same_memory_are_loaded_where_the_checkpoint_agrees() -> None:
    values = torch.randn(6, 4)
    agreeing = {"a": values[:4], "b": values[:4], "c": values[2:4], "d": values[4:]}
    torch.save({key: value.clone() for key, value in agreeing.items()}, "a.pth")
    model = Views()
    cs.load_into(model, "a.pth")
    assert_same_tensors(model.state_dict(), agreeing)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("b", "'a' and 'b' are one tensor in the Views, and two that differ in the checkpoint"),
        ("c", "'a' and 'c' share memory in the Views, and the checkpoint has two values for the same elements"),
    ],
)
def test_two_values_for_the_same_elements_are_refused(key: str, words: str) -> None:
    values = torch.randn(6, 4)
    state = {"a": values[:4], "b": values[:4], "c": values[2:4], "d": values[4:]}
    torch.save({**state, key: state[key] + 1}, "a.pth")
    model = Views()
    with pytest.raises(cs.PlanError) as caught:
        cs.load_into(model, "a.pth")
    assert words in str(caught.value)
    assert not model.a.any()
    assert not model.d.any()


def test_columns_of_one_matrix_lie_crosswise_and_share_nothing() -> None:
    whole = torch.zeros(3, 4)
    model = Holder(a=whole[:, :2], b=whole[:, 2:])
    torch.save({"a": torch.ones(3, 2), "b": torch.full((3, 2), 2.0)}, "a.pth")
    cs.load_into(model, "a.pth")
    assert whole.tolist() == [[1, 1, 2, 2]] * 3


def test_what_cannot_be_loaded_into_is_refused_by_name() -> None:
    """Repeated memory, sparse tensors, and tensors that a module makes for its state dict alone."""

    class Makes(Holder):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "made"] = torch.zeros(2)

    model = Makes(repeated=torch.zeros(1, 2).expand(3, 2), w=torch.zeros(2))
    model.register_buffer("sparse", torch.zeros(2, 2).to_sparse())
    torch.save(
        {"repeated": torch.ones(3, 2), "w": torch.ones(2), "sparse": torch.ones(2, 2), "made": torch.ones(2)}, "a.pth"
    )
    with pytest.raises(cs.PlanError) as caught:
        cs.load_into(model, "a.pth")
    found = {problem.key: problem.text for problem in caught.value.problems}
    assert found.keys() == {"repeated", "sparse", "made"}
    assert "repeats its memory" in found["repeated"]
    assert "sparse in the model" in found["sparse"]
    assert "made by its module's code" in found["made"]
    assert not model.w.any()


def test_extra_state() -> None:
    """What is no tensor stays and is named; a tensor goes where the module takes it."""

    class Counts(nn.Linear):
        def __init__(self, state: Any) -> None:
            super().__init__(2, 2)
            self.state = state

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            self.state = state

    torch.save({**nn.Linear(2, 2).state_dict(), "_extra_state": torch.tensor([3, 4])}, "a.pth")
    model = Counts(torch.zeros(2, dtype=torch.int64))
    cs.load_into(torch.compile(model), "a.pth")
    assert model.state.tolist() == [3, 4]
    model = Counts({"n": 1})
    report = cs.load_into(nn.ModuleDict({"x": torch.compile(model)}), "a.pth", unexpected="drop")
    assert model.state == {"n": 1}
    assert report.others == ("x._extra_state",)
    assert "x._extra_state" in str(report)


# -- models on the meta device -------------------------------------------------------------------


class Special(nn.Parameter):
    """A class of parameters of its own."""


class Unusual(nn.Module):
    """Ties, views of one another, a frozen parameter, one of a class of its own, one that does not lie in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = Tied()
        self.again = self.tied.embed
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.special = Special(torch.zeros(2, 2))
        self.special.mark = "kept"
        self.turned = nn.Parameter(torch.zeros(4, 3).t())
        self.alias = nn.Parameter(self.frozen.detach(), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)


def test_a_model_on_the_meta_device_is_made_real() -> None:
    want = telling(Unusual()).state_dict()
    torch.save(want, "a.pth")
    with torch.device("meta"):
        model = Unusual()
    report = cs.load_into(model, "a.pth", assign=True)
    assert report.coverage == 1
    assert_same_tensors(model.state_dict(), want)
    assert model.tied.head.weight is model.tied.embed.weight is model.again.weight
    assert model.alias.data_ptr() == model.frozen.data_ptr()
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["frozen", "alias"]
    assert isinstance(model.special, Special)
    assert (type(model.norm.weight), model.special.mark) == (nn.Parameter, "kept")
    assert model.turned.stride() == (1, 3)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    model.norm(torch.randn(2, 3)).sum().backward()


def test_a_model_on_the_meta_device_keeps_its_dtypes() -> None:
    torch.save(telling(Net()).state_dict(), "a.pth")
    with torch.device("meta"):
        model = Net().bfloat16()
    cs.load_into(torch.compile(model), "a.pth", assign=True)
    assert_same_tensors(model.state_dict(), telling(Net()).bfloat16().state_dict())


def test_what_would_stay_on_the_meta_device_is_an_error_that_lists_it() -> None:
    class Turning(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.zeros(2), persistent=False)

    torch.save(telling(Net(num_classes=3)).state_dict(), "a.pth")
    for missing, mismatched in (("init", "drop"), ("skip", "drop"), (None, "overlap")):
        with torch.device("meta"):
            model = Turning()
        with pytest.raises(cs.PlanError) as caught:
            cs.load_into(model, "a.pth", missing=missing, mismatched=mismatched, assign=True)
        assert [problem.key for problem in caught.value.problems] == ["fc.weight", "fc.bias", "angles"]
        assert "module.to_empty(device='cpu') and module.reset_parameters()" in str(caught.value)
        assert all(value.is_meta for value in model.parameters())
    model.fc.to_empty(device="cpu").reset_parameters()
    model.angles = torch.ones(2)
    head = model.fc.weight.detach().clone()
    report = cs.load_into(model, "a.pth", missing="skip", mismatched="drop", assign=True)
    assert report.kept == ("fc.weight", "fc.bias")
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.stem.weight, telling(Net(num_classes=3)).stem.weight)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_assign_leaves_real_tensors_where_they_are() -> None:
    torch.save(telling(Net()).state_dict(), "a.pth")
    model = Net()
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    cs.load_into(model, "a.pth", assign=True)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    assert_same_tensors(model.state_dict(), telling(Net()).state_dict())


# -- the report ----------------------------------------------------------------------------------


def test_too_little_coverage_leaves_the_model_as_it_was() -> None:
    """Of tensors and of elements alike, as `ckpt diff --min-coverage` counts."""
    torch.save(telling(Net(num_classes=100)).state_dict(), "a.pth")
    model = telling(Net(), seed=5)
    found = cs.diff("a.pth", model).coverage
    assert (found.by_tensors, found.by_numel) == (12 / 14, 465 / 555)
    with pytest.raises(cs.PlanError) as caught:
        cs.load_into(model, "a.pth", fit=True, min_coverage=0.84)
    assert str(caught.value) == (
        "only 12 of 14 tensors and 465 of 555 elements come from the checkpoint, less than min_coverage=0.84; "
        "not, or not in full: 'fc.weight', 'fc.bias'"
    )
    assert_same_tensors(model.state_dict(), telling(Net(), seed=5).state_dict())
    report = cs.load_into(model, "a.pth", fit=True, min_coverage=found.least)
    assert report.covered == found
    assert report.raise_for(0.83) is report
    for share in (1.1, -0.1, float("nan"), True):
        with pytest.raises(cs.UsageError, match="a share from 0 to 1"):
            cs.load_into(model, "a.pth", fit=True, min_coverage=share)


def test_the_report_tells_parameters_from_buffers() -> None:
    state = {f"module.{key}": value for key, value in telling(Net()).named_parameters()}
    torch.save({**state, "module.extra": torch.ones(1)}, "a.pth")
    report = cs.load_into(Net(), "a.pth", missing="init", unexpected="drop")
    assert report.buffers_kept == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert report.covered_parameters.least == 1
    assert (report.covered.tensors, report.covered.of_tensors) == (11, 14)
    assert report.unwrapped == ("strip module.",)
    data = json.loads(json.dumps(report.as_dict()))
    assert data["kept"]["norm.running_mean"] == "not in the checkpoint; buffer: running statistics of a BatchNorm2d"
    assert data["dropped"] == {"module.extra": "not a key of the Net"}
    assert data["unwrapped"] == ["strip module."]
    assert data["coverage_of_parameters"]["by_numel"] == 1
    assert data["loaded"] == [key for key, _ in telling(Net()).named_parameters()]


def test_keys_are_data_in_a_notebook() -> None:
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2), "<b>&\x1b[31m": torch.ones(1)}, "a.pth")
    text = cs.load_into(nn.Linear(2, 2), "a.pth", unexpected="drop")._repr_html_()
    assert "&lt;b&gt;&amp;\\x1b[31m" in text
    assert "<b>&" not in text
    assert "loaded 2 of 2 tensors, 100.00 % of the elements" in text


def test_a_notebook_shows_no_endless_table() -> None:
    state = {f"extra.{n}": torch.ones(1) for n in range(1000)}
    torch.save({**state, **nn.Linear(2, 2).state_dict()}, "a.pth")
    text = cs.load_into(nn.Linear(2, 2), "a.pth", unexpected="drop")._repr_html_()
    assert text.count("<tr>") == 201
    assert "… and 800 more" in text


def test_patterns_that_match_nothing_are_refused() -> None:
    torch.save(Net().state_dict(), "a.pth")
    with pytest.raises(cs.PlanError, match="fz"):
        cs.load_into(Net(), "a.pth", [r"drop ^fz\."], missing="init")
    assert cs.load_into(Net(), "a.pth", [r"drop ^fz\."], allow_unused=True).coverage == 1


def test_only_modules_are_loaded_into() -> None:
    torch.save(Net().state_dict(), "a.pth")
    with pytest.raises(cs.UsageError, match="loads into an nn.Module, not a dict"):
        cs.load_into({}, "a.pth")
    with pytest.raises(cs.TargetError, match="'weight' has no shape yet"):
        cs.load_into(nn.LazyLinear(3), "a.pth")


def reported() -> tuple[Net, cs.LoadReport]:
    """A model that was loaded into by some rules, in part and not in full, with its report as an attribute."""
    source = telling(Net(num_classes=8))
    optimizer = torch.optim.SGD(source.parameters(), 0.1, momentum=0.9)
    source(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    state = {f"x.{key}": value for key, value in source.state_dict().items() if key != "norm.bias"}
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, "a.pth")
    model = telling(Net(num_classes=10), seed=3)
    model.report = cs.load_into(
        model, "a.pth", [r"^x\.(.*) => \1", "scale fc.bias$ 2"], mismatched="overlap", missing="init"
    )
    return model, model.report


def test_a_model_with_its_report_can_be_pickled_and_copied() -> None:
    model, report = reported()
    again = ForkingPickler.loads(ForkingPickler.dumps(model))
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert again.report.as_dict() == report.as_dict()
    assert str(again.report) == str(report)
    assert [list(step.edges) for step in again.report.plan.steps] == [list(step.edges) for step in report.plan.steps]
    part = again.report.plan.result["fc.bias"].source.inputs[0].read()
    assert_same_tensor(part, report.plan.result["fc.bias"].source.inputs[0].read())
    cs.freeze(again, loaded=again.report)
    assert [name for name, one in again.named_parameters() if one.requires_grad] == [
        "norm.bias",
        "fc.weight",
        "fc.bias",
    ]
    assert copy.deepcopy(model).report.plan.on is not None
    empty = cs.load_into(Net(), cs.Checkpoint({}), missing="init")
    assert ForkingPickler.loads(ForkingPickler.dumps(empty)).kept == empty.kept
    with pytest.raises(cs.TargetError, match="the Net that was loaded into is no more"):
        ForkingPickler.loads(ForkingPickler.dumps(empty)).plan.result["fc.bias"].read()


def test_a_report_does_not_keep_its_model_alive() -> None:
    model, report = reported()
    assert_same_tensor(report.plan.result["norm.bias"].read(), model.norm.bias.detach())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert report.kept == ("norm.bias",)


def test_what_covers_a_whole_tensor_of_the_model_came_in_full() -> None:
    torch.save(telling(Net(num_classes=20)).state_dict(), "a.pth")
    model = Net(num_classes=10)
    report = cs.load_into(model, "a.pth", mismatched="overlap", min_coverage=1.0)
    assert report.partly == ("fc.weight", "fc.bias")
    assert report.unfilled == ()
    assert report.covered.least == report.covered_parameters.least == report.coverage == 1
    assert cs.freeze(model, loaded=report).trainable == ()


class Refuses(nn.Module):
    """A module that does not take its extra state back."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise ValueError("not this one")


def test_a_model_whose_code_does_not_take_its_state_is_named() -> None:
    model = nn.Sequential(Refuses())
    torch.save(model.state_dict(), "a.pth")
    words = r"the Sequential: its set_extra_state does not take '0._extra_state': ValueError: not this one"
    with pytest.raises(cs.TargetError, match=words):
        cs.load_into(model, "a.pth")


def test_misuse_says_what_is_wanted_and_problems_say_what_to_do() -> None:
    torch.save(telling(Net()).state_dict(), "a.pth")
    with pytest.raises(cs.UsageError, match="rules are lines, or a recipe, not 5"):
        cs.load_into(Net(), "a.pth", 5)  # type: ignore[arg-type]
    for share in ("1", None, 2, True, float("nan")):
        with pytest.raises(cs.UsageError, match="min_coverage is a share from 0 to 1"):
            cs.load_into(Net(), "a.pth", min_coverage=share)  # type: ignore[arg-type]
    torch.save({"weight": torch.ones(1, 1, dtype=torch.complex64)}, "b.pth")
    words = "'weight' is complex64 in the checkpoint and float32 in the model; cast it by a rule, or drop it, with mis"
    with pytest.raises(cs.PlanError, match=words):
        cs.load_into(nn.Linear(1, 1, bias=False), "b.pth")
    assert cs.load_into(nn.Linear(1, 1, bias=False), "b.pth", ["drop weight"], missing="init").kept == ("weight",)

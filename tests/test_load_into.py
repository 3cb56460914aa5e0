"""Loading into live modules."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_tensors
from models import Net, Tied
from resnet18 import telling

import ckptsurgeon as cs


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
    with pytest.raises(cs.UsageError, match="meta device"):
        cs.load_into(model, "a.pth")


def test_arguments_the_wrong_way_round() -> None:
    with pytest.raises(cs.UsageError, match="comes second"):
        cs.load_into("a.pth", Net())

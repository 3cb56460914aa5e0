"""Bounds on live weights: once, and kept while training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same_tensor
from models import Net, Tied
from resnet18 import telling
from torch import nn

import ckptsurgeon as cs


def test_s19_the_weights_of_1x1_convolutions_are_clamped() -> None:
    """Their biases, other kernels and linear layers stay as they are; what changed is counted."""
    model = telling(Net())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    done = cs.clamp(model, kernel_size=1, min=0)
    assert done.names == ("blocks.0.weight", "blocks.1.weight", "blocks.2.weight")
    for name, value in model.named_parameters():
        assert_same_tensor(value, before[name].clamp(min=0) if name in done.names else before[name], name)
        if name in done.names:
            assert done.changed[name] == int((before[name] < 0).sum()) > 0
    assert str(done).splitlines()[-1] == f"{sum(done.changed.values())} elements of 3 parameters changed"
    assert set(cs.clamp(model, kernel_size=1, min=0).changed.values()) == {0}


def test_s19_by_pattern_by_both_and_by_other_kernels() -> None:
    model = telling(Net())
    assert cs.clamp(model, r"^blocks\.[01]", kernel_size=(1, 1), max=0.01).names == (
        "blocks.0.weight",
        "blocks.1.weight",
    )
    assert cs.clamp(model, kernel_size=3, min=-0.01, max=0.01).names == ("stem.weight",)
    assert model.stem.weight.abs().max() == torch.tensor(0.01)
    assert cs.clamp(nn.DataParallel(model), ["bias$"], min=0).names[0] == "norm.bias"
    assert cs.clamp(Tied(), "^head", min=0).names == ("embed.weight",)
    assert cs.clamp(nn.Conv1d(2, 2, 1), kernel_size=1, min=0).names == ("weight",)


def test_s19_is_kept_after_every_step_until_it_is_removed() -> None:
    model = telling(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = cs.keep_clamped(optimizer, model, kernel_size=1, min=0)
    assert model.blocks[0].weight.min() == 0

    def step() -> None:
        for value in model.parameters():
            value.grad = torch.ones_like(value)
        optimizer.step()

    stem = model.stem.weight.detach().clone()
    step()
    assert all(bool((block.weight == 0).any()) and block.weight.min() == 0 for block in model.blocks)
    torch.testing.assert_close(model.stem.weight.detach(), stem - 1)
    step()
    assert model.blocks[2].weight.min() == 0
    handle.remove()
    step()
    assert model.blocks[0].weight.min() == -1


def test_a_nan_stays_one_and_is_not_counted() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), -1.0]]))
    assert cs.clamp(model, "weight", min=0).changed == {"weight": 1}
    assert model.weight[0, 0].isnan()
    assert model.weight[0, 1] == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no bounds": ({"pattern": "stem"}, "clamp wants min, max or both"),
    "bounds the wrong way round": ({"pattern": "stem", "min": 1, "max": 0}, "at least min=1 and at most max=0"),
    "a bound that is no number": ({"pattern": "stem", "min": float("nan"), "max": 0}, "no number is at least"),
    "nothing is meant": ({"min": 0}, "wants a pattern or a kernel_size"),
    "no such name": ({"pattern": "blokcs", "min": 0}, "`blokcs` matches no parameter; the nearest .*'blocks.0.bias'"),
    "no such kernel": ({"kernel_size": 5, "min": 0}, r"kernel size 5; there are \(1, 1\), \(3, 3\)"),
    "no such kernel there": ({"kernel_size": 1, "pattern": "stem", "min": 0}, r"there are \(3, 3\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_constraints_change_nothing_and_say_what_is_wrong(case: str) -> None:
    options, words = BAD[case]
    model = telling(Net())
    with pytest.raises(cs.UsageError, match=words):
        cs.clamp(model, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), telling(Net()).parameters(), strict=True))


def test_a_model_without_values_and_an_optimizer_of_another_model_are_refused() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(cs.UsageError, match="on the meta device"):
        cs.clamp(model, "stem", min=0)
    with pytest.raises(cs.UsageError, match="the optimizer has none of these parameters"):
        cs.keep_clamped(torch.optim.SGD(Net().parameters(), 0.1), Net(), "stem", min=0)

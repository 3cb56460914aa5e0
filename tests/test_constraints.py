"""Bounds on live weights: once, and kept while training."""

from __future__ import annotations

from typing import Any

import numpy as np
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
    assert done._repr_html_() == f"<pre>{done}</pre>"
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
    "nan alone": ({"pattern": "stem", "min": float("nan")}, "min is a number, not nan"),
    "nan as a tensor": ({"pattern": "stem", "max": torch.tensor(float("nan"))}, "max is a number, not nan"),
    "text": ({"pattern": "stem", "min": "0"}, "min is a number, not '0'"),
    "true": ({"pattern": "stem", "max": True}, "max is a number, not True"),
    "more than float32 has": ({"pattern": "stem", "max": 1e300}, "'stem.weight' is float32, which cannot hold the b"),
    "a kernel that is no whole number": ({"kernel_size": 1.0, "min": 0}, "a kernel_size is a whole number"),
    "a kernel in words": ({"kernel_size": "11", "min": 0}, "a kernel_size is a whole number"),
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


def test_bounds_may_be_negative_infinite_of_numpy_or_a_tensor() -> None:
    model, want = telling(Net()), telling(Net()).stem.weight.detach()
    for bounds in ({"max": np.float32(0.02)}, {"max": torch.tensor(0.01)}, {"min": -0.01, "max": float("inf")}):
        cs.clamp(model, "stem", **bounds)
    assert_same_tensor(model.stem.weight, want.clamp(-0.01, torch.tensor(0.01).item()))


def test_an_optimizer_that_moves_none_of_them_leaves_the_model_as_it_was() -> None:
    model = telling(Net())
    with pytest.raises(cs.UsageError, match="the optimizer has none of these parameters"):
        cs.keep_clamped(torch.optim.SGD(Net().parameters(), 0.1), model, "stem", min=0)
    with pytest.raises(cs.UsageError, match="takes an optimizer and its model, not a NoneType"):
        cs.keep_clamped(None, model, "stem", min=0)  # type: ignore[arg-type]
    assert torch.equal(model.stem.weight, telling(Net()).stem.weight)


UNBOUNDED: dict[str, tuple[torch.Tensor, float, str]] = {
    "complex": (torch.ones(2, dtype=torch.complex64), -1, "is complex64"),
    "sparse": (torch.eye(2).to_sparse(), -1, "is sparse or quantised"),
    "float8": (torch.ones(2).to(torch.float8_e4m3fn), -1, "is float8_e4m3fn"),
    "expanded": (torch.ones(1).expand(2), -1, r"repeats its memory \(expand\)"),
    "bool": (torch.ones(2, dtype=torch.bool), 0, "is bool"),
    "a fraction for integers": (torch.ones(2, dtype=torch.int32), 0.5, "is int32, which cannot hold the bound 0.5"),
    "inf for integers": (torch.ones(2, dtype=torch.int32), float("-inf"), "is int32, which cannot hold the bound -inf"),
    "out of range": (torch.ones(2, dtype=torch.uint8), -1, "is uint8, which cannot hold the bound -1"),
    "out of range of a half": (torch.ones(2, dtype=torch.float16), -1e6, "is float16, which cannot hold the bound"),
}


@pytest.mark.parametrize("case", UNBOUNDED)
def test_what_cannot_be_clamped_is_named_before_anything_is_changed(case: str) -> None:
    value, least, words = UNBOUNDED[case]
    model = nn.Module()
    model.first = nn.Parameter(torch.full((2,), -2e7))
    model.other = nn.Parameter(value, requires_grad=False)
    with pytest.raises(cs.UsageError, match=f"'other' {words}"):
        cs.clamp(model, "", min=least)
    assert torch.equal(model.first, torch.full((2,), -2e7))


def test_lazy_parameters_are_named_and_integers_and_inference_tensors_are_clamped() -> None:
    with pytest.raises(cs.UsageError, match="'weight' has no shape yet"):
        cs.clamp(nn.LazyLinear(2), "weight", min=0)
    with torch.inference_mode():
        model = nn.Linear(2, 1, bias=False)
        model.weight.fill_(-1)
    assert cs.clamp(model, "weight", min=0).changed == {"weight": 2}
    whole = nn.Module()
    whole.q = nn.Parameter(torch.tensor([-5, 2**62 + 1, 7]), requires_grad=False)
    assert cs.clamp(whole, "q", min=-3.0, max=2**62).changed == {"q": 2}
    assert whole.q.tolist() == [-3, 2**62, 7]


@pytest.mark.parametrize("model", [None, torch.ones(2), "resnet18", {}])
def test_only_models_are_clamped(model: Any) -> None:
    with pytest.raises(cs.UsageError, match="clamp takes an nn.Module, not"):
        cs.clamp(model, "weight", min=0)

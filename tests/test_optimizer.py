"""Optimizer state and averages go through the same surgery as the weights: training continues as if nothing was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import assert_same_tensor, assert_same_tensors
from torch import nn

import ckptsurgeon as cs

STEPS = 4
FUSED = """
import torch
class Fused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(6, 18)
        self.mlp = torch.nn.Linear(6, 6, bias=False)
        self.norm = torch.nn.BatchNorm1d(6)
class Transposed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 6))
class Split(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = torch.nn.BatchNorm1d(6)
        self.fc = Transposed()
        self.k, self.v, self.q = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
"""


class Fused(nn.Module):
    """A block as one library writes it: qkv in one, linear layers as torch has them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.mlp = nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.mlp(self.norm(torch.tanh(torch.softmax(q * k, -1) + v)))  # type: ignore[no-any-return]


class Transposed(nn.Module):
    """A linear layer as GPT-2 keeps it: (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Split(nn.Module):
    """The same block as another one writes it: other names, other order, q, k and v apart, a transposed linear."""

    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.BatchNorm1d(6)
        self.fc = Transposed()
        self.k, self.v, self.q = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.ln(torch.tanh(torch.softmax(self.q(x) * self.k(x), -1) + self.v(x))))  # type: ignore[no-any-return]


THERE = [r"^norm\. => ln.", r"^mlp\. => fc.", r"transpose ^fc\.weight$", r"split ^qkv\.(\w+)$ => q.\1 k.\1 v.\1"]
BACK = [r"concat ^q\.(\w+)$ ^k\.(\w+)$ ^v\.(\w+)$ => qkv.\1", r"transpose ^fc\.weight$", "^fc => mlp", "^ln => norm"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01, t0=2),
    "foreach adam": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
}


def telling(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    """The losses of some steps on data that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(5, 6, generator=generator, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bundle(model: nn.Module, optimizer: torch.optim.Optimizer, path: str = "a.pth", **more: Any) -> None:
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), **more}, path)


def resumed(path: str, model: Any, make: Callable[[Any], torch.optim.Optimizer]) -> tuple[Any, torch.optim.Optimizer]:
    """A model and an optimizer as a training script takes them from a bundle."""
    held = torch.load(path, weights_only=True)
    model.load_state_dict(held["state_dict"])
    optimizer = make(model.parameters())
    optimizer.load_state_dict(held["optimizer"])
    return model, optimizer


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module, name: str) -> dict[str, Any]:
    return optimizer.state[dict(model.named_parameters())[name]]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["there", "back"])
def test_training_continues_in_another_layout_as_if_nothing_was(name: str, way: str) -> None:
    make = OPTIMIZERS[name]
    first, second = (Fused, Split) if way == "there" else (Split, Fused)
    model = telling(first().double())
    optimizer = make(model.parameters())
    train(model, optimizer, STEPS, seed=1)
    bundle(model, optimizer)
    written = cs.remap("a.pth", "b.pth", THERE if way == "there" else BACK, to=second(), extras=True)
    assert written.warnings == ()
    (followed,) = written.plan.followed  # type: ignore[union-attr]
    assert followed.reset == {}
    assert set(followed.exact) == set(dict(second().named_parameters()))
    other, continued = resumed("b.pth", second().double(), make)
    want, got = train(model, optimizer, 6, seed=2), train(other, continued, 6, seed=2)
    assert got == pytest.approx(want, rel=1e-9)
    bundle(other, continued, "c.pth")
    cs.remap("c.pth", "d.pth", BACK if way == "there" else THERE, to=first(), extras=True)
    back = torch.load("d.pth", weights_only=True)
    for key, value in model.state_dict().items():
        assert torch.allclose(back["state_dict"][key].double(), value.double(), rtol=1e-9, atol=1e-12), key
    mine = optimizer.state_dict()["state"]
    assert back["optimizer"]["state"].keys() == mine.keys()
    for position, state in mine.items():
        for entry, value in state.items():
            got_value = back["optimizer"]["state"][position][entry]
            if value is not None:
                close = torch.allclose(torch.as_tensor(got_value).double(), torch.as_tensor(value).double(), rtol=1e-6)
                assert close, entry


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_renamed_and_reordered_parameters_continue_bit_for_bit(name: str) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln, self.out, self.attn = nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False), nn.Linear(6, 18)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.attn(x).chunk(3, -1)
            return self.out(self.ln(torch.tanh(torch.softmax(q * k, -1) + v)))  # type: ignore[no-any-return]

    make, model = OPTIMIZERS[name], telling(Fused())
    optimizer = make(model.parameters())
    train(model, optimizer, STEPS, seed=1)
    bundle(model, optimizer)
    cs.remap("a.pth", "b.pth", ["^norm => ln", "^mlp => out", "^qkv => attn"], to=Renamed(), extras=True)
    other, continued = resumed("b.pth", Renamed(), make)
    assert train(other, continued, 5, seed=2) == train(model, optimizer, 5, seed=2)


def test_s10_s24_a_bundle_of_resnet18_resumes_and_with_a_new_head_the_rest_continues_exactly() -> None:
    model = torchvision.models.resnet18(num_classes=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": optimizer.state_dict(),
                "prec1": 0.5}, "a.pth")  # fmt: skip
    new = torchvision.models.resnet18(num_classes=5)
    written = cs.remap("a.pth", "b.pth", ["strip module."], new, mismatched="drop", missing="init", keep_extras=True)
    held = torch.load("b.pth", weights_only=True)
    assert (held["epoch"], held["arch"], held["prec1"]) == (3, "resnet18", 0.5)
    other, continued = resumed("b.pth", new, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
    (followed,) = written.plan.followed  # type: ignore[union-attr]
    assert (len(followed.exact), followed.fresh) == (60, ("fc.weight", "fc.bias"))
    assert state_of(continued, other, "fc.weight") == {}
    for name in dict(model.named_parameters()):
        if not name.startswith("fc."):
            want = state_of(optimizer, model, name)["momentum_buffer"]
            assert_same_tensor(state_of(continued, other, name)["momentum_buffer"], want, name)
    gradients = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    for one, stepping in ((model, optimizer), (other, continued)):
        for name, parameter in one.named_parameters():
            parameter.grad = gradients[name].clone() if not name.startswith("fc.") else torch.zeros_like(parameter)
        stepping.step()
    for name, parameter in model.named_parameters():
        if not name.startswith("fc."):
            assert_same_tensor(dict(other.named_parameters())[name], parameter, name)


def test_groups_are_repaired_and_their_options_kept() -> None:
    model = telling(Fused())
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": rest, "weight_decay": 0.0, "name": "rest"}, {"params": decay, "lr": 0.5, "name": "decay"}]
    optimizer = torch.optim.AdamW(groups, 0.01)
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    cs.remap("a.pth", "b.pth", THERE, to=Split(), extras=True)
    held = torch.load("b.pth", weights_only=True)["optimizer"]
    names = [name for name, _ in Split().named_parameters()]
    order = [name for name in names if name.endswith("bias") or name.startswith("ln")]
    order += [name for name in names if name not in order]
    assert [group["params"] for group in held["param_groups"]] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in held["param_groups"]] == [
        ("rest", 0.01, 0.0),
        ("decay", 0.5, 0.01),
    ]
    whole = state_of(optimizer, model, "qkv.weight")["exp_avg_sq"]
    for start, name in ((0, "q.weight"), (6, "k.weight"), (12, "v.weight")):
        assert_same_tensor(held["state"][order.index(name)]["exp_avg_sq"], whole[start : start + 6], name)
    want = state_of(optimizer, model, "mlp.weight")["exp_avg"].T
    assert_same_tensor(held["state"][order.index("fc.weight")]["exp_avg"], want)


def test_names_that_the_optimizer_says_are_taken_and_written() -> None:
    model = telling(Fused())
    pairs = list(model.named_parameters())[::-1]
    optimizer = torch.optim.Adam(pairs, 0.01)
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    cs.remap("a.pth", "b.pth", ["^qkv => attn"], extras=True)
    (group,) = torch.load("b.pth", weights_only=True)["optimizer"]["param_groups"]
    assert group["param_names"] == [name.replace("qkv", "attn") for name, _ in pairs]


def test_a_scale_divides_the_first_moment_and_its_square_the_second() -> None:
    model = telling(Fused())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    cs.remap("a.pth", "b.pth", [r"scale ^qkv\.weight$ 4", r"add ^norm\.weight$ 1"], extras=True)
    held = torch.load("b.pth", weights_only=True)["optimizer"]["state"]
    want = state_of(optimizer, model, "qkv.weight")
    assert_same_tensor(held[0]["exp_avg"], want["exp_avg"] / 4)
    assert_same_tensor(held[0]["exp_avg_sq"], want["exp_avg_sq"] / 16)
    assert_same_tensor(held[3]["exp_avg"], state_of(optimizer, model, "norm.weight")["exp_avg"])


def test_what_is_split_counts_its_steps_apart() -> None:
    model = telling(Fused())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 3, seed=1)
    bundle(model, optimizer)
    cs.remap("a.pth", "b.pth", THERE, to=Split(), extras=True)
    other, continued = resumed("b.pth", Split(), lambda p: torch.optim.Adam(p, 0.01))
    train(other, continued, 2, seed=2)
    assert {float(state["step"]) for state in continued.state.values()} == {5.0}


def test_averages_follow_by_name_and_by_position() -> None:
    model = telling(Fused())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 1, seed=1)
    average = {f"ema.{key}": value.clone() * 2 for key, value in model.state_dict().items()}
    shadow = [parameter.detach() * 3 for parameter in model.parameters()]
    bundle(model, optimizer, average={"decay": 0.9, "shadow": average}, ema={"shadow_params": shadow})
    cs.remap("a.pth", "b.pth", THERE, to=Split(), extras=True, select="state_dict")
    held = torch.load("b.pth", weights_only=True)
    for key, value in held["state_dict"].items():
        assert_same_tensor(held["average"]["shadow"][f"ema.{key}"], value * 2, key)
    assert held["average"]["decay"] == 0.9
    for got, name in zip(held["ema"]["shadow_params"], dict(Split().named_parameters()), strict=True):
        assert_same_tensor(got, held["state_dict"][name] * 3, name)


def test_what_is_no_copy_of_the_weights_stays_as_it_is() -> None:
    model = telling(Fused())
    loss = {"weight": torch.ones(6), "bias": torch.ones(6)}
    bundle(model, torch.optim.SGD(model.parameters(), 0.1), criterion=loss, rng=torch.arange(9, dtype=torch.uint8))
    cs.remap("a.pth", "b.pth", ["^qkv => attn"], extras=True, select="state_dict")
    held = torch.load("b.pth", weights_only=True)
    assert_same_tensors(held["criterion"], loss)
    assert_same_tensor(held["rng"], torch.arange(9, dtype=torch.uint8))


def test_an_optimizer_of_another_model_is_left_out_and_named(ckpt: Any) -> None:
    model, other = telling(Fused()), nn.Sequential(nn.Linear(6, 18), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(6))
    optimizer = torch.optim.Adam(other.parameters(), 0.01)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    bundle(model, optimizer)
    ran = ckpt("remap", "a.pth", "-o", "b.pth", "--rule", "^qkv => attn", "--keep-extras")
    assert ran.code == 0
    why = "its state of parameter 2 is [5, 6], and 'mlp.weight' is [6, 6]"
    assert f"warning: the optimizer state at 'optimizer' is left out: {why}" in ran.err
    assert "optimizer" not in torch.load("b.pth", weights_only=True)
    strict = ckpt("remap", "a.pth", "-o", "c.pth", "--rule", "^qkv => attn", "--keep-extras", "--strict-extras")
    assert strict.code == 1
    assert why in strict.err
    assert ckpt("ls", "c.pth").code == 2
    assert ckpt("remap", "a.pth", "-o", "c.pth", "--rule", "^qkv => attn", "--strict-extras").code == 2


def test_positions_that_shapes_cannot_tell_are_no_guess() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    first, second = [model[0].weight, model[2].weight], [model[1].weight]
    optimizer = torch.optim.SGD([{"params": first}, {"params": second, "lr": 1.0}], 0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    bundle(model, optimizer)
    plan = cs.plan("a.pth", ["^ => net."], extras=True)
    (followed,) = plan.followed
    assert followed.left.startswith("its parameter 0 may be '0.weight' or '1.weight': the shapes do not tell")
    assert "optimizer" not in plan.result.extras


def test_frozen_parameters_without_state_stay_out_of_the_optimizer() -> None:
    model = telling(Fused())
    optimizer = torch.optim.Adam([model.qkv.weight, model.qkv.bias], 0.01)
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    cs.remap("a.pth", "b.pth", THERE, to=Split(), extras=True)
    held = torch.load("b.pth", weights_only=True)["optimizer"]
    assert held["param_groups"][0]["params"] == list(range(6))
    other = Split()
    trained = [parameter for name, parameter in other.named_parameters() if name[0] in "qkv"]
    torch.optim.Adam(trained, 0.01).load_state_dict(held)
    want = state_of(optimizer, model, "qkv.weight")["exp_avg"][6:12]
    assert_same_tensor(held["state"][0]["exp_avg"], want)


def test_factored_states_pass_a_rename_and_begin_anew_where_a_tensor_changes() -> None:
    model = telling(Fused())
    optimizer = torch.optim.Adafactor(model.parameters(), 0.01)
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    written = cs.remap("a.pth", "b.pth", THERE, to=Split(), extras=True)
    (followed,) = written.plan.followed  # type: ignore[union-attr]
    assert set(followed.reset) == {"q.weight", "k.weight", "v.weight", "fc.weight"}
    assert all("factored" in why for why in followed.reset.values())
    other, continued = resumed("b.pth", Split(), lambda p: torch.optim.Adafactor(p, 0.01))
    want = state_of(optimizer, model, "qkv.bias")["variance"][12:]
    assert_same_tensor(state_of(continued, other, "v.bias")["variance"], want)
    train(other, continued, 1, seed=3)


def test_factored_states_of_transformers_tell_the_shapes_of_their_parameters() -> None:
    from transformers.optimization import Adafactor

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5), nn.Conv2d(2, 3, 5, bias=False))
    optimizer = Adafactor(model.parameters(), lr=0.01, relative_step=False, scale_parameter=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    bundle(model, optimizer)
    cs.remap("a.pth", "b.pth", ["^0 => first"], extras=True)
    held = torch.load("b.pth", weights_only=True)["optimizer"]["state"]
    for position, state in optimizer.state_dict()["state"].items():
        for entry, value in state.items():
            if isinstance(value, torch.Tensor):
                assert_same_tensor(held[position][entry], value, entry)
    (followed,) = cs.plan("a.pth", [r"transpose ^1\.weight$"], extras=True).followed
    assert list(followed.reset) == ["1.weight"]


def test_a_new_parameter_of_adagrad_has_the_state_that_its_first_step_needs() -> None:
    model = telling(Fused())
    make = lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.25)  # noqa: E731
    optimizer = make(model.parameters())
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    cs.remap("a.pth", "b.pth", [r"drop ^mlp\."], to=Fused(), missing="init", extras=True)
    other, continued = resumed("b.pth", Fused(), make)
    assert_same_tensor(state_of(continued, other, "mlp.weight")["sum"], torch.full((6, 6), 0.25))
    train(other, continued, 1, seed=3)


def test_rows_that_are_new_begin_with_the_moments_that_are_exact_for_them() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    make = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)  # noqa: E731
    optimizer = make(model.parameters())
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    wider = nn.Sequential(nn.Linear(6, 7))
    cs.remap("a.pth", "b.pth", to=wider, mismatched="overlap", extras=True)
    other, continued = resumed("b.pth", wider, make)
    got = state_of(continued, other, "0.weight")["momentum_buffer"]
    assert_same_tensor(got[:4], state_of(optimizer, model, "0.weight")["momentum_buffer"])
    assert_same_tensor(got[4:], torch.zeros(3, 6))
    adam = torch.optim.Adam(model.parameters(), 0.1)
    train(model, adam, 2, seed=1)
    bundle(model, adam)
    (followed,) = cs.plan("a.pth", to=wider, mismatched="overlap", extras=True).followed
    assert followed.reset == dict.fromkeys(
        ("0.weight", "0.bias"), "a part of it is new, while steps are counted for the whole"
    )


def test_ties_count_once_and_what_was_one_parameter_begins_anew() -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
            self.norm = nn.LayerNorm(6)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(x)) + self.embed.weight.sum()

    model = Tied(True)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    written = cs.remap("a.pth", "b.pth", to=Tied(True), extras=True)
    _, continued = resumed("b.pth", Tied(True), lambda p: torch.optim.Adam(p, 0.01))
    assert len(continued.state) == 3
    assert written.warnings == ()
    apart = cs.plan("a.pth", to=Tied(False), extras=True)
    (followed,) = apart.followed
    assert set(followed.reset) == {"embed.weight", "head.weight"}


def test_joined_parameters_with_other_steps_or_groups_are_no_one_parameter() -> None:
    model = telling(Split())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 2, seed=1)
    state_of(optimizer, model, "k.weight")["step"] += 1
    bundle(model, optimizer)
    (followed,) = cs.plan("a.pth", BACK, to=Fused(), extras=True).followed
    assert followed.reset == {
        "qkv.weight": "'step' differs among 'q.weight', 'k.weight', 'v.weight', of which it is made"
    }
    groups = [{"params": list(m.parameters()), "lr": 0.1 * i} for i, m in enumerate(model.children(), 1)]
    named = [{**g, "params": [(n, p) for n, p in model.named_parameters() if any(p is q for q in g["params"])]}
             for g in groups]  # fmt: skip
    optimizer = torch.optim.Adam(named, 0.01)
    train(model, optimizer, 1, seed=1)
    bundle(model, optimizer)
    (followed,) = cs.plan("a.pth", BACK, to=Fused(), extras=True).followed
    assert "of group 2" in followed.left
    assert "which differ in lr" in followed.left


def test_without_extras_nothing_beside_the_weights_follows() -> None:
    model = telling(Fused())
    bundle(model, torch.optim.Adam(model.parameters(), 0.01))
    plan = cs.plan("a.pth", THERE, to=Split())
    assert plan.followed == ()
    (warning,) = cs.save(plan.result, "b.pth", keep_extras=True).warnings
    assert warning.startswith("the optimizer state at 'optimizer' is kept as it was, and the parameters changed")
    assert cs.save(cs.plan("a.pth", THERE, to=Split(), extras=True).result, "c.pth", keep_extras=True).warnings == ()
    with pytest.raises(cs.UsageError, match="give both"):
        cs.plan("a.pth", THERE, strict_extras=True)


def test_the_plan_tells_what_follows(ckpt: Any) -> None:
    model = telling(Fused())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 1, seed=1)
    bundle(model, optimizer)
    words = ["remap", "a.pth", "--rule", "^qkv => attn", "--keep-extras", "--dry-run"]
    assert "the optimizer state at 'optimizer' follows: the state of 5 parameters" in ckpt(*words).out
    (told,) = ckpt(*words, "--json").json["followed"]
    assert told == {
        "place": "optimizer",
        "kind": "optimizer",
        "exact": ["attn.weight", "attn.bias", "mlp.weight", "norm.weight", "norm.bias"],
        "reset": {},
        "fresh": [],
        "notes": [],
        "left": None,
        "kept": False,
    }


def test_the_optimizer_file_beside_a_checkpoint_of_transformers_follows_it(ckpt: Any, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = telling(Fused())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, 2, seed=1)
    save_file(model.state_dict(), "model.safetensors")
    torch.save(optimizer.state_dict(), "optimizer.pt")
    rules = [word for rule in THERE for word in ("--rule", rule)]
    Path("fused.py").write_text(FUSED)
    words = ["remap", "model.safetensors", "-o", "new.safetensors", *rules, "--optimizer", "optimizer.pt=new.pt"]
    words[4:4] = ["--to", "fused.py:Split"]
    unsure = ckpt(*words)
    assert unsure.code == 1
    assert "the checkpoint's keys are sorted, not in the model's order; --order names the model" in unsure.err
    assert not Path("new.safetensors").exists()
    words[4:4] = ["--order", "fused.py:Fused"]
    ran = ckpt(*words)
    assert ran.code == 0
    assert "the optimizer state at 'optimizer.pt: .' follows: the state of 9 parameters" in ran.out
    other = Split()
    other.load_state_dict(load_file("new.safetensors"))
    continued = torch.optim.AdamW(other.parameters(), 0.01)
    continued.load_state_dict(torch.load("new.pt", weights_only=True))
    want, got = train(model, optimizer, 3, seed=2), train(other, continued, 3, seed=2)
    assert got == pytest.approx(want, rel=1e-5)
    assert ckpt(*words, "--force").code == 0
    assert ckpt(*words).code == 2
    words[-1] = "optimizer.pt=again.pt"
    torch.save({"a": 1}, "other.pt")
    assert "holds no optimizer state" in ckpt(*words[:-1], "other.pt=x.pt", "--force").err


def test_a_live_optimizer_with_other_groups_takes_the_state_by_name() -> None:
    model = telling(Fused())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    other = Split()
    report = cs.load_into(other, "a.pth", THERE)
    other.k.bias.requires_grad_(False)
    groups = cs.param_groups(other, 0.5, [("^fc", 10)], weight_decay=0.1)
    live = torch.optim.AdamW(list(groups))
    found = cs.load_optimizer(live, other, report)
    assert set(found.exact) == {name for name, _ in other.named_parameters()} - {"k.bias"}
    assert found.notes == ("the state of 1 parameter that this optimizer does not have is left out",)
    assert {group["lr"] for group in live.param_groups} == {0.5, 5.0}
    whole = state_of(optimizer, model, "qkv.weight")
    for start, name in ((0, "q.weight"), (6, "k.weight"), (12, "v.weight")):
        assert_same_tensor(state_of(live, other, name)["exp_avg"], whole["exp_avg"][start : start + 6], name)
        assert float(state_of(live, other, name)["step"]) == 2.0
    with pytest.raises(cs.UsageError, match="of another kind than SGD"):
        cs.load_optimizer(torch.optim.SGD(other.parameters(), 0.1), other, report)
    with pytest.raises(cs.UsageError, match="has optimizer states at 'optimizer'"):
        cs.load_optimizer(live, other, report, place="nowhere")


@pytest.mark.parametrize(
    "state",
    [
        {"state": {}, "param_groups": 3},
        {"state": [], "param_groups": []},
        {"state": {0: 1}, "param_groups": [{"params": [0]}]},
        {"state": {}, "param_groups": [{"params": [0, 0]}]},
        {"state": {}, "param_groups": [{"params": [None]}]},
        {"state": {}, "param_groups": [{"params": ["a", "b"]}]},
        {"state": {}, "param_groups": [{"params": [0, 1], "param_names": ["x", "y"]}]},
        {"state": {0: {"old_dirs": []}}, "param_groups": [{"params": list(range(5))}]},
    ],
)
def test_odd_optimizer_states_are_left_out_with_a_word(state: Any, ckpt: Any) -> None:
    torch.save({"state_dict": telling(Fused()).state_dict(), "optimizer": state}, "a.pth")
    ran = ckpt("remap", "a.pth", "-o", "b.pth", "--rule", "^qkv => attn", "--keep-extras")
    assert ran.code == 0
    assert "warning: the optimizer state at 'optimizer' is left out: " in ran.err
    assert "optimizer" not in torch.load("b.pth", weights_only=True)


def test_states_with_odd_entries_begin_anew_where_a_tensor_changes() -> None:
    model = telling(Split())
    entry: dict[str, Any] = {"exp_avg": torch.ones(6, 6), "step": 3}
    odd = [{**entry, "more": {1, 2}}, {**entry, "more": [torch.ones(2)]}, {**entry, "exp_avg": torch.ones(6, 6).char()}]
    for more in odd:
        names = [name for name, _ in model.named_parameters()]
        state = {names.index(f"{name}.weight"): more for name in "qkv"}
        group = {"lr": 1, "params": list(range(9)), "initial_accumulator_value": "x", "lr_decay": 0}
        torch.save({"state_dict": model.state_dict(), "optimizer": {"state": state, "param_groups": [group]}}, "a.pth")
        (followed,) = cs.plan("a.pth", BACK, to=Fused(), extras=True).followed
        assert list(followed.reset) == ["qkv.weight"]


def test_lightning_keeps_one_list_of_optimizers() -> None:
    model = telling(Fused())
    good, other = torch.optim.Adam(model.parameters(), 0.01), torch.optim.Adam(nn.Linear(3, 3).parameters(), 0.01)
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [good.state_dict()], "epoch": 1}, "a.ckpt")
    cs.remap("a.ckpt", "b.ckpt", THERE, to=Split(), extras=True)
    (kept,) = torch.load("b.ckpt", weights_only=True)["optimizer_states"]
    assert kept["param_groups"][0]["params"] == list(range(9))
    states = [other.state_dict(), good.state_dict()]
    torch.save({"state_dict": model.state_dict(), "optimizer_states": states}, "a.ckpt")
    cs.remap("a.ckpt", "c.ckpt", THERE, to=Split(), extras=True)
    assert torch.load("c.ckpt", weights_only=True)["optimizer_states"] == [None, kept]
    torch.save({"state_dict": model.state_dict(), "optimizer_states": states[:1]}, "a.ckpt")
    cs.remap("a.ckpt", "d.ckpt", THERE, to=Split(), extras=True)
    assert torch.load("d.ckpt", weights_only=True)["optimizer_states"] == []


def test_a_new_head_goes_into_the_group_of_the_one_that_it_replaces() -> None:
    model = torchvision.models.resnet18(num_classes=8)
    backbone = [parameter for name, parameter in model.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": list(model.fc.parameters()), "lr": 1.0}, {"params": backbone}]
    optimizer = torch.optim.SGD(groups, 0.01, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
                "optimizer": optimizer.state_dict()}, "a.pth")  # fmt: skip
    new = torchvision.models.resnet18(num_classes=5)
    written = cs.remap("a.pth", "b.pth", ["strip module."], new, mismatched="drop", missing="init", extras=True)
    assert written.warnings == ()
    held = torch.load("b.pth", weights_only=True)["optimizer"]
    assert [(len(group["params"]), group["lr"]) for group in held["param_groups"]] == [(2, 1.0), (60, 0.01)]
    assert sorted(held["state"]) == list(range(2, 62))
    wider = nn.Sequential(model, nn.Linear(5, 5))  # of which nothing says where it belongs
    (followed,) = cs.plan("a.pth", ["^module => 0"], wider, missing="init", extras=True).followed
    assert followed.left == "'1.bias' is new, and which of the 2 groups it belongs to is not known"


def test_a_copy_begins_anew_and_its_original_continues() -> None:
    model = telling(Fused())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 2, seed=1)
    bundle(model, optimizer)
    larger = telling(Fused())
    larger.more = nn.Linear(6, 6, bias=False)
    (followed,) = cs.plan("a.pth", [r"copy ^mlp\.weight$ => more.weight"], larger, extras=True).followed
    assert followed.reset == {"more.weight": "it is a copy of another one"}
    assert "mlp.weight" in followed.exact

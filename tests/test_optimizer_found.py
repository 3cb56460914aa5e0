"""What a review of the optimizer's surgery found wrong: moments in the wrong place, or lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensor, assert_same_tensors
from safetensors.torch import save_file
from torch import nn

import ckptsurgeon as cs

Make = Callable[[Any], torch.optim.Optimizer]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.01)


def line(wide: int, high: int) -> nn.Module:
    return nn.Linear(wide, high, bias=False)


def net(**parts: nn.Module) -> Any:
    made = nn.Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def stepped(parameters: Any, make: Make = adam) -> torch.optim.Optimizer:
    """An optimizer that has taken one step, so that its state tells."""
    torch.manual_seed(0)
    optimizer = make(list(parameters))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    return optimizer


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, rules: list[str], to: Any = None, state: Any = None, **more: Any
) -> tuple[dict[str, Any], tuple[cs.Followed, ...], tuple[str, ...]]:
    torch.save({"state_dict": state or model.state_dict(), "optimizer": optimizer.state_dict(), **more}, "a.pth")
    written = cs.remap("a.pth", "b.pth", rules, to=to, select="state_dict", extras=True, force=True)
    assert written.plan is not None
    return torch.load("b.pth", weights_only=True), written.plan.followed, written.warnings


def test_rows_of_columns_are_cut_from_moments_as_from_weights() -> None:
    model = net(a=line(4, 4), b=line(4, 4))
    optimizer = stepped(model.parameters())
    average = {key: value.clone() for key, value in model.state_dict().items()}
    rules = ["slice ^a :,2:", "slice ^a 2:", r"take ^b\.weight$ 3,1 dim=1", "slice ^b 1:3"]
    held, _, _ = run(model, optimizer, rules, ema=average)
    for place, (key, parameter) in enumerate(model.named_parameters()):
        cut = (slice(2, 4), slice(2, 4)) if key[0] == "a" else (slice(1, 3), [3, 1])
        want = optimizer.state[parameter]["exp_avg"][cut]
        assert_same_tensor(held["optimizer"]["state"][place]["exp_avg"], want, key)
        assert_same_tensor(held["ema"][key], parameter.detach()[cut], key)


def test_keys_that_somebody_sorted_say_nothing_of_positions() -> None:
    model = net(b=line(4, 4), a=line(4, 4))
    optimizer = stepped(model.parameters())
    state = dict(sorted(model.state_dict().items()))
    same = net(b=line(4, 4), a=line(4, 4))
    held, _, _ = run(model, optimizer, ["transpose ^a"], same, state)  # the target has these names, and an order
    assert_same_tensor(held["optimizer"]["state"][0]["exp_avg"], optimizer.state[model.b.weight]["exp_avg"])
    assert_same_tensor(held["optimizer"]["state"][1]["exp_avg"], optimizer.state[model.a.weight]["exp_avg"].T)
    _, (followed,), _ = run(model, optimizer, ["prefix m."], net(m=same), state)
    assert "sorted" in followed.left


SWAP = ["^a => t", "^b => a", "^t => b"]


@pytest.mark.parametrize("rules", [SWAP, [r"split ^a\.weight$ => a.x a.y"], ["fill c 4 zeros"]])
def test_without_a_model_an_order_that_may_be_another_one_is_no_order(rules: list[str]) -> None:
    model = net(a=line(4, 4), b=line(4, 4))
    held, (followed,), (warning,) = run(model, stepped(model.parameters()), rules)
    assert followed.left == "in which order the new model has its parameters is not known: name it with --to MODEL"
    assert followed.left in warning
    assert "optimizer" not in held


def test_a_sorted_file_as_target_says_no_order_either() -> None:
    model = nn.Sequential(*(line(2, 2) for _ in range(12)))
    save_file({f"m.{key}": value.clone() for key, value in model.state_dict().items()}, "t.safetensors")
    optimizer = stepped(model.parameters())
    held, (followed,), _ = run(model, optimizer, ["prefix m."], "t.safetensors")
    assert len(followed.exact) == 12
    for place, parameter in enumerate(model.parameters()):
        assert_same_tensor(held["optimizer"]["state"][place]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_what_the_target_has_as_a_buffer_may_have_been_trained() -> None:
    model, target = net(b=line(4, 4), a=line(4, 4)), net(b=nn.Module(), a=line(4, 4))
    target.b.register_buffer("weight", torch.zeros(4, 4))
    for rules in (["transpose ^a"], []):
        _, (followed,), _ = run(model, stepped([model.b.weight]), rules, target)
        assert "may be 'b.weight' or 'a.weight'" in followed.left
    criterion, model = nn.Parameter(torch.ones(4)), net(a=nn.Module())
    model.a.w = nn.Parameter(torch.ones(4))
    model.a.register_buffer("center", torch.zeros(4))
    target = net(z=nn.Module())
    target.z.w = nn.Parameter(torch.ones(4))
    target.z.register_buffer("center", torch.zeros(4))
    _, (followed,), _ = run(model, stepped([criterion, model.a.w]), ["^a => z"], target)
    assert followed.left == "it seems to train 'a.center', which the Module has as a buffer"


def test_optimizers_of_other_networks_in_the_file_stay_or_are_open() -> None:
    body, head = nn.Sequential(line(3, 4), line(4, 8)), line(4, 8)
    optimizer = stepped(head.parameters())
    held, (followed,), _ = run(body, optimizer, ["transpose 1.weight"], head=head.state_dict())
    assert followed.left == "it may as well be about the state dict at 'head'"
    assert "optimizer" not in held
    other = line(5, 6)
    theirs = stepped(other.parameters()).state_dict()
    held, followed_all, warnings = run(
        body, stepped(body.parameters()), ["^1 => 2"], D=other.state_dict(), opt_d=theirs
    )
    kept = next(one for one in followed_all if one.place == "opt_d")
    assert kept.kept
    assert not kept.left
    assert kept.notes == ("it is about the state dict at 'D', and is kept as it was",)
    assert warnings == ()
    assert_same_tensor(held["opt_d"]["state"][0]["exp_avg"], theirs["state"][0]["exp_avg"])


def test_tensors_of_another_checkpoint_beside_are_no_parameters_of_the_optimizer() -> None:
    model, criterion = net(a=line(3, 3)), nn.Parameter(torch.ones(5, 5))
    torch.save({"p": torch.ones(5, 5)}, "x.pth")
    optimizer = stepped([model.a.weight, criterion])
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, "a.pth")
    (followed,) = cs.plan("a.pth", ["^a => z", r"^x\.p => p"], beside={"x": "x.pth"}, extras=True).followed
    assert followed.left == "it has 2 parameters, and the checkpoint 1"


def test_a_list_of_averages_beside_sorted_keys_is_no_list_by_position() -> None:
    model = net(b=line(4, 4), a=line(4, 4))
    save_file(model.state_dict(), "m.safetensors")
    optimizer = stepped(model.parameters(), lambda p: torch.optim.Adam(model.named_parameters()))
    shadow = [parameter.detach() for parameter in model.parameters()]
    torch.save({"optimizer": optimizer.state_dict(), "ema": {"shadow_params": shadow}}, "o.pt")
    plan = cs.plan("m.safetensors", ["transpose ^a"], to=net(b=line(4, 4), a=line(4, 4)))
    cs.remap_optimizer(plan, "o.pt", "o2.pt")
    got = torch.load("o2.pt", weights_only=True)["ema"]["shadow_params"]  # the target has the same names in order
    assert_same_tensor(got[0], model.b.weight.detach())
    assert_same_tensor(got[1], model.a.weight.detach().T)
    named = cs.plan("m.safetensors", ["transpose ^a", "prefix m."], to=net(m=net(b=line(4, 4), a=line(4, 4))))
    written = cs.remap_optimizer(named, "o.pt", "o3.pt")
    assert any("shadow_params' is kept as it was" in warning for warning in written.warnings)


@pytest.mark.parametrize("rule", ["transpose ^a", "slice ^a :,0:4"])
def test_factors_of_a_matrix_with_one_row_are_no_moments(rule: str) -> None:
    model = net(a=line(8, 1))
    to = net(a=line(1, 8) if rule[0] == "t" else line(4, 1))
    _, (followed,), _ = run(model, stepped(model.parameters(), torch.optim.Adafactor), [rule], to)
    assert followed.reset == {"a.weight": "its state is factored, which no change of shape or value keeps"}


def test_a_negative_factor_leaves_magnitudes_positive() -> None:
    model = net(a=line(4, 4))
    makes: list[tuple[Make, str, float]] = [
        (torch.optim.Adamax, "exp_inf", 0.5),
        (torch.optim.Rprop, "step_size", 2.0),
        (lambda p: torch.optim.RMSprop(p, momentum=0.5), "momentum_buffer", -1.0),
        (adam, "exp_avg", -0.5),
        (adam, "exp_avg_sq", 0.25),
        (torch.optim.Adadelta, "acc_delta", 4.0),
    ]
    for make, entry, factor in makes:
        optimizer = stepped(model.parameters(), make)
        held, _, _ = run(model, optimizer, ["scale ^a -2"], net(a=line(4, 4)))
        want = optimizer.state[model.a.weight][entry] * factor
        assert_same_tensor(held["optimizer"]["state"][0][entry], want, entry)


def test_where_decay_is_a_part_of_the_gradient_a_scale_is_not_exact() -> None:
    model = net(a=line(2, 2))
    makes: list[tuple[Make, str]] = [
        (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1), "its decay is a part of the gradient"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "its decay is a part of the gradient"),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=1.0), "began with a number of its own"),
    ]
    for make, words in makes:
        _, (followed,), _ = run(model, stepped(model.parameters(), make), ["scale ^a 2"], net(a=line(2, 2)))
        assert words in followed.reset["a.weight"]
    apart = stepped(model.parameters(), lambda p: torch.optim.AdamW(p, weight_decay=0.1))
    _, (followed,), _ = run(model, apart, ["scale ^a 2"], net(a=line(2, 2)))
    assert followed.exact == ("a.weight",)


@pytest.mark.parametrize("factor", ["1e-170", "1e-25", "1e25"])
def test_a_factor_beyond_what_a_moment_holds_resets_it(factor: str) -> None:
    model = net(a=line(2, 2))
    model.a.weight.data.zero_()
    _, (followed,), _ = run(model, stepped(model.parameters()), [f"scale ^a {factor}"], net(a=line(2, 2)))
    assert "more than it holds" in followed.reset["a.weight"]


def test_a_tie_that_ends_in_two_parameters_is_no_moment_of_both() -> None:
    model = net(a=line(4, 4), b=line(4, 2))
    optimizer = stepped(model.parameters())
    target = net(a=line(4, 4), b=line(4, 2), c=line(4, 4))
    _, (followed,), _ = run(model, optimizer, ["tie ^a => c", "transpose ^c"], target)
    assert set(followed.reset) == {"a.weight", "c.weight"}
    assert followed.exact == ("b.weight",)
    tied = net(a=line(4, 4), b=line(4, 4))
    tied.b.weight = tied.a.weight
    _, (followed,), _ = run(tied, stepped(tied.parameters()), ["transpose ^a"], net(a=line(4, 4), b=line(4, 4)))
    assert set(followed.reset) == {"a.weight", "b.weight"}
    twice = net(a=line(4, 4))
    _, (followed,), _ = run(twice, stepped(twice.parameters()), ["take ^a 0,0,1,2"], net(a=line(4, 4)))
    assert followed.reset == {"a.weight": "it is a copy of another one"}


def test_the_state_of_a_tied_weight_is_found_under_any_of_its_names() -> None:
    model = net(emb=nn.Embedding(4, 3), body=nn.Linear(3, 3), decoder=line(3, 4))
    model.decoder.weight = model.emb.weight
    optimizer = stepped(model.parameters(), lambda p: torch.optim.Adam(model.named_parameters()))
    other = net(emb=nn.Embedding(4, 3), bod=nn.Linear(3, 3), decoder=line(3, 4))
    other.decoder.weight = other.emb.weight
    state = {key: model.state_dict()[key] for key in sorted(model.state_dict())}
    held, (followed,), _ = run(model, optimizer, ["body => bod"], other, state)
    assert set(followed.exact) == {"emb.weight", "bod.weight", "bod.bias"}
    assert_same_tensor(held["optimizer"]["state"][0]["exp_avg"], optimizer.state[model.emb.weight]["exp_avg"])


def test_an_entry_that_nobody_knows_does_not_follow_a_shift() -> None:
    class Free(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter].setdefault("z", parameter.detach().clone())

    model = net(a=line(3, 3))
    optimizer = stepped(model.parameters(), Free)
    for rule in ("add ^a 1", "scale ^a 2"):
        _, (followed,), _ = run(model, optimizer, [rule], net(a=line(3, 3)))
        assert "is not known" in followed.reset["a.weight"]


def test_averages_of_torch_follow_and_other_sums_do_not_change_as_weights_do() -> None:
    model = nn.Sequential(line(3, 4), line(4, 4))
    optimizer = stepped(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model).state_dict()
    held, _, _ = run(model, optimizer, ["^0 => z"], ema=average)
    assert list(held["ema"]) == ["module.z.weight", "module.1.weight", "n_averaged"]
    fisher = model.state_dict()
    held, (_, told), warnings = run(model, optimizer, ["scale ^0 2"], fisher=fisher)
    assert told.kept
    assert any("the copy of the weights at 'fisher' is kept as it was" in warning for warning in warnings)
    assert_same_tensors(held["fisher"], fisher)
    held, (_, told), _ = run(model, optimizer, ["^0 => z"], fisher=fisher)
    assert list(held["fisher"]) == ["z.weight", "1.weight"]
    three = nn.Sequential(*(line(4, 4) for _ in range(3)))
    trained = [parameter.detach() for parameter in list(three.parameters())[1:]]
    _, (_, told), _ = run(three, stepped(three.parameters()), ["^0 => z"], shadow=trained)
    assert told.kept
    assert "may be" in told.left


def test_an_average_of_several_dtypes_goes_where_the_weights_go() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1).bfloat16(), nn.BatchNorm2d(3))
    average = {key: value.clone() for key, value in model.state_dict().items()}
    held, told, _ = run(model, torch.optim.SGD(model.parameters(), 0.1), ["fold_bn ^0 => 1"], average=average)
    assert next(one for one in told if one.kind == "copy").exact == ("0.weight", "0.bias")
    assert_same_tensors(held["average"], held["state_dict"])


def test_files_are_not_written_over_each_other_and_all_or_none(ckpt: Any) -> None:
    model = nn.Sequential(nn.Linear(30, 30))
    torch.save(model.state_dict(), "m.pth")
    torch.save(stepped(model.parameters()).state_dict(), "o.pt")
    raw = Path("m.pth").read_bytes()
    rename = ["remap", "m.pth", "-o", "x.pt", "--rule", "^0 => z", "--force"]
    for words in (["o.pt=x.pt"], ["o.pt=./x.pt"], ["o.pt=o.pt"], ["o.pt=m.pth"], ["o.pt=1.pt", "o.pt=2.pt"]):
        ran = ckpt(*rename, *(part for word in words for part in ("--optimizer", word)))
        assert (ran.code, ran.out) == (2, ""), words
        assert sorted(path.name for path in Path().iterdir()) == ["m.pth", "o.pt"]
        assert Path("m.pth").read_bytes() == raw
    Path("folder").mkdir()
    assert ckpt(*rename, "--optimizer", "o.pt=nowhere/o.pt").code == 2
    assert not Path("x.pt").exists()
    huge = {**model.state_dict(), "0.weight": torch.full((30, 30), 3e38)}
    torch.save(huge, "m.pth")
    scaled = ["remap", "m.pth", "-o", "x.pt", "--rule", "scale 0.weight 10", "--optimizer", "o.pt=oo.pt"]
    assert ckpt(*scaled).code == 2  # the weights come to more than float32 holds
    assert sorted(path.name for path in Path().iterdir()) == ["folder", "m.pth", "o.pt"]


def test_what_the_optimizer_of_another_file_loses_and_warns_of_is_said_with_its_name(ckpt: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    torch.save(model.state_dict(), "m.pth")
    state = stepped(model.parameters()).state_dict()
    torch.save(
        {"optimizer": state, "more": {"a": nn.ReLU}, "other": stepped(line(7, 7).parameters()).state_dict()}, "o.pt"
    )
    ran = ckpt("remap", "m.pth", "-o", "x.pt", "--rule", "^0 => z", "--optimizer", "o.pt=oo.pt")
    assert ran.code == 0
    assert "warning: o.pt: the optimizer state at 'other' is left out" in ran.err
    assert "not kept: oo.pt: more.a (torch.nn.modules.activation.ReLU" in ran.out


def test_the_object_around_the_state_dict_stays_though_all_beside_it_was_left_out() -> None:
    model = net(a=line(3, 4))
    held, (followed,), _ = run(model, stepped([nn.Parameter(torch.ones(7, 7))]), ["^a => z"])
    assert followed.left
    assert list(held) == ["state_dict"]


def test_equal_rates_that_are_tensors_are_equal() -> None:
    model = net(a=line(2, 2), b=line(2, 2))
    groups = [{"params": [pair], "lr": torch.tensor(0.1)} for pair in model.named_parameters()]
    optimizer = stepped(model.parameters(), lambda p: torch.optim.Adam(groups, capturable=False, foreach=False))
    target = nn.Module()
    target.c = nn.Parameter(torch.ones(4, 2))
    _, (followed,), _ = run(model, optimizer, [r"concat ^a\.weight$ ^b\.weight$ => c"], target)
    assert followed.exact == ("c",)


def test_a_name_that_is_there_twice_is_no_name() -> None:
    model = net(a=line(2, 2), b=line(2, 2))
    state = stepped(model.parameters()).state_dict()
    state["param_groups"][0]["param_names"] = ["a.weight", "a.weight"]
    torch.save({"state_dict": model.state_dict(), "optimizer": state}, "a.pth")
    (followed,) = cs.plan("a.pth", ["^a => z"], extras=True).followed
    assert followed.left == "a parameter is in it twice"


def test_the_state_of_what_is_kept_though_the_target_lacks_it_is_named() -> None:
    model = net(a=line(2, 2), b=line(2, 2))
    torch.save({"state_dict": model.state_dict(), "optimizer": stepped(model.parameters()).state_dict()}, "a.pth")
    plan = cs.plan("a.pth", to=net(a=line(2, 2)), unexpected="keep", extras=True)
    assert plan.followed[0].reset == {"b.weight": "it is kept, though it is no parameter of the Module"}
    assert "begins anew for 'b.weight'" in plan.warnings[-1]


def test_a_live_optimizer_takes_no_state_of_another_kind_model_or_file() -> None:
    model = net(a=line(3, 4))

    def report(state: Any) -> cs.LoadReport:
        torch.save({"state_dict": model.state_dict(), "optimizer": state}, "a.pth")
        return cs.load_into(model, "a.pth")

    with pytest.raises(cs.PlanError, match="no lists of parameters"):
        cs.load_optimizer(adam(model.parameters()), model, report({"state": {}, "param_groups": 5}))
    with pytest.raises(cs.UsageError, match="has no optimizer state"):
        cs.load_optimizer(adam(model.parameters()), model, report({}))
    adamax = report(stepped(model.parameters(), torch.optim.Adamax).state_dict())
    with pytest.raises(cs.UsageError, match="has no 'exp_avg_sq', which Adam as it is here needs"):
        cs.load_optimizer(adam(model.parameters()), model, adamax)
    plain = report(stepped(model.parameters()).state_dict())
    with pytest.raises(cs.UsageError, match="'max_exp_avg_sq'"):
        cs.load_optimizer(torch.optim.Adam(model.parameters(), amsgrad=True), model, plain)
    other = net(a=line(7, 7))
    with pytest.raises(cs.UsageError, match="not about this model"):
        cs.load_optimizer(adam(other.parameters()), other, plain)

"""Where the state dict is, found by structure."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch

import ckptsurgeon as cs


def state(prefix: str = "", layers: int = 3) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((f"{prefix}{i}.weight", torch.randn(2, 2)) for i in range(layers))


def optimizer() -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(3))
    made = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(3)
    made.step()
    return made.state_dict()


FOUND = {
    "the root": (state(), "."),
    "a usual name": ({"epoch": 1, "state_dict": state()}, "state_dict"),
    "an unusual name": ({"epoch": 1, "gewichte": state()}, "gewichte"),
    "any depth": ({"a": {"b": {"c": {"model": state()}}}}, "a.b.c.model"),
    "in a list": ([1, "x", state()], "2"),
    "beside an optimizer": ({"model": state(), "optimizer": optimizer()}, "model"),
    "an optimizer that is larger": ({"model": state(layers=1), "optim": {"main": optimizer()}}, "model"),
    "beside loose tensors": ({"weights_of_mine": state(), "best": torch.tensor(1.0)}, "weights_of_mine"),
    "beside random states": ({"model": state(), "rng": {"cpu": torch.get_rng_state()}}, "model"),
    "beside a small criterion": (
        {"state_dict": state(layers=30), "criterion": {"weight": torch.ones(2)}},
        "state_dict",
    ),
    "beside scores of its training": (
        {"state_dict": state(), "callbacks": {"best": {n: torch.tensor(0.5) for n in ("score", "now", "kth")}}},
        "state_dict",
    ),
    "beside modules that it was built from": (
        {"state_dict": state(), "hyper_parameters": {"net": torch.nn.Linear(2, 2), "act": torch.nn.ReLU()}},
        "state_dict",
    ),
    "beside modules without tensors": (
        {"gewichte": state(), "act": torch.nn.ReLU(), "loss": torch.nn.L1Loss()},
        "gewichte",
    ),
    "in a namespace": (Namespace(model=state(), lr=1), "model"),
    "a defaultdict": ({"model": defaultdict(list, state())}, "model"),
    "an empty state dict": ({}, "."),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_main_state_dict_is_found(case: str) -> None:
    obj, select = FOUND[case]
    torch.save(obj, "a.pth")
    ckpt = cs.open("a.pth")
    assert ckpt.origin.selected == select
    assert all(key.endswith("weight") for key in ckpt)


AMBIGUOUS = {
    "a GAN": ({"netG": state(), "netD": state(), "step": 3}, ["netG", "netD"]),
    "EMA beside the model": ({"model": state(), "ema": state(), "epoch": 1}, ["model", "ema"]),
    "EMA beside the state dict": ({"state_dict": state(), "state_dict_ema": state()}, ["state_dict", "state_dict_ema"]),
    "models of one number each": (
        {"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1), "b": torch.ones(1)}},
        ["model", "ema"],
    ),
    "a model among settings alone": (
        {"hyper_parameters": {"net": torch.nn.Linear(2, 2), "teacher": torch.nn.Linear(2, 2)}},
        ["hyper_parameters.net", "hyper_parameters.teacher"],
    ),
    "in a list": ([state(), state()], ["0", "1"]),
    "a backbone and its head": ({"backbone": state(layers=40), "head": state(layers=1)}, ["backbone", "head"]),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_several_state_dicts_are_listed_and_one_is_to_be_chosen(case: str, ckpt: Any) -> None:
    obj, paths = AMBIGUOUS[case]
    torch.save(obj, "a.pth")
    ran = ckpt("ls", "a.pth")
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()[1 : 1 + len(paths)]] == paths
    assert [found["select"] for found in ckpt("ls", "a.pth", "--json").json["candidates"]] == paths
    for command in (["diff", "a.pth", "a.pth"], ["convert", "a.pth", "b.pth"], ["remap", "a.pth", "-o", "b.pth"]):
        ran = ckpt(*command)
        assert (ran.code, ran.out) == (2, "")
        assert (
            f"{len(paths)} state dicts could be meant: {', '.join(paths)}; choose one with --select {paths[0]}"
            in ran.err
        )
    for path in paths:
        assert cs.open("a.pth", select=path).origin.selected == path
        assert ckpt("ls", "a.pth", "--select", path).out.startswith("key")


def test_a_module_without_tensors_hides_no_list_of_tensors() -> None:
    torch.save({"act": torch.nn.ReLU(), "weights": [torch.ones(2), torch.ones(3)]}, "a.pth")
    assert cs.open("a.pth").origin.selected == "weights"
    torch.save(torch.nn.ReLU(), "b.pth")
    assert (cs.open("b.pth").origin.selected, len(cs.open("b.pth"))) == (".", 0)


def test_a_selection_is_made_on_both_sides_of_a_diff(ckpt: Any) -> None:
    torch.save({"netG": state(), "netD": state(layers=2)}, "a.pth")
    assert ckpt("diff", "a.pth", "a.pth", "--select", "netD").code == 0
    torch.save(state(layers=2), "b.pth")
    assert ckpt("diff", "a.pth", "b.pth", "--select", "netD").code == 0
    assert ckpt("diff", "a.pth", "b.pth", "--select", "netG").code == 1


def test_everything_at_once_is_the_root() -> None:
    torch.save({"netG": state(), "netD": state(), "step": 3, "optimizer": optimizer()}, "a.pth")
    ckpt = cs.open("a.pth", select=".")
    assert list(ckpt) == [f"{net}.{i}.weight" for net in ("netG", "netD") for i in range(3)]
    assert set(ckpt.extras) == {"step", "optimizer"}


def test_all_of_them_means_all_of_them() -> None:
    """Shared dicts are taken twice, tensors beside dicts too; two of one dotted name are an error."""
    shared = {"w": torch.ones(2)}
    torch.save({"m": {"x": shared, "y": shared}, "n": state()}, "a.pth")
    assert list(cs.open("a.pth", select="."))[:2] == ["m.x.w", "m.y.w"]
    torch.save({"a": {"b": torch.ones(1)}, "c": torch.ones(1), "d": torch.ones(1)}, "b.pth")
    assert list(cs.open("b.pth", select=".")) == ["a.b", "c", "d"]
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1), "c": state()}, "c.pth")
    with pytest.raises(cs.InputError, match=r"^c\.pth: two tensors have the dotted name 'a\.b'"):
        cs.open("c.pth", select=".")


def test_ema_inside_of_a_state_dict_is_a_candidate_too() -> None:
    torch.save({**state(), "ema": state()}, "a.pth")
    assert [found.name for found in cs.inspect("a.pth").candidates] == [".", "ema"]


def test_what_is_not_chosen_stays_in_the_extras() -> None:
    torch.save({"netG": state(), "netD": state(), "step": 3}, "a.pth")
    ckpt = cs.open("a.pth", select="netD")
    assert list(ckpt.extras) == ["netG", "step"]
    assert list(ckpt.extras["netG"]) == ["0.weight", "1.weight", "2.weight"]


def test_select_reaches_what_is_no_candidate() -> None:
    torch.save({"model": state(), "optimizer": optimizer()}, "a.pth")
    assert list(cs.open("a.pth", select="optimizer.state.0")) == ["step", "exp_avg", "exp_avg_sq"]


def test_keys_with_dots_can_be_selected() -> None:
    torch.save({"v1.0": {"ema.model": state(), "model": state()}}, "a.pth")
    assert cs.open("a.pth", select="v1.0.ema.model").origin.select == ("v1.0", "ema.model")


def test_a_selection_that_is_not_there_names_those_that_are(ckpt: Any) -> None:
    torch.save({"netG": state(), "netD": state()}, "a.pth")
    for select in ("netX", "netG.0", "", "..", "netG.0.weight.x"):
        ran = ckpt("ls", "a.pth", "--select", select)
        assert ran.code == 2
        assert "names nothing with tensors in it; state dicts: netG, netD" in ran.err


def test_shared_and_cyclic_objects_are_walked_once() -> None:
    inner: list[Any] = []
    for _ in range(60):
        inner = [inner, inner]
    cycle: dict[str, Any] = {"deep": inner, "model": state()}
    cycle["again"] = cycle
    torch.save(cycle, "a.pth")
    assert cs.open("a.pth").origin.selected == "model"


def test_select_may_be_about_the_other_file_alone(ckpt: Any) -> None:
    """Where that has several state dicts and the first has one."""
    torch.save({"netG": {"w": torch.ones(2)}, "netD": {"w": torch.zeros(2)}}, "gan.pth")
    assert ckpt("convert", "gan.pth", "g.safetensors", "--select", "netG").code == 0
    assert ckpt("verify", "g.safetensors", "--against", "gan.pth", "--select", "netG").code == 0
    assert ckpt("diff", "g.safetensors", "gan.pth", "--select", "netD", "--values").code == 1
    assert ckpt("remap", "g.safetensors", "--to", "gan.pth", "--select", "netG", "-o", "b.pth").code == 0
    assert "--select none names nothing" in ckpt("diff", "g.safetensors", "gan.pth", "--select", "none").err

"""The built-in recipe `unwrap`, on names that wrappers themselves make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pairs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ckptsurgeon as cs


class Layered(nn.Module):
    """Names that look like wrappers and are none."""

    def __init__(self) -> None:
        super().__init__()
        self.modulex = nn.Linear(2, 2)
        self.my_module = nn.Linear(2, 2)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})
        self.encoder = nn.ModuleDict({"module_list": nn.Linear(2, 2), "module": nn.Linear(2, 2)})


def fabric(model: nn.Module) -> nn.Module:
    from lightning_fabric.wrappers import _FabricModule

    class Strategy:
        pass

    return _FabricModule(model, Strategy())  # type: ignore[arg-type]


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Layered], nn.Module]:
    def change(model: Any) -> nn.Module:
        model.model["layers"][0] = wrap(model.model["layers"][0])
        model.encoder["module_list"] = wrap(model.encoder["module_list"])
        return model

    return change


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(model)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda m: torch.compile(nn.DataParallel(m)),
        lambda m: nn.DataParallel(torch.compile(m)),
        lambda m: nn.DataParallel(torch.compile(nn.DataParallel(torch.compile(m)))),
        torch.optim.swa_utils.AveragedModel,
        lambda m: torch.optim.swa_utils.AveragedModel(torch.compile(m)),
        fabric,
        lambda m: fabric(nn.DataParallel(m)),
        inside(torch.compile),
        inside(checkpointed),
        lambda m: nn.DataParallel(inside(lambda part: checkpointed(torch.compile(part)))(m)),
    ],
    ids=["DataParallel", "compile", "compile DataParallel", "DataParallel compile", "four", "AveragedModel",
         "AveragedModel compile", "Fabric", "Fabric DataParallel", "compile inside", "checkpoint inside", "both"],
)  # fmt: skip
def test_unwrap_gives_the_names_of_the_model_itself(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Also of wrappers that take their own name out of a state dict: of the names that parameters have in them."""
    want = Layered().state_dict()
    model = wrap(Layered())
    found = {"state": model.state_dict(), "named": dict(model.named_parameters())}
    wrapped = {name: state for name, state in found.items() if state.keys() != want.keys()}
    assert wrapped
    for name, state in wrapped.items():
        torch.save({key: value.detach() for key, value in state.items()}, f"{name}.pth")
        made = cs.plan(f"{name}.pth", pairs.recipe("unwrap", f"{name}.pth", {})).check().result
        assert list(made) == list(want)


WRAPPERS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"]


@given(
    leading=st.lists(st.sampled_from([*WRAPPERS, "module"]), max_size=5),
    within=st.lists(st.sampled_from(WRAPPERS), max_size=3),
    depth=st.integers(1, 3),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_unwrap_takes_wrappers_off_in_any_order(leading: list[str], within: list[str], depth: int) -> None:
    names = [key.split(".") for key in Layered().state_dict()]
    keys = [
        ".".join([*leading, *name[:depth], *(within if len(name) > depth else []), *name[depth:]]) for name in names
    ]
    torch.save(dict.fromkeys(keys, torch.zeros(1)), "source.pth")
    if leading or within:
        made = cs.plan("source.pth", pairs.recipe("unwrap", "source.pth", {})).check().result
        assert list(made) == list(Layered().state_dict())


def test_the_names_of_wrappers_are_those_of_torch() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_WRAPPED_MODULE
    from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE

    assert {FSDP_WRAPPED_MODULE, _CHECKPOINT_WRAPPED_MODULE} < set(WRAPPERS)


def test_unwrap_leaves_a_module_inside_and_a_model_before() -> None:
    keys = ["model.embed.weight", "lm_head.weight", "encoder.module.weight", "module_list.0.weight"]
    torch.save({f"_orig_mod.{key}": torch.zeros(1) for key in keys}, "source.pth")
    assert list(cs.plan("source.pth", pairs.recipe("unwrap", "source.pth", {})).check().result) == keys

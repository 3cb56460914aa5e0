"""Every built-in recipe, proven: the model of one library, with weights at random, and the model of the other one that
loads the converted state dict strictly, give the same outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from helpers import assert_same_tensor, assert_same_tensors
from pairs import PAIRS, WAYS, Way, error, outputs, read, told
from safetensors.torch import load_file
from torch import Tensor, nn

import ckptsurgeon as cs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated:FutureWarning"),
]
ALONE = {"unwrap"}
"""Recipes between no two models."""
RECIPES = sorted(path.stem for path in pairs.FOLDER.glob("*.yaml"))
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.id)


def saved(model: nn.Module, path: str) -> dict[str, Tensor]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(state, path)
    return state


def converted(way: Way, model: nn.Module | None = None, source: str = "source.pth") -> dict[str, Tensor]:
    """What the recipe makes of a file; constants that no rule can make are made by `model`."""
    recipe = pairs.recipe(way.recipe, source, way.pair.variables)
    constants = [key for key in model.state_dict() if re.search(way.pair.constants, key)] if model else []
    how: dict[str, Any] = {"to": model, "missing": "init"} if constants else {}
    plan = cs.plan(source, recipe, **how).check()
    assert plan.initialised == tuple(constants) or set(plan.initialised) == set(constants)
    cs.remap(source, "made.safetensors", recipe, force=True, **how)
    return load_file("made.safetensors")


def test_every_recipe_has_a_proof() -> None:
    """A file in the folder of which no test here says that it is right is a failure."""
    assert RECIPES == sorted({way.recipe for way in WAYS} | ALONE)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_for(name: str) -> None:
    data = read(name)
    assert data["version"] == 1
    assert data["description"]
    known = {"version", "description", "expects", "yields", "variables", "rules"}
    assert set(data) <= known
    for entry in data["rules"]:
        assert isinstance(entry, str) or set(entry) <= {"rule", "note", "optional"}


@ways
def test_the_other_library_computes_the_same(way: Way) -> None:
    """It loads strictly what the recipe makes, and its outputs, other before, are then those of the source."""
    inputs = way.pair.inputs()
    source, target = told(way.source.make(), 1), told(way.target.make(), 2)
    saved(source, "source.pth")
    made = converted(way, target)
    want = outputs(way.source, source, inputs)
    assert error(outputs(way.target, target, inputs), want) > 0.1
    target.load_state_dict(made, strict=True)
    assert error(outputs(way.target, target, inputs), want) < 1e-5
    for key, value in made.items():  # so that one in the wrong place, or in the wrong order, would have been seen
        if value.is_floating_point() and not re.search(way.pair.silent, key):
            turned = value.flatten().flip(0).reshape(value.shape) if value.numel() > 1 else 1.5 * value
            target.load_state_dict({key: turned}, strict=False)
            assert error(outputs(way.target, target, inputs), want) > 1e-4, key
            target.load_state_dict({key: value}, strict=False)


@ways
def test_there_and_back_is_where_it_began(way: Way) -> None:
    """Bit for bit, but for constants that the other library keeps elsewhere."""
    state = saved(told(way.source.make(), 1), "source.pth")
    recipe = pairs.recipe(way.recipe, "source.pth", way.pair.variables)
    cs.remap("source.pth", "there.pth", recipe)
    cs.remap("there.pth", "back.safetensors", pairs.recipe(way.opposite, "there.pth", way.pair.variables))
    want = {key: value for key, value in state.items() if not re.search(way.pair.constants, key)}
    assert_same_tensors(load_file("back.safetensors"), want, ordered=False)

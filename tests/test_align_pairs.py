"""Real pairs of libraries, both ways: every tensor lands where the proven conversion puts it, bit for bit, or it is
asked; and the conversions are proven by equal forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import align_pairs_more
import align_pairs_text
import align_pairs_vision
import pytest
import torch
from align_pairs import Case, Write, case, prefixed, shuffled, sorted_keys, state, told
from pairs import WAYS, Way, recipe
from pairs import told as filled
from torch import Tensor

import ckptsurgeon as cs

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = {pair.name: pair for pair in (*align_pairs_text.PAIRS, *align_pairs_vision.PAIRS, *align_pairs_more.PAIRS)}
ORDERS: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {"sorted": sorted_keys, "shuffled": shuffled}
HEADS, GROUPED = "the number of heads is not known", "group by group in others"
MUST_ASK: Mapping[tuple[str, str], str] = {
    ("llama: Meta", "there"): HEADS,  # the target is a skeleton, which has no config
    ("llama: gpt-fast", "there"): GROUPED,
    ("llama: gpt-fast", "back"): GROUPED,
    ("gpt-neox: apart", "there"): HEADS,
    ("bloom: apart", "there"): HEADS,
    ("falcon: apart", "there"): GROUPED,
    ("falcon: apart", "back"): GROUPED,
    ("megatron-bert: Megatron-LM", "there"): HEADS,
    ("vit: flax", "there"): "is not used, and may hold it",  # heads are a dimension of their own
    ("vit: flax", "back"): "is not used, and may hold it",
    ("frozen resnet: caffe2", "there"): "names do not tell",  # branch1, branch2c
    ("frozen resnet: caffe2", "back"): "names do not tell",
    ("fpn: mmdetection", "there"): "names do not tell",  # an extra level of the same shape
    ("fpn: mmdetection", "back"): "names do not tell",
    ("clip: OpenAI, square projections", "there"): "is square",  # a bare matrix, and no other that is not square
    ("clip: OpenAI, square projections", "back"): "is square",
    ("glm: ChatGLM", "there"): "dense_h_to_4h",  # gate and up under a plain name; grouped queries
    ("glm: ChatGLM", "back"): GROUPED,
    ("llama: InternLM2", "there"): GROUPED,
    ("llama: InternLM2", "back"): GROUPED,
    ("sam: facebook", "there"): "names do not tell",  # layers.0, .1, .2 are proj_in, layers.0, proj_out
    ("sam: facebook", "back"): "names do not tell",
}
"""What names, shapes and conventions do not tell, and why."""


def answer(made: Case, folder: Path) -> str:
    """`solved`, or all that is asked; AssertionError where a tensor is in the wrong place."""
    torch.save(made.source, folder / "source.pth")
    found = cs.align(folder / "source.pth", made.target)
    refused = found.refusals(fit=True)
    if refused:
        return "\n".join(map(str, refused))
    plan = found.plan(fit=True)
    assert plan.ok, plan.problems
    loaded = plan.loaded()
    for key, right in made.truth.items():
        assert key in loaded, f"{key} would begin anew"
        assert torch.equal(plan.result[key].read(), right), f"{key} is another tensor"
    return "solved"


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_tensor_lands_where_it_belongs(name: str, way: str, tmp_path: Path) -> None:
    expected = MUST_ASK.get((name, way), "solved")
    assert expected in answer(case(PAIRS[name], way), tmp_path)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PAIRS)
def test_names_tell_the_same_in_any_order_of_keys(name: str, order: str, tmp_path: Path) -> None:
    expected = MUST_ASK.get((name, "back"), "solved")
    assert expected in answer(case(PAIRS[name], "back", [ORDERS[order]]), tmp_path)


PROVEN = [name for name, pair in PAIRS.items() if pair.other is not None and pair.inputs is not None]


@pytest.mark.parametrize("name", PROVEN)
@torch.no_grad()
def test_the_conversions_are_proven(name: str) -> None:
    """Both models compute the same, in double precision."""
    pair = PAIRS[name]
    assert pair.other is not None
    assert pair.inputs is not None
    ours, other = told(pair.make(), 1).double().eval(), told(pair.other(), 2).double().eval()
    written = {
        key: value.double() if value.is_floating_point() else value for key, value in pair.write(state(ours)).items()
    }
    missing = other.load_state_dict(written, strict=False)
    assert not missing.unexpected_keys
    inputs = [x.double() if x.is_floating_point() else x for x in pair.inputs()]
    a, b = (run(model, *inputs) for run, model in zip(pair.runs, (ours, other), strict=True))
    assert a.std() > 1e-6
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


STORED: Mapping[str, Write] = {
    "Lightning": prefixed("model.net."),
    "compiled and data parallel": prefixed("_orig_mod.module."),
}
SOME = ("beit: timm", "whisper: OpenAI", "detr: facebook", "qwen3-moe: listed", "segformer: nvlabs", "unet: CompVis")


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", SOME)
def test_prefixes_of_training_code_change_nothing(name: str, stored: str, tmp_path: Path) -> None:
    assert answer(case(PAIRS[name], "back", [STORED[stored]]), tmp_path) == "solved"


RECIPES = [way for way in WAYS if way.pair.name not in ("mha alone", "vocoder")]


@pytest.mark.parametrize("way", RECIPES, ids=lambda way: way.id)
def test_what_the_built_in_recipes_do_is_found(way: Way, tmp_path: Path) -> None:
    path = tmp_path / "source.pth"
    torch.save(filled(way.source.make(), 1).state_dict(), path)
    found = cs.align(path, filled(way.target.make(), 2))
    assert found.refusals(fit=True) == ()
    plan, right = found.plan(fit=True), cs.plan(path, recipe(way.recipe, path, way.pair.variables)).result
    both = [key for key in plan.loaded() if key in right]
    assert len(both) > 8
    assert [key for key in both if not torch.equal(plan.result[key].read(), right[key].read())] == []

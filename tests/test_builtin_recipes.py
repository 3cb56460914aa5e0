"""Every built-in recipe, proven: the model of one library, with weights at random, and the model of the other one that
loads the converted state dict strictly, give the same outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pairs
import pytest
import small_models
import torch
from helpers import assert_same_tensor, assert_same_tensors
from pairs import PAIRS, WAYS, Way, error, outputs, read, told
from safetensors.torch import load_file
from torch import Tensor, nn

import ckptsurgeon as cs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated:FutureWarning"),
]
ALONE = {"unwrap", "peft-lora", "kohya-lora"}
"""Recipes between no two models: test_unwrap.py is about it."""
RECIPES = sorted(path.stem for path in pairs.FOLDER.glob("*.yaml"))
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.id)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are so small that threads wait for each other longer than they compute."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


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
    assert sorted({way.recipe for way in WAYS} | ALONE) == RECIPES


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
    assert error(outputs(way.target, target, inputs), want) < 1e-6
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


# -- which checkpoints a recipe takes ----------------------------------------------------------


def fits(state: Mapping[str, Tensor], keys: Mapping[str, list[int] | None]) -> bool:
    """Whether keys are there, of these shapes."""
    return all(
        key in state
        and (shape is None or [n if n == -1 else m for n, m in zip(shape, state[key].shape, strict=True)] == shape)
        for key, shape in keys.items()
    )


@ways
def test_keys_say_which_layout_it_is(way: Way) -> None:
    """What a recipe expects is in the source, what it yields in the result and not in the source."""
    data = read(way.recipe)
    state = saved(way.source.make(), "source.pth")
    assert fits(state, data.get("expects", {}))
    made = cs.plan("source.pth", pairs.recipe(way.recipe, "source.pth", way.pair.variables)).check().result
    if "yields" in data:
        assert fits({key: made[key] for key in made}, data["yields"])  # type: ignore[misc]
        assert not fits(state, data["yields"])


@ways
def test_a_recipe_is_not_applied_twice(way: Way) -> None:
    """Also where the file does not say how it was made."""
    saved(told(way.source.make(), 1), "source.pth")
    torch.save(converted(way, way.target.make()), "made.pth")
    assert cs.plan("made.pth", pairs.recipe(way.recipe, "made.pth", way.pair.variables)).problems


def test_a_recipe_refuses_another_model() -> None:
    """By what it expects or yields, where that has names; else by a rule that finds nothing."""
    sides = {side.layout: side for pair in PAIRS for side in (pair.left, pair.right)}
    for layout, side in sides.items():
        saved(side.make(), f"{layout}.pth")
    opened = {layout: cs.open(f"{layout}.pth") for layout in sides}
    for way in {way.recipe: way for way in WAYS}.values():
        recipe = pairs.recipe(way.recipe, "", way.pair.variables)
        for layout in set(sides) - {way.source.layout}:
            if way.recipe.startswith("mha-"):  # attention is a part of many models
                continue
            problems = cs.plan(opened[layout], recipe).problems
            assert problems, f"{way.recipe} takes {layout}"
            near = (way.source.layout, layout) == ("timm-vit", "timm-deit")
            expected = str(problems[0].rule).startswith("expect ") or problems[0].kind == "applied"
            assert expected or near or "expects" not in read(way.recipe), (way.recipe, layout)


@pytest.mark.parametrize(
    ("recipe", "make", "words"),
    [
        (
            "torchvision-vit-to-timm",
            lambda: pairs.vision_transformer.VisionTransformer(32, 8, 1, 4, 48, 96, representation_size=8),
            "two tensors would be named 'head.weight'",
        ),
        ("timm-vit-to-torchvision", pairs.TIMM_DEIT.make, "two tensors would be named 'heads.head.weight'"),
        ("timm-vit-to-transformers", pairs.TIMM_DEIT.make, "two tensors would be named 'classifier.weight'"),
        (
            "timm-vit-to-transformers",
            lambda: pairs.timm_vit("vit_tiny_patch16_224", global_pool="avg"),
            "the checkpoint has no such key",
        ),
        ("nanogpt-to-transformers", pairs.hf_gpt2, "the checkpoint has no such key"),
        (
            "mha-separate-to-joined",
            lambda: nn.ModuleDict({f"{name}_proj": nn.Linear(4, 4, bias=name != "k") for name in "qkv"}),
            "gives nothing",
        ),
        ("mha-separate-to-joined", lambda: pairs.SeparateAttention(8, 2, 6), "cannot be joined"),
        ("unwrap", lambda: nn.Sequential(nn.Linear(2, 2)), "no key"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_the_other_library_is_refused(recipe: str, make: Any, words: str) -> None:
    saved(make(), "source.pth")
    problems = cs.plan("source.pth", pairs.recipe(recipe, "source.pth", {})).problems
    assert any(words in str(problem) for problem in problems), problems


@pytest.mark.parametrize("recipe", ["timm-swin-to-transformers", "timm-swin-to-torchvision"])
def test_timm_before_0_9_had_the_merging_a_stage_earlier_and_is_refused(recipe: str) -> None:
    state = pairs.timm_swin().state_dict()
    old = {re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", key): v for key, v in state.items()}
    torch.save(old, "source.pth")
    problems = cs.plan("source.pth", pairs.recipe(recipe, "source.pth", {})).problems
    assert "makes -1 of 'layers.0.downsample" in str(problems[0])


# -- files as they are found -------------------------------------------------------------------

V4_NAMES = ("transformers-vit", "transformers-deit", "transformers-swin")
WRITTEN = [
    way
    for way in WAYS
    if way.source.layout in (*V4_NAMES, "transformers-gpt2", "transformers-clip", "transformers-llama")
]


@pytest.mark.parametrize("way", WRITTEN, ids=lambda way: way.id)
def test_a_file_that_transformers_wrote_gives_the_same(way: Way) -> None:
    """`save_pretrained` writes the names of transformers 4, and no tied head; the published files have them too."""
    model: Any = told(way.source.make(), 1)
    saved(model, "source.pth")
    model.save_pretrained("written")
    if way.source.layout in V4_NAMES:
        assert set(load_file("written/model.safetensors")) != set(model.state_dict())
    want = converted(way, way.target.make())
    assert_same_tensors(converted(way, way.target.make(), "written/model.safetensors"), want, ordered=False)


def test_transformers_writes_the_experts_of_mixtral_apart() -> None:
    model: Any = told(pairs.hf_mixtral(), 1)
    model.save_pretrained("written")
    way = next(way for way in WAYS if way.recipe == "mixtral-separate-to-stacked")
    assert_same_tensors(converted(way, source="written/model.safetensors"), model.state_dict(), ordered=False)


LOADED = [way for way in WAYS if way.target.run in (pairs.logits, pairs.taught, pairs.hf_scores)]
LOADED = [way for way in LOADED if way.target.layout != "mixtral-separate"]


@pytest.mark.parametrize("way", LOADED, ids=lambda way: way.id)
def test_transformers_loads_the_folder(way: Way) -> None:
    """`from_pretrained` finds every tensor under the names that the recipe makes, and nothing else."""
    saved(told(way.source.make(), 1), "source.pth")
    target: Any = told(way.target.make(), 2)
    want = converted(way, target)
    target.config.save_pretrained("folder")
    Path("made.safetensors").rename("folder/model.safetensors")
    model, found = type(target).from_pretrained("folder", output_loading_info=True)
    assert not any(found[word] for word in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in model.state_dict().items():
        assert_same_tensor(value, want[key], key)


def gpt2_of_the_hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return masks | {key.removeprefix("transformer."): v for key, v in state.items() if key != "lm_head.weight"}


def with_more(**more: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {key.replace("__", "."): value for key, value in more.items()}


def renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for pattern, template in pairs:
            state = {re.sub(pattern, template, key): value for key, value in state.items()}
        return state

    return change


def convolved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v[..., None, None] if re.search(r"mlp\.fc\d\.weight$", k) else v for k, v in state.items()}


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        ("timm-convnext-to-torchvision", convolved),
        ("timm-convnext-to-transformers", convolved),
        ("torchvision-vit-to-timm", renamed((r"mlp\.0\.", "mlp.linear_1."), (r"mlp\.3\.", "mlp.linear_2."))),
        ("nanogpt-to-transformers", with_more(transformer__h__0__attn__bias=torch.ones(1, 1, 16, 16).tril())),
        ("transformers-gpt2-to-nanogpt", gpt2_of_the_hub),
        ("meta-llama-to-transformers", with_more(rope__freqs=torch.rand(4))),
        ("transformers-llama-to-meta", with_more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.rand(4))),
        ("openai-clip-to-transformers", with_more(input_resolution=torch.tensor(32), context_length=torch.tensor(10))),
        ("transformers-clip-to-openai", with_more(text_model__embeddings__position_ids=torch.arange(10)[None])),
        ("timm-swin-to-transformers", with_more(layers__0__blocks__1__attn_mask=torch.rand(4, 16, 16))),
        (
            "transformers-swin-to-timm",
            with_more(swin__encoder__layers__0__blocks__0__attention__self__relative_position_index=torch.ones(16, 16)),
        ),
    ],
)
def test_older_files_give_the_same(recipe: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """What other versions of a library kept or named otherwise makes no difference."""
    way = next(way for way in WAYS if way.recipe == recipe)
    state = saved(told(way.source.make(), 1), "source.pth")
    want = converted(way, way.target.make())
    torch.save(change(state), "older.pth")
    assert_same_tensors(converted(way, way.target.make(), "older.pth"), want, ordered=False)


def test_attention_to_tokens_of_another_width_has_its_projections_apart_already() -> None:
    """torch keeps q_proj_weight, k_proj_weight and v_proj_weight there, and the biases joined."""
    joined = told(nn.MultiheadAttention(24, 4, kdim=10, vdim=10, batch_first=True), 1)
    saved(joined, "source.pth")
    cs.remap("source.pth", "made.safetensors", pairs.recipe("mha-joined-to-separate", "source.pth", {}))
    separate = small_models.SeparateAttention(24, 4, 10)
    separate.load_state_dict(load_file("made.safetensors"), strict=True)
    inputs = torch.randn(2, 7, 24), torch.randn(2, 5, 10), torch.randn(2, 5, 10)
    torch.testing.assert_close(separate(*inputs)[0], joined(*inputs)[0])


def test_timm_and_transformers_are_one_step_or_two_from_torchvision() -> None:
    """By way of timm or straight, Swin comes to the same tensors."""
    saved(told(pairs.tv_swin(), 1), "source.pth")
    for name, source, output in (
        ("torchvision-swin-to-timm", "source.pth", "timm.pth"),
        ("timm-swin-to-transformers", "timm.pth", "two.safetensors"),
        ("torchvision-swin-to-transformers", "source.pth", "one.safetensors"),
    ):
        cs.remap(source, output, pairs.recipe(name, source, {}))
    assert_same_tensors(load_file("two.safetensors"), load_file("one.safetensors"), ordered=False)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_config_of_a_model_says_how_many_heads_it_has(kv_heads: int) -> None:
    """transformers' config.json beside its weights; Meta's params.json, which may leave out the heads of the keys."""
    saved(told(pairs.hf_llama(kv_heads), 1), "source.pth")
    pairs.hf_llama(kv_heads).config.save_pretrained(".")
    Path("params.json").write_text('{"n_heads": 4, "n_kv_heads": 2}' if kv_heads == 2 else '{"n_heads": 4}')
    cs.remap("source.pth", "meta.pth", cs.Recipe.load("builtin:transformers-llama-to-meta", config="config.json"))
    given = cs.Recipe.load("builtin:transformers-llama-to-meta", variables={"heads": 4, "kv_heads": kv_heads})
    cs.remap("source.pth", "given.pth", given)
    assert_same_tensors(torch.load("meta.pth"), torch.load("given.pth"))
    cs.remap("meta.pth", "back.pth", cs.Recipe.load("builtin:meta-llama-to-transformers", config="params.json"))
    assert_same_tensors(torch.load("back.pth"), torch.load("source.pth"), ordered=False)

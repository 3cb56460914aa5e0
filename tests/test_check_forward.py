"""Both models are run on the same inputs: what they give tells whether a surgery keeps what the network computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forward_models as models
import pytest
import torch
from helpers import assert_same_tensors
from torch import Tensor, nn

import ckptsurgeon as cs
from ckptsurgeon.forward import described


def planned(source: nn.Module, target: nn.Module | str, rules: Any = None, **how: Any) -> cs.Plan:
    """A plan for the checkpoint of a model."""
    torch.save(source.state_dict(), "source.pth")
    return cs.plan("source.pth", rules, target, **how)


def checked(source: nn.Module, target: nn.Module, rules: Any = None, inputs: Any = None) -> Any:
    return cs.check_forward(source, target, planned(source, target, rules), inputs)


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], float]] = {
    "torchvision-resnet-to-transformers": (models.resnet, models.hf_resnet, 1e-6),
    "timm-vit-to-transformers": (models.timm_vit, models.hf_vit, 1e-5),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_right_recipe_between_libraries_gives_the_same_outputs(name: str) -> None:
    source, target, most = PAIRS[name]
    model, other = source(), target()
    found = checked(model, other, builtin(name))
    assert found.same
    assert found.error < most
    assert list(found.errors) == ["output"]
    assert [(one.source, one.target) for one in found.outputs] == [("output", "logits")]
    assert found.not_loaded == {"source": (), "target": ()}
    assert str(found).startswith("the same outputs\n  output and logits [2, ")


def builtin(name: str) -> cs.Recipe:
    return cs.Recipe.load(f"builtin:{name}")


def test_two_norms_that_were_exchanged_are_told() -> None:
    """All shapes fit, and the plan is fine."""
    model, target = models.timm_vit(), models.hf_vit()
    found = checked(
        model, target, [r"\.norm1\. => .aside.", r"\.norm2\. => .norm1.", r"\.aside\. => .norm2.", *lines()]
    )
    assert not found.same
    assert found.error > 0.01
    assert found.dtype == "float64"
    assert found.reason == f"the relative error is {found.error:.2g}, over the tolerance of 0.0001"
    assert str(found).startswith("not the same: the relative error is ")


def lines() -> tuple[cs.Rule, ...]:
    return builtin("timm-vit-to-transformers").rules


def test_a_square_matrix_that_should_have_been_transposed_is_told() -> None:
    source, target = models.Kernels(1), models.Kernels(1, turned=False)
    straight = checked(source, target, ["kernel$ => weight"])
    turned = checked(source, target, ["transpose kernel$", "kernel$ => weight"])
    assert not straight.same
    assert straight.error > 0.1
    assert turned.same
    assert turned.error < 1e-6
    assert turned.inputs == "random 2x6, from the Module of the Kernels"


# -- inputs ------------------------------------------------------------------------------------


def _hf(name: str, **sizes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}Model")(config)


_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99}
_VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_BOTH = {"text_config": _TEXT, "vision_config": {**_VISION, "image_size": 32, "patch_size": 16}, "projection_dim": 8}


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return models.filled(torchvision.models.get_model(name, weights=None))


def _timm(name: str, **how: Any) -> nn.Module:
    import timm

    return models.filled(timm.create_model(name, **how))


class Two(nn.Module):
    """A forward that wants two things."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) - self.layer(y)


class Words(nn.Module):
    """Places for no more than 4 words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 4), nn.Embedding(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.cell(x)


class Exact(nn.Module):
    """A network that takes images of 28 pixels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2 * 26 * 26, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


class Told(nn.Module):
    """As Lightning has it."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array, self.layer = torch.ones(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


MADE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torchvision, small": (lambda: _torchvision("squeezenet1_1"), "2x3x64x64, from the Conv2d of the SqueezeNet"),
    "torchvision, of one size": (
        lambda: _torchvision("vit_b_32"),
        "2x3x224x224, from the image size of the VisionTransformer",
    ),
    "torchvision, video": (lambda: _torchvision("r3d_18"), "2x3x16x16x16, from the Conv3d of the VideoResNet"),
    "timm": (lambda: _timm("resnet10t"), "2x3x176x176, from the input size of the ResNet"),
    "timm, other channels and size": (
        lambda: _timm("vit_tiny_patch16_224", depth=1, img_size=(32, 48), in_chans=1),
        "2x1x32x48, from the image size of the VisionTransformer",
    ),
    "transformers, text": (
        lambda: _hf("Bert", **_TEXT),
        "2x16 of whole numbers below 99, from the config of the BertModel",
    ),
    "transformers, text of few places": (
        lambda: _hf("Bert", **_TEXT, max_position_embeddings=8),
        "2x8 of whole numbers below 99, from the config of the BertModel",
    ),
    "transformers, text to text": (
        lambda: _hf("T5", d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=50),
        "2x16 of whole numbers below 50, 2x16 of whole numbers below 50, from the config of the T5Model",
    ),
    "transformers, vision": (
        lambda: _hf("ViT", **_VISION, image_size=32, num_channels=1),
        "2x1x32x32, from the config of the ViTModel",
    ),
    "transformers, vision of any size": (
        lambda: _hf("ResNet", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
        "2x3x64x64, from the config of the ResNetModel",
    ),
    "transformers, text and vision": (
        lambda: _hf("CLIP", **_BOTH),
        "2x16 of whole numbers below 99, 2x3x32x32, from the config of the CLIPModel",
    ),
    "transformers, sound": (
        lambda: _hf("Whisper", d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                    decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=20,
                    num_mel_bins=10, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                    decoder_start_token_id=1),
        "2x10x40, 2x16 of whole numbers below 60, from the config of the WhisperModel",
    ),
    "own, linear": (models.plain, "2x4, from the Linear of the Does"),
    "own, two inputs": (Two, "2x3, 2x3, from the Linear of the Two"),
    "own, words": (Words, "2x4 of whole numbers below 11, from the Embedding of the Words"),
    "own, recurrent": (Recurrent, "2x8x3, from the LSTM of the Recurrent"),
    "own, images of one size": (Exact, "2x1x28x28, from the Conv2d of the Exact"),
    "own, with an example": (Told, "3x5, from the example of the Told"),
    "own, one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 2, 5)), "2x3x64, from the Conv1d of the Sequential"),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
@pytest.mark.filterwarnings("ignore")
def test_inputs_are_made_of_what_a_model_says(name: str) -> None:
    make, words = MADE[name]
    model = make()
    found = cs.check_forward(model, model, planned(model, model))
    assert found.inputs == f"random {words}"
    assert found.same
    assert found.error == 0


def test_where_no_input_can_be_made_some_are_asked_for() -> None:
    silent = nn.Sequential()
    silent.register_buffer("state", torch.ones(3))
    with pytest.raises(cs.UsageError, match="nothing in them says what inputs they take; give some"):
        checked(silent, copy.deepcopy(silent))


class Named(nn.Module):
    """A forward with names of its own."""

    def __init__(self, first: str = "x") -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.layer(first) - second


class Otherwise(Named):
    def forward(self, second: Tensor, first: Tensor) -> Tensor:
        return self.layer(first) - second


def test_inputs_go_by_name_where_a_forward_has_the_names_and_in_order_elsewhere() -> None:
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    source, target = Named(), Otherwise()
    assert checked(source, target, inputs={"first": a, "second": b}).same
    assert checked(source, source, inputs=[a, b]).same
    assert checked(source, source, inputs={"left": a, "right": b}).same
    assert not checked(source, target, inputs=(a, b)).same
    assert checked(source, target, inputs=(a, b)).inputs == "as given: float32 [2, 4], float32 [2, 4]"


def test_inputs_are_described_in_words() -> None:
    made = described(["2x3", "ids=2,5:7"])
    assert list(made.values) == ["0", "ids"]
    assert made.values["0"].shape == (2, 3)
    assert made.values["ids"].shape == (2, 5)
    assert made.values["ids"].dtype == torch.int64
    assert 0 <= int(made.values["ids"].min()) <= int(made.values["ids"].max()) < 7
    assert made.how == "as given: 2x3, 2x5 of whole numbers below 7"
    for words in (["2xx3"], ["x"], ["a=2", "a=3"], ["0x3"], ["2:0"], ["99999x99999x99999"]):
        with pytest.raises(cs.UsageError, match="^--input "):
            described(words)


def test_inputs_that_are_none_are_refused() -> None:
    for given, words in ((7, "not int"), ("text", "not str"), ((), "inputs are empty")):
        with pytest.raises(cs.UsageError, match=words):
            checked(models.plain(), models.plain(), inputs=given)


# -- outputs -----------------------------------------------------------------------------------

ODD: dict[str, tuple[Any, Any, str]] = {
    "another shape": (lambda x: x, lambda x: x[:, :2], r"not comparable: output is [2, 4], and output is [2, 2]"),
    "another number": (
        lambda x: (x, x),
        lambda x: x,
        "not comparable: the outputs are 0 [2, 4], 1 [2, 4] and output [2, 4]",
    ),
    "nothing": (lambda x: None, lambda x: None, "not comparable: the outputs are none and none"),
    "no number": (lambda x: x / 0, lambda x: x / 0, "not comparable: output has numbers that are not finite"),
    "one number": (
        lambda x: 0 * x,
        lambda x: 0 * x,
        "not comparable: every output of the source model is one number everywhere, which tells nothing",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_outputs_that_cannot_be_compared_are_an_answer(name: str) -> None:
    ours, others, reason = ODD[name]
    source, target = models.Does(ours), models.Does(others)
    found = checked(source, target)
    assert not found.same
    assert not found.comparable
    assert found.reason == reason
    assert found.errors == {}
    assert found.error == float("inf")


def test_outputs_go_together_by_name_else_in_order() -> None:
    tidy = models.Does(lambda x: {"a": x, "b": {"c": 2 * x}})
    swapped = models.Does(lambda x: {"b": {"c": 2 * x}, "a": x})
    listed = models.Does(lambda x: [x, (2 * x, "no tensor", None)])
    by_name, in_order = checked(tidy, swapped), checked(tidy, listed)
    assert by_name.same
    assert by_name.errors == {"a": 0.0, "b.c": 0.0}
    assert in_order.same
    assert [(one.source, one.target) for one in in_order.outputs] == [("a", "0"), ("b.c", "1.0")]


def test_of_a_transformers_output_the_main_part_is_held_against_a_tensor() -> None:
    class Hidden(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).last_hidden_state

    inner = _hf("Bert", **_TEXT)
    found = checked(Hidden(inner), inner, ["strip inner."])
    assert found.same
    assert [(one.source, one.target) for one in found.outputs] == [("output", "last_hidden_state")]


def test_outputs_of_whole_numbers_are_compared_too() -> None:
    found = checked(models.Does(lambda x: x.argsort()), models.Does(lambda x: x.argsort().flip(1)))
    assert not found.same
    assert found.errors["output"] > 0.3


# -- numbers -----------------------------------------------------------------------------------


def _forwards(x: Tensor) -> Tensor:
    return sum(x[:, at] for at in range(x.shape[1]))


def _backwards(x: Tensor) -> Tensor:
    return sum(x[:, at] for at in reversed(range(x.shape[1])))


def test_what_only_float32_rounds_is_the_same() -> None:
    source, target = models.Does(_forwards, 512), models.Does(_backwards, 512)
    found = cs.check_forward(source, target, planned(source, target), tolerance=1e-12)
    assert found.same
    assert found.dtype == "float64"
    assert found.error < 1e-12
    assert found.notes[0].startswith("in float32 the error is ")


def test_a_model_that_cannot_count_in_float64_is_held_to_float32() -> None:
    source = models.Does(lambda x: x)
    target = models.Does(lambda x: torch.nn.functional.linear(x, torch.eye(4)) * 1.5)
    found = checked(source, target)
    assert not found.same
    assert found.dtype == "float32"
    assert found.error == pytest.approx(0.5, rel=1e-4)
    assert found.notes == ("one of the models cannot count in float64; float32 is all there is",)


def test_what_a_checkpoint_does_not_bring_is_told() -> None:
    source, target = models.plain(), models.plain()
    torch.save({"layer.weight": source.state_dict()["layer.weight"], "more": torch.ones(1)}, "part.pth")
    plan = cs.plan("part.pth", to=target, fit=True)
    found = cs.check_forward(source, target, plan)
    assert found.not_loaded == {"source": ("layer.bias",), "target": ()}
    assert found.not_used == ("more",)
    assert found.notes[0] == "new in the result, and not of the source: layer.bias"
    assert "  not from the checkpoint in the source model: layer.bias" in str(found).splitlines()


def test_wrappers_around_names_are_no_part_of_a_source_model() -> None:
    model = models.plain()
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, "wrapped.pth")
    assert cs.check_forward(model, model, cs.plan("wrapped.pth", to=model, fit=True)).same


# -- models ------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A model that changes itself whenever it is run, with weight norm of the old kind, which deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = _old_weight_norm()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.drop(self.norm(self.layer(x)))


def _old_weight_norm() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(nn.Linear(4, 4))


def test_models_and_random_state_are_left_as_they_were() -> None:
    source, target = models.filled(Counting(), 1), models.filled(Counting(), 2)
    source.norm.eval()
    plan = planned(source, target)
    before = [copy.deepcopy(dict(model.state_dict())) for model in (source, target)]
    modes = [[module.training for module in model.modules()] for model in (source, target)]
    state = torch.get_rng_state()
    assert cs.check_forward(source, target, plan).same
    assert torch.equal(torch.get_rng_state(), state)
    for model, values, mode in zip((source, target), before, modes, strict=True):
        assert_same_tensors(model.state_dict(), values)
        assert [module.training for module in model.modules()] == mode
        assert all(value.grad is None for value in model.parameters())


def test_a_model_of_half_precision_counts_in_float32() -> None:
    model = models.plain()
    half = models.plain().to(torch.bfloat16)
    found = cs.check_forward(model, half, planned(model, half))
    assert found.same
    assert found.error == 0
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_spec_that_gives_one_module_is_two_models() -> None:
    """Else the second checkpoint would be loaded over the first, and all would be equal."""
    plan = planned(models.plain(), "forward_models:ONE", ["scale layer.weight$ 2"])
    before = copy.deepcopy(dict(models.ONE.state_dict()))
    found = cs.check_forward("forward_models:ONE", "forward_models:ONE", plan)
    assert not found.same
    assert found.error > 0.1
    assert_same_tensors(models.ONE.state_dict(), before)


def test_a_model_that_raises_is_named() -> None:
    plan = planned(models.plain(), models.plain())
    with pytest.raises(cs.TargetError, match=r"^the Does \(target\): its forward raises KeyError: 'no such thing'"):
        cs.check_forward(models.plain(), models.failing(), plan)
    with pytest.raises(cs.TargetError, match=r"^forward_models:failing \(source\): its forward raises KeyError"):
        cs.check_forward("forward_models:failing", models.plain(), plan, torch.ones(1, 4))


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is but one of me")


def test_a_model_that_cannot_be_copied_is_named() -> None:
    plan = planned(models.plain(), models.plain())
    with pytest.raises(cs.TargetError, match=r"Stubborn \(source\): it cannot be copied: TypeError: there is but one"):
        cs.check_forward(Stubborn(), models.plain(), plan)


def test_what_is_no_model_or_no_plan_is_refused() -> None:
    model = models.plain()
    plan = planned(model, model)
    with pytest.raises(cs.UsageError, match="a checkpoint has no code to run"):
        cs.check_forward("source.pth", model, plan)
    with pytest.raises(cs.UsageError, match="not dict"):
        cs.check_forward(model, {}, plan)  # type: ignore[arg-type]
    with pytest.raises(cs.UsageError, match="is on the meta device"):
        cs.check_forward(model, models.plain().to("meta"), plan)
    with pytest.raises(cs.UsageError, match="has none of its tensors"):
        cs.check_forward(nn.Sequential(nn.Embedding(7, 3)), model, plan)
    with pytest.raises(cs.UsageError, match="takes a plan"):
        cs.check_forward(model, model, "source.pth")  # type: ignore[arg-type]
    with pytest.raises(cs.UsageError, match="a tolerance is a number from 0 to 1"):
        cs.check_forward(model, model, plan, tolerance=2)
    with pytest.raises(cs.TargetError, match="torchvision has no model 'resnet17'"):
        cs.check_forward("torchvision:resnet17", model, plan)
    with pytest.raises(cs.PlanError):
        cs.check_forward(model, model, planned(model, model, ["drop bias$"]))


# -- the command -------------------------------------------------------------------------------


def test_the_command_says_yes_by_its_exit_code_and_writes_nothing(ckpt: Any) -> None:
    torch.save(models.resnet().state_dict(), "resnet.pth")
    words = [
        "check",
        "resnet.pth",
        "--source",
        "torchvision:resnet18,num_classes=7",
        "--to",
        "forward_models:hf_resnet",
    ]
    ran = ckpt(*words, "--recipe", "builtin:torchvision-resnet-to-transformers", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    found = ckpt(*words, "--auto", "--json").json
    assert found["same"]
    assert found["outputs"] == [{"source": "output", "target": "logits", "shape": [2, 7], "error": found["error"]}]
    assert found["source_model"] == "torchvision:resnet18,num_classes=7"
    assert sorted(path.name for path in Path().iterdir()) == ["resnet.pth"]


def test_the_command_says_no_and_why(ckpt: Any) -> None:
    torch.save(models.plain().state_dict(), "a.pth")
    words = ["check", "a.pth", "--source", "forward_models:plain", "--to", "forward_models:plain"]
    ran = ckpt(*words, "--rule", "scale layer.weight$ 2")
    assert ran.code == 1
    assert ran.out.startswith("not the same: the relative error is ")
    assert ckpt(*words, "--rule", "scale layer.weight$ 1.001", "--tolerance", "0.01").code == 0
    given = ckpt(*words, "--input", "3x4", "--json")
    assert (given.code, given.json["inputs"]) == (0, "as given: 3x4")
    refused = ckpt(*words, "--rule", "drop bias$")
    assert (refused.code, refused.out) == (1, "")
    assert "'layer.bias'" in refused.err
    refused = ckpt(*words, "--rule", "drop bias$", "--json")
    assert (refused.code, refused.json["same"], refused.json["reason"]) == (1, False, "the plan has problems")
    odd = ckpt(*words, "--rule", "scale layer. 0", "--json")
    assert (odd.code, odd.json["error"], odd.json["outputs"][0]["error"]) == (1, 1.0, 1.0)


BAD = {
    "no source model": (["--to", "forward_models:plain"], "name that of IN with --source"),
    "no target": (["--source", "forward_models:plain"], "that of the result with --to"),
    "a checkpoint for a model": (["--source", "forward_models:plain", "--to", "a.pth"], "has no code to run"),
    "an input that is none": (
        ["--source", "forward_models:plain", "--to", "forward_models:plain", "--input", "wide"],
        "--input wide: write a shape",
    ),
    "a forward that raises": (
        ["--source", "forward_models:plain", "--to", "forward_models:failing"],
        "forward_models:failing (target): its forward raises KeyError: 'no such thing'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_command_refuses_what_cannot_be_run(ckpt: Any, name: str) -> None:
    words, said = BAD[name]
    torch.save(models.plain().state_dict(), "a.pth")
    ran = ckpt("check", "a.pth", *words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert ran.err.startswith("ckpt: error: ")
    assert "Traceback" not in ran.err

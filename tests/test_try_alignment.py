"""What names leave open is settled by experiment, where one way alone gives the outputs of the source model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forward_models as models
import pytest
import torch
from helpers import assert_same_tensors
from torch import Tensor, nn

import ckptsurgeon as cs


def aligned(source: nn.Module, target: nn.Module | str, rules: Any = None, **how: Any) -> Any:
    torch.save(source.state_dict(), "source.pth")
    return cs.align("source.pth", target, rules, **how)


def tried(source: nn.Module, target: nn.Module, **how: Any) -> Any:
    """An alignment that asks something, after the experiment."""
    found = aligned(source, target, **how)
    assert found.questions
    assert not found.certain
    return cs.try_alignment(found, source, target)


def grades(found: Any) -> dict[str, tuple[str, str]]:
    """Target → source and grade, of what names alone do not tell."""
    return {one.targets[0]: (one.sources[0], one.grade) for one in found.matches if one.grade in ("open", "tried")}


def test_norms_under_neutral_names_are_told_apart_by_what_comes_out() -> None:
    source, target = models.neutral_vit(), models.hf_vit()
    found = tried(source, target)
    assert found.certain
    assert grades(found) == {
        "vit.layers.{}.layernorm_before": ("blocks.{}.alpha", "tried"),
        "vit.layers.{}.layernorm_after": ("blocks.{}.beta", "tried"),
    }
    assert found.tried.startswith("2 ways were tried, and one gives equal outputs: its relative error is ")
    for one in found.matches:
        assert (one.error is not None) == (one.grade == "tried")
        assert one.error is None or one.error < 1e-4
    result = found.plan().check().result
    want = cs.plan("source.pth", found.recipe, target).check().result
    assert_same_tensors(result, {key: want[key].read() for key in result})
    wanted = source.state_dict()
    for block in range(2):
        assert torch.equal(
            result[f"vit.layers.{block}.layernorm_before.weight"].read(), wanted[f"blocks.{block}.alpha.weight"]
        )
        assert torch.equal(
            result[f"vit.layers.{block}.layernorm_after.bias"].read(), wanted[f"blocks.{block}.beta.bias"]
        )


def test_norms_of_a_resnet_go_to_another_library() -> None:
    """Running statistics and counters go with their norms."""
    source = models.renamed(models.resnet(), {"bn1": "first", "bn2": "other"})
    target = models.hf_resnet()
    found = tried(source, target)
    assert found.certain
    assert {grade for _, grade in grades(found).values()} == {"tried"}
    plan = found.plan()
    assert cs.check_forward(source, target, plan).error < 1e-6
    assert plan.check().missing == {}


def test_squares_of_a_convention_that_nothing_tells_are_turned_until_outputs_are_equal() -> None:
    source, target = models.Kernels(3), models.Kernels(3, turned=False)
    found = tried(source, target)
    assert found.certain
    assert [one.how for one in found.matches] == ["transpose"] * 3
    assert found.tried.startswith("8 ways were tried")
    result = found.plan().check().result
    for key, value in target.state_dict().items():
        assert torch.equal(result[key].read(), source.state_dict()[key.replace("weight", "kernel")].T), value


class Mixed(models.Kernels):
    """Every second layer lies the other way."""

    def forward(self, x: Tensor) -> Tensor:
        for at, layer in enumerate(self.layers.values()):
            x = x + torch.tanh(x @ (layer.kernel if at % 2 else layer.kernel.T))
        return x


def test_each_square_is_turned_by_itself() -> None:
    """More than all ways are tried at once: it goes downhill."""
    found = tried(Mixed(8), models.Kernels(8, turned=False))
    assert found.certain
    assert [bool(one.how) for one in found.matches] == [False, True] * 4
    assert "not all ways were tried" in found.tried


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_twins_are_found_downhill(seed: int) -> None:
    names = ["pear", "plum", "fig", "lime", "kiwi", "date"]
    source = models.filled(models.Twins(*names), seed)
    shuffled = [names[at] for at in torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()]
    state = {key: value for name in shuffled for key, value in source.state_dict().items() if f".{name}." in key}
    torch.save(state, "source.pth")
    target = models.Twins("red", "green", "blue", "teal", "pink", "gold")
    found = cs.try_alignment(cs.align("source.pth", target), source, target)
    assert found.certain
    assert sorted(grades(found).values()) == sorted((f"layers.{name}", "tried") for name in names)
    colours = dict(zip(["red", "green", "blue", "teal", "pink", "gold"], names, strict=True))
    assert {new: old for new, (old, _) in grades(found).items()} == {
        f"layers.{new}": f"layers.{old}" for new, old in colours.items()
    }


# -- what stays open ---------------------------------------------------------------------------


def test_what_makes_no_difference_stays_open_and_says_so() -> None:
    found = tried(models.filled(models.Branches("pear", "plum")), models.Branches("left", "right"))
    assert not found.certain
    assert {grade for _, grade in grades(found).values()} == {"open"}
    assert found.tried == "2 ways were tried, and 2 give equal outputs"
    assert found.questions[0].text.endswith("; 2 ways were tried, and 2 give equal outputs")
    assert [one.answers for one in found.questions] == [
        ("--hint 'sides.pear=sides.left'", "--hint 'sides.plum=sides.left'")
    ]


def test_norms_that_were_never_trained_stay_open() -> None:
    """All of them are ones and zeros."""
    source = models.neutral_vit()
    for name, value in source.state_dict().items():
        if ".alpha." in name or ".beta." in name:
            value.copy_(torch.full_like(value, float(name.endswith("weight"))))
    found = tried(source, models.hf_vit())
    assert {grade for _, grade in grades(found).values()} == {"open"}
    assert found.tried == "2 ways were tried, and 2 give equal outputs"


class Both(nn.Module):
    """Layers one after the other, and then layers side by side."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.chain, self.fan = models.Twins(*names[:2]), models.Branches(*names[2:])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fan(self.chain(x)))


def test_what_is_settled_is_kept_beside_what_is_not() -> None:
    found = tried(models.filled(Both("a", "b", "c", "d")), Both("one", "two", "three", "four"))
    assert not found.certain
    by_grade = {new: grade for new, (_, grade) in grades(found).items()}
    assert by_grade["chain.layers.one"] == by_grade["chain.layers.two"] == "tried"
    assert by_grade["fan.sides.three"] == by_grade["fan.sides.four"] == "open"
    assert [one.targets for one in found.questions] == [("fan.sides.three",)]


class Other(models.Twins):
    """The same names and shapes, and another network."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x) - x)


def test_where_no_way_gives_equal_outputs_nothing_is_settled() -> None:
    found = tried(models.filled(models.Twins("pear", "plum")), Other("left", "right"))
    assert not found.certain
    assert {grade for _, grade in grades(found).values()} == {"open"}
    assert found.tried.startswith("2 ways were tried, and none gives equal outputs (the relative error of the best is ")
    assert found.questions[0].text.endswith(found.tried)


class Narrow(models.Twins):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :2]


def test_where_outputs_cannot_be_compared_nothing_is_tried() -> None:
    found = tried(models.filled(models.Twins("pear", "plum")), Narrow("left", "right"))
    assert not found.certain
    assert found.tried == "nothing was tried: not comparable: output is [2, 6], and output is [2, 2]"


def test_too_many_twins_are_not_tried() -> None:
    names = [f"{a}{b}" for a in "pqrs" for b in "aeiu"]
    found = tried(models.Twins(*[f"w{name}" for name in names]), models.Twins(*[f"v{name}" for name in names]))
    assert found.tried == "nothing was tried: more than 12 are alike"


def test_where_nothing_is_open_nothing_is_run() -> None:
    found = aligned(models.plain(), models.plain())
    assert found.certain
    after = cs.try_alignment(found, models.failing(), models.failing())
    assert after.certain
    assert after.tried == "nothing is open that an experiment could settle"


# -- what goes with it -------------------------------------------------------------------------


def test_rules_that_were_given_stand_first_and_hints_hold() -> None:
    source, target = models.neutral_vit(), models.hf_vit()
    found = aligned(source, target, ["head => classifier"])
    after = cs.try_alignment(found, source, target)
    assert after.recipe.rules[0].text == "head => classifier"
    assert (after.given, after.certain) == (1, True)
    assert cs.check_forward(source, target, after.plan()).same
    wrong = aligned(source, target, hints=["alpha=layernorm_after", "head=classifier"])
    assert wrong.certain
    assert not cs.check_forward(source, target, wrong.plan()).same


def test_a_spare_tensor_of_the_source_may_be_the_right_one() -> None:
    source, target = models.filled(models.Twins("pear", "plum", "fig")), models.Twins("left", "right")

    class Skips(models.Twins):
        def forward(self, x: Tensor) -> Tensor:
            for name in ("pear", "fig"):
                x = x + torch.tanh(self.layers[name](x))
            return x

    source.__class__ = Skips
    found = tried(source, target)
    assert grades(found) == {"layers.left": ("layers.pear", "tried"), "layers.right": ("layers.fig", "tried")}
    assert [left.key for left in found.unused] == ["layers.plum.weight", "layers.plum.bias"]


def test_models_are_left_as_they_were() -> None:
    source, target = models.neutral_vit(), models.hf_vit()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    found = aligned(source, target)
    cs.try_alignment(found, source, target)
    assert_same_tensors(target.state_dict(), before)
    assert source.training


def test_what_is_no_alignment_is_refused() -> None:
    with pytest.raises(cs.UsageError, match="takes what cs.align found"):
        cs.try_alignment("source.pth", models.plain(), models.plain())  # type: ignore[arg-type]


# -- the command -------------------------------------------------------------------------------

WORDS = ("align", "source.pth", "forward_models:hf_vit")


def test_the_command_writes_a_recipe_that_says_how_it_was_found(ckpt: Any) -> None:
    torch.save(models.neutral_vit().state_dict(), "source.pth")
    asked = ckpt(*WORDS, "-o", "asked.yaml")
    assert asked.code == 1
    assert not Path("asked.yaml").exists()
    ran = ckpt(*WORDS, "--try", "--source", "forward_models:neutral_vit", "-o", "recipe.yaml")
    assert (ran.code, ran.err) == (0, "")
    assert "by experiment: 2 ways were tried, and one gives equal outputs" in ran.out
    assert "(8 by experiment, " in ran.out or ", 8 by experiment" in ran.out
    text = Path("recipe.yaml").read_text()
    assert "# Found by experiment, where it says so: 2 ways were tried" in text
    assert "(tried): in 2 blocks alike; by experiment: this alone gives equal outputs" in text
    checked = ckpt(
        "check", "source.pth", "--source", "forward_models:neutral_vit", "--to", "forward_models:hf_vit",
        "--recipe", "recipe.yaml",
    )  # fmt: skip
    assert (checked.code, checked.err) == (0, "")


def test_a_source_model_that_lacks_its_checkpoint_is_told(ckpt: Any) -> None:
    """It has values of its own, of which the outputs say nothing."""
    torch.save(models.neutral_vit().state_dict(), "source.pth")
    ran = ckpt(*WORDS, "--try", "--source", "forward_models:timm_vit")
    assert "8 tensors of the source model are not from the checkpoint: blocks.0.norm1.weight, " in ran.out


def test_the_json_object_has_the_grade_and_the_error(ckpt: Any) -> None:
    torch.save(models.neutral_vit().state_dict(), "source.pth")
    ran = ckpt(*WORDS, "--try", "--source", "forward_models:neutral_vit", "--input", "1x3x32x32", "--json")
    assert ran.code == 0
    found = {one["targets"][0]: one for one in ran.json["matches"] if one["grade"] == "tried"}
    assert sorted(found) == ["vit.layers.{}.layernorm_after", "vit.layers.{}.layernorm_before"]
    assert all(0 <= one["error"] < 1e-4 for one in found.values())
    assert ran.json["tried"].startswith("2 ways were tried")
    assert ckpt(*WORDS, "--json").json["tried"] is None


def test_the_command_says_no_where_it_stays_open(ckpt: Any) -> None:
    torch.save(models.neutral_vit().state_dict(), "source.pth")
    ran = ckpt(*WORDS, "--try", "--source", "forward_models:other_vit", "-o", "recipe.yaml")
    assert ran.code == 1
    assert "and none gives equal outputs" in ran.err
    assert not Path("recipe.yaml").exists()


BAD = {
    "no source model": (["--try"], "it goes with --source MODEL"),
    "no experiment": (["--source", "forward_models:timm_vit"], "it goes with --source MODEL"),
    "an input for nothing": (["--input", "2x3"], "it goes with --source MODEL"),
    "a model that raises": (
        ["--try", "--source", "forward_models:broken_vit"],
        "its forward raises RuntimeError: broken",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_command_refuses_what_cannot_be_tried(ckpt: Any, name: str) -> None:
    words, said = BAD[name]
    torch.save(models.neutral_vit().state_dict(), "source.pth")
    ran = ckpt(*WORDS, *words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert "Traceback" not in ran.err

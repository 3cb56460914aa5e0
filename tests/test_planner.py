"""Plans: what the rules make, what the policies settle, and every problem at once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import assert_same_tensor, assert_same_tensors
from hypothesis import given
from hypothesis import strategies as st
from models import Net, Tied
from resnet18 import telling
from strategies import state_dicts

import ckptsurgeon as cs
from ckptsurgeon import versions as module_versions


def made(state: dict[str, torch.Tensor], *rules: str, **how: object) -> cs.Plan:
    torch.save(state, "a.pth")
    return cs.plan("a.pth", list(rules), **how)


def keys(plan: cs.Plan) -> list[str]:
    assert plan.ok, plan.problems
    return list(plan.result)


W = torch.arange(6.0).reshape(2, 3)
STATE = {"module.a.w": W, "module.a.b": W + 1, "module.fc.w": W + 2}

RENAMES = {
    ("strip module.",): ["a.w", "a.b", "fc.w"],
    (r"^module\. =>",): ["a.w", "a.b", "fc.w"],
    (r"\.a\. => .x.",): ["module.x.w", "module.x.b", "module.fc.w"],
    (r"a => A",): ["module.A.w", "module.A.b", "module.fc.w"],
    (r"^(\w+)\.(\w+) => \2.\1",): ["a.module.w", "a.module.b", "fc.module.w"],
    ("prefix net.",): ["net.module.a.w", "net.module.a.b", "net.module.fc.w"],
    (r"prefix net. \.w$",): ["net.module.a.w", "module.a.b", "net.module.fc.w"],
    (r"drop ^module\.fc",): ["module.a.w", "module.a.b"],
    (r"keep \.w$",): ["module.a.w", "module.fc.w"],
    ("strip module.", r"^a\. => b."): ["b.w", "b.b", "fc.w"],
    (r"copy ^module\.a\.(.) => z.\1",): ["module.a.w", "z.w", "module.a.b", "z.b", "module.fc.w"],
    (r"copy fc => a_copy",): ["module.a.w", "module.a.b", "module.fc.w", "module.a_copy.w"],
}


@pytest.mark.parametrize("rules", RENAMES)
def test_what_rules_make_of_names(rules: tuple[str, ...]) -> None:
    assert keys(made(STATE, *rules)) == RENAMES[rules]


def test_values_follow_their_names() -> None:
    result = made(STATE, "strip module.", r"^a\.(.)$ => \1.a", r"copy fc\.w => z").check().result
    assert_same_tensors(result, {"w.a": W, "b.a": W + 1, "fc.w": W + 2, "z": W + 2})


def test_names_can_be_swapped_in_one_rule() -> None:
    state = {"a1": W, "a2": W + 1}
    plan = made(state, r"^a(?=1) => b", r"^b1$ => c2", r"^a2$ => a1", r"^c2$ => a2")
    assert_same_tensors(plan.check().result, {"a2": W, "a1": W + 1})


def test_two_tensors_of_one_name_are_a_problem_that_names_both() -> None:
    (problem,) = made(STATE, r"\.(w|b)$ => .x").problems
    assert problem.kind == "collision"
    assert "'module.a.x': 'module.a.w' and 'module.a.b'" in str(problem)
    assert r"`\.(w|b)$ => .x`" in str(problem)


def test_a_rename_onto_a_name_that_stays_is_a_problem() -> None:
    (problem,) = made({"a": W, "b": W}, "^a$ => b").problems
    assert "two tensors would be named 'b': 'a' and 'b'" in str(problem)


def test_all_problems_are_there_at_once() -> None:
    plan = made(STATE, "drop ^nothing", r"a => \3", r"\.(w|b)$ => .x", "squeeze fc", "strip module. ")
    assert [problem.kind for problem in plan.problems] == ["unused", "rule", "collision", "shape"]
    with pytest.raises(cs.PlanError) as caught:
        plan.check()
    assert len(caught.value.problems) == 4


def test_an_unknown_group_is_a_problem_with_its_span() -> None:
    (problem,) = made(STATE, r"a => \3").problems
    assert "invalid group reference 3" in problem.text
    assert problem.span == (5, 7)
    (problem,) = made(STATE, r"a => \g<name>").problems
    assert "unknown group name 'name'" in problem.text


def test_a_rule_that_matches_nothing_names_the_nearest_keys() -> None:
    (problem,) = made(STATE, "drop ^module.a.bias$").problems
    assert "matches no key; the nearest keys are 'module.a.b'" in problem.text
    assert keys(made(STATE, "drop ^module.a.bias$", allow_unused=True)) == list(STATE)


def test_an_empty_name_is_a_problem() -> None:
    (problem,) = made({"a": W}, "^a$ =>").problems
    assert "'a' would have the empty name" in str(problem)


def test_a_dropped_tensor_stands_in_the_plan() -> None:
    plan = made(STATE, r"drop fc")
    assert plan.dropped == {"module.fc.w": "rule `drop fc`"}


def test_a_copy_is_no_tie_but_a_tie_stays_one() -> None:
    shared = torch.ones(3)
    plan = made({"a": shared, "b": shared}, "copy ^a$ => c", "cast . f16")
    assert plan.result.tied() == (("a", "b"),)


@given(state_dicts())
def test_a_plan_of_no_rules_changes_nothing(state: dict[str, torch.Tensor]) -> None:
    torch.save(state, "law.pth")
    plan = cs.plan("law.pth")
    assert plan.result.tensors == plan.source.tensors
    assert plan.steps == ()


@given(state_dicts(), st.sampled_from(["net.", "a", "x.y."]))
def test_prefix_and_strip_are_each_others_inverse(state: dict[str, torch.Tensor], prefix: str) -> None:
    torch.save(state, "law.pth")
    plan = cs.plan("law.pth", [f"prefix {prefix}", f"strip {prefix}"])
    assert plan.result.tensors == plan.source.tensors


# -- policies --------------------------------------------------------------------------------


def net_state() -> dict[str, torch.Tensor]:
    return dict(telling(Net(num_classes=100)).state_dict())


def test_without_a_policy_each_difference_is_a_problem() -> None:
    state = {**net_state(), "extra": W}
    del state["norm.bias"]
    plan = made(state, to=Net(num_classes=10))
    assert Counter(problem.kind for problem in plan.problems) == {"shape": 2, "missing": 1, "unexpected": 1}
    assert "[100, 8] in the checkpoint, [10, 8] in the Net" in str(plan.problems[1])


def test_policies_settle_what_they_name_and_nothing_else() -> None:
    state = {**net_state(), "extra": W}
    model = Net(num_classes=10)
    assert {p.kind for p in made(state, to=model, unexpected="drop").problems} == {"shape"}
    plan = made(state, to=model, unexpected="keep", mismatched="drop", missing="skip")
    assert keys(plan) == [key for key in model.state_dict() if not key.startswith("fc")] + ["extra"]
    assert plan.kept == ("extra",)
    assert set(plan.dropped) == set(plan.missing) == {"fc.weight", "fc.bias"}


def test_a_dropped_mismatch_is_missing() -> None:
    plan = made(net_state(), to=Net(num_classes=10), mismatched="drop")
    assert [problem.key for problem in plan.problems] == ["fc.weight", "fc.bias"]
    assert {problem.kind for problem in plan.problems} == {"missing"}


def test_keys_come_in_the_targets_order() -> None:
    state = dict(reversed(net_state().items()))
    assert keys(made(state, to=Net(num_classes=100))) == list(Net().state_dict())


def test_reshape_adds_and_removes_sizes_of_one_and_nothing_else() -> None:
    state = net_state()
    state["stem.weight"] = state["stem.weight"].unsqueeze(2)
    state["fc.weight"] = state["fc.weight"].t().contiguous()
    plan = made(state, to=Net(num_classes=100), mismatched="reshape")
    assert [problem.key for problem in plan.problems] == ["fc.weight"]
    assert plan.result["stem.weight"].shape == (8, 3, 3, 3)


def test_overlap_copies_what_both_have_and_initialises_the_rest() -> None:
    state, model = net_state(), telling(Net(num_classes=120, width=8), seed=9)
    plan = made(state, to=model, mismatched="overlap").check()
    got = plan.result["fc.weight"].read()
    assert_same_tensor(got[:100], state["fc.weight"])
    assert_same_tensor(got[100:], model.state_dict()["fc.weight"][100:])
    assert "800 of 960 elements copied (83.3 %)" in plan.mismatched["fc.weight"]


def test_when_target_applies_a_rename_key_by_key() -> None:
    """Scenario S4: `.net` on one side only."""
    state = net_state()
    inner = {key.replace("stem.", "stem.net.").replace("fc.", "fc.net."): value for key, value in state.items()}
    assert keys(made(inner, r"\.net\. => . when=target", to=Net(num_classes=100))) == list(state)
    plan = made({"stem.net.weight": W, "other.net.weight": W}, r"\.net\. => . when=target", to=Net(), unexpected="keep")
    assert list(plan.result)[-2:] == ["stem.weight", "other.net.weight"]


def test_when_target_without_effect_or_without_a_target() -> None:
    (problem,) = made(
        {"a.net.b": W}, r"\.net\. => . when=target", to={"x": 1} and Net(), unexpected="keep", missing="skip"
    ).problems
    assert "makes no name of the target: 'a.b' is no name of the Net" in str(problem)
    (problem,) = made({"a.net.b": W}, r"\.net\. => . when=target").problems
    assert "needs a target" in str(problem)


WRAPPED = (
    "module.",
    "_orig_mod.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "module.module.",
    "model.backbone.",
    "_forward_module.model.",
    "anything.at_all.",
)


@pytest.mark.parametrize("prefix", WRAPPED)
def test_fit_takes_wrappers_off_in_any_nesting(prefix: str) -> None:
    state = {prefix + key: value for key, value in net_state().items()}
    plan = made(state, to=Net(num_classes=100), fit=True).check()
    assert_same_tensors(plan.result, net_state())
    assert [(step.by, step.rule) for step in plan.steps] == [("fit", f"strip {prefix}")]


def test_fit_takes_wrappers_out_of_the_middle() -> None:
    state = {}
    for key, value in net_state().items():
        head, _, rest = key.partition(".")
        state[f"module.{head}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}"] = value
    assert_same_tensors(made(state, to=Net(num_classes=100), fit=True).check().result, net_state())


def test_fit_puts_a_wrapper_on_where_the_model_has_it() -> None:
    """Scenario S3, the other way round."""
    state = {f"net.{key}": value for key, value in net_state().items()}
    model = torch.nn.DataParallel(Net(num_classes=100))
    plan = made(state, to=model, fit=True).check()
    assert list(plan.result) == list(model.state_dict())
    assert [step.rule for step in plan.steps] == ["strip net.", "prefix module."]


PAIRS = [
    ("student.", "teacher."),
    ("ema.", "model."),
    ("ema_model.", "model."),
    ("module.student.", "module.teacher."),
]


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_fit_never_chooses_between_two_that_fit_equally_well(pair: tuple[str, str]) -> None:
    state = {prefix + key: value for prefix in pair for key, value in net_state().items()}
    plan = made(state, to=Net(num_classes=100), fit=True)
    (problem,) = [problem for problem in plan.problems if problem.kind == "ambiguous"]
    assert all(f"`strip {prefix}`" in problem.text for prefix in pair)
    suggestion = cs.diff("a.pth", Net(num_classes=100)).suggestion
    assert suggestion.rules == ()
    assert suggestion.alternatives == tuple(f"`strip {prefix}`" for prefix in sorted(pair))
    assert made(state, f"strip {pair[1]}", to=Net(num_classes=100), fit=True).ok


def test_fit_takes_the_part_whose_shapes_fit() -> None:
    state = {f"backbone.{key}": torch.ones(1, 2, 3, 4, 5) for key in net_state()}
    state |= {f"net.{key}": value for key, value in net_state().items()}
    plan = made(state, to=Net(num_classes=100), fit=True).check()
    assert_same_tensors(plan.result, net_state())


def test_fit_renames_nothing_away_that_fits() -> None:
    model = torch.nn.ModuleDict(
        {"backbone": torch.nn.ModuleDict({"c1": torch.nn.Linear(2, 2)}), "fc": torch.nn.Linear(2, 2)}
    )
    state = {
        "c1.weight": torch.ones(2, 2),
        "c1.bias": torch.ones(2),
        "fc.weight": torch.zeros(2, 2),
        "fc.bias": torch.zeros(2),
    }
    plan = made(state, to=model, fit=True).check()
    assert plan.initialised == ()
    assert [step.rule for step in plan.steps] == ["^ => backbone. when=target"]
    assert_same_tensor(plan.result["fc.weight"].read(), state["fc.weight"])


def test_fit_shows_a_collision_instead_of_giving_up() -> None:
    state = {f"module.{key}": value for key, value in net_state().items()}
    plan = made({**state, "fc.bias": torch.zeros(100)}, to=Net(num_classes=100), fit=True)
    assert [problem.kind for problem in plan.problems] == ["collision"]


def test_a_wrapper_that_the_target_has_is_none() -> None:
    """A submodule that is really called `module`, inside of a compiled model."""
    head = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"stem": torch.nn.Linear(2, 2), "head": head})
    state = {f"_orig_mod.{key}": value for key, value in model.state_dict().items()}
    plan = made(state, to=model, fit=True).check()
    assert [step.rule for step in plan.steps] == ["strip _orig_mod."]
    inside = {key.replace("head.", "head._orig_mod."): value for key, value in model.state_dict().items()}
    assert list(made(inside, to=model, fit=True).check().result) == list(model.state_dict())
    assert cs.plan("a.pth", to=model, fit=True).initialised == ()


def test_a_tied_target_from_untied_tensors_is_a_warning() -> None:
    plan = made({"embed.weight": torch.ones(16, 4), "head.weight": torch.zeros(16, 4)}, to=Tied()).check()
    assert plan.warnings == (
        "the Tied shares one parameter among 'embed.weight', 'head.weight', which are not tied here",
    )


def test_overlapped_ties_stay_ties() -> None:
    shared = torch.ones(5, 4)
    plan = made({"embed.weight": shared, "head.weight": shared}, to=telling(Tied()), mismatched="overlap").check()
    assert plan.result.tied() == (("embed.weight", "head.weight"),)
    assert plan.warnings == ()


def test_a_planned_result_can_be_planned_again() -> None:
    first = made({"stem.weight": torch.ones(8, 3, 3, 3)}, to=telling(Net()), missing="init").check()
    second = cs.plan(first.result, [r"unsqueeze ^fc\.bias$ 0", "cast . f64"]).check()
    assert_same_tensor(second.result["fc.bias"].read(), telling(Net()).fc.bias.detach()[None].double())


def test_every_dropped_tensor_has_its_line() -> None:
    plan = made({"a": W, "b": W}, "drop ^a$", "^b$ => a", "drop ^a$", "keep . ", allow_unused=True)
    assert set(plan.dropped) == {"a", "b"}


def test_two_copies_are_two() -> None:
    plan = made({"a": W}, "copy ^a$ => b", "^b$ => c", "copy ^a$ => b")
    assert list(plan.result) == ["a", "b", "c"]
    assert plan.result.tied() == ()


def test_a_keep_that_matches_nothing_is_never_tolerated() -> None:
    (problem,) = made({"a": W}, "keep ^zzz", allow_unused=True).problems
    assert problem.kind == "unused"


def test_fit_takes_nothing_off_that_does_not_help() -> None:
    """`modulex.` is no wrapper, and a dot is a dot."""
    state = {f"modulex.{key}": value for key, value in net_state().items()}
    state["b"] = W
    plan = made(state, to=Net(num_classes=100), fit=True)
    assert plan.steps[0].by == "policy"
    assert len(plan.initialised) == len(Net().state_dict())


def test_an_explicit_policy_wins_over_fit() -> None:
    plan = made(net_state(), to=Net(num_classes=10), fit=True, missing="skip").check()
    assert plan.missing == {"fc.weight": "left out", "fc.bias": "left out"}


def test_a_target_without_values_says_so() -> None:
    with torch.device("meta"):
        model = Net()
    plan = made({"stem.weight": torch.ones(8, 3, 3, 3)}, to=model, missing="init")
    with pytest.raises(cs.TargetError, match="meta device and has no value for 'norm.weight'"):
        plan.result["norm.weight"].read()


def test_words_and_seeds_that_mean_nothing() -> None:
    for how in ({"missing": "bogus"}, {"unexpected": ""}, {"mismatched": "init"}):
        with pytest.raises(cs.UsageError, match="is one of"):
            made({"a": W}, to=Net(), **how)
    for seed in (-1, 1 << 64, "a", True):
        with pytest.raises(cs.UsageError, match="a seed is a whole number"):
            made({"a": W}, seed=seed)


def test_what_is_no_source_and_no_checkpoint() -> None:
    with pytest.raises(cs.UsageError, match="a path or a Checkpoint, not dict"):
        cs.plan({"a": W})
    with pytest.raises(cs.UsageError, match="what is saved is a Checkpoint"):
        cs.save({"a": W}, "a.pth")
    torch.save({"a": W}, "a.pth")
    with pytest.raises(cs.OutputError, match="null"):
        cs.convert("a.pth", "a\0b.pth")


def test_policies_need_a_target() -> None:
    for how in ({"fit": True}, {"unexpected": "drop"}, {"missing": "skip"}, {"mismatched": "drop"}):
        with pytest.raises(cs.UsageError, match="--to"):
            made({"a": W}, **how)


def test_a_tied_name_that_is_missing_gets_the_loaded_tensor() -> None:
    model = telling(Tied())
    state = {"embed.weight": torch.randn(16, 4)}
    (problem,) = made(state, to=model).problems
    assert "the target shares it with 'embed.weight', which is there" in str(problem)
    plan = made(state, to=model, missing="init").check()
    assert_same_tensor(plan.result["head.weight"].read(), state["embed.weight"])
    assert plan.result.tied() == (("embed.weight", "head.weight"),)
    assert plan.initialised == ()


def test_another_checkpoint_is_a_target_with_values() -> None:
    want = telling(Net(num_classes=10), seed=3).state_dict()
    torch.save(want, "target.pth")
    plan = made(net_state(), to="target.pth", mismatched="drop", missing="init").check()
    assert_same_tensor(plan.result["fc.weight"].read(), want["fc.weight"])
    assert_same_tensor(plan.result["stem.weight"].read(), net_state()["stem.weight"])


def test_dtype_casts_floating_tensors_only() -> None:
    plan = made(net_state(), dtype="bf16").check()
    for key, value in net_state().items():
        want = value.bfloat16() if value.is_floating_point() else value
        assert_same_tensor(plan.result[key].read(), want, key)
    for bad in ("int8", "f4", "nonsense"):
        with pytest.raises(cs.UsageError, match="dtype"):
            made(net_state(), dtype=bad)


def test_versions_are_renamed_with_the_keys() -> None:
    versions = {
        "": {"version": 1},
        "a": {"version": 1},
        "a.0": {"version": 2},
        "a.relu": {"version": 1},
        "fc": {"v": 3},
    }
    before = ["a.0.w", "a.0.b", "fc.w"]
    moved = module_versions.renamed(versions, before, [("a.0.w", "net.x.0.w"), ("a.0.b", "net.x.0.b")])
    assert moved == {"net.x": {"version": 1}, "net.x.0": {"version": 2}, "net.x.relu": {"version": 1}}
    gamma = module_versions.renamed({"": {"v": 0}, "0": {"v": 1}}, ["0.weight"], [("0.weight", "0.gamma")])
    assert gamma == {"": {"v": 0}, "0": {"v": 1}}
    stripped = module_versions.renamed(
        {"": {}, "module": {"version": 9}, "module.a": {"version": 2}}, ["module.a.w"], [("module.a.w", "a.w")]
    )
    assert stripped == {"": {"version": 9}, "a": {"version": 2}}


def test_a_tie_that_a_rule_breaks_is_said() -> None:
    w = torch.arange(12.0).reshape(4, 3)
    torch.save({"embed": w, "head": w}, "a.pth")
    (warning,) = cs.plan("a.pth", ["transpose head"]).check().warnings
    assert warning.startswith("'embed' and 'head' were tied, and are not any more")
    for rules in (["transpose ."], [r"split ^(.*)$ => \1.a \1.b"], ["drop head"], ["head => h"], ["cast . bf16"]):
        assert cs.plan("a.pth", rules).check().warnings == ()

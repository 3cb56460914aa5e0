"""The way back: what a recipe did is undone bit for bit, in few lines, or the line without an inverse is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors
from hypothesis import given
from hypothesis import strategies as st
from strategies import KEYS

import ckptsurgeon as cs
from ckptsurgeon.rules import condense
from ckptsurgeon.rules.condense import Edge


def _vit(depth: int = 12) -> dict[str, torch.Tensor]:
    made = {"cls_token": torch.randn(1, 1, 6), "patch_embed.proj.weight": torch.randn(6, 3, 2, 2)}
    for i in range(depth):
        for name, shape in {
            "norm1.weight": (6,),
            "norm1.bias": (6,),
            "attn.qkv.weight": (18, 6),
            "attn.qkv.bias": (18,),
            "attn.proj.weight": (6, 6),
            "mlp.fc1.weight": (24, 6),
            "mlp.fc2.weight": (6, 24),
        }.items():
            made[f"blocks.{i}.{name}"] = torch.randn(shape)
    return {**made, "head.weight": torch.randn(10, 6)}


RULES = [
    r"split ^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$ => layers.\1.q.\2 layers.\1.k.\2 layers.\1.v.\2",
    r"^blocks\.(\d+)\. => layers.{\1+1}.",
    r"transpose \.fc1\.weight$",
    r"rotary \.q\.weight$ half heads=1",
    r"rearrange fc2\.weight$ 'a (b c) -> c (a b)' b=4",
    r"stack ^layers\.{i}\.norm1\.bias$ => norms.bias start=1",
    r"fc2 => down",
    "prefix model.",
    r"take head\.weight$ 1:10,0",
    r"pad head\.weight$ 1:2,3 value=1",
    r"cast cls_token f64",
    r"tie head\.weight => \g<0>_tied",
    "fill model.scale 3 ones",
    r"unsqueeze proj\.weight$ 0 where=rank==4",
]


def test_every_bit_comes_back() -> None:
    state = _vit()
    torch.save(state, "a.pth")
    cs.remap("a.pth", "b.safetensors", RULES, provenance=False)
    found = cs.invert(RULES, "a.pth")
    assert found.problems == ()
    Path("back.yaml").write_text(found.text())
    cs.remap("b.safetensors", "c.pth", cs.Recipe.load("back.yaml"))
    assert_same_tensors(torch.load("c.pth"), state, ordered=False)


def test_the_way_back_is_as_short_as_the_way() -> None:
    """Numbers and last segments are captured: no line for each of 12 layers."""
    torch.save(_vit(), "a.pth")
    lines = cs.invert(RULES, "a.pth").lines
    assert len(lines) <= len(RULES) + 6
    assert lines[-1] == (
        r"concat ^layers\.(\d+)\.q\.(weight|bias)$ ^layers\.(\d+)\.k\.(weight|bias)$ ^layers\.(\d+)\.v\.(weight|bias)$ "
        r"=> blocks.\1.attn.qkv.\2"
    )
    assert r"unstack ^norms\.bias$ => layers.{i}.norm1.bias start=1" in lines
    assert any(line.endswith(r"=> blocks.{\1-1}.norm1.") for line in lines)


def test_it_says_what_each_line_undoes_and_for_which_checkpoint() -> None:
    torch.save(_vit(2), "a.pth")
    Path("r.yaml").write_text(
        "version: 1\nrules:\n  - rule: transpose fc1\n    note: Conv1D\n  - scale cls_token 4\n  - ^blocks => layers\n"
    )
    text = cs.invert("r.yaml", "a.pth").text()
    assert "description: The way back of r.yaml, for checkpoints with the header of a.pth" in text
    assert "# undoes: transpose fc1\n  # its note: Conv1D\n" in text
    assert "# undoes: scale cls_token 4  (but for rounding)\n  - scale ^cls_token$ 0.25\n" in text
    assert "expects:\n  layers.0.norm1.weight: [6]\n" in text
    (problem,) = cs.plan("a.pth", cs.Recipe.load(_write("back.yaml", text))).problems
    assert problem.kind == "applied", "the source is what the way back yields"


def _write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


LOSSY = {
    r"drop ^head\.": "`drop` has no inverse: the tensor that it removes, 'head.weight', cannot come back",
    r"keep ^blocks": "`keep` has no inverse: 3 tensors that it removes, such as 'cls_token', cannot come back",
    "cast head bf16": "`cast` has no inverse for 'head.weight' (float32 [10, 6])",
    "slice head 0:5": "`slice` has no inverse for 'head.weight'",
    "take head 0,5,7": "`take` has no inverse for 'head.weight'",
    "clamp head min=0": "`clamp` has no inverse for 'head.weight'",
    "scale head 0": "`scale` has no inverse for 'head.weight'",
}


@pytest.mark.parametrize("rule", LOSSY)
def test_a_line_that_has_no_inverse_is_named_with_its_place(rule: str, ckpt: Any) -> None:
    torch.save(_vit(1), "a.pth")
    _write("r.yaml", f"version: 1\nrules:\n  - ^cls => class\n  - {rule}\n".replace("^cls => class", "transpose fc1"))
    ran = ckpt("invert", "r.yaml", "--for", "a.pth", "-o", "back.yaml")
    assert ran.code == 1
    assert f"r.yaml, line 4: {LOSSY[rule]}" in ran.err
    assert not Path("back.yaml").exists()
    ran = ckpt("invert", "r.yaml", "--for", "a.pth", "-o", "back.yaml", "--lossy")
    assert ran.code == 0
    assert ran.out.startswith("wrote back.yaml: 1 rule that undo 1 step; 1 rule not undone")
    assert "no way back" in ran.err or "has no inverse" in ran.err
    assert cs.Recipe.load("back.yaml").rules[-1].text == r"transpose ^blocks\.0\.mlp\.fc1\.weight$ 0,1"


def test_policies_have_no_way_back() -> None:
    torch.save({"w": torch.ones(2), "x": torch.ones(1)}, "a.pth")
    torch.save({"w": torch.ones(2)}, "like.pth")
    with pytest.raises(cs.PlanError, match=r"--unexpected drop has no way back \('x'\)"):
        cs.invert([], "a.pth", "like.pth", unexpected="drop")
    with pytest.raises(cs.PlanError, match="--dtype bfloat16 has no way back"):
        cs.invert([], "a.pth", dtype="bf16")


def test_a_recipe_that_cannot_be_applied_has_no_way_back(ckpt: Any) -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    with pytest.raises(cs.PlanError, match="the pattern matches no key"):
        cs.invert(["transpose nothing"], "a.pth")
    ran = ckpt("invert", "--for", "a.pth")
    assert (ran.code, "name a recipe, or give rules" in ran.err) == (2, True)
    Path("out.yaml").write_text("x")
    ran = ckpt("invert", "--for", "a.pth", "--rule", "w => v", "-o", "out.yaml")
    assert (ran.code, "exists; --force replaces it" in ran.err) == (2, True)
    ran = ckpt("invert", "--for", "a.pth", "--rule", "w => v", "--json")
    assert ran.json["undoings"] == [{"rule": "w => v", "lines": ["^v$ => w"], "rounded": False, "nothing": None}]


SWAPS = [
    {"a": "b", "b": "a"},
    {"l.0.w": "l.1.w", "l.1.w": "l.2.w", "l.2.w": "l.0.w"},
    {f"l.{i}.{n}": f"l.{3 - i}.{n}" for i in range(4) for n in ("w", "b")},
    {f"l.{i}.w": f"l.{2 * i}.w" for i in range(5)} | {f"m.{i}.w": f"l.{2 * i + 1}.w" for i in range(5)},
    {"a": "a.b", "a.b": "a"},
    {"module.a": "a", "module.module.a": "module.a"},
]


@pytest.mark.parametrize("goals", SWAPS)
def test_renames_in_a_circle_find_a_way(goals: dict[str, str]) -> None:
    assert _renamed(goals, set(goals)) == {name: goals[name] for name in goals}


def _renamed(goals: dict[str, str], names: set[str]) -> dict[str, str]:
    """What the condensed rules make of each name, by `re` alone; two names must never be one on the way."""
    state = {name: name for name in names}
    for pattern, template in condense.renames(goals, names):
        if "{" in template:
            torch.save({name: torch.ones(1) for name in state.values()}, "r.pth")
            plan = cs.plan("r.pth", [f"{pattern} => {template}"]).check()
            made = {old: line for line, at in plan.lineage().items() for old in at.inputs}
        else:
            made = {name: re.sub(pattern, template, name) for name in state.values()}
        assert len(set(made.values())) == len(state)
        state = {name: made[now] for name, now in state.items()}
    return state


@given(st.lists(KEYS, min_size=2, max_size=8, unique=True), st.randoms(use_true_random=False))
def test_any_renaming_is_condensed_to_rules_that_do_exactly_that(names: list[str], chance: Any) -> None:
    goals = list(names)
    chance.shuffle(goals)
    goals = [goal if chance.random() < 0.6 else f"new.{goal}.{i}" for i, goal in enumerate(goals)]
    pairs = dict(zip(names, goals, strict=True))
    some = {name: goal for name, goal in pairs.items() if name != goal}
    assert _renamed(some, set(names)) == pairs


def test_names_are_condensed_only_where_nothing_else_matches() -> None:
    names = {f"l.{i}.w" for i in range(12)}
    (line,) = condense.lines([Edge((f"l.{i}.w",), ()) for i in range(12)], names)
    assert line.patterns == (r"^l\.(\d+)\.w$",)
    (line,) = condense.lines([Edge((f"l.{i}.w",), ()) for i in (0, 3)], names)
    assert line.patterns == (r"^l\.(0|3)\.w$",)
    found = condense.lines([Edge(("l.0.w",), ()), Edge(("l.1.b",), ())], names | {"l.0.b", "l.1.b"})
    assert {line.patterns for line in found} == {(r"^l\.0\.w$",), (r"^l\.1\.b$",)}


@given(st.data())
def test_whatever_exact_rules_did_is_undone(data: st.DataObject) -> None:
    """Laws of names and parts together: random rules on random blocks."""
    depth = data.draw(st.integers(1, 3))
    state = {f"b.{i}.{n}": torch.randn(4, 6) for i in range(depth) for n in ("q", "k")} | {"e": torch.randn(4, 6)}
    torch.save(state, "a.pth")
    rules = data.draw(st.lists(st.sampled_from(EXACT), min_size=1, max_size=4, unique=True))
    plan = cs.plan("a.pth", rules)
    if not plan.ok:
        return
    cs.save(plan.result, "b.safetensors", force=True)
    found = cs.invert(rules, "a.pth")
    assert_same_tensors(cs.plan("b.safetensors", list(found.lines)).check().result, state, ordered=False)


EXACT = [
    r"^b\.(\d+)\.q$ => c.{2*\1}.q",
    r"^b\.(\d+)\.k$ => c.{2*\1+1}.q",
    r"stack ^b\.{i}\.q$ => qs dim=1",
    r"unstack ^e$ => b.{i}.q start=7",
    r"concat ^(b\.\d)\.q$ ^(b\.\d)\.k$ => \1.qk dim=1",
    r"split ^(b\.\d)\.q$ => \1.q1 \1.q2 sizes=1,3",
    r"split_qkv ^(b\.\d)\.k$ => \1.x \1.y \1.z heads=2 kv=1 layout=groups",
    r"transpose k$",
    r"rearrange q$ '(a b) c -> b c a' a=2",
    r"rotary k$ pairs heads=2",
    "copy ^e$ => f",
    "pad ^e$ 1:1,2",
    r"reshape q$ -1",
    "prefix m.",
]


NUMBERS = {
    "unstack ^x$ => y.{2*i}": {"x": (4, 6)},
    "unstack ^x$ => y.{7-i}": {"x": (4, 6)},
    "unstack ^x$ => y.{i}.{i+1} dim=1": {"x": (4, 6)},
    "unstack ^x$ => y.1{i} dim=-1": {"x": (2, 12)},
    "unstack ^x$ => y.{i+5}": {"x": (1, 6)},
    r"stack ^a\.{i}$ => a": {"a.00": (2, 3), "a.01": (2, 3)},
    r"stack ^(.)\.{i}$ => \1 dim=-1 start=9": {"a.09": (2, 3), "a.10": (2, 3), "b.9": (2, 3), "b.10": (2, 3)},
    r"^(.*)$ => pre.\1": {"a b": (1,), "it's": (1,), 'say "x"': (1,), "'\"'": (1,), "é{n}": (1,), "line\nend": (1,)},
    "reshape x 3,0": {"x": (0, 3)},
    "drop => keep": {"drop": (1,), "drop.x": (1,)},
}


@pytest.mark.parametrize("rule", NUMBERS)
def test_odd_numbers_and_names_come_back(rule: str) -> None:
    """Numbers that `{i}` cannot say are put together one by one; names that hold quotes and lines are spelt out."""
    state = {key: torch.randn(shape) for key, shape in NUMBERS[rule].items()}
    rules = ["'drop' => keep" if rule.startswith("drop") else rule]
    torch.save(state, "a.pth")
    cs.remap("a.pth", "b.pth", rules, provenance=False)
    text = cs.invert(rules, "a.pth").text()
    cs.remap("b.pth", "c.pth", cs.Recipe.load(_write("back.yaml", text)))
    assert_same_tensors(torch.load("c.pth"), state, ordered=False)


def test_a_name_that_no_rule_can_make_has_no_way_back() -> None:
    torch.save({"": torch.ones(1)}, "a.pth")
    with pytest.raises(cs.PlanError, match="no way back was found"):
        cs.invert([r"^(.*)$ => pre.\1"], "a.pth")
    torch.save({"x": torch.ones(1)}, "b.pth")
    with pytest.raises(cs.PlanError, match="`scale` has no inverse"):
        cs.invert(["scale x 1e-320"], "b.pth")

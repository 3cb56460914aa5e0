"""Recipe files: what they say, what they refuse, how they are put together, and the second run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from conftest import ROOT
from helpers import assert_same_tensors
from ruamel.yaml import YAML

import ckptsurgeon as cs
from ckptsurgeon.rules import builtin_names, builtin_path
from ckptsurgeon.rules.recipe import WORDS

SCHEMA = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())

ATTENTION = r"""
# attention of the paper
version: 1
description: joined to separate
expects:
  qkv.weight: [~, -1]   # rows, columns
yields:
  q.weight: ~
variables:
  heads: {help: attention heads, config: text.num_heads}
  kv: {help: heads of the keys, default: "{heads}"}
rules:
  # one tensor into three
  - split_qkv ^qkv\.(weight)$ => q.\1 k.\1 v.\1 heads={heads} kv={kv}
"""


def _write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def _attention() -> dict[str, torch.Tensor]:
    made = {"qkv.weight": torch.randn(8 * 3, 4)}
    torch.save(made, "a.pth")
    return made


def test_variables_are_given_or_read_from_a_config_or_default() -> None:
    want = _attention()["qkv.weight"].split([8, 8, 8])
    _write("r.yaml", ATTENTION)
    Path("config.json").write_text('{"text": {"num_heads": 4}}')
    for recipe in (cs.Recipe.load("r.yaml", {"heads": 4}), cs.Recipe.load("r.yaml", config="config.json")):
        assert recipe.rules[-1].text.endswith("heads=4 kv=4")
        made = cs.plan("a.pth", recipe).check().result
        assert_same_tensors(made, dict(zip(("q.weight", "k.weight", "v.weight"), want, strict=True)))
    grouped = cs.Recipe.load("r.yaml", {"heads": 4, "kv": 1})
    shapes = [ref.shape for ref in cs.plan("a.pth", grouped).check().result.values()]
    assert shapes == [(16, 4), (4, 4), (4, 4)]


def test_a_variable_without_a_value_names_itself_its_rule_and_its_line_once() -> None:
    _write("r.yaml", ATTENTION)
    with pytest.raises(cs.RuleError) as caught:
        cs.Recipe.load("r.yaml")
    (problem,) = caught.value.problems
    assert problem.text == (
        "r.yaml, line 14: the variable 'heads' (attention heads) has no value; give --set heads=VALUE, "
        "or --config with a config.json that has 'text.num_heads'"
    )
    assert problem.rule is not None
    assert problem.rule.startswith("split_qkv")


def test_a_variable_that_the_recipe_lacks_is_refused() -> None:
    _write("r.yaml", ATTENTION)
    with pytest.raises(cs.UsageError, match="no variable 'head'; its variables: heads, kv"):
        cs.Recipe.load("r.yaml", {"head": 3})
    _write("s.yaml", "version: 1\nrules: ['reshape w {n}']\n")
    with pytest.raises(cs.RuleError, match="s.yaml, line 2: no variable is called 'n'"):
        cs.Recipe.load("s.yaml")


def test_arithmetic_on_variables_and_braces_that_are_none() -> None:
    torch.save({"b.12.w": torch.arange(12.0)}, "a.pth")
    _write(
        "r.yaml",
        "version: 1\nvariables: {dim: 6, shift: 1}\nrules:\n"
        r"  - reshape ^b\.\d{1,3}\.w$ {dim//2},{dim-2}"
        "\n"
        r"  - ^b\.(\d+)\. => c.{\1+shift}.{{x}}."
        "\n",
    )
    made = cs.plan("a.pth", cs.Recipe.load("r.yaml")).check().result
    assert {key: ref.shape for key, ref in made.items()} == {"c.13.{x}.w": (3, 4)}


def test_a_recipe_for_another_model_is_refused_before_its_rules_say_anything() -> None:
    torch.save({"qkv.weight": torch.ones(2, 3, 4), "other": torch.ones(1)}, "a.pth")
    plan = cs.plan("a.pth", cs.Recipe.load(_write("r.yaml", ATTENTION), {"heads": 2}))
    (problem,) = plan.problems
    assert problem.text == "r.yaml, line 6: 'qkv.weight' is [2, 3, 4], and [any, any] is expected"
    assert (problem.key, problem.kind) == ("qkv.weight", "expected")
    torch.save({"qkv.weights": torch.ones(2, 3)}, "b.pth")
    (problem,) = cs.plan("b.pth", cs.Recipe.load("r.yaml", {"heads": 2}), allow_unused=True).problems
    assert "the checkpoint has no such key; the nearest keys are 'qkv.weights'" in problem.text


def test_what_was_converted_is_recognised_by_the_keys_that_the_recipe_yields() -> None:
    _attention()
    recipe = cs.Recipe.load(_write("r.yaml", ATTENTION), {"heads": 4})
    cs.remap("a.pth", "b.pth", recipe, provenance=False)
    (problem,) = cs.plan("b.pth", recipe).problems
    assert problem.kind == "applied"
    assert problem.text == "r.yaml: already applied: the keys that it yields are there ('q.weight')"


def test_what_was_converted_is_recognised_by_its_provenance() -> None:
    """A transposition matches again, and would be undone."""
    torch.save({"w": torch.ones(2, 3)}, "a.pth")
    recipe = cs.Recipe.load(_write("r.yaml", "version: 1\nrules: [transpose w]\n"))
    cs.remap("a.pth", "b.safetensors", recipe)
    cs.convert("b.safetensors", "c.pth")
    for path in ("b.safetensors", "c.pth"):
        (problem,) = cs.plan(path, recipe).problems
        assert (problem.kind, "already applied" in problem.text) == ("applied", True)
    assert cs.plan("b.safetensors", ["transpose w"]).ok, "rules that are given are meant"
    back = cs.invert(recipe, "a.pth")
    cs.remap("b.safetensors", "d.safetensors", list(back.lines))
    assert cs.plan("d.safetensors", recipe).ok, "what was undone is not applied any more"


def test_what_was_converted_is_recognised_by_its_names() -> None:
    torch.save({"stem.w": torch.ones(1), "blocks.0.w": torch.ones(1)}, "a.pth")
    recipe = cs.Recipe.load(
        _write("r.yaml", "version: 1\nrules:\n  - ^conv1 => stem\n  - ^layers\\.(\\d+) => blocks.\\1\n")
    )
    (problem,) = cs.plan("a.pth", recipe).problems
    assert (problem.kind, "already applied, it seems" in problem.text) == ("applied", True)
    torch.save({"else.w": torch.ones(1)}, "b.pth")
    assert {problem.kind for problem in cs.plan("b.pth", recipe).problems} == {"unused"}


def test_a_recipe_that_expects_nothing_is_recognised_by_what_it_yields_alone() -> None:
    torch.save({"x": torch.ones(1), "z": torch.ones(1)}, "a.pth")
    recipe = cs.Recipe.load(_write("r.yaml", "version: 1\nyields: {z: ~}\nrules: [scale x 2]\n"))
    (problem,) = cs.plan("a.pth", recipe).problems
    assert problem.kind == "applied"


def test_a_rule_that_is_no_rename_and_matches_nothing_is_named() -> None:
    torch.save({"blocks.0.w": torch.ones(1), "encoder.x": torch.ones(2, 2)}, "a.pth")
    text = "version: 1\nrules:\n  - ^model\\.(.*) => blocks.\\1\n  - transpose ^encoder\\.y$\n"
    problems = cs.plan("a.pth", cs.Recipe.load(_write("r.yaml", text))).problems
    assert [problem.kind for problem in problems] == ["unused", "unused"]
    assert "nearest keys are 'encoder.x'" in problems[1].text


def test_recipes_are_put_together_by_name() -> None:
    torch.save({"module.w": torch.arange(6.0)}, "a.pth")
    Path("parts").mkdir()
    _write("parts/shape.yaml", "version: 1\nvariables: {n: ~}\nexpects: {w: [6]}\nrules: ['reshape w {n},-1']\n")
    _write(
        "r.yaml",
        "version: 1\nvariables: {rows: 3}\nrules:\n  - strip module.\n"
        "  - {recipe: parts/shape.yaml, set: {n: '{rows}'}}\n  - w => v\n",
    )
    recipe = cs.Recipe.load("r.yaml", {"rows": 2})
    assert [rule.text for rule in recipe.rules] == ["strip module.", "expect ^w$ 6", "reshape w 2,-1", "w => v"]
    assert recipe.rules[2].place.endswith("shape.yaml, line 4")
    assert cs.plan("a.pth", recipe).check().result["v"].shape == (2, 3)


def test_recipes_that_hold_themselves_or_do_not_exist() -> None:
    _write("a.yaml", "version: 1\nrules: [{recipe: b.yaml}]\n")
    _write("b.yaml", "version: 1\nrules: [{recipe: a.yaml}]\n")
    with pytest.raises(cs.InputError, match=r"b.yaml: .*line 2: a.yaml is a part of itself"):
        cs.Recipe.load("a.yaml")
    _write("c.yaml", "version: 1\nrules: [{recipe: none.yaml}]\n")
    with pytest.raises(cs.InputError, match="none.yaml: no such recipe"):
        cs.Recipe.load("c.yaml")
    with pytest.raises(cs.UsageError, match="no built-in recipe is called 'unwarp'; the nearest are unwrap"):
        cs.Recipe.load("builtin:unwarp")


def test_policies_of_a_recipe_hold_where_nothing_else_is_given() -> None:
    torch.save({"module.w": torch.ones(2), "module.x": torch.ones(1)}, "a.pth")
    torch.save({"w": torch.zeros(2), "y": torch.zeros(3)}, "like.pth")
    _write(
        "r.yaml",
        "version: 1\nrules: [strip module.]\nto: like.pth\nunexpected: drop\nmissing: init\ndtype: bf16\n",
    )
    recipe = cs.Recipe.load("r.yaml")
    made = cs.plan("a.pth", recipe).check()
    assert {key: (ref.dtype.name, ref.shape) for key, ref in made.result.items()} == {
        "w": ("bfloat16", (2,)),
        "y": ("bfloat16", (3,)),
    }
    other = cs.plan("a.pth", recipe, unexpected="keep", missing="skip").check()
    assert list(other.result) == ["w", "x"]


def test_a_recipe_names_no_code() -> None:
    for to in ("models.py:Net", "package.module:factory"):
        _write("r.yaml", f"version: 1\nrules: [strip a.]\nto: {to}\n")
        with pytest.raises(cs.RuleError, match="a recipe names no code; leave `to` out and give --to"):
            cs.Recipe.load("r.yaml")


def test_comments_survive() -> None:
    text = Path(_write("r.yaml", ATTENTION)).read_text()
    recipe = cs.Recipe.load("r.yaml", {"heads": 2})
    recipe.save("copy.yaml")
    kept = Path("copy.yaml").read_text()
    comments = [line.partition("#")[2] for line in text.splitlines() if "#" in line]
    assert kept == text
    assert len(comments) == 3
    assert cs.Recipe.load("copy.yaml", {"heads": 2}) == cs.Recipe(**{**vars(recipe), "name": "copy.yaml"})
    with pytest.raises(cs.OutputError, match="exists; --force replaces it"):
        recipe.save("copy.yaml")
    more = recipe + cs.Recipe.of(["strip a."])
    more.save("more.yaml")
    lines = Path("more.yaml").read_text().splitlines()
    assert [line.partition("#")[2] for line in lines if "#" in line] == comments
    assert [line.strip() for line in lines][-3:] == [
        "# one tensor into three",
        r"- split_qkv ^qkv\.(weight)$ => q.\1 k.\1 v.\1 heads={heads} kv={kv}",
        "- strip a.",
    ]


def test_a_recipe_made_in_python_is_written_and_read_again() -> None:
    recipe = cs.Recipe.of([r"^a\.(\d+) => b.{\1+1}", "split '^q k$' => x y sizes=1,2"])
    recipe.save("r.yaml")
    assert [rule.text for rule in cs.Recipe.load("r.yaml").rules] == [rule.text for rule in recipe.rules]


BOMB = "version: 1\nx0: &x0 [a, a]\n" + "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40))
HOSTILE = {
    BOMB: "line 2: a recipe has no anchors and aliases",
    "version: 1\nrules: !!python/name:os.system []\n": "line 2: a recipe has no tags",
    "version: 1\nrules: " + "[" * 100_000: "line 2: nested too deeply",
    "version: 1\nrules: " + "{a: " * 50_000: "line 2: nested too deeply",
    "version: 1\ndescription: " + "x" * 300_000: "at most 262144 bytes",
    "version: 1\nrules: [\x00]\n": "not YAML",
    "version: true\n": "version True of recipes is not known",
    "version: 1\nvariables: {i: 3}\n": "'i' is no name of a variable",
    "version: 1\nvariables: {n: {why: 3}}\n": "the variable 'n' has a default, or help, config and default",
    "version: 1\nseed: true\n": "`seed` is a whole number",
    "version: 1\nfit: 'yes'\n": "`fit` is true or false",
    "version: 1\nexpects: [a]\n": "`expects` is a mapping",
    "version: 1\nexpects: {a: [-2]}\n": "line 2: 'a' has a list of sizes",
    "version: 1\nexpects: {a: [x]}\n": "line 2: 'a' has a list of sizes",
    "version: 1\nrules: [{recipe: a.yaml, also: 3}]\n": "another recipe has `recipe`, a name, and `set`",
    "version: 1\nrules: ['reshape w {1//0*n}']\nvariables: {n: 2}\n": "divides by zero",
}


@pytest.mark.parametrize("text", HOSTILE, ids=list(HOSTILE.values()))
def test_a_hostile_or_broken_recipe_is_refused(text: str) -> None:
    Path("r.yaml").write_text(text)
    with pytest.raises((cs.InputError, cs.RuleError)) as caught:
        cs.Recipe.load("r.yaml")
    assert "r.yaml" in str(caught.value)
    assert HOSTILE[text] in str(caught.value)


def test_the_command_line_gives_variables_to_recipes_and_rules(ckpt: Any) -> None:
    _attention()
    _write("r.yaml", ATTENTION)
    Path("rows.txt").write_text("0 2\n5\n")
    ran = ckpt(
        "remap", "a.pth", "-o", "b.pth", "--recipe", "r.yaml", "--set", "heads=4", "--set", "rows=@rows.txt",
        "--rule", r"take ^q {rows}", "--json",
    )  # fmt: skip
    assert ran.code == 0
    assert next((one["key"], one["shape"]) for one in ran.json["result"]) == ("q.weight", [3, 4])
    assert ran.json["edges"][1] == {
        "out": "k.weight",
        "in": ["qkv.weight"],
        "rules": [r"split_qkv ^qkv\.(weight)$ => q.\1 k.\1 v.\1 heads=4 kv=4"],
    }
    for words, said in {
        ("--set", "heads"): "write NAME=VALUE",
        ("--set", "heads=1", "--set", "heads=2"): "--set heads stands twice",
        ("--set", "x=1", "--set", "heads=4"): "has no variable 'x'",
        ("--config", "none.json"): "none.json: no such config",
    }.items():
        ran = ckpt("remap", "a.pth", "--dry-run", "--recipe", "r.yaml", *words)
        assert (ran.code, said in ran.err) == (2, True), ran.err
    ran = ckpt("remap", "a.pth", "--dry-run", "--rule", "strip a.", "--set", "x=1")
    assert (ran.code, "no rule has {x} in it" in ran.err) == (2, True)


def test_tensors_of_another_checkpoint_take_part(ckpt: Any) -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    torch.save({"w": torch.zeros(3)}, "b.pth")
    ran = ckpt("remap", "a.pth", "--with", "other=b.pth", "-o", "c.pth", "--rule", r"concat ^w$ ^other\.w$ => both")
    assert ran.code == 0, ran.err
    assert_same_tensors(torch.load("c.pth"), {"both": torch.tensor([1.0, 1, 0, 0, 0])})
    proof = ["--against", "a.pth", "--with", "other=b.pth", "--rule", r"concat ^w$ ^other\.w$ => both"]
    assert ckpt("verify", "c.pth", *proof).code == 0
    for words, said in {
        ("--with", "b.pth"): "write NAME=FILE",
        ("--with", ".=b.pth"): "a name of its own",
        ("--with", "x=a.pth", "--in-place"): "moves no tensor",
    }.items():
        ran = ckpt("remap", "a.pth", *words, *([] if "--in-place" in words else ["--dry-run"]))
        assert (ran.code, said in ran.err) == (2, True), ran.err


def test_the_schema_knows_the_words_and_takes_every_built_in_recipe() -> None:
    assert set(SCHEMA["properties"]) == set(WORDS)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for name in builtin_names():
        validator.validate(YAML(typ="safe").load(Path(builtin_path(name)).read_text()))
    validator.validate(YAML(typ="safe").load(ATTENTION))
    for text in ("rules: []", "version: 2", "version: 1\nrule: []", "version: 1\nrules: [{rule: a, why: b}]"):
        assert not validator.is_valid(YAML(typ="safe").load(text)), text


def test_the_built_in_recipes_are_listed_and_printed(ckpt: Any) -> None:
    ran = ckpt("recipes", "--json")
    assert [one["name"] for one in ran.json["recipes"]] == list(builtin_names())
    assert all(one["description"] for one in ran.json["recipes"])
    ran = ckpt("recipes", "unwrap")
    assert ran.out.rstrip() == Path(builtin_path("unwrap")).read_text().rstrip()
    listed = ckpt("recipes").out
    assert all(name in listed for name in builtin_names())
    ran = ckpt("recipes", "nothing")
    assert (ran.code, "no built-in recipe is called 'nothing'" in ran.err) == (2, True)

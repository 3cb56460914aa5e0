"""The rule language: what each line says, and what is said about lines that say nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgeon as cs
from ckptsurgeon.rules import parse, parse_all, render
from ckptsurgeon.rules.tokens import quoted, words

LINES = {
    "a => b": ("rename", {"pattern": re.compile("a"), "template": "b"}),
    "a =>": ("rename", {"pattern": re.compile("a"), "template": ""}),
    "a => ''": ("rename", {"pattern": re.compile("a"), "template": ""}),
    "'a b' => \"c d\"": ("rename", {"pattern": re.compile("a b"), "template": "c d"}),
    "a => b when=target": ("rename", {"pattern": re.compile("a"), "template": "b", "when": "target"}),
    "a => when=target": ("rename", {"pattern": re.compile("a"), "template": "when=target"}),
    r"'a\.b' => x": ("rename", {"pattern": re.compile(r"a\.b"), "template": "x"}),
    "'drop' => keep": ("rename", {"pattern": re.compile("drop"), "template": "keep"}),
    "a=b => c": ("rename", {"pattern": re.compile("a=b"), "template": "c"}),
    "x=>y => z": ("rename", {"pattern": re.compile("x=>y"), "template": "z"}),
    "  strip   module.  ": ("strip", {"prefix": "module."}),
    "strip a.*": ("strip", {"prefix": "a.*"}),
    "prefix m.": ("prefix", {"prefix": "m."}),
    "prefix m. ^a": ("prefix", {"prefix": "m.", "pattern": re.compile("^a")}),
    "drop '=>'": ("drop", {"pattern": re.compile("=>")}),
    "squeeze w": ("squeeze", {"pattern": re.compile("w")}),
    "squeeze w -1,0": ("squeeze", {"pattern": re.compile("w"), "dims": (-1, 0)}),
    "reshape w 2,-1": ("reshape", {"pattern": re.compile("w"), "shape": (2, -1)}),
    "transpose w": ("transpose", {"pattern": re.compile("w")}),
    "transpose w 0,2": ("transpose", {"pattern": re.compile("w"), "dims": (0, 2)}),
    r"copy ^a => \g<0>_copy": ("copy", {"pattern": re.compile("^a"), "template": r"\g<0>_copy"}),
}


@pytest.mark.parametrize("line", LINES)
def test_what_a_line_says(line: str) -> None:
    rule = parse(line)
    assert (rule.operation.name, dict(rule.args)) == LINES[line]


BAD = {
    "": ("an empty rule", "^"),
    "a b => c": ("one pattern before `=>`", "^^^"),
    "=> b": ("the pattern before `=>` is missing", "^^"),
    "x": ("has no `=>`", "^"),
    "sqeeze w": ("did you mean `squeeze`", "^^^^^^^^"),
    "drop": ("PATTERN is missing", "    ^"),
    "drop (": ("missing )", "     ^"),
    "drop [a": ("unterminated character set", "     ^"),
    "drop a b": ("one word too many", "       ^"),
    "drop a => b": ("takes no `=>`", "       ^^"),
    "copy a": ("needs `=>`", "     ^"),
    "a => b c": ("one word too many", "       ^"),
    "a => b when=model": ("when is one of target", "            ^^^^^"),
    "a => b when=target when=target": ("stands twice", "                   ^^^^^^^^^^^"),
    "a => 'b": ("has no end", "     ^^"),
    "'a'b => c": ("a blank must follow", "^^^^"),
    r"a => \q": ("bad escape", "     ^^"),
    "squeeze w a": ("numbers with commas", "          ^"),
    "squeeze w 0,,1": ("numbers with commas", "          ^^^^"),
    "reshape w -1,-1": ("one of which may be -1", "          ^^^^^"),
    "transpose w 0,1,2": ("two dimensions are swapped", "            ^^^^^"),
    "cast w bf17": ("no dtype is named 'bf17'", "       ^^^^"),
    "strip ''": ("an empty prefix", "      ^^"),
}


@pytest.mark.parametrize("line", BAD)
def test_what_is_wrong_is_said_and_underlined(line: str) -> None:
    cause, mark = BAD[line]
    with pytest.raises(cs.RuleError) as caught:
        parse(line)
    text, shown, underline = str(caught.value).split("\n")
    assert cause in text
    assert shown == f"    {line.strip()}"
    assert underline.rstrip() == f"    {mark}"


def test_all_bad_lines_are_said_at_once() -> None:
    with pytest.raises(cs.RuleError) as caught:
        parse_all(["drop (", "strip a.", "nonsense"])
    assert [problem.rule for problem in caught.value.problems] == ["drop (", "nonsense"]


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=12)


@given(TEXTS.filter(lambda text: not ("'" in text and '"' in text)))
def test_a_quoted_word_is_one_word_again(text: str) -> None:
    (word,) = words(quoted(text))
    assert word.text == text
    assert not word.is_arrow


@given(st.sampled_from(["a", r"\d+", "x y", "drop", "=>"]), st.sampled_from(["b", "", "c d", "when=target", "=>"]))
def test_a_rendered_rename_says_the_same(pattern: str, template: str) -> None:
    args = {"pattern": re.compile(pattern), "template": template}
    rule = parse(render("rename", args))
    assert rule.operation.name == "rename"
    assert dict(rule.args) == args


RECIPE = r"""
# how the paper's weights come into ours
version: 1
description: DataParallel to plain
select: state_dict
rules:
  - strip module.
  - rule: drop ^fc\.
    note: other classes
"""


def test_a_recipe_file_is_its_rules_with_their_notes() -> None:
    Path("r.yaml").write_text(RECIPE)
    recipe = cs.Recipe.load("r.yaml")
    assert [rule.text for rule in recipe.rules] == ["strip module.", r"drop ^fc\."]
    assert recipe.rules[1].note == "other classes"
    assert (recipe.description, recipe.select) == ("DataParallel to plain", "state_dict")


BAD_RECIPES = {
    "rules: [a": "not YAML",
    "- strip a": "a YAML mapping",
    "version: 2\nrules: []": "version 2 of recipes is not known",
    "version: 1\nrule: [a]": "unknown words rule",
    "version: 1\nrules: strip a.": "`rules` is a list",
    "version: 1\nrules: []\nselect: 3": "`select` is text",
    "version: 1\nrules:\n  - strip a.\n  - drop (\n": "line 4: not a regular expression",
    "version: 1\nrules:\n  - {rule: drop a, why: b}\n": "line 3: a rule has `rule`, `note` and `optional`",
    "version: 1\nrules:\n  - 3\n": "a rule is a line of text, not",
    "version: 1\nrules:\n  - !!python/object:os.system x\n": "line 3: a recipe has no tags",
    "version: 1\nversion: 1\n": "not YAML",
}


@pytest.mark.parametrize("text", BAD_RECIPES)
def test_a_bad_recipe_names_the_file_and_the_place(text: str) -> None:
    Path("r.yaml").write_text(text)
    with pytest.raises((cs.InputError, cs.RuleError)) as caught:
        cs.Recipe.load("r.yaml")
    assert str(caught.value).startswith("r.yaml")
    assert BAD_RECIPES[text] in str(caught.value)


def test_a_recipe_that_is_not_there_or_no_file() -> None:
    import os

    os.mkfifo("fifo")
    with pytest.raises(cs.InputError, match="a regular file"):
        cs.Recipe.load("fifo")
    with pytest.raises(cs.InputError, match="no such recipe"):
        cs.Recipe.load("none.yaml")


def _made(rules: list[str], keys: dict[str, tuple[int, ...]]) -> list[str]:
    import torch

    torch.save({key: torch.ones(shape) for key, shape in keys.items()}, "a.pth")
    return list(cs.plan("a.pth", rules).check().result)


def test_layers_are_counted_anew() -> None:
    layers = {f"l.{i}.w": (1,) for i in range(6)}
    assert _made([r"^l\.(\d+) => b.{\1+1}"], layers) == [f"b.{i}.w" for i in range(1, 7)]
    assert _made([r"^l\.(?P<n>\d+) => b.{5-\g<n>}"], layers) == [f"b.{5 - i}.w" for i in range(6)]
    assert _made([r"^l\.(\d+) => b.{2*\1}.{{x}}"], layers)[-1] == "b.10.{x}.w"
    second = [r"drop ^l\.(\d+)\. where=\1%2==1", r"^l\.(\d+) => l.{\1//2}"]
    assert _made(second, layers) == ["l.0.w", "l.1.w", "l.2.w"]


def test_keys_are_chosen_by_numbers_and_sizes() -> None:
    keys = {"a.1.w": (2, 3, 1, 1), "a.2.w": (2, 3, 3, 3), "a.3.w": (2,), "b": ()}
    assert _made([r"drop . where=rank==4,d2==1"], keys) == ["a.2.w", "a.3.w", "b"]
    assert _made([r"drop \.(\d)\. where=2<=\1"], keys) == ["a.1.w", "b"]
    assert _made([r"keep \.(\d)\. where=\1>=2"], keys) == ["a.2.w", "a.3.w"]
    assert _made(["drop . where=numel>6"], keys) == ["a.1.w", "a.3.w", "b"]


ODD = {
    r"drop ^(\w) where=\1==1": "group 1 is 'a', which is no number",
    r"drop a where=\2==1": "the pattern has no group 2",
    "drop a where=d3==1": "'d3' is not known here; the names are rank, numel, d0",
    r"a\.(\d) => b.{\1-9}": r"\1-9 makes -8 of 'a.1'",
    r"a\.(\d) => b.{1//(\1-1)}": "divides by zero",
    "stack a => b": "{i} must stand in it",
    "unstack a => b": "{i} must stand in the template",
    r"stack ^a\.{i}$ => s": "'s' would have gaps: there is no number 0; with start=1 it begins there",
    r"stack ^a\.{i}$ => s start=2": "'a.1' has a number below 2",
    r"stack ^c\.{i}$ => s": r"[2] is that of the first, [3] that of number 1",
    r"concat ^a\.1$ ^c\.(\d)$ => x": "'c.0' and 'c.1' would all be one part of 'x'",
    r"concat ^c\.0$ ^d$ => x": "tensors of one dtype are joined, not of float32 and int64",
    r"concat ^c\.(\d)$ ^a\.(\d)$ => x.\1": "'c.0' would be part of 'x.0', to which `^a\\.(\\d)$` gives nothing",
    r"concat ^c\.0$ ^c\.0$ => x": "'c.0' would be two parts of 'x'",
    r"concat ^c\.0$ ^m$ => x": "cannot be joined along dimension 0",
    "concat ^c.0$ ^cc$ => x": "`^cc$` matches no key, though others do; the nearest keys are",
    r"copy ^c\.0$ => c.1": "two tensors would be named 'c.1': 'c.0' and 'c.1'",
    "fill c.0 2 zeros": "two tensors would be named 'c.0'",
    "fill x 2 eye": "eye needs two dimensions, not [2]",
    "fill x 2,2 normal dtype=int64": "normal makes fractions, and int64 holds none",
    "fill x 2 values:1": "1 values for the 2 elements of [2]",
    "expect ^nothing": "the checkpoint has no such key",
}


@pytest.mark.parametrize("rule", ODD)
def test_what_cannot_be_done_is_a_problem_that_says_why(rule: str) -> None:
    import torch

    state = {"a.1": torch.ones(2), "c.0": torch.ones(2), "c.1": torch.ones(3), "d": torch.ones(2, dtype=torch.int64)}
    torch.save({**state, "m": torch.ones(2, 2)}, "a.pth")
    try:
        problems = cs.plan("a.pth", [rule]).problems
    except cs.RuleError as error:
        problems = error.problems
    assert ODD[rule].replace("\\\\", "\\") in str(problems[0])
    assert problems[0].rule == rule


NUMBERS = {
    "fill n 2 18446744073709551615 dtype=uint64": 18446744073709551615,
    "fill n 2 9007199254740993 dtype=int64": 9007199254740993,
    "fill n 2 values:9007199254740993,1 dtype=int64": 9007199254740993,
    "fill n 2 1e30 dtype=int64": "which is what int64 holds",
    "fill n 2 300 dtype=uint8": "300 is not between 0 and 255",
    "fill n 2 -1 dtype=uint8": "-1 is not between 0 and 255",
    "fill n 2 5 dtype=bool": "5 is not between 0 and 1",
    "fill n 2 1e39": "which is what float32 holds",
    "fill n 2 70000 dtype=f16": "70000 is not between -65504.0 and 65504.0",
    "fill n 2 1e400": "more than a number can be",
    "fill n 2 normal:-1": "a deviation is no less than 0",
    "fill n 2 trunc_normal:0": "that of trunc_normal more",
    "fill n 2 uniform:5,1": "the lower bound comes first",
    "fill n 2 zeros seed=-1": "a seed is a whole number from 0",
    "fill n 100000000000000,10000000000 zeros": "bytes, over 17,592,186,044,416",
    "pad u 2 value=300": "300 is not between 0 and 255",
    "clamp u min=-1": "-1 is not between 0 and 255",
    "clamp f min=2 max=1": "min=2 is more than max=1",
    "add w 1": "torch does no such arithmetic on uint16",
    "rearrange f '(a b) c -> a b c' a=-2": "the axis a=-2 has no such size",
    "rearrange f '(a b) c -> a b c' a=0": "the axis a=0 has no such size",
    r"(f) => b.{2\1}": "is no arithmetic on whole numbers",
    r"(f) => b.{0x10}": "'0x10' in '0x10' is no whole number",
    r"(f) => b.{1==1}": "is a condition, and a name is made of a number",
}


@pytest.mark.parametrize("rule", NUMBERS)
def test_a_number_is_what_it_says_or_is_refused(rule: str) -> None:
    import torch

    state = {"f": torch.ones(4, 6), "u": torch.arange(6, dtype=torch.uint8), "w": torch.ones(2).to(torch.uint16)}
    torch.save(state, "a.pth")
    want = NUMBERS[rule]
    if isinstance(want, int):
        assert cs.plan("a.pth", [rule]).check().result["n"].read()[0].item() == want
        return
    with pytest.raises((cs.PlanError, cs.RuleError)) as caught:
        cs.plan("a.pth", [rule]).check()
    assert want in str(caught.value)


def test_arithmetic_that_comes_to_more_than_the_dtype_holds_is_no_number() -> None:
    import torch

    torch.save({"f": torch.tensor([1e38, 3e38, float("inf")]), "u": torch.tensor([7, 250], dtype=torch.uint8)}, "a.pth")
    for rule, dtype in (("scale f 10", "float32"), ("add u 6", "uint8"), ("scale u 2", "uint8")):
        with pytest.raises(cs.InputError, match=f"'.': comes to more than torch.{dtype} holds; cast it"):
            cs.remap("a.pth", "b.pth", [rule])
    assert cs.plan("a.pth", ["scale f 0.5"]).result["f"].read().tolist()[2] == float("inf"), "what was infinite stays"


GROWING = [
    ["tie ^x$ => xx", "concat ^x$ ^xx$ => x"] * 40,
    ["copy ^x$ => xx", "average ^x$ ^xx$ => x"] * 40,
    ["slice ^x$ 0:0", "reshape ^x$ 99999,99999,0", r"unstack ^x$ => q{i}", r"unstack ^q(\d+)$ => r\1.{i}"],
    [rf"copy ^(.*)$ => \1{letter}" for letter in "abcdefghijklmnopqrstuv"],
    ["scale ^x$ 1"] * 300,
]


@pytest.mark.parametrize("rules", GROWING, ids=lambda rules: rules[-1])
def test_rules_that_grow_without_end_are_stopped(rules: list[str]) -> None:
    """The same text by a file's provenance would else take all memory."""
    import torch

    torch.save({"x": torch.arange(24.0).reshape(4, 6)}, "a.pth")
    problem = cs.plan("a.pth", rules).problems[0]
    assert re.search(r"more than \d+ (names|pieces|steps)", problem.text), problem


EXPRESSIONS = [
    "__import__('os')",
    "a.b",
    "1 if 2 else 3",
    "[1]",
    "'x'",
    "1.5",
    "2**9",
    "1<2<3",
    "x" * 300,
    "f()",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_nothing_but_arithmetic_is_an_expression(text: str) -> None:
    with pytest.raises(cs.RuleError):
        parse(f"drop a where={text.replace(' ', '')}")


def test_a_rule_that_may_match_nothing() -> None:
    assert _made(["drop nothing optional=yes", "w => v"], {"w": (1,)}) == ["v"]
    with pytest.raises(cs.RuleError, match="one word too many"):
        parse("expect w 1 optional=yes")


def test_a_collision_names_both_makers_and_what_they_were() -> None:
    import torch

    torch.save({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, "a.pth")
    (problem,) = cs.plan("a.pth", ["a => x", "concat ^b$ ^c$ => y", "y => x"]).problems
    assert "two tensors would be named 'x': 'x' (made of 'a') and 'y' (made of 'b', 'c')" in problem.text


def test_keys_that_must_not_be_there() -> None:
    assert _made(["refuse nothing", "w => v"], {"w": (1,)}) == ["v"]
    import torch

    torch.save({"w": torch.ones(1), "lora.x": torch.ones(1)}, "a.pth")
    (problem,) = cs.plan("a.pth", ["refuse lora", "nothing => x"]).problems
    assert "'lora.x' is there, and must not be" in problem.text

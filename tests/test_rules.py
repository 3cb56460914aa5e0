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

"""Merged names are truthful: they stand for exactly their members."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.report.grouping import group

CASES = {
    "holes are listed": (
        [f"layers.{i}.w" for i in range(12) if i != 6],
        ["layers.{0-5,7-11}.w"],
    ),
    "a full product is one name": (
        [f"layer{i}.{j}.w" for i in range(1, 5) for j in range(2)],
        ["layer{1-4}.{0-1}.w"],
    ),
    "a product with a hole is not printed as one": (
        ["a.0.0", "a.0.1", "a.1.0"],
        ["a.0.{0-1}", "a.1.0"],
    ),
    "numbers with leading zeros are text": (["a.01.w", "a.1.w", "a.2.w"], ["a.01.w", "a.{1-2}.w"]),
    "a number at the end and at the start": (["0.w", "1.w", "x1", "x2"], ["{0-1}.w", "x{1-2}"]),
    "no numbers": (["a.w", "b.w"], ["a.w", "b.w"]),
    "ten comes after two": ([f"l.{i}" for i in range(11)], ["l.{0-10}"]),
}


@pytest.mark.parametrize("case", CASES)
def test_names(case: str) -> None:
    keys, names = CASES[case]
    assert [merged.name for merged in group((key, None) for key in keys)] == names


def test_only_equal_labels_are_merged() -> None:
    found = group([("a.0", "x"), ("a.1", "y"), ("a.2", "x")])
    assert [(merged.name, merged.label) for merged in found] == [("a.{0,2}", "x"), ("a.1", "y")]


def expand(name: str) -> list[str]:
    """The keys that a merged name stands for."""
    parts = re.split(r"\{([\d,-]+)\}", name)
    choices: list[list[str]] = []
    for at, part in enumerate(parts):
        if at % 2 == 0:
            choices.append([part])
            continue
        values: list[str] = []
        for piece in part.split(","):
            first, _, last = piece.partition("-")
            values += [str(i) for i in range(int(first), int(last or first) + 1)]
        choices.append(values)
    return ["".join(combination) for combination in product(*choices)]


KEYS = st.lists(
    st.lists(st.sampled_from(["a", "b", "layer"]) | st.integers(0, 4).map(str), min_size=1, max_size=4).map(".".join),
    unique=True,
    max_size=40,
)


@given(KEYS)
def test_merged_names_stand_for_exactly_the_keys_once_each(keys: list[str]) -> None:
    merged = group((key, None) for key in keys)
    assert sorted(key for one in merged for key in expand(one.name)) == sorted(keys)
    for one in merged:
        assert sorted(expand(one.name)) == sorted(one.keys)

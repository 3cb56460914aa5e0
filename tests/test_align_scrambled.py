"""The aligner on scrambled models: it is right or it asks, and where names tell everything it seldom asks.

`ALIGN_SCRAMBLES=2000` tries so many."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from scramble import Scrambled, aligned, scrambles

COUNT = int(os.environ.get("ALIGN_SCRAMBLES", "150"))
LEAST = 0.85
"""The part of those that names tell which must be solved."""
Answer = tuple[Scrambled, str, str]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    folder = tmp_path_factory.mktemp("scrambles")
    return [(scrambled, *aligned(scrambled, folder)) for scrambled in scrambles(COUNT)]


def test_it_is_never_wrong(answers: list[Answer]) -> None:
    assert [f"{why}: {scrambled}" for scrambled, verdict, why in answers if verdict == "wrong"] == []


def test_what_names_tell_is_solved(answers: list[Answer]) -> None:
    told = Counter(verdict for scrambled, verdict, _ in answers if scrambled.decidable == "names")
    asked = [
        str(scrambled) for scrambled, verdict, _ in answers if verdict == "asked" and scrambled.decidable == "names"
    ]
    assert told["solved"] >= LEAST * told.total(), "\n".join(asked)

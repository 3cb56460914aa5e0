"""A question is worth its answer: who gives one of the lines that it names gets on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from align_traps import traps

import ckptsurgeon as cs

NUMBERS: Mapping[str, str] = {"heads=N": "heads=2", "kv=N": "kv=1"}
"""What the user knows."""
ANSWERED = (
    "a new head and a projector of its shape",
    "a new head and the centres of a loss",
    "two heads",
    "queries, keys and values of neutral names",
    "norms of neutral names",
    "gate and up of neutral names",
    "mix into three",
    "three into mix",
    "query_key_value into three",
    "three into query_key_value",
    "wqkv of grouped queries",
    "Meta's Llama",
    "square kernels",
    "generator and discriminator",
)
MOST = 8


def answered(answer: str) -> tuple[list[str], list[str]]:
    """The hints and the rules in a line."""
    for unknown, known in NUMBERS.items():
        answer = answer.replace(unknown, known)
    words = shlex.split(answer.partition(", if ")[0].replace(" if not", "").replace(" if so", ""))
    given = list(zip(words[::2], words[1::2], strict=True))
    return [word for name, word in given if name == "--hint"], [word for name, word in given if name == "--rule"]


@pytest.mark.parametrize("trap", [trap for trap in traps() if trap.name in ANSWERED], ids=lambda trap: trap.name)
def test_every_first_answer_leads_on(trap: Any) -> None:
    torch.save(trap.source, "a.pth")
    torch.save(trap.target, "b.pth")
    hints: list[str] = []
    rules: list[str] = []
    asked: list[str] = []
    for _ in range(MOST):
        found = cs.align("a.pth", "b.pth", rules, hints=hints)
        if not found.questions:
            break
        asked.append(found.questions[0].text)
        more, lines = answered(found.questions[0].answers[0])
        hints, rules = hints + more, rules + lines
    assert not found.questions, "\n".join([*asked, *map(str, found.questions)])
    assert found.plan(fit=True).ok

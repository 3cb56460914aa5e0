"""Where nothing tells what belongs where, the aligner is not certain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from align_traps import Trap, traps
from scramble import skeleton

import ckptsurgeon as cs

TRAPS = traps()


def certain(source: Path, target: object) -> bool:
    """Whether the aligner would go on by itself; an error that says why is an answer too."""
    try:
        return cs.align(source, target).certain
    except cs.CkptError:
        return False


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
@pytest.mark.parametrize("kind", ["module", "file"])
def test_no_guess(trap: Trap, kind: str, tmp_path: Path) -> None:
    """A model and a file are alike: neither tells more than names and shapes."""
    torch.save(trap.source, tmp_path / "source.pth")
    torch.save(trap.target, tmp_path / "target.pth")
    target = skeleton(trap.target) if kind == "module" else tmp_path / "target.pth"
    assert not certain(tmp_path / "source.pth", target), trap.why

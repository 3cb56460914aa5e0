"""In-place changes that are killed, and the files that they are done to; the files are made by safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
STEPS = ("open", "pwrite", "fsync", "replace", "rename", "ftruncate", "unlink")
FILE, INDEX = "m/a.safetensors", "m/model.safetensors.index.json"
TENSORS = {f"module.{key}": torch.randn(5, 3) for key in "abcdef"}


def shard(number: int) -> str:
    return f"model-{number:05}-of-00003.safetensors"


def one_file() -> None:
    os.makedirs("m")
    save_file(TENSORS, FILE)


def three_shards() -> None:
    """Two tensors in each, in order."""
    os.makedirs("m")
    place = {}
    for number, keys in ((1, "ab"), (2, "cd"), (3, "ef")):
        save_file({f"module.{key}": TENSORS[f"module.{key}"] for key in keys}, f"m/{shard(number)}")
        place |= {f"module.{key}": shard(number) for key in keys}
    total = sum(value.nbytes for value in TENSORS.values())
    Path(INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": place}))


def left(keys: str) -> State:
    return {key: TENSORS[f"module.{key}"] for key in keys}


def hidden() -> list[str]:
    return [name for name in os.listdir("m") if name.startswith(".")]


class Killed(BaseException):
    """The process is gone: from here on it changes nothing."""


def killed(do: Callable[[], Any], number: int, torn: float | None = None) -> bool:
    """Do it up to its `number`-th step that could change the disk; that one and all later ones are not done, as if
    the process had been killed (`test_killed_at_random_moments` kills it).  A write is done in part before, where
    `torn` is given.  False when it has fewer steps."""
    count = 0

    def step(name: str, real: Callable[..., Any], *args: Any, **how: Any) -> Any:
        nonlocal count
        count += 1
        if count == number and name == "pwrite" and torn is not None:
            real(args[0], bytes(args[1])[: int(len(args[1]) * torn)], args[2])
        if count >= number:
            raise Killed
        return real(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            real = getattr(os, name)
            patch.setattr(os, name, lambda *args, n=name, r=real, **how: step(n, r, *args, **how))
        try:
            do()
        except Killed:
            return True
    return False

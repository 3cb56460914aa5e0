"""An in-place change that is killed at any moment leaves the old or the new checkpoint, never a mixture."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, bits
from interrupted import FILE, INDEX, TENSORS, State, hidden, killed, left, one_file, three_shards
from safetensors.torch import load_file

import ckptsurgeon as cs

CASES: dict[str, tuple[Callable[[], None], str, list[str], State]] = {
    "a rename": (one_file, FILE, ["strip module."], left("abcdef")),
    "a drop at the end": (one_file, FILE, ["strip module.", "drop [ef]"], left("abcd")),
    "a drop at the beginning": (one_file, FILE, ["strip module.", "drop [ab]"], left("cdef")),
    "a drop at both ends": (one_file, FILE, ["strip module.", "drop [af]"], left("bcde")),
    "shards": (three_shards, INDEX, ["strip module.", "drop [aef]"], left("bcd")),
    "shards, renamed": (three_shards, INDEX, ["strip module."], left("abcdef")),
}


def truth(path: str) -> State:
    """What safetensors loads; of shards by an independent reading of the index."""
    if path == FILE:
        return load_file(path)
    place = json.loads(Path(path).read_text())["weight_map"]
    held = {name: load_file(f"m/{name}") for name in set(place.values())}
    assert sum(len(tensors) for tensors in held.values()) == len(place)
    assert set(os.listdir("m")) == {os.path.basename(path), *held}
    return {key: held[name][key] for key, name in place.items()}


def same(got: Mapping[str, torch.Tensor], want: State) -> bool:
    return set(got) == set(want) and all(torch.equal(bits(got[key]), bits(want[key])) for key in want)


def which(path: str, new: State) -> str:
    """Whether the checkpoint is the old or the new one, as this package reads it, values too."""
    state = cs.open(path).state_dict()
    assert same(state, TENSORS) or same(state, new), sorted(state)
    return "old" if same(state, TENSORS) else "new"


def fresh(make: Callable[[], None]) -> None:
    shutil.rmtree("m", ignore_errors=True)
    make()


def content() -> frozenset[tuple[str, bytes]]:
    """All that a kill left: where it is as before, so is what comes of it (a wait for the disk changes nothing)."""
    return frozenset((file.name, file.read_bytes()) for file in Path("m").iterdir())


def check_repaired(path: str, rules: list[str], new: State) -> str:
    """What is there counts before and after a repair, and the next change in place repairs by itself."""
    found = which(path, new)
    shutil.copytree("m", "copy")
    verified = cs.verify(path, repair=True)
    assert verified.ok
    assert hidden() == []
    assert same(truth(path), TENSORS if found == "old" else new)
    assert which(path, new) == found
    assert cs.open(path).remarks == ()
    shutil.rmtree("m")
    shutil.copytree("copy", "m")
    shutil.rmtree("copy")
    cs.remap_in_place(path, rules, allow_unused=True)
    assert hidden() == []
    assert same(truth(path), new)
    return found


@pytest.mark.parametrize("torn", [None, 0.0, 0.3, 0.9], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_killed_before_each_step_it_is_the_old_or_the_new_checkpoint(case: str, torn: float | None) -> None:
    make, path, rules, new = CASES[case]
    seen, number = [], 0
    known: dict[object, str] = {}
    while True:
        number += 1
        fresh(make)
        if not killed(lambda: cs.remap_in_place(path, rules), number, torn):
            break
        now = content()
        known[now] = known.get(now) or check_repaired(path, rules, new)
        seen.append(known[now])
    assert seen == sorted(seen, reverse=True), "the old one, from some step on the new one"
    assert {"old", "new"} == set(seen)
    assert number > 12
    assert hidden() == []
    assert same(truth(path), new)


@pytest.mark.no_cover
@pytest.mark.parametrize("case", CASES)
def test_a_repair_that_is_killed_can_be_repaired(case: str) -> None:
    make, path, rules, new = CASES[case]
    number, checked, known = 0, 0, set[object]()
    while True:
        number += 1 if path == FILE else 4
        fresh(make)
        if not killed(lambda: cs.remap_in_place(path, rules), number, 0.5):
            break
        if content() in known:
            continue
        known.add(content())
        mended = set[object]()
        shutil.rmtree("begun", ignore_errors=True)
        shutil.copytree("m", "begun")
        found, again = which(path, new), 0
        while True:
            again += 1
            shutil.rmtree("m")
            shutil.copytree("begun", "m")
            if not killed(lambda: cs.verify(path, repair=True), again, 0.5):
                break
            checked += 1
            if content() in mended:
                continue
            mended.add(content())
            assert which(path, new) == found
            cs.verify(path, repair=True)
            assert hidden() == []
            assert same(truth(path), TENSORS if found == "old" else new)
    assert checked > 50


def in_a_child(do: Callable[[], Any]) -> int:
    """The pid of a fork that does it, and ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of torch are not touched in the child
        pid = os.fork()
    if pid == 0:
        try:
            do()
        finally:
            os._exit(0)
    return pid


@pytest.mark.no_cover
@pytest.mark.parametrize("case", ["a drop at both ends", "shards"])
def test_killed_at_random_moments_it_is_the_old_or_the_new_checkpoint(case: str) -> None:
    make, path, rules, new = CASES[case]
    fresh(make)
    began = time.monotonic()
    os.waitpid(in_a_child(lambda: cs.remap_in_place(path, rules)), 0)
    length = time.monotonic() - began
    chance, seen = random.Random(case), set()
    for _ in range(100):
        fresh(make)
        pid = in_a_child(lambda: cs.remap_in_place(path, rules))
        time.sleep(chance.random() * length * 1.2)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.add(check_repaired(path, rules, new))
    assert seen == {"old", "new"}


def test_a_header_torn_at_any_byte_is_read_as_the_old_one() -> None:
    """A write may reach the disk in pieces of any size and order."""
    fresh(one_file)
    old = Path(FILE).read_bytes()
    number = 0
    while True:
        number += 1
        fresh(one_file)
        assert killed(lambda: cs.remap_in_place(FILE, ["strip module.", "drop [af]"]), number)
        if Path(FILE).read_bytes() != old:
            break
    new, chance = Path(FILE).read_bytes(), random.Random(0)
    assert len(new) == len(old)
    differing = [at for at in range(len(old)) if old[at] != new[at]]
    assert len(differing) > 8
    tries = [set(differing[:cut]) for cut in range(0, len(differing), 3)]
    tries += [set(chance.sample(differing, len(differing) // 2)) for _ in range(50)]
    for fresh_bytes in tries:
        Path(FILE).write_bytes(bytes(new[at] if at in fresh_bytes else old[at] for at in range(len(old))))
        assert_same_tensors(cs.open(FILE), TENSORS)
        assert "was interrupted" in cs.open(FILE).remarks[0]
    assert cs.verify(FILE, repair=True).repaired == (
        f"{os.path.realpath(FILE)}: an in-place change was interrupted, and is taken back",
    )
    assert Path(FILE).read_bytes() == old

"""Several processes at one checkpoint: one writer wins whole, the others are told; readers see the old or the new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faulty import in_a_child, tree
from safetensors.torch import load_file, save_file
from test_faults import visible
from test_machine import said_in_a_child

import ckptsurgeon as cs

KEYS = 6


def constant(value: float) -> dict[str, torch.Tensor]:
    return {f"l{i}": torch.full((10_000,), value) for i in range(KEYS)}


def value_of(state: Any) -> float:
    """The one value of all tensors: another one would be a mixture."""
    assert len(state) == KEYS
    found = {float(edge) for tensor in state.values() for edge in (tensor.min(), tensor.max())}
    assert len(found) == 1, found
    return found.pop()


def together(*tasks: Callable[[], Any]) -> list[str]:
    """What each says that is done in a process of its own, all beginning at once."""
    gate, go = os.pipe()
    results = []

    def run(do: Callable[[], Any], out: int) -> None:
        os.close(go)
        os.read(gate, 1)  # until it is closed
        try:
            do()
        except cs.CkptError as error:
            os.write(out, str(error).encode())

    for do in tasks:
        read, write = os.pipe()
        results.append((in_a_child(lambda do=do, write=write: run(do, write)), read))
        os.close(write)
    os.close(go)
    os.close(gate)
    said = []
    for pid, read in results:
        with os.fdopen(read, "rb") as file:
            said.append(file.read().decode())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "an error that is none of ours"
    return said


@pytest.fixture(autouse=True)
def _sources() -> None:
    for value in (1, 2, 3):
        torch.save(constant(value), f"{value}.pth")


OUTPUTS: dict[str, dict[str, Any]] = {
    "o/b.pth": {},
    "o/": {"shard_size": 50_000},
    "o/new/": {"shard_size": 50_000},
}
ROUNDS = 5


def fresh() -> None:
    shutil.rmtree("o", ignore_errors=True)
    os.mkdir("o")


def convert(value: int, output: str, **how: Any) -> Callable[[], Any]:
    return lambda: cs.convert(f"{value}.pth", output, **OUTPUTS.get(output, {}), **how)


@pytest.mark.parametrize("output", OUTPUTS)
def test_of_two_writers_one_wins_whole_and_the_other_is_told(output: str) -> None:
    for _ in range(ROUNDS):
        fresh()
        said = together(convert(1, output), convert(2, output))
        assert sorted(map(bool, said)) == [False, True], said
        assert "--force replaces it" in "".join(said)
        assert "\n" not in "".join(said)
        assert value_of(cs.open(output).state_dict()) == said.index("") + 1
        assert visible(tree("o")) == tree("o")


@pytest.mark.parametrize("output", OUTPUTS)
def test_of_three_that_may_replace_it_one_is_there_whole(output: str) -> None:
    """With another number of shards each: none of the others stays."""
    for _ in range(ROUNDS):
        fresh()
        convert(3, output)()
        said = together(
            convert(1, output, force=True),
            convert(2, output, force=True),
            lambda: cs.convert("3.pth", output, force=True, **{key: 2 * size for key, size in OUTPUTS[output].items()}),
        )
        assert said == ["", "", ""]
        assert value_of(cs.open(output).state_dict()) in (1, 2, 3)
        assert cs.verify(output.rstrip("/")).ok
        assert visible(tree("o")) == tree("o")


@pytest.mark.parametrize("output", ["o/b.pth", "o/b.safetensors", "o/"])
def test_readers_of_what_is_replaced_see_the_old_or_the_new(output: str) -> None:
    """By torch and safetensors too, where it is one file; of shards they may be told to come again."""
    fresh()
    convert(1, output)()
    pid = in_a_child(lambda: [convert(1 + turn % 3, output, force=True)() for turn in range(45)])
    seen, told = set(), 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        try:
            seen.add(value_of(cs.open(output).state_dict()))
        except cs.InputError as error:
            told += 1
            assert any(
                words in str(error)
                for words in ("changed", "taking their places", "o such file", "not there", "without a checkpoint")
            ), error
        if output == "o/b.pth":
            seen.add(value_of(torch.load(output, weights_only=True)))
        elif output == "o/b.safetensors":
            seen.add(value_of(load_file(output)))
    assert len(seen) > 1
    assert seen <= {1, 2, 3}
    assert value_of(cs.open(output).state_dict()) == 3


@pytest.mark.parametrize("sharded", [False, True])
def test_of_two_changes_in_place_each_is_made_or_told(sharded: bool) -> None:
    """The one that comes later finds other names, or is told that the first is at it; the checkpoint is whole."""
    path = "m/model.safetensors.index.json" if sharded else "m/a.safetensors"
    for _ in range(ROUNDS):
        shutil.rmtree("m", ignore_errors=True)
        os.mkdir("m")
        if sharded:
            cs.convert("1.pth", "m/", shard_size=50_000)
        else:
            save_file({f"{key}.weight": value for key, value in constant(1).items()}, path)
        rules = (["l => a"], ["l => b"])
        said = together(*[lambda rule=rule: cs.remap_in_place(path, rule) for rule in rules])
        assert said.count("") == 1, said
        for words in filter(None, said):
            assert any(
                text in words for text in ("under way", "changed", "interrupted just now", "matches no key", "just now")
            ), words
        names = {key[0] for key in cs.open(path)}
        assert names in ({"a"}, {"b"})
        assert value_of(cs.open(path).state_dict()) == 1
        assert visible(tree("m")) == tree("m")


def test_readers_of_what_is_changed_in_place_see_the_old_or_the_new() -> None:
    """The names of all shards change; never are some of both read."""
    cs.convert("1.pth", "m/", shard_size=50_000)
    index = "m/model.safetensors.index.json"

    def change() -> None:
        for turn in range(40):
            cs.remap_in_place(index, ["^l => k"] if turn % 2 == 0 else ["^k => l"])

    pid, seen = in_a_child(change), set()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        try:
            found = cs.open("m")
        except cs.InputError as error:
            assert "changed while it was opened" in str(error), error
            continue
        names = {key[0] for key in found}
        assert len(names) == 1
        seen |= names
    assert seen <= {"l", "k"}
    assert seen
    assert value_of(cs.open("m").state_dict()) == 1


def test_shards_that_are_written_while_another_run_stages_its_own() -> None:
    """What a living run has staged is left to it."""
    fresh()
    gate, go = os.pipe()
    ready, begun = os.pipe()

    def slow() -> None:
        def wait(done: int, total: int) -> None:
            os.write(begun, b"x")
            os.read(gate, 1)

        cs.convert("1.pth", "o/", shard_size=50_000, force=True, jobs=1, progress=wait)

    pid = in_a_child(slow)
    assert os.read(ready, 1) == b"x"
    assert said_in_a_child(convert(2, "o/")) == ""
    staged = [name for name in tree("o") if name.startswith(".") and name.endswith(".part/")]
    assert len(staged) == 1
    assert value_of(cs.open("o").state_dict()) == 2
    os.write(go, b"x" * 100)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert value_of(cs.open("o").state_dict()) == 1
    assert visible(tree("o")) == tree("o")

"""Surgeries in any order are what a dict of tensors says: a model in memory beside a checkpoint on the disk.

Every step is done to both; the file is then read by torch or safetensors, not by us, and compared bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, bits
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from interrupted import killed
from safetensors.torch import load_file
from strategies import KEYS, WORDS, state_dicts

import ckptsurgeon as cs
from ckptsurgeon.formats import _tensors

State = OrderedDict[str, torch.Tensor]
PLACES = ("a.pth", "b.bin", "c.safetensors", "d/model.safetensors.index.json", "e/pytorch_model.bin.index.json")
"""Where a checkpoint may be: files and shards of both formats."""
EXACT = {torch.float16: "float32", torch.bfloat16: "float32", torch.float32: "float64"}
"""Casts that lose nothing."""
SHARD = 64


def loaded(place: str) -> dict[str, torch.Tensor]:
    """What other readers find there."""
    if place.endswith(".index.json"):
        folder = os.path.dirname(place)
        made: dict[str, torch.Tensor] = {}
        with open(place) as file:
            for name in set(json.load(file)["weight_map"].values()):
                made |= loaded(os.path.join(folder, name))
        return made
    if place.endswith(".safetensors"):
        return load_file(place)
    return dict(torch.load(place, weights_only=True))


def written(to: str) -> dict[str, Any]:
    """How it is written there: in several small shards, where there are shards."""
    return {"force": True, "jobs": 1, **({"shard_size": SHARD} if to.endswith(".json") else {})}


def same(got: dict[str, torch.Tensor], want: State) -> bool:
    try:
        assert_same_tensors(got, want, ordered=False)
    except AssertionError:
        return False
    return True


class Surgeries(RuleBasedStateMachine):
    """`state` is what the checkpoint at `place` must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.above = os.getcwd()
        self.folder = tempfile.mkdtemp()
        os.chdir(self.folder)
        os.mkdir("d")
        os.mkdir("e")
        self.place = "a.pth"
        self.state: State = OrderedDict()

    def teardown(self) -> None:
        os.chdir(self.above)
        shutil.rmtree(self.folder)

    @initialize(state=state_dicts())
    def begin(self, state: dict[str, torch.Tensor]) -> None:
        self.state = OrderedDict(state)
        torch.save(self.state, self.place)

    # what a surgery does to the names

    def renamed(self, change: Callable[[str], str]) -> State:
        return OrderedDict((change(key), value) for key, value in self.state.items())

    def carried_out(self, line: str, new: State, to: str) -> None:
        """By a copy to `to`, over what may be there; what the rule makes of no key, or of two, is a problem."""
        if len(new) < len(self.state) and not line.startswith("drop"):
            before = self.seen()
            with pytest.raises(cs.PlanError):
                cs.remap(self.place, to, [line], force=True)
            assert self.seen() == before
            return
        cs.remap(self.place, to, [line], allow_unused=True, **written(to))
        self.place, self.state = to, new

    def seen(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}

    @rule(word=WORDS, to=st.sampled_from(PLACES))
    def prefix(self, word: str, to: str) -> None:
        self.carried_out(f"prefix {word}.", self.renamed(lambda key: f"{word}.{key}"), to)

    @rule(data=st.data(), to=st.sampled_from(PLACES))
    def strip(self, data: st.DataObject, to: str) -> None:
        first = data.draw(st.sampled_from(list(self.state))).partition(".")[0] + "."
        new = self.renamed(lambda key: key.removeprefix(first))
        if "" not in new:
            self.carried_out(f"strip {first}", new, to)

    @rule(data=st.data(), name=KEYS, to=st.sampled_from(PLACES))
    def rename(self, data: st.DataObject, name: str, to: str) -> None:
        old = data.draw(st.sampled_from(list(self.state)))
        self.carried_out(f"'^{re.escape(old)}$' => {name}", self.renamed(lambda key: name if key == old else key), to)

    @precondition(lambda self: len(self.state) > 1)
    @rule(data=st.data(), to=st.sampled_from(PLACES))
    def drop(self, data: st.DataObject, to: str) -> None:
        gone = data.draw(st.sampled_from(list(self.state)))
        new = OrderedDict((key, value) for key, value in self.state.items() if key != gone)
        self.carried_out(f"drop ^{re.escape(gone)}$", new, to)

    @rule(data=st.data(), to=st.sampled_from(PLACES))
    def cast(self, data: st.DataObject, to: str) -> None:
        key = data.draw(st.sampled_from(list(self.state)))
        dtype = EXACT.get(self.state[key].dtype)
        if dtype is not None:
            new = self.state.copy()
            new[key] = new[key].to(getattr(torch, dtype))
            self.carried_out(f"cast ^{re.escape(key)}$ {dtype}", new, to)

    @rule(to=st.sampled_from(PLACES))
    def convert(self, to: str) -> None:
        cs.convert(self.place, to, **written(to))
        self.place = to

    @rule(to=st.sampled_from(PLACES))
    def convert_without_force(self, to: str) -> None:
        """What is there stays as it is."""
        if os.path.exists(to):
            before = self.seen()
            with pytest.raises(cs.OutputError, match="--force"):
                cs.convert(self.place, to, **written(to) | {"force": False})
            assert self.seen() == before
        else:
            self.convert(to)

    @precondition(lambda self: "safetensors" in self.place)
    @rule(data=st.data(), name=KEYS)
    def in_place(self, data: st.DataObject, name: str) -> None:
        """It is done, or the files are as they were."""
        old = data.draw(st.sampled_from(list(self.state)))
        new, before = self.renamed(lambda key: name if key == old else key), self.seen()
        try:
            cs.remap_in_place(self.place, [f"'^{re.escape(old)}$' => {name}"])
        except cs.PlanError:
            assert self.seen() == before
        else:
            assert len(new) == len(self.state)
            self.state = new

    @precondition(lambda self: not self.place.endswith(".json"))
    @rule(number=st.integers(1, 30), word=WORDS)
    def interrupted(self, number: int, word: str) -> None:
        """Killed before any step, a file that is written anew over itself is the old or the new one, and can be written
        again."""
        new, line = self.renamed(lambda key: f"{word}.{key}"), f"prefix {word}."
        place, old = self.place, self.state
        killed(lambda: cs.remap(place, place, [line], force=True, jobs=1), number)
        found = loaded(place)
        assert same(found, old) or same(found, new)
        self.state = old if same(found, old) else new
        cs.convert(place, place, force=True, jobs=1)

    @precondition(lambda self: self.place.endswith("c.safetensors"))
    @rule(number=st.integers(1, 30), word=WORDS)
    def interrupted_in_place(self, number: int, word: str) -> None:
        new, line, place, old = self.renamed(lambda key: f"{word}.{key}"), f"prefix {word}.", self.place, self.state
        try:
            killed(lambda: cs.remap_in_place(place, [line]), number, 0.5)
        except cs.PlanError:
            return
        ckpt = cs.open(place)
        self.state = old if set(ckpt) == set(old) else new
        assert_same_tensors(ckpt, self.state, ordered=False)
        assert cs.verify(place, repair=True).ok

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A changed byte of a torch file is found, or changes nothing; a cut is always found."""
        if self.place.endswith(".json"):
            return
        raw = bytearray(Path(self.place).read_bytes())
        at = data.draw(st.integers(0, len(raw) - 1))
        Path("cut").write_bytes(raw[:at])
        with pytest.raises(cs.InputError, match=r"^cut: "):
            cs.open("cut")
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
        Path("flipped").write_bytes(raw)
        try:
            verified = cs.verify("flipped")
            found = cs.open("flipped").state_dict()
        except cs.InputError as error:
            assert str(error).startswith("flipped: ")
        else:
            assert not verified.ok or self.place.endswith(".safetensors") or same(found, self.state)
        finally:
            os.unlink("flipped")
            os.unlink("cut")

    @invariant()
    def is_what_the_model_says(self) -> None:
        """To other readers and to us, whole, and with nothing left beside it."""
        if not self.state:
            return
        assert_same_tensors(loaded(self.place), self.state, ordered=False)
        ckpt = cs.open(self.place)
        assert {key: (str(ref.dtype), tuple(ref.shape)) for key, ref in ckpt.items()} == {
            key: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for key, value in self.state.items()
        }
        key = next(iter(self.state))
        assert torch.equal(bits(ckpt[key].read()), bits(self.state[key]))
        verified = cs.verify(self.place)
        assert (verified.ok, verified.remarks) == (True, ())
        assert [str(path) for path in Path().rglob(".*")] == []


def steps(**how: Any) -> settings:
    """The same in every run."""
    return settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), **how)


@pytest.mark.no_cover
def test_surgeries_in_any_order_are_what_a_dict_of_tensors_says() -> None:
    run_state_machine_as_test(Surgeries, settings=steps(max_examples=50, stateful_step_count=15))


def test_the_machine_notices_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes every tensor for contiguous is found by the same steps."""
    monkeypatch.setattr(_tensors, "is_contiguous", lambda shape, strides: True)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Surgeries,
            settings=steps(max_examples=40, stateful_step_count=1, phases=[Phase.generate], report_multiple_bugs=False),
        )

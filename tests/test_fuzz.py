"""A few hundred structured inputs for each reader, and what the fuzzer itself must notice.

The same generators and checks as `python -m tests.fuzz`, which runs them for as long as one likes; nothing here needs
atheris.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fuzz import look, seeds, targets, worker
from fuzz.draw import Chance, Stream
from fuzz.names import NAMES
from helpers import safetensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsurgeon.formats import _rebuild, _records, safetensors
from ckptsurgeon.report import _text, listing

RUNS = 300
pytestmark = pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, targets.Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    seeds.make(folder / "seeds")
    return targets.table(folder / "seeds", folder / "work")


@pytest.mark.parametrize("name", NAMES)
def test_structured_inputs_bring_nothing_out_but_answers_and_our_own_errors(
    name: str, table: dict[str, targets.Target], tmp_path: Path
) -> None:
    target, found = table[name], worker.Findings(tmp_path)
    for number in range(RUNS):
        found.run(target.run, target.make(Chance(number)), alarm=False)
    assert found.kinds == {}, "\n".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert found.executions == RUNS


@pytest.mark.parametrize("name", NAMES)
def test_inputs_without_choices_are_sound(name: str, table: dict[str, targets.Target]) -> None:
    """Choices that have come to an end make a file; foreign files and rules are refused by their nature."""
    raw = table[name].make(Stream(b""))
    table[name].run(raw)
    assert table[name].make(Stream(b"")) == raw


@settings(max_examples=100, derandomize=True)
@given(st.binary(max_size=200), st.sampled_from(NAMES))
def test_any_choices_make_an_input(table: dict[str, targets.Target], data: bytes, name: str) -> None:
    target = table[name]
    raw = target.make(Stream(data))
    assert isinstance(raw, bytes)
    target.run(raw)


def kinds(target: targets.Target, folder: Path, runs: int = 1500) -> str:
    """What the fuzzer says of a target in which something is broken."""
    found = worker.Findings(folder)
    for number in range(runs):
        found.run(target.run, target.make(Chance(number)), alarm=False)
    return " ".join(found.kinds)


def _raise(*_: Any) -> Any:
    raise LookupError("planted")


PLANTED: dict[str, tuple[str, Any, str, Any, str]] = {
    "an error that is not ours": ("torch_zip", _rebuild, "view", _raise, "LookupError"),
    "a line that a terminal obeys": ("safetensors", listing, "shown", str, "Broken a line that a terminal would obey"),
    "a hole between tensors": ("safetensors", safetensors, "_tile", lambda *_: None, "Broken the library refuses"),
    "a record that is read otherwise": ("pickle", _records, "moved", lambda ref, *_: ref, "Broken whole records"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_found(
    what: str, table: dict[str, targets.Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, holder, attribute, broken, words = PLANTED[what]
    monkeypatch.setattr(holder, attribute, broken)
    assert words in kinds(table[name], tmp_path)
    assert (tmp_path / "finding-1.input").exists()


def test_a_slow_input_and_a_hang_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    monkeypatch.setattr(worker, "SLOW", 0.01)
    monkeypatch.setattr(worker, "SECONDS", 0.1)
    before = signal.signal(signal.SIGALRM, worker.hang)
    try:
        found = worker.Findings(tmp_path)
        found.run(lambda raw: time.sleep(0.05), b"slow")
        found.run(lambda raw: time.sleep(30), b"hangs")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert list(found.kinds) == ["slow", "HangError "]
    assert found.slowest < 5


def test_an_error_must_name_its_file_and_be_short() -> None:
    import ckptsurgeon as cs

    look.refused(cs.InputError("damaged", path="f"), "f")
    with pytest.raises(look.Broken, match="names no file"):
        look.refused(cs.InputError("damaged"), "f")
    with pytest.raises(look.Broken, match="an error of 30000 characters"):
        look.refused(cs.InputError("x", path="p" * 29_997), None)  # keys and causes are shortened, paths are not


def test_the_library_takes_what_is_known_and_nothing_else_is_excused(table: dict[str, targets.Target]) -> None:
    """A key that stands twice is refused here and taken there; that is documented, and so no finding."""
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    table["safetensors"].run(safetensors_bytes(b"{" + entry + b"," + entry + b"}", b"x"))
    assert _text.shown("\x1b") == "\\x1b"


def test_the_command_runs_targets_for_a_number_of_inputs_and_prints_a_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--runs", "40", "--target", "rules", "--target", "zip"]
    ran = subprocess.run(
        [*command, "--folder", str(tmp_path / "kept")],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    head, _, rules, zips = ran.stdout.splitlines()
    assert head.startswith("| target | executions | per second |")
    assert re.match(r"\| rules \| 40 \| [\d,]+ \|  \|  \|  \| 0 \| \d+\.\d \| \d\.\d\d \|", rules)
    assert zips.startswith("| zip | 40 |")
    assert list((tmp_path / "kept").iterdir()) == []

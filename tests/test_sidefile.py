"""Side files that do not belong, are damaged or lie: readers use the file itself, or refuse and name both."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors
from interrupted import FILE, INDEX, TENSORS, hidden, killed, left, one_file, shard, three_shards
from safetensors.torch import load_file, save_file

import ckptsurgeon as cs
from ckptsurgeon.formats import sidefile

SIDE = "m/.a.safetensors.inplace"
RULES = ["strip module.", "drop [af]"]


def interrupted(make: Callable[[], None] = one_file, path: str = FILE, rules: list[str] = RULES) -> bytes:
    """Kill a change when the (first) new header is half written; the side file."""
    old = None
    for number in range(1, 100):
        shutil.rmtree("m", ignore_errors=True)
        make()
        first = min(f"m/{name}" for name in os.listdir("m") if name.endswith(".safetensors"))
        old = Path(first).read_bytes()
        assert killed(lambda: cs.remap_in_place(path, rules), number, 0.5)
        if Path(first).read_bytes() != old:
            return Path(sidefile.beside(path)).read_bytes()
    raise AssertionError


def digested(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def edited(raw: bytes, **changes: Any) -> bytes:
    """A side file that says something else, with the right digest."""
    at = len(b"ckptsurgeon in-place 1\n") + 8
    length = int.from_bytes(raw[at - 8 : at], "little")
    head = json.dumps({**json.loads(raw[at : at + length]), **changes}).encode()
    return digested(raw[: at - 8] + len(head).to_bytes(8, "little") + head + raw[at + length : -32])


LIES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut off": lambda raw: raw[:-1],
    "a flipped bit": lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:],
    "another version": lambda raw: digested(raw[:-32].replace(b"in-place 1", b"in-place 2")),
    "no JSON": lambda raw: digested(raw[:31] + b"[" + raw[32:-32]),
    "a length of 2**63": lambda raw: digested(raw[:23] + b"\xff" * 8 + raw[31:-32]),
    "a list": lambda raw: digested(raw[:23] + (2).to_bytes(8, "little") + b"[]"),
    "deep JSON": lambda raw: digested(raw[:23] + (200_000).to_bytes(8, "little") + b"[" * 200_000),
    "another name": lambda raw: edited(raw, name="b.safetensors"),
    "a name elsewhere": lambda raw: edited(raw, name="../m/a.safetensors"),
    "an index elsewhere": lambda raw: edited(raw, part_of="../x.json"),
    "shards elsewhere": lambda raw: edited(raw, shards=["../x"]),
    "an emptied one elsewhere": lambda raw: edited(
        raw, emptied=[{"name": "/etc/x", "size": 1, "header": 1, "digest": ""}]
    ),
    "a negative size": lambda raw: edited(raw, before=-1),
    "a size that is true": lambda raw: edited(raw, before=True),
    "another size": lambda raw: edited(raw, before=99),
    "regions that overlap": lambda raw: edited(raw, regions=[0, 10]),
    "three regions": lambda raw: edited(raw, regions=[10, 10, 10]),
    "a phase of its own": lambda raw: edited(raw, redo="yes"),
    "redo, though it is torn": lambda raw: edited(raw, redo=True),
    "part of a set that is not there": lambda raw: edited(raw, part_of="x.json"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_side_file_that_lies_is_not_believed(lie: str) -> None:
    """Of a torn file both are named; a whole one is read as it is, and a repair removes what does not belong."""
    raw = interrupted()
    torn = Path(FILE).read_bytes()
    Path(SIDE).write_bytes(LIES[lie](raw))
    with pytest.raises(cs.InputError, match="m/a.safetensors: damaged safetensors header: .*inplace beside it"):
        cs.open(FILE)
    with pytest.raises(cs.InputError, match="inplace beside it"):
        cs.verify(FILE, repair=True)
    with pytest.raises(cs.InputError, match="inplace beside it"):
        cs.remap_in_place(FILE, RULES)
    assert Path(FILE).read_bytes() == torn
    assert hidden() == [os.path.basename(SIDE)]
    save_file({"other": torch.ones(3)}, FILE)
    assert list(cs.open(FILE)) == ["other"]
    assert cs.open(FILE).remarks == (
        ".a.safetensors.inplace is of another state of the file, and not used; `ckpt verify --repair` removes it",
    )
    whole = Path(FILE).read_bytes()
    assert cs.verify(FILE, repair=True).repaired
    assert (Path(FILE).read_bytes(), hidden()) == (whole, [])


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling link", "link", "huge"])
def test_what_is_no_file_beside_a_file_never_hangs(kind: str) -> None:
    one_file()
    make: dict[str, Callable[[], Any]] = {
        "fifo": lambda: os.mkfifo(SIDE),
        "folder": lambda: os.mkdir(SIDE),
        "device": lambda: os.symlink("/dev/zero", SIDE),
        "dangling link": lambda: os.symlink("nowhere", SIDE),
        "link": lambda: os.symlink("a.safetensors", SIDE),
        "huge": lambda: (Path(SIDE).touch(), os.truncate(SIDE, 1 << 40)),
    }
    make[kind]()
    began = time.monotonic()
    assert_same_tensors(cs.open(FILE), TENSORS)
    assert "is of another state" in cs.open(FILE).remarks[0]
    assert time.monotonic() - began < 5


def test_a_side_file_that_cannot_be_read_is_an_error_since_its_header_may_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted()
    real = os.open

    def refuse(path: str, *rest: Any, **how: Any) -> int:
        if str(path).endswith(".inplace"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **how)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(cs.InputError, match=r"inplace: cannot be opened: Permission denied; it may hold the header"):
        cs.open(FILE)


def test_readers_say_that_it_was_interrupted_and_write_nothing(ckpt: Any) -> None:
    interrupted()
    dry = ckpt("remap", FILE, "--in-place", "--rule", "strip module.", "--dry-run")
    assert (dry.code, dry.err.count("`ckpt verify --repair` puts it back first")) == (1, 1)
    interrupted(rules=["strip module.", "drop f"])
    before = {name: Path("m", name).read_bytes() for name in os.listdir("m")}
    words = "an in-place change of a.safetensors was interrupted; it is read as it was before; `ckpt verify --repair`"
    assert f"note: {words} puts it back\n" in ckpt("ls", FILE).out
    assert words in ckpt("ls", FILE, "--json").json["remarks"][0]
    assert words in ckpt("verify", FILE).out
    assert f"ckpt: warning: {words} puts it back\n" in ckpt("convert", FILE, "b.safetensors").err
    assert words in ckpt("remap", FILE, "--in-place", "--rule", "strip module.", "--dry-run").err
    assert words in ckpt("diff", FILE, "b.safetensors").err
    assert_same_tensors(load_file("b.safetensors"), TENSORS, ordered=False)
    os.symlink("m/a.safetensors", "link.safetensors")
    assert words in ckpt("ls", "link.safetensors").out
    assert {name: Path("m", name).read_bytes() for name in os.listdir("m")} == before


def test_a_repair_says_what_it_did(ckpt: Any) -> None:
    interrupted()
    ran = ckpt("verify", FILE, "--repair")
    assert ran.out.splitlines()[0] == (
        f"repaired: {os.path.realpath(FILE)}: an in-place change was interrupted, and is taken back"
    )
    assert ckpt("verify", FILE, "--repair", "--json").json["repaired"] == []
    assert_same_tensors(load_file(FILE), TENSORS, ordered=False)


def test_the_next_change_in_place_puts_right_what_was_left_and_says_so(ckpt: Any) -> None:
    interrupted()
    ran = ckpt("remap", FILE, "--in-place", "--rule", "strip module.")
    assert ran.err == (
        f"ckpt: warning: {os.path.realpath(FILE)}: an in-place change was interrupted, and is taken back\n"
    )
    assert_same_tensors(load_file(FILE), left("abcdef"), ordered=False)
    assert hidden() == []


def test_a_shard_is_repaired_with_its_set_by_the_name_of_any_of_them() -> None:
    for name in (INDEX, "m", f"m/{shard(1)}"):
        interrupted(three_shards, INDEX)
        assert len(hidden()) == 4
        assert cs.verify(name, repair=True).ok
        assert hidden() == []
        assert_same_tensors(cs.open(INDEX), TENSORS)


def test_one_shard_of_an_interrupted_set_is_what_the_set_is() -> None:
    interrupted(three_shards, INDEX)
    for number, keys in ((1, "ab"), (2, "cd"), (3, "ef")):
        want = {f"module.{key}": TENSORS[f"module.{key}"] for key in keys}
        assert_same_tensors(cs.open(f"m/{shard(number)}"), want)
    assert cs.open(INDEX).remarks == (
        "an in-place change of model.safetensors.index.json was interrupted; it is read as it was before; "
        "`ckpt verify --repair` puts it back",
    )


def test_a_set_that_was_replaced_since_is_read_as_it_is_and_only_loses_its_side_files() -> None:
    interrupted(three_shards, INDEX)
    sides = {name: Path("m", name).read_bytes() for name in hidden()}
    shutil.rmtree("m")
    three_shards()
    cs.remap_in_place(INDEX, ["module => m"])
    for name, raw in sides.items():
        Path("m", name).write_bytes(raw)
    want = {key.replace("module", "m"): value for key, value in TENSORS.items()}
    assert_same_tensors(cs.open(INDEX), want)
    cs.verify("m", repair=True)
    assert hidden() == []
    assert_same_tensors(cs.open(INDEX), want)


def test_a_shard_without_its_index_is_not_turned_by_side_files_of_another_run() -> None:
    """The first shard is half written, and the side file of the index is of another change."""
    interrupted(three_shards, INDEX)
    side = sidefile.load(sidefile.beside(INDEX), 1 << 20)
    assert side is not None
    Path(sidefile.beside(INDEX)).write_bytes(sidefile.encoded(replace(side, run="another")))
    with pytest.raises(cs.InputError, match="damaged safetensors header"):
        cs.open(INDEX)


def test_no_other_shard_is_removed_than_the_one_that_was_emptied() -> None:
    """A repair that completes a change compares size and header first."""
    three_shards()
    number = 0
    while True:
        number += 1
        shutil.rmtree("m")
        three_shards()
        assert killed(lambda: cs.remap_in_place(INDEX, ["drop [ef]$"]), number)
        side = sidefile.load(sidefile.beside(INDEX), 1 << 20)
        if side is not None and side.redo:
            break
    third = Path(f"m/{shard(3)}")
    third.write_bytes(third.read_bytes().replace(b"module.e", b"my_own.e"))
    assert cs.verify(INDEX, repair=True).ok
    assert set(load_file(third)) == {"my_own.e", "module.f"}
    assert hidden() == []


def test_a_beginning_larger_than_what_it_is_about_is_not_read_and_too_many_shards_are_refused() -> None:
    """Sparse, so that its size costs nothing: what it says would be read whole."""
    save_file({"a": torch.ones(2)}, "a.safetensors")
    size = os.path.getsize("a.safetensors")
    told = {"name": "a.safetensors", "run": "r", "before": size, "after": size, "redo": False, "part_of": None,
            "shards": [], "emptied": [], "regions": [3 << 30, size]}  # fmt: skip
    head = json.dumps(told).encode()
    with open(".a.safetensors.inplace", "wb") as out:
        out.write(b"ckptsurgeon in-place 1\n" + len(head).to_bytes(8, "little") + head)
        out.truncate(31 + len(head) + (3 << 30) + size + 32)
    with pytest.raises(sidefile.BadSide, match="its parts do not fill it, or are larger than what it is about"):
        sidefile.load(".a.safetensors.inplace", size)
    assert list(cs.open("a.safetensors")) == ["a"]
    side = sidefile.Side("x.index.json", "r", 1, 1, b"", b"", shards=tuple(f"{n:060}" for n in range(20_000)))
    with pytest.raises(cs.InputError, match=r"^x.index.json: has too many shards \(20000\) to be changed in place"):
        sidefile.encoded(side)

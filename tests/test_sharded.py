"""Shards and their index: what does not fit together is refused by name; what is written comes whole or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import leftovers
from helpers import KEY, assert_same_tensors
from safetensors.torch import load_file, save_file

import ckptsurgeon as cs

INDEX = "m/model.safetensors.index.json"
PLACES = {"a.w": 1, "a.b": 1, "b.w": 2, "c.w": 3, "c.b": 3}


def name(number: int, count: int = 3, suffix: str = "safetensors") -> str:
    return f"model-{number:05}-of-{count:05}.{suffix}"


def example(rows: int = 4) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((key, torch.randn(rows, 3 if key.endswith("w") else 1)) for key in PLACES)


def shards(state: dict[str, torch.Tensor], folder: str = "m", safe: bool = True) -> None:
    """Three shards, by safetensors or torch, and their index."""
    os.makedirs(folder)
    suffix = "safetensors" if safe else "bin"
    for number in (1, 2, 3):
        part = {key: value for key, value in state.items() if PLACES[key] == number}
        path = f"{folder}/{name(number, suffix=suffix)}"
        if safe:
            save_file(part, path)
        else:
            torch.save(part, path)
    total = sum(value.nbytes for value in state.values())
    text = {"metadata": {"total_size": total}, "weight_map": {k: name(n, suffix=suffix) for k, n in PLACES.items()}}
    stem = "model" if safe else "pytorch_model"
    Path(f"{folder}/{stem}.{suffix}.index.json").write_text(json.dumps(text))


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    """The index with a change."""

    def edit() -> None:
        found = json.loads(Path(INDEX).read_text())
        change(found)
        Path(INDEX).write_text(json.dumps(found))

    return edit


def pointed(key: str, place: str) -> Callable[[], None]:
    return edited(lambda index: index["weight_map"].update({key: place}))


def shard(number: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], None]:
    """A shard with a change, written again."""

    def write() -> None:
        path = f"m/{name(number)}"
        part = {key: value.clone() for key, value in load_file(path).items()}
        change(part)
        save_file(part, path)

    return write


def text(raw: str) -> Callable[[], None]:
    return lambda: Path(INDEX).write_text(raw) and None


def _fifo() -> None:
    os.unlink(f"m/{name(2)}")
    os.mkfifo(f"m/{name(2)}")


def _device() -> None:
    os.unlink(f"m/{name(2)}")
    os.symlink("/dev/zero", f"m/{name(2)}")


def _folder_for_a_shard() -> None:
    os.unlink(f"m/{name(2)}")
    os.mkdir(f"m/{name(2)}")


def _itself() -> None:
    """An index that is a shard of itself, by the name of a link."""
    os.unlink(f"m/{name(2)}")
    os.symlink("model.safetensors.index.json", f"m/{name(2)}")


def _its_folder() -> None:
    os.unlink(f"m/{name(2)}")
    os.symlink(".", f"m/{name(2)}")


def _cut(keep: int) -> Callable[[], None]:
    return lambda: os.truncate(f"m/{name(2)}", keep)


def _halved(part: dict[str, torch.Tensor]) -> None:
    part.update({key: value.half() for key, value in part.items()})


BAD: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a shard is missing": (
        lambda: os.unlink(f"m/{name(2)}"),
        INDEX,
        f"'b.w': names 1 shard that is not there: {name(2)}",
    ),
    "a dangling link": (
        lambda: (os.unlink(f"m/{name(3)}"), os.symlink("nowhere", f"m/{name(3)}")),
        INDEX,
        f"names 1 shard that is not there: {name(3)}",
    ),
    "a key in two shards": (
        shard(3, lambda part: part.update({"a.w": torch.ones(1)})),
        INDEX,
        f"'a.w' stands in {name(1)} and in {name(3)}",
    ),
    "a doubled shard": (
        lambda: shutil.copy(f"m/{name(1)}", f"m/{name(2)}"),
        INDEX,
        f"'a.w' stands in {name(1)} and in {name(2)}",
    ),
    "a key that no shard has": (
        pointed("d.w", name(2)),
        INDEX,
        f"the index says that 'd.w' is in {name(2)}, but no shard has it",
    ),
    "a key that is gone from its shard": (
        shard(3, lambda part: part.pop("c.b")),
        INDEX,
        f"the index says that 'c.b' is in {name(3)}, but no shard has it",
    ),
    "a key in another shard": (
        pointed("a.b", name(3)),
        INDEX,
        f"the index says that 'a.b' is in {name(3)}, but it is in {name(1)}",
    ),
    "a shard of another dtype": (
        shard(2, _halved),
        INDEX,
        f"{name(2)} holds 'b.w' as float16, 2 bytes each, but the index counts 4",
    ),
    "above its folder": (
        pointed("b.w", f"../m/{name(2)}"),
        INDEX,
        f"'b.w': names '../m/{name(2)}', which is no file in its own folder",
    ),
    "far above": (
        pointed("b.w", "x/../../secret"),
        INDEX,
        "'b.w': names 'x/../../secret', which is no file in its own folder",
    ),
    "above, for Windows": (pointed("b.w", "..\\secret"), INDEX, "which is no file in its own folder"),
    "an absolute place": (
        pointed("b.w", "/etc/passwd"),
        INDEX,
        "'b.w': names '/etc/passwd', which is no file in its own folder",
    ),
    "no name": (pointed("b.w", ""), INDEX, "'b.w': names '', which is no file in its own folder"),
    "the folder": (pointed("b.w", "."), INDEX, "'b.w': names '.', which is no file in its own folder"),
    "a name with a NUL": (pointed("b.w", "a\0b"), INDEX, "which is no file in its own folder"),
    "a number for a name": (
        edited(lambda index: index["weight_map"].update({"b.w": 2})),
        INDEX,
        "'b.w': names 2, which is no file",
    ),
    "no weight_map": (edited(lambda index: index.pop("weight_map")), INDEX, "an index of shards has a `weight_map`"),
    "a list for a weight_map": (
        edited(lambda index: index.update(weight_map=list(PLACES))),
        INDEX,
        "an index of shards has a `weight_map`",
    ),
    "JSON that ends too early": (text('{"weight_map": {"a.w": '), INDEX, "damaged JSON"),
    "JSON with more behind it": (text('{"weight_map": {}} {}'), INDEX, "damaged JSON"),
    "no UTF-8": (lambda: Path(INDEX).write_bytes(b'{"weight_map": {"\xff": "x"}}'), INDEX, "damaged JSON"),
    "nested without end": (text('{"weight_map":' * 100_000), INDEX, "damaged JSON"),
    "a doubled key": (
        text(f'{{"weight_map": {{"a.w": "{name(1)}", "a.b": "{name(1)}", "a.w": "{name(2)}"}}}}'),
        INDEX,
        "damaged JSON: the key 'a.w' stands twice",
    ),
    "a doubled map": (text('{"weight_map": {}, "weight_map": {}}'), INDEX, "the key 'weight_map' stands twice"),
    "a FIFO for a shard": (_fifo, f"m/{name(2)}", "is no regular file"),
    "a device for a shard": (_device, f"m/{name(2)}", "is no regular file"),
    "a folder for a shard": (_folder_for_a_shard, f"m/{name(2)}", "is no regular file"),
    "an index for a shard": (_itself, f"m/{name(2)}", "is an index among the shards of another one"),
    "the folder for a shard": (_its_folder, f"m/{name(2)}", "is no regular file"),
    "an empty shard": (_cut(0), f"m/{name(2)}", "the file is empty"),
    "a shard cut in its header": (_cut(20), f"m/{name(2)}", "truncated: a header of"),
    "a shard cut in its data": (_cut(100), f"m/{name(2)}", "'b.w' lies at bytes 0–48 of 28 (a truncated file?)"),
    "a shard that is text": (lambda: Path(f"m/{name(2)}").write_text("404"), f"m/{name(2)}", "is no checkpoint"),
}
"""What is damaged, the file that the error names, and its words."""


@pytest.mark.parametrize("case", BAD)
def test_shards_that_do_not_fit_together_are_refused_by_name(case: str, ckpt: Any) -> None:
    """Through the index and through its folder, by every command, and nothing is written."""
    damage, path, words = BAD[case]
    shards(example())
    assert len(cs.open("m")) == 5
    damage()
    commands = [["ls", INDEX], ["ls", "m"], ["verify", INDEX], ["convert", INDEX, "out.pth"], ["convert", "m", "out/"]]
    for command in commands:
        ran = ckpt(*command)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith(f"ckpt: error: {path}: ")
        assert words in ran.err
        assert ran.err.count("\n") == 1
    assert sorted(os.listdir(".")) == ["m"]


def test_all_that_is_wrong_is_said_at_once() -> None:
    shards(example())
    pointed("d.w", name(2))()
    pointed("a.b", name(3))()
    with pytest.raises(cs.InputError, match=r"'a\.b' is in .*; the index says that 'd\.w' is in "):
        cs.open(INDEX)


@pytest.mark.parametrize("safe", [True, False])
def test_shards_in_the_cache_of_hugging_face_are_links_to_blobs(safe: bool) -> None:
    """snapshots/REVISION/NAME → ../../blobs/HASH: outside of the folder, by the cache's own links."""
    state = example()
    shards(state, "repo/files", safe)
    os.makedirs("repo/blobs")
    os.makedirs("repo/snapshots/abc")
    for number, file in enumerate(sorted(os.listdir("repo/files"))):
        os.rename(f"repo/files/{file}", f"repo/blobs/{number:040}")
        os.symlink(f"../../blobs/{number:040}", f"repo/snapshots/abc/{file}")
    index = next(file for file in os.listdir("repo/snapshots/abc") if file.endswith(".json"))
    for path in ("repo/snapshots/abc", f"repo/snapshots/abc/{index}"):
        assert_same_tensors(cs.open(path), state, ordered=False)


@pytest.mark.parametrize("named", ["m", INDEX])
@pytest.mark.parametrize("target", ["../secret", "deep/../../secret", "{here}/secret"])
def test_a_shard_that_is_a_link_to_a_file_elsewhere_is_refused(named: str, target: str, ckpt: Any) -> None:
    """A checkpoint that was unpacked may hold links to files that it is not made of."""
    shards(example())
    os.mkdir("m/deep")
    os.rename(f"m/{name(2)}", "secret")
    os.symlink(target.format(here=os.getcwd()), f"m/{name(2)}")
    for file in (named, "m") if named == "m" else (named,):
        ran = ckpt("ls", file)
        assert (ran.code, ran.out) == (2, "")
        assert (
            f"m/{name(2)}: is a link that leads out of its folder, to '{os.path.realpath('secret')}'; copy" in ran.err
        )


def test_links_that_stay_together_are_followed(ckpt: Any) -> None:
    """Inside of the folder; and to where the index itself is a link to."""
    state = example()
    shards(state)
    os.mkdir("m/deep")
    os.rename(f"m/{name(2)}", "m/deep/x")
    os.symlink("deep/x", f"m/{name(2)}")
    assert_same_tensors(cs.open("m"), state, ordered=False)
    os.mkdir("linked")
    for file in os.listdir("m"):
        if not os.path.isdir(f"m/{file}"):
            os.symlink(f"../m/{file}", f"linked/{file}")
    index = f"linked/{os.path.basename(INDEX)}"
    assert_same_tensors(cs.open(index), state, ordered=False)


def test_shards_may_lie_in_folders_below() -> None:
    state = example()
    shards(state)
    os.mkdir("m/deep")
    os.rename(f"m/{name(2)}", f"m/deep/{name(2)}")
    pointed("b.w", f"deep/{name(2)}")()
    assert_same_tensors(cs.open(INDEX), state, ordered=False)


def test_an_index_that_is_a_fifo_is_refused(ckpt: Any) -> None:
    shards(example())
    os.unlink(INDEX)
    os.mkfifo(INDEX)
    ran = ckpt("ls", INDEX)
    assert (ran.code, ran.err) == (2, f"ckpt: error: {INDEX}: is no regular file\n")


def _touch(*names: str) -> Callable[[], None]:
    def touch() -> None:
        os.mkdir("m")
        for file in names:
            if file.endswith(("safetensors", "bin", "pth")):
                save_file({"w": torch.ones(2)}, f"m/{file}")
            else:
                Path(f"m/{file}").write_text("{}")

    return touch


FOLDERS: dict[str, tuple[Callable[[], None], str]] = {
    "nothing in it": (_touch(), "is a folder without a checkpoint file"),
    "unrelated files": (
        _touch("README.md", "config.json", "tokenizer.json", "training_args.bin", "optimizer.bin"),
        "is a folder without a checkpoint file",
    ),
    "several files": (
        _touch("one.pth", "two.pth"),
        "is a folder with 2 checkpoint files: one.pth, two.pth; name one of them",
    ),
    "several indexes": (
        _touch("a.safetensors.index.json", "b.safetensors.index.json"),
        "is a folder with 2 indexes of shards: a.safetensors.index.json, b.safetensors.index.json; name one of them",
    ),
    "several sets of shards": (
        _touch("a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"),
        "is a folder with 2 sets of shards: a-*-of-*.safetensors, b-*-of-*.safetensors; name one of them",
    ),
    "a number is missing": (_touch(name(1), name(3)), "has 2 of the 3 shards model-*.safetensors; number 2 is missing"),
    "most numbers are missing": (
        _touch("model-00001-of-99999999999999.safetensors"),
        "has 1 of the 99999999999999 shards model-*.safetensors; number 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 is missing",
    ),
    "a number too high": (_touch(name(1, 2), name(2, 2), name(7, 2)), "has 3 of the 2 shards"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_in_which_no_one_checkpoint_is_meant_is_refused(case: str, ckpt: Any) -> None:
    make, words = FOLDERS[case]
    make()
    for command in (["ls", "m"], ["convert", "m", "out.pth"]):
        ran = ckpt(*command)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("ckpt: error: m: ")
        assert words in ran.err
    assert os.listdir(".") == ["m"]


def test_shards_of_nothing_are_a_checkpoint_of_nothing() -> None:
    torch.save({}, "in.pth")
    cs.convert("in.pth", "m.safetensors.index.json")
    assert sorted(os.listdir(".")) == ["in.pth", "m-00001-of-00001.safetensors", "m.safetensors.index.json"]
    found = cs.open("m.safetensors.index.json")
    assert (len(found), found.origin.format) == (0, "sharded-safetensors")


def test_numbered_shards_need_no_index_and_may_not_repeat_a_key() -> None:
    state = example()
    shards(state)
    os.unlink(INDEX)
    assert_same_tensors(cs.open("m"), state, ordered=False)
    shard(3, lambda part: part.update({"a.w": torch.ones(1)}))()
    with pytest.raises(cs.InputError, match=rf"^m: .*'a\.w' stands in {name(1)} and in {name(3)}"):
        cs.open("m")


# writing


def source(rows: int = 4) -> OrderedDict[str, torch.Tensor]:
    state = example(rows)
    torch.save(state, "in.pth")
    return state


def content(folder: str) -> dict[str, bytes]:
    return {file: Path(folder, file).read_bytes() for file in sorted(os.listdir(folder))}


def read(folder: str) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    return {key: value for part in parts for key, value in part.items()}


@pytest.mark.parametrize("limit", [1, 48, 63, 64, 65, 112, 10_000])
def test_no_shard_is_larger_than_asked_for_but_for_a_single_tensor(limit: int) -> None:
    state = source()
    written = cs.convert("in.pth", "out/", shard_size=limit)
    sizes = []
    for path in sorted(Path("out").glob("*.safetensors")):
        part = load_file(path)
        size = sum(value.nbytes for value in part.values())
        assert size <= limit or len(part) == 1
        sizes.append(size)
    assert sum(sizes) == sum(value.nbytes for value in state.values()) == 176
    assert all(one + other > limit for one, other in itertools.pairwise(sizes))
    assert_same_tensors(read("out"), state, ordered=False)
    assert len(written.files) == (0 if len(sizes) == 1 else len(sizes) + 1)
    if len(sizes) > 1:
        index = json.loads(Path("out/model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 176, KEY: index["metadata"][KEY]}
        assert list(index["weight_map"]) == list(state)
        assert set(index["weight_map"].values()) == {path.name for path in Path("out").glob("*-of-*")}
    else:
        assert os.listdir("out") == ["model.safetensors"]


GOOD_SIZES = {
    "1000": 1000,
    "5GB": 5 * 10**9,
    "512MiB": 512 << 20,
    "1.5kB": 1500,
    "2 mb": 2 * 10**6,
    "1TiB": 1 << 40,
    "7b": 7,
    "3K": 3000,
}
BAD_SIZES = [
    "",
    "0",
    "0GB",
    "0.5b",
    "-1",
    "GB",
    "5XB",
    "1e3",
    "nan",
    "inf",
    "5 GB 3",
    "5i",
    "5ib",
    "0x10",
    "9" * 400,
    "9" * 5000 + "GB",
    "1.GB",
    "٥MB",
]


@pytest.mark.parametrize("size", GOOD_SIZES)
def test_a_shard_size_is_read_as_people_write_it(size: str) -> None:
    from ckptsurgeon import formats

    assert formats.output("out/", size).shard_size == GOOD_SIZES[size]


@pytest.mark.parametrize("size", BAD_SIZES, ids=lambda size: size[:8])
def test_nonsense_for_a_shard_size_is_exit_2(size: str, ckpt: Any) -> None:
    source()
    for command in (["convert", "in.pth", "out"], ["remap", "in.pth", "-o", "out"]):
        ran = ckpt(*command, "--shard-size", size)
        assert (ran.code, ran.out) == (2, "")
        assert "a shard size is a number of bytes such as 5GB or 512MiB, not " in ran.err
    assert os.listdir(".") == ["in.pth"]


@pytest.mark.parametrize("size", [0, -5, 2.5, True, b"5GB"])
def test_nonsense_for_a_shard_size_is_a_usage_error(size: Any) -> None:
    source()
    with pytest.raises(cs.UsageError, match="a shard size is a number of bytes"):
        cs.convert("in.pth", "out", shard_size=size)


def test_what_cannot_be_sharded_is_exit_2(ckpt: Any) -> None:
    torch.save({"epoch": 3, "state_dict": source()}, "in.pth")
    for words, message in (
        (
            ["out.pth", "--shard-size", "1kB"],
            "--shard-size makes several files; name a folder, or out.safetensors.index.json",
        ),
        (["out.h5.index.json"], "no shards can be named so"),
        (["out/", "--keep-extras"], "holds tensors only, and --keep-extras asks to keep epoch"),
        (["m.bin.index.json", "--keep-extras"], "holds tensors only, and --keep-extras asks to keep epoch"),
        (["away/m.safetensors.index.json"], "does not exist"),
    ):
        ran = ckpt("convert", "in.pth", *words)
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err
    assert os.listdir(".") == ["in.pth"]


OUTPUTS = {"folder": "out/", "index": "out/model.safetensors.index.json", "bin": "out/pytorch_model.bin.index.json"}


@pytest.mark.parametrize("output", OUTPUTS)
def test_existing_shards_are_refused_without_force_and_go_away_with_it(output: str, ckpt: Any) -> None:
    """No shard and no index of the older output is left among the new ones; files of others are."""
    source()
    os.mkdir("out")
    Path("out/config.json").write_text("mine")
    assert ckpt("convert", "in.pth", OUTPUTS[output], "--shard-size", "64").code == 0
    before = content("out")
    assert len(before) == 2 + 3
    state = source(rows=8)
    for size in ("64", "260", "5GB"):
        ran = ckpt("convert", "in.pth", OUTPUTS[output], "--shard-size", size)
        assert ran.code == 2
        assert "--force replaces it" in ran.err
        assert content("out") == before
    assert ckpt("convert", "in.pth", OUTPUTS[output], "--shard-size", "260", "--force").code == 0
    assert len(content("out")) == 2 + 2
    assert not set(before) & set(content("out")) - {
        "config.json",
        os.path.basename(OUTPUTS[output]) or "model.safetensors.index.json",
    }
    assert Path("out/config.json").read_text() == "mine"
    assert_same_tensors(cs.open("out"), state)


def test_a_single_file_and_shards_replace_each_other() -> None:
    """A reader that looks for `model.safetensors` first must not find the older one."""
    source()
    cs.convert("in.pth", "out/")
    assert os.listdir("out") == ["model.safetensors"]
    state = source(rows=8)
    cs.convert("in.pth", "out/", shard_size=200, force=True)
    assert "model.safetensors" not in os.listdir("out")
    assert_same_tensors(cs.open("out"), state)
    state = source()
    cs.convert("in.pth", "out/", force=True)
    assert os.listdir("out") == ["model.safetensors"]
    assert_same_tensors(cs.open("out"), state)


def recorded(patch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What happens to names in folders, in order; own files under their final names only."""
    seen: list[tuple[str, str]] = []

    def note(call: str) -> None:
        real = getattr(os, call)

        def wrapped(*args: Any, **how: Any) -> Any:
            made = real(*args, **how)
            first, base = (os.path.basename(str(name)) for name in (args[0], args[-1]))
            if not base.endswith(".part"):
                seen.append(("gone" if call == "unlink" else "there", base))
            elif not first.endswith(".part"):
                seen.append(("gone", first))
            return made

        patch.setattr(os, call, wrapped)

    for call in ("link", "rename", "replace", "unlink"):
        note(call)
    return seen


def test_the_index_comes_last_and_an_older_one_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader never finds an index whose shards are not all there, or are of another output."""
    source()
    index = "model.safetensors.index.json"
    os.mkdir("out")
    with monkeypatch.context() as patch:
        seen = recorded(patch)
        cs.convert("in.pth", "out", shard_size=64)
    journal = f".{index}.journal"
    assert (seen.pop(0), seen.pop()) == (("there", journal), ("gone", journal))
    count = len(seen) - 1
    assert count == 3
    assert seen == [*(("there", name(i + 1, count)) for i in range(count)), ("there", index)]
    with monkeypatch.context() as patch:
        seen = recorded(patch)
        cs.convert("in.pth", "out", shard_size=120, force=True)
    assert (seen.pop(0), seen.pop()) == (("there", journal), ("gone", journal))
    assert seen[0] == ("gone", index)
    assert {step for step, _ in seen[:4]} == {"gone"}
    assert seen[4:] == [("there", name(1, 2)), ("there", name(2, 2)), ("there", index)]
    assert not leftovers()


def test_a_new_folder_appears_with_all_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    source()
    appeared: list[list[str]] = []
    real = os.rename

    def rename(old: str, new: str) -> None:
        assert not os.path.exists("out")
        real(old, new)
        appeared.append(sorted(os.listdir("out")))

    monkeypatch.setattr(os, "rename", rename)
    cs.convert("in.pth", "out/", shard_size=120)
    assert appeared == [[name(1, 2), name(2, 2), "model.safetensors.index.json"]]


def _full_disk(patch: pytest.MonkeyPatch, after: int) -> None:
    """From the `after`-th call on, no byte can be written."""
    left = after

    def until(real: Any) -> Any:
        def write(*args: Any) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return write

    for call in ("write", "pwrite", "copy_file_range", "sendfile"):
        patch.setattr(os, call, until(getattr(os, call)))


@pytest.mark.parametrize("after", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("old", ["nothing", "an empty folder", "shards"])
def test_a_full_disk_leaves_the_old_output_whole_and_no_new_file(
    after: int, old: str, ckpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source()
    if old != "nothing":
        os.mkdir("out")
    if old == "shards":
        cs.convert("in.pth", "out", shard_size=120)
    before = content("out") if old != "nothing" else None
    source(rows=8)
    with monkeypatch.context() as patch:
        _full_disk(patch, after)
        ran = ckpt("convert", "in.pth", "out/", "--shard-size", "64", "--force")
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"ckpt: error: \S*out\S*: the disk is full; nothing was written\n", ran.err)
    assert sorted(os.listdir(".")) == (["in.pth"] if old == "nothing" else ["in.pth", "out"])
    if before is not None:
        assert content("out") == before


@pytest.mark.parametrize("force", [False, True])
def test_a_source_that_changes_leaves_the_old_output_whole(force: bool) -> None:
    source()
    if force:
        cs.convert("in.pth", "out/", shard_size=120)
    before = content("out") if force else {}
    plan = cs.plan("in.pth")
    source(rows=8)
    with pytest.raises(cs.InputError, match=r"^in\.pth: .*changed since it was opened"):
        cs.save(plan.result, "out/", shard_size=64, force=force)
    assert (content("out") if force else {}) == before
    assert os.path.exists("out") == force
    assert not leftovers()


def test_a_failure_between_the_renames_brings_the_old_output_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads old and new shards as one; without older files, none of the new stays."""
    source()
    os.mkdir("out")

    def failing(patch: pytest.MonkeyPatch, call: str) -> None:
        real, left = getattr(os, call), 2

        def wrapped(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        patch.setattr(os, call, wrapped)

    with monkeypatch.context() as patch:
        failing(patch, "link")
        patch.setattr(os, "rename", os.link)  # which is tried where a disk has no links
        with pytest.raises(cs.OutputError):
            cs.convert("in.pth", "out", shard_size=64)
    assert os.listdir("out") == []
    cs.convert("in.pth", "out", shard_size=64)
    before = content("out")
    with monkeypatch.context() as patch:
        failing(patch, "replace")
        with pytest.raises(cs.OutputError):
            cs.convert("in.pth", "out", shard_size=120, force=True)
    assert content("out") == before


def test_what_is_removed_of_an_earlier_output_is_said(ckpt: Any) -> None:
    """Before, by its refusal, and afterwards; other files in the folder stay."""
    source()
    cs.convert("in.pth", "out", shard_size=64)
    Path("out/notes.txt").write_text("mine")
    old = sorted(set(os.listdir("out")) - {"notes.txt"})
    ran = ckpt("convert", "in.pth", "out/whole.safetensors")
    assert ran.code == 0
    ran = ckpt("convert", "in.pth", "out")
    assert ran.code == 2
    assert f"there are {', '.join(old)} of an earlier output; --force replaces it and removes them" in ran.err
    ran = ckpt("convert", "in.pth", "out", "--force", "--json")
    assert sorted(ran.json["written"]["removed"]) == old
    assert sorted(os.listdir("out")) == ["model.safetensors", "notes.txt", "whole.safetensors"]
    assert (
        "removed, of an earlier output: model.safetensors"
        in ckpt("convert", "in.pth", "out", "--force", "--shard-size", "64").out
    )


def test_links_into_a_cache_are_replaced_and_not_followed(ckpt: Any) -> None:
    """The blobs of a Hugging Face cache belong to other revisions too."""
    source()
    os.makedirs("cache/blobs")
    os.makedirs("cache/snapshot")
    Path("cache/blobs/abc").write_bytes(b"theirs")
    os.symlink("../blobs/abc", "cache/snapshot/model.safetensors")
    assert ckpt("convert", "in.pth", "cache/snapshot", "--force").code == 0
    assert Path("cache/blobs/abc").read_bytes() == b"theirs"
    assert not os.path.islink("cache/snapshot/model.safetensors")


def test_an_index_without_tensors_beside_shards_is_refused(ckpt: Any) -> None:
    source()
    cs.convert("in.pth", "out", shard_size=64)
    Path("out/model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    for command in (["verify", "out"], ["convert", "out", "b.pth"]):
        ran = ckpt(*command)
        assert ran.code == 2
        assert "names no tensor, and there are shards beside it" in ran.err


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_the_index_counts_what_is_written(ckpt: Any) -> None:
    """Also with aliases, where a view of another shape is written in full, and with the scales of quantised tensors."""
    flat = torch.randn(60)
    torch.save({"a": flat, "b": flat, "c": flat.view(6, 10), "d": torch.randn(9)}, "in.pth")
    for tied in ("full", "alias"):
        cs.convert("in.pth", f"{tied}/", shard_size=100, tied=tied)
        assert cs.verify(tied).remarks == ()
    torch.save(
        {f"q{i}": torch._make_per_tensor_quantized_tensor(torch.ones(8, dtype=torch.int8), 0.5, 0) for i in range(3)},
        "q.pth",
    )
    written = cs.convert("q.pth", "q/", shard_size=50)
    assert len(written.files) == 3
    assert cs.verify("q").remarks == ()


def test_an_output_without_a_name_is_refused(ckpt: Any) -> None:
    source()
    ran = ckpt("convert", "in.pth", "")
    assert (ran.code, os.listdir(".")) == (2, ["in.pth"])
    assert "the output has no name" in ran.err


@pytest.mark.parametrize("size", [64, 120, 10_000])
@pytest.mark.parametrize("output", ["out", "out/model.safetensors.index.json"])
def test_shards_are_converted_onto_themselves(output: str, size: int, ckpt: Any) -> None:
    state = source()
    cs.convert("in.pth", "out/", shard_size=64, provenance=False)
    before = content("out")
    words = ["convert", output, output, "--shard-size", size, "--no-provenance"]
    assert ckpt(*words).code == 2
    assert content("out") == before
    assert ckpt(*words, "--force").code == 0
    if size == 64:
        assert content("out") == before
    else:
        assert len(content("out")) < len(before)
    assert_same_tensors(cs.open("out"), state)
    assert_same_tensors(read("out"), state, ordered=False)


def test_shards_of_one_kind_become_shards_of_another_in_their_folder() -> None:
    """The older kind is no part of the new output, and stays: it is the user's to remove."""
    state = source()
    cs.convert("in.pth", "out/", shard_size=64)
    before = content("out")
    cs.convert("out", "out/pytorch_model.bin.index.json", shard_size=120)
    assert before.items() <= content("out").items()
    assert_same_tensors(cs.open("out/pytorch_model.bin.index.json"), state)


def test_only_files_of_the_output_are_replaced(ckpt: Any) -> None:
    """Neither a file that only begins like the index, nor a folder with the name of a shard."""
    source()
    os.makedirs("o/model.safetensors")
    Path("o/foo").write_text("mine")
    cs.convert("in.pth", "o/foo.index.json", shard_size=64)
    cs.convert("in.pth", "o/foo.index.json", shard_size=120, force=True)
    assert Path("o/foo").read_text() == "mine"
    assert sorted(os.listdir("o"))[:-1] == [
        "foo", "foo-00001-of-00002.safetensors", "foo-00002-of-00002.safetensors", "foo.index.json",
    ]  # fmt: skip
    assert ckpt("convert", "in.pth", "o", "--shard-size", "64", "--force").code == 0
    assert os.path.isdir("o/model.safetensors")


@pytest.mark.parametrize("call", ["replace", "rename"])
def test_what_fails_while_names_are_changed_leaves_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source()
    os.mkdir("there")
    real, left = getattr(os, call), [1 if call == "replace" else 0]

    def failing(old: str, new: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(cs.OutputError):
        cs.convert("in.pth", "there/" if call == "replace" else "new/", shard_size=64, force=True)
    assert sorted(os.listdir(".")) == ["in.pth", "there"]
    assert os.listdir("there") == []


def test_sizes_that_no_file_can_have_are_ignored(ckpt: Any) -> None:
    source()
    cs.convert("in.pth", "o/", shard_size=64)
    index = Path("o/model.safetensors.index.json")
    for total in ("1" + "0" * 400, "NaN", "-1", '"many"', "1e400", "[]"):
        text = re.sub(r'"total_size": \S+', f'"total_size": {total}', index.read_text())
        Path("o/model.safetensors.index.json").write_text(text)
        assert ckpt("verify", "o").code == (2 if total == "NaN" else 0)


def test_long_names_of_any_script_are_written() -> None:
    source()
    assert cs.convert("in.pth", "é" * 120 + ".pth").tensors > 0


def test_aliases_keep_to_the_limit_of_a_shard_and_leave_the_format_alone() -> None:
    flat = torch.randn(60)
    torch.save({"a": flat, "b": torch.randn(10), "c": flat.view(6, 10), "e": flat}, "in.pth")
    cs.convert("in.pth", "o/", shard_size=300, tied="alias")
    assert_same_tensors(cs.open("o"), torch.load("in.pth", weights_only=True), ordered=False)
    assert [sum(part.nbytes for part in load_file(shard).values()) for shard in sorted(Path("o").glob("*s"))] == [
        280,
        240,
    ]
    torch.save({"a": flat, "format": flat}, "f.pth")
    cs.convert("f.pth", "f.safetensors", tied="alias")
    assert_same_tensors(cs.open("f.safetensors"), {"a": flat, "format": flat})
    torch.save({"pt": torch.ones(2), "b": torch.ones(3)}, "p.pth")
    cs.convert("p.pth", "p.safetensors")
    assert list(cs.open("p.safetensors")) == ["pt", "b"]

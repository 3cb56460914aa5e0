"""Files that cannot be used get a clear error, exit code 2, and leave nothing behind."""

from __future__ import annotations

import io
import os
import random
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import leftovers
from helpers import save_legacy
from safetensors.torch import save_file

import ckptsurgeon as cs

STATE = {"a": torch.arange(40.0).reshape(5, 8), "b": torch.arange(5), "c": torch.ones(3, 4).t()}


def _files() -> dict[str, bytes]:
    torch.save({"state_dict": STATE, "epoch": 3}, "zip")
    save_legacy(STATE, "legacy")
    save_file({key: value.contiguous() for key, value in STATE.items()}, "safetensors")
    return {name: Path(name).read_bytes() for name in ("zip", "legacy", "safetensors")}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_anywhere_is_an_input_error(kind: str) -> None:
    raw = _files()[kind]
    for cut in range(len(raw)):
        Path("cut").write_bytes(raw[:cut])
        with pytest.raises(cs.InputError, match="^cut: "):
            cs.open("cut")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_with_flipped_bytes_is_opened_or_refused_and_never_crashes(kind: str) -> None:
    raw = _files()[kind]
    chance = random.Random(0)
    for _ in range(1500):
        damaged = bytearray(raw)
        for _ in range(chance.choice((1, 1, 3))):
            damaged[chance.randrange(len(raw))] = chance.randrange(256)
        Path("flipped").write_bytes(damaged)
        try:
            ckpt = cs.open("flipped")
            for ref in ckpt.values():
                sum(len(block) for block in ref.blocks())
        except cs.CkptError as error:
            assert str(error).startswith("flipped: ")


def _pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


def _zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


NOT_OURS = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello\n", "is no checkpoint"),
    "zeros": (bytes(5000), "begins with zeros only"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html>404", "a web page"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "a gzip archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "gguf": (b"GGUF" + bytes(100), "a GGUF file"),
    "pickle": (b"\x80\x04}.", "a plain Python pickle"),
    "json": (b'{"a": 1}', "JSON text"),
    "npz": (_npz(), "is a NumPy archive (.npz), no checkpoint; read its arrays with numpy.load"),
    "other zip": (_zip("a/b.txt"), "it holds 'a/b.txt'"),
    "two pickles": (_zip("a/data.pkl", "b/data.pkl"), "holds 2 pickles named data.pkl"),
    "no pickle": (_zip("a/data.pkl"), "damaged a/data.pkl"),
    "a number": (_pickled(3), "holds no state dict, but an int"),
    "only numbers": (_pickled({"a": 1}), "holds no state dict, but a dict of 1 item"),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_what_is_no_checkpoint_is_called_by_its_name(case: str, ckpt: Any) -> None:
    raw, words = NOT_OURS[case]
    Path("x").write_bytes(raw)
    for command in (["ls", "x"], ["diff", "x", "x"], ["convert", "x", "y.pth"], ["remap", "x", "-o", "y.pth"]):
        ran = ckpt(*command)
        assert ran.code == 2
        assert ran.out == ""
        assert ran.err.startswith("ckpt: error: x: ")
        assert words in ran.err
        assert ran.err.count("\n") <= 2
    assert sorted(os.listdir(".")) == ["x"]


def test_folders_fifos_and_missing_files(ckpt: Any) -> None:
    os.mkdir("folder")
    os.mkfifo("fifo")
    assert "is a folder" in ckpt("ls", "folder").err
    assert "is no regular file" in ckpt("ls", "fifo").err
    assert "is no regular file" in ckpt("ls", "/dev/zero").err
    assert "missing.pth: no such file" in ckpt("ls", "missing.pth").err
    assert {ckpt("ls", name).code for name in ("folder", "fifo", "/dev/zero", "missing.pth")} == {2}


def test_outputs_that_cannot_be(ckpt: Any) -> None:
    torch.save(STATE, "a.pth")
    os.mkdir("folder.pth")
    for output, words in {
        "b.onnx": "the suffix .onnx names no format to write; use one of .safetensors, .pth",
        "b": "the suffix (none) names no format",
        "none/b.pth": "the folder",
        "folder.pth": "is there and is no regular file",
    }.items():
        for command in (["convert", "a.pth", output], ["remap", "a.pth", "-o", output]):
            ran = ckpt(*command)
            assert (ran.code, ran.out) == (2, "")
            assert words in ran.err
    assert sorted(os.listdir(".")) == ["a.pth", "folder.pth"]


def _as_a_process(*words: str, limit: int | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    def prepare() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", "from ckptsurgeon.cli.app import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=prepare, **how)


def test_a_full_disk_leaves_no_output_and_the_source_as_it_was() -> None:
    """The disk ends after 100 KB: a limit of the operating system on how large a file may grow."""
    torch.save({"w": torch.ones(100_000)}, "a.pth")
    before = Path("a.pth").read_bytes()
    for output in ("b.pth", "b.safetensors"):
        ran = _as_a_process("convert", "a.pth", output, limit=100_000)
        assert ran.returncode == 2
        assert ran.stdout == ""
        assert ran.stderr == f"ckpt: error: {output}: the file grows too large; nothing was written\n"
    assert os.listdir(".") == ["a.pth"]
    assert Path("a.pth").read_bytes() == before
    assert not leftovers()


def test_no_permission_is_said(monkeypatch: pytest.MonkeyPatch, ckpt: Any) -> None:
    """Tests may run as root, whom no mode stops: the operating system's refusal is put in its place."""
    torch.save(STATE, "a.pth")
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **how: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest, **how)

    monkeypatch.setattr(os, "open", refuse)
    ran = ckpt("convert", "a.pth", "b.pth")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "ckpt: error: b.pth: Permission denied; nothing was written\n"


def test_a_closed_pipe_is_no_error() -> None:
    torch.save({f"layer.{i}.weight": torch.ones(1) for i in range(5000)}, "a.pth")
    command = f"{sys.executable} -c 'from ckptsurgeon.cli.app import main; main()' ls a.pth | head -1"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ran.stdout.split()[:3] == ["key", "dtype", "shape"]
    assert ran.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        "ls a.pth",
        "ls a.pth --json",
        "ls --params a.pth",
        "ls a.pth --tree",
        "diff a.pth a.pth",
        "rules",
        "--version",
        "-h",
    ],
)
def test_a_full_disk_below_the_standard_output_is_one_line(words: str) -> None:
    torch.save({f"layer.{i}.weight": torch.ones(1) for i in range(3000)}, "a.pth")
    command = f"{sys.executable} -c 'from ckptsurgeon.cli.app import main; main()' {words} > /dev/full"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ran.stderr == "ckpt: error: the standard output: No space left on device\n"
    assert ran.returncode == 2


def test_members_that_overlap_are_refused() -> None:
    """Two directory entries for the bytes of one member, under two names of one length."""
    import struct

    torch.save({"a": torch.ones(4), "b": torch.ones(4)}, "a.pth")
    with zipfile.ZipFile("a.pth") as archive:
        first = archive.getinfo("a/data/0").header_offset
    raw = bytearray(Path("a.pth").read_bytes())
    at = raw.index(b"PK\1\2")
    while raw[at : at + 4] == b"PK\1\2":
        n, m, k = struct.unpack_from("<3H", raw, at + 28)
        if raw[at + 46 : at + 46 + n] == b"a/data/0":
            struct.pack_into("<2L", raw, at + 20, 80, 80)
        at += 46 + n + m + k
    assert first < len(raw)
    Path("b.pth").write_bytes(raw)
    with pytest.raises(cs.InputError, match="'a/data/0' runs into"):
        cs.open("b.pth")


DAMAGE = {
    "a prefix": lambda raw: b"#!/bin/sh\n" + raw,
    "a suffix": lambda raw: raw + b"more",
    "two archives": lambda raw: raw + raw,
    "another name in place": lambda raw: raw.replace(b"a/data/0", b"a/data/9", 1),
    "another size in the directory": lambda raw: (
        raw.replace(b"PK\1\2", b"PK\1\2", 1)[:-22] + raw[-22:-12] + b"\xff\xff" + raw[-10:]
    ),
    "a pickle that is not its checksum": lambda raw: raw.replace(b"state_dict", b"state_dicT", 1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_an_ambiguous_archive_is_refused(case: str) -> None:
    torch.save({"state_dict": STATE}, "a.pth")
    raw = Path("a.pth").read_bytes()
    damaged = DAMAGE[case](raw)
    assert damaged != raw
    Path("b.pth").write_bytes(damaged)
    with pytest.raises(cs.InputError, match=r"^b\.pth: "):
        cs.open("b.pth")


def test_keys_are_data_on_a_terminal(ckpt: Any) -> None:
    torch.save({"a\x1b[31m\nb": torch.ones(2), "\u202eevil": torch.ones(2), "": torch.ones(1)}, "a.pth")
    ran = ckpt("ls", "a.pth")
    assert "\x1b" not in ran.out
    assert "\u202e" not in ran.out
    assert r"a\x1b[31m\nb" in ran.out
    assert [entry["key"] for entry in ckpt("ls", "a.pth", "--json").json["tensors"]] == [
        "a\x1b[31m\nb",
        "\u202eevil",
        "",
    ]


def test_the_tensor_is_named_whose_storage_is_not_there(ckpt: Any) -> None:
    state = {"a.weight": torch.randn(30), "b.weight": torch.nn.Parameter(torch.randn(40))}
    torch.save({"state_dict": state}, "a.pth")
    with zipfile.ZipFile("a.pth") as old, zipfile.ZipFile("b.pth", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/1"):
                new.writestr(name, old.read(name))
    assert "b.pth: 'b.weight': damaged a/data.pkl: the storage '1' is missing" in ckpt("ls", "b.pth").err
    save_legacy({"state_dict": {"a.weight": state["a.weight"]}}, "c.pth")
    Path("d.pth").write_bytes(Path("c.pth").read_bytes()[:-30])
    assert "d.pth: 'state_dict.a.weight': damaged: truncated: the storage" in ckpt("ls", "d.pth").err


def _pickle_zip(pickled: bytes, **members: bytes) -> None:
    """A torch zip around a pickle made by hand."""
    with zipfile.ZipFile("x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in members.items():
            archive.writestr(f"x/{name}", data)


def test_numbers_without_measure_are_refused_or_shown_in_short(ckpt: Any) -> None:
    huge = b"\x8b" + (2501).to_bytes(4, "little") + bytes(2500) + b"\x01"  # 2 ** 20000
    tensor = b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(K\x00" + huge + b"t(K\x01K\x01t\x89tR"
    _pickle_zip(b"\x80\x02}(X\x01\x00\x00\x00w" + tensor + b"u.")
    assert "is a number of 20001 bits, no count" in ckpt("ls", "x.pth").err
    _pickle_zip(b"\x80\x02}(" + huge + b"K\x01X\x01\x00\x00\x00l](" + huge + b"eu.")
    for words in (["--tree"], ["--extras"], ["--extras", "--json"]):
        assert ckpt("ls", "x.pth", *words).code == 0


def test_keys_that_are_costly_to_hash_are_no_keys(ckpt: Any) -> None:
    """Tuples of tuples of tuples, set as a key again and again."""
    level = (
        b"(" + b"K\x01" * 64 + b"tq\x01" + b"0(" + b"h\x01" * 64 + b"tq\x02" + b"0(" + b"h\x02" * 64 + b"tq\x03" + b"0"
    )
    _pickle_zip(b"\x80\x02" + level + b"}" + b"h\x03Ns" * 20_000 + b".")
    began = time.monotonic()
    assert ckpt("ls", "x.pth").code == 2
    assert time.monotonic() - began < 30


def test_a_word_is_no_reason_to_unpack_a_gigabyte(ckpt: Any) -> None:
    _pickle_zip(b"\x80\x02}.", byteorder=bytes(1 << 24))
    assert "byteorder has 16777216 bytes, neither little nor big" in ckpt("ls", "x.pth").err

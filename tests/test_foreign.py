"""Files of other programs, and archives around checkpoints: each is called by its name, with what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import safetensors_bytes, save_legacy

import ckptsurgeon as cs


def varint(value: int) -> bytes:
    made = b""
    while value > 0x7F:
        made, value = made + bytes([value & 0x7F | 0x80]), value >> 7
    return made + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """A protobuf field: a varint, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def node(name: bytes, operation: bytes) -> bytes:
    return field(1, field(1, name) + field(2, operation) + field(3, b"input"))


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("run")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, raw in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(raw)
            archive.addfile(header, io.BytesIO(raw))
    return buffer.getvalue()


def array(many: bool) -> bytes:
    buffer = io.BytesIO()
    if many:
        np.savez(buffer, a=np.ones(2), b=np.ones(3))
    else:
        np.save(buffer, np.ones(2))
    return buffer.getvalue()


ONNX = field(1, 8) + field(2, b"pytorch") + field(3, b"2.1") + field(7, b"\n\3abc" * 9) + field(8, b"\x10\x11")
FLAX = b"\x81\xa6params\x81\xa5Dense\x81\xa6kernel\xc7\x04\x01abcd"
SAVED = "and save them with safetensors"
EXPORTED = "it was exported for inference: take the checkpoint that it was made from"
FOREIGN: dict[str, tuple[bytes, str, str]] = {
    "onnx": (ONNX, "an ONNX model", EXPORTED),
    "onnx cut short": (ONNX[:60], "an ONNX model", EXPORTED),
    "gguf": (b"GGUF\3\0\0\0" + bytes(40), "a GGUF file", "take the safetensors or torch checkpoint"),
    "ggml": (b"lmgg" + bytes(40), "a GGML file", "take the safetensors or torch checkpoint"),
    "npz": (array(True), "a NumPy archive (.npz)", "read its arrays with numpy.load " + SAVED),
    "npy": (array(False), "a NumPy array (.npy)", "read its arrays with numpy.load " + SAVED),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", "read its arrays with h5py " + SAVED),
    "keras": (
        zipped({"metadata.json": b"{}", "config.json": b"{}", "model.weights.h5": b"\x89HDF"}),
        "a Keras model",
        "read its arrays with Keras " + SAVED,
    ),
    "frozen graph": (
        node(b"x", b"Placeholder") + node(b"w/read", b"Const") + field(4, b"\x08\x1b"),
        "GraphDef",
        EXPORTED,
    ),
    "saved model": (field(1, 1) + field(2, field(1, b"\n\5serve") + b"\x12\2ab"), "a TensorFlow SavedModel", EXPORTED),
    "tensorflow index": (
        bytes(range(64)) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
        "the index of a TensorFlow checkpoint",
        "read its arrays with tf.train.load_checkpoint " + SAVED,
    ),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "a TensorFlow Lite model", EXPORTED),
    "torch mobile": (b"\x1c\0\0\0PTMF" + bytes(40), "a torch mobile model", EXPORTED),
    "executorch": (b"\x1c\0\0\0ET12" + bytes(40), "an ExecuTorch program", EXPORTED),
    "coreml": (field(1, 4) + field(2, field(1, b"\n\5image")) + field(500, b"\n\1x" * 20), "a CoreML model", EXPORTED),
    "coreml package": (
        zipped({"m.mlpackage/Manifest.json": b"{}", "m.mlpackage/Data/com.apple.CoreML/model.mlmodel": b"x"}),
        "a CoreML package",
        EXPORTED,
    ),
    "coreml weights": (struct.pack("<2I", 3, 2) + bytes(56) + b"\xef\xbe\xad\xde", "weights of a CoreML", EXPORTED),
    "flax": (FLAX, "a msgpack file (Flax?)", "read its arrays with flax.serialization.msgpack_restore " + SAVED),
    "flax of many keys": (b"\xde\0\2" + FLAX[1:], "a msgpack file (Flax?)", SAVED),
    "torch export": (
        zipped({"m/archive_format": b"pt2", "m/models/model.json": b"{}"}),
        "a torch.export program",
        "save",
    ),
    "old torchscript": (
        zipped({"m/model.json": b"{}", "m/tensors/0": b"abcd"}),
        "a TorchScript archive of torch 1.0 to 1.3",
        "load it with torch.jit.load and save it again",
    ),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "`git lfs pull` fetches it"),
    "web page": (b"<!DOCTYPE html>", "a web page", "download it again"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(9), "a zstandard archive", "unpack it first"),
    "a damaged tar": (
        tarred({"a": b"x"}).replace(b"run", b"ruN", 1),
        "a tar archive whose first header is damaged",
        "",
    ),
    "text": (b"hello\n", "is no checkpoint", "readable are safetensors, torch-package, torchscript, torch-zip"),
    "one zero": (b"\0", "begins with zeros only", ""),
    "empty": (b"", "the file is empty", ""),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_called_by_their_names(case: str, ckpt: Any) -> None:
    raw, words, hint = FOREIGN[case]
    Path("x.pth").write_bytes(raw)
    for command in (["ls", "x.pth"], ["convert", "x.pth", "y.pth"]):
        ran = ckpt(*command)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("ckpt: error: x.pth: ")
        assert words in ran.err
        assert hint in ran.err
        assert ran.err.count("\n") == 1
    assert sorted(os.listdir(".")) == ["x.pth"]


def saved(save: Callable[[Any, Any], None], state: Any = None) -> bytes:
    save(state or {"w": torch.arange(300.0)}, "tmp")
    raw = Path("tmp").read_bytes()
    Path("tmp").unlink()
    return raw


CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "torch-zip": lambda: saved(torch.save),
    "torch-legacy": lambda: saved(save_legacy),
    "safetensors": lambda: safetensors_bytes(
        json.dumps({"w": {"dtype": "U8", "shape": [2000], "data_offsets": [0, 2000]}}).encode(), bytes(2000)
    ),
}
PACKINGS: dict[str, tuple[Callable[[bytes], bytes], str, str, str]] = {
    "gz": (gzip.compress, "a gzip archive", "tar xzf x", "gunzip -k x"),
    "bz2": (bz2.compress, "a bzip2 archive", "tar xjf x", "bunzip2 -k x"),
    "xz": (lzma.compress, "an xz archive", "tar xJf x", "unxz -k x"),
}


def refused(raw: bytes, name: str = "x") -> str:
    Path(name).write_bytes(raw)
    with pytest.raises(cs.InputError) as caught:
        cs.open(name)
    escaped = name.replace("\n", "\\n")
    assert str(caught.value).startswith(f"{escaped}: ")
    return str(caught.value).removeprefix(f"{escaped}: ")


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_checkpoint_says_what_it_is_and_how_to_unpack_it(packing: str, kind: str) -> None:
    pack, words, untar, unpack = PACKINGS[packing]
    raw = CHECKPOINTS[kind]()
    assert refused(pack(raw)) == f"is {words} around a {kind} file; unpack it first: {unpack}"
    inside = tarred({"run/README.md": b"hello", "run/model.pth": raw, "run/log": b"x" * 700})
    size = f"{len(raw) / 1024:.1f} KiB"
    assert refused(pack(inside)) == (
        f"is {words} around 'run/model.pth' (a {kind}, {size}) and 2 other files; unpack it first: {untar}"
    )


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_plain_tars_and_zips_around_a_checkpoint(kind: str) -> None:
    raw = CHECKPOINTS[kind]()
    size = f"{len(raw) / 1024:.1f} KiB"
    facts = f"around 'run/model' (a {kind}, {size})"
    members = {"run/a.txt": b"hello", "run/model": raw}
    assert refused(tarred(members)) == f"is a tar archive {facts} and 1 other file; unpack it first: tar xf x"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        packed = zipped({"run/": b"", **members}, method)
        assert refused(packed) == f"is a zip archive {facts} and 1 other file; unpack it first: unzip x"
    assert refused(zipped({"model": raw})) == f"is a zip archive {facts.replace('run/', '')}; unpack it first: unzip x"


def test_archives_without_a_checkpoint_say_what_they_hold() -> None:
    assert (
        refused(tarred({"a.txt": b"hello"})) == "is a tar archive around 'a.txt' (5 bytes); unpack it first: tar xf x"
    )
    assert refused(tarred({})) == "is a tar archive without a file; unpack it first: tar xf x"
    assert refused(gzip.compress(b"hello")) == "is a gzip archive; unpack it first: gunzip -k x"
    assert refused(zipped({"a.txt": b"hello"})).startswith("is a zip archive, but no torch checkpoint: no data.pkl (it")
    assert refused(zipped({"w.bin": b"hello"})).startswith("is a zip archive around 'w.bin' (5 bytes); unpack")


def test_names_are_escaped_and_the_command_is_quoted() -> None:
    raw = CHECKPOINTS["torch-zip"]()
    said = refused(gzip.compress(tarred({"\x1b[31m\n\u202e.pth": raw})), "a b.gz")
    assert said.startswith(r"is a gzip archive around '\x1b[31m\n\u202e.pth' (a torch-zip")
    assert said.endswith("; unpack it first: tar xzf 'a b.gz'")
    assert refused(gzip.compress(b"x"), "a\nb").endswith("; unpack it first: gunzip -k FILE")
    assert len(refused(zipped({"n" * 5000 + ".pth": raw}))) < 200


@pytest.mark.parametrize("packing", PACKINGS)
def test_damaged_and_truncated_archives_are_refused_as_what_they_are(packing: str) -> None:
    pack, words, *_ = PACKINGS[packing]
    noise = random.Random(0).randbytes(50_000)
    raw = pack(tarred({"run/model.pth": noise, "run/b.pth": noise}))
    for cut in (6, 10, 20, 200, len(raw) // 2, len(raw) - 1):
        assert refused(raw[:cut]).startswith(f"is {words}")
    damaged = bytearray(raw)
    damaged[30:60] = bytes(30)
    assert refused(bytes(damaged)).startswith(f"is {words}")


def test_a_size_that_is_a_lie_ends_the_look() -> None:
    raw = bytearray(tarred({"run/model.pth": b"x", "b": b"y"}))
    at = raw.index(b"run/model.pth")
    raw[at + 124 : at + 136] = b"\x80" + b"\xff" * 11
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 155] = f"{sum(raw[at : at + 512]):06o}\0".encode()
    for made in (bytes(raw), gzip.compress(bytes(raw))):
        assert "'run/model.pth' (" in refused(made)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_bomb_costs_little(packing: str) -> None:
    """Far more zeros than are looked at: a bound on processor time and on the memory of the process."""
    header = tarfile.TarInfo("bomb.pth")
    header.size = 1 << 30
    pack, path = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packing], Path("bomb")
    path.write_bytes(pack(header.tobuf() + bytes(64 << 20)))
    script = (
        "import ckptsurgeon as cs\n"
        "try: cs.open('bomb')\n"
        "except cs.InputError as error: print(error)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # noqa: E731
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, preexec_fn=limit)
    said, kilobytes = ran.stdout.splitlines()
    assert "around 'bomb.pth' (1024.0 MiB) and maybe more; unpack it first" in said
    assert int(kilobytes) < 64_000


def test_random_bytes_behind_every_beginning_never_crash() -> None:
    chance = random.Random(1)
    beginnings = [raw[:12] for raw, _, _ in FOREIGN.values()] + [
        b"BZh9",
        b"\xfd7zXZ\0",
        b"\x1f\x8b\x08",
        b"PK\3\4",
        b"\x08\x01\x12",
    ]
    for _ in range(400):
        Path("x").write_bytes(chance.choice(beginnings) + chance.randbytes(chance.choice((0, 5, 60, 700))))
        with pytest.raises(cs.InputError, match="^x: "):
            cs.open("x")

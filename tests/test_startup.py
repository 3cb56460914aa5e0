"""A look loads neither torch nor numpy, and reads only headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import safetensors_bytes, save_legacy
from safetensors.torch import save_file

STATE = {f"module.layers.{i}.weight": torch.ones(4, 3) for i in range(3)}
HEAVY = ("torch", "numpy", "rich", "ruamel", "timm", "transformers", "safetensors")


def modules_loaded_by(*words: str) -> set[str]:
    """The heavy top-level modules that a command imported, in a process of its own."""
    script = (
        "import json, sys\nfrom ckptsurgeon.cli.app import main\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "print(json.dumps([code or 0, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    code, names = json.loads(ran.stderr.splitlines()[-1])
    assert code in (0, 1), ran.stderr
    return set(names) & set(HEAVY)


@pytest.fixture(autouse=True)
def _files() -> None:
    torch.save({"state_dict": STATE, "epoch": 1}, "a.pth")
    save_legacy(STATE, "b.pth")
    save_file(STATE, "c.safetensors")


@pytest.mark.parametrize(
    "words",
    [
        ["ls", "a.pth"],
        ["ls", "b.pth"],
        ["ls", "c.safetensors", "--json"],
        ["ls", "--tree", "a.pth"],
        ["ls", "--params", "a.pth"],
        ["diff", "a.pth", "c.safetensors"],
        ["diff", "a.pth", "b.pth", "--rule", "strip module."],
        ["remap", "a.pth", "-o", "d.pth", "--rule", "strip module.", "--keep-extras"],
        ["remap", "a.pth", "-o", "d.safetensors", "--rule", "strip module."],
        ["remap", "b.pth", "-o", "d.pth", "--rule", r"reshape . 2,6", "--rule", r"unsqueeze . 0"],
        ["convert", "c.safetensors", "d.pth"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_neither_torch_nor_numpy(words: list[str]) -> None:
    assert modules_loaded_by(*words) == set()


@pytest.mark.parametrize(
    "words",
    [
        ["align", "a.pth", "d.pth"],
        ["remap", "a.pth", "--to", "d.pth", "--auto", "-o", "e.pth"],
        ["diff", "b.pth", "d.pth"],
    ],
    ids=" ".join,
)
def test_an_alignment_of_two_files_does_without_torch(words: list[str]) -> None:
    torch.save({key.replace("module.layers", "net.blocks"): value for key, value in STATE.items()}, "d.pth")
    assert "torch" not in modules_loaded_by(*words)


def test_opening_reads_headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the system calls: a file of 64 MB is opened with a few KB."""
    import ckptsurgeon as cs

    big = {f"l{i}": torch.zeros(1 << 20) for i in range(16)}
    torch.save(big, "big.pth")
    save_legacy(big, "big-legacy.pth")
    save_file(big, "big.safetensors")
    read = 0
    pread, preadv = os.pread, os.preadv

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += count
        return pread(descriptor, count, offset)

    def counted_into(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        got = preadv(descriptor, buffers, offset)
        read += got
        return got

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(os, "preadv", counted_into)
    for name, most in (("big.pth", 150_000), ("big-legacy.pth", 1_100_000), ("big.safetensors", 10_000)):
        read = 0
        assert cs.open(name).nbytes == 64 << 20
        assert 0 < read < most


def test_memory_does_not_grow_with_the_file() -> None:
    """A copy of 1 GB (a sparse file) in a process whose memory never held 96 MiB."""
    size = 1 << 30
    header = f'{{"w":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    Path("s.safetensors").write_bytes(safetensors_bytes(header))
    os.truncate("s.safetensors", 8 + len(header) + size)
    script = (
        "import sys\nimport ckptsurgeon as cs\n"
        "cs.convert('s.safetensors', sys.argv[1])\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    ran = subprocess.run([sys.executable, "-c", script, "out.pth"], capture_output=True, text=True, check=True)
    assert os.path.getsize("out.pth") > size
    assert int(ran.stdout) < 96 * 1024, f"{int(ran.stdout) // 1024} MiB"

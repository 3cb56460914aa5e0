"""Everything works within 4 GiB of address space, files of 8 GiB included; where that is too little it is said."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stream import big_state
from torch.serialization import skip_data

LIMIT = 4 << 30
HUGE = 8 << 30
COMMANDS = """
import sys
from ckptsurgeon.cli.app import main
for words in {commands!r}:
    sys.argv = ["ckpt", *words]
    try:
        main()
    except SystemExit as end:
        print("exit", end.code or 0, flush=True)
for line in open("/proc/self/status"):
    if line.startswith("VmPeak"):
        print(line.split()[1])
"""


def limited(commands: list[list[str]], limit: int = LIMIT) -> subprocess.CompletedProcess[str]:
    """All commands in one process of so many bytes of address space."""
    return subprocess.run(
        [sys.executable, "-c", COMMANDS.format(commands=commands)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )


def exits(ran: subprocess.CompletedProcess[str]) -> list[int]:
    return [int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("exit ")]


def test_every_command_works_within_four_gib() -> None:
    """Those that need torch, and a model, too; also with more threads than there are processors."""
    torch.save(big_state(), "a.pth")
    save_file(big_state(), "b.safetensors")
    save_file(big_state(), "in.safetensors")
    commands = [
        ["ls", "a.pth"],
        ["ls", "a.pth", "--tree"],
        ["diff", "a.pth", "in.safetensors"],
        ["remap", "a.pth", "-o", "renamed.pth", "--rule", "layers => blocks"],
        ["convert", "a.pth", "c.safetensors", "--jobs", "64"],
        ["convert", "b.safetensors", "c.pth"],
        ["convert", "a.pth", "cast.pth", "--dtype", "bf16"],
        ["convert", "a.pth", "shards/", "--shard-size", "300kB"],
        ["verify", "shards"],
        ["verify", "c.pth"],
        ["remap", "in.safetensors", "--in-place", "--rule", "layers => blocks"],
        ["ls", "a.pth", "--stats"],
        ["convert", "a.pth", "fp8.safetensors", "--dtype", "float8_e5m2"],
        ["diff", "a.pth", "renamed.pth", "--rule", "layers => blocks", "--values"],
        ["diff", "a.pth", "torchvision:resnet18,num_classes=10"],
        ["remap", "a.pth", "-o", "fit.pth", "--to", "torchvision:squeezenet1_1", "--fit", "--quiet"],
    ]
    ran = limited(commands)
    assert ran.stderr == ""
    assert exits(ran) == [0] * 14 + [1, 0]
    assert int(ran.stdout.split()[-1]) << 10 < LIMIT
    assert set(load_file("in.safetensors")) == {f"blocks.{i}.weight" for i in range(5)}


def huge_safetensors(path: str) -> None:
    """8 GiB of nothing, and a small tensor behind them."""
    places = {"big": ("U8", [HUGE], [0, HUGE]), "end": ("F32", [3], [HUGE, HUGE + 12])}
    header = json.dumps({k: {"dtype": d, "shape": s, "data_offsets": o} for k, (d, s, o) in places.items()}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(HUGE, os.SEEK_CUR)
        file.write(struct.pack("<3f", 1, 2, 3))


def huge_zip(path: str) -> None:
    """By torch, which leaves the data out; no record has a checksum then."""
    with skip_data():
        torch.save({"big": torch.empty(HUGE, dtype=torch.uint8), "end": torch.empty(3)}, path)
    with zipfile.ZipFile(path) as archive:
        members, at = archive.infolist(), archive.start_dir
    with open(path, "r+b") as file:
        for info in members:
            file.seek(info.header_offset + 14)
            file.write(bytes(4))
        file.seek(at)
        raw = bytearray(file.read())
        place = raw.find(b"PK\1\2")
        while place >= 0:
            raw[place + 16 : place + 20] = bytes(4)
            place = raw.find(b"PK\1\2", place + 4)
        file.seek(at)
        file.write(raw)


def test_files_of_eight_gib_are_looked_at_and_changed_within_four() -> None:
    """What is written is the small tensor, or a header."""
    huge_safetensors("a.safetensors")
    huge_zip("a.pth")
    commands = [
        ["ls", "a.safetensors"],
        ["ls", "a.pth", "--tree"],
        ["diff", "a.safetensors", "a.pth"],
        ["remap", "a.safetensors", "-o", "end.pth", "--rule", "drop big"],
        ["remap", "a.pth", "-o", "end.safetensors", "--rule", "drop big"],
        ["remap", "a.safetensors", "-o", "cast.safetensors", "--rule", "drop big", "--rule", "cast end bf16"],
        ["remap", "a.safetensors", "--in-place", "--rule", "big => huge"],
        ["remap", "a.safetensors", "--in-place", "--rule", "drop end"],
    ]  # fmt: skip
    ran = limited(commands)
    assert (ran.stderr, exits(ran)) == ("", [0] * 8)
    assert int(ran.stdout.split()[-1]) << 10 < 1 << 30
    assert torch.load("end.pth", weights_only=True)["end"].tolist() == [1, 2, 3]
    assert load_file("end.safetensors")["end"].tolist() == [0, 0, 0]
    assert load_file("cast.safetensors")["end"].tolist() == [1, 2, 3]
    assert os.path.getsize("a.safetensors") % HUGE < 1000
    assert sum(os.stat(name).st_blocks for name in os.listdir(".")) * 512 < 1 << 20


@pytest.mark.parametrize(("mib", "words"), [(36, "convert"), (42, "convert"), (60, "cast"), (700, "fp8")])
def test_a_machine_without_memory_is_an_error_of_one_line(mib: int, words: str) -> None:
    """Wherever it runs out: at the start, at a thread, at NumPy, at torch.  Nothing is left over."""
    torch.save(big_state(), "a.pth")
    command = {
        "convert": ["convert", "a.pth", "b.pth", "--jobs", "4"],
        "cast": ["convert", "a.pth", "b.pth", "--dtype", "bf16"],
        "fp8": ["convert", "a.pth", "b.pth", "--dtype", "float8_e5m2"],
    }[words]
    ran = limited([command], mib << 20)
    made = exits(ran)
    if made == [0] and words == "convert":  # so little is enough for some Pythons
        assert_written()
        return
    assert made == [2], ran.stderr
    assert ran.stderr.startswith("ckpt: error: the machine has no memory left ")
    assert ran.stderr.count("\n") == 1
    assert os.listdir(".") == ["a.pth"]


def assert_written() -> None:
    assert torch.load("b.pth", weights_only=True).keys() == big_state().keys()


def test_other_errors_keep_their_traceback() -> None:
    """Only what says that there is no memory is the machine's."""
    from ckptsurgeon.cli._sink import lacks_memory

    for error in (RuntimeError("boom"), RecursionError(), ImportError("no module"), OSError(5, "Input/output error")):
        assert not lacks_memory(error)
    for error in (
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        assert lacks_memory(error)
        wrapped = ImportError("numpy cannot be imported")
        wrapped.__cause__ = error
        assert lacks_memory(wrapped)

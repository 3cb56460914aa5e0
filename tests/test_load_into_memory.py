"""What loading into a live model takes in memory beside the model, each time in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MIB = 1 << 20
MOST = 128 * MIB
"""Bytes beside the model, whatever its size."""

MAKE = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT / "fixtures"), str(ROOT / "fixtures" / "make")]!r}
from pathlib import Path
import torch
from kinds import KINDS
w = torch.arange(64 << 20, dtype=torch.float32).view(512, -1)
KINDS["safetensors"].save({{"w": w}}, Path("safetensors"))
KINDS["zip 2"].save({{"w": w}}, Path("zip"))
KINDS["legacy 2"].save({{"w": w}}, Path("legacy"))
KINDS["zip 2"].save({{"w": w.view(1 << 13, 1 << 13).t()}}, Path("turned"))
KINDS["zip, big-endian"].save({{"w": w}}, Path("big"))
KINDS["zip, deflated"].save({{"w": w.clamp(max=3)}}, Path("deflated"))
KINDS["shards, safetensors, folder"].save({{"w": w[:256].clone(), "v": w[256:].clone()}}, Path("shards"))
"""

LOAD = """
import sys, torch
import ckptsurgeon as cs

def peak():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) << 10, int(lines["VmRSS"].split()[0]) << 10

path, shape, dtype, meta, how = {words!r}
state = dict.fromkeys(("w", "v") if path == "shards" else ("w",))
with torch.device("meta" if meta else "cpu"):
    model = torch.nn.ParameterDict({{key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key in state}})
torch.save(torch.nn.Linear(2, 2).state_dict(), "small.pth")
cs.load_into(torch.nn.Linear(2, 2).bfloat16(), "small.pth")  # everything is imported, and no more
for value in model.values():
    value.data.fill_(1)
_, before = peak()
report = cs.load_into(model, path, **how)
print(peak()[0] - before, sum(value.nbytes for value in model.values()), report.coverage)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    subprocess.run([sys.executable, "-c", MAKE], check=True, cwd=folder)
    return folder


CASES: dict[str, tuple[str, tuple[int, int], str, bool, dict[str, str]]] = {
    "safetensors": ("safetensors.safetensors", (512, 1 << 17), "float32", False, {}),
    "zip": ("zip.pth", (512, 1 << 17), "float32", False, {}),
    "zip, cast": ("zip.pth", (512, 1 << 17), "bfloat16", False, {}),
    "zip, a model on the meta device": ("zip.pth", (512, 1 << 17), "float32", True, {"assign": True}),
    "zip, a part": ("zip.pth", (350, 1 << 17), "float32", False, {"mismatched": "overlap"}),
    "legacy": ("legacy.pth", (512, 1 << 17), "float32", False, {}),
    "turned in its file": ("turned.pth", (1 << 13, 1 << 13), "float32", False, {}),
    "big-endian": ("big.pth", (512, 1 << 17), "float32", False, {}),
    "compressed": ("deflated.pth", (512, 1 << 17), "float32", False, {}),
    "shards": ("shards", (256, 1 << 17), "float32", False, {}),
    "a rule that computes": ("zip.pth", (512, 1 << 17), "float32", False, {"rules": ["scale . 2"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_large_tensor_is_never_held_twice(name: str, files: Path) -> None:
    """The high-water mark is the kernel's for this process alone: `ru_maxrss` would count that of its parent."""
    script = LOAD.format(words=CASES[name])
    ran = subprocess.run([sys.executable, "-c", script], check=True, cwd=files, capture_output=True, text=True)
    above, model, coverage = ran.stdout.split()
    own = int(model) if "meta" in name else 0
    assert int(above) - own <= MOST
    assert float(coverage) == 1

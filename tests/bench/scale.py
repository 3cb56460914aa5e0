"""Looks and plans of many keys and many shards, each case beside a script with torch.

    python tests/bench/scale.py [--rounds N] [--only WORD] [--files FOLDER]

`make` writes the files into a folder (where they are not there yet), `cases` lists what to run on them:
each command is a whole process.  Only `make` imports torch, in a process of its own: a child's peak is never
counted below its parent's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from look import measured

MAKE = """
import json, os, sys, torch
from safetensors.torch import save_file

FORMS = (("attn.qkv.weight", (3, 2)), ("attn.qkv.bias", (3,)), ("norm.weight", (2,)), ("norm.running_mean", (2,)),
         ("norm.num_batches_tracked", ()))

def state(count, wrapper="", wider=0):
    made = {}
    for i in range(count):
        name, shape = FORMS[i % len(FORMS)]
        dtype = torch.int64 if name.endswith("tracked") else torch.float32
        made[f"{wrapper}layers.{i // 50}.blocks.{i // 5 % 10}.{name}"] = torch.zeros(
            tuple(size + wider for size in shape), dtype=dtype)
    return made

def shards(folder, count, each):
    os.makedirs(folder)
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {f"layers.{i}.{j}.weight": torch.zeros(2, 2) for j in range(each)}
        save_file(part, os.path.join(folder, name))
        weight_map.update(dict.fromkeys(part, name))
    text = json.dumps({"metadata": {"total_size": 16 * count * each}, "weight_map": weight_map})
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        file.write(text)

folder = sys.argv[1]
def write(name, make):
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        make(path + ".part")
        os.rename(path + ".part", path)

for count in (10_000, 100_000, 200_000):
    write(f"{count}.pth", lambda path: torch.save(state(count), path))
for count in (100_000, 200_000):
    write(f"{count}.legacy.pth", lambda path: torch.save(state(count), path, _use_new_zipfile_serialization=False))
    write(f"{count}.safetensors", lambda path: save_file(state(count), path))
write("wrapped.pth", lambda path: torch.save({"state_dict": state(100_000, "module."), "epoch": 3}, path))
write("wider.pth", lambda path: torch.save(state(100_000, wider=1), path))
write("shards", lambda path: shards(path, 1000, 10))
"""
TOOL = [sys.executable, "-c", "from ckptsurgeon.cli.app import main; main()"]
RULES = (
    r"^layers\.(\d+)\.blocks\.(\d+)\. => stages.\1.units.\2.",
    r"\.attn\.qkv\. => .attention.in_proj.",
    r"running_mean$ => mean",
    r"drop num_batches_tracked$",
    r"prefix model.",
    r"\.norm\. => .ln.",
    r"^model\.stages\.(\d+)\. => model.s\1.",
    r"weight$ => kernel",
    r"cast \.bias$ bf16",
    r"strip model.",
)
"""Ten rules, each of which changes many of the keys."""
MANY_RULES = tuple(rf"^(layers\.\d*{i:02}\.blocks\.)(\d+)\.norm\. => \1\2.norm{i:02}." for i in range(50))
"""Fifty rules, each of which changes a fiftieth of the layers or less."""


@dataclass(frozen=True)
class Case:
    """A command, and what a script with torch would do instead ("" for none).

    `peak` is the most MiB that it may take, `ratio` the most of the script's time; `half` names the case
    of half the keys, of whose time it may take 2.3.
    """

    command: list[str]
    peer: str = ""
    peak: float | None = None
    ratio: float | None = None
    half: str | None = None


def make(folder: Path) -> None:
    """The files of all cases; about 250 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", MAKE, str(folder)], check=True)


def _load(*files: Path, kind: str = "torch") -> str:
    if kind == "safetensors":
        opened = "[safe_open({0!r}, 'pt').get_slice(k).get_shape() for k in safe_open({0!r}, 'pt').keys()]"
        return "from safetensors import safe_open; import torch; " + "; ".join(opened.format(str(f)) for f in files)
    each = (f"torch.load({str(file)!r}, map_location='meta', weights_only=True)" for file in files)
    return "import torch; " + "; ".join(each)


def _rules(rules: tuple[str, ...]) -> list[str]:
    return [word for rule in rules for word in ("--rule", rule)]


def cases(folder: Path) -> dict[str, Case]:
    """Every case by its name."""
    made: dict[str, Case] = {}
    small, zip_, double = folder / "10000.pth", folder / "100000.pth", folder / "200000.pth"
    wrapped, wider = folder / "wrapped.pth", folder / "wider.pth"
    made["ls 10,000"] = Case([*TOOL, "ls", str(small)], _load(small), 60, 0.15)
    made["diff 10,000"] = Case([*TOOL, "diff", str(small), str(small)], _load(small, small), 60, 0.15)
    made["ls 100,000"] = Case([*TOOL, "ls", str(zip_)], _load(zip_), 160, 0.15)
    made["ls 200,000"] = Case([*TOOL, "ls", str(double)], half="ls 100,000")
    made["ls --json 100,000"] = Case([*TOOL, "ls", "--json", str(zip_)], _load(zip_))
    made["diff 100,000"] = Case([*TOOL, "diff", str(zip_), str(zip_)], _load(zip_, zip_), 160)
    made["diff 200,000"] = Case([*TOOL, "diff", str(double), str(double)], half="diff 100,000")
    made["diff 100,000, every shape differs"] = Case([*TOOL, "diff", str(zip_), str(wider)], _load(zip_, wider), 160)
    made["diff 100,000, every name differs"] = Case([*TOOL, "diff", str(wrapped), str(zip_)], _load(wrapped, zip_), 160)
    for name, rules in (("10 rules", RULES), ("50 rules", MANY_RULES)):
        plan = [*TOOL, "remap", "--dry-run", *_rules(rules)]
        made[f"plan 100,000, {name}"] = Case([*plan, str(zip_)], _load(zip_), 160 if rules is RULES else None)
        made[f"plan 200,000, {name}"] = Case([*plan, str(double)], half=f"plan 100,000, {name}")
    for kind in ("legacy.pth", "safetensors"):
        one, two = folder / f"100000.{kind}", folder / f"200000.{kind}"
        ratio = 0.15 if kind == "legacy.pth" else None
        made[f"ls 100,000 {kind}"] = Case([*TOOL, "ls", str(one)], _load(one, kind=kind), 160, ratio)
        made[f"ls 200,000 {kind}"] = Case([*TOOL, "ls", str(two)], half=f"ls 100,000 {kind}")
        made[f"diff 100,000 {kind}"] = Case([*TOOL, "diff", str(one), str(one)], _load(one, one, kind=kind), 160)
    index = str(folder / "shards" / "model.safetensors.index.json")
    made["ls 1,000 shards"] = Case([*TOOL, "ls", index])
    made["ls 1,000 shards --match one"] = Case([*TOOL, "ls", index, "--match", r"^layers\.7\."])
    made["import typer"] = Case([sys.executable, "-c", "import typer"])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    parser.add_argument("--files", type=Path, help="a folder that keeps the files")
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.files or Path(temporary)).absolute()
        make(folder)
        report({name: case for name, case in cases(folder).items() if options.only in name}, options)


def report(chosen: dict[str, Case], options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    ratios: dict[str, list[float]] = {name: [] for name in chosen}
    peaks: dict[str, float] = {}
    peer_peaks: dict[str, float] = {}
    names = list(chosen)
    if not names:
        return
    for turn in range(options.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            case = chosen[name]
            pair = [("own", case.command)]
            if case.peer and not options.no_peer:
                pair.append(("peer", [sys.executable, "-c", case.peer]))
            took: dict[str, float] = {}
            for side, command in pair if turn % 2 else reversed(pair):
                took[side], peak = measured(command)
                into = peaks if side == "own" else peer_peaks
                into[name] = max(peak, into.get(name, 0.0))
            seconds[name].append(took["own"])
            if "peer" in took:
                ratios[name].append(took["own"] / took["peer"])
    print(f"{'':36} median s  of torch  of half  peak MiB  torch's MiB")
    for name in names:
        median = statistics.median(seconds[name])
        ratio = f"{statistics.median(ratios[name]):9.3f}" if ratios[name] else " " * 9
        half = chosen[name].half
        of_half = f"{median / statistics.median(seconds[half]):8.2f}" if half in seconds else " " * 8
        other = f"{peer_peaks[name]:8.0f}" if name in peer_peaks else ""
        print(f"{name:36} {median:8.3f} {ratio} {of_half}  {peaks[name]:8.0f}  {other}")


if __name__ == "__main__":
    main()

"""How long a look takes, beside `torch.load(map_location="meta")`, in the same run.

    python tests/bench/look.py [--rounds N] [--gib SIZE]

Each command is a whole process; the order changes every round, because the place in which a command
runs moves its time.  Printed are medians, the ratio to torch, and peak memory.  Absolute times
belong to the machine and the moment; the ratios are what counts.  This process stays small (it
does not import torch), because a child's peak is never counted below its parent's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAKE = """
import torch
torch.save({{f"blocks.{{i}}.weight": torch.zeros({each}) for i in range(64)}}, "{large}")
torch.save({{f"layers.{{i}}.weight": torch.zeros(2) for i in range(10_000)}}, "{many}")
"""
PEER = "import torch; torch.load('{file}', map_location='meta', weights_only=True)"
TOOL = "from ckptsurgeon.cli.app import main; main()"


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak MiB of one process."""
    began = time.perf_counter()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)  # with compiled modules, as installed
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{command} failed")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gib", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        large, many = Path(folder, "large.pth"), Path(folder, "many.pth")
        each = int(options.gib * (1 << 30) / 64 / 4)
        script = MAKE.format(each=each, large=large, many=many)
        subprocess.run([sys.executable, "-c", script], check=True)
        cases: dict[str, list[str]] = {}
        for name, file in ((f"{options.gib:g} GiB, 64 tensors", large), ("10,000 keys", many)):
            cases[f"torch.load meta  {name}"] = [sys.executable, "-c", PEER.format(file=file)]
            cases[f"ckpt ls          {name}"] = [sys.executable, "-c", TOOL, "ls", str(file)]
            cases[f"ckpt diff        {name}"] = [sys.executable, "-c", TOOL, "diff", str(file), str(file)]
        cases["import typer"] = [sys.executable, "-c", "import typer"]
        report(cases, options.rounds)


def report(cases: dict[str, list[str]], rounds: int) -> None:
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    for command in cases.values():
        measured(command)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took, peak = measured(cases[name])
            seconds[name].append(took)
            peaks[name] = max(peak, peaks.get(name, 0.0))
    print(f"{'':45} median s  of torch  peak MiB")
    for name in names:
        median = statistics.median(seconds[name])
        peer = next((other for other in names if other.startswith("torch") and name[17:] == other[17:]), None)
        pairs = zip(seconds[name], seconds[peer], strict=True) if peer else []
        ratios = [a / b for a, b in pairs]
        ratio = f"{statistics.median(ratios):8.3f}" if ratios else " " * 8
        print(f"{name:45} {median:8.3f}  {ratio}  {peaks[name]:8.0f}")


if __name__ == "__main__":
    main()

"""What loading into a live model costs, beside what people call today.

    python tests/bench/loading.py [--gib SIZE]... [--rounds N] [--folder FOLDER]

Times are of calls within one process, on one model that is in memory already, with the files in the page cache: the
ways of a case take turns, in another order each round, and the first round does not count.  Printed are medians, and
the median of the ratios of one round.  Peaks are the kernel's high-water mark of a process that loads once, above what
it had with its model made and everything imported.  The way `again` is the peer once more: its ratio to itself says
how much noise there is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from moving import MAKE

MODEL = """
import json, random, sys, time, torch
import ckptsurgeon as cs
from safetensors.torch import load_model

def model(dtype):
    made = torch.nn.Module()
    made.blocks = torch.nn.ModuleList(torch.nn.Linear(1024, {rows}, bias=False, dtype=dtype) for _ in range(64))
    return made

def peer(path, net):
    if path.endswith(".safetensors"):
        load_model(net, path)
    else:
        net.load_state_dict(torch.load(path, mmap=True, weights_only=True))

ways = {{"ckpt": lambda path, net: cs.load_into(net, path), "peer": peer, "again": peer}}
path, dtype, rounds, way = {path!r}, getattr(torch, {dtype!r}), {rounds}, {way!r}
"""
TIMES = """
net, seconds, last = model(dtype), {name: [] for name in ways}, None
for turn in range(rounds + 1):
    for name in random.sample(list(ways), len(ways)):
        begin = time.perf_counter()
        made = ways[name](path, net)
        if turn:
            seconds[name].append(time.perf_counter() - begin)
        last = made or last
begin = time.perf_counter()
str(last), last._repr_html_(), last.as_dict()
seconds["report"] = [time.perf_counter() - begin]
print(json.dumps(seconds))
"""
PEAK = """
def memory(word):
    return int(dict(line.split(":") for line in open("/proc/self/status"))[word].split()[0])

small = torch.nn.Linear(2, 2)
torch.save(small.state_dict(), path + ".small")
cs.load_into(small, path + ".small")
net = model(dtype)
before = memory("VmRSS")
ways[way](path, net)
print(json.dumps((memory("VmHWM") - before) / 1024))
"""


def ran(script: str, **words: object) -> object:
    text = MODEL.format(**words) + script
    done = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def run(title: str, path: Path, dtype: str, rows: int, rounds: int, bound: float | None) -> None:
    """Run one case and print its figures; `bound` is the ratio to its peer that it should keep."""
    words = {"path": str(path), "dtype": dtype, "rows": rows}
    seconds = ran(TIMES, **words, rounds=rounds, way="")
    assert isinstance(seconds, dict)
    peaks = {way: ran(PEAK, **words, rounds=0, way=way) for way in ("ckpt", "peer")}
    print(title)
    ratios = {}
    for way in ("ckpt", "peer", "again"):
        pairs = zip(seconds[way], seconds["peer"], strict=True)
        ratios[way] = statistics.median(a / b for a, b in pairs)
        peak = f"{peaks[way]:8.0f} MiB above the model" if way in peaks else ""
        print(f"  {way:6} {statistics.median(seconds[way]):8.3f} s  {ratios[way]:6.2f} of peer {peak}")
    share = 100 * seconds["report"][0] / statistics.median(seconds["ckpt"])
    wanted = [(peaks["ckpt"], 128.0, "MiB above the model"), (share, 1.0, "% of it for the report")]
    wanted += [(ratios["ckpt"], bound, "of peer")] if bound is not None else []
    for have, most, what in wanted:
        print(f"  {'kept' if have <= most else 'MISSED':6} {have:.2f} {what}, at most {most:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the files are made")
    options = parser.parse_args()
    for gib in options.gib or [1.0, 4.0]:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder, rows = Path(name), int(gib * (1 << 30) / 64 / 4 / 1024)
            subprocess.run([sys.executable, "-c", MAKE.format(rows=rows, folder=folder)], check=True)
            for kind in ("safetensors", "pth"):
                for dtype, bound in (("float32", 1.1), ("bfloat16", None)):
                    title = f"{kind} into a model of {dtype}, {gib:g} GiB"
                    run(title, folder / f"in.{kind}", dtype, rows, options.rounds, bound)


if __name__ == "__main__":
    main()

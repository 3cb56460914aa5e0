"""What moving bytes costs: each surgery beside a plain copy of the same bytes, and beside what people do today.

    python tests/bench/moving.py [--gib SIZE]... [--rounds N] [--only WORD] [--folder FOLDER]

Every command is a whole process and ends with its output on the disk (fsync).  The commands of a case run in
turn, in another order each round, with a sync and a pause between, because the place in which a command
runs moves its time by a quarter.  Printed are medians of the ratios of one round, and peak memory.  A second
plain copy is the control: its ratio to the first says how much noise there is.  mergekit's lazy loader is a
peer where it can be imported.  This process imports no torch: a child's peak is never counted below its parent's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from look import measured

MAKE = """
import torch
from safetensors.torch import save_file
state = {{f"blocks.{{i}}.weight": torch.randn({rows}, 1024) for i in range(64)}}
torch.save(state, "{folder}/in.pth")
save_file(state, "{folder}/in.safetensors")
"""
COPY = """
import os, sys
source, out = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
size, at = os.fstat(source).st_size, 0
while at < size:
    at += os.copy_file_range(source, out, size - at, at, at)
os.fsync(out)
"""
SYNC = "import os\ndef synced(path):\n    file = os.open(path, os.O_RDONLY); os.fsync(file)\n"
TORCH = SYNC + "import torch\nfrom safetensors.torch import load_file, save_file\n"
LOAD = {".pth": "torch.load({!r}, weights_only=True{})", ".safetensors": "load_file({!r}{})"}
SAVE = {
    ".pth": "torch.save(state, {0!r}); synced({0!r})",
    ".safetensors": "save_file({{k: v.contiguous() for k, v in state.items()}}, {0!r}); synced({0!r})",
}
HUGGING_FACE = (
    TORCH
    + """
from huggingface_hub.serialization import load_state_dict_from_file
state = {{k.replace('blocks', 'layers'): v.contiguous() for k, v in torch.load({source!r}, weights_only=True).items()}}
save_file(state, {output!r}, metadata={{'format': 'pt'}}); synced({output!r})
again = load_file({output!r})
assert all(torch.equal(state[k], again[k]) for k in state)
"""
)
SHARDS = (
    TORCH
    + """
from huggingface_hub import save_torch_state_dict
state = {{k.replace('blocks', 'layers'): v for k, v in load_file({source!r}).items()}}
os.makedirs({output!r})
save_torch_state_dict(state, {output!r}, max_shard_size='256MB')
[synced(os.path.join({output!r}, name)) for name in os.listdir({output!r})]
"""
)
MERGEKIT = (
    SYNC
    + """
import os
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tensor_writer import TensorWriter
loader = LazyTensorLoader(ShardedTensorIndex.from_file({source!r}))
writer = TensorWriter({output!r}, max_shard_size={size}, safe_serialization={safe})
for key in list(loader.index.tensor_paths):
    writer.save_tensor(key.replace('blocks', 'layers'), loader.get_tensor(key))
writer.finalize()
[synced(os.path.join({output!r}, name)) for name in os.listdir({output!r})]
"""
)
TOOL = [sys.executable, "-c", "from ckptsurgeon.cli.app import main; main()"]
RENAME = ["--rule", "blocks => layers"]


@dataclass(frozen=True)
class Case:
    """A surgery: its command, what others do instead by their names, and the ratios that it should keep:
    `copy` to a plain copy, `script` to the script with torch, `peak` in MiB."""

    source: str
    output: str
    words: list[str]
    peers: dict[str, str] = field(default_factory=dict)
    copy: float | None = None
    script: float | None = None
    peak: float | None = None


def script(source: str, output: str, change: str = "v", mmap: bool = False) -> str:
    kind, suffix = Path(source).suffix, Path(output).suffix
    loaded = LOAD[kind].format(source, ", mmap=True" if mmap else "")
    renamed = f"state = {{k.replace('blocks', 'layers'): {change} for k, v in {loaded}.items()}}\n"
    return TORCH + renamed + SAVE[suffix].format(output)


def cases(folder: Path) -> dict[str, Case]:
    """Every case by its name."""
    zip_, safe = str(folder / "in.pth"), str(folder / "in.safetensors")
    out_zip, out_safe, out_folder = (str(folder / name) for name in ("out.pth", "out.safetensors", "out"))
    made: dict[str, Case] = {}
    for name, source, output, copy, usual in (
        ("rename, zip → safetensors", zip_, out_safe, 1.25, 0.34),
        ("rename, safetensors → safetensors", safe, out_safe, 1.25, 0.5),
        ("rename, zip → zip", zip_, out_zip, 1.25, 0.34),
        ("rename, safetensors → zip", safe, out_zip, 1.5, 0.6),
    ):
        peers = {"torch": script(source, output)}
        if source == zip_:
            peers["torch mmap"] = script(source, output, mmap=True)
        if (source, output) == (zip_, out_safe):
            peers["convert of Hugging Face"] = HUGGING_FACE.format(source=source, output=output)
        peers["mergekit"] = MERGEKIT.format(source=source, output=out_folder, size=1 << 50, safe=output == out_safe)
        made[name] = Case(source, output, [*RENAME], peers, copy, usual, 96)
    for name, rules, change, usual, peak in (
        ("cast to bf16", ["--dtype", "bf16"], "v.to(torch.bfloat16)", 0.6, 128),
        ("cast to f16", ["--dtype", "f16"], "v.to(torch.float16)", None, None),
        ("transpose", ["--rule", "transpose ."], "v.t().contiguous()", None, None),
    ):
        peers = {"torch": script(safe, out_safe, change)}
        made[f"{name}, safetensors"] = Case(safe, out_safe, [*RENAME, *rules], peers, None, usual, peak)
    made["cast to bf16, zip"] = Case(
        zip_,
        out_zip,
        [*RENAME, "--dtype", "bf16"],
        {"torch": script(zip_, out_zip, "v.to(torch.bfloat16)")},
        None,
        0.6,
        128,
    )
    peers = {
        "save_torch_state_dict": SHARDS.format(source=safe, output=out_folder),
        "mergekit": MERGEKIT.format(source=safe, output=out_folder, size=256_000_000, safe=True),
    }
    made["shards of 256 MB"] = Case(safe, out_folder, [*RENAME, "--shard-size", "256MB"], peers, 1.25, 0.5, 96)
    return made


def commands(case: Case) -> dict[str, list[str]]:
    """What runs in a case, by name: a plain copy, the tool, its peers, and the copy again."""
    copy = [sys.executable, "-c", COPY, case.source, str(Path(case.source).parent / "copy")]
    made = {"copy": copy, "ckpt": [*TOOL, "remap", case.source, "-o", case.output, *case.words]}
    for name, text in case.peers.items():
        if name != "mergekit" or importlib.util.find_spec("mergekit"):
            made[name] = [sys.executable, "-c", text]
    made["copy again"] = copy
    return made


def cleared(folder: Path) -> None:
    """No output of the run before, nothing left to write."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("in."):
            path.unlink()
    os.sync()
    time.sleep(0.2)


def run(case: Case, folder: Path, rounds: int) -> None:
    """Run one case and print its figures."""
    all_ = commands(case)
    names = list(all_)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    for turn in range(rounds + 1):  # the first does not count: it fills the page cache
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            cleared(folder)
            took, peak = measured(all_[name])
            if turn:
                seconds[name].append(took)
                peaks[name] = max(peak, peaks[name])
    cleared(folder)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    for name in names:
        print(
            f"  {name:26} {statistics.median(seconds[name]):8.2f} s  {ratio(name, 'copy'):6.2f} of copy"
            f"  {peaks[name]:7.0f} MiB"
        )
    others = [f"{ratio('ckpt', name):.2f} of {name}" for name in names if name not in ("copy", "ckpt", "copy again")]
    print(f"  ckpt: {', '.join(others)}")
    wanted = [(ratio("ckpt", "copy"), case.copy, "of copy"), (peaks["ckpt"], case.peak, "MiB")]
    wanted += [(ratio("ckpt", "torch"), case.script, "of torch")] if "torch" in names else []
    for have, most, what in wanted:
        if most is not None:
            print(f"  {'kept' if have <= most else 'MISSED':6} {have:.2f} {what}, at most {most:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--folder", help="where the files are made (on the disk that is to be measured)")
    options = parser.parse_args()
    for gib in options.gib or [1.0, 4.0]:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            rows = int(gib * (1 << 30) / 64 / 4 / 1024)
            subprocess.run([sys.executable, "-c", MAKE.format(rows=rows, folder=folder)], check=True)
            for title, case in cases(folder).items():
                if options.only in title:
                    print(f"{title}, {gib:g} GiB")
                    run(case, folder, options.rounds)


if __name__ == "__main__":
    main()

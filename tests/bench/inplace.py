"""A rename in place and a look, of a sparse safetensors file of 100 GB and of one of 1 MB, and a plain copy of 1 GiB.

python tests/bench/inplace.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from look import measured
from moving import COPY, TOOL, cleared

SIZES = {"1 MB": 1 << 20, "100 GB": 100 << 30}
ONE = 1 << 30


def sparse(path: Path, size: int) -> None:
    """64 tensors with room in the header, and no block on the disk behind it."""
    each = size // 64
    entries = ",".join(
        f'"module.blocks.{i}.weight":{{"dtype":"U8","shape":[{each}],"data_offsets":[{i * each},{(i + 1) * each}]}}'
        for i in range(64)
    )
    header = f"{{{entries}}}".encode().ljust(8192)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 64 * each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, size in SIZES.items():
            sparse(folder / f"in.{label.split()[0]}.safetensors", size)
        block = os.urandom(1 << 20)
        with open(folder / "in.copied", "wb") as file:
            for _ in range(ONE >> 20):  # never held whole: a child's peak is never counted below its parent's
                file.write(block)
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        names = [f"{what} {label}" for what in ("ls", "in place") for label in SIZES] + ["copy of 1 GiB"]
        prefixes = dict.fromkeys(SIZES, "module.")
        for turn in range(options.rounds + 1):
            for case in names[turn % len(names) :] + names[: turn % len(names)]:
                label = case.partition(" ")[2].removeprefix("place ")
                file = str(folder / f"in.{label.split()[0]}.safetensors")
                if case.startswith("ls"):
                    command = [*TOOL, "ls", file]
                elif case.startswith("copy"):
                    cleared(folder)
                    command = [sys.executable, "-c", COPY, str(folder / "in.copied"), str(folder / "copy")]
                else:
                    rule = {"module.": "strip module.", "": "prefix module."}[prefixes[label]]
                    prefixes[label] = "" if prefixes[label] else "module."
                    command = [*TOOL, "remap", file, "--in-place", "--rule", rule]
                took, peak = measured(command)
                if turn:  # the first fills caches
                    seconds.setdefault(case, []).append(took)
                    peaks[case] = max(peak, peaks.get(case, 0.0))
        medians = {case: statistics.median(found) for case, found in seconds.items()}
        for case in names:
            print(f"{case:18} {medians[case]:8.3f} s  {peaks[case]:6.0f} MiB")
        print(f"in place, 100 GB to 1 MB: {medians['in place 100 GB'] / medians['in place 1 MB']:.2f}")
        print(
            f"in place, 100 GB to a copy of as much: {medians['in place 100 GB'] / medians['copy of 1 GiB'] / 100:.4f}"
        )


if __name__ == "__main__":
    main()

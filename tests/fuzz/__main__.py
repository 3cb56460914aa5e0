"""Fuzz readers for a stated time: `python -m tests.fuzz --seconds N [--target NAME]... [--how chance|guided]`.

Each target runs in a process of its own.  `chance` makes structured inputs of random choices; `guided` lets atheris
(libFuzzer) choose, for coverage of the package's code, at a tenth of the speed.  What is found is kept in the folder,
one file for each input and one for its traceback, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import seeds
from .names import NAMES
from .worker import REPORT

ROOT = seeds.TESTS.parent
COLUMNS = ("target", "executions", "per second", "edges", "features", "corpus", "findings", "peak MiB", "slowest s")
_STATUS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_GRACE = 300


def ran(target: str, sound: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report of one target, with what libFuzzer says of coverage; its end is a finding too, if it has no report."""
    command = [sys.executable, "-m", "tests.fuzz.worker", target, str(sound), str(folder), "--how", options.how]
    command += ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    command += ["--runs", str(options.runs)] if options.runs else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    try:
        made = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, timeout=options.seconds + _GRACE, check=False
        )
        said, code = made.stderr.decode("utf-8", "replace"), made.returncode
    except subprocess.TimeoutExpired as error:
        said, code = (error.stderr or b"").decode("utf-8", "replace"), -1
    report: dict[str, Any] = {"executions": 0, "seconds": 1.0, "findings": {}, "peak": 0, "slowest": 0.0}
    if (folder / REPORT).exists():
        report |= json.loads((folder / REPORT).read_text())
    if code or not report["executions"]:
        report["findings"] |= {f"the process ended with {code}: {said[-2000:]}": 1}
    counts = [found.groups() for found in _STATUS.finditer(said)]
    return report | dict(zip(("edges", "features", "corpus"), counts[-1] if counts else ("", "", ""), strict=True))


def row(target: str, report: dict[str, Any]) -> list[str]:
    rate = report["executions"] / max(report["seconds"], 1e-9)
    cells = [target, f"{report['executions']:,}", f"{rate:,.0f}", report["edges"], report["features"], report["corpus"]]
    return [*cells, str(len(report["findings"])), f"{report['peak'] / 2**20:.1f}", f"{report['slowest']:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--runs", type=int, help="inputs for each target, if they come first")
    parser.add_argument("--target", action="append", choices=NAMES)
    parser.add_argument("--how", choices=("chance", "guided"), default="chance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where findings are kept (a new folder under /tmp)")
    options = parser.parse_args()
    kept = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    kept.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    failed = False
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS), flush=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as work:
        sound = Path(work, "seeds")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "tests.fuzz.seeds", str(sound)], cwd=ROOT, env=environment, check=True)
        for target in options.target or NAMES:
            report = ran(target, sound, Path(work, target), options)
            print("| " + " | ".join(row(target, report)) + " |", flush=True)
            for path in sorted(Path(work, target).glob("finding-*")):
                (kept / f"{target}-{path.name}").write_bytes(path.read_bytes())
            for words, count in report["findings"].items():
                print(f"    {target}: {words} ({count} times)", file=sys.stderr)
            failed = failed or bool(report["findings"])
    if failed:
        print(f"findings are in {kept}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

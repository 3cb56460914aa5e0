"""One target for a time or a number of inputs, in a process of its own that imports no torch.

    python -m tests.fuzz.worker TARGET SEEDS FOLDER --how chance|guided --seconds N --runs N --seed N

Writes into the folder what was done and found (`REPORT`), and the input of every finding.  Memory is bounded by
RLIMIT_AS, so that whoever takes more fails where it asks; time by an alarm.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 10
"""What one input may take; more is a hang."""
SLOW = 1.0
MEMORY = 512 << 20
"""Bytes of address space that readers may take beside what the process has before the first input."""
_BATCH, _REPORTED = 200, 10
"""Inputs between looks at the clock, and seconds between reports."""
_MOST_FOUND = 60
REPORT = "report.json"
RAW = 0xFF
"""The first byte of an input that is a file as it stands; others are choices."""


class HangError(BaseException):
    """An input took too long."""


def hang(*_: Any) -> None:
    raise HangError


class Findings:
    """What came out that must not, one of each kind: the input, the traceback, and how often."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: dict[str, int] = {}
        self.executions = self.slowest = 0.0

    def run(self, target: Callable[[bytes], object], raw: bytes, alarm: bool = True) -> None:
        """Run one input; a `SIGALRM` that comes meanwhile must be `hang`."""
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        begin = time.perf_counter()
        try:
            target(raw)
        except (Exception, HangError) as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.note(raw, _kind(error), traceback.format_exc())
        took = time.perf_counter() - begin
        if took > SLOW:
            self.note(raw, "slow", f"{took:.1f} s")
        self.slowest = max(self.slowest, took)
        self.executions += 1

    def note(self, raw: bytes, kind: str, text: str) -> None:
        count = self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if count == 1 and len(self.kinds) < _MOST_FOUND:
            stem = self.folder / f"finding-{len(self.kinds)}"
            stem.with_suffix(".input").write_bytes(raw)
            stem.with_suffix(".txt").write_text(f"{kind}\n{text}", errors="backslashreplace")


def _kind(error: BaseException) -> str:
    """The type of an error and the places in the package that it went through last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "ckptsurgeon/" in frame.filename]
    places = [f"{frame.filename.rpartition('ckptsurgeon/')[2]}:{frame.name}" for frame in frames[-2:]]
    words = str(error).split(":")[0][:60] if type(error).__name__ == "Broken" else ""
    return " ".join([type(error).__name__, words, *places])


def _status(word: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(word))


def by_chance(target: Any, found: Findings, options: argparse.Namespace, report: Callable[[], None]) -> None:
    """Inputs made of random choices."""
    from .draw import Chance

    runs, number, due = options.runs, 0, time.monotonic() + _REPORTED
    end = time.monotonic() + options.seconds
    while number < runs and time.monotonic() < end:
        if time.monotonic() > due:
            due = time.monotonic() + _REPORTED
            report()
        faulthandler.dump_traceback_later(120, exit=True)
        for _ in range(min(_BATCH, runs - number)):
            found.run(target.run, target.make(Chance(options.seed + number)))
            number += 1
    faulthandler.cancel_dump_traceback_later()


def guided(target: Any, found: Findings, options: argparse.Namespace, report: Callable[[], None]) -> None:
    """Inputs that atheris (libFuzzer) makes for coverage; it ends the process: `report` is called on the way."""
    import random

    import atheris

    from .draw import Stream

    corpus = options.folder / "corpus"
    corpus.mkdir()
    chance = random.Random(options.seed)
    for number in range(200):
        (corpus / f"choices-{number}").write_bytes(bytes([number % RAW]) + chance.randbytes(chance.randrange(4, 600)))
    for path in options.seeds.iterdir():
        (corpus / path.name).write_bytes(bytes([RAW]) + path.read_bytes())
    due = 0.0

    def one(data: bytes) -> None:
        nonlocal due
        found.run(target.run, data[1:] if data[:1] == bytes([RAW]) else target.make(Stream(data[1:])))
        if time.monotonic() > due:
            due = time.monotonic() + 1
            report()

    ends = [f"-max_total_time={int(min(options.seconds, 1 << 30))}", f"-seed={options.seed + 1}", "-timeout=60"]
    ends += [f"-runs={options.runs}"] if options.runs < 1 << 31 else []
    atheris.Setup([sys.argv[0], *ends, "-max_len=4096", "-rss_limit_mb=2048", "-detect_leaks=0", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("seeds", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--how", choices=("chance", "guided"), default="chance")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--runs", type=int, default=1 << 60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.how == "guided":
        import atheris

        with atheris.instrument_imports(include=["ckptsurgeon"]):
            from . import targets
    else:
        from . import targets
    import numpy  # noqa: F401 - what gathers strides is no memory of a reader

    target = targets.table(options.seeds, options.folder)[options.target]
    found = Findings(options.folder)
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    signal.signal(signal.SIGALRM, hang)
    before = _status("VmHWM")
    if options.how == "chance":
        most = _status("VmSize") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    begin = time.monotonic()

    def report() -> None:
        told = {"executions": int(found.executions), "seconds": time.monotonic() - begin, "findings": found.kinds}
        told |= {"peak": _status("VmHWM") - before, "slowest": found.slowest}
        (options.folder / REPORT).write_text(json.dumps(told))

    if options.how == "guided":
        guided(target, found, options, report)
    else:
        by_chance(target, found, options, report)
        report()


if __name__ == "__main__":
    sys.setrecursionlimit(1000)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    main()

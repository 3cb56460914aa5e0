"""All benchmarks, each case beside its peers in the same run: `python tests/bench [--rounds N] [--only WORD]`.

What the figures mean stands in docs/performance.md; `aligning.py`, `moving.py`, `loading.py`, `scale.py`,
`inplace.py` and `look.py` can be run alone, with options of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PARTS = ("look.py", "scale.py", "inplace.py", "loading.py", "moving.py", "aligning.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    for part in (options.only,) if options.only else PARTS:
        print(f"== {part}", flush=True)
        command = [sys.executable, str(Path(__file__).parent / part), "--rounds", str(options.rounds)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

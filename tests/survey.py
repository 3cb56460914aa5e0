"""A table of what the commands make of every checkpoint below a folder: `python tests/survey.py FOLDER`.

With `--truth FILE` (files → main → keys: [dtype, shape, sha256 of the contiguous little-endian bytes]) what is
listed, and what the converted files hold when torch and safetensors load them, is held against it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

RUN = [sys.executable, "-c", "from ckptsurgeon.cli.app import main; main()"]
OUTPUTS = ("o.pth", "o.safetensors", "o/")


def run(*words: object) -> tuple[int, str, str]:
    ran = subprocess.run([*RUN, *map(str, words)], capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout, ran.stderr.strip()


def digest(value: torch.Tensor) -> list[Any]:
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return [str(value.dtype).removeprefix("torch."), list(value.shape), hashlib.sha256(raw).hexdigest()]


def loaded(path: Path) -> dict[str, list[Any]]:
    """What torch or safetensors read of an output."""
    if path.is_dir():
        return {key: value for part in sorted(path.glob("*.safetensors")) for key, value in loaded(part).items()}
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)
    return {key: digest(value) for key, value in state.items()}


def checked(file: Path, folder: Path, keys: Mapping[str, Any] | None) -> Iterator[str]:
    """One word for each output: its exit code, and whether it holds what it should."""
    first: dict[str, list[Any]] | None = dict(keys) if keys else None
    for name in OUTPUTS:
        code, _, _ = run(
            "convert", file, folder / name, "--shard-size" if name == "o/" else "--force", *(["1MB"] * (name == "o/"))
        )
        if code:
            yield str(code)
            continue
        got = loaded(folder / name)
        first = got if first is None else first
        yield "equal" if got == first else "DIFFERS"


def row(file: Path, keys: Mapping[str, Any] | None) -> list[str]:
    began = time.monotonic()
    code, out, err = run("ls", file, "--json")
    took = f"{time.monotonic() - began:.2f}"
    if code:
        return [str(code), "-", "-", took, "-", "-", "-", "-", err.removeprefix(f"ckpt: error: {file}: ")[:150]]
    found = json.loads(out)
    listed = [[entry["key"], entry["dtype"], entry["shape"]] for entry in found.get("tensors", [])]
    remark = "" if "tensors" in found else f"{len(found['candidates'])} state dicts"
    if keys is not None and sorted(listed) != sorted([key, *spec[:2]] for key, spec in keys.items()):
        remark = "LISTED DIFFERENTLY"
    with tempfile.TemporaryDirectory() as folder:
        made = list(checked(file, Path(folder), keys))
    verified = run("verify", file)[0]
    others = str(len(found.get("others", [])))
    return [str(code), found["format"], f"{len(listed)}+{others}", took, *made, str(verified), remark]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--truth", type=Path)
    given = parser.parse_args()
    truth = json.loads(given.truth.read_text())["files"] if given.truth else {}
    print("| file | ls | kind | tensors+others | s | .pth | .safetensors | shards | verify | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for file in sorted(path for path in given.folder.rglob("*") if path.is_file()):
        name = file.relative_to(given.folder).as_posix()
        keys = ((truth.get(name) or {}).get("main") or {}).get("keys")
        print("|", " | ".join([name, *row(file, keys)]), "|", flush=True)


if __name__ == "__main__":
    main()

"""Hostile files: nothing in them runs, no walk over them runs away, and each is opened or refused as its table says.

The cases are made by `fixtures/make/hostile/`; what must happen stands in `fixtures/hostile/cases.toml`:

- `opens`: `ckpt ls` exits 0, and `ckpt ls --tree` says the words;
- `damaged`: it opens, and `ckpt verify` exits 2 with the words;
- `refused`: `ckpt ls` exits 2 with the words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hostile import CASES, Canary, build

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "hostile_worker.py"
TABLE: dict[str, dict[str, str]] = tomllib.loads((ROOT / "fixtures" / "hostile" / "cases.toml").read_text())
ENDS = {"opens": ("ls", "0"), "damaged": ("verify", "2"), "refused": ("ls", "2")}
MEMORY, SECONDS, SAID = 512 << 20, 10, 2500
CHUNKS = 6
NAMES = list(CASES)


def test_every_case_has_its_line_in_the_table_and_there_are_enough() -> None:
    assert list(TABLE) == NAMES
    assert len(TABLE) >= 150
    assert {line["must"] for line in TABLE.values()} == set(ENDS)
    assert all(line["says"] for line in TABLE.values() if line["must"] != "opens")


def test_cases_are_the_same_bytes_each_time_they_are_made(tmp_path: Path) -> None:
    """And none of them is stored: the folder of the table holds text alone."""
    for name in NAMES[::40]:
        made = []
        for turn in ("a", "b"):
            folder = tmp_path / turn / name
            folder.mkdir(parents=True)
            target = folder / build(name, folder, Canary("/nowhere/fired"))
            made.append(target.read_bytes() if target.is_file() and target.stat().st_size < 1 << 28 else b"")
        assert made[0] == made[1], name
    assert {path.suffix for path in (ROOT / "fixtures" / "hostile").iterdir()} <= {".toml", ".md"}


@pytest.mark.parametrize("first", range(CHUNKS))
def test_each_case_is_opened_or_refused_as_the_table_says_and_nothing_in_it_runs(first: int, tmp_path: Path) -> None:
    """By every verb that reads, in a process where an audit hook sees imports, code, processes and foreign files."""
    names = NAMES[first::CHUNKS]
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path / "w"), *names],
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    found = {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert list(found) == names, f"the process died (exit code {done.returncode})"
    wrong = [f"{name}: {words}" for name in names for words in _wrong(found[name])]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0


def _wrong(result: dict[str, Any]) -> list[str]:
    """Everything that is not as it must be."""
    wrong = []
    line, ran = TABLE[result["name"]], result["ran"]
    if result["fired"]:
        wrong.append("a canary fired")
    if result["changed"]:
        wrong.append("the source is not as it was")
    wrong += [f"the hook saw {event}" for event in result["seen"][:3]]
    verb, end = ENDS[line["must"]]
    said = ran["ls --tree"]["out"] if line["must"] == "opens" else ran[verb]["err"]
    if (ran[verb]["end"], line["says"] in said) != (end, True):
        wrong.append(f"{verb} ended with {ran[verb]['end']} and said {said[:300]!r}")
    for verb, one in ran.items():
        if one["end"] not in ("0", "1", "2"):
            wrong.append(f"{verb}: {one['end']}")
        if one["seconds"] > SECONDS or one["peak"] > MEMORY + result["size"]:
            wrong.append(f"{verb}: {one['seconds']:.1f} s, {one['peak'] >> 20} MiB")
        if one["end"] != "0" and one["left"]:
            wrong.append(f"{verb} failed and left {one['left']}")
        if one["end"] in ("1", "2") and not _is_short(one["err"]) and one["err"]:
            wrong.append(f"{verb}: {len(one['err'])} characters in {one['err'].count(chr(10))} lines")
        odd = sorted({c for c in one["out"] + one["err"] if not c.isprintable() and c != "\n"})
        if odd:
            wrong.append(f"{verb} prints {odd[:5]!r}")
    return wrong


def _is_short(text: str) -> bool:
    """Whether this is an error of a line or two, or problems of a line each, none of which is long."""
    lines = text.splitlines()
    return len(lines) <= 11 and all(line.startswith("ckpt: ") and len(line) <= SAID for line in lines)


SAMPLE = (
    "reduce-system", "laughs-lists", "flood-integers", "deep-tuples", "deflate-bomb-pickle", "zip64-entries-huge",
    "safe-sparse-8-gib", "safe-sparse-too-long", "safe-deep-json", "shard-link-to-zero", "special-fifo",
    "name-zip-ansi", "tensor-expanded-4-tib", "legacy-storage-of-exabytes", "tar-size-huge",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_the_command_does_so_within_4_gib_of_addresses(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    marker = tmp_path / "fired"
    target = build(name, folder, Canary(str(marker)))
    code = "import sys; sys.argv[0] = 'ckpt'; from ckptsurgeon.cli.app import main; main()"
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 4194304; exec "$@"', "sh", sys.executable, "-c", code, "ls", str(folder / target)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    wanted = 2 if TABLE[name]["must"] == "refused" else 0
    assert (done.returncode, marker.exists()) == (wanted, False), done.stderr
    assert "Traceback" not in done.stderr
    if wanted:
        assert TABLE[name]["says"] in done.stderr


@pytest.mark.parametrize(
    "moves",
    [
        [".evil.safetensors.00000000.part", "my-thesis.txt"],
        [".my-thesis.txt.00000000.part", "my-thesis.txt"],
        [".model.safetensors.index.json.00000000.part/my-thesis.txt.part", "my-thesis.txt"],
    ],
)
def test_a_journal_from_elsewhere_replaces_nothing_that_it_does_not_belong_to(
    moves: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-thesis.txt").write_text("years of work")
    staged = Path(moves[0])
    staged.parent.mkdir(exist_ok=True)
    staged.write_text("evil")
    Path(".model.safetensors.index.json.journal").write_text(json.dumps({"moves": [moves], "aside": []}))
    ran = ckpt("verify", ".", "--repair")
    assert ran.code == 2
    assert "cannot be understood" in ran.err
    assert Path("my-thesis.txt").read_text() == "years of work"


def test_notes_and_wrong_selections_forge_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Any) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"a\nckpt: all is well": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, "a.pth")
    ran = ckpt("convert", "a.pth", "out.pth", "--select", "nope")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)


def test_a_big_endian_array_whose_dtype_says_so_by_its_name_alone_is_read_as_numpy_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy writes the order into the dtype's state; a pickle by hand may leave that out."""
    from hostile import _opcodes as op
    from hostile._containers import torch_zip

    import ckptsurgeon as cs

    monkeypatch.chdir(tmp_path)
    dtype = op.call("numpy", "dtype", op.text(">f4"), op.FALSE, op.TRUE)
    data = op.raw(b"\x3f\x80\0\0\x40\0\0\0")
    array = op.call("numpy._core.numeric", "_frombuffer", data, dtype, op.numbers(2), op.text("C"))
    Path("a.pth").write_bytes(torch_zip(op.pickle(op.items((op.text("w"), array)))))
    assert cs.open("a.pth")["w"].read().tolist() == [1.0, 2.0]

"""The command line: forms of output, streams, exit codes, and that it says what the API says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import assert_same_tensors
from models import Net
from resnet18 import telling
from safetensors.torch import load_file

import ckptsurgeon as cs

SPEC = f"{ROOT}/fixtures/models.py:Net"


@pytest.fixture
def bundle() -> str:
    state = {f"module.{key}": value for key, value in telling(Net(num_classes=100)).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, "a.pth")
    return "a.pth"


def test_ls_prints_one_whole_row_a_key(ckpt: Any) -> None:
    long = "a." * 150 + "weight"
    torch.save({long: torch.ones(2), "b": torch.ones(3, 1, dtype=torch.int64)}, "a.pth")
    lines = ckpt("ls", "a.pth").out.splitlines()
    assert lines[1].split() == [long, "float32", "[2]", "8"]
    assert lines[2].split() == ["b", "int64", "[3,", "1]", "24"]
    assert lines[4:] == ["a.pth: torch-zip", "2 tensors, 5 elements, 32 B"]


def test_ls_match_limit_and_stats(ckpt: Any) -> None:
    torch.save(
        {"a.w": torch.tensor([1.0, 3.0, float("nan"), float("inf")]), "a.b": torch.arange(4), "c": torch.ones(1)},
        "a.pth",
    )
    assert [e["key"] for e in ckpt("ls", "a.pth", "--match", r"^a\.", "--json").json["tensors"]] == ["a.w", "a.b"]
    ran = ckpt("ls", "a.pth", "--limit", "1")
    assert "… and 2 more keys (--limit)" in ran.out
    stats = {e["key"]: e["stats"] for e in ckpt("ls", "a.pth", "--stats", "--json").json["tensors"]}
    assert stats["a.w"] == {"minimum": 1.0, "maximum": 3.0, "mean": 2.0, "std": 1.0, "nan": 1, "inf": 1}
    assert stats["a.b"]["mean"] == 1.5
    assert stats["a.b"]["std"] == pytest.approx(torch.arange(4).double().std(correction=0))
    assert ckpt("ls", "a.pth", "--match", "(").code == 2


def test_stats_over_many_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon import limits, stats, tensor

    w = torch.randn(5000, 3) + 5
    torch.save({"w": w}, "a.pth")
    ref = cs.open("a.pth")["w"]
    blocks = tensor.TensorRef.blocks
    monkeypatch.setattr(tensor.TensorRef, "blocks", lambda self, size=limits.BLOCK: blocks(self, 1024))
    got, want = stats.of(ref), w.double()
    assert got.mean == pytest.approx(float(want.mean()), rel=1e-12)
    assert got.std == pytest.approx(float(want.std(correction=0)), rel=1e-12)


def test_ls_tree_draws_the_bundle(ckpt: Any, bundle: str) -> None:
    lines = ckpt("ls", "--tree", bundle).out.splitlines()
    assert lines[0].startswith("a.pth  torch-zip: dict of 3: 14 tensors")
    assert lines[1:3] == ["├── epoch  int 3", "├── state_dict  dict of 14: 14 tensors, 5.3 KiB"]
    assert "│       ├── blocks.{0-2}" in lines
    tree = ckpt("ls", "--tree", bundle, "--json").json["tree"]
    assert [child["name"] for child in tree["children"]] == ["epoch", "state_dict", "optimizer"]


def test_the_tree_says_why_a_small_tensor_is_large_and_what_was_not_imported(ckpt: Any) -> None:
    from argparse import Namespace

    torch.save({"w": torch.zeros(1 << 20)[:2], "args": Namespace(lr=0.1)}, "a.pth")
    out = ckpt("ls", "--tree", "a.pth").out
    assert "w  float32 [2], 8 B of a storage of 4.0 MiB" in out
    assert "args  argparse.Namespace (not imported)" in out
    assert "lr  float 0.1" in out


def test_remap_does_what_it_says_and_says_what_it_does(ckpt: Any, bundle: str) -> None:
    ran = ckpt("remap", bundle, "--rule", "strip module.", "--to", SPEC, "--fit", "-o", "b.safetensors")
    assert ran.code == 0
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert lines[0] == "strip module.: 14 tensors, as module.stem.weight → stem.weight"
    assert f"  module.fc.weight: other shape: [100, 8] in the checkpoint, [10, 8] in {SPEC}" in lines
    assert f"  fc.weight: initialised as {SPEC} does" in lines
    assert f"from the checkpoint: 12 of 14 tensors of {SPEC}, 83.78 % of the elements" in lines
    assert "wrote b.safetensors (safetensors): 14 tensors, 555 elements, 2.2 KiB" in lines
    assert "not kept: epoch, optimizer (--keep-extras keeps what it can)" in lines
    Net().load_state_dict(load_file("b.safetensors"))


def test_a_dry_run_writes_nothing_and_tells_all(ckpt: Any, bundle: str) -> None:
    ran = ckpt("remap", bundle, "--rule", "strip module.", "--dry-run")
    assert ran.code == 0
    assert "would write 14 tensors" in ran.out
    assert os.listdir(".") == [bundle]
    data = ckpt("remap", bundle, "--rule", "strip module.", "--dry-run", "--json").json
    assert data["steps"][0]["edges"][0] == [["module.stem.weight"], ["stem.weight"]]
    assert data["written"] is None
    ran = ckpt("remap", bundle, "--to", SPEC, "--dry-run")
    assert ran.code == 1
    assert "is no key of" in ran.err
    assert ran.out.splitlines()[-1] == "nothing would be written: 28 problems"


def test_a_fit_to_nothing_is_a_warning(ckpt: Any) -> None:
    torch.save({"other": torch.ones(2)}, "a.pth")
    ran = ckpt("remap", "a.pth", "--to", SPEC, "--fit", "-o", "b.pth")
    assert ran.code == 0
    assert f"warning: no tensor of {SPEC} comes from the checkpoint" in ran.err
    assert "from the checkpoint: 0 of 14 tensors" in ran.out


def test_a_rename_by_target_is_reported_one_by_one(ckpt: Any) -> None:
    torch.save({"stem.net.weight": torch.ones(8, 3, 3, 3), "fc.net.bias": torch.ones(10)}, "a.pth")
    ran = ckpt(
        "remap", "a.pth", "--rule", r"\.net\. => . when=target", "--to", SPEC, "--missing", "skip", "-o", "b.pth"
    )
    assert ran.out.splitlines()[:3] == [
        r"\.net\. => . when=target: 2 tensors",
        "  stem.net.weight → stem.weight",
        "  fc.net.bias → fc.bias",
    ]


def test_what_another_file_as_target_means(ckpt: Any) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, "target.pth")
    torch.save({"a": torch.zeros(2).half()}, "a.pth")
    out = ckpt("remap", "a.pth", "--to", "target.pth", "--missing", "init", "-o", "b.pth").out
    assert "  b: taken from target.pth" in out
    assert "dtype: 1 tensor not of the target's dtype (float16 for float32)" in out


def test_a_format_that_cannot_hold_the_result_is_a_problem_of_the_plan(ckpt: Any) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex128), "a\ud800": torch.ones(1)}, "a.pth")
    ran = ckpt("remap", "a.pth", "-o", "b.safetensors", "--rule", "drop nothing", "--dry-run", "--json")
    assert ran.code == 1
    assert len(ran.json["problems"]) == 3
    assert "holds names that are UTF-8" in ran.err


def test_the_tree_of_a_part(ckpt: Any, bundle: str) -> None:
    assert ckpt("ls", "--tree", bundle, "--select", "optimizer").out.splitlines()[1:] == [
        "├── state  dict of 0",
        "└── param_groups  list of 0",
    ]
    assert ckpt("ls", "--tree", bundle, "--select", "nothing").code == 2


def test_a_terminated_process_leaves_no_half_written_file() -> None:
    """Killed while it writes: a cast of 200 MB goes through blocks, between which the signal comes."""
    import signal
    import subprocess
    import sys
    import time

    torch.save({"w": torch.zeros(100_000_000)}, "a.pth")
    script = "from ckptsurgeon.cli.app import main; main()"
    process = subprocess.Popen([sys.executable, "-c", script, "convert", "a.pth", "b.pth", "--dtype", "f64"])
    while not any(name.endswith(".part") for name in os.listdir(".")):
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert os.listdir(".") == ["a.pth"]


def test_problems_are_exit_1_and_at_most_ten_and_nothing_is_written(ckpt: Any, bundle: str) -> None:
    ran = ckpt("remap", bundle, "--to", SPEC, "-o", "b.pth")
    assert (ran.code, ran.out) == (1, "")
    lines = ran.err.splitlines()
    assert len(lines) == 11
    assert all(line.startswith("ckpt: error: ") for line in lines)
    assert lines[-1] == "ckpt: error: … and 18 more problems"
    assert os.listdir(".") == [bundle]
    data = ckpt("remap", bundle, "--to", SPEC, "-o", "b.pth", "--json").json
    assert data["ok"] is False
    assert len(data["problems"]) == 28


def test_rule_text_at_fault_is_exit_2_with_every_line_underlined(ckpt: Any, bundle: str) -> None:
    ran = ckpt("remap", bundle, "-o", "b.pth", "--rule", "drop (", "--rule", "x")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[:3] == [
        "ckpt: error: not a regular expression: missing ), unterminated subpattern",
        "    drop (",
        "         ^",
    ]
    assert ran.err.count("ckpt: error: ") == 2


USAGE = {
    "no output": ["remap", "a.pth"],
    "a policy without a target": ["remap", "a.pth", "-o", "b.pth", "--fit"],
    "an unknown policy": ["remap", "a.pth", "-o", "b.pth", "--missing", "guess"],
    "an unknown dtype": ["convert", "a.pth", "b.pth", "--dtype", "f99"],
    "an integer dtype": ["convert", "a.pth", "b.pth", "--dtype", "int8"],
    "extras in safetensors": ["convert", "a.pth", "b.safetensors", "--keep-extras"],
    "no argument": ["ls"],
    "an unknown option": ["ls", "a.pth", "--nothing"],
    "a tree with a pattern": ["ls", "a.pth", "--tree", "--match", "x"],
    "an unknown command": ["list", "a.pth"],
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage_is_exit_2_on_stderr(case: str, ckpt: Any, bundle: str) -> None:
    ran = ckpt(*USAGE[case])
    assert (ran.code, ran.out) == (2, "")
    assert ran.err
    assert os.listdir(".") == [bundle]


def test_quiet_prints_nothing_and_keeps_the_exit_code(ckpt: Any, bundle: str) -> None:
    for words, code in (
        (["ls", bundle], 0),
        (["diff", bundle, SPEC], 1),
        (["convert", bundle, "b.pth", "--keep-extras"], 0),
        (["remap", bundle, "--rule", "strip module.", "-o", "c.pth"], 0),
    ):
        ran = ckpt(*words, "--quiet")
        assert (ran.code, ran.out, ran.err) == (code, "", "")


def test_optimizer_state_goes_with_what_becomes_of_the_parameters(ckpt: Any) -> None:
    model = Net()
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    torch.save({"model": model.state_dict(), "optim": made.state_dict()}, "a.pth")
    gone = [index for index, name in enumerate(dict(model.named_parameters())) if name.startswith("fc.")]
    for rules, lost in (
        ([], []),
        (["--rule", "^fc => head"], []),
        (["--rule", "drop ^fc"], gone),
        (["--dtype", "f16"], []),
        (["--rule", "permute ^stem.weight$ 0,1,3,2"], []),
    ):
        ran = ckpt("remap", "a.pth", "-o", "b.pth", "--keep-extras", "--force", *rules)
        assert (ran.code, ran.err) == (0, "")
        got = torch.load("b.pth", weights_only=True)["optim"]
        state = [entry for index, entry in made.state_dict()["state"].items() if index not in lost]
        assert got["param_groups"] == [{**made.state_dict()["param_groups"][0], "params": list(range(len(state)))}]
        for index, entry in enumerate(state):
            if "permute" in str(rules) and entry["momentum_buffer"].ndim == 4:
                entry = {"momentum_buffer": entry["momentum_buffer"].permute(0, 1, 3, 2)}
            assert_same_tensors(got["state"][index], entry)


def test_the_api_does_what_the_command_does(ckpt: Any, bundle: str) -> None:
    ckpt("remap", bundle, "--rule", "strip module.", "--to", SPEC, "--fit", "--seed", "7", "-o", "a.safetensors")
    cs.remap(bundle, "b.safetensors", ["strip module."], SPEC, fit=True, seed=7)
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_a_recipe_runs_before_the_rules(ckpt: Any, bundle: str) -> None:
    Path("r.yaml").write_text("version: 1\nselect: state_dict\nrules: ['strip module.']\n")
    ckpt("remap", bundle, "--recipe", "r.yaml", "--rule", "^fc => head", "-o", "b.pth")
    assert list(torch.load("b.pth", weights_only=True))[-2:] == ["head.weight", "head.bias"]


def test_help_is_whole_and_plain(ckpt: Any) -> None:
    for command in ("ls", "diff", "remap", "convert"):
        ran = ckpt(command, "--help")
        assert ran.code == 0
        assert ran.out.startswith("Usage: ")
    assert "--version" in ckpt("--help").out
    assert ckpt("--version").out == f"ckptsurgeon {cs.__version__}\n"


def test_json_is_one_object_and_ascii(ckpt: Any, bundle: str) -> None:
    torch.save({"é": torch.ones(1)}, "e.pth")
    for words in (["ls", "e.pth"], ["diff", "e.pth", bundle], ["convert", "e.pth", "f.pth"], ["ls", "--tree", "e.pth"]):
        out = ckpt(*words, "--json").out
        assert out.isascii()
        assert json.loads(out)["schema"].startswith("ckptsurgeon.")


def test_bugs_keep_their_traceback(ckpt: Any, bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon import formats

    def broken(path: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(formats, "inspect", broken)
    with pytest.raises(ZeroDivisionError):
        ckpt("ls", bundle)


def test_progress_is_drawn_on_a_terminal_after_a_second(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from ckptsurgeon.cli import _progress

    monkeypatch.setattr(_progress, "_PATIENCE", 0.0)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with _progress.bar("writing b.pth", shown=True) as report:
        assert report is not None
        report(1 << 20, 4 << 20)
        report(4 << 20, 4 << 20)
    assert "writing b.pth" in capsys.readouterr().err
    with _progress.bar("writing", shown=False) as report:
        assert report is None


def test_a_long_wait_says_what_is_going_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import time

    from ckptsurgeon.cli import _progress

    monkeypatch.setattr(_progress, "_PATIENCE", 0.01)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with _progress.busy("building a model", shown=True):
        time.sleep(0.5)
    assert "building a model" in capsys.readouterr().err
    monkeypatch.setattr(_progress, "_PATIENCE", 60)
    with _progress.busy("short", shown=True):
        pass
    assert capsys.readouterr().err == ""


def test_a_file_name_on_the_progress_line_is_no_markup() -> None:
    from rich.text import Text

    from ckptsurgeon.cli import _progress

    for words, seen in (
        ("[red]x[/red].pth", "[red]x[/red].pth"),
        ("a\x1b[2J\n.pth", r"a\x1b[2J\n.pth"),
        ("\\[b]", "\\[b]"),
    ):
        assert Text.from_markup(_progress._plain(words)).plain == seen


def test_the_operations_are_listed_and_told_of(ckpt: Any) -> None:
    from ckptsurgeon.ops import OPERATIONS

    out = ckpt("rules").out
    assert all(op.usage() in out and op.help in out for op in OPERATIONS.values())
    one = ckpt("rules", "split").out
    assert OPERATIONS["split"].example in one
    assert "sizes=SIZES" in one
    assert ckpt("rules", "split", "--json").json["operations"][0]["loss"] == "exact"
    ran = ckpt("rules", "spilt")
    assert (ran.code, "no operation is called 'spilt'; there are split" in ran.err) == (2, True)

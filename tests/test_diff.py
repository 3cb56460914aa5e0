"""Differences: what differs, how much is covered, and what would mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Net
from resnet18 import telling

import ckptsurgeon as cs
from ckptsurgeon.checkpoint import TargetEntry
from ckptsurgeon.differ import mend_of
from ckptsurgeon.dtypes import parse_dtype

SPEC = f"{Path(__file__).parent.parent}/fixtures/models.py:Net"


def state(**how: int) -> dict[str, torch.Tensor]:
    return dict(telling(Net(**how)).state_dict())


def test_the_same_is_the_same(ckpt: Any) -> None:
    torch.save(state(), "a.pth")
    assert cs.diff("a.pth", Net()).same
    ran = ckpt("diff", "a.pth", SPEC)
    assert ran.code == 0
    assert ran.out.splitlines() == [
        f"a.pth against {SPEC}: 14 matched",
        "coverage: 14 of 14 tensors (100 %), 555 of 555 elements (100 %)",
    ]


def test_every_status_and_the_coverage() -> None:
    have = state(num_classes=100)
    have["extra"] = have.pop("norm.bias")
    torch.save(have, "a.pth")
    found = cs.diff("a.pth", Net())
    assert {row.key: row.status for row in found.rows if row.status != "matched"} == {
        "fc.weight": "shape",
        "fc.bias": "shape",
        "norm.bias": "missing",
        "extra": "unexpected",
    }
    total = sum(value.numel() for value in Net().state_dict().values())
    assert (found.coverage.tensors, found.coverage.of_tensors) == (11, 14)
    assert found.coverage.numel == total - 8 - 80 - 10
    assert found.coverage.of_numel == total


def test_dtypes_count_between_files_and_not_against_a_model(ckpt: Any) -> None:
    torch.save(state(), "a.pth")
    cs.convert("a.pth", "b.pth", dtype="bf16")
    found = cs.diff("b.pth", "a.pth")
    assert found.count("dtype") == 13
    assert not found.same
    assert ckpt("diff", "b.pth", "a.pth").code == 1
    ran = ckpt("diff", "b.pth", SPEC)
    assert ran.code == 0
    assert "dtype: 13 matched tensors with another dtype (bfloat16 for float32); loading casts them" in ran.out


def test_layers_are_merged_only_when_shapes_agree(ckpt: Any) -> None:
    have = {f"layers.{i}.w": torch.ones(3 if i != 4 else 5) for i in range(12) if i != 6}
    torch.save(have, "a.pth")
    torch.save({}, "b.pth")
    lines = ckpt("diff", "a.pth", "b.pth").out.splitlines()
    assert lines[1].split() == ["unexpected", "layers.{0-3,5,7-11}.w", "×10", "float32", "[3]", "–"]
    assert lines[2].split() == ["unexpected", "layers.4.w", "float32", "[5]", "–"]


MENDS = {
    "squeeze": ("conv1.weight", (64, 3, 1, 7, 7), (64, 3, 7, 7), "squeeze dimension 2", r"squeeze ^conv1\.weight$ 2"),
    "unsqueeze": ("w", (64, 3, 7, 7), (64, 3, 1, 7, 7), "unsqueeze dimension 2", "unsqueeze ^w$ 2"),
    "scalar": ("n", (1,), (), "squeeze dimension 0", "squeeze ^n$ 0"),
    "ones elsewhere": ("w", (1, 5), (5, 1), "dimensions of size 1 in other places", "reshape ^w$ 5,1"),
    "transpose": ("w", (512, 256), (256, 512), "transpose", "transpose ^w$"),
    "permute": ("w", (3, 5, 64, 128), (128, 64, 3, 5), "permute", "permute ^w$ 3,2,0,1"),
    "permute or another": ("w", (3, 3, 64, 128), (128, 64, 3, 3), "2 permutes fit", None),
    "reshape": ("w", (768, 3, 16, 16), (768, 768), "a reshape", "reshape ^w$ 768,768"),
    "head": ("fc.weight", (1000, 512), (10, 512), "a head of another size: 1000 → 10 outputs", None),
    "head bias": ("fc.bias", (1000,), (10,), "a head of another size: 1000 → 10 outputs", None),
    "inner head": ("blocks.0.head.weight", (64, 8), (128, 8), "another number of outputs: 64 → 128", None),
    "outputs": ("layer2.0.bn1.weight", (64,), (128,), "another number of outputs: 64 → 128", None),
    "an odd key": ("a 'b\" c", (2, 1), (2,), "squeeze dimension 1", None),
    "vocabulary": ("wte.weight", (50257, 8), (50304, 8), "another vocabulary: 50257 → 50304 rows", None),
    "channels": ("conv1.weight", (64, 3, 7, 7), (64, 10, 7, 7), "other input channels: 3 → 10", None),
    "features": ("w", (10, 512), (10, 2048), "other input features: 512 → 2048", None),
    "grid": (
        "pos_embed",
        (1, 197, 768),
        (1, 577, 768),
        "another position grid: 197 (14×14 + 1) → 577 (24×24 + 1)",
        None,
    ),
    "kernel": ("w", (64, 3, 7, 7), (64, 3, 3, 3), "another kernel size: 7×7 → 3×3", None),
    "inflate": ("w", (64, 3, 7, 7), (64, 3, 5, 7, 7), "kernels of 2 dimensions where 3 are wanted", None),
    "nothing": ("w", (4, 5), (6, 7), "no single operation mends this", None),
}


@pytest.mark.parametrize("case", MENDS)
def test_what_would_mend_a_mismatch_and_that_the_rule_does(case: str) -> None:
    key, have, want, words, rule = MENDS[case]
    spec = cs.TensorSpec(parse_dtype("f32"), have)
    entry = TargetEntry(cs.TensorSpec(parse_dtype("f32"), want))
    mend = mend_of(key, spec, entry)
    assert words in mend.text
    assert mend.rule == rule
    if rule is not None:
        torch.save({key: torch.zeros(have)}, "a.pth")
        assert cs.plan("a.pth", [rule]).check().result[key].shape == want


def test_the_gate_of_coverage(ckpt: Any) -> None:
    torch.save(state(num_classes=100), "a.pth")
    least = cs.diff("a.pth", Net()).coverage.least
    assert 0.8 < least < 0.9
    assert ckpt("diff", "a.pth", SPEC).code == 1
    assert ckpt("diff", "a.pth", SPEC, "--min-coverage", "0.8").code == 0
    assert ckpt("diff", "a.pth", SPEC, "--min-coverage", "0.99").code == 1
    assert ckpt("diff", "a.pth", SPEC, "--min-coverage", "99").code == 2


def test_rules_run_on_the_left_side_before_the_diff(ckpt: Any) -> None:
    torch.save({f"module.{key}": value for key, value in state().items()}, "a.pth")
    ran = ckpt("diff", "a.pth", SPEC)
    assert ran.code == 1
    assert "hint: with --rule 'strip module.' the names of 14 instead of 0 tensors are found" in ran.out
    assert ckpt("diff", "a.pth", SPEC, "--rule", "strip module.").code == 0
    Path("r.yaml").write_text("version: 1\nrules: ['strip module.', '^fc => head']\n")
    ran = ckpt("diff", "a.pth", SPEC, "--recipe", "r.yaml", "--json")
    assert ran.json["counts"] == {"matched": 12, "shape": 0, "dtype": 0, "missing": 2, "unexpected": 2}
    ran = ckpt("diff", "a.pth", SPEC, "--rule", "strip nothing.")
    assert (ran.code, ran.out) == (1, "")
    assert "strip nothing." in ran.err


def test_a_missing_tied_name_says_with_whom_it_is_shared(ckpt: Any) -> None:
    torch.save({"embed.weight": torch.ones(16, 4)}, "a.pth")
    out = ckpt("diff", "a.pth", SPEC.replace("Net", "Tied")).out
    assert "shared with embed.weight, which is there; --missing init ties it" in out


def test_keys_that_no_rule_can_name_are_only_compared(ckpt: Any) -> None:
    torch.save({"p\nq.a": torch.ones(1)}, "a.pth")
    torch.save({"a": torch.ones(1)}, "b.pth")
    ran = ckpt("diff", "a.pth", "b.pth")
    assert (ran.code, ran.err) == (1, "")
    assert "--rule" not in ran.out


def test_missing_buffers_are_called_what_they_are(ckpt: Any) -> None:
    """By the module where a model is the target, by the name where it is another checkpoint."""
    have = state()
    del have["norm.running_mean"], have["norm.num_batches_tracked"]
    torch.save(have, "a.pth")
    lines = ckpt("diff", "a.pth", SPEC).out.splitlines()
    assert lines[1].endswith("  buffer: running statistics of a BatchNorm2d")
    assert lines[2].endswith("  buffer: a count of batches")
    torch.save(state(), "b.pth")
    lines = ckpt("diff", "a.pth", "b.pth").out.splitlines()
    assert lines[1].endswith("  buffer: running statistics of a norm")
    assert lines[2].endswith("  buffer: a count of batches")
    ran = ckpt("remap", "a.pth", "--to", SPEC, "-o", "c.pth")
    assert ran.code == 1
    assert "is missing (not in the checkpoint; buffer: running statistics of a BatchNorm2d)" in ran.err

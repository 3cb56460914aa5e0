"""Checkpoints that others trained, as PyPI packages ship them; torch itself says what is in them."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors
from safetensors.torch import load_file

import ckptsurgeon as cs

PACKAGES = ("lpips", "torchmetrics")
FOUND = [
    Path(str(file.locate()))
    for package in PACKAGES
    for file in files(package) or []
    if file.suffix in (".pth", ".pt", ".safetensors")
]


def test_the_packages_bring_their_files() -> None:
    assert len(FOUND) >= 10


@pytest.mark.parametrize("path", FOUND, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_real_file_is_read_and_converted_as_torch_reads_it(path: Path, ckpt: Any) -> None:
    want = torch.load(path, weights_only=True, map_location="cpu")
    found = cs.open(path)
    assert found.origin.format in ("torch-legacy", "torch-zip")
    assert_same_tensors(found, want)
    for output in ("a.pth", "a.safetensors"):
        assert ckpt("convert", path, output, "--force").code == 0
    assert_same_tensors(torch.load("a.pth", weights_only=True, mmap=True), want)
    assert_same_tensors(load_file("a.safetensors"), want, ordered=False)
    versions = getattr(want, "_metadata", {})
    assert dict(getattr(torch.load("a.pth", weights_only=True), "_metadata", {})) == dict(versions)


def test_the_weights_of_lpips_fit_its_own_model(ckpt: Any) -> None:
    """The linear heads of AlexNet's LPIPS load strictly into the module that the package builds."""
    (path,) = [path for path in FOUND if path.parts[-3:] == ("weights", "v0.1", "alex.pth")]
    state = torch.load(path, weights_only=True, map_location="cpu")
    heads = torch.nn.ModuleDict(
        {name: torch.nn.Module() for name in dict.fromkeys(key.partition(".")[0] for key in state)}
    )
    for name, head in heads.items():
        head.model = torch.nn.Sequential(
            torch.nn.Dropout(), torch.nn.Conv2d(state[f"{name}.model.1.weight"].shape[1], 1, 1, bias=False)
        )
    report = cs.load_into(heads, path)
    assert report.coverage == 1.0
    assert_same_tensors(heads.state_dict(), state)

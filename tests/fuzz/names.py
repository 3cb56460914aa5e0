"""The names of the targets, for who runs them without the readers."""

from __future__ import annotations

NAMES = (
    "pickle", "zip", "torch_zip", "safetensors", "torch_legacy", "torch_tar", "torchscript", "torch_package",
    "torch_dcp", "index", "side", "journal", "foreign", "rules",
)  # fmt: skip
"""The targets, those that others build on first."""

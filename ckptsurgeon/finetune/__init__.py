"""Helpers on live modules."""

from ckptsurgeon.finetune.load import load_into
from ckptsurgeon.finetune.report import LoadReport

__all__ = ["LoadReport", "load_into"]

"""Helpers on live modules."""

from ckptsurgeon.finetune.load import LoadReport, load_into

__all__ = ["LoadReport", "load_into"]

"""Checkpoint → bytes on disk: one pass, flat memory, the whole output or nothing."""

from ckptsurgeon.stream.commit import Progress, check, is_new_folder, no_kin, older, write

__all__ = ["Progress", "check", "is_new_folder", "no_kin", "older", "write"]

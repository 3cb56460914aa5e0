"""Checkpoint → bytes on disk: one pass, flat memory, the whole file or nothing."""

from ckptsurgeon.stream.commit import Progress, check, write

__all__ = ["Progress", "check", "write"]

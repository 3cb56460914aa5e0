"""Surgery that moves no byte of a tensor: headers and the index are rewritten where they are, or nothing is."""

from ckptsurgeon.inplace.changes import Changes, command, fit
from ckptsurgeon.inplace.commit import carry_out
from ckptsurgeon.inplace.recovery import recover

__all__ = ["Changes", "carry_out", "command", "fit", "recover"]

"""Helpers on live modules."""

from ckptsurgeon.finetune.constraints import Clamped, clamp, keep_clamped
from ckptsurgeon.finetune.freezing import freeze, trainable, unfreeze
from ckptsurgeon.finetune.frozen import Frozen
from ckptsurgeon.finetune.grouped import Groups
from ckptsurgeon.finetune.groups import no_decay, param_groups
from ckptsurgeon.finetune.init import Initialised, init_missing
from ckptsurgeon.finetune.load import load_into
from ckptsurgeon.finetune.report import LoadReport
from ckptsurgeon.finetune.resuming import load_optimizer

__all__ = [
    "Clamped",
    "Frozen",
    "Groups",
    "Initialised",
    "LoadReport",
    "clamp",
    "freeze",
    "init_missing",
    "keep_clamped",
    "load_into",
    "load_optimizer",
    "no_decay",
    "param_groups",
    "trainable",
    "unfreeze",
]

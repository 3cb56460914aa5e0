"""ckptsurgeon: look into checkpoints, hold them against a model, change them by rules, write clean ones."""

from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.differ import Diff
from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import (
    AmbiguousError,
    CkptError,
    InputError,
    LimitError,
    OutputError,
    PlanError,
    Problem,
    RuleError,
    TargetError,
    UsageError,
)
from ckptsurgeon.finetune import LoadReport, load_into
from ckptsurgeon.formats import Document
from ckptsurgeon.inert import Opaque
from ckptsurgeon.limits import Limits
from ckptsurgeon.planner import Plan
from ckptsurgeon.rules import Recipe, Rule
from ckptsurgeon.surgery import Written, convert, diff, inspect, plan, remap, save, target_of
from ckptsurgeon.surgery import open_checkpoint as open  # noqa: A004
from ckptsurgeon.tensor import TensorRef, TensorSpec

__version__ = "0.1.0"

__all__ = [
    "AmbiguousError",
    "Checkpoint",
    "CkptError",
    "DType",
    "Diff",
    "Document",
    "InputError",
    "LimitError",
    "Limits",
    "LoadReport",
    "Opaque",
    "OutputError",
    "Plan",
    "PlanError",
    "Problem",
    "Recipe",
    "Rule",
    "RuleError",
    "Target",
    "TargetError",
    "TensorRef",
    "TensorSpec",
    "UsageError",
    "Written",
    "convert",
    "diff",
    "inspect",
    "load_into",
    "open",
    "plan",
    "remap",
    "save",
    "target_of",
]

"""ckptsurgeon: look into checkpoints, hold them against a model, change them by rules, write clean ones.

Names are imported when they are first used, so that a look at a file does not wait for what a
surgery needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptsurgeon.aligner import Alignment as Alignment
    from ckptsurgeon.audit import verify as verify
    from ckptsurgeon.checkpoint import Checkpoint as Checkpoint
    from ckptsurgeon.checkpoint import Target as Target
    from ckptsurgeon.companions import remap_optimizer as remap_optimizer
    from ckptsurgeon.comparison import Comparison as Comparison
    from ckptsurgeon.cookbook import Builtin as Builtin
    from ckptsurgeon.cookbook import invert as invert
    from ckptsurgeon.cookbook import recipes as recipes
    from ckptsurgeon.differ import Diff as Diff
    from ckptsurgeon.dtypes import DType as DType
    from ckptsurgeon.errors import AmbiguousError as AmbiguousError
    from ckptsurgeon.errors import CkptError as CkptError
    from ckptsurgeon.errors import InputError as InputError
    from ckptsurgeon.errors import LimitError as LimitError
    from ckptsurgeon.errors import OutputError as OutputError
    from ckptsurgeon.errors import PlanError as PlanError
    from ckptsurgeon.errors import Problem as Problem
    from ckptsurgeon.errors import RuleError as RuleError
    from ckptsurgeon.errors import TargetError as TargetError
    from ckptsurgeon.errors import UsageError as UsageError
    from ckptsurgeon.finetune import Clamped as Clamped
    from ckptsurgeon.finetune import Frozen as Frozen
    from ckptsurgeon.finetune import Groups as Groups
    from ckptsurgeon.finetune import Initialised as Initialised
    from ckptsurgeon.finetune import LoadReport as LoadReport
    from ckptsurgeon.finetune import clamp as clamp
    from ckptsurgeon.finetune import freeze as freeze
    from ckptsurgeon.finetune import init_missing as init_missing
    from ckptsurgeon.finetune import keep_clamped as keep_clamped
    from ckptsurgeon.finetune import load_into as load_into
    from ckptsurgeon.finetune import load_optimizer as load_optimizer
    from ckptsurgeon.finetune import no_decay as no_decay
    from ckptsurgeon.finetune import param_groups as param_groups
    from ckptsurgeon.finetune import trainable as trainable
    from ckptsurgeon.finetune import unfreeze as unfreeze
    from ckptsurgeon.formats import Document as Document
    from ckptsurgeon.formats import inspect as inspect
    from ckptsurgeon.forward import ForwardCheck as ForwardCheck
    from ckptsurgeon.forward import check_forward as check_forward
    from ckptsurgeon.forward import try_alignment as try_alignment
    from ckptsurgeon.inert import Opaque as Opaque
    from ckptsurgeon.inverter import Inversion as Inversion
    from ckptsurgeon.limits import Limits as Limits
    from ckptsurgeon.limits import limited as limited
    from ckptsurgeon.plans import Followed as Followed
    from ckptsurgeon.plans import Plan as Plan
    from ckptsurgeon.provenance import Provenance as Provenance
    from ckptsurgeon.rules import Recipe as Recipe
    from ckptsurgeon.rules import Rule as Rule
    from ckptsurgeon.surgery import Written as Written
    from ckptsurgeon.surgery import align as align
    from ckptsurgeon.surgery import convert as convert
    from ckptsurgeon.surgery import diff as diff
    from ckptsurgeon.surgery import digest as digest
    from ckptsurgeon.surgery import open_checkpoint as open  # noqa: A004, F401
    from ckptsurgeon.surgery import plan as plan
    from ckptsurgeon.surgery import remap as remap
    from ckptsurgeon.surgery import remap_in_place as remap_in_place
    from ckptsurgeon.surgery import save as save
    from ckptsurgeon.surgery import target_of as target_of
    from ckptsurgeon.tensor import TensorRef as TensorRef
    from ckptsurgeon.tensor import TensorSpec as TensorSpec
    from ckptsurgeon.verifier import Verification as Verification

__version__ = "0.1.0"

_HOMES = {
    "aligner": ("Alignment",),
    "audit": ("verify",),
    "checkpoint": ("Checkpoint", "Target"),
    "companions": ("remap_optimizer",),
    "comparison": ("Comparison",),
    "cookbook": ("Builtin", "invert", "recipes"),
    "differ": ("Diff",),
    "dtypes": ("DType",),
    "errors": (
        "AmbiguousError",
        "CkptError",
        "InputError",
        "LimitError",
        "OutputError",
        "PlanError",
        "Problem",
        "RuleError",
        "TargetError",
        "UsageError",
    ),
    "finetune": (
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
    ),
    "formats": ("Document", "inspect"),
    "forward": ("ForwardCheck", "check_forward", "try_alignment"),
    "inert": ("Opaque",),
    "inverter": ("Inversion",),
    "limits": ("Limits", "limited"),
    "plans": ("Followed", "Plan"),
    "provenance": ("Provenance",),
    "rules": ("Recipe", "Rule"),
    "surgery": (
        "Written",
        "align",
        "convert",
        "diff",
        "digest",
        "open",
        "plan",
        "remap",
        "remap_in_place",
        "save",
        "target_of",
    ),
    "tensor": ("TensorRef", "TensorSpec"),
    "verifier": ("Verification",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_OTHER_NAMES = {"open": "open_checkpoint"}

__all__ = [*sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptsurgeon' has no attribute {name!r}")
    found = getattr(import_module(f"ckptsurgeon.{_HOME_OF[name]}"), _OTHER_NAMES.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

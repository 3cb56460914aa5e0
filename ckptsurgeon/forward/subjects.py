"""A model with the values of a checkpoint, which is nobody else's, and what its forward gives."""

from __future__ import annotations

import copy
import inspect
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptsurgeon import finetune, targets
from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.errors import TargetError, UsageError

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.forward.inputs import Inputs

    Model = torch.nn.Module | str


_LIBRARIES = ("torchvision", "timm", "transformers")
"""Whose models are built anew every time; other code may give the same module twice."""


@dataclass(eq=False)
class Subject:
    """A model in eval mode on the CPU, in float32; `kept` are the keys that its checkpoint did not bring, `dropped`
    those of the checkpoint that it does not have."""

    module: torch.nn.Module
    label: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]

    def run(self, inputs: Inputs) -> Any:
        """What the model gives for copies of the inputs; TargetError, with whose code it is, where it raises."""
        import torch

        args, named = _bound(self.module, inputs)
        try:
            with targets.quiet(), torch.no_grad():
                torch.manual_seed(0)  # a model that draws at random draws the same on both sides
                return self.module(*args, **named)
        except (Exception, SystemExit) as error:  # the model's own code
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise TargetError(f"{self.label}: its forward raises {words} (with {inputs.how})") from error

    def double(self) -> None:
        """Count in float64 from now on."""
        self.module.double()


def subject(thing: Model, ckpt: Checkpoint, role: str) -> Subject:
    """The model, or a copy of it, with all that a checkpoint brings it; UsageError where that is nothing."""
    label = f"{thing} ({role})" if isinstance(thing, str) else f"the {type(thing).__name__} ({role})"
    module = _own(thing, label).cpu().float()
    report = finetune.load_into(module, ckpt, unexpected="drop", mismatched="drop", missing="init")
    if not report.loaded:
        raise UsageError(f"{label}: the checkpoint has none of its tensors; it is the model of another checkpoint")
    module.eval()
    return Subject(module, label, report.kept, report.dropped)


def _own(thing: Model, label: str) -> torch.nn.Module:
    import torch

    if isinstance(thing, str):
        if not targets.is_spec(thing) and os.path.exists(thing):
            raise UsageError(
                f"{thing}: a checkpoint has no code to run; name the model it is for, as torchvision:resnet18"
            )
        made = targets.real(thing)
        return made if thing.partition(":")[0] in _LIBRARIES else copied(made, label)
    if not isinstance(thing, torch.nn.Module):
        raise UsageError(f"a model is an nn.Module or a model spec, not {type(thing).__name__}")
    if any(value.is_meta for value in (*thing.parameters(), *thing.buffers())):
        raise UsageError(f"{label} is on the meta device, and has no values to run with; give a spec, or a real model")
    return copied(thing, label)


def copied(module: torch.nn.Module, label: str) -> torch.nn.Module:
    """A copy that shares nothing with the model; TargetError where its code forbids it."""
    import torch

    memo: dict[int, Any] = {}
    for inner in module.modules():
        for value in inner.__dict__.values():  # what old weight norm computes is no leaf, which deepcopy refuses
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # the model's own code
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise TargetError(f"{label}: it cannot be copied: {words}; give a spec that builds it") from error


def _bound(module: torch.nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs by name where the forward has all of these names, else in their order."""
    wanted = next((value.dtype for value in module.parameters() if value.is_floating_point()), None)
    values = {name: _fresh(value, wanted) for name, value in inputs.values.items()}
    try:
        names = set(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        names = set()
    if values and set(values) <= names:
        return (), values
    return tuple(values.values()), {}


def _fresh(value: Any, dtype: torch.dtype | None) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    value = value.detach().cpu().clone()
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value

"""The modules and parameters of a live model by the names that its own code gives them.

`torch.compile`, DataParallel, DistributedDataParallel, FSDP, activation checkpointing and Fabric put modules of their
own around others; a wrapper is told by its class and takes no part in a name, so that the names are those of the
network's own state dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "_FabricModule": "_forward_module",
}
"""Class of a wrapper → the name of the one child that it is around."""


def peeled(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside of all wrappers around it."""
    while (inner := WRAPPERS.get(type(module).__name__)) is not None and inner in module._modules:
        found = module._modules[inner]
        assert found is not None
        module = found
    return module


def modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module once, parents first, in the order of `model.modules()`; wrappers are none, and "" is the model."""
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        name, module = todo.pop()
        module = peeled(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        prefix = f"{name}." if name else ""
        todo += [(prefix + step, child) for step, child in reversed(module._modules.items()) if child is not None]


def parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters in the order of `model.parameters()`, each once, under the first of its names."""
    seen: set[int] = set()
    made: dict[str, torch.nn.Parameter] = {}
    for name, module in modules(model):
        for step, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                made[f"{name}.{step}" if name else step] = parameter
    return made

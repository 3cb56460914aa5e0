"""The modules and parameters of a live model by the names that its own code gives them.

`torch.compile`, DataParallel, DistributedDataParallel, FSDP, activation checkpointing and Fabric put modules of their
own around others; a wrapper is told by its class, and by having nothing of its own, and takes no part in a name, so
that the names are those of the network's own state dict.
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


_FSDP = "FullyShardedDataParallel"


def is_unit(module: torch.nn.Module) -> bool:
    """Whether it is what FSDP puts around a part of a network."""
    return any(one.__name__ == _FSDP for one in type(module).__mro__)


def inner(module: torch.nn.Module) -> str | None:
    """The name of the child that a wrapper is around; None for a module that is none.

    A class that is made from a wrapper's is one; what has tensors besides that child's is a part of the network.
    """
    step = next((WRAPPERS[one.__name__] for one in type(module).__mro__ if one.__name__ in WRAPPERS), None)
    child = module._modules.get(step) if step is not None else None
    if child is None:
        return None
    if is_unit(module):  # the parameters that it cuts up may be its own
        return step
    own = [value for held in (module._parameters, module._buffers) for value in held.values() if value is not None]
    if len(module._modules) > 1:
        there = {id(value) for value in (*child.parameters(), *child.buffers())}
        own += [value for value in (*module.parameters(), *module.buffers()) if id(value) not in there]
    return None if own else step


def peeled(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside of all wrappers around it."""
    while (step := inner(module)) is not None:
        found = module._modules[step]
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

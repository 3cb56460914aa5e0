"""The tensors of a live model's state dict, by the names that the network itself gives them, whatever is around it.

A model is had in parts: most are one, and of a model under FullyShardedDataParallel, which keeps its parameters cut up
in flat ones, each unit is a part that is put together as long as it is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon.finetune import names

if TYPE_CHECKING:
    import torch

_EXTRA = "_extra_state"


@dataclass
class Held:
    """What a part holds while it is open: key → tensor; the keys of what is no tensor; and of tensors that a module
    makes for its state dict (`get_extra_state`), what takes them back."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    setters: dict[str, Callable[[Any], None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A module whose tensors can be had at one time, with the name that it has in the model; `unit` is what FSDP has
    put around it."""

    module: torch.nn.Module
    prefix: str = ""
    unit: Any = None
    bare: bool = False
    """Its own tensors alone, module by module, without those of FSDP's units within."""

    @contextmanager
    def open(self, writing: bool) -> Iterator[Held]:
        """Its tensors; FSDP takes up what was changed in them when `writing`."""
        if self.unit is not None:
            with type(self.unit).summon_full_params(self.unit, recurse=False, writeback=writing):
                yield _bare(self.module, self.prefix)
        elif self.bare:
            yield _bare(self.module, self.prefix)
        else:
            yield _whole(self.module)


def parts(model: torch.nn.Module) -> list[Part]:
    """The parts of a model, in the order of its modules."""
    if not any(names.is_unit(module) for module in model.modules()):
        return [Part(names.peeled(model))]
    made: list[Part] = []
    _find_units(model, "", made, None)
    return made


def _find_units(module: torch.nn.Module, prefix: str, made: list[Part], above: torch.nn.Module | None) -> None:
    inner = names.inner(module)
    is_unit = names.is_unit(module)
    if above is None or is_unit:
        start = module._modules[inner] if is_unit and inner is not None else module
        assert start is not None
        made.append(Part(start, prefix, module if is_unit else None, True))
    for step, child in module._modules.items():
        if child is not None:
            _find_units(child, prefix if step == inner else f"{prefix}{step}.", made, module)


def _bare(module: torch.nn.Module, prefix: str) -> Held:
    """The tensors of a module and those below it as far as they are registered, without those of FSDP's units."""
    import torch

    held, todo = Held(), [(prefix, module)]
    while todo:
        at, module = todo.pop()
        inner = names.inner(module)
        if names.is_unit(module):
            continue
        for step, value in (*module._parameters.items(), *module._buffers.items()):
            kept = step not in module._non_persistent_buffers_set and type(value).__name__ != "FlatParameter"
            if value is not None and kept:
                held.tensors[at + step] = value
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            held.others.append(at + _EXTRA)
        children = [(step, child) for step, child in module._modules.items() if child is not None]
        todo += [(at if step == inner else f"{at}{step}.", child) for step, child in reversed(children)]
    return held


def _whole(model: torch.nn.Module) -> Held:
    """The state dict of a model, with the tensors that it really has."""
    import torch

    held = Held()
    wrapped = any(names.inner(module) is not None for module in model.modules())
    for key, value in model.state_dict(keep_vars=True).items():
        name, owner = _cleaned(key, model) if wrapped or key.endswith(_EXTRA) else (key, model)
        if isinstance(value, torch.Tensor):
            held.tensors[name] = value
            if key.endswith(_EXTRA):
                held.setters[name] = owner.set_extra_state
        else:
            held.others.append(name)
    return held


def _cleaned(key: str, model: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    """A key without the steps into wrappers (which some take off themselves), and the module that it is of."""
    kept, owner, module = [], model, model
    for step in key.split("."):
        module, is_wrapper = _entered(module, step)
        if not is_wrapper:
            kept.append(step)
            owner, child = module, module._modules.get(step)
            module = owner if child is None else child
    return ".".join(kept), owner


def _entered(module: torch.nn.Module, step: str) -> tuple[torch.nn.Module, bool]:
    """The module inside of all wrappers up to one that a step of a key leads into, and whether there is one."""
    while (inner := names.inner(module)) is not None and (child := module._modules[inner]) is not None:
        module = child
        if inner == step:
            return module, True
    return module, False


def renewed(held: Held, made: Mapping[int, torch.Tensor]) -> Held:
    """The same keys, with tensors in the place of those on the meta device."""
    return replace(held, tensors={key: made.get(id(value), value) for key, value in held.tensors.items()})

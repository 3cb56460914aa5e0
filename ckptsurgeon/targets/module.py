"""An `nn.Module` as a target: keys, specs, roles, module types and ties of its state dict."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptsurgeon import kinds
from ckptsurgeon.checkpoint import Target, TargetEntry
from ckptsurgeon.dtypes import DTYPES
from ckptsurgeon.errors import TargetError
from ckptsurgeon.sources import Fill, Inline, Source
from ckptsurgeon.targets import facts
from ckptsurgeon.tensor import Quantizer, TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch


Types = tuple[str, kinds.OwnerKind]
_BUILDING = threading.Lock()


def target(thing: Any, label: str | None = None, build: Callable[[int], torch.nn.Module] | None = None) -> Target:
    """The target that `thing`, an `nn.Module`, is.

    `build(seed)` makes a module with real values, for keys that are initialised as the model
    does; without it the values are those that `thing` has.  TargetError for anything else.
    """
    import torch

    if not isinstance(thing, torch.nn.Module):
        raise TargetError(f"a target is an nn.Module, a model spec or a checkpoint, not {type(thing).__name__}")
    label = label or f"the {type(thing).__name__}"
    try:
        return _target(thing, label, build)
    except (TargetError, KeyboardInterrupt):
        raise
    except Exception as error:  # its own code: state_dict hooks, lazy parameters without a shape
        words = " ".join(str(error).split())[:300]
        raise TargetError(f"{label}: its state dict cannot be made: {type(error).__name__}: {words}") from error


def _target(thing: torch.nn.Module, label: str, build: Callable[[int], torch.nn.Module] | None) -> Target:
    import torch

    state = thing.state_dict(keep_vars=True)
    values = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    owners = {name: types(owner) for name, owner in thing.named_modules()}
    others = tuple(key for key in state if key not in values)
    told = facts.of(thing)
    if build is not None:
        made_anew = Values(label, lambda seed: build(seed).state_dict(), _nbytes(values))
        return replace(of_values(label, values, owners, others, made_anew), facts=told)
    initial = Values(label, lambda seed: thing.state_dict(), 0)
    made = replace(of_values(label, values, owners, others, initial), facts=told)
    tensors = {
        key: TensorRef(entry.spec, initial.source(key, 0), quantizer=_quantizer(values[key]))
        for key, entry in made.entries.items()
    }
    return replace(made, tensors=tensors)


def of_values(
    label: str,
    values: Mapping[str, torch.Tensor],
    owners: Mapping[str, Types],
    others: tuple[str, ...] = (),
    initial: Values | None = None,
) -> Target:
    """The target of a module whose state dict has these tensors; one tensor of two names is a tie.

    `owners` are the `types` of its modules by their names, `others` the keys of what is no tensor.  TargetError for
    a tensor of a dtype that no checkpoint can hold.
    """
    import torch

    entries: dict[str, TargetEntry] = {}
    shared: dict[int, list[str]] = {}
    for key, value in values.items():
        name = str(value.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise TargetError(f"{label}: {key!r} has the dtype {name}, which checkpoints cannot hold")
        role: Any = "parameter" if isinstance(value, torch.nn.Parameter) else "buffer"
        owner = _owner(key, owners)
        spec = TensorSpec(DTYPES[name], tuple(value.shape))
        entries[key] = TargetEntry(spec, role, *owner)
        shared.setdefault(id(value), []).append(key)
    ties = tuple(tuple(group) for group in shared.values() if len(group) > 1)
    return Target(label, entries, True, others, ties, initial)


def _nbytes(values: dict[str, torch.Tensor]) -> int:
    """The bytes of tensors, shared ones once."""
    return sum(value.nbytes for value in {id(value): value for value in values.values()}.values())


def _quantizer(value: torch.Tensor) -> Quantizer | None:
    """What makes numbers of the integers of a live quantised tensor."""
    if not value.is_quantized:
        return None
    import torch

    scheme = str(value.qscheme())
    if value.qscheme() == torch.per_tensor_affine:
        return Quantizer(scheme, value.q_scale(), value.q_zero_point())
    parts = []
    for part in (value.q_per_channel_scales(), value.q_per_channel_zero_points()):
        spec = TensorSpec(DTYPES[str(part.dtype).removeprefix("torch.")], tuple(part.shape))
        parts.append(TensorRef(spec, Inline(part.contiguous().numpy().tobytes())))
    return Quantizer(scheme, parts[0], parts[1], value.q_per_channel_axis())


def types(module: torch.nn.Module) -> Types:
    """The class of a module, and what it is by that and the classes that it is made from."""
    return type(module).__name__, kinds.of_type(one.__name__ for one in type(module).__mro__)


def _owner(key: str, owners: Mapping[str, Types]) -> Types:
    """The `types` of the innermost module whose name begins the key."""
    prefix = key
    while prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in owners:
            return owners[prefix]
    return owners.get("", ("", ""))


@dataclass(frozen=True, eq=False)
class Values:
    """The values that a model itself would begin with."""

    label: str
    build: Callable[[int], Mapping[str, torch.Tensor]]
    """Makes the state dict of a model from a seed."""
    nbytes: int
    """The bytes of what `build` makes; 0 where it is there already."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the values that were made: they are made again."""
        return {"label": self.label, "build": self.build, "nbytes": self.nbytes}

    @cached_property
    def _built(self) -> dict[int, dict[str, torch.Tensor]]:
        return {}

    def source(self, key: str, seed: int) -> Source:
        return Fill(_Value(self, key), seed)

    def value(self, key: str, seed: int) -> torch.Tensor:
        with _BUILDING:  # threads that write ask for values side by side
            if seed not in self._built:
                self._built[seed] = dict(self.build(seed))
        value = self._built[seed].get(key)
        if value is None:
            raise TargetError(f"{self.label} is not what it was when its keys were taken: it has no {key!r}")
        if value.is_meta:
            raise TargetError(f"{self.label} is on the meta device and has no value for {key!r}")
        return value.detach()


@dataclass(frozen=True)
class _Value:
    values: Values
    key: str

    @property
    def holds(self) -> int:
        return self.values.nbytes

    def make(self, spec: TensorSpec, seed: int) -> torch.Tensor:
        value = self.values.value(self.key, seed)
        if tuple(value.shape) != spec.shape or str(value.dtype) != f"torch.{spec.dtype.name}":
            raise TargetError(
                f"{self.values.label} is not what it was when its keys were taken: {self.key!r} is "
                f"{value.dtype} {list(value.shape)}, not {spec}"
            )
        return value

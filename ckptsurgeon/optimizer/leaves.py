"""A surgery as formulas: how each tensor of the result is made of tensors of the source.

The surgery is planned once more for a checkpoint of the same keys and specs, whose tensors are nothing but names.
What comes out says for every key which of them it is made of, and by which kernels: the same can then be done to
whatever else there is one of for each of them, as a moment of an optimizer or an average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.optimizer.naming import prefixes_of
from ckptsurgeon.plans import Plan
from ckptsurgeon.sources import Absent, Apply, Fill, Pieces
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Leaf:
    """In place of the values of a tensor of the source: its key, the first one where several share it."""

    key: str
    holds: int = 0

    def make(self, spec: TensorSpec, seed: int) -> torch.Tensor:
        raise AssertionError(f"{self.key!r} is a name, and has no values")


def symbols(source: Checkpoint) -> Checkpoint:
    """The same keys and specs, with names for values; tied keys have one name."""
    first = {key: group[0] for group in source.tied() for key in group}
    tensors = {
        key: ref
        if isinstance(ref.source, Absent)
        else TensorRef(ref.spec, Fill(Leaf(first.get(key, key)), 0), ref.stored, ref.quantizer)
        for key, ref in source.items()
    }
    return source.replace(tensors=tensors, provenance=source.provenance)


def leaf_of(ref: TensorRef) -> str | None:
    """The key of the source that a formula is, in whatever dtype, bounded or shifted; None where more is done."""
    inner = ref
    while isinstance(inner.source, Apply) and inner.source.kernel.slope == 1.0:
        inner = inner.source.inputs[0]
    source = inner.source
    if isinstance(source, Fill) and isinstance(source.init, Leaf) and inner.shape == ref.shape:
        return source.init.key
    return None


def leaves(ref: TensorRef) -> tuple[str, ...]:
    """The keys of the source that a formula is made of, each once, in order."""
    found: dict[str, None] = {}
    todo, seen = [ref], set[int]()
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part.source, Fill) and isinstance(part.source.init, Leaf):
            found[part.source.init.key] = None
        elif isinstance(part.source, Apply):
            todo += reversed(part.source.inputs)
        elif isinstance(part.source, Pieces):
            todo += reversed(part.source.parts)
    return tuple(found)


def _parameters(target: Target) -> tuple[str, ...]:
    """The parameters of a model in the order of `model.parameters()`, each tie once."""
    doubles = {key for group in target.ties for key in group[1:]}
    return tuple(key for key, entry in target.entries.items() if entry.role != "buffer" and key not in doubles)


def _is_ordered(source: Checkpoint) -> bool:
    """Whether keys come in the order of the model: those who write safetensors and indexes sort them."""
    return source.origin is None or not ("safetensors" in source.origin.format or "sharded" in source.origin.format)


@dataclass(frozen=True)
class Change:
    """A surgery as it looks to what goes with the tensors: `formulas` by the keys of the result."""

    made: Plan
    formulas: Mapping[str, TensorRef]

    @classmethod
    def of(cls, made: Plan) -> Change:
        """The formulas of a plan without problems."""
        assert made.on is not None
        return cls(made, made.on(symbols(made.source)).result.tensors)

    @cached_property
    def made_of(self) -> dict[str, tuple[str, ...]]:
        """Key of the result → the keys of the source that it is made of."""
        return {key: leaves(ref) for key, ref in self.formulas.items()}

    @cached_property
    def prefixes(self) -> list[str]:
        """What all keys of the source begin with."""
        return prefixes_of(self.made.source)

    @cached_property
    def candidates(self) -> dict[str, TensorRef]:
        """The keys of the source that may be parameters, in order, each tie once.

        What the file or the target knows to be a buffer is none, nor are whole numbers.
        """
        source, target, order = self.made.source, self.made.target, self.made.order
        if order is not None:
            return {key: source[key] for key in _parameters(order) if key in source}
        doubles = {key for group in source.tied() for key in group[1:]}
        known = any(ref.role == "parameter" for ref in source.values())
        buffers = set[str | None]()
        if target is not None and target.is_model:
            buffers = {
                leaf_of(self.formulas[key])
                for key, entry in target.entries.items()
                if entry.role == "buffer" and key in self.formulas
            }
        found = {
            key: ref
            for key, ref in source.items()
            if ref.dtype.kind in ("float", "complex")
            and ref.role != "buffer"
            and not (known and ref.role != "parameter")
            and key not in doubles
            and key not in buffers
        }
        if self._as_target(found):
            assert target is not None
            return {key: found[key] for key in _parameters(target) if key in found}
        return found

    def _as_target(self, found: Mapping[str, TensorRef]) -> bool:
        """Whether the names are those of the target, whose order then is the right one for keys that are sorted."""
        target = self.made.target
        if _is_ordered(self.made.source) or target is None or not target.is_model:
            return False
        return set(found) <= {key for key, entry in target.entries.items() if entry.role == "parameter"}

    @property
    def unordered(self) -> str | None:
        """Why the order of the parameters in their model is not known; None where it is."""
        if (order := self.made.order) is not None:
            lacking = [key for key in _parameters(order) if key not in self.made.source]
            return f"{order.label} (--order) has {lacking[0]!r}, and the checkpoint not" if lacking else None
        if _is_ordered(self.made.source) or self._as_target(self.candidates):
            return None
        return (
            "it counts its parameters, and the checkpoint's keys are sorted, not in the model's order; "
            "--order names the model that it was made for"
        )

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that the result is for, in the order of `model.parameters()`, each tie once: the target's,
        else those made of parameters, and those that are new."""
        target = self.made.target
        if target is not None and target.is_model:
            return _parameters(target)
        tied = Checkpoint(self.formulas).tied()
        doubles = {key for group in tied for key in group[1:]}
        found = [key for key in self.formulas if key not in doubles and self._may_train(key)]
        if self.made.order is not None:
            places = {key: place for place, key in enumerate(self.candidates)}
            found.sort(key=lambda key: min((places.get(leaf, len(places)) for leaf in self.made_of[key]), default=0))
        return tuple(found)

    def _may_train(self, key: str) -> bool:
        made_of = self.made_of[key]
        if made_of:
            return any(leaf in self.candidates for leaf in made_of)
        new = self.formulas[key].dtype.kind in ("float", "complex")
        return new and key.rpartition(".")[2] not in _BUFFERS

    def spec(self, key: str) -> TensorSpec:
        """What a parameter of the result is, also of one that is in the target alone."""
        if key in self.formulas:
            return self.formulas[key].spec
        assert self.made.target is not None
        return self.made.target.entries[key].spec

    @cached_property
    def parted(self) -> dict[str, str]:
        """Parameters of the result which were one with others, or are now: their own share of what training knows is
        not known.  Each with the reason."""
        found: dict[str, str] = {}
        target = self.made.target
        for group in target.ties if target is not None and target.is_model else ():
            there = [key for key in group if key in self.formulas]
            if len({self.formulas[key].source for key in there}) > 1:
                found[group[0]] = f"{target.label if target else ''} ties it with {there[-1]!r}, which it was not"
        users: dict[str, list[str]] = {}
        for key in self.parameters:
            leaf = leaf_of(self.formulas[key]) if key in self.formulas else None
            if leaf is not None:
                users.setdefault(leaf, []).append(key)
        for leaf, keys in users.items():
            if len(keys) > 1:
                found |= dict.fromkeys(keys, f"{' and '.join(map(repr, keys[:3]))} were one parameter, {leaf!r}")
        return found

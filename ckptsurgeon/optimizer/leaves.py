"""A surgery as formulas: how each tensor of the result is made of tensors of the source.

The surgery is planned once more for a checkpoint of the same keys and specs, whose tensors are nothing but names.
What comes out says for every key which of them it is made of, and by which kernels: the same can then be done to
whatever else there is one of for each of them, as a moment of an optimizer or an average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.errors import UsageError
from ckptsurgeon.ops.values import Cast
from ckptsurgeon.optimizer.naming import prefixes_of
from ckptsurgeon.plans import Plan, Step
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
    """The key of the source that a formula is, in whatever dtype; None where more is done to it."""
    inner = ref
    while isinstance(inner.source, Apply) and isinstance(inner.source.kernel, Cast):
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


def _is_tie(step: Step) -> bool:
    return step.made_by is not None and step.made_by.operation.name == "tie"


@dataclass(frozen=True)
class Change:
    """A surgery as it looks to what goes with the tensors: `formulas` by the keys of the result."""

    made: Plan
    formulas: Mapping[str, TensorRef]

    @classmethod
    def of(cls, made: Plan) -> Change:
        """The formulas of a plan without problems."""
        if made.on is None:
            raise UsageError("a report that was pickled no longer tells how its plan is made: load the model again")
        return cls(made, made.on(symbols(made.source)).result.tensors)

    @cached_property
    def first(self) -> dict[str, str]:
        """Key of the source that is tied → the first of its tie, by which formulas call it."""
        return {key: group[0] for group in self.made.source.tied() for key in group}

    @cached_property
    def made_of(self) -> dict[str, tuple[str, ...]]:
        """Key of the result → the keys of the source that it is made of."""
        return {key: leaves(ref) for key, ref in self.formulas.items()}

    @cached_property
    def prefixes(self) -> list[str]:
        """What all keys of the source begin with."""
        return prefixes_of(self.made.source)

    @property
    def _model(self) -> Target | None:
        """The target, where it is a model, which knows its parameters."""
        target = self.made.target
        return target if target is not None and target.is_model else None

    @property
    def label(self) -> str:
        """The target's name, for a sentence."""
        return self.made.target.label if self.made.target is not None else "the result"

    @cached_property
    def candidates(self) -> dict[str, TensorRef]:
        """The keys of the source that may be parameters, in order, each tie once.

        What the file knows to be a buffer is none, nor are whole numbers, nor tensors of other checkpoints.
        """
        source, order = self.made.source, self.made.order
        if order is not None:
            named = [self.first.get(key, key) for key in _parameters(order)]
            return {key: source[key] for key in named if key in source}
        strange = tuple(f"{name}." for name in self.made.beside)
        found = {
            key: ref
            for key, ref in source.items()
            if ref.dtype.kind in ("float", "complex")
            and ref.role != "buffer"
            and self.first.get(key, key) == key
            and not key.startswith(strange)
        }
        if self._model is not None and self._as_target(found):
            return {key: found[key] for key in _parameters(self._model) if key in found}
        return found

    def _as_target(self, found: Mapping[str, TensorRef]) -> bool:
        """Whether the names are those of the target, whose order then is the right one for keys that are sorted."""
        if self.made.source.in_order or self._model is None:
            return False
        return set(found) <= {key for key, entry in self._model.entries.items() if entry.role == "parameter"}

    @property
    def unordered(self) -> str | None:
        """Why the order of the parameters in their model is not known; None where it is."""
        if (order := self.made.order) is not None:
            lacking = [key for key in _parameters(order) if key not in self.made.source]
            return f"{order.label} (--order) has {lacking[0]!r}, and the checkpoint not" if lacking else None
        if self.made.source.in_order or self._as_target(self.candidates):
            return None
        return (
            "it counts its parameters, and the checkpoint's keys are sorted, not in the model's order; "
            "--order names the model that it was made for"
        )

    def buffer(self, keys: Iterable[str]) -> str | None:
        """The first of some keys of the source that the target has as a buffer."""
        taken = set(keys)
        for key, entry in self._model.entries.items() if self._model is not None else ():
            if entry.role == "buffer" and key in self.formulas and (leaf := leaf_of(self.formulas[key])) in taken:
                return leaf
        return None

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that the result is for, in the order of `model.parameters()`, each tie once: the target's,
        else those made of parameters, and those that are new."""
        if self._model is not None:
            there = {group[0]: [key for key in group if key in self.formulas] for group in self._model.ties}
            return tuple((there.get(key) or [key])[0] for key in _parameters(self._model))
        made = self.made.result  # of one tensor in two shapes no model makes one parameter
        doubles = {key for first, *rest in made.tied() for key in rest if made[key].shape == made[first].shape}
        found = [key for key in self.formulas if key not in doubles and self._may_train(key)]
        if not self._target_in_order:
            places = {key: place for place, key in enumerate(self.candidates)}
            found.sort(
                key=lambda key: min((places.get(leaf, len(places)) for leaf in self.made_of[key]), default=len(places))
            )
        return tuple(found)

    @property
    def _target_in_order(self) -> bool:
        """Whether a checkpoint that is the target says the order of parameters."""
        return self.made.target is not None and self.made.target.in_order

    @property
    def unnumbered(self) -> str | None:
        """Why the order of the parameters in the new model is not known; None where it is: a model or a file says it,
        or they are the same ones as before."""
        if self._model is not None or self._target_in_order:
            return None
        places = {key: place for place, key in enumerate(self.candidates)}
        known = [self.made_of[key] for key in self.parameters]
        order = [places.get(keys[0], -1) if len(keys) == 1 else -1 for keys in known]
        made = set(self.parameters)
        before = [key for key in self.candidates if key in made]
        after = [key for key in self.parameters if key in places]
        if -1 in order or any(a >= b for a, b in pairwise(order)) or before != after:
            return "in which order the new model has its parameters is not known: name it with --to MODEL"
        return None

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
        for group in self._model.ties if self._model is not None else ():
            there = [key for key in group if key in self.formulas]
            if len({self.formulas[key].source for key in there}) > 1:
                found[there[0]] = f"{self.label} ties it with {there[-1]!r}, which it was not"
        users: dict[str, dict[str, frozenset[str]]] = {}
        for key in self.parameters:
            for leaf in self.made_of.get(key, ()):
                users.setdefault(leaf, {})[key] = self._names_of.get(key, frozenset())
        for leaf, keys in users.items():
            if len(set(keys.values())) > 1 and self._are_several(leaf, keys.values()):
                names = " and ".join(map(repr, list(keys)[:3]))
                found |= dict.fromkeys(keys, f"{names} were one parameter, {leaf!r}")
        return found

    def _are_several(self, leaf: str, names: Iterable[frozenset[str]]) -> bool:
        """Whether a tensor of the source has gone into its parts under several names, by a tie, and not by cuts."""
        tied = {key for key, first in self.first.items() if first == leaf} | {leaf}
        own = [frozenset(name for name in one if name.partition("\0")[0] in tied) for one in names]
        return len(set(own)) > 1

    @cached_property
    def _names_of(self) -> dict[str, frozenset[str]]:
        """Key of the result → the keys of the source that it was called by, those of a tie apart; a name that `tie`
        gave is another one.  Only made where there is any tie."""
        steps = self.made.steps
        if not self.first and not any(map(_is_tie, steps)):
            return {}
        names = {key: frozenset((key,)) for key in self.made.source}
        for number, step in enumerate(steps):
            new: dict[str, frozenset[str]] = {}
            for inputs, outputs in step.edges:
                taken = frozenset[str]().union(*(names.get(name, frozenset()) for name in inputs))
                if _is_tie(step):
                    taken = frozenset(f"{name}\0{number}" for name in taken)
                new.update(dict.fromkeys(outputs, taken))
            if not step.keeps:
                for inputs, _ in step.edges:
                    for name in inputs:
                        names.pop(name, None)
            names.update(new)
        return names

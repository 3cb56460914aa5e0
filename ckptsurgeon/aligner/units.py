"""The two sides of an alignment: keys grouped into units, which are modules with the tensors that they own.

Weight and bias of one module are one unit, however they are spelt: `norm.gamma` and `norm.beta`, `attn.in_proj_weight`
and `attn.in_proj_bias`, `conv.weight_g` and `conv.parametrizations.weight.original0`.  A tensor that no module seems to
own (`cls_token`) is a unit of itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from ckptsurgeon.aligner import vocabulary
from ckptsurgeon.aligner.meanings import is_head
from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.kinds import OwnerKind

Shape = tuple[int, ...]
OWN = "own"
"""The role of a tensor that is a unit of itself."""
_PLAIN = {"weight": "weight", "bias": "bias", "kernel": "weight", "running_mean": "mean", "running_var": "var"}
_PLAIN |= {"moving_mean": "mean", "moving_variance": "var", "moving_var": "var", "num_batches_tracked": "batches"}
_PLAIN |= {"weight_g": "g", "weight_v": "v", "weight_orig": "orig", "weight_u": "u"}
_PARAMETRIZED = re.compile(r"^(.*?)\.?parametrizations\.(\w+)\.(original\d?)$")
_PARTS = {"original0": "g", "original1": "v", "original": "orig"}
_AFFIXED = re.compile(r"^(weight|bias)_(\w+)$")
_SUFFIXED = re.compile(r"^(\w+?)_(weight|bias)$")
_NORM_LIKE = {"norm"}
_COMPUTED = re.compile(
    r"(?:^|[._])(?:num_batches_tracked|position_ids|token_type_ids|inv_freq|original_inv_freq|relative_position_index"
    r"|relative_coords_table|attn_mask|causal_mask|masked_bias|rope_freqs|freqs_cis|cos_cached|sin_cached"
    r"|cell_anchors\.\d+|embed_positions\._float_tensor|num_updates|n_averaged)$"
)
"""Buffers that models compute for themselves."""
_MASK = re.compile(r"(?:attn|attention)\.(?:bias|mask)$|(?:^|\.)mask$")


@dataclass(eq=False, slots=True)
class Leaf:
    """One tensor: its key, what it is to its unit, its shape, its place in the order of keys."""

    key: str
    role: str
    shape: Shape
    at: int
    computed: bool = False
    """A buffer that the model computes for itself."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(eq=False, slots=True)
class Unit:
    """A module and the tensors that it owns, by role; `kind` and `module` where a model tells them."""

    path: str
    leaves: dict[str, Leaf] = field(default_factory=dict)
    kind: OwnerKind = ""
    module: str = ""

    @property
    def at(self) -> int:
        return min(leaf.at for leaf in self.leaves.values())

    @property
    def needed(self) -> dict[str, Leaf]:
        return {role: leaf for role, leaf in self.leaves.items() if not leaf.computed}

    @property
    def numel(self) -> int:
        """The elements that somebody trained."""
        return sum(leaf.numel for leaf in self.leaves.values() if not leaf.computed)


@dataclass(frozen=True, eq=False)
class Side:
    """A checkpoint or a target: its units in order, which keys are the same tensor, and whether the order of the keys
    may be that of the model."""

    label: str
    units: tuple[Unit, ...]
    ties: tuple[tuple[str, ...], ...]
    in_order: bool
    is_model: bool = False
    facts: Mapping[str, int] = field(default_factory=dict)
    again: tuple[Leaf, ...] = ()
    """Second names of tensors that are there by another."""

    @property
    def leaves(self) -> Iterable[Leaf]:
        return (leaf for unit in self.units for leaf in unit.leaves.values())


def of_checkpoint(ckpt: Checkpoint) -> Side:
    label = ckpt.origin.path if ckpt.origin else "the checkpoint"
    shapes = {key: (ref.shape, ref.dtype.kind == "float" or ref.dtype.kind == "complex") for key, ref in ckpt.items()}
    return Side(label, _units(shapes, {}, {}), ckpt.tied(), ckpt.in_order and _is_coherent(list(ckpt)))


def of_target(target: Target) -> Side:
    shapes = {}
    for key, entry in target.entries.items():
        shapes[key] = entry.spec.shape, entry.spec.dtype.kind == "float" or entry.spec.dtype.kind == "complex"
    owners = {key: (entry.kind, entry.module) for key, entry in target.entries.items()}
    buffers = {key: entry.role == "buffer" for key, entry in target.entries.items()}
    in_order = target.in_order and (target.is_model or _is_coherent(list(target.entries)))
    units = _units(shapes, owners, buffers)
    return Side(target.label, units, target.ties, in_order, target.is_model, dict(target.facts))


def _is_coherent(keys: list[str]) -> bool:
    """Whether the keys of every module stand side by side, as in the order of definition; a shuffled file's do not."""
    done: set[str] = set()
    open_: list[str] = []
    for key in keys:
        segments = key.split(".")[:-1]
        paths = [".".join(segments[: depth + 1]) for depth in range(len(segments))]
        while open_ and (len(open_) > len(paths) or open_[-1] != paths[len(open_) - 1]):
            done.add(open_.pop())
        for path in paths[len(open_) :]:
            if path in done:
                return False
            open_.append(path)
    return True


def _units(
    shapes: Mapping[str, tuple[Shape, bool]], owners: Mapping[str, tuple[OwnerKind, str]], buffers: Mapping[str, bool]
) -> tuple[Unit, ...]:
    made: dict[str, Unit] = {}
    keys = {key.replace("/", ".") for key in shapes}  # TensorFlow's and JAX's have slashes
    for at, (key, (shape, is_number)) in enumerate(shapes.items()):
        path, role = _placed(key.replace("/", "."), keys)
        unit = made.get(path)
        if unit is None or role in unit.leaves:
            if unit is not None:
                path, role = key.replace("/", "."), OWN
            unit = made[path] = Unit(path, {}, *owners.get(key, ("", "")))
        unit.leaves[role] = Leaf(key, role, shape, at, _is_computed(key, shape, is_number, buffers.get(key, False)))
    return tuple(made.values())


def _is_computed(key: str, shape: Shape, is_number: bool, is_buffer: bool) -> bool:
    """Integers are indices and counts; a mask is square."""
    if _COMPUTED.search(key) or not is_number:
        return True
    square = len(shape) >= 2 and shape[-1] == shape[-2]
    if square and _MASK.search(key) and prod(shape[:-2]) == 1:
        return True
    return is_buffer and square and prod(shape[:-2]) == 1 and "mask" in key


def _placed(key: str, keys: set[str]) -> tuple[str, str]:
    """The path of the unit that a key belongs to, and what it is to it."""
    path, dot, leaf = key.rpartition(".")
    if leaf in _PLAIN and dot:
        return path, _PLAIN[leaf]
    found = _PARAMETRIZED.match(key)
    if found is not None and (found[3] == "original" or f"{key[:-1]}0" in keys):
        part = _PARTS[found[3]]
        return (found[1], part) if found[2] == "weight" else (f"{found[1]}.{found[2]}", part)
    if leaf in ("gamma", "beta", "scale", "w", "b", "g") and dot:
        role = "bias" if leaf in ("beta", "b") else "weight"
        other = {"gamma": "beta", "beta": "gamma", "scale": "bias", "w": "b", "b": "w", "g": "b"}[leaf]
        if f"{path}.{other}" in keys or "norm" in vocabulary.words(path.rpartition(".")[2]):
            return path, role
    found = _AFFIXED.match(leaf)
    if found is not None:
        return f"{path}.{found[2]}".lstrip("."), found[1]
    found = _SUFFIXED.match(leaf)
    if found is not None:
        return f"{path}.{found[1]}".lstrip("."), found[2]
    return key, OWN


def untied(source: Side, target: Side) -> tuple[Side, Side]:
    """Both sides, without the second names of what one side has once and the other twice."""
    return _without(source, target), _without(target, source)


def _without(one: Side, other: Side) -> Side:
    """One side without the names that it has more of than the other, where they are the same tensor."""
    aliases: set[str] = set()
    there = [sorted(leaf.shape) for leaf in other.leaves]  # it may lie the other way round there
    named = {leaf.key for leaf in other.leaves}
    here = [sorted(leaf.shape) for leaf in one.leaves]
    shapes = {leaf.key: sorted(leaf.shape) for leaf in one.leaves}
    for group in one.ties:
        known = sorted((key for key in group if key in shapes), key=lambda key: (key not in named, is_head(key)))
        heads = [key for key in known if is_head(key)]
        if heads and any(is_head(leaf.key) and sorted(leaf.shape) == shapes[known[0]] for leaf in other.leaves):
            known = list(dict.fromkeys((known[0], heads[0], *known)))  # an embedding and a head, before other names
        if len(known) > 1:
            over = here.count(shapes[known[0]]) - there.count(shapes[known[0]])
            aliases.update(known[len(known) - min(max(over, 0), len(known) - 1) :])
    if not aliases:
        return one
    kept = []
    for unit in one.units:
        leaves = {role: leaf for role, leaf in unit.leaves.items() if leaf.key not in aliases}
        if leaves:
            kept.append(unit if len(leaves) == len(unit.leaves) else Unit(unit.path, leaves, unit.kind, unit.module))
    return replace(one, units=tuple(kept), again=tuple(leaf for leaf in one.leaves if leaf.key in aliases))

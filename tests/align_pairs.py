"""Pairs of libraries that hold one architecture, for the aligner: a model of one library, and its state dict as the
other library (or a well-known repository) would write it.

`write` is the proven conversion.  Where the other library is here too, its model is built, loaded with what was written
and run beside the first; where it is not, its names are those of its published code, and what is right follows from
`write` by construction.  Each pair goes both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

import torch
from scramble import skeleton
from torch import Tensor, nn

State = dict[str, Tensor]
Write = Callable[[State], State]
Run = Callable[..., Any]


@dataclass(frozen=True)
class Pair:
    """`make` builds the first library's model, `write` says how the other one names and lays out its tensors.

    `other` builds the other library's model, `extra` are tensors that only the other one's file has.
    """

    name: str
    make: Callable[[], nn.Module]
    write: Write
    other: Callable[[], nn.Module] | None = None
    inputs: Callable[[], tuple[Tensor, ...]] | None = None
    runs: tuple[Run, Run] = (lambda model, *x: model(*x), lambda model, *x: model(*x))
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@torch.no_grad()
def told(model: nn.Module, seed: int) -> nn.Module:
    """The model with values of its own in each tensor, at scales at which each one counts."""
    chance = torch.Generator().manual_seed(seed)
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith("num_batches_tracked"):
            value.fill_(int(torch.randint(1, 1000, (), generator=chance)))
        elif key.endswith(("running_var", "original0", "weight_g")):
            value.copy_(0.5 + torch.rand(value.shape, generator=chance))
        elif value.is_floating_point():
            noise = torch.randn(value.shape, generator=chance)
            value.copy_(1 + 0.3 * noise if key.endswith("weight") and value.dim() == 1 else _scaled(noise))
    return model.eval()


def _scaled(noise: Tensor) -> Tensor:
    return noise / (noise.numel() / noise.shape[0]) ** 0.5 if noise.dim() > 1 else 0.3 * noise


def state(model: nn.Module) -> State:
    """A copy of the state dict, in which what is one tensor stays one."""
    found = model.state_dict(keep_vars=True)
    copies = {id(value): value.detach().clone() for value in found.values()}
    return {key: copies[id(value)] for key, value in found.items()}


# -- how to write ------------------------------------------------------------------------------


def renaming(*rules: tuple[str, str], drop: str = "(?!)") -> Write:
    """Patterns and what stands in their place, all of them on every key."""

    def write(found: State) -> State:
        made: State = {}
        for old, value in found.items():
            if re.search(drop, old):
                continue
            key = old
            for pattern, text in rules:
                key = re.sub(pattern, text, key)
            assert key not in made, key
            made[key] = value
        return made

    return write


def joining(name: str, *parts: str, by: Callable[..., Tensor] | None = None) -> Write:
    """Modules `parts` of one parent as one, `name`, in the place of the first."""

    def write(found: State) -> State:
        made: State = {}
        for key, value in found.items():
            *before, module, leaf = ["", *key.split(".")] if "." not in key else key.split(".")
            if module not in parts:
                made[key] = value
                continue
            names = [".".join((*before, part, leaf)) for part in parts]
            if key == next(one for one in names if one in found) and all(one in found for one in names):
                made[".".join((*before, name, leaf))] = (by or together)(*(found[one] for one in names))
            elif not all(one in found for one in names):
                made[key] = value
        return made

    return write


def together(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def by_heads(heads: int) -> Callable[..., Tensor]:
    """Head by head: queries, keys and values of the first, then of the second."""
    return lambda *parts: torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)


def by_pairs(heads: int) -> Callable[[Tensor], Tensor]:
    """From halves to neighbours: Meta's order of rotary pairs."""
    return lambda w: w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def changing(pattern: str, change: Callable[[Tensor], Tensor]) -> Write:
    return lambda found: {key: change(value) if re.search(pattern, key) else value for key, value in found.items()}


def stacked_apart(stack: str, *names: str) -> Write:
    """Experts in one tensor each for themselves: `experts.gate_up_proj` as `experts.{e}.gate_proj.weight` and so on."""

    def write(found: State) -> State:
        made: State = {}
        for key, value in found.items():
            if not key.endswith(stack):
                made[key] = value
                continue
            for number, expert in enumerate(value):
                for name, part in zip(names, expert.chunk(len(names)), strict=True):
                    made[f"{key[: -len(stack)]}{number}.{name}"] = part.clone()
        return made

    return write


def steps(*writes: Write) -> Write:
    def write(found: State) -> State:
        for one in writes:
            found = one(found)
        return found

    return write


def ordered(*names: str) -> Write:
    """Modules in the order in which the other library defines them; what is not named stays where it is."""

    def write(found: State) -> State:
        first: dict[tuple[str, ...], int] = {}
        for at, key in enumerate(found):
            path = tuple(key.split("."))
            for end in range(1, len(path) + 1):
                first.setdefault(path[:end], at)

        def place(key: str) -> list[tuple[int, int]]:
            path = tuple(key.split("."))
            return [
                (names.index(path[end - 1]) + 1 if path[end - 1] in names else 0, first[path[:end]])
                for end in range(1, len(path) + 1)
            ]

        return {key: found[key] for key in sorted(found, key=place)}

    return write


QKV = joining("qkv", "q_proj", "k_proj", "v_proj")


def by_calls(
    make: Callable[[], nn.Module], other: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]]
) -> Write:
    """Two models whose layers are called in the same order, each layer for the one called at the same time."""

    @cache
    def layers() -> tuple[list[tuple[str, str]], State]:
        ours, others = (_called(build().eval(), *inputs()) for build in (make, other))
        assert len(ours) == len(others)
        return list(zip(ours, others, strict=True)), other().state_dict()

    def write(found: State) -> State:
        pairs, shapes = layers()
        back = {there: here for here, there in pairs}
        made = {}
        for key, value in shapes.items():
            there, _, leaf = key.rpartition(".")
            made[key] = found[f"{back[there]}.{leaf}"].reshape(value.shape)
        return made

    return write


@torch.no_grad()
def _called(model: nn.Module, *inputs: Tensor) -> list[str]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if module._parameters and not any(child._parameters for child in list(module.modules())[1:]):
            module.register_forward_pre_hook(lambda module, _, name=name: found.setdefault(name, module) and None)
    model(*inputs)
    return list(found)


# -- how files differ --------------------------------------------------------------------------


def prefixed(prefix: str) -> Write:
    return lambda found: {prefix + key: value for key, value in found.items()}


def sorted_keys(found: State) -> State:
    """As safetensors has them."""
    return dict(sorted(found.items()))


def shuffled(found: State) -> State:
    keys = list(found)
    Random(7).shuffle(keys)
    return {key: found[key] for key in keys}


@dataclass(frozen=True)
class Case:
    """A file's tensors, a model, what must land where, and what else may."""

    source: State
    target: nn.Module
    truth: State


def case(pair: Pair, way: str, stored: Sequence[Write] = ()) -> Case:
    """`there` from the first library's model to the other's names, `back` the other way."""
    ours = state(told(pair.make(), 1))
    written = pair.write(ours)
    if way == "there":
        fresh = pair.other() if pair.other else skeleton({key: torch.zeros_like(v) for key, v in written.items()})
        return Case(steps(*stored)(ours), told(fresh, 2), written)
    extra = {key: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for key, shape in pair.extra.items()}
    target = told(pair.make(), 2)
    gone = _lost(pair, ours)
    return Case(steps(*stored)({**written, **extra}), target, {key: v for key, v in ours.items() if key not in gone})


def _lost(pair: Pair, ours: State) -> set[str]:
    """Keys of the first model that the other library's file has nothing of: what each tensor is filled with tells."""
    names = list(ours)
    marked = {key: torch.full_like(ours[key], number, dtype=torch.float64) for number, key in enumerate(names)}
    kept = {int(number) for value in pair.write(marked).values() for number in value.unique()}
    return {key for number, key in enumerate(names) if number not in kept}

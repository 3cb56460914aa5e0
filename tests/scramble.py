"""Scrambled models: a real model's state dict under other names and layouts, and what should land where.

`scramble(name, seed)` draws a way to write the model, and applies it to what a file holds, to what a model wants, or to
a part of both.  What is right follows by construction: the way of the target, applied to the values of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Literal

import scramble_models
import scramble_names as names
import scramble_steps as steps
import torch
from scramble_models import models
from scramble_steps import Draw, Entry, State, Step
from torch import Tensor, nn

__all__ = ["Scrambled", "aligned", "judged", "models", "scramble", "scrambles", "skeleton", "told_by_names", "written"]
Decidable = Literal["names", "shapes", "order", "ask"]
Verdict = Literal["solved", "asked", "wrong"]

LAYOUTS: tuple[Draw, ...] = (
    steps.fuse_odd, steps.fuse, steps.split, steps.gate, steps.experts, steps.transpose, steps.convolve, steps.squeeze
)  # fmt: skip
"""In the order in which they are applied: what is turned afterwards was joined along the right dimension."""
INSTEAD = {"fuse odd": "fuse", "split": "fuse", "linear to conv": "transpose", "conv to linear": "transpose"}
"""Kinds of which a state dict has one only."""
NAMES: tuple[Draw, ...] = (names.flatten, names.cut, names.renumber, names.spelled, names.neutral)
WRAPPING: tuple[Draw, ...] = (names.prefix, names.prefix, names.strip)
CONTENTS: tuple[Draw, ...] = (steps.drop_buffers, steps.add_buffers, steps.other_head, steps.extra, steps.drop_ties)
HIDING: tuple[Draw, ...] = (names.hash_keys, names.hash_segments)


@dataclass(frozen=True)
class Scrambled:
    """A source, a target of other values, and the truth: the tensor of each target key that the source can fill.

    `fresh` are keys that nothing of the source may fill; those of neither are buffers that a model makes by itself.
    """

    name: str
    seed: int
    source: dict[str, Tensor]
    target: dict[str, Tensor]
    truth: dict[str, Tensor]
    fresh: frozenset[str]
    decidable: Decidable
    how: tuple[str, ...]
    kinds: frozenset[str]
    roles: dict[str, str]

    @cached_property
    def model(self) -> nn.Module:
        """The target as a module: the real one where nothing of it was changed, else one that has these names."""
        if not any(line.startswith("target: ") for line in self.how):
            return scramble_models.base(self.name).model
        return skeleton(self.target, self.roles)

    def saved(self, path: Path) -> Path:
        """The source as a file, in its order."""
        torch.save(self.source, path)
        return path

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed} ({self.decidable}): " + "; ".join(self.how)


def scrambles(count: int, first: int = 0) -> Iterator[Scrambled]:
    """So many scrambles, each of another seed, the models in turn."""
    every = list(models())
    for seed in range(first, first + count):
        yield scramble(every[seed * 7 % len(every)], seed)


def scramble(name: str, seed: int) -> Scrambled:
    """The base model `name`, scrambled as the seed says."""
    random = Random(f"{name} {seed}")
    side = random.choice(("source", "source", "source", "target", "target", "both"))
    hidden = random.choice(("source", "target"))
    now, done = state(name, seed), dict[str, list[Step]]()
    for which in ("source", "target"):
        chosen = side in (which, "both")
        done[which] = list(_drawn(now, random, which, side != "both" or which == hidden)) if chosen else []
    return written(name, seed, done["source"], done["target"])


def written(name: str, seed: int, of_source: list[Step], of_target: list[Step]) -> Scrambled:
    """The base model `name` with one way of writing it in the file, and another in the model."""
    own, other, done = state(name, 2 * seed + 1), state(name, 2 * seed + 2), {"source": of_source, "target": of_target}
    source, truth, target = applied(own, of_source), applied(own, of_target), applied(other, of_target)
    there = frozenset(key for entry in source.values() if entry.role not in ("other", "buffer") for key in entry.of)
    right = {k: e.tensor for k, e in truth.items() if e.role not in ("buffer", "other") and e.of <= there}
    buffers = {key for key, entry in target.items() if entry.role == "buffer"}
    return Scrambled(
        name, seed, _tensors(source), _tensors(target), right, frozenset(set(target) - set(right) - buffers),
        _decidable(done, source, target), tuple(f"{w}: {s.said}" for w, made in done.items() for s in made),
        frozenset(s.kind for made in done.values() for s in made), {key: e.role for key, e in target.items()},
    )  # fmt: skip


def state(name: str, seed: int) -> State:
    """The state dict of a base model with random values, each tensor with what it is."""
    base = scramble_models.base(name)
    first = {key: keys[0] for keys in base.ties for key in keys}
    return {
        key: Entry(tensor, base.roles[key], frozenset({first.get(key, key)}))
        for key, tensor in scramble_models.values(name, seed).items()
    }


def applied(start: State, made: list[Step]) -> State:
    """The state after the steps."""
    for step in made:
        start = step.apply(start)
    return start


def _tensors(made: State) -> dict[str, Tensor]:
    return {key: entry.tensor for key, entry in made.items()}


def _chosen(now: State, random: Random, which: str, hiding: bool) -> list[Draw]:
    """What may be done, in order: layout, names, contents, wrappers, and at times all names hidden."""
    hashed = hiding and random.random() < 0.15
    able = [draw for draw in LAYOUTS if draw(now, Random(0)) is not None]
    most = 0 if hashed and random.random() < 0.7 else random.choice((0, 1, 1, 2, 3))
    often = {steps.transpose: 0.5, steps.convolve: 0.6, steps.fuse_odd: 0.5 if hiding else 0.0}
    draws = sorted(random.sample(able, min(len(able), most)), key=LAYOUTS.index)
    draws = [draw for draw in draws if random.random() < often.get(draw, 1.0)]
    if random.random() < 0.75:
        draws.append(names.synonyms)
    draws += [draw for draw in random.sample(NAMES, random.choice((0, 1, 1, 2))) if draw is not names.neutral or hiding]
    contents = CONTENTS[: 3 if hashed else None] if which == "source" else CONTENTS[:2]
    draws += random.sample(contents, random.choice((0, 1, 1, 2)))
    draws += random.sample(WRAPPING, random.choice((0, 1, 1)) if which == "source" else random.choice((0, 0, 1)))
    return [*draws, random.choice(HIDING)] if hashed else draws


def _anything(now: State, random: Random) -> Step | None:
    """A step that is always possible."""
    return names.prefix(now, random)


def _drawn(now: State, random: Random, which: str, hiding: bool) -> Iterator[Step]:
    """Some steps, each drawn for what the ones before it made; a prefix where none of them is possible."""
    seen: set[str] = set()
    for draw in (*_chosen(now, random, which, hiding), _anything):
        step = None if seen and draw is _anything else draw(now, random)
        if step is not None and (kind := INSTEAD.get(step.kind, step.kind)) not in seen:
            seen.add(kind)
            now = step.apply(now)
            yield step
    often = ("kept",) * (6 if any(kind.startswith("hash") for kind in seen) else 2)
    how = random.choice((*often, "sorted", "random"))
    if how != "kept":
        yield names.in_order(now, random, how)


def _decidable(done: dict[str, list[Step]], source: State, target: State) -> Decidable:
    """What it takes to find the truth."""
    every = [step for made in done.values() for step in made]
    kinds = {step.kind for step in every}
    cut = kinds & {"fuse", "split", "gate fused", "gate split", "experts listed"}
    if any(step.ask or (cut and step.hides & steps.JOINED) for step in every):
        return "ask"
    for side, made in (("source", source), ("target", target)):
        opaque = frozenset[str]().union(*(step.opaque for step in done[side]))
        hashed = any(step.kind.startswith("hash") for step in done[side])
        if hashed and (cut or "transpose" in kinds):
            return "ask"
        if opaque and not told_by_names({key: tuple(entry.tensor.shape) for key, entry in made.items()}, opaque):
            lost = {"sorted", "random", "extra"} & kinds or (hashed and "head" in kinds)
            return "ask" if lost or not _keeps_order(target) else "order"
        if hashed:
            return "shapes"
    return "names"


def _keeps_order(target: State) -> bool:
    """Whether a module of these names has them in this order: what is not in a part of it comes first."""
    return list(skeleton(_tensors(target), {k: e.role for k, e in target.items()}).state_dict()) == list(target)


def told_by_names(shapes: dict[str, tuple[int, ...]], opaque: frozenset[str]) -> bool:
    """Whether words that say nothing can be told by where they stand, among what, and by shapes.

    Words have the same colour until something tells them apart: a key with another shape or with other words.  A key
    that is opaque as a whole is one word.  Equal colours in the end need not mean twins, but often do.
    """
    parts = {key: key.split(".") for key in shapes}
    colours: dict[str, Any] = {w: 0 if w in opaque else w for found in parts.values() for w in found}
    count = 0
    while len(set(colours.values())) > count:
        count = len(set(colours.values()))
        seen: dict[str, list[Any]] = {word: [] for word in colours}
        for key, found in parts.items():
            colour = str((shapes[key], [colours[word] for word in found]))
            for place, word in enumerate(found):
                seen[word].append((place, colour))
        whole = {word: str((colours[word], sorted(where))) for word, where in seen.items() if word in opaque}
        number = {text: n for n, text in enumerate(sorted(set(whole.values())))}
        colours.update({word: number[text] for word, text in whole.items()})
    mine = [colours[word] for word in colours if word in opaque]
    return len(set(mine)) == len(mine)


def skeleton(tensors: dict[str, Tensor], roles: dict[str, str] | None = None) -> nn.Module:
    """A module of these names that can do nothing: buffers by their roles, shared tensors as one parameter."""
    made, shared = nn.Module(), dict[int, nn.Parameter]()
    for key, tensor in tensors.items():
        *path, leaf = key.split(".")
        where = made
        for word in path:
            if word not in where._modules:
                where.add_module(word, nn.Module())
            where = where.get_submodule(word)
        role = (roles or {}).get(key, "parameter" if tensor.is_floating_point() else "buffer")
        if role in ("stat", "buffer"):
            where.register_buffer(leaf, tensor)
        else:
            where.register_parameter(leaf, shared.setdefault(id(tensor), nn.Parameter(tensor.detach())))
    return made


def judged(scrambled: Scrambled, certain: bool, result: Callable[[], dict[str, Tensor]]) -> tuple[Verdict, str]:
    """What an answer is worth, and what is wrong with it; `result` gives the tensors that would be loaded."""
    if not certain:
        return "asked", ""
    made = result()
    tied: dict[int, list[str]] = {}
    for key, tensor in scrambled.target.items():
        tied.setdefault(id(tensor), []).append(key)
    group = {key: keys for keys in tied.values() for key in keys}
    for key, right in scrambled.truth.items():
        got = made.get(key, next((made[other] for other in group[key] if other in made), None))
        if got is None:
            return "wrong", f"{key} is missing"
        if got.shape != right.shape or not torch.equal(got, right):
            return "wrong", f"{key} is another tensor"
    filled = sorted(scrambled.fresh & set(made))
    return ("wrong", f"{filled[0]} is filled, which has no source") if filled else ("solved", "")


def aligned(scrambled: Scrambled, folder: Path) -> tuple[Verdict, str]:
    """What `cs.align` makes of it; an error that says why is no guess."""
    import ckptsurgeon as cs

    try:
        found = cs.align(scrambled.saved(folder / "source.pth"), scrambled.model)
    except cs.CkptError:
        return "asked", ""
    if problems := found.refusals(fit=True):
        return "asked", str(problems[0])

    def result() -> dict[str, Tensor]:
        made = found.plan(fit=True)
        return {key: made.result[key].read() for key in made.loaded()}

    return judged(scrambled, True, result)

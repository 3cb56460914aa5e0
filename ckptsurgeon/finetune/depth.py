"""How deep in its network a parameter lies, and which parameters are the head, by names and the modules behind them.

A *unit* is a numbered block: `blocks.3`, `encoder.layer.3`, `layer1.0` and `layer2.1` of a ResNet (whose stages count
through), `stages.1.blocks.2`, `features.4`.  Units count in the order of the model.  What comes before the first (stem,
embeddings) is depth 0; what comes after one (the last norm) belongs to it, and in a stage what comes before its first
block to that; the head is last.  Where nothing is numbered, each module that owns parameters is a unit.  Two towers
count one behind the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckptsurgeon.finetune import names as live_names
from ckptsurgeon.finetune.names import peeled
from ckptsurgeon.targets.module import types

if TYPE_CHECKING:
    import torch

HEADS = ("head", "heads", "fc", "classifier", "score", "lm_head", "cls", "qa_outputs", "output_layer")
"""What torchvision, timm and transformers call the module that makes the outputs."""
_NUMBERED = re.compile(r"(?:.*(?:layer|block|stage|inception|mixed)_?|[sb])?\d+[a-z]?", re.IGNORECASE)
_BLOCKS = ("blocks", "layers", "layer")
"""What a numbered module calls the blocks in it, when it is a stage and not a block itself."""

Run = tuple[str | None, list[str]]
"""Parameters one after another, and the unit that they are in."""


def depths(model: torch.nn.Module) -> dict[str, int]:
    """The depth of every parameter, by name: 0, 1, … without gaps."""
    prefix, core = _core(model)
    found = live_names.parameters(core)
    runs = list(_runs("", core, False))
    if not any(unit for unit, _ in runs):
        runs = list(_owners(core))
    made: dict[str, str] = {}
    unit = "stem"
    for new, names in runs:
        unit = new if new is not None else unit
        made |= {name: unit for name in names if name in found and name not in made}
    of_head = _last(core)
    order = list(dict.fromkeys(unit for name, unit in made.items() if name not in of_head))
    numbers = {unit: number for number, unit in enumerate(order)}
    return {prefix + name: len(order) if name in of_head else numbers[made[name]] for name in found}


def head_of(model: torch.nn.Module) -> list[str]:
    """The parameters of the head: what timm says is the classifier, else a child of one of the usual names.

    Of a Sequential only the last module that owns parameters is meant: those before it are pretrained as well.
    Empty where there is none, or it has no parameters of its own.
    """
    prefix, core = _core(model)
    return [prefix + name for name in _head(core)]


def _core(model: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    """The network in a module that only holds it, such as one of Lightning's, and the beginning of its names."""
    prefix, core = "", peeled(model)
    while not any(one is not None for one in core._parameters.values()):
        children = {step: one for step, one in core._modules.items() if one is not None and _owns(one)}
        step = next(iter(children), "")
        if len(children) != 1 or step in HEADS or _NUMBERED.fullmatch(step):
            break
        prefix, core = f"{prefix}{step}.", peeled(children[step])
    return prefix, core


def _head(model: torch.nn.Module) -> list[str]:
    found = live_names.parameters(model)
    said = _said_by_timm(model)
    if said:
        return [name for name in found if any(_inside(name, place) for place in said)]
    place = _usual(model)
    of = [name for name in found if place and _inside(name, place)]
    if of and type(peeled(model)._modules[place]).__name__ == "Sequential":
        last = of[-1].rpartition(".")[0]
        return [name for name in of if name.rpartition(".")[0] == last]
    return of


def _last(model: torch.nn.Module) -> set[str]:
    """What is as deep as the head: the head, and what else is in the same child of the model (timm's `head.norm`)."""
    head = _head(model)
    children = {name.partition(".")[0] for name in head}
    whole = {child for child in children if type(peeled(model)._modules.get(child)).__name__ != "Sequential"}
    return {*head, *(name for name in live_names.parameters(model) if name.partition(".")[0] in whole)}


def _usual(model: torch.nn.Module) -> str:
    """The last child of a model that has one of the usual names of a head; "" for none."""
    children = [name for name, child in peeled(model)._modules.items() if child is not None]
    return next((name for name in reversed(children) if name in HEADS), "")


def _said_by_timm(model: torch.nn.Module) -> list[str]:
    """The names of the classifier modules, by the configuration that timm gives its models."""
    config: Any = getattr(peeled(model), "pretrained_cfg", None)
    said = config.get("classifier") if isinstance(config, Mapping) else None
    return [said] if isinstance(said, str) else [place for place in said or () if isinstance(place, str)]


def _owners(model: torch.nn.Module) -> Iterator[Run]:
    """A unit for each module that owns parameters, but for norms, which go with what is before them."""
    for name, module in live_names.modules(model):
        prefix = f"{name}." if name else ""
        owned = [prefix + step for step, one in module._parameters.items() if one is not None]
        yield None if _is_norm(module) or not owned else name, owned


def _owns(module: torch.nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_norm(module: torch.nn.Module) -> bool:
    return types(module)[1] == "norm"


def _inside(name: str, place: str) -> bool:
    return name.startswith(f"{place}.")


def _runs(name: str, module: torch.nn.Module, inside: bool) -> Iterator[Run]:
    """The parameters of a module as runs; `inside` a unit only named and like blocks count as units of their own."""
    prefix = f"{name}." if name else ""
    yield None, [prefix + step for step, one in module._parameters.items() if one is not None]
    children = {step: peeled(child) for step, child in module._modules.items() if child is not None}
    is_stack = not inside or (name.rpartition(".")[2] in _BLOCKS and _alike(children))
    for step, child in children.items():
        place = prefix + step
        if not (is_stack and _NUMBERED.fullmatch(step)):
            yield from _runs(place, child, inside)
        elif _is_stage(child):
            yield from _runs(place, child, False)
        elif _is_norm(child):
            yield None, _all(place, child)
        else:
            yield from _unit(place, child)


def _unit(place: str, child: torch.nn.Module) -> Iterator[Run]:
    """A numbered module: one unit, or as many as there are blocks in it."""
    runs = list(_runs(place, child, True))
    if not any(unit for unit, _ in runs):
        yield place, [name for _, names in runs for name in names]
        return
    first = next(unit for unit, _ in runs if unit)
    unit = first
    for new, names in runs:
        unit = new or unit
        yield unit, names


def _is_stage(module: torch.nn.Module) -> bool:
    """Whether a numbered module only holds numbered blocks: it owns nothing, and they are more than single layers."""
    children = {step: peeled(child) for step, child in module._modules.items() if child is not None}
    return (
        bool(children)
        and not module._parameters
        and all(_NUMBERED.fullmatch(step) for step in children)
        and all(
            any(True for _ in child.children()) for child in children.values() if any(True for _ in child.parameters())
        )
    )


def _alike(children: Mapping[str, torch.nn.Module]) -> bool:
    """Whether modules are blocks: all of one class, which has modules in it."""
    classes = {type(child) for child in children.values()}
    return len(classes) == 1 and all(any(True for _ in child.children()) for child in children.values())


def _all(place: str, module: torch.nn.Module) -> list[str]:
    return [f"{place}.{name}" for name in live_names.parameters(module)]

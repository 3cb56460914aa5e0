"""Which inputs models may take: what they say of themselves, else what their first layers take.

Candidates, of which the first that both models take is used: a model that says nothing of its image size is tried with
small ones first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BATCH = 2
_LENGTHS = (16, 8, 4, 1)
_SIZES = (64, 224, 32, 28, 299, 96, 128, 256, 384, 16, 8)
_STEPS = (64, 1024, 16, 8000)
_FIRST = 3
"""How many of the first layers are asked: the first that is defined need not be the first that is called."""


@dataclass(frozen=True)
class Random:
    """Random numbers of a shape; whole ones `below` a number where it is given; or a `value` that is there already."""

    shape: tuple[int, ...]
    below: int | None = None
    value: Any = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def __str__(self) -> str:
        what = "x".join(map(str, self.shape)) or "a number"
        return what if self.below is None else f"{what} of whole numbers below {self.below}"


@dataclass(frozen=True)
class Made:
    """Inputs by name, and where their shapes come from."""

    values: Mapping[str, Random]
    how: str


def candidates(source: torch.nn.Module, target: torch.nn.Module) -> Iterator[Made]:
    """Inputs that the models may take, the likeliest first, each once."""
    seen = set()
    for find in (_told, _layers):
        for model in (target, source):
            for made in find(model):
                key = tuple(one if one.value is None else id(one.value) for one in made.values.values())
                if key not in seen:
                    seen.add(key)
                    yield replace(made, how=f"random {', '.join(map(str, made.values.values()))}, from {made.how}")


def _told(model: torch.nn.Module) -> Iterator[Made]:
    """What a model says of itself."""
    example = getattr(model, "example_input_array", None)
    if example is not None and hasattr(example, "shape"):
        yield Made({"0": Random(tuple(example.shape), value=example)}, f"the example of the {type(model).__name__}")
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is not None and isinstance(main, str):
        yield from _transformers(model, config, main)
    channels = _channels(model)
    patches = getattr(model, "patch_embed", None)
    for thing, name in ((patches, "img_size"), (model, "image_size"), (model, "img_size")):
        sides = _sides(_value(thing, name))
        if sides and channels:
            yield Made({"x": Random((_BATCH, channels, *sides))}, f"the image size of the {type(model).__name__}")
    for cfg in (getattr(model, "pretrained_cfg", None), getattr(model, "default_cfg", None)):  # timm's
        size = cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None)
        if isinstance(size, tuple | list) and len(size) == 3:
            shape = (_BATCH, channels or int(size[0]), int(size[1]), int(size[2]))
            yield Made({"x": Random(shape)}, f"the input size of the {type(model).__name__}")


def _transformers(model: torch.nn.Module, config: Any, main: str) -> Iterator[Made]:
    """What the config of a transformers model says, for each thing that its forward begins with."""
    how = f"the config of the {type(model).__name__}"
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        for size in (0,) if _sides(_value(vision, "image_size")) else _SIZES:
            yield Made({main: _pixels(vision, size)}, how)
        return
    takes = set(inspect.signature(model.forward).parameters)
    for length in _LENGTHS:
        vocabulary = _number(_text(config), "vocab_size")
        ids = None if vocabulary is None else Random((_BATCH, length), vocabulary)
        first = ids if main == "input_ids" else _sound(config, main)
        if first is None:
            return
        values = {main: first}
        if main == "input_ids" and "pixel_values" in takes and hasattr(config, "vision_config"):
            values["pixel_values"] = _pixels(config.vision_config, 0)
        if "decoder_input_ids" in takes and ids is not None:
            values["decoder_input_ids"] = ids
        yield Made(values, how)


def _sound(config: Any, main: str) -> Random | None:
    """Spectrograms, or samples."""
    bins = _number(config, "num_mel_bins")
    if main == "input_features" and bins:
        return Random((_BATCH, bins, 2 * (_number(config, "max_source_positions") or 64)))
    if main == "input_values":
        frames = _number(config, "max_length")
        return Random((_BATCH, frames, bins) if bins and frames else (_BATCH, 8000))
    return None


def _text(config: Any) -> Any:
    find = getattr(config, "get_text_config", None)
    return config if find is None else find()


def _pixels(config: Any, size: int) -> Random:
    channels = _number(config, "num_channels") or _number(config, "in_channels") or 3
    sides = (size, size) if size else _sides(_value(config, "image_size")) or (224, 224)
    return Random((_BATCH, channels, *sides))


def _sides(size: Any) -> tuple[int, ...]:
    """Height and width, however they are said; () where they are not."""
    if type(size) is int and size > 0:
        return size, size
    known = isinstance(size, tuple | list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    return tuple(size) if known else ()


def _number(thing: Any, name: str) -> int | None:
    value = _value(thing, name)
    return value if type(value) is int and value > 0 else None


def _value(thing: Any, name: str) -> Any:
    return getattr(thing, name, None)


# -- first layers ------------------------------------------------------------------------------


def _parametric(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Modules that have parameters of themselves, in the order in which they were defined."""
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            yield module


def _channels(model: torch.nn.Module) -> int | None:
    """The channels of the first convolution over images."""
    import torch

    convs = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first = next(convs, None)
    return None if first is None else first.in_channels


def _layers(model: torch.nn.Module) -> Iterator[Made]:
    """What the first layers take, as often as the forward wants something."""
    count = _wanted(model)
    for number, module in enumerate(_parametric(model)):
        if number >= _FIRST:
            return
        for one in _of(module):
            how = f"the {type(module).__name__} of the {type(model).__name__}"
            yield Made({str(at): one for at in range(count)}, how)


def _wanted(model: torch.nn.Module) -> int:
    """How many things a forward wants at least."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(one.kind in plain and one.default is one.empty for one in parameters))


def _of(module: torch.nn.Module) -> Iterator[Random]:
    """What a layer takes."""
    from torch import nn

    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield from (Random((_BATCH, length), module.num_embeddings) for length in _LENGTHS)
        yield Random((_BATCH,), module.num_embeddings)
    elif isinstance(module, nn.Linear):
        yield Random((_BATCH, module.in_features))
        yield Random((_BATCH, 8, module.in_features))
    elif isinstance(module, nn.modules.conv._ConvNd):
        rank = len(module.kernel_size)
        for size in {1: _STEPS, 2: _SIZES}.get(rank, (16, 32, 8)):
            yield Random((_BATCH, module.in_channels, *(size,) * rank))
    elif isinstance(module, nn.RNNBase):
        yield Random((_BATCH, 8, module.input_size))
    elif isinstance(module, nn.RNNCellBase):
        yield Random((_BATCH, module.input_size))
    elif isinstance(module, nn.MultiheadAttention):
        yield Random((_BATCH, 8, module.embed_dim))
    elif isinstance(module, nn.LayerNorm):
        yield Random((_BATCH, 8, *module.normalized_shape))
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        spare = {"BatchNorm2d": (16, 16), "BatchNorm3d": (8, 8, 8)}.get(type(module).__name__, ())
        yield Random((_BATCH, module.num_features, *spare))
        yield Random((_BATCH, module.num_features, 16))
    else:  # a matrix of a module that torch does not know
        sizes = [size for value in module.parameters(recurse=False) if value.dim() == 2 for size in value.shape]
        yield from (Random((_BATCH, size)) for size in sizes)

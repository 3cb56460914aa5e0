"""Models that are run before and after a surgery: those of libraries with values and other names, and small ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with values that no two tensors share, as after a training; norms stay near 1."""
    chance = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            near_one = value.dim() == 1 and not name.endswith(("bias", "mean"))
            drawn = torch.rand(value.shape, generator=chance)
            value.copy_(0.8 + 0.4 * drawn if near_one else 0.2 * (drawn - 0.5))
    return model


def renamed(model: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """The same network, whose modules of these names are called otherwise in its state dict."""
    for module in list(model.modules()):
        there = {old: new for old, new in names.items() if old in module._modules}
        if there:
            module._modules = {there.get(name, name): inner for name, inner in module._modules.items()}
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {old: _alias(new) for old, new in there.items()})
    return model


def _alias(name: str) -> property:
    return property(lambda module: module._modules[name])


def timm_vit() -> nn.Module:
    import timm

    return filled(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, img_size=32))


def neutral_vit() -> nn.Module:
    """timm's ViT, whose two norms of a block are called so that nothing tells which is which."""
    return renamed(timm_vit(), {"norm1": "alpha", "norm2": "beta"})


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTForImageClassification(ViTConfig(image_size=32, num_labels=5, layer_norm_eps=1e-6, **sizes))


def resnet() -> nn.Module:
    import torchvision

    return filled(torchvision.models.resnet18(num_classes=7))


def hf_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=7, **sizes))


def other_vit() -> nn.Module:
    """As `neutral_vit`, with other activations: another network of the same names and shapes."""
    model = neutral_vit()
    for module in list(model.modules()):
        for name, inner in list(module._modules.items()):
            if isinstance(inner, nn.GELU):
                module._modules[name] = nn.ReLU()
    return model


class Kernels(nn.Module):
    """Square layers, one after the other with a detour each, whose weights are called `kernel` and lie (in, out)."""

    def __init__(self, count: int = 2, width: int = 6, turned: bool = True) -> None:
        super().__init__()
        self.turned = turned
        name = "kernel" if turned else "weight"
        self.layers = nn.ModuleDict({f"l{letter}": nn.Module() for letter in "abcdefghij"[:count]})
        for layer in self.layers.values():
            layer.register_parameter(name, nn.Parameter(torch.randn(width, width)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = x + torch.tanh(x @ (layer.kernel if self.turned else layer.weight.T))
        return x


class Twins(nn.Module):
    """Layers of one shape, one after the other, under names that are given."""

    def __init__(self, *names: str, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(width, width) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = x + torch.tanh(layer(x))
        return x


def twins() -> nn.Module:
    return Twins("pear", "plum")


def other_twins() -> nn.Module:
    return Twins("left", "right")


class Branches(nn.Module):
    """Two layers side by side: it makes no difference which is which."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.sides = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.sides.values())


class Does(nn.Module):
    """A layer, and what is done with its output."""

    def __init__(self, what: Any, width: int = 4) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(width, width), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.layer(x))


def _fails(x: Tensor) -> Tensor:
    raise KeyError("no such thing")


def failing() -> nn.Module:
    return Does(_fails)


def plain() -> nn.Module:
    return Does(lambda x: x)


ONE = plain()
"""A module that a spec may name: the same each time."""


def broken_vit() -> nn.Module:
    """A model that can be built and loaded, and not run."""
    model = neutral_vit()

    class Broken(type(model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model.__class__ = Broken
    return model

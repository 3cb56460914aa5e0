"""Pairs of models that are one architecture in two libraries, small and with random weights, and the built-in recipes
that take one's state dict to the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from small_models import (
    MetaLlama,
    NanoGPT,
    SeparateAttention,
    TwoAttentions,
    Vocoder,
    with_separate_experts,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import convnext, resnet, swin_transformer, vision_transformer

import ckptsurgeon as cs
from ckptsurgeon.rules import builtin_path

NEVER = "(?!)"


@dataclass(frozen=True)
class Side:
    """One library's model: how it is built, and what of it is compared, for an input."""

    layout: str
    make: Callable[[], nn.Module]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Pair:
    """Two sides and the recipes between them.

    `constants` are keys that only one side keeps in its state dict: buffers that follow from its configuration.
    `silent` are tensors that cannot show in the outputs.
    """

    name: str
    there: str
    back: str
    left: Side
    right: Side
    inputs: Callable[[], tuple[Tensor, ...]]
    variables: Mapping[str, str] = field(default_factory=dict)
    constants: str = NEVER
    silent: str = NEVER


# -- values ------------------------------------------------------------------------------------


@torch.no_grad()
def told(model: nn.Module, seed: int) -> nn.Module:
    """The model with values of its own in every parameter and norm statistic, at scales at which each one counts."""
    chance = torch.Generator().manual_seed(seed)
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith("num_batches_tracked"):
            value.fill_(int(torch.randint(1, 1000, (), generator=chance)))
        elif key.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=chance))
        elif isinstance(value, nn.Parameter) or key.endswith("running_mean"):
            value.copy_(_drawn(key, value.shape, chance))
    return model.eval()


def _drawn(key: str, shape: torch.Size, chance: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=chance)
    if noise.numel() == max((1, *shape)) and not re.search("token|class_embedding|bias|running_mean", key):
        return 1 + 0.3 * noise  # of norms, of layers' scales and of weight norm's lengths
    if re.search("embed|token|bias|running_mean", key):
        return 0.4 * noise
    return 1.3 * noise / (noise.numel() / shape[0]) ** 0.5


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference between what two models gave back, over the largest value that should be there."""
    assert [part.shape for part in got] == [part.shape for part in want]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


@torch.no_grad()
def outputs(side: Side, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What is compared, in double precision, so that only what the libraries do themselves in float32 differs.

    The model stays in double precision.
    """
    made = side.run(model.double(), *(x.double() if x.is_floating_point() else x for x in inputs))
    return [made] if isinstance(made, Tensor) else list(made)


# -- recipes -----------------------------------------------------------------------------------

FOLDER = Path(builtin_path("unwrap")).parent


def read(name: str) -> dict[str, Any]:
    """A recipe as it stands in its file."""
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe", pure=True).load((FOLDER / f"{name}.yaml").read_text()))


def recipe(name: str, source: str | Path, variables: Mapping[str, str]) -> cs.Recipe:
    return cs.Recipe.load(f"builtin:{name}", variables=variables)


# -- inputs and outputs ------------------------------------------------------------------------


def image(size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5)),)


def tokens(count: int, length: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, count, (2, length), generator=torch.Generator().manual_seed(5)),)


def noise(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    chance = torch.Generator().manual_seed(5)
    made = tuple(torch.randn(shape, generator=chance) for shape in shapes)
    return lambda: made


def call(model: nn.Module, *inputs: Tensor) -> Any:
    return model(*inputs)


def logits(model: nn.Module, x: Tensor) -> Any:
    return model(x).logits


# -- vision transformers -----------------------------------------------------------------------

VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
VIT |= {"intermediate_size": 96, "num_labels": 7, "layer_norm_eps": 1e-6}


def timm_vit(name: str, **how: Any) -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return timm.create_model(name, num_classes=7, **(size | how))


def distilled(model: Any, x: Tensor) -> Any:
    found = model.forward_features(x)
    return model.head(found[:, 0]), model.head_dist(found[:, 1])


def taught(model: nn.Module, x: Tensor) -> Any:
    made = model(x)
    return made.cls_logits, made.distillation_logits


TV_VIT = Side("torchvision-vit", lambda: vision_transformer.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=7), call)
TIMM_VIT = Side("timm-vit", partial(timm_vit, "vit_tiny_patch16_224"), call)
TIMM_DEIT = Side("timm-deit", partial(timm_vit, "deit_tiny_distilled_patch16_224"), distilled)
HF_VIT = Side("transformers-vit", lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)), logits)
HF_DEIT = Side(
    "transformers-deit",
    lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VIT)),
    taught,
)

# -- convolutional networks --------------------------------------------------------------------


def tv_resnet(block: type, depths: list[int]) -> nn.Module:
    return resnet.ResNet(block, depths, num_classes=7)


def hf_resnet(kind: str, depths: list[int], width: int) -> nn.Module:
    widths = [width * 2**i for i in range(4)]
    config = transformers.ResNetConfig(hidden_sizes=widths, depths=depths, layer_type=kind, num_labels=7)
    return transformers.ResNetForImageClassification(config)


WIDTHS, DEPTHS = (8, 12, 16, 20), (1, 2, 2, 1)


def tv_convnext() -> nn.Module:
    outs = (*WIDTHS[1:], None)
    stages = [convnext.CNBlockConfig(width, out, depth) for width, out, depth in zip(WIDTHS, outs, DEPTHS, strict=True)]
    return convnext.ConvNeXt(stages, num_classes=7)


def timm_convnext(conv_mlp: bool = False) -> nn.Module:
    return timm.create_model("convnext_tiny", dims=WIDTHS, depths=DEPTHS, num_classes=7, conv_mlp=conv_mlp)


def hf_convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=list(WIDTHS), depths=list(DEPTHS), num_labels=7, layer_norm_eps=1e-6
    )
    return transformers.ConvNextForImageClassification(config)


TV_CONVNEXT = Side("torchvision-convnext", tv_convnext, call)
TIMM_CONVNEXT = Side("timm-convnext", timm_convnext, call)
HF_CONVNEXT = Side("transformers-convnext", hf_convnext, logits)

# -- Swin --------------------------------------------------------------------------------------

SWIN_DEPTHS, SWIN_HEADS = [2, 1, 2], [2, 3, 4]
INDEX = r"\.relative_position_index$"


def tv_swin() -> nn.Module:
    return swin_transformer.SwinTransformer([4, 4], 12, SWIN_DEPTHS, SWIN_HEADS, [4, 4], num_classes=7)


def timm_swin() -> nn.Module:
    size = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 12}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", depths=SWIN_DEPTHS, num_heads=SWIN_HEADS, num_classes=7, **size
    )


def hf_swin() -> nn.Module:
    size = {"image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 12}
    config = transformers.SwinConfig(depths=SWIN_DEPTHS, num_heads=SWIN_HEADS, num_labels=7, **size)
    return transformers.SwinForImageClassification(config)


TV_SWIN = Side("torchvision-swin", tv_swin, call)
TIMM_SWIN = Side("timm-swin", timm_swin, call)
HF_SWIN = Side("transformers-swin", hf_swin, logits)

# -- CLIP --------------------------------------------------------------------------------------


def openai_clip(quick: bool) -> nn.Module:
    vision = open_clip.CLIPVisionCfg(layers=2, width=48, head_width=12, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=10, vocab_size=50, width=32, heads=2, layers=2)
    return open_clip.model.CLIP(24, vision, text, quick_gelu=quick)


def hf_clip(quick: bool) -> nn.Module:
    common = {"num_hidden_layers": 2, "hidden_act": "quick_gelu" if quick else "gelu"}
    text = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 50}
    text |= {"max_position_embeddings": 10, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0}
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=24)
    return transformers.CLIPModel(config)


def image_and_text() -> tuple[Tensor, ...]:
    """A picture each, and a text each that ends with the last token of the vocabulary."""
    words = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(6))
    words[:, 0], words[:, 7], words[:, 8:] = 48, 49, 0
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)), words


def openai_scores(model: nn.Module, x: Tensor, words: Tensor) -> Any:
    pictures, texts, scale = model(x, words)[:3]
    return pictures, texts, scale * pictures @ texts.T, scale


def hf_scores(model: Any, x: Tensor, words: Tensor) -> Any:
    made = model(input_ids=words, pixel_values=x)
    return made.image_embeds, made.text_embeds, made.logits_per_image, model.logit_scale.exp()


# -- language models ---------------------------------------------------------------------------


def hf_gpt2() -> nn.Module:
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16, **special)
    )


def hf_llama(kv_heads: int) -> nn.Module:
    size = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=kv_heads, rms_norm_eps=1e-5, **size)
    return transformers.LlamaForCausalLM(config)


def hf_mixtral() -> nn.Module:
    size = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=3, **size)
    config._experts_implementation = "eager"  # the others want float32
    return transformers.MixtralForCausalLM(config)


HF_GPT2 = Side("transformers-gpt2", hf_gpt2, logits)
HF_MIXTRAL = Side("mixtral-stacked", hf_mixtral, logits)

# -- all of them -------------------------------------------------------------------------------


def _pairs() -> list[Pair]:
    made = [
        Pair("vit", "torchvision-vit-to-timm", "timm-vit-to-torchvision", TV_VIT, TIMM_VIT, image(32)),
        Pair(
            "vit", "timm-vit-to-transformers", "transformers-vit-to-timm", TIMM_VIT, HF_VIT, image(32),
            silent="k_proj.bias",
        ),
        Pair(
            "vit without bias", "timm-vit-to-transformers", "transformers-vit-to-timm",
            Side("timm-vit", partial(timm_vit, "vit_tiny_patch16_224", qkv_bias=False), call),
            Side(
                "transformers-vit",
                lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, qkv_bias=False)),
                logits,
            ),
            image(32),
        ),
        Pair(
            "deit", "timm-deit-to-transformers", "transformers-deit-to-timm", TIMM_DEIT, HF_DEIT, image(32),
            silent="k_proj.bias",
        ),
        Pair(
            "swin", "torchvision-swin-to-timm", "timm-swin-to-torchvision", TV_SWIN, TIMM_SWIN, image(64),
            constants=INDEX,
        ),
        Pair(
            "swin", "timm-swin-to-transformers", "transformers-swin-to-timm", TIMM_SWIN, HF_SWIN, image(64),
            silent="k_proj.bias",
        ),
        Pair(
            "swin", "torchvision-swin-to-transformers", "transformers-swin-to-torchvision", TV_SWIN, HF_SWIN, image(64),
            constants=INDEX, silent="k_proj.bias",
        ),
        Pair(
            "convnext", "torchvision-convnext-to-timm", "timm-convnext-to-torchvision", TV_CONVNEXT, TIMM_CONVNEXT,
            image(64),
        ),
        Pair(
            "convnext", "timm-convnext-to-transformers", "transformers-convnext-to-timm", TIMM_CONVNEXT, HF_CONVNEXT,
            image(64),
        ),
        Pair(
            "gpt2", "nanogpt-to-transformers", "transformers-gpt2-to-nanogpt",
            Side("nanogpt", lambda: NanoGPT(50, 16, 32, 2, 4), call), HF_GPT2, tokens(50, 16),
        ),
        Pair(
            "mixtral", "mixtral-separate-to-stacked", "mixtral-stacked-to-separate",
            Side("mixtral-separate", lambda: with_separate_experts(hf_mixtral(), 32, 24, 3), logits), HF_MIXTRAL,
            tokens(50, 16),
        ),
        Pair(
            "mha", "mha-joined-to-separate", "mha-separate-to-joined",
            Side(
                "mha-joined",
                lambda: TwoAttentions(lambda: nn.MultiheadAttention(24, 4, batch_first=True), 24),
                call,
            ),
            Side("mha-separate", lambda: TwoAttentions(lambda: SeparateAttention(24, 4), 24), call),
            noise((2, 7, 24), (2, 5, 24)), silent="k_proj.bias",
        ),
        Pair(
            "mha alone", "mha-joined-to-separate", "mha-separate-to-joined",
            Side("mha-joined", lambda: nn.MultiheadAttention(24, 4, batch_first=True), lambda m, *x: m(*x)[0]),
            Side("mha-separate", lambda: SeparateAttention(24, 4), lambda m, *x: m(*x)[0]),
            noise((2, 7, 24), (2, 5, 24), (2, 5, 24)), silent="k_proj.bias",
        ),
        Pair(
            "vocoder", "weight-norm-to-parametrizations", "parametrizations-to-weight-norm",
            Side("weight-norm", lambda: Vocoder(nn.utils.weight_norm), call),
            Side("parametrizations", lambda: Vocoder(parametrizations.weight_norm), call),
            noise((8, 5, 8)),
        ),
    ]  # fmt: skip
    for kind, block, depths, width in (("basic", resnet.BasicBlock, [1, 2, 1, 1], 64),
                                       ("bottleneck", resnet.Bottleneck, [2, 1, 1, 1], 256)):  # fmt: skip
        left = Side("torchvision-resnet", partial(tv_resnet, block, depths), call)
        right = Side("transformers-resnet", partial(hf_resnet, kind, depths, width), logits)
        names = "torchvision-resnet-to-transformers", "transformers-resnet-to-torchvision"
        made.append(Pair(kind, *names, left, right, image(32)))
    for quick in (True, False):
        left = Side("openai-clip", partial(openai_clip, quick), openai_scores)
        right = Side("transformers-clip", partial(hf_clip, quick), hf_scores)
        names = "openai-clip-to-transformers", "transformers-clip-to-openai"
        name = "quick_gelu" if quick else "gelu"
        made.append(Pair(name, *names, left, right, image_and_text, silent="k_proj.bias"))
    for kv_heads in (2, 4):
        left = Side("meta-llama", partial(MetaLlama, 50, 32, 40, 2, 4, kv_heads), call)
        right = Side("transformers-llama", partial(hf_llama, kv_heads), logits)
        names = "meta-llama-to-transformers", "transformers-llama-to-meta"
        variables = {"heads": "4", "kv_heads": "2"} if kv_heads == 2 else {"heads": "4"}
        made.append(Pair(f"{kv_heads} of 4 heads", *names, left, right, tokens(50, 16), variables))
    return made


PAIRS = _pairs()


@dataclass(frozen=True)
class Way:
    """A pair in one direction."""

    pair: Pair
    recipe: str
    opposite: str
    source: Side
    target: Side

    @property
    def id(self) -> str:
        return f"{self.recipe}, {self.pair.name}"


WAYS = [
    Way(pair, pair.there, pair.back, pair.left, pair.right)
    if forth
    else Way(pair, pair.back, pair.there, pair.right, pair.left)
    for pair, forth in product(PAIRS, (True, False))
]

"""Small models of many families: real architectures of torchvision, timm and transformers, and a few of our own.

Only names and shapes count here, so the convolutional nets are built as they are and then made narrow."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]
LLM = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
ENCODER = {**LLM, "intermediate_size": 64, "max_position_embeddings": 40}
GATED = {**LLM, "intermediate_size": 48, "num_key_value_heads": 2}
VISION = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
PATCHES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_classes": 20}


def torchvision(name: str, by: int, **words: Any) -> Build:
    def build() -> nn.Module:
        import torchvision as tv

        with torch.device("meta"):
            model = getattr(tv.models, name)(num_classes=40, **words)
        return narrowed(model, by)

    return build


def timm(name: str, by: int = 1, **words: Any) -> Build:
    def build() -> nn.Module:
        import timm as library

        with torch.device("meta" if by > 1 else "cpu"):
            model = library.create_model(name, **words)
        return narrowed(model, by)

    return build


def transformers(name: str, config: str, by: int = 1, **words: Any) -> Build:
    def build() -> nn.Module:
        import transformers as library

        return narrowed(getattr(library, name)(getattr(library, config)(**words)), by)

    return build


def narrowed(model: nn.Module, by: int) -> nn.Module:
    """The model with its long dimensions `by` times shorter; a parameter that is shared stays so."""
    if by == 1:
        return model
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.zeros(
                        [n // by if n >= 4 * by and n % by == 0 else n for n in old.shape], dtype=old.dtype
                    )
                    made[id(old)] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
                store[name] = made[id(old)]  # type: ignore[assignment]
    return model


class Tagger(nn.Module):
    """A text tagger with two LSTMs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 24)
        self.lstm = nn.LSTM(24, 32, num_layers=2, bidirectional=True)
        self.decoder_rnn = nn.GRU(64, 32)
        self.dropout, self.classifier = nn.Dropout(), nn.Linear(32, 9)


class Translator(nn.Module):
    """torch's own transformer layers, encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.src_embedding, self.tgt_embedding = nn.Embedding(70, 32), nn.Embedding(60, 32)
        encoder, decoder = nn.TransformerEncoderLayer(32, 4, 48), nn.TransformerDecoderLayer(32, 4, 48)
        self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, 2)
        self.generator = nn.Linear(32, 60)


class Vocoder(nn.Module):
    """One-dimensional convolutions under weight norm, as vocoders have them."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.conv_pre = norm(nn.Conv1d(20, 32, 7))
        self.ups = nn.ModuleList(norm(nn.ConvTranspose1d(32 >> i, 16 >> i, 4)) for i in range(2))
        self.resblocks = nn.ModuleList(
            nn.ModuleDict(
                {"convs1": norm(nn.Conv1d(16 >> i, 16 >> i, 3)), "convs2": norm(nn.Conv1d(16 >> i, 16 >> i, 5))}
            )
            for i in range(2)
        )
        self.conv_post = norm(nn.Conv1d(8, 1, 7))


class Double(nn.Sequential):
    def __init__(self, into: int, out: int) -> None:
        convs = [nn.Conv2d(into, out, 3), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3), nn.BatchNorm2d(out)]
        super().__init__(*convs, nn.ReLU())


class UNet(nn.Module):
    """A UNet of double convolutions, three levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = Double(3, 8)
        self.downs = nn.ModuleList(Double(8 << i, 16 << i) for i in range(3))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(64 >> i, 32 >> i, 2) for i in range(3))
        self.merges = nn.ModuleList(Double(64 >> i, 32 >> i) for i in range(3))
        self.outc = nn.Conv2d(8, 4, 1)


class Autoencoder(nn.Module):
    """A plain autoencoder of linears and batch norms."""

    def __init__(self) -> None:
        super().__init__()
        widths = (40, 32, 24, 16)
        down = [self.step(a, b) for a, b in itertools.pairwise(widths)]
        up = [self.step(b, a) for a, b in reversed(list(itertools.pairwise(widths)))]
        self.encoder, self.decoder = nn.ModuleList(down), nn.ModuleList(up)
        self.mean, self.logvar = nn.Linear(16, 12), nn.Linear(16, 12)
        self.latent = nn.Linear(12, 16)

    @staticmethod
    def step(into: int, out: int) -> nn.Module:
        return nn.ModuleDict({"linear": nn.Linear(into, out), "norm": nn.BatchNorm1d(out)})


@functools.cache
def models() -> dict[str, Build]:
    """Every base model by its name; what it is made of is only built when it is called."""
    return {**_convolutional(), **_vision(), **_language(), **_mixed(), **_own()}


def _convolutional() -> dict[str, Build]:
    return {
        "resnet18": torchvision("resnet18", 8),
        "resnet34": torchvision("resnet34", 16),
        "resnet50": torchvision("resnet50", 16),
        "resnext50": torchvision("resnext50_32x4d", 16),
        "vgg11_bn": torchvision("vgg11_bn", 32),
        "densenet": timm("densenet121", 4, block_config=(2, 3, 3, 2), num_classes=20),
        "mobilenet_v2": torchvision("mobilenet_v2", 4),
        "mobilenet_v3": torchvision("mobilenet_v3_small", 4),
        "efficientnet_tv": torchvision("efficientnet_b0", 4),
        "efficientnet_timm": timm("efficientnet_b0", 4, num_classes=20),
        "regnet": timm("regnety_002", 4, num_classes=20),
        "convnext_tv": torchvision("convnext_tiny", 16),
        "convnext_timm": timm("convnext_tiny", dims=(8, 16, 24, 32), depths=(1, 2, 3, 1), num_classes=20),
        "googlenet": torchvision("googlenet", 8, aux_logits=False, init_weights=False),
        "squeezenet": torchvision("squeezenet1_1", 4),
        "resnet_timm": timm("resnet26d", 16, num_classes=20),
        "resnet_hf": transformers(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[16, 24, 32],
            depths=[2, 2, 1],
        ),
    }


def _vision() -> dict[str, Build]:
    return {
        "vit_timm": timm("vit_tiny_patch16_224", num_heads=4, **PATCHES),
        "deit_distilled": timm("deit_tiny_distilled_patch16_224", num_heads=4, **PATCHES),
        "beit": timm("beit_base_patch16_224", num_heads=4, **PATCHES),
        "cait": timm("cait_xxs24_224", num_heads=4, **PATCHES),
        "mixer": timm("mixer_s16_224", 16, img_size=64, num_classes=20),
        "swin_timm": timm(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 2, 2), num_heads=(2, 4, 4),
            num_classes=20,
        ),
        "swin_tv": torchvision("swin_t", 8),
        "vit_tv": torchvision("vit_b_16", 16),
        "vit_hf": transformers("ViTForImageClassification", "ViTConfig", intermediate_size=96, **VISION),
        "dinov2": transformers("Dinov2Model", "Dinov2Config", mlp_ratio=2, **VISION),
        "segformer": transformers(
            "SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1],
            num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=24,
        ),
        "detr": transformers(
            "DetrForObjectDetection", "DetrConfig", d_model=32, encoder_layers=2, decoder_layers=2, num_queries=10,
            encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
            use_timm_backbone=True, backbone="resnet10t", use_pretrained_backbone=False, backbone_config=None, by=8,
        ),
    }  # fmt: skip


def _language() -> dict[str, Build]:
    t5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    bart = {
        "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    }  # fmt: skip
    gpt2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99, "n_positions": 40}
    return {
        "bert": transformers("BertModel", "BertConfig", **ENCODER),
        "bert_mlm": transformers("BertForMaskedLM", "BertConfig", **ENCODER),
        "roberta": transformers("RobertaForSequenceClassification", "RobertaConfig", **ENCODER),
        "electra": transformers("ElectraModel", "ElectraConfig", embedding_size=24, **ENCODER),
        "distilbert": transformers(
            "DistilBertModel", "DistilBertConfig", vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=64
        ),
        "gpt2": transformers("GPT2LMHeadModel", "GPT2Config", **gpt2),
        "llama": transformers("LlamaForCausalLM", "LlamaConfig", **GATED),
        "mistral": transformers("MistralForCausalLM", "MistralConfig", **GATED),
        "qwen2": transformers("Qwen2ForCausalLM", "Qwen2Config", **GATED),
        "phi3": transformers("Phi3ForCausalLM", "Phi3Config", pad_token_id=0, **GATED),
        "mixtral": transformers("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **GATED),
        "t5": transformers("T5ForConditionalGeneration", "T5Config", **t5),
        "bart": transformers("BartForConditionalGeneration", "BartConfig", **bart),
        "opt": transformers(
            "OPTForCausalLM", "OPTConfig", ffn_dim=64, max_position_embeddings=40, word_embed_proj_dim=32, **LLM
        ),
        "bloom": transformers("BloomForCausalLM", "BloomConfig", vocab_size=99, hidden_size=32, n_layer=3, n_head=4),
        "gpt_neox": transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", **ENCODER),
        "falcon": transformers("FalconForCausalLM", "FalconConfig", **LLM),
    }


def _mixed() -> dict[str, Build]:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 99, "max_position_embeddings": 20}
    image = {**tower, "hidden_size": 40, "image_size": 32, "patch_size": 8}
    audio = {
        "conv_dim": [16, 16, 16],
        "conv_kernel": [10, 3, 3],
        "conv_stride": [5, 2, 2],
        "num_conv_pos_embeddings": 16,
    }
    return {
        "clip": transformers("CLIPModel", "CLIPConfig", text_config=text, vision_config=image, projection_dim=24),
        "clip_twins": transformers(
            "CLIPModel", "CLIPConfig", text_config=text, vision_config={**image, "hidden_size": 32}, projection_dim=24
        ),
        "whisper": transformers(
            "WhisperForConditionalGeneration", "WhisperConfig", d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            vocab_size=99, num_mel_bins=16, max_source_positions=30, max_target_positions=20,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        "wav2vec2": transformers(
            "Wav2Vec2ForCTC", "Wav2Vec2Config", **tower, **audio, vocab_size=30, num_conv_pos_embedding_groups=4
        ),
    }  # fmt: skip


def _own() -> dict[str, Build]:
    return {
        "tagger": Tagger,
        "translator": Translator,
        "vocoder": Vocoder,
        "unet": UNet,
        "autoencoder": Autoencoder,
    }


@dataclass(frozen=True)
class Base:
    """A base model: the module, what each key of its state dict is, and which keys are one parameter.

    A role is linear, conv, norm, embedding, parameter (of no such module), stat (running statistics), or buffer, which
    the model makes anew by itself.
    """

    model: nn.Module
    roles: dict[str, str]
    ties: tuple[tuple[str, ...], ...]


@functools.cache
def base(name: str) -> Base:
    """The base model of that name, built once in this process."""
    torch.manual_seed(0)
    model = models()[name]().eval()
    state = model.state_dict(keep_vars=True)
    owners = dict(model.named_modules(remove_duplicate=False))
    together: dict[int, list[str]] = {}
    for key, tensor in state.items():
        together.setdefault(id(tensor), []).append(key)
    roles = {key: _role(key, tensor, owners.get(key.rpartition(".")[0])) for key, tensor in state.items()}
    return Base(model, roles, tuple(tuple(keys) for keys in together.values() if len(keys) > 1))


def _role(key: str, tensor: Tensor, owner: nn.Module | None) -> str:
    kind = type(owner).__name__
    if not isinstance(tensor, nn.Parameter) and not ("Norm" in kind and key.endswith(("weight", "bias"))):
        return "stat" if key.endswith(("running_mean", "running_var")) else "buffer"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if (isinstance(owner, nn.Linear) or kind in ("Conv1D", "MultiheadAttention")) and tensor.dim() == 2:
        return "linear"
    if "Norm" in kind:  # also one that is frozen, whose weight and bias are buffers
        return "norm"
    return "conv" if "Conv" in kind and tensor.dim() > 2 else "parameter"


def values(name: str, seed: int) -> dict[str, Tensor]:
    """A state dict of random values: no two parameters have one of them in common, and norms look like norms."""
    found = base(name)
    made: dict[str, Tensor] = {}
    for key, old in found.model.state_dict().items():
        random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
        made[key] = _value(key, found.roles[key], old, random)
    for first, *others in found.ties:
        made.update(dict.fromkeys(others, made[first]))
    return made


def _value(key: str, role: str, old: Tensor, random: torch.Generator) -> Tensor:
    if role == "buffer":
        return old.detach().clone()
    drawn = torch.randn(old.shape, generator=random)
    if role == "norm" and key.endswith("weight"):
        return 1 + drawn / 8
    return drawn.abs() + 0.1 if key.endswith("running_var") else drawn / 8

"""Pairs of vision models."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision.models as tv
import transformers as T  # noqa: N812
from align_pairs import QKV, Pair, State, by_calls, changing, joining, ordered, renaming, steps
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

VIT: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT |= {"image_size": 32, "patch_size": 8, "num_labels": 7, "layer_norm_eps": 1e-6}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}


def image(size: int = 32, count: int = 2) -> Any:
    return lambda: (torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5)),)


def timm_vit(name: str = "vit_tiny_patch16_224", **how: Any) -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    return timm.create_model(name, **size | {"num_classes": 7} | how)


def logits(model: nn.Module, x: Tensor) -> Any:
    return model(x).logits


def features(model: Any, x: Tensor) -> Any:
    return model.forward_features(x)


def hidden(model: Any, x: Tensor) -> Any:
    return model(x).last_hidden_state


# -- transformers ------------------------------------------------------------------------------


def beit() -> nn.Module:
    return T.BeitForImageClassification(
        T.BeitConfig(**VIT, layer_scale_init_value=0.1, use_relative_position_bias=True)
    )


BEIT = steps(
    joining("qkv", "q_proj", "k_proj", "v_proj"),
    renaming(
        (r"^beit\.embeddings\.", ""), (r"patch_embeddings\.projection", "patch_embed.proj"), (r"^beit\.layers", "blocks"),
        (r"lambda_(\d)", r"gamma_\1"), (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
        (r"attention\.o_proj", "attn.proj"), (r"attention\.qkv", "attn.qkv"), (r"attention\.(q|v)_proj\.bias", r"attn.\1_bias"),
        (r"relative_position_bias\.rel", "attn.rel"), (r"^beit\.pooler\.layernorm", "fc_norm"), (r"^classifier", "head"),
    ),
    ordered("gamma_1", "gamma_2", "norm1", "attn", "norm2", "mlp", "q_bias", "v_bias", "relative_position_bias_table",
            "relative_position_index", "qkv", "proj"),
)  # fmt: skip


def dinov2(swiglu: bool = False, registers: bool = False) -> nn.Module:
    if registers:
        return T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO))
    return T.Dinov2Model(T.Dinov2Config(**DINO, use_swiglu_ffn=swiglu))


FACEBOOK_DINO = steps(
    QKV,
    renaming(
        (r"^embeddings\.", ""), (r"patch_embeddings\.projection", "patch_embed.proj"), (r"position_embeddings", "pos_embed"),
        (r"^encoder\.layer", "blocks"), (r"attention\.qkv", "attn.qkv"), (r"attention\.o_proj", "attn.proj"),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"), (r"^layernorm", "norm"),
    ),
    ordered("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed", "blocks", "norm"),
)  # fmt: skip
SWIGLU = steps(joining("w12", "gate_proj", "up_proj"), renaming((r"mlp\.down_proj", "mlp.w3")), FACEBOOK_DINO)
GAMMAS = steps(
    renaming((r"ls(\d)\.gamma", r"gamma_\1")), ordered("gamma_1", "gamma_2", "norm1", "attn", "norm2", "mlp"),
)  # fmt: skip
MMPRETRAIN_VIT = renaming(
    (r"^", "backbone."), (r"patch_embed\.proj", "patch_embed.projection"), (r"blocks", "layers"), (r"norm(\d)", r"ln\1"),
    (r"backbone\.norm", "backbone.ln1"), (r"mlp\.fc1", "ffn.layers.0.0"), (r"mlp\.fc2", "ffn.layers.1"),
    (r"backbone\.head", "head.layers.head"),
)  # fmt: skip
JAX_VIT = steps(
    changing(r"(fc1|fc2|qkv|attn\.proj|head)\.weight", lambda w: w.T.contiguous()),
    changing(r"patch_embed\.proj\.weight", lambda w: w.permute(2, 3, 1, 0).contiguous()),
)


def jax_vit(found: State) -> State:
    """Flax: kernels of (in, heads, size) and (heads, size, out)."""
    made = {}
    for key, value in found.items():
        key = key.replace("blocks.", "Transformer.encoderblock_")
        for old, new in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2"), ("mlp.fc1", "MlpBlock_3.Dense_0"),
                         ("mlp.fc2", "MlpBlock_3.Dense_1"), ("patch_embed.proj", "embedding"),
                         ("pos_embed", "Transformer.posembed_input.pos_embedding"), ("cls_token", "cls"),
                         ("attn.proj", "MultiHeadDotProductAttention_1.out")):  # fmt: skip
            key = key.replace(old, new)
        key = "Transformer.encoder_norm." + key.removeprefix("norm.") if key.startswith("norm.") else key
        if "qkv" in key:
            for part, name in zip(value.chunk(3), ("query", "key", "value"), strict=True):
                new = key.replace("attn.qkv", f"MultiHeadDotProductAttention_1.{name}")
                shaped = part.T.reshape(24, 2, 12) if value.dim() == 2 else part.reshape(2, 12)
                made[new.replace("weight", "kernel")] = shaped.contiguous()
            continue
        if "LayerNorm" in key or "encoder_norm" in key:
            key = key.replace("weight", "scale")
        elif key.endswith("weight"):
            value = value.permute(2, 3, 1, 0).contiguous() if value.dim() == 4 else value.T.contiguous()
            value = value.reshape(2, 12, 24) if ".out." in key else value
            key = key.replace("weight", "kernel")
        made[key] = value
    return made


def keras_vit(found: State) -> State:
    """Kernels for weights, inputs first."""
    made = {}
    for key, value in found.items():
        if key.endswith("weight") and value.dim() > 1:
            made[key.replace("weight", "kernel")] = (
                value.permute(2, 3, 1, 0) if value.dim() == 4 else value.T
            ).contiguous()
        elif key.endswith("weight"):
            made[key.replace("weight", "gamma")] = value
        else:
            made[key.replace("bias", "beta") if "norm" in key else key] = value
    return made


def mixer() -> nn.Module:
    return MlpMixer(num_classes=7, img_size=32, patch_size=8, num_blocks=2, embed_dim=24)


def jax_mixer(found: State) -> State:
    rules = renaming(
        (r"^stem\.proj", "stem"), (r"blocks\.(\d)", r"MixerBlock_\1"), (r"norm1", "LayerNorm_0"), (r"norm2", "LayerNorm_1"),
        (r"mlp_tokens\.fc1", "token_mixing.Dense_0"), (r"mlp_tokens\.fc2", "token_mixing.Dense_1"),
        (r"mlp_channels\.fc1", "channel_mixing.Dense_0"), (r"mlp_channels\.fc2", "channel_mixing.Dense_1"),
        (r"^norm\.", "pre_head_layer_norm."), (r"(LayerNorm_\d|layer_norm)\.weight", r"\1.scale"), (r"weight$", "kernel"),
    )(found)  # fmt: skip
    return {
        key: (v.permute(2, 3, 1, 0) if v.dim() == 4 else v.T).contiguous() if key.endswith("kernel") else v
        for key, v in rules.items()
    }


def segformer() -> nn.Module:
    return T.SegformerForSemanticSegmentation(
        T.SegformerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 2, 4],
                          decoder_hidden_size=12, num_labels=5)
    )  # fmt: skip


def up(match: Any) -> str:
    return str(int(match) + 1)


NVLABS = steps(
    joining("kv", "k_proj", "v_proj"),
    renaming(
        (r"^segformer\.stages\.(\d)\.patch_embeddings\.proj", lambda m: f"backbone.patch_embed{up(m[1])}.proj"),
        (r"^segformer\.stages\.(\d)\.patch_embeddings\.layer_norm", lambda m: f"backbone.patch_embed{up(m[1])}.norm"),
        (r"^segformer\.stages\.(\d)\.blocks\.", lambda m: f"backbone.block{up(m[1])}."),
        (r"^segformer\.stages\.(\d)\.layer_norm", lambda m: f"backbone.norm{up(m[1])}"),
        (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"), (r"attention\.q_proj", "attn.q"),
        (r"attention\.kv", "attn.kv"), (r"attention\.o_proj", "attn.proj"),
        (r"attention\.sequence_reduction\.sequence_reduction", "attn.sr"),
        (r"attention\.sequence_reduction\.layer_norm", "attn.norm"),
        (r"linear_projections\.(\d)", lambda m: f"linear_c{up(m[1])}"), (r"linear_fuse\.", "linear_fuse.conv."),
        (r"batch_norm", "linear_fuse.bn"), (r"classifier", "linear_pred"),
    ),
    ordered("patch_embed1", "patch_embed2", "patch_embed3", "patch_embed4", "block1", "norm1", "block2", "norm2", "block3",
            "norm3", "block4", "norm4"),
)  # fmt: skip
SEGFORMER_EXTRA = {"decode_head.conv_seg.weight": (5, 12, 1, 1), "decode_head.conv_seg.bias": (5,)}


def pvt() -> nn.Module:
    size = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
    return T.PvtForImageClassification(T.PvtConfig(image_size=64, num_labels=5, **size))


WHAI = steps(
    joining("kv", "key", "value"),
    renaming(
        (r"^pvt\.encoder\.patch_embeddings\.(\d)\.position_embeddings", lambda m: f"pos_embed{up(m[1])}"),
        (r"^pvt\.encoder\.patch_embeddings\.(\d)\.cls_token", "cls_token"),
        (r"^pvt\.encoder\.patch_embeddings\.(\d)\.projection", lambda m: f"patch_embed{up(m[1])}.proj"),
        (r"^pvt\.encoder\.patch_embeddings\.(\d)\.layer_norm", lambda m: f"patch_embed{up(m[1])}.norm"),
        (r"^pvt\.encoder\.block\.(\d)\.", lambda m: f"block{up(m[1])}."), (r"layer_norm_(\d)", r"norm\1"),
        (r"attention\.self\.query", "attn.q"), (r"attention\.self\.kv", "attn.kv"), (r"attention\.output\.dense", "attn.proj"),
        (r"attention\.self\.sequence_reduction", "attn.sr"), (r"attention\.self\.layer_norm", "attn.norm"),
        (r"mlp\.dense(\d)", r"mlp.fc\1"), (r"^pvt\.encoder\.layer_norm", "norm"), (r"^classifier", "head"),
    ),
    ordered("pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4", "cls_token", "patch_embed1", "block1", "patch_embed2", "block2", "patch_embed3",
            "block3", "patch_embed4", "block4", "norm", "head"),
)  # fmt: skip
CNX = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 2, 1], "num_labels": 5}
FACEBOOK_CONVNEXT = steps(
    renaming(
        (r"^convnext\.embeddings\.patch_embeddings", "downsample_layers.0.0"),
        (r"^convnext\.embeddings\.layernorm", "downsample_layers.0.1"),
        (r"^convnext\.encoder\.stages\.(\d)\.downsampling_layer", r"downsample_layers.\1"),
        (r"^convnext\.encoder\.stages\.(\d)\.layers", r"stages.\1"), (r"layer_scale_parameter", "gamma"),
        (r"(\d)\.layernorm", r"\1.norm"), (r"^convnext\.layernorm", "norm"), (r"^classifier", "head"),
    ),
    ordered("downsample_layers", "stages", "norm", "head"),
)  # fmt: skip


def detr() -> nn.Module:
    size = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    size |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5, "num_labels": 4}
    layers = {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_type": "bottleneck"}
    backbone = T.ResNetConfig(**layers, out_features=["stage2"])
    return T.DetrForObjectDetection(T.DetrConfig(use_timm_backbone=False, backbone_config=backbone, **size))


FACEBOOK_DETR = steps(
    joining("in_proj", "q_proj", "k_proj", "v_proj"),
    renaming(
        (r"in_proj\.", "in_proj_"), (r"encoder_attn\.", "multihead_attn."), (r"attn\.o_proj", "attn.out_proj"),
        (r"self_attn_layer_norm", "norm1"), (r"(\.encoder\.layers\.\d\.)final_layer_norm", r"\1norm2"),
        (r"encoder_attn_layer_norm", "norm2"), (r"final_layer_norm", "norm3"), (r"mlp\.fc(\d)", r"linear\1"),
        (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
        (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
        (r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers", lambda m: f"backbone.0.body.layer{up(m[1])}"),
        (r"shortcut\.convolution", "downsample.0"), (r"shortcut\.normalization", "downsample.1"),
        (r"layer\.(\d)\.convolution", lambda m: f"conv{up(m[1])}"), (r"layer\.(\d)\.normalization", lambda m: f"bn{up(m[1])}"),
        (r"^model\.query_position_embeddings", "query_embed"), (r"^model\.input_projection", "input_proj"),
        (r"^model\.decoder\.layernorm", "transformer.decoder.norm"), (r"^model\.(en|de)coder", r"transformer.\1coder"),
        (r"^class_labels_classifier", "class_embed"), (r"^bbox_predictor", "bbox_embed"),
    ),
    ordered("transformer", "class_embed", "bbox_embed", "query_embed", "input_proj", "backbone", "self_attn", "multihead_attn",
            "linear1", "linear2", "norm1", "norm2", "norm3", "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample"),
)  # fmt: skip


# -- convolutional networks --------------------------------------------------------------------


def resnet() -> nn.Module:
    return ResNet(Bottleneck, [1, 2, 1, 1], num_classes=7)


def frozen() -> nn.Module:
    return ResNet(Bottleneck, [1, 2, 1, 1], num_classes=7, norm_layer=FrozenBatchNorm2d)


def untracked(found: State) -> State:
    return {key: value for key, value in found.items() if not key.endswith("num_batches_tracked")}


DETECTRON = steps(
    untracked,
    renaming(
        (r"^conv1", "stem.conv1"), (r"^bn1", "stem.conv1.norm"), (r"layer(\d)", lambda m: f"res{up(m[1])}"),
        (r"\.bn(\d)", r".conv\1.norm"), (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"),
        (r"^fc", "linear"), (r"^(?=stem|res|linear)", "backbone.bottom_up."),
    ),
    ordered("shortcut", "conv1", "conv2", "conv3"),
)  # fmt: skip
CAFFE2 = steps(
    DETECTRON,
    renaming(
        (r"^backbone\.bottom_up\.(stem\.)?", ""), (r"shortcut\.norm\.", "branch1_bn_"), (r"shortcut\.", "branch1_"),
        (r"^(res.*)conv(\d)\.norm\.", lambda m: f"{m[1]}branch2{'abc'[int(m[2]) - 1]}_bn_"),
        (r"^(res.*)conv(\d)\.", lambda m: f"{m[1]}branch2{'abc'[int(m[2]) - 1]}_"),
        (r"^conv1\.norm\.", "conv1_bn_"), (r"bn_weight", "bn_s"), (r"bn_bias", "bn_b"), (r"running_mean", "rm"),
        (r"running_var", "riv"), (r"weight$", "w"), (r"bias$", "b"), (r"\.", "_"),
    ),
)  # fmt: skip
MMDET = steps(
    renaming((r"^(?!fc)", "backbone."), (r"^fc", "head.fc")), ordered("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample"),
)  # fmt: skip


def timm_resnet() -> nn.Module:
    return timm.create_model("resnet50", layers=(1, 2, 1, 1), num_classes=7)


def retina() -> nn.Module:
    return tv.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).backbone.fpn


MM_FPN = renaming(
    (r"inner_blocks\.(\d)\.0", r"neck.lateral_convs.\1.conv"),
    (r"layer_blocks\.(\d)\.0", r"neck.fpn_convs.\1.conv"),
    (r"extra_blocks\.p6", "neck.fpn_convs.3.conv"),
    (r"extra_blocks\.p7", "neck.fpn_convs.4.conv"),
)


def regnet() -> nn.Module:
    return tv.RegNet(
        tv.regnet.BlockParams([1, 2, 1, 1], [16, 24, 32, 48], [8, 8, 8, 8], [1.0] * 4, [2] * 4, 0.25), 7, 8
    )


def hf_regnet() -> nn.Module:
    size = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 1, 1], "groups_width": 8}
    return T.RegNetForImageClassification(T.RegNetConfig(**size, layer_type="y", num_labels=7))


REGNET_BLOCK = (
    r"^trunk_output\.block(\d)\.block\d-(\d)\.",
    lambda m: f"regnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
)
HF_REGNET = renaming(
    (r"^stem\.0", "regnet.embedder.embedder.convolution"), (r"^stem\.1", "regnet.embedder.embedder.normalization"),
    (r"\.proj\.0", ".shortcut.convolution"), (r"\.proj\.1", ".shortcut.normalization"),
    (r"\.f\.se\.fc1", ".layer.2.attention.0"), (r"\.f\.se\.fc2", ".layer.2.attention.2"),
    (r"\.f\.(a|b|c)\.0", lambda m: f".layer.{'ab.c'.index(m[1])}.convolution"),
    (r"\.f\.(a|b|c)\.1", lambda m: f".layer.{'ab.c'.index(m[1])}.normalization"),
    REGNET_BLOCK, (r"^fc", "classifier.1"),
)  # fmt: skip
TIMM_REGNET = steps(
    renaming(
        (r"^stem\.0", "stem.conv"), (r"^stem\.1", "stem.bn"), (r"\.proj\.0", ".downsample.conv"),
        (r"\.proj\.1", ".downsample.bn"), (r"\.f\.se\.", ".se."),
        (r"\.f\.(a|b|c)\.0", lambda m: f".conv{'abc'.index(m[1]) + 1}.conv"),
        (r"\.f\.(a|b|c)\.1", lambda m: f".conv{'abc'.index(m[1]) + 1}.bn"),
        (r"^trunk_output\.block(\d)\.block\d-(\d)\.", lambda m: f"s{m[1]}.b{int(m[2]) + 1}."), (r"^fc", "head.fc"),
    ),
    ordered("conv1", "conv2", "se", "conv3", "downsample"),
)  # fmt: skip


def inception() -> nn.Module:
    return tv.inception_v3(weights=None, aux_logits=False, num_classes=7, init_weights=False)


def called(name: str, make: Any, other: Any, size: int = 64, run: Any = None) -> Pair:
    runs = (lambda m, x: m(x), run or (lambda m, x: m(x)))
    return Pair(name, make, by_calls(make, other, image(size)), other, image(size), runs)


def old_vae(found: State) -> State:
    """diffusers before 0.17; CompVis has convolutions for linear layers."""
    return renaming(
        (r"to_q", "query"), (r"to_k", "key"), (r"to_v", "value"), (r"to_out\.0", "proj_attn"),
    )(found)  # fmt: skip


COMPVIS_VAE = steps(
    changing(r"to_(q|k|v|out\.0)\.weight", lambda w: w[:, :, None, None]),
    renaming(
        (r"to_q", "q"), (r"to_k", "k"), (r"to_v", "v"), (r"to_out\.0", "proj_out"), (r"group_norm", "norm"),
        (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"), (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"), (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ),
    ordered("conv_in", "down", "mid", "norm_out", "conv_out", "block_1", "attn_1", "block_2"),
)  # fmt: skip


class Residual(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, into), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        if into != out:
            self.conv_shortcut = nn.Conv2d(into, out, 1)


class SpatialAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(4, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout()])


class Encoder(nn.Module):
    """The encoder of diffusers' AutoencoderKL."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for into, out, last in ((8, 8, False), (8, 16, False), (16, 16, True)):
            block = nn.Module()
            block.resnets = nn.ModuleList([Residual(into, out), Residual(out, out)])
            if not last:
                block.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(out, out, 3, stride=2)})])
            self.down_blocks.append(block)
        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList([SpatialAttention(16)])
        self.mid_block.resnets = nn.ModuleList([Residual(16, 16), Residual(16, 16)])
        self.conv_norm_out, self.conv_out = nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 3, padding=1)


PAIRS = [
    Pair("beit: timm", beit, BEIT, lambda: timm_vit("beit_base_patch16_224"), image(), (logits, lambda m, x: m(x))),
    Pair("dinov2: facebook", dinov2, FACEBOOK_DINO),
    Pair("dinov2: timm", dinov2, steps(FACEBOOK_DINO, renaming(drop="mask_token")),
         lambda: timm_vit("vit_small_patch14_dinov2", num_classes=0), image(), (hidden, features)),
    Pair("dinov2 with registers: facebook", lambda: dinov2(registers=True), FACEBOOK_DINO),
    Pair("dinov2 giant: facebook", lambda: dinov2(swiglu=True), SWIGLU),
    Pair("deit-3: facebook", lambda: timm_vit("deit3_small_patch16_224"), GAMMAS),
    Pair("vit: mmpretrain", timm_vit, MMPRETRAIN_VIT),
    Pair("vit: flax", timm_vit, jax_vit),
    Pair("vit: keras", timm_vit, keras_vit),
    Pair("mixer: flax", mixer, jax_mixer),
    Pair("segformer: nvlabs", segformer, NVLABS, extra=SEGFORMER_EXTRA),
    Pair("pvt: whai362", pvt, WHAI),
    Pair("convnext: facebook", lambda: T.ConvNextForImageClassification(T.ConvNextConfig(**CNX)), FACEBOOK_CONVNEXT),
    Pair("detr: facebook", detr, FACEBOOK_DETR),
    Pair("resnet: detectron2", resnet, DETECTRON),
    Pair("frozen resnet: detectron2", frozen, DETECTRON),
    Pair("frozen resnet: caffe2", frozen, CAFFE2),
    Pair("resnet: mmpretrain", resnet, MMDET),
    Pair("resnet: timm", resnet, lambda found: found, timm_resnet, image()),
    Pair("fpn: mmdetection", retina, MM_FPN),
    called("densenet: timm", lambda: tv.DenseNet(8, (2, 3, 2), 16, num_classes=7),
           lambda: timm.models.densenet.DenseNet(8, (2, 3, 2), num_classes=7)),
    Pair("regnet: transformers", regnet, HF_REGNET, hf_regnet, image(64), (lambda m, x: m(x), logits)),
    Pair("regnet: timm", regnet, TIMM_REGNET),
    called("mobilenet v3: timm", lambda: tv.mobilenet_v3_small(num_classes=7),
           lambda: timm.create_model("mobilenetv3_small_100", num_classes=7, bn_eps=1e-3)),
    called("efficientnet v2: timm", lambda: tv.efficientnet_v2_s(num_classes=7),
           lambda: timm.create_model("efficientnetv2_s", num_classes=7, bn_eps=1e-3)),
    called("inception: timm", inception, lambda: timm.create_model("inception_v3", num_classes=7), 96),
    Pair("vae: old diffusers", Encoder, old_vae),
    Pair("vae: CompVis", Encoder, COMPVIS_VAE),
]  # fmt: skip

"""More pairs: two towers, TensorFlow's names, other repositories' names for transformers."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers as T  # noqa: N812
from align_pairs import Pair, State, changing, joining, ordered, renaming, steps
from align_pairs_text import LM, SPEECH
from align_pairs_vision import timm_vit
from torch import Tensor, nn


def clip() -> nn.Module:
    text = {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    vision = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 10, "bos_token_id": 48, "eos_token_id": 49}
    config = T.CLIPConfig(
        text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    return T.CLIPModel(config)


OPENAI_CLIP = steps(
    joining("in_proj", "q_proj", "k_proj", "v_proj"),
    renaming(
        (r"in_proj\.", "in_proj_"), (r"self_attn", "attn"), (r"layer_norm(\d)", r"ln_\1"), (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"), (r"^text_model\.encoder\.layers", "transformer.resblocks"),
        (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
        (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
        (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^text_model\.final_layer_norm", "ln_final"), (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
        (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
        (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
        (r"^vision_model\.pre_layrnorm", "visual.ln_pre"), (r"^vision_model\.post_layernorm", "visual.ln_post"),
        (r"^visual_projection\.weight", "visual.proj"), (r"^text_projection\.weight", "text_projection"),
        drop="position_ids",
    ),
    changing(r"^visual\.proj$|^text_projection$", lambda w: w.T.contiguous()),
    ordered("positional_embedding", "text_projection", "logit_scale", "visual", "class_embedding", "proj", "conv1", "ln_pre",
            "transformer", "ln_post", "token_embedding", "ln_final", "attn", "ln_1", "mlp", "ln_2"),
)  # fmt: skip


def bert() -> nn.Module:
    return T.BertModel(T.BertConfig(**LM, max_position_embeddings=20))


TF_BERT = steps(
    changing(r"(?:dense|query|key|value)\.weight$", lambda w: w.T.contiguous()),
    renaming(
        (r"(?:dense|query|key|value)\.weight$", lambda m: m[0].replace("weight", "kernel")), (r"LayerNorm\.weight", "LayerNorm.gamma"),
        (r"LayerNorm\.bias", "LayerNorm.beta"), (r"embeddings\.weight", "embeddings"), (r"layer\.(\d+)", r"layer_\1"),
        (r"^", "bert."), (r"\.", "/"),
    ),
    lambda found: dict(sorted(found.items())),
)  # fmt: skip
DISTIL = renaming(
    (r"^encoder\.layer", "transformer.layer"), (r"attention\.self\.(q|k|v)\w+", r"attention.\1_lin"),
    (r"attention\.output\.dense", "attention.out_lin"), (r"attention\.output\.LayerNorm", "sa_layer_norm"),
    (r"intermediate\.dense", "ffn.lin1"), (r"(\d)\.output\.dense", r"\1.ffn.lin2"),
    (r"(\d)\.output\.LayerNorm", r"\1.output_layer_norm"), drop="token_type|pooler",
)  # fmt: skip


def gpt2() -> nn.Module:
    return T.GPT2LMHeadModel(
        T.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=16, bos_token_id=1, eos_token_id=2)
    )


TF_GPT2 = steps(
    changing(r"(c_attn|c_proj|c_fc)\.weight", lambda w: w[None]),
    renaming(
        (r"^transformer\.", "model/"), (r"h\.(\d+)\.", r"h\1/"), (r"ln_(\w)\.weight", r"ln_\1/g"), (r"ln_(\w)\.bias", r"ln_\1/b"),
        (r"(wte|wpe)\.weight", r"\1"), (r"(c_attn|c_proj|c_fc)\.weight", r"\1/w"), (r"(c_attn|c_proj|c_fc)\.bias", r"\1/b"),
        (r"\.", "/"), drop="^lm_head",
    ),
    lambda found: dict(sorted(found.items())),
)  # fmt: skip


def opt() -> nn.Module:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 60}
    return T.OPTForCausalLM(T.OPTConfig(**size, max_position_embeddings=20, word_embed_proj_dim=32))


METASEQ = steps(
    joining("qkv_proj", "q_proj", "k_proj", "v_proj"),
    renaming((r"^model\.decoder\.final_layer_norm", "decoder.layer_norm"), (r"^model\.", ""), drop="^lm_head"),
)


def glm() -> nn.Module:
    return T.GlmForCausalLM(T.GlmConfig(**LM, num_key_value_heads=2, head_dim=8, pad_token_id=0))


CHATGLM = steps(
    joining("query_key_value", "q_proj", "k_proj", "v_proj"),
    renaming(
        (r"^model\.layers", "transformer.encoder.layers"), (r"self_attn\.query", "self_attention.query"),
        (r"self_attn\.o_proj", "self_attention.dense"), (r"mlp\.gate_up_proj", "mlp.dense_h_to_4h"),
        (r"mlp\.down_proj", "mlp.dense_4h_to_h"), (r"^model\.norm", "transformer.encoder.final_layernorm"),
        (r"^model\.embed_tokens", "transformer.embedding.word_embeddings"), (r"^lm_head", "transformer.output_layer"),
    ),
)  # fmt: skip


def llama() -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**LM, num_key_value_heads=4))


BAICHUAN = joining("W_pack", "q_proj", "k_proj", "v_proj")


def qwen() -> nn.Module:
    return T.Qwen2ForCausalLM(T.Qwen2Config(**LM, num_key_value_heads=4))


QWEN1 = steps(
    joining("c_attn", "q_proj", "k_proj", "v_proj"),
    renaming(
        (r"^model\.layers", "transformer.h"), (r"self_attn\.o_proj", "attn.c_proj"), (r"self_attn\.", "attn."),
        (r"mlp\.up_proj", "mlp.w1"), (r"mlp\.gate_proj", "mlp.w2"), (r"mlp\.down_proj", "mlp.c_proj"),
        (r"input_layernorm", "ln_1"), (r"post_attention_layernorm", "ln_2"), (r"^model\.norm", "transformer.ln_f"),
        (r"^model\.embed_tokens", "transformer.wte"),
    ),
    ordered("ln_1", "attn", "ln_2", "mlp", "w1", "w2", "c_proj"),
)  # fmt: skip


def internlm(found: State) -> State:
    """InternLM2: the queries, the key and the value of each group."""

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([part.reshape(2, -1, 8, part.shape[-1]) for part in (q, k, v)], 1).flatten(0, 2)

    return steps(
        joining("wqkv", "q_proj", "k_proj", "v_proj", by=grouped),
        renaming(
            (r"self_attn\.", "attention."), (r"o_proj", "wo"), (r"mlp\.gate_proj", "feed_forward.w1"),
            (r"mlp\.down_proj", "feed_forward.w2"), (r"mlp\.up_proj", "feed_forward.w3"), (r"embed_tokens", "tok_embeddings"),
            (r"input_layernorm", "attention_norm"), (r"post_attention_layernorm", "ffn_norm"), (r"^lm_head", "output"),
        ),
    )(found)  # fmt: skip


def grouped_llama() -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**LM, num_key_value_heads=2))


def speech() -> nn.Module:
    return T.Wav2Vec2Model(
        T.Wav2Vec2Config(**LM, **SPEECH, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    )


FAIRSEQ_LARGE = steps(
    renaming(
        (r"masked_spec_embed", "mask_emb"), (r"conv_layers\.(\d)\.conv", r"conv_layers.\1.0"),
        (r"conv_layers\.(\d)\.layer_norm", r"conv_layers.\1.2.1"), (r"^feature_projection\.projection", "post_extract_proj"),
        (r"^feature_projection\.layer_norm", "layer_norm"), (r"pos_conv_embed\.conv", "pos_conv.0"),
        (r"parametrizations\.weight\.original0", "weight_g"), (r"parametrizations\.weight\.original1", "weight_v"),
        (r"\.attention\.", ".self_attn."), (r"(encoder\.layers\.\d)\.layer_norm", r"\1.self_attn_layer_norm"),
        (r"feed_forward\.intermediate_dense", "fc1"), (r"feed_forward\.output_dense", "fc2"), (r"^", "w2v_encoder.w2v_model."),
    ),
    ordered("weight_g", "weight_v", "bias"),
)  # fmt: skip


def sam() -> nn.Module:
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    vision |= {"patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32, "num_pos_feats": 4}
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    mask = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "mlp_dim": 24,
        "num_hidden_layers": 2,
        "iou_head_hidden_dim": 12,
    }
    return T.SamModel(T.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask))


def mlps(found: State) -> State:
    """Three layers in a list where transformers has first, middle and last."""
    return renaming(
        (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.layers\.0", r"\1.layers.1"),
        (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.proj_in", r"\1.layers.0"),
        (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.proj_out", r"\1.layers.2"),
    )({key: found[key] for key in sorted(found, key=lambda key: ("proj_out" in key, 0))})


FACEBOOK_SAM = steps(
    mlps,
    renaming(
        (r"^vision_encoder", "image_encoder"), (r"patch_embed\.projection", "patch_embed.proj"),
        (r"image_encoder\.layers", "image_encoder.blocks"), (r"(blocks\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
        (r"neck\.conv1", "neck.0"), (r"neck\.layer_norm1", "neck.1"), (r"neck\.conv2", "neck.2"), (r"neck\.layer_norm2", "neck.3"),
        (r"^prompt_encoder\.shared_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        (r"point_embed\.", "point_embeddings."), (r"mask_embed\.conv1", "mask_downscaling.0"),
        (r"mask_embed\.layer_norm1", "mask_downscaling.1"), (r"mask_embed\.conv2", "mask_downscaling.3"),
        (r"mask_embed\.layer_norm2", "mask_downscaling.4"), (r"mask_embed\.conv3", "mask_downscaling.6"),
        (r"(transformer\.layers\.\d)\.layer_norm(\d)", r"\1.norm\2"), (r"layer_norm_final_attn", "norm_final_attn"),
        (r"upscale_conv1", "output_upscaling.0"), (r"upscale_layer_norm", "output_upscaling.1"),
        (r"upscale_conv2", "output_upscaling.3"), drop="^shared_image",
    ),
)  # fmt: skip


def lucid(found: State) -> State:
    """lucidrains' vit-pytorch, without its patches, which it lays out another way."""
    return steps(
        renaming(
            (r"^pos_embed", "pos_embedding"), (r"blocks\.(\d)\.norm1", r"transformer.layers.\1.0.norm"),
            (r"blocks\.(\d)\.attn\.qkv", r"transformer.layers.\1.0.to_qkv"),
            (r"blocks\.(\d)\.attn\.proj", r"transformer.layers.\1.0.to_out.0"),
            (r"blocks\.(\d)\.norm2", r"transformer.layers.\1.1.net.0"), (r"blocks\.(\d)\.mlp\.fc1", r"transformer.layers.\1.1.net.1"),
            (r"blocks\.(\d)\.mlp\.fc2", r"transformer.layers.\1.1.net.4"), (r"^norm", "transformer.norm"), (r"^head", "mlp_head"),
        ),
        lambda made: {key: v for key, v in made.items() if "patch" not in key},
    )(found)  # fmt: skip


class TimedResidual(nn.Module):
    """diffusers' ResnetBlock2D."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, into), nn.Conv2d(into, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(32, out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        if into != out:
            self.conv_shortcut = nn.Conv2d(into, out, 1)


class CrossAttention(nn.Module):
    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(other, width, bias=False), nn.Linear(other, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout()])


class SpatialTransformer(nn.Module):
    """diffusers' Transformer2DModel of one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(4, width), nn.Conv2d(width, width, 1)
        block: Any = nn.Module()
        block.norm1, block.attn1 = nn.LayerNorm(width), CrossAttention(width, width)
        block.norm2, block.attn2 = nn.LayerNorm(width), CrossAttention(width, 20)
        block.norm3, block.ff = nn.LayerNorm(width), nn.Module()
        block.ff.net = nn.ModuleList(
            [nn.ModuleDict({"proj": nn.Linear(width, 8 * width)}), nn.Dropout(), nn.Linear(4 * width, width)]
        )
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(width, width, 1)


class UNet(nn.Module):
    """The first half of diffusers' UNet2DConditionModel: two stages down, and the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(8, 32), "linear_2": nn.Linear(32, 32)})
        self.down_blocks = nn.ModuleList()
        for into, out, last in ((8, 8, False), (8, 16, True)):
            block: Any = nn.Module()
            block.attentions = nn.ModuleList([SpatialTransformer(out) for _ in range(2)])
            block.resnets = nn.ModuleList([TimedResidual(into, out), TimedResidual(out, out)])
            if not last:
                block.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(out, out, 3, stride=2)})])
            self.down_blocks.append(block)
        self.mid_block: Any = nn.Module()
        self.mid_block.attentions = nn.ModuleList([SpatialTransformer(16)])
        self.mid_block.resnets = nn.ModuleList([TimedResidual(16, 16), TimedResidual(16, 16)])


def compvis(found: State) -> State:
    """CompVis: blocks in one list, layers by their places."""
    made = {}
    for key, value in found.items():
        place = re.match(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.", key)
        if place:
            number = 1 + 3 * int(place[1]) + (2 if place[2] == "downsamplers" else int(place[3]))
            kind = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[place[2]]
            key = f"input_blocks.{number}.{kind}." + key[place.end() :].replace(
                "conv.", "" if place[2] == "downsamplers" else "conv."
            )
            key = key.replace("0.op.conv.", "0.op.")
        made[key] = value
    names = renaming(
        (r"^conv_in", "input_blocks.0.0"), (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^mid_block\.resnets\.1", "middle_block.2"),
        (r"((?<!transformer)_blocks?\.\d(?:\.0)?)\.norm1", r"\1.in_layers.0"), (r"((?<!transformer)_blocks?\.\d(?:\.0)?)\.conv1", r"\1.in_layers.2"),
        (r"time_emb_proj", "emb_layers.1"), (r"((?<!transformer)_blocks?\.\d(?:\.0)?)\.norm2", r"\1.out_layers.0"),
        (r"((?<!transformer)_blocks?\.\d(?:\.0)?)\.conv2", r"\1.out_layers.3"), (r"conv_shortcut", "skip_connection"),
        (r"^", "model.diffusion_model."),
    )(made)  # fmt: skip
    return ordered("time_embed", "input_blocks", "middle_block")(names)


PAIRS = [
    Pair("clip: OpenAI, square projections", clip, OPENAI_CLIP),
    Pair("bert: TensorFlow", bert, TF_BERT),
    Pair("bert: DistilBERT", bert, DISTIL),
    Pair("gpt2: TensorFlow", gpt2, TF_GPT2),
    Pair("opt: metaseq", opt, METASEQ),
    Pair("glm: ChatGLM", glm, CHATGLM),
    Pair("llama: Baichuan", llama, BAICHUAN),
    Pair("qwen2: Qwen", qwen, QWEN1),
    Pair("llama: InternLM2", grouped_llama, internlm),
    Pair("wav2vec2 large: fairseq", speech, FAIRSEQ_LARGE),
    Pair("sam: facebook", sam, FACEBOOK_SAM),
    Pair("vit: vit-pytorch", timm_vit, lucid),
    Pair("unet: CompVis", UNet, compvis),
]

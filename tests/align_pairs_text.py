"""Pairs of language and speech models."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T  # noqa: N812
from align_pairs import (
    Pair,
    by_heads,
    by_pairs,
    changing,
    joining,
    ordered,
    renaming,
    stacked_apart,
    steps,
)  # fmt: skip
from torch import Tensor, nn

SEQ = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 60}
SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0}
SEQ |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
LM: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
}
SPEECH = {"conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}


def whisper() -> nn.Module:
    return T.WhisperForConditionalGeneration(
        T.WhisperConfig(**SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=12)
    )


WHISPER = steps(
    renaming(
        (r"^model\.", ""), (r"\.layers\.", ".blocks."), (r"self_attn\.", "attn."), (r"encoder_attn\.", "cross_attn."),
        (r"self_attn_layer_norm", "attn_ln"), (r"encoder_attn_layer_norm", "cross_attn_ln"),
        (r"final_layer_norm", "mlp_ln"), (r"q_proj", "query"), (r"k_proj", "key"), (r"v_proj", "value"),
        (r"out_proj", "out"), (r"fc1", "mlp.0"), (r"fc2", "mlp.2"), (r"encoder\.layer_norm", "encoder.ln_post"),
        (r"decoder\.layer_norm", "decoder.ln"), (r"embed_positions\.weight", "positional_embedding"),
        (r"embed_tokens", "token_embedding"), drop="^proj_out",
    ),
    ordered("positional_embedding", "conv1", "conv2", "token_embedding", "attn", "attn_ln", "cross_attn", "cross_attn_ln",
            "mlp", "mlp_ln", "query", "key", "value", "out"),
)  # fmt: skip


def bart() -> nn.Module:
    return T.BartModel(T.BartConfig(**SEQ, max_position_embeddings=20))


FAIRSEQ_BART = renaming(drop=r"^shared")
NN_TRANSFORMER = steps(
    joining("in_proj", "q_proj", "k_proj", "v_proj"),
    renaming(
        (r"in_proj\.", "in_proj_"), (r"encoder_attn\.", "multihead_attn."), (r"self_attn_layer_norm", "norm1"),
        (r"(encoder\.layers\.\d\.)final_layer_norm", r"\1norm2"), (r"encoder_attn_layer_norm", "norm2"),
        (r"final_layer_norm", "norm3"), (r"fc(\d)", r"linear\1"),
        (r"^(en|de)coder\.embed_positions", r"\1c_pos"), (r"^shared", "embedding"), (r"layernorm_embedding", "norm_in"),
        (r"^(en|de)coder\.layers", r"transformer.\1coder.layers"), drop="embed_tokens",
    ),
)  # fmt: skip


def roberta() -> nn.Module:
    return T.RobertaForMaskedLM(T.RobertaConfig(**LM, max_position_embeddings=20))


FAIRSEQ_ROBERTA = steps(
    renaming(
        (r"^roberta\.encoder\.layer\.", "decoder.sentence_encoder.layers."),
        (r"^roberta\.embeddings\.word_embeddings", "decoder.sentence_encoder.embed_tokens"),
        (r"^roberta\.embeddings\.position_embeddings", "decoder.sentence_encoder.embed_positions"),
        (r"^roberta\.embeddings\.LayerNorm", "decoder.sentence_encoder.emb_layer_norm"),
        (r"attention\.self\.query", "self_attn.q_proj"), (r"attention\.self\.key", "self_attn.k_proj"),
        (r"attention\.self\.value", "self_attn.v_proj"), (r"attention\.output\.dense", "self_attn.out_proj"),
        (r"attention\.output\.LayerNorm", "self_attn_layer_norm"), (r"intermediate\.dense", "fc1"),
        (r"output\.dense", "fc2"), (r"output\.LayerNorm", "final_layer_norm"), (r"^lm_head\.decoder", "decoder.lm_head"),
        (r"^lm_head", "decoder.lm_head"), drop=r"token_type|lm_head\.decoder\.bias",
    ),
    ordered("k_proj", "v_proj", "q_proj", "out_proj"),
)  # fmt: skip


def t5() -> nn.Module:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    return T.T5ForConditionalGeneration(T.T5Config(**size, feed_forward_proj="gated-gelu", tie_word_embeddings=False))


T5X = steps(
    renaming(
        (r"^shared\.weight", "token_embedder.embedding"), (r"block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", r"relpos_bias.rel_embedding"),
        (r"encoder\.block\.(\d+)\.layer\.0\.layer_norm", r"encoder.layers_\1.pre_attention_layer_norm"),
        (r"encoder\.block\.(\d+)\.layer\.1\.layer_norm", r"encoder.layers_\1.pre_mlp_layer_norm"),
        (r"decoder\.block\.(\d+)\.layer\.0\.layer_norm", r"decoder.layers_\1.pre_self_attention_layer_norm"),
        (r"decoder\.block\.(\d+)\.layer\.1\.layer_norm", r"decoder.layers_\1.pre_cross_attention_layer_norm"),
        (r"decoder\.block\.(\d+)\.layer\.2\.layer_norm", r"decoder.layers_\1.pre_mlp_layer_norm"),
        (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention", r"encoder.layers_\1.attention"),
        (r"decoder\.block\.(\d+)\.layer\.0\.SelfAttention", r"decoder.layers_\1.self_attention"),
        (r"block\.(\d+)\.layer\.1\.EncDecAttention", r"layers_\1.encoder_decoder_attention"),
        (r"block\.(\d+)\.layer\.\d\.DenseReluDense", r"layers_\1.mlp"),
        (r"\.(q|k|v|o)\.weight", lambda m: {"q": ".query", "k": ".key", "v": ".value", "o": ".out"}[m[1]] + ".kernel"),
        (r"(wi_0|wi_1|wo)\.weight", r"\1.kernel"), (r"^encoder\.final_layer_norm", "encoder.encoder_norm"),
        (r"^decoder\.final_layer_norm", "decoder.decoder_norm"), (r"norm\.weight", "norm.scale"),
        (r"^lm_head\.weight", "decoder.logits_dense.kernel"), drop="embed_tokens",
    ),
    changing(r"kernel$|rel_embedding$", lambda w: w.T.contiguous()),
)  # fmt: skip


def llama(kv: int = 4) -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**LM, num_key_value_heads=kv))


META = renaming(
    (r"^model\.", ""), (r"^embed_tokens", "tok_embeddings"), (r"self_attn\.", "attention."), (r"\b(q|k|v|o)_proj", r"w\1"),
    (r"mlp\.gate_proj", "feed_forward.w1"), (r"mlp\.down_proj", "feed_forward.w2"), (r"mlp\.up_proj", "feed_forward.w3"),
    (r"input_layernorm", "attention_norm"), (r"post_attention_layernorm", "ffn_norm"), (r"^lm_head", "output"),
)  # fmt: skip
GPT_FAST = steps(
    changing("q_proj", by_pairs(4)), changing("k_proj", by_pairs(2)), META, joining("wqkv", "wq", "wk", "wv"),
)  # fmt: skip


def neox() -> nn.Module:
    return T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**LM))


def apart_by_heads(heads: int, name: str = "query_key_value") -> Any:
    def write(found: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for key, value in found.items():
            if f".{name}." in key:
                for letter, part in zip("qkv", value.unflatten(0, (heads, 3, -1)).unbind(1), strict=True):
                    made[key.replace(name, f"{letter}_proj")] = part.flatten(0, 1)
            else:
                made[key] = value
        return made

    return write


def bloom() -> nn.Module:
    return T.BloomForCausalLM(T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60))


def falcon() -> nn.Module:
    size = {key: value for key, value in LM.items() if key != "intermediate_size"}
    return T.FalconForCausalLM(T.FalconConfig(**size, multi_query=True, new_decoder_architecture=False))


def falcon_apart(found: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for key, value in found.items():
        if "query_key_value" in key:
            for letter, part in zip("qkv", value.split((32, 8, 8)), strict=True):
                made[key.replace("query_key_value", f"{letter}_proj")] = part.clone()
        else:
            made[key] = value
    return made


def megatron_bert() -> nn.Module:
    return T.MegatronBertModel(T.MegatronBertConfig(**LM, max_position_embeddings=20))


MEGATRON = steps(
    joining("query_key_value", "query", "key", "value", by=by_heads(4)),
    renaming(
        (r"^embeddings", "language_model.embedding"), (r"token_type_embeddings", "tokentype_embeddings"),
        (r"^encoder\.layer\.", "language_model.encoder.layers."), (r"^encoder\.ln", "language_model.encoder.final_layernorm"),
        (r"attention\.ln", "input_layernorm"), (r"(\d)\.ln", r"\1.post_attention_layernorm"),
        (r"attention\.self\.", "self_attention."), (r"attention\.output\.dense", "self_attention.dense"),
        (r"intermediate\.dense", "mlp.dense_h_to_4h"), (r"output\.dense", "mlp.dense_4h_to_h"),
        (r"^pooler", "language_model.pooler"),
    ),
)  # fmt: skip


def wav2vec() -> nn.Module:
    return T.Wav2Vec2Model(T.Wav2Vec2Config(**LM, **SPEECH))


def hubert() -> nn.Module:
    return T.HubertModel(T.HubertConfig(**LM, **SPEECH))


FAIRSEQ_SPEECH = steps(
    renaming(
        (r"masked_spec_embed", "mask_emb"), (r"conv_layers\.(\d)\.conv", r"conv_layers.\1.0"),
        (r"conv_layers\.(\d)\.layer_norm", r"conv_layers.\1.2"), (r"^feature_projection\.projection", "post_extract_proj"),
        (r"^feature_projection\.layer_norm", "layer_norm"), (r"pos_conv_embed\.conv", "pos_conv.0"),
        (r"parametrizations\.weight\.original0", "weight_g"), (r"parametrizations\.weight\.original1", "weight_v"),
        (r"\.attention\.", ".self_attn."), (r"(\d)\.layer_norm", r"\1.self_attn_layer_norm"),
        (r"feed_forward\.intermediate_dense", "fc1"), (r"feed_forward\.output_dense", "fc2"),
    ),
    ordered("weight_g", "weight_v", "bias", "k_proj", "v_proj", "q_proj", "out_proj"),
)  # fmt: skip
W2V_EXTRA = {"quantizer.vars": (1, 20, 8), "quantizer.weight_proj.weight": (20, 16), "quantizer.weight_proj.bias": (20,),
             "project_q.weight": (24, 24), "project_q.bias": (24,), "final_proj.weight": (24, 32), "final_proj.bias": (24,)}  # fmt: skip
HUBERT_EXTRA = {"label_embs_concat": (30, 24), "final_proj.weight": (24, 32), "final_proj.bias": (24,)}


def mamba() -> nn.Module:
    return T.MambaForCausalLM(T.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=60))


def qwen_moe() -> nn.Module:
    size = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**LM, **size, decoder_sparse_step=1))


def deepseek() -> nn.Module:
    size = {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
    }
    size |= {
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
    }
    size |= {"qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
    return T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**LM | {"num_hidden_layers": 3}, **size))


LISTED = steps(
    stacked_apart("gate_up_proj", "gate_proj.weight", "up_proj.weight"), stacked_apart("experts.down_proj", "down_proj.weight"),
    renaming((r"mlp\.(\d+)\.down", r"mlp.experts.\1.down")),
)  # fmt: skip


class Tagger(nn.Module):
    """A tagger of words; `names` are those of its parts."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Embedding(40, 12))
        setattr(self, names[1], kind(12, 10, num_layers=2, bidirectional=True, batch_first=True))
        setattr(self, names[2], nn.LayerNorm(20))
        setattr(self, names[3], nn.Linear(20, 6))

    def forward(self, x: Tensor) -> Tensor:
        embed, cell, norm, head = (getattr(self, name) for name in self.names)
        return torch.as_tensor(head(norm(cell(embed(x))[0])))


TAGGER, OTHER = ("word_embeddings", "lstm", "layer_norm", "hidden2tag"), ("embed", "rnn", "norm", "classifier")


def tagger(kind: type[nn.LSTM] | type[nn.GRU], cell: str) -> Pair:
    ours = (TAGGER[0], cell, *TAGGER[2:])
    rules = [(f"^{a}", b) for a, b in zip(ours, OTHER, strict=True)]
    return Pair(
        f"{cell} tagger", lambda: Tagger(kind, ours), renaming(*rules), lambda: Tagger(kind, OTHER),
        lambda: (torch.arange(24).reshape(2, 12),),
    )  # fmt: skip


PAIRS = [
    Pair("whisper: OpenAI", whisper, WHISPER),
    Pair("bart: fairseq", bart, FAIRSEQ_BART, extra={"encoder.version": (1,), "decoder.version": (1,)}),
    Pair("bart: torch.nn.Transformer", bart, NN_TRANSFORMER),
    Pair("roberta: fairseq", roberta, FAIRSEQ_ROBERTA),
    Pair("t5: t5x", t5, T5X),
    Pair("llama: Meta", llama, steps(changing("[qk]_proj", by_pairs(4)), META)),
    Pair("llama: gpt-fast", lambda: llama(2), GPT_FAST),
    Pair("gpt-neox: apart", neox, apart_by_heads(4)),
    Pair("bloom: apart", bloom, apart_by_heads(4)),
    Pair("bloom: no prefix", bloom, renaming((r"^transformer\.", ""), drop="^lm_head")),
    Pair("falcon: apart", falcon, falcon_apart),
    Pair("megatron-bert: Megatron-LM", megatron_bert, MEGATRON),
    Pair("wav2vec2: fairseq", wav2vec, FAIRSEQ_SPEECH, extra=W2V_EXTRA),
    Pair("hubert: fairseq", hubert, FAIRSEQ_SPEECH, extra=HUBERT_EXTRA),
    Pair("mamba: state-spaces", mamba, renaming((r"embeddings", "embedding"), drop="^lm_head")),
    Pair("qwen3-moe: listed", qwen_moe, LISTED),
    Pair("deepseek-v3: listed", deepseek, LISTED),
    tagger(nn.LSTM, "lstm"),
    tagger(nn.GRU, "gru"),
]

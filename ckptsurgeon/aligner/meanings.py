"""What a whole name stands for in its block: queries, the first layer of an MLP, the norm before attention.

The conventions are those of torchvision, timm, transformers, fairseq, Megatron, GPT-2 and Meta's Llama.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ckptsurgeon.aligner.vocabulary import said, spelt, words

_FUSED = {
    "qkv": said("qkv in_proj c_attn wqkv qkv_proj to_qkv qkv_linear attn_qkv mixed_qkv w_pack qkv_lin"),
    "kv": said("kv kv_proj to_kv wkv c_kv kv_linear key_value"),
    "qkv by heads": said("query_key_value"),
}
"""Joined projections by the last word of their name.

`qkv` (timm, Swin, DINOv2), `in_proj` (torch.nn.MultiheadAttention), `c_attn` (GPT-2), `Wqkv` (MPT), `qkv_proj` (vLLM,
Phi-3) are all queries, all keys, all values; `query_key_value` (Megatron, GPT-NeoX, BLOOM, Falcon) is so by head."""
_GATED = ("gate_up_proj", "gate_up", "w13", "gate_and_up", "wi_fused", "w12")
_HEADS = said("""
    fc head classifier classification_head score lm_head output output_projection embed_out logits last_linear
    cls_classifier output_layer logits_dense""")
_VOCABULARIES = said("lm_head output_projection embed_out logits logits_dense")
_TOKENS = said("""
    embed_tokens wte word_embeddings tok_embeddings token_embedding token_embeddings embed_in shared word_embedding
    tok_emb tok_embed embed_token token_embedder""")
_POSITIONS = said("""
    wpe position_embeddings embed_positions pos_embed pos_embedding positional_embedding position_embedding pos_emb
    position_embed positions""")
_OUT = said("o_proj out_proj wo to_out out_lin o output_proj c_proj proj dense linear_out projection out attn_out")
_UP = said("fc1 c_fc lin1 linear1 w_1 up fc_in dense_h_to_4h wi linear_1 fc_1 intermediate_dense layer1 dense1")
_DOWN = said("fc2 c_proj lin2 linear2 w_2 fc_out dense_4h_to_h down_proj linear_2 fc_2 down output_dense dense2 proj")
_GATE, _UP3 = "gate_proj", "up_proj"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name stands for in its block: `what` is one of a few roles; `order` ranks norms among each other."""

    what: str = ""
    order: int | None = None


def meaning(path: str, beside: Collection[str], is_norm: bool) -> Meaning:
    """The role of the unit at `path` of a block, with `beside` the last segments of its siblings."""
    segments = [spelt(segment) for segment in path.split(".")]
    named = [segment for segment in segments if not segment.isdigit()]
    if not named:
        return Meaning()
    last, before = named[-1], ".".join(named[:-1])
    inner = set(words(path[: -len(path.rpartition(".")[2])] if "." in path else ""))
    if is_norm:
        return Meaning("", _norm_order(".".join(segments), set(words(path))))
    projection = _of_attention(last, inner)
    if projection:
        return Meaning(projection + _which(inner, before))
    for names, what in ((_TOKENS, "token embedding"), (_POSITIONS, "positions")):
        if last in names or (last == "embedding" and named[-2:-1] and named[-2] in names):
            return Meaning(what)
    if (last in _HEADS and len(named) <= 2 and inner <= {"head", "cls"}) or last in _VOCABULARIES:
        return Meaning("head")
    return Meaning(_of_mlp(last, before, inner, beside))


def _of_attention(last: str, inner: Collection[str]) -> str:
    """Which projection it is: joined ones, queries, keys, values, or that of the outputs; "" for none."""
    is_inside = "attn" in inner or "cross" in inner
    for what, joined in _FUSED.items():
        if last in joined and (last != "in_proj" or is_inside):
            return what
    if last in _GATED:
        return "gate and up"
    told = set(words(last)) - {"proj", "linear", "attn", "to", "layer"}
    if len(told) == 1 and told <= {"q", "k", "v"}:
        return told.pop()
    return "attention out" if is_inside and last in _OUT else ""


def is_head(key: str) -> bool:
    """Whether a key is of the last layer of a network."""
    path = key.rpartition(".")[0]
    return spelt(path.rpartition(".")[2]) in _HEADS


def _which(inner: Iterable[str], before: str) -> str:
    """Cross attention is another than self attention."""
    across = "cross" in set(inner) or re.search(
        r"encoder_attn|enc_dec|multihead_attn|src_attn|context_attn|attn2", before
    )
    return " across" if across else ""


def _of_mlp(last: str, before: str, inner: set[str], beside: Collection[str]) -> str:
    gated = "w3" in beside
    if last == "w3" and "w12" in beside:
        return "mlp down"
    if last in ("w1", "w2", "w3"):
        return {"w1": "gate" if gated else "mlp up", "w2": "mlp down", "w3": "mlp up"}[last]
    if last in ("wi_0", _GATE):
        return "gate"
    if last in ("wi_1", _UP3):
        return "mlp up"
    if last == "dense" and before.endswith("intermediate"):
        return "mlp up"
    if last == "dense" and before.endswith("output"):
        return "mlp down"
    is_mlp = "mlp" in inner or "relu_dense" in before or not inner
    if last in _UP and (is_mlp or last not in ("layer1", "dense1", "up")):
        return "mlp up" if last != "fc1" or "se" not in before.split(".") else ""
    if last in _DOWN and (is_mlp or last in ("fc2", "lin2", "linear2", "down_proj")) and last not in ("proj", "down"):
        return "mlp down" if last != "fc2" or "se" not in before.split(".") else ""
    return "mlp down" if last == "wo" and is_mlp and inner else ""


def _norm_order(path: str, meant: set[str]) -> int | None:
    """Where a norm stands among those of its block: that of self attention, of cross attention, of the MLP."""
    if "down" in meant or "q" in meant or "k" in meant:
        return None
    if re.search(r"final_?layer_?norm|ffn|mlp|ff_|feed_?forward|ln_2$|^output\.|output_layer_?norm|output_norm", path):
        return 35 if "post" in path else 30
    if re.search(r"post_attention|post_attn|_after|after_", path):
        return 15
    if re.search(r"cross|encoder_attn|enc_dec|multihead_attn", path):
        return 20
    if re.search(r"attn|attention|input|before|(?:^|[._])sa_", path):
        return 10
    numbers = re.findall(r"\d+", path)
    return 10 * int(numbers[0]) if len(numbers) == 1 else None

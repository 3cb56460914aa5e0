"""The field's names for the same things, as data: what a word of a key means, and what a whole name stands for.

Meanings are a weak prior.  They make one match better than another; they never forbid what shapes and structure say.
The spellings are those of torchvision, timm, transformers (versions 4 and 5), open_clip, fairseq, Megatron, detectron2,
nanoGPT and Meta's Llama.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_HASHED = re.compile(r"[a-z]?_?(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{6,}$|[a-z]?_?\d{6,}$")

_SYNONYMS = {
    "attn": "attention attn selfattention selfattn mha msa mhsa sa",
    "cross": "cross crossattention xattn encdec crossattn",
    "q": "q query queries wq qlin",
    "k": "k key keys wk klin",
    "v": "v value values wv vlin",
    "qkv": "qkv wqkv",
    "kv": "kv wkv",
    "mlp": "mlp ffn ff feedforward",
    "norm": "norm layernorm ln bn batchnorm normalization groupnorm gn rmsnorm rms instancenorm",
    "conv": "conv convolution convs",
    "linear": "linear lin fc dense",
    "proj": "proj projection",
    "embed": "embed embedding embeddings emb embs embeds",
    "pos": "pos position positions positional posembed wpe",
    "token": "tok token tokens word words wte",
    "type": "type types segment seg",
    "cls": "cls class",
    "dist": "dist distillation distilled",
    "down": "downsample downsampling shortcut skip",
    "scale": "gamma gammas scale layerscale ls lambda",
    "head": "head heads classifier classif logits",
    "vision": "vision visual image img",
    "text": "text textual language",
    "enc": "encoder enc",
    "dec": "decoder dec",
    "rel": "rel relative",
    "bias": "bias",
    "patch": "patch patches",
    "reduce": "reduce reduction squeeze",
    "expand": "expand excite excitation expansion",
    "gate": "gate gated router",
    "reg": "register registers reg",
    "stem": "stem embedder root",
    "table": "table",
    "pool": "pool pooler pooling",
}
_STOP = """
    model module net network layer layers block blocks h stage stages body backbone base self sub sublayer weight weights
    parameter param parameters parametrizations original original0 original1 list features feature transformer trunk main
    seq w b p the of orig mod wrapped fsdp checkpoint forward lang unit units res mod
"""
_MEANS = {word: name for name, words in _SYNONYMS.items() for word in words.split()}
_STOPPED = frozenset(_STOP.split())
_KNOWN = frozenset(_MEANS) | frozenset(
    """conv1 bn1 dw pw pwl in out up down input output before after pre post intermediate final pool pooler mask
    multihead lstm gru rnn cell hidden depthwise pointwise dwconv se expert experts shared score mixer ih hh reverse
    stride group shift window mean var running downsample lm feed forward last first inner outer local global
    bridge neck fpn lateral""".split()
)

_FUSED = {
    "qkv": "qkv in_proj c_attn wqkv qkv_proj to_qkv qkv_linear attn_qkv mixed_qkv w_pack qkv_lin".split(),
    "kv": "kv kv_proj to_kv wkv c_kv kv_linear key_value".split(),
    "qkv by heads": ["query_key_value"],
}
"""Joined projections by the last word of their name.

`qkv` (timm, Swin, DINOv2), `in_proj` (torch.nn.MultiheadAttention), `c_attn` (GPT-2), `Wqkv` (MPT), `qkv_proj` (vLLM,
Phi-3) are all queries, all keys, all values; `query_key_value` (Megatron, GPT-NeoX, BLOOM, Falcon) is so by head."""
PURPOSES = frozenset(
    """head pool dec projector predictor criterion loss losses center centers centres discriminator generator critic queue
    upsampler upsample prototypes memory teacher student ema""".split()
)
"""Words for what a part of a network is there for: two parts with other ones are not the same, whatever their shapes."""
_GATED = ("gate_up_proj", "gate_up", "w13", "gate_and_up", "wi_fused")
_HEADS = frozenset(
    """fc head classifier classification_head score lm_head output output_projection embed_out logits last_linear
    cls_classifier output_layer""".split()
)
_TOKENS = frozenset(
    """embed_tokens wte word_embeddings tok_embeddings token_embedding token_embeddings embed_in shared word_embedding
    tok_emb tok_embed embed_token""".split()
)
_POSITIONS = frozenset(
    """wpe position_embeddings embed_positions pos_embed pos_embedding positional_embedding position_embedding pos_emb
    position_embed positions""".split()
)
_OUT = frozenset("o_proj out_proj wo to_out out_lin o output_proj c_proj proj dense linear_out projection out attn_out".split())
_UP = frozenset("fc1 c_fc lin1 linear1 w_1 up fc_in dense_h_to_4h wi linear_1 fc_1 intermediate_dense layer1 dense1".split())
_DOWN = frozenset("fc2 c_proj lin2 linear2 w_2 fc_out dense_4h_to_h down_proj linear_2 fc_2 down output_dense dense2 proj".split())
_GATE, _UP3, _DOWN2 = "gate_proj", "up_proj", "w2"


@lru_cache(1 << 16)
def spelt(segment: str) -> str:
    """A segment of a key in lower case with underscores: `LayerNorm` and `EncDecAttention` taken apart."""
    return "_".join(word.lower() for word in re.split(r"[_\-\s]+", _split_camel(segment)) if word)


def _split_camel(segment: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", segment)


@lru_cache(1 << 16)
def words(path: str) -> tuple[str, ...]:
    """What the words of a path mean, without numbers and without words that say nothing.

    >>> words("encoder.layer_3.SelfAttention.q_proj"), words("blocks.3.attn.qkv")
    (('enc', 'attn', 'q', 'proj'), ('attn', 'qkv'))
    """
    made = []
    for word in _WORD.findall(path):
        lower = word.lower()
        if lower in _STOPPED or lower.isdigit():
            continue
        made.append(_MEANS.get(lower, lower))
    return tuple(made)


def is_hashed(segment: str) -> bool:
    """Whether a segment of a name is what a hash makes."""
    return bool(_HASHED.match(segment.lower()))


def is_opaque(path: str) -> bool:
    """Whether a name says nothing to anybody: numbers, or what a hash makes."""
    for segment in path.split("."):
        if is_hashed(segment) or is_hashed(segment.partition("_")[0]):
            continue
        for word in _WORD.findall(segment):
            lower = word.lower()
            if lower.isdigit() or (lower in _STOPPED and len(lower) > 1):
                continue
            return False
    return True


def is_known(path: str) -> bool:
    """Whether any word of a path is one of the field's."""
    return any(word.lower() in _KNOWN for word in _WORD.findall(path))


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
    for what, names in _FUSED.items():
        if last in names and (last != "in_proj" or "attn" in inner or "cross" in inner):
            return Meaning(what + _which(inner, before))
    if last in _GATED:
        return Meaning("gate and up" + _which(inner, before))
    told = set(words(last)) - {"proj", "linear", "attn", "to", "layer"}
    for one in ("q", "k", "v"):
        if told == {one}:
            return Meaning(one + _which(inner, before))
    for names, what in ((_TOKENS, "token embedding"), (_POSITIONS, "positions")):
        if last in names:
            return Meaning(what)
    if last in _HEADS and len(named) <= 2 and inner <= {"head", "cls"}:
        return Meaning("head")
    is_attention = "attn" in inner or "cross" in inner
    if is_attention and (last in _OUT or (last == "dense" and before.endswith("output"))):
        return Meaning("attention out" + _which(inner, before))
    return Meaning(_of_mlp(last, before, inner, beside))


def is_head(key: str) -> bool:
    """Whether a key is of the last layer of a network."""
    path = key.rpartition(".")[0]
    return spelt(path.rpartition(".")[2]) in _HEADS


def _which(inner: Iterable[str], before: str) -> str:
    """Cross attention is another than self attention."""
    across = "cross" in set(inner) or re.search(r"encoder_attn|enc_dec|multihead_attn|src_attn|context_attn|attn2", before)
    return " across" if across else ""


def _of_mlp(last: str, before: str, inner: set[str], beside: Collection[str]) -> str:
    gated = "w3" in beside
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

"""The field's words for the same things, as data: what a word of a key means.

Meanings are a weak prior.  They make one match better than another; they never forbid what shapes and structure say.
The spellings are those of torchvision, timm, transformers (versions 4 and 5), open_clip, fairseq, Megatron, detectron2,
nanoGPT and Meta's Llama.
"""

from __future__ import annotations

import re
from functools import lru_cache

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_HASHED = re.compile(r"[a-z]?_?(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{6,}$|[a-z]?_?\d{6,}$")


_LETTERS = frozenset("abcdef")
_AFTER = re.compile(r"(?<![a-z])(?:post|after)_(?:self_)?(?:attention|attn)(?![a-z])", re.IGNORECASE)
"""What comes after attention is no part of it: `post_attention_layernorm` is the norm before the MLP."""


def said(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


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
    "head": "head heads classifier classif logits pred",
    "vision": "vision visual image img",
    "text": "text textual language",
    "enc": "encoder enc",
    "dec": "decoder dec",
    "rel": "rel relative relpos",
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
    model module net network layer layers block blocks h stage stages body backbone base self sub sublayer weight
    weights parameter param parameters parametrizations original original0 original1 list features feature transformer
    trunk main seq resblock resblocks w b p the of orig mod wrapped fsdp checkpoint forward lang unit units res
"""
_MEANS = {word: name for name, words in _SYNONYMS.items() for word in words.split()}
_STOPPED = said(_STOP)

PURPOSES = said("""
    head pool dec projector predictor criterion loss losses center centers centres discriminator generator critic
    queue upsampler upsample prototypes memory teacher student ema""")
"""Words for what a part of a network is there for: two with other ones are not the same, whatever their shapes."""


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
    for word in _WORD.findall(_AFTER.sub("post", path)):
        lower = word.lower()
        if lower in _STOPPED or lower.isdigit():
            continue
        made.append(_MEANS.get(lower, lower))
    return tuple(made)


@lru_cache(1 << 16)
def counted(path: str) -> str:
    """A path with numbers for words and letters that count.

    >>> counted("f.b.1"), counted("out_layers.3")
    ('6.2.1', 'layers2.3')
    """
    path = path.replace("in_layers", "layers1").replace("out_layers", "layers2")
    return ".".join(str("abcdef".index(part) + 1) if part in _LETTERS else part for part in path.split("."))


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

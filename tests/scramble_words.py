"""What the field calls the same things: tables of names that stand for each other, and words that say nothing.

A concept is a list of ways to name its parts; each way has a fragment for each part. A fragment is whole segments of a
key, `#` is a number, and `^` the beginning of the key."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

Way = tuple[str, ...]


@dataclass(frozen=True)
class Concept:
    """Ways to name one thing. Not for a model with a key that `without` finds, or with none that `needs` does."""

    name: str
    ways: tuple[Way, ...]
    without: str = "(?!)"
    needs: str = ""
    often: float = 0.75


def _ones(text: str) -> tuple[Way, ...]:
    return tuple((word,) for word in text.split())


def _twos(text: str) -> tuple[Way, ...]:
    return tuple(tuple(way.split("/")) for way in text.split())


def _within(names: str, ways: str) -> Iterable[tuple[Way, ...]]:
    for name in names.split():
        yield tuple(tuple(f"{name}.{part}" for part in way.split("/")) for way in ways.split())


ATTENTION, FEED_FORWARD = "attn attention self_attn self_attention", "mlp ffn feed_forward"
SEPARATE = "q_proj/k_proj/v_proj query/key/value to_q/to_k/to_v q_lin/k_lin/v_lin linear_q/linear_k/linear_v q/k/v"
"""Names of queries, keys and values apart; wq, wk, wv are left out, since they mean another rotary layout."""
WIDEN = "fc1/fc2 lin1/lin2 c_fc/c_proj linear1/linear2"
JOINED = "qkv qkv_proj to_qkv in_proj Wqkv"
CONCEPTS = (
    Concept("attention", _ones(ATTENTION)),
    Concept("feed forward", _ones(FEED_FORWARD)),
    Concept("query", _twos(SEPARATE)),
    *(
        Concept("output", ways)
        for ways in _within(ATTENTION, "proj out_proj o_proj c_proj to_out.0 output.dense dense out_lin")
    ),
    *(
        Concept("widen", ways)
        for ways in _within(FEED_FORWARD, f"{WIDEN} dense_h_to_4h/dense_4h_to_h 0/3")
    ),
    Concept("widen", _twos(f"intermediate.dense/output.dense mlp.fc1/mlp.fc2 {WIDEN}"), "running_mean"),
    Concept("gated", _twos("gate_proj/up_proj/down_proj w1/w3/w2"), r"\.experts\."),
    Concept("squeeze", _twos("se.conv_reduce/se.conv_expand se.fc1/se.fc2 se.reduce/se.expand")),
    Concept(
        "norms",
        _twos(
            "norm1/norm2 ln_1/ln_2 layernorm_before/layernorm_after ln1/ln2 layer_norm1/layer_norm2 "
            "input_layernorm/post_attention_layernorm attention_norm/ffn_norm"
        ),
        r"running_mean|moving_mean|norm3|conv2",
    ),
    Concept(
        "norms",
        _twos(
            "attention.output.LayerNorm/output.LayerNorm norm1/norm2 sa_layer_norm/output_layer_norm "
            "self_attn_layer_norm/final_layer_norm attn_ln/mlp_ln"
        ),
        r"running_mean|moving_mean|conv2|norm3|encoder_attn|ln_f|layers\.\d+\.fc1",
    ),
    Concept("list", _ones("blocks.# layers.# h.# layer.# resblocks.# block.#"), r"downsample|layer\.\d+\..*layer\.\d+"),
    Concept("last norm", _ones("^norm ^ln_f ^layernorm ^final_norm ^ln_post ^final_layer_norm")),
    Concept("head", _ones("^fc ^head ^classifier ^score ^classification_head"), r"head_dist|head\.fc|classifier\."),
    Concept("language head", _ones("^lm_head ^output ^embed_out ^output_projection")),
    Concept("tokens", _ones("wte embed_tokens tok_embeddings word_embeddings token_embedding embed_in")),
    Concept("positions", _ones("wpe pos_embed position_embeddings pos_embedding positional_embedding embed_positions")),
    Concept("class token", _ones("cls_token class_token class_embedding cls_embedding")),
    Concept("patches", _ones("patch_embed.proj patch_embeddings.projection conv_proj patch_embed.projection")),
    Concept("depthwise", _ones("conv_dw dwconv depthwise")),
    Concept("scale", _ones("gamma layer_scale layer_scale_parameter")),
    Concept("scales", _twos("gamma_1/gamma_2 ls1.gamma/ls2.gamma lambda_1/lambda_2")),
    Concept("convolution", _ones("conv# convolution# conv_#")),
    Concept("batch norm", _ones("bn# norm# batch_norm#"), r"ln_", "running_mean"),
    Concept("pair", _twos("conv/bn convolution/normalization conv/norm"), needs="running_mean"),
    Concept("shortcut", _twos("downsample.0/downsample.1 shortcut.conv/shortcut.norm shortcut.0/shortcut.1")),
    Concept("statistics", _twos("running_mean/running_var moving_mean/moving_var"), often=0.1),
    Concept("stage", _ones("^layer# ^stage# ^stages.#")),
    Concept("encoder", _twos("encoder/decoder enc/dec")),
)  # fmt: skip
NEUTRAL = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "jade", "karst", "lotus", "maple",
)  # fmt: skip
WRAPPERS = ("module.", "model.", "_orig_mod.", "net.", "backbone.", "model.net.", "_orig_mod.module.", "model.encoder.")


@functools.cache
def pattern(fragment: str) -> re.Pattern[str]:
    """What finds a fragment in a key: whole segments; `output.` is not that of an attention."""
    anchored = fragment.startswith("^")
    words = re.escape(fragment.removeprefix("^")).replace(r"\#", "#").replace("#", r"(\d+)")
    before = r"^" if anchored else r"(?<![^.])"
    if fragment.startswith("output."):
        before += r"(?<!attention\.)"
    return re.compile(before + words + r"(?![^.])")


def used(way: Way, keys: Iterable[str]) -> bool:
    """Whether all parts of a way to name things are among the keys."""
    keys = list(keys)
    return all(any(pattern(part).search(key) for key in keys) for part in way)


def renamed(key: str, old: Way, new: Way) -> str:
    """The key with the parts of one way called as in the other."""
    for part, other in zip(old, new, strict=True):
        text = other.removeprefix("^").replace("#", r"\1")
        changed = pattern(part).sub(text, key, count=1)
        if changed != key:
            return changed
    return key

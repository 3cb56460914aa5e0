"""Pairs without a right answer that names and shapes could tell: whoever is certain of one of them guesses.

Each looks solvable at first sight: everything has a place where it would fit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
ASK = "ask"
MISSING = "ask, or say what stays without a value"


@dataclass(frozen=True)
class Trap:
    """A source and a target, why nothing tells what belongs where, and which answer is right."""

    name: str
    source: dict[str, Tensor]
    target: dict[str, Tensor]
    why: str
    allowed: str


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """A tensor of random values for each name."""
    made = {}
    for name, shape in shapes.items():
        random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        made[name] = torch.randn(shape, generator=random)
    return made


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name: str, width: int) -> Shapes:
    return {**norm(name, width), f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}


def block(name: str, width: int = 16, inner: int = 48, three: str = "q_proj k_proj v_proj") -> Shapes:
    """A block of a transformer with queries, keys and values apart."""
    made = norm(f"{name}.norm1", width)
    for part in three.split():
        made.update(linear(f"{name}.attn.{part}", width, width))
    made.update(linear(f"{name}.attn.out_proj", width, width))
    made.update(norm(f"{name}.norm2", width))
    return {**made, **linear(f"{name}.mlp.fc1", inner, width), **linear(f"{name}.mlp.fc2", width, inner)}


def blocks(before: str, count: int, width: int = 16, first: int = 0) -> Shapes:
    return {key: shape for i in range(first, first + count) for key, shape in block(f"{before}.{i}", width).items()}


def encoder(before: str = "", layers: int = 3, width: int = 16, vocabulary: int = 50) -> Shapes:
    """Embeddings, blocks and a last norm."""
    made: Shapes = {f"{before}embed.weight": (vocabulary, width), f"{before}pos_embed": (1, 20, width)}
    return {**made, **blocks(f"{before}blocks", layers, width), **norm(f"{before}norm", width)}


def resnet(*stages: int, width: int = 8) -> Shapes:
    """The names of torchvision's ResNets of basic blocks."""
    made: Shapes = {"conv1.weight": (width, 3, 7, 7), **batch_norm("bn1", width)}
    for i, count in enumerate(stages):
        out, into = width << i, width << max(i - 1, 0)
        for j in range(count):
            at = f"layer{i + 1}.{j}"
            made[f"{at}.conv1.weight"] = (out, into if j == 0 else out, 3, 3)
            made.update(batch_norm(f"{at}.bn1", out))
            made[f"{at}.conv2.weight"] = (out, out, 3, 3)
            made.update(batch_norm(f"{at}.bn2", out))
            if i and j == 0:
                made[f"{at}.downsample.0.weight"] = (out, into, 1, 1)
                made.update(batch_norm(f"{at}.downsample.1", out))
    return {**made, **linear("fc", 10, width << (len(stages) - 1))}


def renamed(shapes: Shapes, *pairs: tuple[str, str]) -> Shapes:
    made: Shapes = {}
    for key, shape in shapes.items():
        for old, new in pairs:
            key = key.replace(old, new)
        made[key] = shape
    return made


def without(shapes: Shapes, *words: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not any(word in key for word in words)}


def shuffled(shapes: Shapes, seed: int = 0) -> Shapes:
    keys = list(shapes)
    Random(seed).shuffle(keys)
    return {key: shapes[key] for key in keys}


def hidden(shapes: Shapes) -> Shapes:
    """Each key as a number that says nothing."""
    return {f"t{zlib.crc32(key.encode()):08x}": shape for key, shape in shapes.items()}


Made = tuple[str, Shapes, Shapes, str, str]


def traps() -> list[Trap]:
    """All of them."""
    makers: tuple[Callable[[], Iterable[Made]], ...] = (
        _other_depth, _other_parts, _left_over, _towers, _twins, _hidden, _layouts, _sizes, _copies, _empty,
    )  # fmt: skip
    made = [found for maker in makers for found in maker()]
    return [Trap(name, drawn(old, 1), drawn(new, 2), why, allowed) for name, old, new, why, allowed in made]


def _other_depth() -> Iterable[Made]:
    """Two architectures with much in common, whose numbers of blocks differ."""
    small, large = resnet(2, 2, 2, 2), resnet(3, 4, 6, 3)
    yield "ResNet-18 into 34", small, large, "half of the blocks have no source", MISSING
    yield "ResNet-34 into 18", large, small, "all names fit, but half of the network would be left out", ASK
    yield "a deeper ResNet of other names", renamed(large, ("layer", "stage")), small, "the source has more blocks", ASK
    short, long = encoder(layers=10), encoder(layers=12)
    yield "12 layers into 10", long, short, "nothing tells which ten were meant", ASK
    yield "10 layers into 12", short, long, "two layers have no source", MISSING
    yield "12 layers into 10, other names", renamed(long, ("blocks", "h")), short, "which ten is a guess", ASK
    counted = {**without(long, "blocks"), **blocks("blocks", 5, first=1)}
    yield "5 layers counted from 1 into 4", counted, encoder(layers=4), "the first four or the last four", ASK
    gap = without(encoder(layers=5), "blocks.2.")
    yield "a missing block", gap, encoder(layers=5), "block 2 is not in the source", MISSING
    yield "a missing block, four into five", renamed(gap, ("blocks", "h")), encoder(layers=5), "one is missing", MISSING
    twice = renamed(encoder(layers=6), ("blocks", "layers"))
    yield "every second layer", twice, encoder(layers=3), "a distilled model may have kept any three", ASK


def _other_parts() -> Iterable[Made]:
    """The target has parts that the source could fill, but never held."""
    one = encoder("encoder.")
    both = {**one, **encoder("decoder.")}
    yield "an encoder into an encoder and a decoder", one, both, "the decoder is new, though all shapes fit", MISSING
    crossed = dict(one)
    for i in range(3):
        crossed.update(renamed(block(f"encoder.blocks.{i}"), (".attn.", ".cross_attn."), (".norm1", ".norm3")))
    yield "cross-attention is new", one, crossed, "the self-attention would fit it", MISSING
    headless = without(encoder(), "norm.")
    head = {**headless, **norm("norm", 16), **linear("head", 20, 16)}
    projector = {**headless, **norm("norm", 16), **linear("projector", 20, 16)}
    yield "a new head and a projector of its shape", projector, head, "a projector is no head", ASK
    loss = {**headless, **norm("norm", 16), "criterion.centers": (20, 16)}
    yield "a new head and the centres of a loss", loss, without(head, "head.bias"), "the centres are no head", ASK
    pooled = {**one, **linear("encoder.pooler", 16, 16)}
    decoder = {**one, **linear("decoder.proj", 16, 16)}
    yield "a new decoder and a pooler", pooled, decoder, "the pooler has the decoder's shape by chance", ASK
    mim = {**one, **{f"decoder.blocks.{k}": v for k, v in blocks("x", 2).items()}}
    other = {**one, **{f"upsampler.layers.{k}": v for k, v in blocks("y", 2).items()}}
    yield "two unrelated decoders", mim, other, "both were made for something else", ASK
    biased = encoder()
    yield "no biases in the source", without(biased, "proj.bias"), biased, "biases have no source", MISSING


def _left_over() -> Iterable[Made]:
    """The whole target has a source, but the source does more than the target can."""
    plain = encoder()
    scaled = {**plain, **{f"blocks.{i}.gamma_{j}": (16,) for i in range(3) for j in (1, 2)}}
    yield "layer scales that the target lacks", scaled, plain, "without them the blocks compute something else", ASK
    normed = {**plain, **{f"blocks.{i}.attn.{n}_norm.weight": (16,) for i in range(3) for n in "qk"}}
    yield "norms of queries and keys that the target lacks", normed, plain, "another attention", ASK
    yield "biases that the target lacks", plain, without(plain, "proj.bias"), "biases would be lost", ASK
    adapted = dict(plain)
    for i in range(3):
        adapted[f"blocks.{i}.attn.q_proj.lora_A.weight"] = (4, 16)
        adapted[f"blocks.{i}.attn.q_proj.lora_B.weight"] = (16, 4)
    yield "adapters beside the weights", adapted, plain, "they must be merged, not left out", ASK
    relative = {**plain, **{f"blocks.{i}.attn.relative_position_bias_table": (49, 4) for i in range(3)}}
    yield "relative positions that the target lacks", relative, plain, "another attention", ASK


def _towers() -> Iterable[Made]:
    """Two parts of the same shape all through."""
    two = {**encoder("left."), **encoder("right.")}
    neutral = renamed(two, ("left.", "amber."), ("right.", "birch."))
    yield "two towers of neutral names", neutral, two, "either could be the left one", ASK
    named = renamed(two, ("left.", "text_model."), ("right.", "vision_model."))
    yield "towers a and b", renamed(two, ("left.", "tower_a."), ("right.", "tower_b.")), named, "which is text", ASK
    yield (
        "student and teacher",
        renamed(two, ("left.", "student."), ("right.", "teacher.")),
        encoder(),
        "which one",
        ASK,
    )
    yield "weights and averages", renamed(two, ("left.", "model."), ("right.", "ema.")), encoder(), "which one", ASK
    seq = renamed(two, ("left.", "encoder."), ("right.", "decoder."))
    yield "one of two twins", seq, renamed(encoder(), ("blocks", "layers")), "encoder or decoder", ASK
    gan = {**linear("net_a.0", 16, 16), **linear("net_b.0", 16, 16)}
    gone = renamed(gan, ("net_a", "generator"), ("net_b", "discriminator"))
    yield "generator and discriminator", gan, gone, "which is which", ASK
    stages = {**blocks("stage_x", 2), **blocks("stage_y", 2)}
    yield "stages x and y", stages, renamed(stages, ("stage_x", "inner"), ("stage_y", "outer")), "which is inner", ASK


def _twins() -> Iterable[Made]:
    """Two tensors of one shape, under words that do not tell them apart, in no order."""
    plain = encoder()
    odd = shuffled(renamed(plain, ("q_proj", "maple"), ("k_proj", "jade"), ("v_proj", "fjord")))
    yield "queries, keys and values of neutral names", odd, plain, "which are the queries", ASK
    odd = shuffled(renamed(plain, ("norm1", "ember"), ("norm2", "delta")))
    yield "norms of neutral names", odd, plain, "which is before the attention", ASK
    gated = {
        f"layers.{i}.{w}.weight": s for i in range(3) for w, s in (("a", (48, 16)), ("b", (48, 16)), ("c", (16, 48)))
    }
    named = renamed(gated, (".a.", ".gate_proj."), (".b.", ".up_proj."), (".c.", ".down_proj."))
    yield "gate and up of neutral names", shuffled(gated), named, "which is the gate", ASK
    swapped = renamed(gated, (".a.", ".y."), (".b.", ".x."))
    yield "gate and up as y and x", swapped, named, "neither letters nor order are to be trusted", ASK
    tokens = {**plain, "tok_b": (1, 1, 16), "tok_a": (1, 1, 16)}
    yield "two tokens", tokens, {**plain, "cls_token": (1, 1, 16), "dist_token": (1, 1, 16)}, "which is the class", ASK
    heads = {**plain, **linear("out_y", 20, 16), **linear("out_x", 20, 16)}
    yield "two heads", heads, {**plain, **linear("head", 20, 16), **linear("head_dist", 20, 16)}, "which distils", ASK
    tables = {**blocks("blocks", 2), "e2": (50, 16), "e1": (50, 16)}
    yield (
        "two tables",
        tables,
        {**blocks("blocks", 2), "embed.weight": (50, 16), "lm_head.weight": (50, 16)},
        "which",
        ASK,
    )
    marks = renamed(resnet(1, 1), ("running_mean", "s2"), ("running_var", "s1"), (".weight", ".p2"), (".bias", ".p1"))
    yield "statistics of neutral names", shuffled(marks), resnet(1, 1), "four vectors of one length", ASK


def _hidden() -> Iterable[Made]:
    """Names that say nothing at all."""
    plain = encoder()
    yield "hashed names in random order", shuffled(hidden(plain)), plain, "many tensors have one shape", ASK
    square = {f"layers.{i}.weight": (16, 16) for i in range(6)}
    yield "all of one shape", shuffled(hidden(square)), square, "any order would fit", ASK
    backward = dict(reversed(hidden(blocks("blocks", 4)).items()))
    yield "hashed blocks backward", backward, blocks("blocks", 4), "the first may be the last", ASK
    names = ("maple", "amber", "jade", "birch")
    words = {key: shape for name in names for key, shape in block(name).items()}
    yield "blocks called by words", shuffled(words), blocks("blocks", 4), "words have no order", ASK
    experts = {f"layers.0.experts.{i}.w1.weight": (24, 16) for i in range(4)}
    stacked = {"layers.0.experts.w1": (4, 24, 16)}
    yield "experts of hashed names", shuffled(hidden(experts)), stacked, "which is the first expert", ASK
    letters = {f"x{i}.{leaf}": shape for i in (3, 1, 0, 2) for leaf, shape in (("a", (16, 16)), ("b", (16,)))}
    mlp = {k: s for w in ("inp", "hidden", "out", "extra") for k, s in linear(w, 16, 16).items()}
    yield "numbers onto words, in no order", letters, mlp, "numbers and file order contradict each other", ASK


def _layouts() -> Iterable[Made]:
    """The names tell what a tensor is, and nothing how it lies."""
    three = {f"blocks.{i}.attn.{n}_proj.weight": (16, 16) for i in range(3) for n in "qkv"}
    for word, why in (("mix", "a name that says nothing"), ("query_key_value", "it may alternate by head")):
        fused: Shapes = {f"blocks.{i}.attn.{word}.weight": (48, 16) for i in range(3)}
        yield f"{word} into three", fused, three, why, ASK
        yield f"three into {word}", three, fused, why, ASK
    grouped: Shapes = {f"layers.{i}.attention.wqkv.weight": (32, 16) for i in range(3)}
    few = {
        f"layers.{i}.attention.{n}_proj.weight": (16 if n == "q" else 8, 16) for i in range(3) for n in "qkv"
    }  # fmt: skip
    yield "wqkv of grouped queries", grouped, few, "of each group its queries, key and value, or all queries first", ASK
    meta = {f"layers.{i}.attention.{n}.weight": (16, 16) for i in range(3) for n in ("wq", "wk", "wv", "wo")}
    hf = renamed(meta, ("attention.wq", "self_attn.q_proj"), ("attention.wk", "self_attn.k_proj"),
                 ("attention.wv", "self_attn.v_proj"), ("attention.wo", "self_attn.o_proj"))  # fmt: skip
    whole: Shapes = {"tok_embeddings.weight": (50, 16), "norm.weight": (16,), "output.weight": (50, 16)}
    tokens = renamed(whole, ("tok_embeddings", "model.embed_tokens"), ("norm", "model.norm"), ("output", "lm_head"))
    model = {**tokens, **{f"model.{k}": v for k, v in hf.items()}}
    yield "Meta's Llama", {**whole, **meta}, model, "rows of wq and wk are in another rotary order, by heads", ASK
    square = {f"layers.{i}.weight": (16, 16) for i in range(3)}
    yield (
        "square kernels",
        renamed(square, ("weight", "kernel")),
        square,
        "kernels are (in, out) in other frameworks",
        ASK,
    )
    cubes = {f"conv{i}.weight": (3, 3, 3, 3) for i in range(3)}
    yield (
        "kernels of equal sizes",
        renamed(cubes, ("weight", "kernel")),
        cubes,
        "height, width, in, out, or another",
        ASK,
    )
    wide = {f"layers.{i}.mlp.wide.weight": (96, 16) for i in range(3)}
    gated = {f"layers.{i}.mlp.{n}_proj.weight": (48, 16) for i in range(3) for n in ("gate", "up")}
    yield "wide into gate and up", wide, gated, "which half is the gate", ASK
    gates = {f"cell.w_{n}": (16, 24) for n in "abcd"}
    yield "gates of a cell", gates, {"lstm.weight_ih_l0": (64, 24)}, "in which order the gates are joined", ASK
    flat = {"head.weight": (10, 8 * 4 * 4)}
    yield (
        "a linear over a map",
        flat,
        {"head.weight": (10, 4, 4, 8)},
        "channels first or last before it was flattened",
        ASK,
    )


def _sizes() -> Iterable[Made]:
    """The names are the same, the sizes are not."""
    yield "half as wide", encoder(), encoder(width=8), "nothing fits", MISSING
    longer = {**encoder(), "pos_embed": (1, 37, 16)}
    yield "more positions", encoder(), longer, "positions would have to be interpolated", MISSING
    yield "more words", encoder(), encoder(vocabulary=64), "new rows have no source", MISSING
    grey = {**resnet(1, 1), "conv1.weight": (8, 1, 7, 7)}
    yield "one channel", resnet(1, 1), grey, "colours would have to be summed", MISSING
    lstm = {
        "lstm.weight_ih_l0": (64, 24),
        "lstm.weight_hh_l0": (64, 16),
        "lstm.bias_ih_l0": (64,),
        **linear("fc", 9, 16),
    }
    yield "unrelated models", lstm, encoder(), "nothing in common", MISSING
    yield "unrelated models, the other way", encoder(), lstm, "nothing in common", MISSING


def _copies() -> Iterable[Made]:
    """One place and several that would fit."""
    plain, net = encoder(), linear("net", 16, 16)
    versions = {**renamed(net, ("net", "net_old")), **renamed(net, ("net", "net_best"))}
    yield "two versions", versions, renamed(net, ("net", "layer")), "which one", ASK
    folds = {f"fold{i}.{key}": shape for i in range(3) for key, shape in plain.items()}
    yield "three folds", folds, plain, "each is a whole model", ASK


def _empty() -> Iterable[Made]:
    yield "nothing in the source", {}, encoder(layers=1), "there is nothing", MISSING
    yield "nothing in the target", encoder(layers=1), {}, "there is nothing", ASK
    counts = {"bn.num_batches_tracked": (), "step": ()}
    yield "nothing but counts", counts, encoder(layers=1), "there is nothing", MISSING

"""Steps that change a state dict's layout or what is in it; `scramble_names` has those that change names alone.

Each `draw` looks at the names and shapes and gives a step, or nothing where the model has no such part. A step is
applied to more than one state dict of these names: to what a file holds, and to what should come out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

import scramble_words as words
import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """A tensor, its role, and the keys of the base model that it is made of (of tied ones the first)."""

    tensor: Tensor
    role: str
    of: frozenset[str]

    def with_tensor(self, tensor: Tensor) -> Entry:
        return replace(self, tensor=tensor.contiguous())


State = dict[str, Entry]


@dataclass(frozen=True)
class Step:
    """What was done, in words; how; what of it cannot be known.

    `ask`: nothing tells this layout. `opaque`: the words that say nothing, and `hides` those in whose place they are.
    """

    kind: str
    said: str
    apply: Callable[[State], State]
    ask: bool = False
    opaque: frozenset[str] = frozenset()
    hides: frozenset[str] = frozenset()


Draw = Callable[[State, Random], Step | None]
NUMBER = re.compile(r"\d\.")
JOINED = frozenset(
    ("qkv", "qkv_proj", "in_proj", "in_proj_weight", "in_proj_bias", "c_attn", "gate_up_proj", "query_key_value")
)
"""Words that tell what is joined in a tensor, and how."""
ROLES = re.compile(r"^(.*?)(?<![^.])(q_proj|query|to_q|q_lin|linear_q|q)(\.weight|\.bias)$")


def triples(state: State) -> Iterator[tuple[str, str, tuple[str, str, str]]]:
    """Queries, keys and values that lie apart: what stands before, the leaf, and the three keys."""
    ways = [tuple(way.split("/")) for way in words.SEPARATE.split()]
    for key in state:
        found = ROLES.match(key)
        if found:
            names = next(way for way in ways if way[0] == found[2])
            three = tuple(f"{found[1]}{name}{found[3]}" for name in names)
            yield found[1], found[3], three  # type: ignore[misc]


def joined(state: State, groups: dict[str, tuple[str, ...]], join: Callable[[list[Tensor]], Tensor]) -> State:
    """The state with each group of keys as one tensor, in the place of the first of them."""
    first = {keys[0]: name for name, keys in groups.items()}
    gone = {key for keys in groups.values() for key in keys}
    made: State = {}
    for key, entry in state.items():
        if key in first:
            parts = [state[part] for part in groups[first[key]]]
            of = frozenset().union(*(part.of for part in parts))
            made[first[key]] = Entry(join([part.tensor for part in parts]).contiguous(), entry.role, of)
        elif key not in gone:
            made[key] = entry
    return made


def divided(state: State, names: dict[str, tuple[str, ...]], cut: Callable[[Tensor], Iterable[Tensor]]) -> State:
    """The state with some tensors cut apart; the parts stand where the whole was, and weights are those of linears."""
    made: State = {}
    for key, entry in state.items():
        if key in names:
            for name, part in zip(names[key], cut(entry.tensor), strict=True):
                linear = part.dim() == 2 and name.endswith("weight")
                made[name] = replace(entry.with_tensor(part), role="linear" if linear else entry.role)
        else:
            made[key] = entry
    return made


def fuse(state: State, random: Random, odd: bool = False) -> Step | None:
    """Queries, keys and values as one tensor: one after another under a name that says so, or `odd`."""
    three = list(triples(state))
    if not three or not all(key in state for *_, keys in three for key in keys):
        return None
    if any(len({state[key].tensor.shape[1:] for key in keys}) > 1 for *_, keys in three):
        return None
    rows = {state[key].tensor.shape[0] for *_, keys in three for key in keys}
    name = random.choice(
        ("mix", "proj_in", "combined") if odd else ("qkv_proj",) if len(rows) > 1 else words.JOINED.split()
    )
    order = random.choice(([0, 1, 2], [1, 0, 2], [2, 0, 1])) if odd else [0, 1, 2]
    groups = {f"{prefix}{name}{leaf}": tuple(keys[i] for i in order) for prefix, leaf, keys in three}
    if set(groups) & set(state):
        return None
    return Step(
        "fuse odd" if odd else "fuse", f"queries, keys and values are one: {name} ({order})",
        lambda s: joined(s, groups, torch.cat), ask=odd,
    )  # fmt: skip


def fuse_odd(state: State, random: Random) -> Step | None:
    """Joined under a name that says nothing, in an order that nothing tells."""
    return fuse(state, random, odd=True)


FUSED = re.compile(r"^(.*?)(?<![^.])(qkv_proj|qkv|in_proj|c_attn)([._](?:weight|bias))$")


def split(state: State, random: Random) -> Step | None:
    """Joined queries, keys and values apart, where they are thirds."""
    found = {key: match for key in state if (match := FUSED.match(key))}
    turned = any(match[2] == "c_attn" and state[key].tensor.dim() == 2 for key, match in found.items())

    def three(key: str) -> bool:
        shape = state[key].tensor.shape
        return shape[-1] % 3 == 0 if turned else shape[0] % 3 == 0 and (len(shape) < 2 or shape[0] == 3 * shape[1])

    if not found or not all(three(key) for key in found):
        return None
    way = random.choice([way.split("/") for way in words.SEPARATE.split()])
    names = {key: tuple(f"{m[1]}{name}.{m[3][1:]}" for name in way) for key, m in found.items()}
    if any(name in state for parts in names.values() for name in parts):
        return None
    return Step(
        "split", f"queries, keys and values are apart: {', '.join(way)}",
        lambda s: divided(s, names, lambda t: t.chunk(3, dim=-1 if turned else 0)),
    )  # fmt: skip


def gate(state: State, random: Random) -> Step | None:
    """The gate and what it opens as one tensor, or apart."""
    apart = {key.replace(".gate_proj.", ".gate_up_proj."): (key, key.replace(".gate_proj.", ".up_proj."))
             for key in state if ".gate_proj." in key}  # fmt: skip
    if apart and all(key in state for pair in apart.values() for key in pair):
        return Step("gate fused", "gate and up are one", lambda s: joined(s, apart, torch.cat))
    whole = {key: (key.replace("gate_up", "gate"), key.replace("gate_up", "up"))
             for key in state if key.endswith(".gate_up_proj.weight")}  # fmt: skip
    if whole:
        return Step("gate split", "gate and up are apart", lambda s: divided(s, whole, lambda t: t.chunk(2)))
    return None


def experts(state: State, random: Random) -> Step | None:
    """Stacked experts as a list of them, as Mixtral once had it."""
    both = {key for key in state if key.endswith("experts.gate_up_proj")}
    down = {key for key in state if key.endswith("experts.down_proj")}
    if not both:
        return None
    split_too = random.random() < 0.7
    up = ("w1", "w3") if split_too else ("gate_up_proj",)

    def names(key: str, parts: tuple[str, ...]) -> tuple[str, ...]:
        count = state[key].tensor.shape[0]
        last = "w2" if split_too else "down_proj"
        found = key.rpartition(".")[0]
        return tuple(f"{found}.{i}.{part}.weight" for i in range(count) for part in (parts or (last,)))

    wide = {key: names(key, up) for key in both}
    narrow = {key: names(key, ()) for key in down}

    def cut(tensor: Tensor) -> list[Tensor]:
        return [part for one in tensor for part in one.chunk(len(up))]

    return Step(
        "experts listed", f"each expert for itself: {', '.join(up)}",
        lambda s: divided(divided(s, wide, cut), narrow, list),
    )  # fmt: skip


def _linears(state: State) -> tuple[list[str], list[str]]:
    """The keys of linears in the numbered blocks, and the others; none that is one with an embedding."""
    shared = {id(e.tensor) for e in state.values() if e.role == "embedding"}
    keys = [
        key for key, e in state.items() if e.role == "linear" and e.tensor.dim() == 2 and id(e.tensor) not in shared
    ]
    return [key for key in keys if NUMBER.search(key)], [key for key in keys if not NUMBER.search(key)]


def _some_linears(state: State, random: Random) -> tuple[set[str], str]:
    inside, outside = _linears(state)
    if inside and random.random() < 0.5:
        return set(inside), "of the blocks"
    return {*inside, *outside}, "of the model"


def transpose(state: State, random: Random) -> Step | None:
    """All linears of the model, or of its blocks as in GPT-2, as (in, out).

    Nothing tells it of square ones that have only square ones beside them.
    """
    keys, where = _some_linears(state, random)
    if not keys:
        return None
    square = [all(a == b for a, b in (state[k].tensor.shape for k in part)) for part in _linears(state) if part]
    return Step(
        "transpose", f"linears {where} are (in, out)", ask=any(square),
        apply=lambda s: {k: e.with_tensor(e.tensor.t()) if k in keys else e for k, e in s.items()},
    )  # fmt: skip


def convolve(state: State, random: Random) -> Step | None:
    """Linears as convolutions of one place, or such convolutions as linears."""
    keys, where = _some_linears(state, random)
    ones = {k for k, e in state.items() if e.role == "conv" and e.tensor.dim() > 2 and set(e.tensor.shape[2:]) == {1}}
    if ones and random.random() < 0.5:
        return Step(
            "conv to linear", "convolutions of one place are linears",
            lambda s: {k: e.with_tensor(e.tensor.flatten(1)) if k in ones else e for k, e in s.items()},
        )  # fmt: skip
    if not keys:
        return None
    dims = random.choice((1, 2, 2))
    return Step(
        "linear to conv", f"linears {where} are {dims}d convolutions of one place",
        lambda s: {k: e.with_tensor(e.tensor.reshape(*e.tensor.shape, *[1] * dims)) if k in keys else e
                   for k, e in s.items()},
    )  # fmt: skip


def squeeze(state: State, random: Random) -> Step | None:
    """Parameters of no layer without their dimensions of one, or with one more."""
    own = [k for k, e in state.items() if e.role == "parameter" and not k.endswith(("weight", "bias"))]
    flat = {k for k in own if 1 in state[k].tensor.shape and state[k].tensor.numel() > 1}
    if flat:
        return Step(
            "squeeze", f"{len(flat)} parameters without their dimensions of 1",
            lambda s: {k: e.with_tensor(e.tensor.squeeze()) if k in flat else e for k, e in s.items()},
        )  # fmt: skip
    vectors = {k for k in own if state[k].tensor.dim() == 1}
    convs = {k for k, e in state.items() if e.role == "conv" and e.tensor.dim() == 3}
    if not vectors and not convs:
        return None
    dims = random.choice((1, 2))

    def wider(key: str, e: Entry) -> Entry:
        if key in vectors:
            return e.with_tensor(e.tensor.reshape(-1, *[1] * dims))
        return e.with_tensor(e.tensor.unsqueeze(2)) if key in convs else e

    return Step(
        "unsqueeze", "vectors and 1d kernels have more dimensions", lambda s: {k: wider(k, e) for k, e in s.items()}
    )


def drop_buffers(state: State, random: Random) -> Step | None:
    """The file without what the model makes anew."""
    gone = {key for key, entry in state.items() if entry.role == "buffer"}
    if not gone:
        return None
    return Step(
        "buffers dropped", f"{len(gone)} buffers are not there", lambda s: {k: e for k, e in s.items() if k not in gone}
    )


def add_buffers(state: State, random: Random) -> Step | None:
    """Masks, positions and frequencies, as older versions of libraries stored them."""
    attentions = {m[1]: None for key in state if (m := re.match(r"^(.*(?:attn|attention))\.", key))}
    made: dict[str, Tensor] = {}
    if attentions and random.random() < 0.5:
        one = {"masked_bias": torch.tensor(-1e4), "mask": torch.ones(1, 1, 6, 6).tril().bool()}
        rotary = {"rotary_emb.inv_freq": torch.logspace(0, -3, 4)}
        chosen = random.choice((one, rotary))
        made = {f"{where}.{name}": tensor.clone() for where in attentions for name, tensor in chosen.items()}
    elif found := [match[1] for key in state if (match := re.match(r"^((?:.*\.)?)embeddings\.", key))]:
        where = found[0]
        made = {f"{where}embeddings.position_ids": torch.arange(40)[None]}
    made = {key: tensor for key, tensor in made.items() if key not in state}
    if not made:
        return None
    extra = {key: Entry(tensor, "buffer", frozenset()) for key, tensor in made.items()}
    return Step("buffers added", f"{len(made)} buffers: {next(iter(made))}", lambda s: {**s, **extra})


HEAD = re.compile(r"^(?:fc|head|classifier|score|cls_classifier|lm_head|outc|generator)(?:\.|$)")


def other_head(state: State, random: Random) -> Step | None:
    """A head for another number of classes, which is another tensor altogether."""
    tied = [id(e.tensor) for e in state.values()]
    heads = [k for k, e in state.items() if HEAD.match(k) and e.role == "linear" and tied.count(id(e.tensor)) == 1]
    if not heads:
        return None
    key = heads[-1]
    shapes = {tuple(e.tensor.shape) for e in state.values()}
    old = state[key].tensor.shape[0]
    rows = next(
        n for n in range(old + 7, old + 90) if (n,) not in shapes and (n, state[key].tensor.shape[1]) not in shapes
    )
    random_values = torch.Generator().manual_seed(rows)

    def apply(s: State) -> State:
        made = dict(s)
        for name in (key, key.removesuffix("weight") + "bias"):
            if name in s:
                new = torch.randn(rows, *s[name].tensor.shape[1:], generator=random_values)
                made[name] = Entry(new, "other", frozenset())
        return made

    return Step("head", f"{key} has {rows} rows, not {old}", apply)


def extra(state: State, random: Random) -> Step | None:
    """Keys of training that belong to no part of the model."""
    width = max((e.tensor.shape[-1] for e in state.values() if e.tensor.dim() == 2), default=16)
    kinds: dict[str, dict[str, tuple[int, ...]]] = {
        "a loss": {"criterion.weight": (137,)},
        "a second head": {"aux_classifier.0.weight": (11, width), "aux_classifier.0.bias": (11,)},
        "a projection": {"projector.layers.0.weight": (29, width), "projector.layers.2.weight": (29, 29)},
        "counts": {"global_step": (), "best_score": ()},
    }
    said, shapes = random.choice(list(kinds.items()))
    drawn = torch.Generator().manual_seed(5)
    made = {k: Entry(torch.randn(shape, generator=drawn), "other", frozenset()) for k, shape in shapes.items()}
    at_front = random.random() < 0.5
    return Step("extra", said, lambda s: {**made, **s} if at_front else {**s, **made})


def drop_ties(state: State, random: Random) -> Step | None:
    """Of tied parameters only the first, as files of safetensors have it."""
    first: dict[int, str] = {}
    for key, entry in state.items():
        first.setdefault(id(entry.tensor), key)
    gone = set(state) - set(first.values())
    if not gone:
        return None
    said = f"{', '.join(sorted(gone))} is not there"
    return Step("ties dropped", said, lambda s: {k: e for k, e in s.items() if k not in gone})

"""The scrambler itself: what it says is right is worked out here a second time, by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import scramble_names as names
import scramble_steps as steps
import torch
from align_traps import traps
from scramble import Scrambled, judged, models, scramble, scrambles, skeleton, state, told_by_names, written
from scramble_steps import Draw, Step
from torch import Tensor

KINDS = {
    "fuse", "fuse odd", "split", "gate fused", "gate split", "experts listed", "transpose", "linear to conv",
    "conv to linear", "squeeze", "unsqueeze", "buffers dropped", "buffers added", "head", "extra", "ties dropped",
    "synonyms", "neutral", "prefix", "strip", "renumber", "spelled", "flatten", "cut", "hash keys", "hash segments",
    "sorted", "random",
}  # fmt: skip


@pytest.fixture(scope="module")
def many() -> list[Scrambled]:
    return list(scrambles(360))


def drawn(name: str, draw: Draw, kind: str) -> Step:
    """The first step of this kind that a seed draws."""
    now = state(name, 1)
    return next(step for seed in range(200) if (step := draw(now, Random(seed))) is not None and step.kind == kind)


def one(name: str, draw: Draw, kind: str, of: str = "source") -> Scrambled:
    """A model to which nothing but this was done."""
    step = drawn(name, draw, kind)
    return written(name, 3, [step] if of == "source" else [], [step] if of == "target" else [])


def same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def test_the_same_seed_is_the_same_scramble() -> None:
    first, again, other = scramble("vit_hf", 5), scramble("vit_hf", 5), scramble("vit_hf", 6)
    assert (first.how, first.decidable, first.fresh) == (again.how, again.decidable, again.fresh)
    for left, right in ((first.source, again.source), (first.target, again.target), (first.truth, again.truth)):
        assert list(left) == list(right)
        assert all(same(left[key], right[key]) for key in left)
    assert other.how != first.how


def test_every_kind_of_step_and_of_answer_occurs(many: list[Scrambled]) -> None:
    assert set().union(*(s.kinds for s in many)) == KINDS
    found = Counter(s.decidable for s in many)
    assert found["names"] > 240
    assert min(found["ask"], found["order"]) >= 10
    assert found["shapes"] >= 1
    assert {s.name for s in many} == set(models())


def test_a_scramble_is_possible(many: list[Scrambled]) -> None:
    """The target is a module's, with values of its own; the truth has its shapes and is in the source or made of it."""
    for s in many:
        state_dict = s.model.state_dict()
        assert set(state_dict) == set(s.target), str(s)
        assert s.truth, str(s)
        there = torch.cat([tensor.flatten().float() for tensor in s.source.values()])
        wanted = torch.cat([tensor.flatten() for tensor in s.truth.values()])
        assert torch.isin(wanted, there).all(), str(s)
        for key, right in s.truth.items():
            assert right.shape == s.target[key].shape, f"{key} of {s}"
            assert right.numel() == 1 or not torch.equal(right, s.target[key]), f"{key} of {s}"
        assert not s.fresh & set(s.truth)


def test_where_order_tells_the_order_is_right(many: list[Scrambled]) -> None:
    """One after another, where nothing came, went or was cut."""
    changed = {"buffers dropped", "buffers added", "ties dropped", "fuse", "split", "squeeze", "unsqueeze"}
    found = [s for s in many if s.decidable == "order" and not s.kinds & {*changed, "transpose"}]
    assert len(found) >= 5
    for s in found:
        for tensor, (key, want) in zip(s.source.values(), s.model.state_dict().items(), strict=True):
            assert key not in s.truth or same(s.truth[key], tensor.reshape(want.shape)), f"{key} of {s}"


def test_every_parameter_has_values_of_its_own() -> None:
    for name in models():
        flat = [e.tensor for e in state(name, 1).values() if e.role != "buffer" and e.tensor.numel()]
        first = Counter(float(t.flatten()[0]) for t in {id(t): t for t in flat}.values())
        assert max(first.values()) == 1, name
        assert sum(t.numel() for t in {id(t): t for t in flat}.values()) * 4 < 2_100_000, name


def test_fused_thirds_are_cut_into_queries_keys_and_values() -> None:
    s = one("vit_hf", steps.fuse, "fuse")
    (fused,) = [key for key in s.source if "layers.1.attention" in key and key not in s.target and "weight" in key]
    for name, part in zip("qkv", s.source[fused].chunk(3), strict=True):
        assert same(s.truth[f"vit.layers.1.attention.{name}_proj.weight"], part)
    assert s.decidable == "names"


def test_keys_of_grouped_queries_are_fused_with_their_own_sizes() -> None:
    s = one("llama", steps.fuse, "fuse", of="target")
    fused = s.truth["model.layers.0.self_attn.qkv_proj.weight"]
    for name, part in zip("qkv", fused.split((32, 16, 16)), strict=True):
        assert same(s.source[f"model.layers.0.self_attn.{name}_proj.weight"], part)


def test_an_odd_name_hides_the_order() -> None:
    s = one("vit_hf", steps.fuse_odd, "fuse odd", of="target")
    (fused,) = [key for key in s.truth if "layers.1.attention" in key and key not in s.source and "weight" in key]
    rows = {float(part[0, 0]) for part in s.truth[fused].chunk(3)}
    assert rows == {float(s.source[f"vit.layers.1.attention.{name}_proj.weight"][0, 0]) for name in "qkv"}
    assert s.decidable == "ask"


@pytest.mark.parametrize(
    ("name", "key", "dim"), [("vit_timm", "blocks.0.attn.qkv", 0), ("gpt2", "transformer.h.0.attn.c_attn", 1)]
)
def test_joined_ones_are_split(name: str, key: str, dim: int) -> None:
    s = one(name, steps.split, "split")
    parts = [k for k in s.source if k not in s.target and k.startswith(key.rpartition(".")[0]) and "weight" in k]
    assert same(s.truth[f"{key}.weight"], torch.cat([s.source[part] for part in parts], dim=dim))
    assert len(parts) == 3


def test_gate_and_up() -> None:
    s, at = one("llama", steps.gate, "gate fused"), "model.layers.2.mlp"
    gate, up = s.source[f"{at}.gate_up_proj.weight"].chunk(2)
    assert same(s.truth[f"{at}.gate_proj.weight"], gate)
    assert same(s.truth[f"{at}.up_proj.weight"], up)
    s = one("phi3", steps.gate, "gate split")
    both = torch.cat([s.source[f"{at}.gate_proj.weight"], s.source[f"{at}.up_proj.weight"]])
    assert same(s.truth[f"{at}.gate_up_proj.weight"], both)


def test_experts_are_listed() -> None:
    s, at = one("mixtral", steps.experts, "experts listed"), "model.layers.1.mlp.experts"
    down = [key for key in s.source if key.startswith(f"{at}.2.") and s.source[key].shape == (32, 48)]
    assert same(s.truth[f"{at}.down_proj"][2], s.source[down[0]])
    up = [s.source[key] for key in s.source if key.startswith(f"{at}.2.") and key not in down]
    assert same(s.truth[f"{at}.gate_up_proj"][2], torch.cat(up))


def test_linears_are_turned() -> None:
    s, key = one("distilbert", steps.transpose, "transpose"), "transformer.layer.1.ffn.lin1.weight"
    assert same(s.truth[key], s.source[key].t())
    assert same(s.truth["embeddings.word_embeddings.weight"], s.source["embeddings.word_embeddings.weight"])


def test_nothing_tells_whether_a_square_linear_alone_is_turned() -> None:
    """A pooler, which has no other linear outside of the blocks beside it."""
    assert one("bert", steps.transpose, "transpose").decidable == "ask"
    assert one("vit_hf", steps.transpose, "transpose").decidable == "names"


def test_linears_are_convolutions_of_one_place_and_the_other_way_round() -> None:
    s, key = one("distilbert", steps.convolve, "linear to conv"), "transformer.layer.1.ffn.lin1.weight"
    assert same(s.truth[key], s.source[key].flatten(1))
    assert s.source[key].dim() > 2
    s, key = one("resnet50", steps.convolve, "conv to linear"), "layer1.0.conv1.weight"
    assert same(s.truth[key], s.source[key][:, :, None, None])


def test_dimensions_of_one_go_and_come() -> None:
    s = one("convnext_tv", steps.squeeze, "squeeze")
    assert same(s.truth["features.1.0.layer_scale"], s.source["features.1.0.layer_scale"][:, None, None])
    s = one("convnext_timm", steps.squeeze, "unsqueeze")
    key = "stages.0.blocks.0.gamma"
    assert same(s.truth[key], s.source[key].flatten())
    assert s.source[key].dim() > 1


def test_buffers_are_no_part_of_the_truth() -> None:
    s = one("resnet18", steps.drop_buffers, "buffers dropped")
    assert "bn1.num_batches_tracked" not in s.source
    assert "bn1.num_batches_tracked" in s.target
    assert not [key for key in {*s.truth, *s.fresh} if "num_batches" in key]
    assert same(s.truth["bn1.running_mean"], s.source["bn1.running_mean"])
    s = one("llama", steps.add_buffers, "buffers added", of="target")
    added = set(s.target) - set(s.source)
    assert added
    assert not added & {*s.truth, *s.fresh}
    assert added <= dict(s.model.named_buffers()).keys()


def test_a_head_of_another_size_is_fresh() -> None:
    s = one("resnet18", steps.other_head, "head")
    assert s.fresh == {"fc.weight", "fc.bias"}
    assert s.source["fc.weight"].shape[0] != s.target["fc.weight"].shape[0]
    assert len(s.truth) == 100


def test_keys_of_training_land_nowhere() -> None:
    s = one("resnet18", steps.extra, "extra")
    assert set(s.source) - set(s.target)
    assert s.fresh == set()


def test_a_tied_one_is_stored_once_and_wanted_twice() -> None:
    s = one("gpt2", steps.drop_ties, "ties dropped")
    assert "lm_head.weight" not in s.source
    assert same(s.truth["lm_head.weight"], s.source["transformer.wte.weight"])
    model = skeleton(s.target, s.roles)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")


@pytest.mark.parametrize(
    ("name", "draw", "kind"),
    [
        ("vit_timm", names.synonyms, "synonyms"), ("vit_timm", names.neutral, "neutral"),
        ("bert", names.prefix, "prefix"), ("llama", names.strip, "strip"), ("bert", names.renumber, "renumber"),
        ("bert", names.spelled, "spelled"),
        ("resnet18", names.flatten, "flatten"), ("swin_timm", names.flatten, "flatten"), ("bert", names.cut, "cut"),
        ("bert", names.hash_keys, "hash keys"), ("bert", names.hash_segments, "hash segments"),
    ],
)  # fmt: skip
def test_names_alone_change(name: str, draw: Draw, kind: str) -> None:
    """Key by key in the old order, the tensors are what they were, and the names are all others or some."""
    s = one(name, draw, kind)
    assert len(s.source) == len(s.target) == len(s.truth) + sum(role == "buffer" for role in s.roles.values())
    assert set(s.source) != set(s.target)
    for source, key in zip(s.source, s.target, strict=True):
        assert key not in s.truth or same(s.source[source], s.truth[key])


def test_stages_become_one_list_in_their_order() -> None:
    s = one("resnet18", names.flatten, "flatten")
    (word,) = {key.partition(".")[0] for key in s.source} - {key.partition(".")[0] for key in s.target}
    for i in range(8):
        assert same(s.truth[f"layer{i // 2 + 1}.{i % 2}.conv1.weight"], s.source[f"{word}.{i}.conv1.weight"])


def test_a_list_becomes_stages_of_so_many() -> None:
    s = one("resnet_timm", names.prefix, "prefix")
    assert all(key.endswith(tuple(s.target)) for key in s.source)
    s = one("vit_hf", names.cut, "cut")
    last = {key.split(".")[2]: key for key in s.source if "stages" in key}
    each = 1 + max(int(key.split(".")[4]) for key in s.source if "stages" in key)
    assert len(last) == -(-4 // each)
    key = f"vit.stages.{3 // each}.layers.{3 % each}.layernorm_after.bias"
    assert same(s.truth["vit.layers.3.layernorm_after.bias"], s.source[key])


def test_the_order_is_sorted_or_random() -> None:
    now = state("bert", 1)
    s = written("bert", 3, [names.in_order(now, Random(1), "sorted")], [])
    assert list(s.source) == sorted(s.target)
    s = written("bert", 3, [names.in_order(now, Random(1), "random")], [])
    assert list(s.source) not in (list(s.target), sorted(s.target))
    assert all(same(s.truth[key], s.source[key]) for key in s.source)


def test_what_it_takes_to_tell_hidden_names_apart() -> None:
    """By shapes, by words that are left, by nothing."""
    shapes = {"a.x": (3,), "b.x": (4,)}
    assert told_by_names(shapes, frozenset("ab"))
    assert not told_by_names({"a.x": (3,), "b.x": (3,)}, frozenset("ab"))
    assert told_by_names({"a.x": (3,), "b.x": (3,), "b.y": (1,)}, frozenset("abx"))
    assert not told_by_names({"a.x": (3,), "b.y": (3,)}, frozenset("abxy"))
    assert told_by_names({"a.known": (3,), "b.other": (3,)}, frozenset("ab"))
    every = drawn("bert", names.hash_keys, "hash keys")
    shuffle = names.in_order(every.apply(state("bert", 1)), Random(1), "random")
    assert written("bert", 1, [every], []).decidable == "order"
    assert written("bert", 1, [every, shuffle], []).decidable == "ask"


def test_the_verdict() -> None:
    s = one("gpt2", steps.drop_ties, "ties dropped")
    right = dict(s.truth)
    assert judged(s, False, dict)[0] == "asked"
    assert judged(s, True, lambda: right)[0] == "solved"
    assert judged(s, True, lambda: {k: v for k, v in right.items() if k != "lm_head.weight"})[0] == "solved"
    swapped = {**right, "transformer.h.0.ln_1.bias": right["transformer.h.0.ln_2.bias"]}
    assert judged(s, True, lambda: swapped) == ("wrong", "transformer.h.0.ln_1.bias is another tensor")
    gone = {k: v for k, v in right.items() if k != "transformer.h.0.ln_1.bias"}
    assert judged(s, True, lambda: gone) == ("wrong", "transformer.h.0.ln_1.bias is missing")
    s = one("resnet18", steps.other_head, "head")
    assert judged(s, True, lambda: s.truth)[0] == "solved"
    assert judged(s, True, lambda: s.truth | {"fc.bias": torch.zeros(40)})[0] == "wrong"


def test_a_file_holds_the_source_in_its_order(tmp_path: Path) -> None:
    s = scramble("resnet_hf", 4)
    loaded = torch.load(s.saved(tmp_path / "source.pth"), weights_only=True)
    assert list(loaded) == list(s.source)
    assert all(same(loaded[key], s.source[key]) for key in loaded)


def test_the_traps_are_pairs_with_names_and_reasons() -> None:
    found = traps()
    assert len({trap.name for trap in found}) == len(found) > 60
    for trap in found:
        assert trap.why
        assert trap.allowed
        assert trap.source or trap.target

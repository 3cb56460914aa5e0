"""`cs.align`, `ckpt align`, `--auto`: what is certain is done, what is not is asked, and told how to answer."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurgeon as cs


class Block(nn.Module):
    """A small transformer block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 3 * width), "fc2": nn.Linear(3 * width, width)})


class Net(nn.Module):
    """Blocks between an embedding and a head, which may be tied."""

    def __init__(self, blocks: int = 3, classes: int = 5, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20 if tied else classes, bias=not tied)
        if tied:
            self.head.weight = self.embed_tokens.weight


RENAMES = (
    ("embed_tokens.", "transformer.wte."), ("blocks.", "transformer.h."), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."),
    (".attn.", ".attention."), (".mlp.", ".ffn."), ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"),
    (".fc1.", ".c_fc."), (".fc2.", ".c_proj."),
)  # fmt: skip


def renamed(key: str) -> str:
    for old, new in RENAMES:
        key = key.replace(old, new)
    return "transformer.ln_f." + key[5:] if key.startswith("norm.") else key


def other(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model under other names."""
    return {renamed(key): value.detach().clone() for key, value in model.state_dict().items()}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_a_checkpoint_and_itself_need_no_rule(net: Net) -> None:
    torch.save(net.state_dict(), "a.pth")
    found = cs.align("a.pth", "a.pth")
    assert (found.recipe.rules, found.questions, found.missing, found.unused) == ((), (), (), ())
    assert (found.certain, found.agreement) == (True, 1.0)


def test_what_is_found_is_a_recipe_that_anybody_can_run(net: Net, ckpt: Any) -> None:
    torch.save(other(net), "a.pth")
    torch.save(net.state_dict(), "b.pth")
    ran = ckpt("align", "a.pth", "b.pth", "-o", "found.yaml")
    assert (ran.code, ran.err) == (0, "")
    assert "100 % of the parameters of b.pth come from the source" in ran.out
    cs.remap("a.pth", "by-recipe.pth", cs.Recipe.load("found.yaml"), "b.pth")
    assert ckpt("remap", "a.pth", "--to", "b.pth", "--auto", "-o", "by-auto.pth").code == 0
    for path in ("by-recipe.pth", "by-auto.pth"):
        made = torch.load(path, weights_only=True)
        assert made.keys() == net.state_dict().keys()
        assert all(torch.equal(made[key], value) for key, value in net.state_dict().items())
    assert cs.open("by-auto.pth").provenance is not None
    again = ckpt("align", "a.pth", "b.pth", "-o", "found.yaml")
    assert (again.code, "exists; --force replaces it" in again.err) == (2, True)


def test_every_rule_of_the_recipe_says_what_it_is_for(net: Net, ckpt: Any) -> None:
    torch.save(other(net), "a.pth")
    torch.save(net.state_dict(), "b.pth")
    ckpt("align", "a.pth", "b.pth", "-o", "found.yaml")
    lines = Path("found.yaml").read_text().splitlines()
    rules = [at for at, line in enumerate(lines) if line.startswith("  - ")]
    assert rules
    assert all(lines[at - 1].startswith("  # ") and " → " in lines[at - 1] for at in rules)


def test_twelve_blocks_of_a_vit_are_at_most_fifteen_rules() -> None:
    import timm
    import transformers

    size = {"hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 48}
    hf = transformers.ViTForImageClassification(
        transformers.ViTConfig(**size, image_size=32, patch_size=8, num_labels=7)
    )
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=12,
        num_heads=2,
        mlp_ratio=2,
        num_classes=7,
    )
    torch.save(vit.state_dict(), "vit.pth")
    found = cs.align("vit.pth", hf)
    assert found.certain
    assert len(found.recipe.rules) <= 15


def test_a_head_of_another_size_is_settled_by_fit_alone(net: Net, ckpt: Any) -> None:
    trained = Net(classes=9)
    torch.save(other(trained), "a.pth")
    torch.save(net.state_dict(), "b.pth")
    alone = ckpt("remap", "a.pth", "--to", "b.pth", "--auto", "-o", "c.pth")
    assert (alone.code, Path("c.pth").exists()) == (1, False)
    assert "'head.weight' [5, 8] of b.pth has no source: in the source 'head.weight' is [9, 8]" in alone.err
    assert ckpt("remap", "a.pth", "--to", "b.pth", "--auto", "--fit", "-o", "c.pth").code == 0
    made = torch.load("c.pth", weights_only=True)
    assert torch.equal(made["head.weight"], net.head.weight)  # the target's own
    key = "blocks.1.mlp.fc1.weight"
    assert torch.equal(made[key], trained.state_dict()[key])


def test_twins_are_asked_and_a_hint_answers(net: Net, ckpt: Any) -> None:
    names = {"q_proj": "amber", "k_proj": "birch", "v_proj": "cedar", "out_proj": "delta"}
    odd = dict(net.state_dict())
    for name, neutral in names.items():
        odd = {key.replace(name, neutral): value for key, value in odd.items()}
    torch.save(odd, "a.pth")
    torch.save(net.state_dict(), "b.pth")
    ran = ckpt("remap", "a.pth", "--to", "b.pth", "--auto", "--fit", "-o", "c.pth")
    assert (ran.code, Path("c.pth").exists()) == (1, False)
    assert "--hint 'attn.amber=attn.q_proj'" in ran.err
    hints = [word for name, neutral in names.items() for word in ("--hint", f"{neutral}={name}")]
    assert ckpt("remap", "a.pth", "--to", "b.pth", "--auto", *hints, "-o", "c.pth").code == 0
    made = torch.load("c.pth", weights_only=True)
    assert all(torch.equal(made[key], value) for key, value in net.state_dict().items())
    swapped = cs.align("a.pth", "b.pth", hints=["amber=k_proj", "birch=q_proj", "cedar=v_proj", "delta=out_proj"])
    key = "blocks.0.attn.q_proj.weight"
    assert torch.equal(swapped.plan().result[key].read(), odd["blocks.0.attn.birch.weight"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hint", "nothing=norm", "--auto"], "no key of a.pth has 'nothing' in it"),
        (["--hint", "norm", "--auto"], "as in 'reduce=conv1'"),
        (["--hint", "norm=norm"], "it goes with --auto"),
    ],
)
def test_a_hint_that_is_none_is_told(words: list[str], said: str, net: Net, ckpt: Any) -> None:
    torch.save(net.state_dict(), "a.pth")
    ran = ckpt("remap", "a.pth", "--to", "a.pth", *words, "-o", "c.pth")
    assert (ran.code, said in ran.err) == (2, True)


def test_auto_needs_a_target(net: Net, ckpt: Any) -> None:
    torch.save(net.state_dict(), "a.pth")
    ran = ckpt("remap", "a.pth", "--auto", "-o", "c.pth")
    assert (ran.code, "name one with --to" in ran.err) == (2, True)


def test_rules_that_are_given_come_first(net: Net) -> None:
    odd = {
        key.replace("attn.q_proj", "attn.amber").replace("attn.k_proj", "attn.birch"): v
        for key, v in other(net).items()
    }
    odd = {key.replace("attention.query", "x.amber").replace("attention.key", "x.birch"): v for key, v in odd.items()}
    torch.save(odd, "a.pth")
    assert not cs.align("a.pth", net).certain
    rules = [r"\.x\.amber\. => .attention.query.", r"\.x\.birch\. => .attention.key."]
    found = cs.align("a.pth", net, rules)
    assert found.certain
    assert [rule.text for rule in found.recipe.rules[:2]] == rules
    made = cs.plan("a.pth", rules, net, auto=True).check().result
    assert all(torch.equal(made[key].read(), value) for key, value in net.state_dict().items())


def test_tied_names_that_safetensors_left_out_are_tied_again() -> None:
    torch.manual_seed(0)
    tied = Net(tied=True)
    have = other(tied)
    del have["head.weight"]
    save_file({key: value.contiguous() for key, value in have.items()}, "a.safetensors")
    cs.remap("a.safetensors", "b.safetensors", to=tied, auto=True)
    made = load_file("b.safetensors")
    assert torch.equal(made["head.weight"], tied.head.weight)
    assert torch.equal(made["embed_tokens.weight"], tied.head.weight)


def test_blocks_that_fit_in_several_ways_are_asked_also_with_fit(net: Net, ckpt: Any) -> None:
    torch.save(other(Net(blocks=4)), "a.pth")
    torch.save(net.state_dict(), "b.pth")
    ran = ckpt("remap", "a.pth", "--to", "b.pth", "--auto", "--fit", "-o", "c.pth")
    assert (ran.code, Path("c.pth").exists()) == (1, False)
    assert "4 blocks fit 3 in more than one way" in ran.err


def test_two_architectures_are_told_apart(net: Net, ckpt: Any) -> None:
    torch.save(nn.LSTM(30, 40).state_dict(), "a.pth")
    torch.save(net.state_dict(), "b.pth")
    ran = ckpt("align", "a.pth", "b.pth", "-o", "r.yaml")
    assert (ran.code, Path("r.yaml").exists()) == (1, False)
    assert "different architectures: no more than 0 % of the parameters of b.pth could come from the source" in ran.err


def test_auto_works_in_place(net: Net, ckpt: Any) -> None:
    save_file(other(net), "a.safetensors")
    assert ckpt("remap", "a.safetensors", "--to", "a.safetensors", "--auto", "--in-place").code == 0
    torch.save(net.state_dict(), "b.pth")
    assert ckpt("remap", "a.safetensors", "--to", "b.pth", "--auto", "--in-place").code == 0
    made = load_file("a.safetensors")
    assert all(torch.equal(made[key], value) for key, value in net.state_dict().items())


def test_a_transposed_model_is_turned_with_its_squares(net: Net) -> None:
    """The square projections follow those of their block that are not square."""
    turned = {
        key: value.t().contiguous() if value.dim() == 2 and ".h." in key else value for key, value in other(net).items()
    }
    torch.save(turned, "a.pth")
    found = cs.align("a.pth", net, hints=())
    assert found.certain
    made = found.plan().result
    assert all(torch.equal(made[key].read(), value) for key, value in net.state_dict().items())


def test_an_order_that_nothing_bears_out_is_not_taken() -> None:
    layers = {f"layers.{i}.weight": torch.randn(4, 4) for i in range(5)}
    torch.save({f"{i:x}9f{i * 7919:08x}": value for i, value in enumerate(layers.values(), 1)}, "a.pth")
    torch.save(layers, "b.pth")
    assert not cs.align("a.pth", "b.pth").certain


def test_diff_says_what_an_alignment_would_reach(net: Net, ckpt: Any) -> None:
    torch.save(other(net), "a.pth")
    torch.save(net.state_dict(), "b.pth")
    ran = ckpt("diff", "a.pth", "b.pth")
    assert "hint: `ckpt align` finds rules for 100 % of the elements of b.pth" in ran.out
    assert ckpt("diff", "a.pth", "b.pth", "--json").json["alignable"] == 1.0


@pytest.mark.parametrize("old", [None, "rules: [a => b]\n"])
def test_a_recipe_is_written_whole_or_not_at_all(
    old: str | None, net: Net, ckpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the old recipe stays, and nothing else does."""
    torch.save(other(net), "a.pth")
    torch.save(net.state_dict(), "b.pth")
    if old is not None:
        Path("r.yaml").write_text(old)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ckptsurgeon.rules.document.os.fsync", full)
    ran = ckpt("align", "a.pth", "b.pth", "-o", "r.yaml", "--force")
    assert (ran.code, "r.yaml: the disk is full" in ran.err) == (2, True)
    there = {path.name for path in Path().iterdir()}
    assert there == {"a.pth", "b.pth"} | ({"r.yaml"} if old else set())
    assert old is None or Path("r.yaml").read_text() == old


def test_keys_with_odd_signs_that_have_no_place_are_dropped(net: Net) -> None:
    """What is another name of a tensor goes, whatever signs are in it."""
    odd = dict(net.state_dict())
    odd["x\"y\n'z"] = odd["norm.weight"]
    torch.save(odd, "a.pth")
    made = cs.plan("a.pth", to=net, auto=True).check().result
    assert list(made) == list(net.state_dict())


def test_a_hint_that_names_two_settles_how_they_lie() -> None:
    """Nothing tells whether square kernels are turned: the hint says that they are not, a rule that they are."""
    square = {f"layers.{i}.kernel": torch.randn(4, 4) for i in range(3)}
    torch.save(square, "a.pth")
    torch.save({key.replace("kernel", "weight"): value for key, value in square.items()}, "b.pth")
    assert not cs.align("a.pth", "b.pth").certain
    hints = [f"layers.{i}=layers.{i}" for i in range(3)]
    plain = cs.align("a.pth", "b.pth", hints=hints)
    assert torch.equal(plain.plan().check().result["layers.1.weight"].read(), square["layers.1.kernel"])
    turned = cs.align("a.pth", "b.pth", [r"transpose \.kernel$"], hints=hints)
    assert torch.equal(turned.plan().check().result["layers.1.weight"].read(), square["layers.1.kernel"].t())


@pytest.mark.parametrize("mlp", [("fc_in", "fc_out"), ("fc1", "fc2")])
def test_the_joined_projection_of_codegen_is_asked(mlp: tuple[str, str]) -> None:
    """It holds the parts of four shards, which nothing shows but the spelling of its block."""
    up, down = mlp
    both = {
        f"h.{i}.mlp.{name}.weight": torch.randn(*size)
        for i in range(3)
        for name, size in ((up, (32, 8)), (down, (8, 32)))
    }
    apart = {f"h.{i}.attn.{name}_proj.weight": torch.randn(8, 8) for i in range(3) for name in "qkv"}
    joined = {f"h.{i}.attn.qkv_proj.weight": torch.randn(24, 8) for i in range(3)}
    torch.save(both | joined, "a.pth")
    torch.save(both | apart, "b.pth")
    assert cs.align("a.pth", "b.pth").certain == (up == "fc1")


def test_overlap_is_for_a_head_of_another_size(net: Net) -> None:
    trained = Net(classes=9)
    torch.save(trained.state_dict(), "a.pth")
    made = cs.plan("a.pth", to=net, auto=True, unexpected="drop", mismatched="overlap", missing="init").check().result
    assert torch.equal(made["head.weight"].read(), trained.head.weight[:5])

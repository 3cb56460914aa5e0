"""The built-in recipes that merge adapters, held against peft, and kohya's layout by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ckptsurgeon as cs

pytestmark = pytest.mark.filterwarnings("ignore")


def _llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=16))


CASES: dict[str, Any] = {
    "linear": (_llama, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])),
    "rslora and other ranks": (
        _llama,
        LoraConfig(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"]),
    ),
    "Conv1D": (_gpt2, LoraConfig(r=4, lora_alpha=8, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"])),
}


@pytest.mark.parametrize("case", CASES)
def test_a_peft_adapter_is_merged_as_peft_does(case: str, ckpt: Any) -> None:
    build, config = CASES[case]
    base = build().eval()
    save_file({key: value.contiguous() for key, value in _plain(base).items()}, "base.safetensors")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.1)
    model.save_pretrained("adapter")
    ran = ckpt(
        "remap", "base.safetensors", "--with", "lora=adapter/adapter_model.safetensors", "-o", "merged.safetensors",
        "--recipe", "builtin:peft-lora", "--config", "adapter/adapter_config.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert isinstance(model, PeftModel)
    want = _plain(model.merge_and_unload())
    got = load_file("merged.safetensors")
    assert set(got) == set(want)
    changed = 0
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6)
        changed += "lora" not in key
    assert changed == len(want)


def _plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, tied names once."""
    found: dict[int, str] = {}
    state = model.state_dict()
    return {key: value for key, value in state.items() if found.setdefault(value.data_ptr(), key) == key}


def test_what_the_config_says_beyond_the_recipe_is_refused(ckpt: Any) -> None:
    save_file({"w.weight": torch.ones(2, 2)}, "base.safetensors")
    save_file({"x.lora_A.weight": torch.ones(1, 2)}, "adapter.safetensors")
    Path("config.json").write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {"q": 3}}))
    ran = ckpt(
        "remap", "base.safetensors", "--with", "lora=adapter.safetensors", "--recipe", "builtin:peft-lora",
        "--config", "config.json", "--dry-run",
    )  # fmt: skip
    assert (ran.code, "config.json: 'alpha_pattern' is no single value" in ran.err) == (2, True)


def test_a_kohya_adapter_is_merged_into_names_with_dots() -> None:
    torch.manual_seed(1)
    base = {"down_blocks.0.attn_1.to_q.weight": torch.randn(6, 4), "conv_in.weight": torch.randn(6, 4, 3, 3)}
    torch.save(base, "unet.pth")
    adapter = {
        "lora_unet_down_blocks_0_attn_1_to_q.lora_down.weight": torch.randn(2, 4),
        "lora_unet_down_blocks_0_attn_1_to_q.lora_up.weight": torch.randn(6, 2),
        "lora_unet_down_blocks_0_attn_1_to_q.alpha": torch.tensor(1.0),
        "lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.randn(6, 2, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(4.0),
        "lora_te_text_model_x.lora_down.weight": torch.randn(2, 4),
    }
    save_file(adapter, "kohya.safetensors")
    made = (
        cs.plan("unet.pth", cs.Recipe.load("builtin:kohya-lora"), beside={"lora": "kohya.safetensors"}).check().result
    )
    assert list(made) == list(base)
    down, up = (adapter[f"lora_unet_down_blocks_0_attn_1_to_q.lora_{side}.weight"] for side in ("down", "up"))
    key = "down_blocks.0.attn_1.to_q.weight"
    torch.testing.assert_close(made[key].read(), base[key] + up @ down * (1 / 2))
    down, up = (adapter[f"lora_unet_conv_in.lora_{side}.weight"] for side in ("down", "up"))
    delta = torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(made["conv_in.weight"].read(), base["conv_in.weight"] + delta * (4 / 2))


def test_an_average_over_checkpoints_is_that_of_torch(ckpt: Any) -> None:
    """Three states of one model, integers from the last, and an EMA of two."""
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3)]
    for i, model in enumerate(models):
        model[1].num_batches_tracked += i
        torch.save(model.state_dict(), f"{i}.pth")
    average = torch.optim.swa_utils.AveragedModel(models[0], use_buffers=True)
    for model in models:
        average.update_parameters(model)
    ran = ckpt(
        "remap", "0.pth", "--with", "b=1.pth", "--with", "c=2.pth", "-o", "mean.pth",
        "--rule", r"average ^(\d.*) ^b\.(.*) ^c\.(.*) => \1",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    got, want = torch.load("mean.pth"), average.module.state_dict()
    assert list(got) == list(want)
    for key, value in want.items():
        if value.is_floating_point():
            torch.testing.assert_close(got[key], value)
    assert got["1.num_batches_tracked"] == 2
    made = cs.plan("0.pth", [r"average ^(\d.*) ^new\.(.*) => \1 weights=0.9,0.1"], beside={"new": "1.pth"}).check()
    first, second = torch.load("0.pth"), torch.load("1.pth")
    ema = (0.9 * first["0.weight"].double() + 0.1 * second["0.weight"].double()).float()
    assert torch.equal(made.result["0.weight"].read(), ema)

"""Averages and low-rank adapters, with torch and peft as the truth."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from helpers import assert_same_tensor
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from strategies import SIZES
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckptsurgeon as cs
from ckptsurgeon.ops._kernels import product

FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
EVERY = r"^a\.(.*)$ ^b\.(.*)$ ^c\.(.*)$"


def result(state: Any, *rules: str) -> cs.Checkpoint:
    """What rules make of tensors: with the specs that were planned, and the same in slices of a few rows."""
    torch.save(dict(state), "merge.pth")
    made = cs.plan("merge.pth", list(rules)).check().result
    for ref in made.values():
        whole = ref.read()
        assert (ref.dtype.name, ref.shape) == (str(whole.dtype).removeprefix("torch."), tuple(whole.shape))
        assert b"".join(map(bytes, ref.blocks(160))) == whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return made


# -- average


@given(SIZES, FLOATS, st.lists(st.floats(-2, 2), min_size=2, max_size=2) | st.none())
def test_an_average_is_that_of_float64(shape: tuple[int, ...], dtype: torch.dtype, given_: list[float] | None) -> None:
    parts = [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3)]
    weights = None if given_ is None else [*given_, 1 - sum(given_)]
    option = "" if weights is None else f" weights={','.join(map(repr, weights))}"
    made = result({f"{x}.w": part for x, part in zip("abc", parts, strict=True)}, rf"average {EVERY} => \1{option}")
    assert list(made) == ["w"]
    wide = [part.double() for part in parts]
    want = (
        sum(wide[1:], wide[0]) / 3 if weights is None else sum(w * part for w, part in zip(weights, wide, strict=True))
    )
    assert_same_tensor(made["w"].read(), want.to(dtype))  # type: ignore[union-attr]


class Normed(nn.Module):
    """A layer and a batch norm, which counts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)


def test_it_is_the_average_of_swa_and_its_buffers_are_those_of_the_last() -> None:
    models = [Normed() for _ in range(3)]
    averaged = AveragedModel(models[0])
    for i, model in enumerate(models):
        model.norm.num_batches_tracked.fill_(i)
        averaged.update_parameters(model)
    state = {
        f"{x}.{key}": value for x, model in zip("abc", models, strict=True) for key, value in model.state_dict().items()
    }
    made = result(state, rf"average {EVERY} => \1")
    assert list(made) == list(models[0].state_dict())
    for key, value in averaged.module.named_parameters():
        torch.testing.assert_close(made[key].read(), value.detach(), rtol=0, atol=1e-7)
    assert made["norm.num_batches_tracked"].read() == 2


def test_it_is_a_step_of_an_exponential_average() -> None:
    old, new = nn.Linear(6, 4), nn.Linear(6, 4)
    ema = AveragedModel(old, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    ema.update_parameters(old)
    ema.update_parameters(new)
    state = {f"a.{k}": v for k, v in old.state_dict().items()} | {f"b.{k}": v for k, v in new.state_dict().items()}
    made = result(state, r"average ^a\.(.*)$ ^b\.(.*)$ => \1 weights=0.999,0.001")
    for key, value in ema.module.named_parameters():
        torch.testing.assert_close(made[key].read(), value.detach(), rtol=0, atol=1e-7)


def test_complex_numbers_are_averaged_and_of_two_dtypes_the_first_is_made() -> None:
    a, b = torch.randn(3, 2, dtype=torch.complex64), torch.randn(3, 2, dtype=torch.complex64)
    assert_same_tensor(result({"a.w": a, "b.w": b}, r"average ^a\.w$ ^b\.w$ => w")["w"].read(), (a + b) / 2)
    made = result({"a.w": torch.ones(2).half(), "b.w": torch.zeros(2)}, r"average ^a\.w$ ^b\.w$ => w")
    assert_same_tensor(made["w"].read(), torch.full((2,), 0.5).half())


AVERAGE = r"average ^a\.(.*)$ ^b\.(.*)$ => \1"
ONES = {"a.w": torch.ones(2, 3), "b.w": torch.ones(2, 3)}
BAD_AVERAGES: list[tuple[str, dict[str, torch.Tensor], str]] = [
    (f"{AVERAGE} weights=0.5,0.6", ONES, "the weights add up to 1.1, not to 1"),
    (f"{AVERAGE} weights=1", ONES, "1 weights for 2 patterns"),
    (r"average ^a\.(.*)$ => \1", ONES, "of two tensors or more"),
    (AVERAGE, {**ONES, "b.w": torch.ones(3, 2)}, r"'a.w', 'b.w': tensors of one shape .* \[2, 3\] and \[3, 2\]"),
    (AVERAGE, {**ONES, "b.w": torch.ones(2, 3).int()}, "float32 and int32 have no average; cast them first"),
    (AVERAGE, {**ONES, "a.v": torch.ones(1)}, r"'a.v' would be part of 'v', to which `\^b"),
]


@pytest.mark.parametrize(("rule", "state", "cause"), BAD_AVERAGES, ids=[case[2] for case in BAD_AVERAGES])
def test_what_has_no_average_is_a_problem(rule: str, state: Any, cause: str) -> None:
    torch.save(state, "a.pth")
    (problem,) = cs.plan("a.pth", [rule]).problems
    assert re.search(cause, str(problem)), str(problem)


# -- adapters, by peft


class Net(nn.Module):
    """One of each layer that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.square = nn.Embedding(8, 8)
        self.fc = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12, bias=False))
        self.conv = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 4, 1)
        self.line = nn.Conv1d(3, 6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(x) + self.square(x))


TARGETS = ["embed", "square", "0", "1", "conv", "point", "line"]
PEFT = r"lora ^lora\.base_model\.model\.(.*)\.lora_(?:embedding_)?A(?:\.default)?(?:\.weight)?$ => \1.weight"


def adapted(model: nn.Module, live: bool = False, **config: Any) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """Base and adapter in one state dict, and what peft makes of them; `live` names are those in peft's own model."""
    base = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**config))  # type: ignore[arg-type]
    for name, value in wrapped.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(value.data, std=0.3)
        elif "magnitude" in name:
            value.data *= 1 + torch.rand(value.shape)
    found = wrapped.state_dict() if live else get_peft_model_state_dict(wrapped)
    adapter = {f"lora.{key}": value.clone() for key, value in found.items() if "lora_" in key}
    assert adapter
    return {**base, **adapter}, wrapped.merge_and_unload()


def assert_merged(made: cs.Checkpoint, want: nn.Module) -> None:
    assert list(made) == list(want.state_dict())
    for key, value in want.state_dict().items():
        tolerance = 1e-6 if value.dtype == torch.float32 else torch.finfo(value.dtype).eps * 2
        torch.testing.assert_close(
            made[key].read(), value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": ({"r": 4, "lora_alpha": 6}, "alpha=6"),
    "rank of stabilised": ({"r": 4, "lora_alpha": 6, "use_rslora": True}, "alpha=6 rslora=yes"),
    "ranks by pattern": ({"r": 4, "lora_alpha": 6, "rank_pattern": {"conv": 2, "0": 7}}, "alpha=6"),
    "scale": ({"r": 2, "lora_alpha": 3}, "scale=1.5"),
    "magnitudes": ({"r": 4, "lora_alpha": 6, "use_dora": True}, "alpha=6"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("live", [False, True], ids=["saved", "live"])
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_merged_as_peft_merges_them(name: str, live: bool) -> None:
    config, options = CONFIGS[name]
    state, want = adapted(Net(), live, target_modules=TARGETS, **config)
    assert_merged(result(state, f"{PEFT} {options}"), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    """Which peft does twice: the difference is in the last places."""
    state, want = adapted(Net().to(dtype), target_modules=TARGETS, r=4, lora_alpha=6)
    made = result(state, f"{PEFT} alpha=6")
    assert_merged(made, want.to(dtype))
    up, down = (state[f"lora.base_model.model.fc.0.lora_{x}.weight"].double() for x in "BA")
    assert_same_tensor(made["fc.0.weight"].read(), (state["fc.0.weight"].double() + up @ down * 1.5).to(dtype))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "magnitudes"])
def test_the_layers_of_gpt2_are_transposed(dora: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    config = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": dora}
    state, want = adapted(model, r=4, lora_alpha=6, **config)
    assert_merged(result(state, f"{PEFT} alpha=6 transposed=yes"), want)
    (problem, *_) = cs.plan("merge.pth", [f"{PEFT} alpha=6"]).problems
    cause = r"\[24, 4\] and \[4, 8\] make \[24, 8\], and the weight is \[8, 24\]; with transposed=yes it fits"
    assert re.search(cause, str(problem)), str(problem)


def test_the_adapter_of_a_float64_model_is_merged_in_float64() -> None:
    w, up, down = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 7), (5, 2), (2, 7)))
    made = result({"w": w, "lora_A": down, "lora_B": up}, "lora ^lora_A$ => w scale=0.5")
    torch.testing.assert_close(made["w"].read(), w + 0.5 * up @ down, rtol=1e-14, atol=1e-14)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), FLOATS)
def test_slices_of_rows_are_those_of_the_whole(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    """Whatever BLAS does with the last ones; and so of the transposed product."""
    tensors = {"w": torch.zeros(rows, columns), "t": torch.zeros(columns, rows)}
    state = {key: value.to(dtype) for key, value in tensors.items()}
    for key in ("w", "t"):
        state |= {f"{key}.lora_A": torch.randn(rank, columns), f"{key}.lora_B": torch.randn(rows, rank)}
    result(state, r"lora ^w\.lora_A$ => w scale=1", r"lora ^t\.lora_A$ => t scale=1 transposed=yes")


@given(st.data(), st.sampled_from([8, 49, 64, 100]), st.integers(2, 60), st.sampled_from([1, 3, 5, 9, 64, 257]))
def test_a_row_of_a_product_is_the_same_whatever_is_beside_it(
    data: st.DataObject, rank: int, rows: int, columns: int
) -> None:
    """To the last bit, which BLAS does not promise."""
    left, right = torch.randn(rows, rank, dtype=torch.float64), torch.randn(rank, columns, dtype=torch.float64)
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    whole = product(left, right)
    assert_same_tensor(product(left[begin:end].clone(), right), whole[begin:end])
    torch.testing.assert_close(whole, left @ right, rtol=1e-12, atol=1e-12)


def test_the_last_word_of_a_key_makes_it_an_adapter() -> None:
    w, down, up = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    state = {"lora_A.fc.weight": w, "lora_A.fc.lora_A.weight": down, "lora_A.fc.lora_B.weight": up}
    made = result(state, r"lora ^(.*)\.lora_A\.weight$ => \1.weight scale=1")
    torch.testing.assert_close(made["lora_A.fc.weight"].read(), w + up @ down, rtol=1e-6, atol=1e-6)


def test_a_large_second_factor_is_held_whole_with_the_result() -> None:
    """It would be read again for every slice: so memory is asked for all of it."""
    state = {"w": torch.zeros(4, 1 << 16), "lora_A": torch.ones(64, 1 << 16), "lora_B": torch.ones(4, 64)}
    torch.save(state, "a.pth")
    large = cs.plan("a.pth", ["lora ^lora_A$ => w scale=1"]).check().result["w"]
    assert large.rows(0, 1) is None
    assert float(large.read().min()) == 64


# -- adapters, by hand: kohya's


def kohya(alpha: float | None = 4.0) -> dict[str, torch.Tensor]:
    """A linear layer, a convolution and one of 1×1, with adapters as sd-scripts name and shape them."""
    state = {
        "unet.down_blocks.0.proj.weight": torch.randn(8, 6),
        "unet.down_blocks.0.conv_in.weight": torch.randn(8, 6, 3, 3),
        "unet.mid.point.weight": torch.randn(8, 6, 1, 1),
    }
    for name, size in (("down_blocks_0_proj", ()), ("down_blocks_0_conv_in", (3, 3)), ("mid_point", (1, 1))):
        ones = (1,) * len(size)
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, 6, *size)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(8, 2, *ones)
        if alpha is not None:
            state[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return state


KOHYA = r"lora ^lora_unet_(.*)\.lora_down\.weight$ => unet.\1.weight names=underscores"


def merged(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """By layers, not by matrices: what the adapter adds to a layer's output is what it is."""
    made = {}
    for key in ("down_blocks.0.proj", "down_blocks.0.conv_in", "mid.point"):
        w = state[f"unet.{key}.weight"]
        down, up = (state[f"lora_unet_{key.replace('.', '_')}.lora_{x}.weight"] for x in ("down", "up"))
        delta = torch.einsum("or,ri...->oi...", up.reshape(8, 2), down) * scale
        made[f"unet.{key}.weight"] = w + delta
        if w.ndim == 4:
            x = torch.randn(1, 6, 5, 5)
            conv = nn.functional.conv2d
            torch.testing.assert_close(conv(conv(x, down), up) * scale, conv(x, delta), rtol=1e-4, atol=1e-4)
    return made


@pytest.mark.parametrize(
    ("alpha", "options", "scale"),
    [
        (4.0, "", 2.0),
        (4.0, "alpha=100", 2.0),
        (None, "alpha=3", 1.5),
        (4.0, "scale=0.25", 0.25),
        (4.0, "rslora=yes", 4 / math.sqrt(2)),
    ],
)
def test_adapters_of_kohya_find_their_weights_and_have_their_own_alpha(
    alpha: float | None, options: str, scale: float
) -> None:
    state = kohya(alpha)
    made = result(state, f"{KOHYA} {options}")
    want = merged(state, scale)
    assert list(made) == list(want), "nothing of the adapter is left"
    for key, value in want.items():
        torch.testing.assert_close(made[key].read(), value, rtol=1e-6, atol=1e-6)


def test_the_names_of_old_diffusers_are_known() -> None:
    state = {"to_q.weight": torch.randn(6, 5), "to_q_lora.down.weight": torch.randn(2, 5)}
    state["to_q_lora.up.weight"] = torch.randn(6, 2)
    made = result(state, r"lora ^(.*)_lora\.down\.weight$ => \1.weight scale=1")
    want = state["to_q.weight"] + state["to_q_lora.up.weight"] @ state["to_q_lora.down.weight"]
    torch.testing.assert_close(made["to_q.weight"].read(), want, rtol=1e-6, atol=1e-6)


def plain(**changes: Any) -> dict[str, torch.Tensor]:
    """A weight and its adapter, and what else a case has; None leaves one out."""
    state: dict[str, Any] = {
        "net.fc.weight": torch.ones(4, 6),
        "fc.lora_A.weight": torch.ones(2, 6),
        "fc.lora_B.weight": torch.ones(4, 2),
    }
    state |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


PLAIN = r"lora ^(.*)\.lora_A\.weight$ => net.\1.weight"
T = torch.ones
BAD: list[tuple[str, dict[str, torch.Tensor], str]] = [
    (PLAIN, plain(), "alpha=X or scale=X must say how much .* as there is no 'fc.alpha': .* adapter_config.json"),
    (f"{PLAIN} alpha=1 scale=1", plain(), "one of them says it"),
    (f"{PLAIN} alpha=1", plain(fc__lora_B__weight=None), "'fc.lora_A.weight' has no 'fc.lora_B.weight' beside it"),
    (f"{PLAIN} alpha=2", plain(g__lora_B__weight=T(1)), "'g.lora_B.weight' has no 'g.lora_A.weight' beside it"),
    (
        f"{PLAIN} alpha=3",
        plain(net__fc__weight=None, net__fc1__weight=T(4, 6)),
        "'fc.lora_A.weight': there is no 'net.fc.weight' to merge it into; the nearest keys are 'net.fc1.weight'",
    ),
    (f"{PLAIN} alpha=4", plain(fc__lora_A__weight=T(2, 5)), r"make \[4, 5\], and the weight is \[4, 6\]$"),
    (f"{PLAIN} alpha=5", plain(fc__lora_A__weight=T(3, 6)), r"\[4, 2\] and \[3, 6\] are no two matrices of one rank"),
    (f"{PLAIN} alpha=6", plain(net__fc__weight=T(4, 6).int()), "lora is for floating tensors, not for int32"),
    (f"{PLAIN} alpha=7", plain(fc__lora_B__bias=T(4)), "'fc.lora_B.bias': the bias of an adapter cannot be merged"),
    (f"{PLAIN} alpha=8", plain(fc__dora_scale=T(4)), "'fc.dora_scale': the magnitudes of LyCORIS"),
    (f"{PLAIN} alpha=9", plain(fc__lora_mid__weight=T(4)), "'fc.lora_mid.weight': a decomposed convolution"),
    (f"{PLAIN} alpha=10", plain(fc__alpha=T(2)), r"'fc.alpha' is no single number, but \[2\]"),
    (f"{PLAIN} alpha=11", plain(fc__lora_magnitude_vector=T(6)), r"magnitudes \[6\] for 4 outputs of \[4, 6\]"),
    (f"{PLAIN} alpha=12", plain(fc__lora_A__weight=T(0, 6), fc__lora_B__weight=T(4, 0)), "have the rank 0"),
    (f"{PLAIN} alpha=13", plain(fc__lora_B__weight=T(4, 2, 3)), "are no two matrices of one rank"),
    (r"lora ^net\.fc\.weight$ => x alpha=1", plain(), "'net.fc.weight' is no first matrix of an adapter: .* lora_A, "),
    (r"lora ^fc\.(?=lora_A) => net.fc. alpha=1", plain(), "'fc.lora_A.weight' is no first matrix of an adapter"),
    (r"lora ^.*lora_A.*$ => net.fc.weight alpha=1", plain(g__lora_A__weight=T(2, 6), g__lora_B__weight=T(4, 2)),
     "'fc.lora_A.weight' and 'g.lora_A.weight' would both be merged into 'net.fc.weight'"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "state", "cause"), BAD, ids=[case[2] for case in BAD])
def test_an_adapter_that_cannot_be_merged_is_a_problem(rule: str, state: Any, cause: str) -> None:
    torch.save(state, "a.pth")
    problem = cs.plan("a.pth", [rule]).problems[0]
    assert re.search(cause, str(problem)), str(problem)


def test_a_name_with_underscores_that_may_be_two_weights_is_a_problem_that_names_both() -> None:
    torch.save({**kohya(), "unet.mid_point.weight": torch.ones(8, 6)}, "a.pth")
    (problem,) = cs.plan("a.pth", [KOHYA]).problems
    assert "'unet.mid_point.weight' may be 'unet.mid.point.weight' or 'unet.mid_point.weight'" in str(problem)
    state = kohya()
    state["unet.middle.point.weight"] = state.pop("unet.mid.point.weight")
    torch.save(state, "a.pth")
    (problem,) = cs.plan("a.pth", [KOHYA]).problems
    assert "to merge it into; the nearest keys are 'unet.middle.point.weight'" in str(problem)


def test_an_overflow_or_nan_of_the_adapter_is_an_error() -> None:
    torch.save(plain(fc__lora_A__weight=T(2, 6) * float("nan")), "a.pth")
    with pytest.raises(cs.InputError, match="would get 24 NaN or infinite values of 24: merged with a scale of 0.5"):
        cs.plan("a.pth", [f"{PLAIN} alpha=1"]).check().result["net.fc.weight"].read()

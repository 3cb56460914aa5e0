"""Values compared: `comparison.compare` and `ckpt diff --values`, with torch as the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Net, Tied
from resnet18 import telling
from safetensors.torch import save_file

import ckptsurgeon as cs
from ckptsurgeon import comparison, tensor
from ckptsurgeon.comparison import Comparison, compare
from ckptsurgeon.dtypes import DTYPES, parse_dtype
from ckptsurgeon.sources import Inline

DTYPES_OF_TORCH = [
    getattr(torch, name) for name, dtype in DTYPES.items() if dtype.bits >= 8 and dtype.kind != "quantized"
]
NUMBERS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e-40])


def ref(value: torch.Tensor) -> cs.TensorRef:
    """A tensor as a checkpoint would hold it, out of memory."""
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    spec = cs.TensorSpec(parse_dtype(str(value.dtype)), tuple(value.shape))
    return cs.TensorRef(spec, Inline(raw))


def truth(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """The figures by torch, on the whole tensors."""
    kind = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    x, y = a.to(kind).reshape(-1), b.to(kind).reshape(-1)
    nan, inf = (int(x.isnan().sum()), int(y.isnan().sum())), (int(x.isinf().sum()), int(y.isinf().sum()))
    equal = torch.isclose(x, y, rtol=0, atol=0, equal_nan=True)
    both = x.isfinite() & y.isfinite()
    x, y = x[both], y[both]
    unknown = bool((~equal).any()) and not x.numel()
    apart, size, other = (float(torch.linalg.vector_norm(v)) for v in (x - y, x, y))
    return {
        "differing": int((~equal).sum()),
        "max_abs": None if unknown else float((x - y).abs().max()) if x.numel() else 0.0,
        "relative_l2": None if unknown else 0.0 if not apart else apart / other if other else None,
        "cosine": float((x * y.conj()).sum().real) / (size * other) if size and other else None,
        "nan": nan,
        "inf": inf,
    }


def assert_true(found: Comparison, a: torch.Tensor, b: torch.Tensor) -> None:
    want = truth(a, b)
    assert found.equal == (want["differing"] == 0)
    for name, value in want.items():
        got = getattr(found, name)
        assert got == (pytest.approx(value, rel=1e-9, abs=1e-15) if isinstance(value, float) else value), name


def drawn(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values that every dtype holds, small enough that float64 is exact on them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 8, (7, 5), generator=generator).to(torch.float64)
    if dtype.is_complex:
        other = torch.randint(0, 8, (7, 5), generator=generator).to(torch.float64)
        return torch.complex(base, other).to(dtype)
    return base.exp2().to(dtype) if dtype == torch.float8_e8m0fnu else base.to(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("other", [None, torch.float32, torch.complex64, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES_OF_TORCH, ids=str)
def test_the_figures_of_every_dtype_are_those_of_torch(dtype: torch.dtype, other: torch.dtype | None) -> None:
    a, b = drawn(dtype, 1), drawn(other or dtype, 2)
    assert_true(compare(ref(a), ref(b)), a, b)
    assert_true(compare(ref(b), ref(a)), b, a)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=9), st.sampled_from([torch.float64, torch.float32]))
def test_the_figures_of_any_floats_are_those_of_torch(pairs: list[tuple[float, float]], dtype: torch.dtype) -> None:
    a, b = (torch.tensor([pair[i] for pair in pairs], dtype=dtype) for i in (0, 1))
    found = compare(ref(a), ref(b))
    want = truth(a, b)
    assert (found.differing, found.nan, found.inf) == (want["differing"], want["nan"], want["inf"])
    assert found.max_abs == want["max_abs"]


@given(st.lists(NUMBERS, max_size=9))
def test_a_tensor_equals_itself_whatever_is_in_it(values: list[float]) -> None:
    a = torch.tensor(values, dtype=torch.float64)
    found = compare(ref(a), ref(a.clone()))
    assert (found.equal, found.differing, found.max_abs, found.relative_l2) == (True, 0, 0.0, 0.0)
    assert found.cosine in (None, pytest.approx(1.0, rel=1e-12))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=9))
def test_the_comparison_turned_around_is_the_same_but_for_its_sides(pairs: list[tuple[float, float]]) -> None:
    a, b = (ref(torch.tensor([pair[i] for pair in pairs], dtype=torch.float64)) for i in (0, 1))
    there, back = compare(a, b), compare(b, a)
    assert (there.max_abs, there.differing, there.cosine) == (back.max_abs, back.differing, back.cosine)
    assert (there.nan, there.inf) == (back.nan[::-1], back.inf[::-1])


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-2, 2))
def test_64_bit_integers_are_compared_exactly(value: int, far: int, near: int) -> None:
    """Where float64 rounds, Python's integers and floats are the truth."""
    for other in (far, max(-(1 << 63), min((1 << 63) - 1, value + near))):
        a, b = torch.tensor([value]), torch.tensor([other])
        assert compare(ref(a), ref(b)).max_abs == float(abs(value - other))
        assert compare(ref(a), ref(b)).equal == (value == other)
        unsigned = torch.tensor([other % (1 << 64)], dtype=torch.uint64)
        assert compare(ref(a), ref(unsigned)).equal == (value == other % (1 << 64))
        assert compare(ref(a), ref(unsigned)).max_abs == float(abs(value - other % (1 << 64)))
        assert compare(ref(a), ref(b.double())).equal == (value == float(other))


@given(st.integers(-(1 << 63), (1 << 63) - 1), NUMBERS)
def test_an_integer_equals_a_float_only_where_python_says_so(value: int, other: float) -> None:
    found = compare(ref(torch.tensor([value])), ref(torch.tensor([other], dtype=torch.float64)))
    assert found.equal == (value == other)


def test_values_beyond_the_squares_of_float64_have_figures() -> None:
    big = torch.tensor([3e200, 4e200], dtype=torch.float64)
    found = compare(ref(big), ref(big * 2))
    assert (found.max_abs, found.relative_l2, found.cosine) == (4e200, pytest.approx(0.5), pytest.approx(1.0))
    small = torch.tensor([3e-200, 4e-200], dtype=torch.float64)
    found = compare(ref(small), ref(-small))
    assert (found.max_abs, found.relative_l2, found.cosine) == (8e-200, pytest.approx(2.0), pytest.approx(-1.0))
    most = torch.tensor([1.7e308], dtype=torch.float64)
    found = compare(ref(most), ref(-most))
    assert (found.equal, found.max_abs, found.relative_l2, found.cosine) == (False, None, None, pytest.approx(-1.0))


def test_nan_and_inf_count_and_do_not_spoil_the_figures() -> None:
    a = torch.tensor([1.0, float("nan"), float("inf"), float("nan"), 2.0])
    b = torch.tensor([1.0, float("nan"), float("-inf"), 5.0, 4.0])
    assert compare(ref(a), ref(b)) == Comparison(
        False, 3, 2.0, pytest.approx(2 / 17**0.5), pytest.approx(9 / (5 * 17) ** 0.5), (2, 1), (1, 1)
    )


def test_a_complex_value_is_its_two_parts() -> None:
    nan = float("nan")
    a = torch.tensor([complex(nan, 1), complex(nan, 1), 3 + 4j, complex(0, float("inf"))])
    b = torch.tensor([complex(nan, 1), complex(nan, 2), 0j, complex(0, float("inf"))])
    found = compare(ref(a), ref(b))
    assert (found.differing, found.max_abs, found.nan, found.inf) == (2, 5.0, (2, 2), (1, 1))
    assert (found.relative_l2, found.cosine) == (None, None)


def test_scalars_and_empty_tensors_compare() -> None:
    assert compare(ref(torch.tensor(2.0)), ref(torch.tensor(3.0))).max_abs == 1.0
    assert compare(ref(torch.empty(0, 3)), ref(torch.empty(0, 3))) == Comparison(
        True, 0, 0.0, 0.0, None, (0, 0), (0, 0)
    )


def test_elements_that_share_bytes_compare_by_bytes() -> None:
    spec = cs.TensorSpec(DTYPES["float4_e2m1"], (2, 4))
    a, b, c = (cs.TensorRef(spec, Inline(data)) for data in (b"abcd", b"abcd", b"abce"))
    assert compare(a, b) == Comparison(True, 0, None, None, None, None, None)
    assert compare(a, c) == Comparison(False, None, None, None, None, None, None)
    assert not compare(a, ref(torch.zeros(2, 4))).equal


def test_shapes_must_agree() -> None:
    with pytest.raises(cs.UsageError, match=r"\[2, 3\] and \[3, 2\]"):
        compare(ref(torch.zeros(2, 3)), ref(torch.zeros(3, 2)))


def test_figures_over_many_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two dtypes and of two layouts end at different places, and are lined up."""
    a, b = torch.randn(61, 43), torch.randn(43, 61).bfloat16()
    torch.save({"w": a, "v": a.double()}, "a.pth")
    torch.save({"w": b.t(), "v": b.t()}, "b.pth")
    left, right = cs.open("a.pth"), cs.open("b.pth")
    for chunk, block in ((32, 160), (16, 1 << 20), (1 << 10, 48)):
        monkeypatch.setattr(comparison, "_CHUNK", chunk)
        blocks = tensor.TensorRef.blocks
        with monkeypatch.context() as patch:
            patch.setattr(tensor.TensorRef, "blocks", lambda self, block=block, blocks=blocks: blocks(self, block))
            for key in ("w", "v"):
                assert_true(compare(left[key], right[key]), a, b.t())


def test_memory_does_not_grow_with_the_tensors() -> None:
    """Two sparse files of half a GiB of int8, compared where only a fifth of both may be held."""
    size = 1 << 29
    header = f'{{"w":{{"dtype":"I8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    for name in ("a.safetensors", "b.safetensors"):
        Path(name).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(name, 8 + len(header) + size)
    script = (
        "import torch, ckptsurgeon as cs\nfrom ckptsurgeon import comparison\n"
        "def peak(): return [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')][0]\n"
        "a, b = cs.open('a.safetensors'), cs.open('b.safetensors')\n"
        "before = peak()\nfound = cs.diff(a, b, values=True)\nprint(found.same, peak() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    same, grown = ran.stdout.split()
    assert same == "True"
    assert int(grown) < 200 * 1024, f"{int(grown) // 1024} MiB"


def net(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**telling(Net()).state_dict(), **changes}


def test_values_that_differ_are_a_difference_and_not_covered(ckpt: Any) -> None:
    have = net()
    have["fc.weight"] = have["fc.weight"] + 0.25
    torch.save({f"module.{key}": value for key, value in have.items()}, "a.pth")
    save_file(net(), "b.safetensors")
    words = ["diff", "a.pth", "b.safetensors", "--rule", "strip module."]
    assert ckpt(*words).code == 0
    ran = ckpt(*words, "--values")
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0].split() == ["key", "differing", "max", "abs", "rel", "L2", "cosine", "nan", "inf"]
    assert lines[1].split()[:7] == ["values", "fc.weight", "80", "of", "80", "0.25", lines[1].split()[6]]
    assert lines[2:] == [
        "",
        "a.pth against b.safetensors: 13 matched, 1 of other values",
        "values: 13 of 14 tensors equal; largest difference 0.25 in fc.weight",
        "coverage: 13 of 14 tensors (92.86 %), 475 of 555 elements (85.59 %)",
    ]
    data = ckpt(*words, "--values", "--json").json
    assert data["counts"] == {"matched": 13, "values": 1, "shape": 0, "dtype": 0, "missing": 0, "unexpected": 0}
    (row,) = [row for row in data["keys"] if row["status"] == "values"]
    want = truth(have["fc.weight"], net()["fc.weight"])
    assert row["values"]["relative_l2"] == pytest.approx(want["relative_l2"], rel=1e-9)
    assert row["values"]["cosine"] == pytest.approx(want["cosine"], rel=1e-9)
    assert ckpt(*words, "--values", "--min-coverage", "0.85").code == 0
    assert ckpt(*words, "--values", "--min-coverage", "0.9").code == 1


def test_equal_values_are_said_in_a_line(ckpt: Any) -> None:
    torch.save(net(), "a.pth")
    save_file(net(), "b.safetensors")
    ran = ckpt("diff", "a.pth", "b.safetensors", "--values")
    assert ran.code == 0
    assert ran.out.splitlines()[1] == "values: 14 of 14 tensors equal"


def test_rows_of_another_dtype_have_figures_and_keep_their_status() -> None:
    torch.save(net(), "a.pth")
    cs.convert("a.pth", "b.pth", dtype="bf16")
    found = cs.diff("b.pth", "a.pth", values=True)
    rows = {row.key: row for row in found.rows}
    assert found.count("dtype") == 13
    assert found.coverage.tensors == 1
    for key, value in net().items():
        if value.is_floating_point():
            assert rows[key].status == "dtype"
            assert_true(rows[key].values, value.bfloat16(), value)


def test_a_live_model_is_compared_by_what_it_holds(ckpt: Any) -> None:
    model = telling(Net())
    torch.save(model.state_dict(), "a.pth")
    assert cs.diff("a.pth", model, values=True).same
    with torch.no_grad():
        model.norm.bias[3] += 1
    found = cs.diff("a.pth", model, values=True)
    assert [row.key for row in found.rows if row.status == "values"] == ["norm.bias"]
    assert not found.same
    assert cs.diff("a.pth", model).same


def test_a_live_parameter_of_any_layout_is_read() -> None:
    """A single element may have any stride, and torch still calls it contiguous."""
    model = torch.nn.Module()
    model.one = torch.nn.Parameter(torch.arange(4.0).reshape(2, 2)[:, 1][:1])
    model.turned = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    model.conj = torch.nn.Parameter(torch.tensor([1 + 2j, 3j]).conj())
    assert model.one.stride() == (2,)
    save_file(
        {"one": torch.ones(1), "turned": model.turned.detach().contiguous(), "conj": torch.tensor([1 - 2j, -3j])},
        "a.safetensors",
    )
    assert cs.diff("a.safetensors", model, values=True).same


def test_a_model_that_is_only_named_has_no_values(ckpt: Any) -> None:
    torch.save(net(), "a.pth")
    spec = f"{Path(__file__).parent.parent}/fixtures/models.py:Net"
    ran = ckpt("diff", "a.pth", spec, "--values")
    assert (ran.code, ran.out) == (2, "")
    assert "is a model spec, whose values are not there to compare" in ran.err
    with pytest.raises(cs.TargetError, match="meta device and has no value for 'stem.weight'"):
        cs.diff("a.pth", Net().to("meta"), values=True)


def test_tied_names_are_compared_once_and_the_same_bytes_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = telling(Tied())
    torch.save(model.state_dict(), "a.pth")
    torch.save(model.state_dict(), "b.pth")
    read: list[int] = []
    blocks = tensor.TensorRef.blocks
    monkeypatch.setattr(tensor.TensorRef, "blocks", lambda self: read.append(self.nbytes) or blocks(self))
    seen: list[tuple[int, int]] = []
    nbytes = model.embed.weight.nbytes
    for against in ("b.pth", model):
        read.clear()
        found = cs.diff("a.pth", against, values=True, progress=lambda *at: seen.append(at))
        assert found.same
        assert [row.values.equal for row in found.rows] == [True, True]
        assert read == [nbytes, nbytes]
        assert seen[-1] == (2 * nbytes, 2 * nbytes)
    read.clear()
    assert cs.diff("a.pth", "a.pth", values=True).same
    assert read == []


def test_the_error_of_a_tensor_that_cannot_be_read_names_its_key() -> None:
    torch.save(net(), "a.pth")
    torch.save(net(), "b.pth")
    ckpt = cs.open("a.pth")
    os.utime("a.pth", ns=(0, 0))
    with pytest.raises(cs.InputError, match="changed since it was opened") as failed:
        cs.diff(ckpt, "b.pth", values=True)
    assert failed.value.key == "stem.weight"


def test_the_figures_are_valid_json_whatever_the_values(ckpt: Any) -> None:
    torch.save({"w": torch.tensor([float("inf"), 1.7e308], dtype=torch.float64)}, "a.pth")
    torch.save({"w": torch.tensor([float("nan"), -1.7e308], dtype=torch.float64)}, "b.pth")
    out = ckpt("diff", "a.pth", "b.pth", "--values", "--json").out
    values = json.loads(out, parse_constant=pytest.fail)["keys"][0]["values"]
    assert values == {
        "equal": False,
        "differing": 2,
        "max_abs": None,
        "relative_l2": None,
        "cosine": pytest.approx(-1.0),
        "nan": {"checkpoint": 0, "target": 1},
        "inf": {"checkpoint": 1, "target": 0},
    }

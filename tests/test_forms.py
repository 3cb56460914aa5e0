"""Every form of tensor in the wild: what torch saves of it, what is listed, read and written of it."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_tensor, assert_same_tensors, save_legacy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import ckptsurgeon as cs

Save = Callable[[object, Path], None]
PROTOCOLS = {
    **{f"zip-{n}": (lambda obj, path, n=n: torch.save(obj, path, pickle_protocol=n)) for n in (2, 5)},
    "legacy": lambda obj, path: save_legacy(obj, path),
}


@pytest.fixture(params=PROTOCOLS.values(), ids=PROTOCOLS.keys())
def save(request: pytest.FixtureRequest) -> Save:
    return request.param


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on quantised, nested and sparse tensors
        yield


def per_tensor(dtype: torch.dtype = torch.qint8) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.randn(2, 3), 0.1, 3, dtype)


def per_channel() -> torch.Tensor:
    scales, zeros = torch.tensor([0.1, 0.2], dtype=torch.float64), torch.tensor([0, 1])
    return torch.quantize_per_channel(torch.randn(2, 3), scales, zeros, 0, torch.quint8)


def assert_same_quantized(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.qscheme()) == (want.dtype, want.shape, want.qscheme())
    assert_same_tensor(got.int_repr(), want.int_repr())
    if got.qscheme() == torch.per_tensor_affine:
        assert (got.q_scale(), got.q_zero_point()) == (want.q_scale(), want.q_zero_point())
    else:
        assert_same_tensor(got.q_per_channel_scales(), want.q_per_channel_scales())
        assert_same_tensor(got.q_per_channel_zero_points(), want.q_per_channel_zero_points())
        assert got.q_per_channel_axis() == want.q_per_channel_axis()


QUANTIZED = {
    "per tensor": per_tensor,
    "quint8": lambda: per_tensor(torch.quint8),
    "qint32": lambda: per_tensor(torch.qint32),
    "per channel": per_channel,
}


@pytest.mark.parametrize("form", QUANTIZED)
def test_quantised_tensors_keep_their_scale_and_zero_point(save: Save, form: str) -> None:
    """Read, renamed and written to a torch file they are what torch saved; safetensors has the parts."""
    want = QUANTIZED[form]()
    save({"q": want, "w": torch.ones(2)}, Path("a.pth"))
    ckpt = cs.open("a.pth")
    assert list(ckpt) == ["q", "w"]
    assert ckpt["q"].dtype.name == str(want.dtype).removeprefix("torch.")
    assert_same_quantized(ckpt["q"].read(), want)
    cs.remap("a.pth", "b.pth", ["prefix net."])
    assert_same_quantized(torch.load("b.pth", weights_only=True)["net.q"], want)
    written = cs.convert("a.pth", "b.safetensors")
    assert "1 quantised tensors are written as integers" in written.warnings[0]
    parts = load_file("b.safetensors")
    assert_same_tensor(parts["q"], want.int_repr())
    per = want.qscheme() == torch.per_tensor_affine
    assert parts["q.scale"].tolist() == (want.q_scale() if per else want.q_per_channel_scales().tolist())
    assert parts["q.zero_point"].tolist() == (want.q_zero_point() if per else want.q_per_channel_zero_points().tolist())
    assert set(parts) == {"q", "w", "q.scale", "q.zero_point"} | (set() if per else {"q.axis"})


def test_a_quantised_tensor_is_never_changed_as_if_it_were_numbers(ckpt: Any) -> None:
    torch.save({"q": per_tensor(), "q.scale": torch.ones(1)}, "a.pth")
    ran = ckpt("remap", "a.pth", "--rule", "transpose ^q$", "-o", "b.pth")
    assert ran.code == 1
    assert "'q' is quantised (qint8); such a tensor can be renamed or dropped, but not changed" in ran.err
    ran = ckpt("convert", "a.pth", "b.safetensors")
    assert ran.code == 1
    assert "safetensors needs the name 'q.scale'" in ran.err
    assert "scale 0.1, zero point 3" in ckpt("ls", "a.pth").out
    assert cs.convert("a.pth", "c.pth", dtype="bf16").tensors == 2
    assert torch.load("c.pth", weights_only=True)["q"].dtype == torch.qint8


def test_the_figures_of_a_quantised_tensor_are_of_its_numbers(ckpt: Any) -> None:
    want = per_tensor()
    torch.save({"q": want}, "a.pth")
    found = ckpt("ls", "a.pth", "--stats", "--json").json["tensors"][0]
    assert found["stats"]["maximum"] == float(want.dequantize().max())
    assert found["quantizer"] == {"scheme": "per_tensor_affine", "axis": None, "scale": 0.1, "zero_point": 3}


def test_lying_quantisers_are_refused() -> None:
    torch.save({"q": per_channel()}, "a.pth")
    with zipfile.ZipFile("a.pth") as old, zipfile.ZipFile("b.pth", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"K\x02K\x03\x86") == 1
                data = data.replace(b"K\x02K\x03\x86", b"K\x03K\x02\x86").replace(b"K\x03K\x01\x86", b"K\x02K\x01\x86")
            new.writestr(name, data)
    with pytest.raises(cs.InputError, match="a quantiser whose scales do not go along dimension 0"):
        cs.open("b.pth")


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)


ABSENT = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "float32 [3, 3]", r"a sparse tensor \(COO, 3 values stored\)"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "float32 [3, 3]", r"a sparse tensor \(CSR, 3 values stored\)"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
        "float32 [9]",
        "a nested tensor of 2 tensors",
    ),
    "jagged": (jagged, "float32 [3, 3]", r"a nested tensor \(jagged\)"),
    "meta": (lambda: torch.empty(3, 4, device="meta"), "float32 [3, 4]", "a meta tensor, which has no values"),
}


@pytest.mark.parametrize("form", ABSENT)
def test_tensors_without_dense_bytes_are_listed_and_refused_where_bytes_are_needed(form: str, ckpt: Any) -> None:
    make, spec, words = ABSENT[form]
    torch.save({"odd": make(), "w": torch.ones(2)}, "a.pth")
    found = cs.open("a.pth")
    assert str(found["odd"].spec) == spec
    with pytest.raises(cs.InputError, match=f"is {words}: the file does not hold its bytes; save it dense in torch"):
        found["odd"].read()
    assert ckpt("ls", "a.pth", "--stats").code == 0
    for output in ("b.pth", "b.safetensors"):
        ran = ckpt("convert", "a.pth", output)
        assert ran.code == 1
        assert "'odd' is a" in ran.err
        assert not Path(output).exists()
    ran = ckpt("remap", "a.pth", "--rule", "unsqueeze odd 0", "-o", "b.pth")
    assert ran.code == 1
    assert "can be renamed or dropped, but not changed" in ran.err
    assert ckpt("remap", "a.pth", "--rule", "drop odd", "-o", "b.pth").code == 0
    assert_same_tensors(torch.load("b.pth", weights_only=True), {"w": torch.ones(2)})


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_distributed_tensors_are_read_where_they_are_whole() -> None:
    """On one rank the local part is all there is; a partial sum is not the value."""
    mesh, want = init_device_mesh("cpu", (1,)), torch.randn(4, 3)
    state = {"s": distribute_tensor(want, mesh, [Shard(0)]), "r": distribute_tensor(want, mesh, [Replicate()])}
    torch.save({**state, "p": DTensor.from_local(want, mesh, [Partial()])}, "a.pth")
    found = cs.open("a.pth")
    assert_same_tensor(found["s"].read(), want)
    assert_same_tensor(found["r"].read(), want)
    assert found["p"].absent == "a DTensor, here the part [4, 3] of it"


@pytest.mark.usefixtures("_process_group")
def test_a_part_of_a_distributed_tensor_is_listed_as_such() -> None:
    """As rank 0 of two saves it: the size of the whole, and half of the values."""
    mesh = init_device_mesh("cpu", (1,))
    half = DTensor.from_local(torch.randn(2, 3), mesh, [Shard(0)], shape=torch.Size([4, 3]), stride=(3, 1))
    torch.save({"w": half}, "a.pth")
    found = cs.open("a.pth")["w"]
    assert (found.shape, found.absent) == ((4, 3), "a DTensor, here the part [2, 3] of it")


@pytest.mark.usefixtures("_process_group")
def test_sharded_tensors() -> None:
    from torch.distributed._shard.sharded_tensor import Shard as Part
    from torch.distributed._shard.sharded_tensor import ShardMetadata, init_from_local_shards

    want = torch.randn(4, 3)
    whole = init_from_local_shards([Part(want, ShardMetadata([0, 0], [4, 3], "rank:0/cpu"))], [4, 3])
    torch.save({"w": whole}, "a.pth")
    assert_same_tensor(cs.open("a.pth")["w"].read(), want)


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_conjugate_and_negative_bits_are_resolved(save: Save, dtype: torch.dtype) -> None:
    base = torch.randn(5, dtype=torch.complex128)
    base[4] = complex(math.inf, math.nan)

    def made(base: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"conj": base.conj(), "neg": base[:3].clone().conj().imag, "plain": base}
        return state | {"negated": torch._neg_view(base), "both": torch._neg_view(base.conj())}

    base = base.to(dtype)
    save(made(base), Path("a.pth"))
    wide = made(base.to(torch.complex64) if dtype == torch.complex32 else base)  # torch lacks it for the small ones
    want = {key: value.resolve_conj().resolve_neg() for key, value in wide.items()}
    want = {key: value.to(dtype if value.is_complex() else dtype.to_real()) for key, value in want.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_tensors(cs.open("a.pth"), want)
        cs.convert("a.pth", "b.pth")
    assert_same_tensors(torch.load("b.pth", weights_only=True), want)
    if dtype == torch.complex64:
        cs.convert("a.pth", "b.safetensors")
        assert_same_tensors(load_file("b.safetensors"), want, ordered=False)


def test_quantised_tensors_whose_elements_share_bytes_are_listed() -> None:
    packed = torch.quantize_per_channel(torch.randn(4, 4), torch.rand(4) + 0.1, torch.rand(4), 0, torch.quint4x2)
    torch.save({"w": torch.ones(2), "q": packed}, "a.pth")
    found = cs.open("a.pth")
    assert found["q"].absent == "a quantised tensor with packed elements"
    assert found["q"].shape == (4, 4)
    assert_same_tensor(found["w"].read(), torch.ones(2))


def test_complex32_and_packed_float4_round_trip() -> None:
    packed = torch.arange(6, dtype=torch.uint8).view(2, 3).view(torch.float4_e2m1fn_x2)
    torch.save({"c": torch.randn(3, dtype=torch.complex32), "f": packed}, "a.pth")
    found = cs.open("a.pth")
    assert found["f"].shape == (2, 6)
    cs.convert("a.pth", "b.pth")
    want, got = torch.load("a.pth", weights_only=True), torch.load("b.pth", weights_only=True)
    assert_same_tensor(got["c"].view(torch.float16), want["c"].view(torch.float16))
    assert got["f"].dtype == want["f"].dtype
    assert_same_tensor(got["f"].view(torch.uint8), want["f"].view(torch.uint8))


def test_storages_are_tensors_of_one_dimension(save: Save) -> None:
    typed, untyped = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 8], dtype=torch.uint8)
    save({"typed": typed.storage(), "untyped": untyped.untyped_storage(), "w": torch.ones(1)}, Path("a.pth"))
    want = {"typed": typed, "untyped": untyped, "w": torch.ones(1)}
    assert_same_tensors(cs.open("a.pth"), want)


def test_a_bare_tensor_has_the_name_tensor(save: Save, ckpt: Any) -> None:
    want = torch.randn(2, 3)
    save(want, Path("a.pth"))
    assert_same_tensors(cs.open("a.pth"), {"tensor": want})
    assert ckpt("convert", "a.pth", "b.safetensors").code == 0
    assert_same_tensors(load_file("b.safetensors"), {"tensor": want})


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_and_tuples_of_tensors_are_numbered(save: Save, kind: type) -> None:
    parts = kind([torch.randn(2), torch.randn(3), "a note"])
    save(parts, Path("a.pth"))
    found = cs.open("a.pth")
    assert_same_tensors(found, {"0": parts[0], "1": parts[1]})
    assert found.extras == {2: "a note"}
    save({"epoch": 3, "weights": parts}, Path("b.pth"))
    assert_same_tensors(cs.open("b.pth"), {"0": parts[0], "1": parts[1]})
    assert cs.open("b.pth").origin.selected == "weights"


def test_tensors_under_numbers(save: Save) -> None:
    save({0: torch.ones(2), 10: torch.zeros(2)}, Path("a.pth"))
    assert_same_tensors(cs.open("a.pth"), {"0": torch.ones(2), "10": torch.zeros(2)})


def test_a_list_beside_a_state_dict_is_no_other_one(save: Save) -> None:
    """States of random number generators are lists of tensors, and arrays."""
    state = {"a.weight": torch.ones(2), "a.bias": torch.zeros(2)}
    bundle = {"weights_g": state, "cuda_rng": [torch.zeros(3), torch.zeros(3)], "numpy_rng": np.random.get_state()}
    save(bundle, Path("a.pth"))
    assert cs.open("a.pth").origin.selected == "weights_g"


def test_lists_of_modules_are_several_state_dicts(save: Save, ckpt: Any) -> None:
    models = [torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(4)]
    save(models, Path("a.pth"))
    for index, model in enumerate(models):
        assert_same_tensors(cs.open("a.pth", str(index)), model.state_dict())
    assert ckpt("ls", "a.pth").code == 0
    assert "2 state dicts could be meant: 0, 1" in ckpt("convert", "a.pth", "b.pth").err


ARRAYS = {
    "float32": np.arange(6, dtype="f4").reshape(2, 3),
    "column-major": np.asfortranarray(np.arange(24).reshape(2, 3, 4)),
    "big-endian": np.arange(5, dtype=">i4"),
    "complex": np.array([1 + 2j, 3 - 4j]),
    "scalar array": np.array(3.5),
    "empty": np.zeros((0, 4), dtype="f8"),
    "half": np.arange(4, dtype="f2"),
    "bool": np.array([True, False]),
    "bytes that are no text": np.array([0xC3, 0xA9, 0xFF], dtype="u1"),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_are_tensors_where_there_are_no_others(save: Save, form: str) -> None:
    array = ARRAYS[form]
    save({"w": array}, Path("a.pth"))
    assert_same_tensor(cs.open("a.pth")["w"].read(), torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))


def test_arrays_and_scalars_among_the_rest(save: Save) -> None:
    """Scalars are plain numbers; arrays are kept as tensors, and that is said; text and objects are not kept."""
    extras = {
        "best": np.float64(3.5),
        "half": np.float16(0.5),
        "step": np.int64(-3),
        "flag": np.bool_(True),
        "z": np.complex128(1 + 2j),
        "name": np.str_("née"),
        "mean": np.arange(3, dtype="f4"),
        "labels": np.array(["a", "b"]),
        "objects": np.array([{}, 1], dtype=object),
    }
    save({"state_dict": {"w": torch.ones(2)}, **extras}, Path("a.pth"))
    found = cs.open("a.pth").extras
    assert [found[key] for key in ("best", "half", "step", "flag", "z", "name")] == [3.5, 0.5, -3, True, 1 + 2j, "née"]
    assert [type(found[key]) for key in ("best", "step", "flag")] == [float, int, bool]
    written = cs.convert("a.pth", "b.pth", keep_extras=True)
    got = torch.load("b.pth", weights_only=True)
    assert_same_tensor(got["mean"], torch.arange(3.0))
    assert got["best"] == 3.5
    assert written.lost == (
        "mean (numpy.ndarray; a tensor in its place)",
        "labels (numpy.ndarray)",
        "objects (numpy.ndarray)",
    )


class Settings(dict):
    pass


def test_containers_of_the_standard_library_among_the_rest(save: Save) -> None:
    """What weights_only knows stays itself; dicts of other classes become dicts, and that is said."""
    counts: defaultdict[str, int] = defaultdict(int, a=1)
    extras = {
        "milestones": Counter({30: 1, 60: 2}),
        "seen": counts,
        "raw": bytearray(b"\x00\xff"),
        "blob": b"\x00\xff",
        "names": {"a", "b"},
        "order": OrderedDict(b=1, a=2),
        "hparams": Settings(lr=0.1, layers=[1, 2]),
        "none": None,
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "path": Path("x"),
    }
    save({"state_dict": {"w": torch.ones(2)}, **extras}, Path("a.pth"))
    written = cs.convert("a.pth", "b.pth", keep_extras=True)
    got = torch.load("b.pth", weights_only=True)
    for key in set(extras) - {"path", "seen", "hparams"}:
        assert (got[key], type(got[key])) == (extras[key], type(extras[key]))
    assert got["seen"] == {"a": 1}
    assert got["hparams"] == {"lr": 0.1, "layers": [1, 2]}
    assert len(written.lost) == 2
    assert written.lost[0].endswith(".Settings; a dict in its place)")
    assert written.lost[1].startswith("path (pathlib.")


def test_frozen_parameters_are_told_and_stay_frozen(ckpt: Any) -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    torch.save({"w": frozen, "v": torch.nn.Parameter(torch.ones(2))}, "a.pth")
    rows = ckpt("ls", "a.pth", "--json").json["tensors"]
    assert [(row["role"], row["requires_grad"]) for row in rows] == [("parameter", False), ("parameter", True)]
    assert "frozen parameter" in ckpt("ls", "a.pth").out
    torch.save({"state_dict": {"x": torch.ones(1)}, "ema": {"w": frozen}}, "b.pth")
    cs.convert("b.pth", "c.pth", select="state_dict", keep_extras=True)
    kept = torch.load("c.pth", weights_only=True)["ema"]["w"]
    assert isinstance(kept, torch.nn.Parameter)
    assert not kept.requires_grad


def test_buffers_are_told_by_the_names_that_are_always_buffers(ckpt: Any) -> None:
    torch.save(torch.nn.BatchNorm1d(3).state_dict(), "a.pth")
    rows = {row["key"]: row["role"] for row in ckpt("ls", "a.pth", "--json").json["tensors"]}
    buffers = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"), "buffer")
    assert rows == {"weight": "tensor", "bias": "tensor", **buffers}


def test_modules_of_torch_fx_are_their_state_dicts(save: Save) -> None:
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)))
    save({"epoch": 1, "model": graph}, Path("a.pth"))
    assert_same_tensors(cs.open("a.pth"), graph.state_dict())


class Holder(torch.nn.Module):
    """A model with one quantised and one ordinary buffer."""

    def __init__(self, quantized: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("q", quantized)
        self.register_buffer("w", torch.zeros(2))


def test_quantised_tensors_go_into_models_of_their_own_kind_alone() -> None:
    want = per_tensor()
    torch.save({"q": want, "w": torch.ones(2)}, "a.pth")
    model = Holder(torch.quantize_per_tensor(torch.zeros(2, 3), 0.5, 1, torch.qint8))
    figures = {row.key: row.values for row in cs.diff("a.pth", model, values=True).rows}
    assert figures["q"].max_abs == float(want.dequantize().abs().max())
    cs.load_into(model, "a.pth")
    assert_same_quantized(model.q, want)
    assert cs.diff("a.pth", model, values=True).same
    with pytest.raises(cs.PlanError, match="'q' is qint8 in the checkpoint and float32 in the model"):
        cs.load_into(Holder(torch.zeros(2, 3)), "a.pth")
    torch.save({"w": torch.ones(2)}, "b.pth")
    with pytest.raises(cs.PlanError, match="'q' of the Holder is quantised .qint8., and cannot be initialised here"):
        cs.remap("b.pth", "c.pth", to=model, missing="init")
    written = cs.remap("b.pth", "c.pth", to="a.pth", missing="init")
    assert written.tensors == 2
    assert_same_quantized(torch.load("c.pth", weights_only=True)["q"], want)


def test_nothing_is_loaded_when_one_tensor_has_no_bytes() -> None:
    torch.save({"w": torch.ones(2), "q": torch.ones(2, 3).to_sparse()}, "a.pth")
    model = Holder(torch.zeros(2, 3))
    with pytest.raises(cs.PlanError, match="'q' is a sparse tensor"):
        cs.load_into(model, "a.pth")
    assert model.w.tolist() == [0, 0]


class WithAttribute(torch.nn.Module):
    """A model that keeps a tensor which is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.anchors = [torch.ones(3), {"x": torch.zeros(2)}]


def test_tensors_of_a_module_that_its_state_dict_lacks_are_told(ckpt: Any) -> None:
    model = torch.nn.Sequential(WithAttribute())
    torch.save(model, "a.pth")
    assert_same_tensors(cs.open("a.pth"), model.state_dict())
    words = "its tensors at 0.anchors are neither parameters nor buffers"
    assert f"note: {words}" in ckpt("ls", "a.pth").out
    assert words in ckpt("ls", "a.pth", "--json").json["remarks"][0]
    assert f"warning: {words}" in ckpt("convert", "a.pth", "b.pth").err


def test_a_module_of_packed_weights_alone_is_refused(save: Save, ckpt: Any) -> None:
    """A dynamically quantised layer packs its weight into an object, which a whole pickled module hides."""
    from torch.ao.nn.quantized.dynamic import Linear

    save(torch.nn.Sequential(Linear(4, 3)), Path("a.pth"))
    ran = ckpt("convert", "a.pth", "b.pth")
    assert (ran.code, Path("b.pth").exists()) == (2, False)
    assert "holds a module without parameters and buffers; its tensors at 0._packed_params" in ran.err


def test_tensors_without_bytes_are_compared_by_their_parts(ckpt: Any) -> None:
    torch.save({"s": torch.eye(3).to_sparse(), "w": torch.ones(2)}, "a.pth")
    torch.save({"s": torch.eye(3).to_sparse(), "w": torch.ones(2)}, "b.pth")
    torch.save({"s": (2 * torch.eye(3)).to_sparse(), "w": torch.ones(2)}, "c.pth")
    assert ckpt("diff", "a.pth", "b.pth", "--values").code == 0
    ran = ckpt("diff", "a.pth", "c.pth", "--values")
    assert ran.code == 1
    assert "values: 1 of 2 tensors equal" in ran.out


def test_a_reference_is_an_array_where_numpy_asks() -> None:
    torch.save({"w": torch.arange(6.0).view(2, 3)}, "a.pth")
    assert np.asarray(cs.open(b"a.pth")["w"]).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tied_packed_floats_share_a_tensor_in_a_state_dict() -> None:
    packed = torch.arange(16, dtype=torch.uint8).view(4, 4).view(torch.float4_e2m1fn_x2)
    torch.save({"a": packed, "b": packed, "c": torch.ones(2, 3)}, "a.pth")
    state = cs.open("a.pth").state_dict()
    assert state["a"].data_ptr() == state["b"].data_ptr()
    assert_same_tensor(state["b"].view(torch.uint8), packed.view(torch.uint8))


@pytest.mark.parametrize("size", [(8 << 20) + extra for extra in (-4, 0, 4, 8, 4096)])
def test_compressed_records_of_any_size_are_read(size: int) -> None:
    """A decompressor may hold back the last bytes when it has taken in all of the packed ones."""
    for fill in (0.0, 1.0):
        want = torch.full((size // 4,), fill)
        torch.save({"w": want}, "a.pth")
        with zipfile.ZipFile("a.pth") as old, zipfile.ZipFile("b.pth", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        assert_same_tensor(cs.open("b.pth")["w"].read(), want)

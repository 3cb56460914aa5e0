"""Torch zips and legacy files, written by torch itself, are opened without it and read bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensor, assert_same_tensors, save_legacy

import ckptsurgeon as cs

Save = Callable[[object, Path], None]


def save_zip(obj: object, path: Path) -> None:
    torch.save(obj, path)


KINDS = {
    "zip": save_zip,
    **{f"zip-protocol-{n}": (lambda obj, path, n=n: torch.save(obj, path, pickle_protocol=n)) for n in (3, 4, 5)},
    **{f"legacy-protocol-{n}": (lambda obj, path, n=n: save_legacy(obj, path, n)) for n in (2, 3, 4, 5)},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def save(request: pytest.FixtureRequest) -> Save:
    return request.param


FORMS = {
    "plain": lambda: torch.randn(3, 4),
    "scalar": lambda: torch.tensor(3.5),
    "integer scalar": lambda: torch.tensor(7),
    "no elements": lambda: torch.empty(0, 5),
    "no dimension is long": lambda: torch.randn(1, 1, 1),
    "slice of a larger storage": lambda: torch.randn(100, 4)[40:43],
    "transposed": lambda: torch.randn(5, 6).t(),
    "channels last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "every second": lambda: torch.randn(20)[::2],
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "parameter": lambda: torch.nn.Parameter(torch.randn(2, 3)),
    "bfloat16": lambda: torch.randn(9).bfloat16(),
    "float16": lambda: torch.randn(9).half(),
    "float64": lambda: torch.randn(9).double(),
    "int8": lambda: torch.arange(9, dtype=torch.int8),
    "uint8": lambda: torch.arange(9, dtype=torch.uint8),
    "int16": lambda: torch.arange(9, dtype=torch.int16),
    "int32": lambda: torch.arange(9, dtype=torch.int32),
    "bool": lambda: torch.tensor([True, False, True]),
    "complex64": lambda: torch.randn(3, dtype=torch.complex64),
    "complex128": lambda: torch.randn(3, dtype=torch.complex128),
    "nan": lambda: torch.tensor([float("nan"), -0.0, float("inf")]),
}
NEW_DTYPES = {
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_tensor_is_read_as_torch_reads_it(save: Save, form: str) -> None:
    want = FORMS[form]()
    save({"w": want}, Path("a.pth"))
    ref = cs.open("a.pth")["w"]
    assert ref.shape == tuple(want.shape)
    assert ref.dtype.name == str(want.dtype).removeprefix("torch.")
    assert_same_tensor(ref.read(), want.detach())


@pytest.mark.parametrize("dtype", NEW_DTYPES)
def test_dtypes_that_have_no_storage_class(dtype: str) -> None:
    want = torch.arange(5).to(torch.float32).to(NEW_DTYPES[dtype])
    torch.save({"w": want}, "a.pth")
    assert_same_tensor(cs.open("a.pth")["w"].read(), want)


def test_names_on_one_storage_are_tied(save: Save) -> None:
    shared = torch.randn(4, 4)
    save({"a": shared, "b": shared, "c": torch.randn(4, 4), "row": shared[1]}, Path("a.pth"))
    ckpt = cs.open("a.pth")
    assert ckpt.tied() == (("a", "b"),)
    assert_same_tensor(ckpt["row"].read(), shared[1])


def test_empty_tensors_are_never_tied(save: Save) -> None:
    save({"a": torch.empty(0), "b": torch.empty(0)}, Path("a.pth"))
    assert cs.open("a.pth").tied() == ()


def test_views_of_one_flat_storage_keep_their_own_values(save: Save) -> None:
    """As cuDNN leaves the weights of an LSTM."""
    flat = torch.arange(24.0)
    state = OrderedDict(w=flat[:12].view(3, 4), b=flat[12:16], u=flat[16:].view(2, 4))
    save(state, Path("a.pth"))
    ckpt = cs.open("a.pth")
    assert_same_tensors(ckpt, state)
    assert ckpt["b"].stored.nbytes == 96
    assert ckpt["b"].nbytes == 16


def test_versions_are_read_from_the_state_dict(save: Save) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    save(model.state_dict(), Path("a.pth"))
    ckpt = cs.open("a.pth")
    assert ckpt.versions == {key: dict(entry) for key, entry in model.state_dict()._metadata.items()}
    assert ckpt.versions["1"] == {"version": 2}


def test_a_device_tag_never_matters() -> None:
    """A file saved on `cuda:1`, made by changing the tag in a legacy file's pickle."""
    want = torch.randn(3)
    save_legacy({"w": want}, "a.pth")
    raw = Path("a.pth").read_bytes()
    tag = b"X\x03\x00\x00\x00cpu"
    assert raw.count(tag) == 1
    Path("b.pth").write_bytes(raw.replace(tag, b"X\x06\x00\x00\x00cuda:1"))
    ref = cs.open("b.pth")["w"]
    assert ref.stored.device == "cuda:1"
    assert_same_tensor(ref.read(), want)


def test_a_storage_that_is_a_view_of_another() -> None:
    """As torch wrote them before 0.4: the persistent id names a part of a storage; by editing its pickle."""
    save_legacy({"w": torch.arange(6.0)[:3]}, "a.pth")
    raw = Path("a.pth").read_bytes()
    assert raw.count(b"K\x06Nt") == 1
    for view, want in ((b"(U\x01vK\x02K\x03tt", [2.0, 3.0, 4.0]), (b"(U\x01vK\x00K\x06tt", [0.0, 1.0, 2.0])):
        Path("b.pth").write_bytes(raw.replace(b"K\x06Nt", b"K\x06" + view))
        assert cs.open("b.pth")["w"].read().tolist() == want
    for view in (b"(U\x01vK\x04K\x03tt", b"K\x05t"):
        Path("b.pth").write_bytes(raw.replace(b"K\x06Nt", b"K\x06" + view))
        with pytest.raises(cs.InputError, match="a storage view"):
            cs.open("b.pth")


def test_a_legacy_pickle_larger_than_the_first_look() -> None:
    """Over 1 MiB of keys: the reader looks again, further."""
    want = {f"layers.{i}.{'x' * 400}.weight": torch.full((2,), float(i)) for i in range(3000)}
    save_legacy(want, "a.pth")
    assert_same_tensors(cs.open("a.pth"), want)


def test_the_suffix_says_nothing(save: Save) -> None:
    for name in ("weights", "dp.pth.tar", "UPPER.PTH", "a.safetensors"):
        save({"w": torch.ones(2)}, Path(name))
        assert list(cs.open(name)) == ["w"]


def test_a_file_that_changed_is_not_read(save: Save) -> None:
    save({"w": torch.ones(2)}, Path("a.pth"))
    ref = cs.open("a.pth")["w"]
    save({"w": torch.zeros(2), "v": torch.zeros(2)}, Path("a.pth"))
    with pytest.raises(cs.InputError, match=r"a\.pth.*changed since it was opened"):
        ref.read()


def test_a_whole_pickled_module_is_its_state_dict(save: Save) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.LSTM(3, 4))
    model[1].register_buffer("scratch", torch.ones(3), persistent=False)
    save({"epoch": 3, "net": model}, Path("a.pth"))
    ckpt = cs.open("a.pth")
    assert ckpt.origin.selected == "net"
    assert_same_tensors(ckpt, model.state_dict())
    roles = {key: "parameter" for key, _ in model.named_parameters()} | dict.fromkeys(
        dict(model.named_buffers()), "buffer"
    )
    assert {key: ref.role for key, ref in ckpt.items()} == {key: roles[key] for key in ckpt}
    cs.convert("a.pth", "b.pth")
    assert {type(value) for value in torch.load("b.pth", weights_only=True).values()} == {torch.Tensor}


def test_tensors_of_their_own_class_or_with_attributes_are_tensors(save: Save) -> None:
    """`nn.Buffer`, and a tensor on which somebody set an attribute."""
    tagged = torch.randn(3)
    tagged.tag = "mine"
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(2, 2)
    model.table = torch.nn.Buffer(torch.randn(4))
    save({"w": torch.ones(2), "tagged": tagged}, Path("a.pth"))
    assert_same_tensor(cs.open("a.pth")["tagged"].read(), tagged)
    save(model, Path("b.pth"))
    assert_same_tensors(cs.open("b.pth"), model.state_dict())


def test_a_view_that_repeats_its_storage_without_measure_is_refused() -> None:
    torch.save({"e": torch.zeros(1).expand(1 << 40)}, "a.pth")
    with pytest.raises(cs.InputError, match="a view of 4398046511104 bytes on a storage of 4"):
        cs.open("a.pth")


def test_deflated_members_and_other_root_names_are_read() -> None:
    """An archive that somebody packed again with zip."""
    import zipfile

    want = {"w": torch.randn(200, 30), "t": torch.randn(9, 7).t()}
    torch.save(want, "a.pth")
    with zipfile.ZipFile("a.pth") as old, zipfile.ZipFile("b.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr("other name/" + name.partition("/")[2], old.read(name))
    assert_same_tensors(cs.open("b.pth"), want)


def test_big_endian_archives_are_read() -> None:
    import zipfile

    want = {"w": torch.randn(5), "i": torch.arange(3), "c": torch.randn(2, dtype=torch.complex64)}
    torch.save(want, "a.pth")
    with zipfile.ZipFile("a.pth") as old, zipfile.ZipFile("b.pth", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            if "/data/" in name:
                width = {20: 4, 24: 8, 16: 4}[len(data)]
                data = b"".join(data[i : i + width][::-1] for i in range(0, len(data), width))
            new.writestr(name, data)
    assert_same_tensors(cs.open("b.pth"), want)

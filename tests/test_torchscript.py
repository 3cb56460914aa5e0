"""TorchScript archives hold the state dict that `torch.jit.load(…).state_dict()` gives: keys, order and bytes."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_never_crashes, assert_same_tensors

import ckptsurgeon as cs
from ckptsurgeon.inert import Opaque

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Lite Interpreter"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage:UserWarning"),
]


class Inner(torch.nn.Module):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.register_buffer("late", torch.randn(size))
        self.linear = torch.nn.Linear(size, size)
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.scale = torch.nn.Parameter(torch.randn(size))
        self.register_parameter("absent", None)
        self.plain = torch.randn(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + self.late + self.scratch[0] + self.plain[0]


class Outer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = Inner()
        self.again = self.a
        self.list = torch.nn.ModuleList([Inner(), torch.nn.BatchNorm1d(3), torch.nn.Sequential(Inner(), Inner())])
        self.weight = torch.nn.Parameter(torch.randn(3).double())
        self.names = ["a", "b"]
        self.table = {"k": torch.randn(2)}
        self.sizes = [1, 2, 3]
        self.rates = [0.5]
        self.flags = [True]
        self.tensors = torch.jit.Attribute([torch.randn(1)], list[torch.Tensor])
        self.pair = (1, 2.5)
        self.quoted = 'a "quoted"\n\\text'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.list:
            x = module(x)
        x = self.a(self.again(x)) * self.weight.float() * self.pair[1]
        return x + self.table["k"][0] + len(self.names) + self.sizes[0] + self.tensors[0]


def tied() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def lists() -> torch.nn.Module:
    class Lists(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.randn(2), torch.randn(3)])
            self.by_name = torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2), "y": torch.nn.ReLU()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = x + weight[0]
            return self.by_name["x"](x)

    return Lists()


def bare() -> torch.nn.Module:
    """A module without methods, as the archives of C++'s `torch::save` hold."""
    model = torch.nn.Module()
    model.register_parameter("bias", torch.nn.Parameter(torch.randn(2)))
    model.register_buffer("steps", torch.tensor(3))
    model.register_module("0", torch.nn.Module())
    getattr(model, "0").register_parameter("weight", torch.nn.Parameter(torch.randn(2, 2)))
    return model


MODELS: dict[str, Callable[[], torch.jit.ScriptModule]] = {
    "scripted": lambda: torch.jit.script(Outer()),
    "traced": lambda: torch.jit.trace(
        torch.nn.Sequential(Inner(), torch.nn.BatchNorm1d(3), Inner()).eval(), torch.randn(5, 3)
    ),
    "traced lstm": lambda: torch.jit.trace(torch.nn.LSTM(3, 4, 2), torch.randn(5, 1, 3)),
    "scripted lstm": lambda: torch.jit.script(torch.nn.LSTM(3, 4, 2, bidirectional=True)),
    "many classes of one name": lambda: torch.jit.trace(
        torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(i, i + 1)) for i in range(1, 9))), torch.randn(2, 1)
    ),
    "a shared parameter": lambda: torch.jit.script(tied()),
    "parameter list and module dict": lambda: torch.jit.script(lists()),
    "half precision": lambda: torch.jit.script(torch.nn.Linear(4, 4).bfloat16()),
    "without methods": lambda: torch.jit.script(bare()),
    "nothing in it": lambda: torch.jit.script(torch.nn.ReLU()),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> torch.jit.ScriptModule:
    return request.param()


def loaded(path: str) -> dict[str, torch.Tensor]:
    return torch.jit.load(path).state_dict()


def repacked(change: Callable[[str, bytes], bytes | None], source: str = "a.pt", method: int = 0) -> None:
    """The archive with its members changed, or left out for None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile("b.pt", "w", method) as new:
        for name in old.namelist():
            raw = change(name, old.read(name))
            if raw is not None:
                new.writestr(name, raw)


def test_every_module_is_its_state_dict_in_order_and_bit_for_bit(model: torch.jit.ScriptModule) -> None:
    model.save("a.pt")
    ckpt = cs.open("a.pt")
    assert ckpt.origin.format == "torchscript"
    assert ckpt.origin.selected == "."
    assert_same_tensors(ckpt, loaded("a.pt"))


def test_files_of_the_lite_interpreter_with_extra_files_deflated_and_renamed(model: torch.jit.ScriptModule) -> None:
    want = model.state_dict()
    model._save_for_lite_interpreter("lite.ptl")
    torch.jit.save(model, "a.pt", _extra_files={"note.txt": "data.pkl"})
    repacked(lambda name, raw: raw, method=zipfile.ZIP_DEFLATED)
    Path("a.pt").rename("other name.bin")
    for name in ("lite.ptl", "b.pt", "other name.bin"):
        assert_same_tensors(cs.open(name), want)


def test_a_module_used_twice_and_shared_parameters_are_tied() -> None:
    torch.jit.script(tied()).save("a.pt")
    assert cs.open("a.pt").tied() == (("0.weight", "1.weight"),)
    torch.jit.script(Outer()).save("b.pt")
    assert ("a.scale", "again.scale") in cs.open("b.pt").tied()


def test_parameters_are_told_from_buffers_and_attributes_become_data() -> None:
    torch.jit.script(Outer()).save("a.pt")
    ckpt = cs.open("a.pt")
    assert ckpt["a.scale"].role == "parameter"
    assert ckpt["a.late"].role == "buffer"
    fields = cs.inspect("a.pt").root.fields()
    assert fields["names"] == ["a", "b"]
    assert (fields["sizes"], fields["rates"], fields["flags"]) == ([1, 2, 3], [0.5], [True])
    assert fields["pair"] == (1, 2.5)
    assert fields["quoted"] == 'a "quoted"\n\\text'
    assert fields["tensors"][0].shape == (1,)
    assert list(fields["table"]) == ["k"]


def test_every_command_takes_it(ckpt: Any) -> None:
    torch.jit.script(Outer()).save("a.pt")
    assert ckpt("ls", "a.pt").code == 0
    tree = ckpt("ls", "--tree", "a.pt")
    assert "torchscript: __torch__" in tree.out
    assert "_parameters" in tree.out
    assert ckpt("convert", "a.pt", "b.pth").code == 0
    assert_same_tensors(torch.load("b.pth", weights_only=True), loaded("a.pt"))
    assert ckpt("diff", "a.pt", "b.pth").code == 0


def test_the_order_is_that_of_the_code_and_not_of_the_pickle() -> None:
    torch.jit.script(Inner()).save("a.pt")
    lines = (b"  late : Tensor\n", b"  scratch : Tensor\n")
    repacked(lambda name, raw: raw.replace(b"".join(lines), b"".join(lines[::-1])))
    assert list(cs.open("b.pt"))[:3] == ["scale", "scratch", "late"]
    assert_same_tensors(cs.open("b.pt"), loaded("b.pt"))


def _without_buffers(name: str, raw: bytes) -> bytes:
    return (
        b"".join(line for line in raw.splitlines(True) if b"__buffers__" not in line) if name.endswith(".py") else raw
    )


def test_without_a_list_of_buffers_every_other_tensor_is_one() -> None:
    """As torch before 1.6 wrote them; torch of today loads such a file without its buffers."""
    torch.jit.script(torch.nn.Sequential(torch.nn.BatchNorm1d(3), Inner())).save("a.pt")
    repacked(_without_buffers)
    assert set(cs.open("b.pt")) == {*loaded("a.pt"), "1.plain"}
    assert len(loaded("b.pt")) < len(loaded("a.pt"))


def test_a_quantised_buffer_and_packed_weights_stay_records(ckpt: Any) -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.ao.nn.quantized.dynamic.Linear(3, 3)
            self.norm = torch.nn.LayerNorm(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x))

    torch.jit.script(Mixed()).save("a.pt")
    assert_same_tensors(cs.open("a.pt"), loaded("a.pt"))
    torch.jit.script(Mixed().linear).save("b.pt")
    assert loaded("b.pt") == {}
    ran = ckpt("convert", "b.pt", "c.pth")
    assert (ran.code, ran.out) == (2, "")
    assert "b.pt: is a TorchScript module without parameters and buffers (quantised weights are packed)" in ran.err


def test_a_frozen_module_has_only_constants_and_says_so(ckpt: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval()
    torch.jit.freeze(torch.jit.script(model)).save("a.pt")
    assert loaded("a.pt") == {}
    ran = ckpt("convert", "a.pt", "b.pth")
    assert (ran.code, ran.out) == (2, "")
    assert "a.pt: is a frozen TorchScript module: its weights are nameless constants" in ran.err
    tree = ckpt("ls", "--tree", "a.pt")
    assert tree.code == 0
    assert "constants  tuple of 2: 2 tensors" in tree.out
    assert [ref.shape for ref in cs.open("a.pt", select="constants").values()] == [(3, 3), (3,)]


def edited(find: bytes, put: bytes, ends: str = ".py") -> Callable[[str, bytes], bytes]:
    return lambda name, raw: raw.replace(find, put) if name.endswith(ends) else raw


def left_out(ends: str) -> Callable[[str, bytes], bytes | None]:
    return lambda name, raw: None if name.endswith(ends) else raw


BAD: dict[str, tuple[Callable[[str, bytes], bytes | None], str]] = {
    "an attribute that the data lacks": (
        edited(b"  late : Tensor\n", b"  late : Tensor\n  more : Tensor\n"),
        "other attributes in its data than in its code: more",
    ),
    "an attribute that the code lacks": (edited(b"  late : Tensor\n", b""), "than in its code: late"),
    "an attribute declared twice": (
        edited(b"  late : Tensor\n", b"  late : Tensor\n  late : Tensor\n"),
        "has two attributes 'late'",
    ),
    "a class that the code lacks": (
        edited(b"class Linear(Module)", b"class Other(Module)"),
        "Linear is not in the archive's code",
    ),
    "a class declared twice": (edited(b"class Linear(", b"class Linear(Module):\nclass Linear("), "declared twice"),
    "a class that is none": (
        edited(b"class Linear(Module):", b"class Linear(A, B):"),
        "a class that torch does not write",
    ),
    "no code": (left_out(".py"), "is not in the archive's code"),
    "code that is no text": (edited(b"class", b"\xff"), "is no text"),
    "a storage that is missing": (left_out("/data/1"), "the storage '1' is missing from the archive"),
    "a storage of another size": (
        lambda name, raw: raw[:-4] if name.endswith("/data/0") else raw,
        "bytes, the pickle says",
    ),
    "constants that are no pickle": (edited(b"\x80", b"\xff", "constants.pkl"), "damaged a/constants.pkl"),
    "a pickle with more behind it": (
        lambda name, raw: raw + b"." * name.endswith("data.pkl"),
        "1 bytes follow the pickle",
    ),
    "a list without contents": (
        lambda name, raw: pickle.dumps(Opaquely(), 2) if name.endswith("data.pkl") else raw,
        "without its contents",
    ),
    "a module with the attribute of all": (
        lambda name, raw: raw.replace(b"late", b"_parameters").replace(b"X\x04\0\0\0_p", b"X\x0b\0\0\0_p"),
        "has an attribute that no module can have",
    ),
}


class Opaquely:
    """Pickles as a call of TorchScript's, without arguments."""

    def __reduce__(self) -> Any:
        from torch.jit._pickle import build_intlist

        return build_intlist, ()


@pytest.mark.parametrize("case", BAD)
def test_code_and_data_that_disagree_are_refused(case: str, ckpt: Any) -> None:
    change, words = BAD[case]
    torch.jit.script(Inner()).save("a.pt")
    repacked(change)
    ran = ckpt("ls", "b.pt")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("ckpt: error: b.pt: ")
    assert words in ran.err


def test_archives_with_doubled_or_many_roots_are_refused() -> None:
    torch.jit.script(Inner()).save("a.pt")
    with zipfile.ZipFile("a.pt") as old:
        members = {name: old.read(name) for name in old.namelist()}
    for more, words in (
        ({"other/data.pkl": b"\x80\2N."}, "holds 2 pickles named data.pkl"),
        ({"other/constants.pkl": b"\x80\2)."}, None),
    ):
        with zipfile.ZipFile("b.pt", "w") as new:
            for name, raw in {**members, **more}.items():
                new.writestr(name, raw)
        if words is None:
            assert_same_tensors(cs.open("b.pt"), loaded("a.pt"))
        else:
            with pytest.raises(cs.InputError, match=rf"^b\.pt: {words}"):
                cs.open("b.pt")


def test_code_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon.limits import Limits

    torch.jit.script(Inner()).save("a.pt")
    with pytest.raises(cs.InputError, match=r"^a\.pt: \d+ bytes of code as far as a/code/.*, over the limit of 500"):
        cs.inspect("a.pt", limits=Limits(code_bytes=500))


def test_a_file_that_is_cut_or_flipped_is_opened_or_refused_and_never_crashes() -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    raw = buffer.getvalue()
    assert_never_crashes(raw, 13)


def test_an_object_of_the_archive_is_a_record() -> None:
    torch.jit.script(Outer()).save("a.pt")
    root = cs.inspect("a.pt").root
    assert isinstance(root, Opaque)
    assert root.name.startswith("__torch__")

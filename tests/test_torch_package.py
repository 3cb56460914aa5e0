"""Archives of torch.package: pickles by their names in the archive, each with what torch would load."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_never_crashes, assert_same_tensors
from torch.package import PackageExporter, PackageImporter

import ckptsurgeon as cs

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.package"),
]


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.LSTM(3, 4))


def export(path: str = "a.pt", **objects: Any) -> None:
    """`model=…` becomes the pickle `model/model.pkl`; beside it lie a text and binary resource."""
    with PackageExporter(path) as exporter:
        exporter.extern("torch.**")
        for name, value in objects.items():
            exporter.save_pickle(name, f"{name}.pkl", value)
        exporter.save_text("notes", "a.txt", "hello")
        exporter.save_binary("notes", "a.bin", b"\0\1")
        exporter.save_source_string("code", "raise SystemExit")


def test_a_module_is_its_state_dict() -> None:
    model = network()
    export(model=model)
    ckpt = cs.open("a.pt")
    assert ckpt.origin.format == "torch-package"
    assert ckpt.origin.selected == "model/model.pkl"
    assert_same_tensors(ckpt, model.state_dict())
    assert_same_tensors(ckpt, PackageImporter("a.pt").load_pickle("model", "model.pkl").state_dict())
    assert ckpt["0.weight"].role == "parameter"


def test_a_state_dict_keeps_its_order_versions_and_ties(ckpt: Any) -> None:
    state = network().state_dict()
    state["again"] = state["0.weight"]
    export(state=state)
    found = cs.open("a.pt")
    assert_same_tensors(found, state)
    assert found.tied() == (("0.weight", "again"),)
    assert found.versions["1"] == {"version": 2}
    assert ckpt("convert", "a.pt", "b.pth").code == 0
    assert_same_tensors(torch.load("b.pth", weights_only=True), state)


def test_several_pickles_are_selected_by_their_names(ckpt: Any) -> None:
    """Two pickles may share a storage: it lies in the archive once."""
    one, two = network().state_dict(), {"a": {"w": torch.randn(3)}, "n": 3}
    export(one=one, two=two, three=one, four=[1, "x"])
    with pytest.raises(cs.AmbiguousError, match="one/one.pkl"):
        cs.open("a.pt")
    assert_same_tensors(cs.open("a.pt", select="one/one.pkl"), one)
    assert_same_tensors(cs.open("a.pt", select="three/three.pkl"), one)
    assert_same_tensors(cs.open("a.pt", select="two/two.pkl.a"), two["a"])
    assert list(cs.inspect("a.pt").root) == ["one/one.pkl", "two/two.pkl", "three/three.pkl", "four/four.pkl"]
    assert ckpt("ls", "a.pt").code == 0
    assert "four/four.pkl" in ckpt("ls", "--tree", "a.pt").out


def test_a_graph_module_is_its_state_dict() -> None:
    """torch.package stores it as a call, with the attributes of the module as the first argument."""
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    export(model=graph)
    assert_same_tensors(cs.open("a.pt"), graph.state_dict())


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> list[torch.jit.ScriptModule]:
    """Two script modules; torch saves them in packages only when this switch is off."""
    monkeypatch.setattr("torch.package.package_exporter._gate_torchscript_serialization", False)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    return [torch.jit.script(model), torch.jit.script(torch.nn.Linear(5, 4))]


def test_a_script_module_is_its_state_dict(scripts: list[torch.jit.ScriptModule], ckpt: Any) -> None:
    export(model=scripts[0])
    found = cs.open("a.pt")
    assert_same_tensors(found, scripts[0].state_dict())
    assert_same_tensors(found, PackageImporter("a.pt").load_pickle("model", "model.pkl").state_dict())
    assert (found["0.weight"].role, found["1.running_mean"].role) == ("parameter", "buffer")
    assert ckpt("verify", "a.pt").code == 0


def test_several_script_modules_share_their_code_and_storages(scripts: list[torch.jit.ScriptModule]) -> None:
    first, second = scripts
    export(model={"first": first, "second": second, "again": first})
    for name, script in (("first", first), ("second", second)):
        assert_same_tensors(cs.open("a.pt", select=f"model/model.pkl.{name}"), script.state_dict())
    root = cs.inspect("a.pt").root["model/model.pkl"]
    assert root["first"] is root["again"]


def test_a_frozen_script_module_hides_no_state_dict_beside_it() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.package.package_exporter._gate_torchscript_serialization", False)
        frozen = torch.jit.freeze(torch.jit.script(torch.nn.Linear(2, 2).eval()))
        state = {"w": torch.randn(3)}
        export(model={"script": frozen, **state})
    assert_same_tensors(cs.open("a.pt"), state)


def test_a_script_module_that_is_missing_is_an_error(scripts: list[torch.jit.ScriptModule], ckpt: Any) -> None:
    export(model=scripts[0])
    for gone in ("ts_code/0/data.pkl", "ts_code/0/constants.pkl"):
        repacked(drop(gone))
        ran = ckpt("ls", "b.pt")
        assert (ran.code, ran.out) == (2, "")
        assert "the script module '0' is missing from the archive" in ran.err


def test_a_pickle_of_any_name_is_found_by_its_bytes() -> None:
    """`save_pickle` takes any resource name; other binaries are left alone."""
    state = {"w": torch.ones(2)}
    with PackageExporter("a.pt") as exporter:
        exporter.extern("torch.**")
        exporter.save_pickle("weights", "net", state)
        for name, raw in (("a", b"\x80"), ("b", b"\x80\x03 and more"), ("c", b"\x80\x99."), ("d", b"")):
            exporter.save_binary("other", name, raw)
    found = cs.open("a.pt")
    assert found.origin.selected == "weights/net"
    assert_same_tensors(found, state)


def test_no_code_of_the_package_is_run() -> None:
    """The package's own source would end the process."""
    export(model=network())
    assert len(cs.open("a.pt")) > 0
    with pytest.raises(SystemExit):
        PackageImporter("a.pt").import_module("code")


def repacked(change: Callable[[str, bytes], bytes | None], more: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile("a.pt") as old, zipfile.ZipFile("b.pt", "w") as new:
        for name in old.namelist():
            raw = change(name, old.read(name))
            if raw is not None:
                new.writestr(name, raw)
        for name, raw in (more or {}).items():
            new.writestr(name, raw)


class Persistent:
    """Pickles as a persistent id."""

    def __init__(self, pid: Any) -> None:
        self.pid = pid


def with_id(pid: Any) -> bytes:
    import io

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Persistent) else None

    buffer = io.BytesIO()
    Pickler(buffer, 3).dump({"w": Persistent(pid)})
    return buffer.getvalue()


def same(name: str, raw: bytes) -> bytes:
    return raw


def drop(ends: str) -> Callable[[str, bytes], bytes | None]:
    return lambda name, raw: None if name.endswith(ends) else raw


BAD: dict[str, tuple[Callable[[str, bytes], bytes | None], dict[str, bytes], str]] = {
    "a storage that is missing": (drop("/.data/0.storage"), {}, "the storage '0' is missing from the archive"),
    "a storage of another size": (
        lambda name, raw: raw + b"x" * name.endswith("/.data/0.storage"),
        {},
        "bytes, the pickle says",
    ),
    "a damaged pickle": (same, {"a/m/x.pkl": b"\x80\4"}, "damaged a/m/x.pkl"),
    "a pickle with more behind it": (same, {"a/m/x.pkl": b"\x80\2N.N."}, "2 bytes follow the pickle in a/m/x.pkl"),
    "two packages": (same, {"b/.data/extern_modules": b""}, "holds 2 packages"),
    "an unknown persistent id": (same, {"a/m/x.pkl": with_id(("other", 1))}, "unknown kind 'other'"),
    "a call without a function": (same, {"a/m/x.pkl": with_id(("reduce_package", 1))}, "that torch does not write"),
    "a call without arguments": (same, {"a/m/x.pkl": with_id(("reduce_package", 1, print, 2))}, "does not write"),
    "a persistent id that is no tuple": (same, {"a/m/x.pkl": with_id(7)}, "a persistent id that torch does not write"),
    "no pickle at all": (drop(".pkl"), {}, "is a torch.package archive without a pickle"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_packages_are_refused(case: str, ckpt: Any) -> None:
    change, more, words = BAD[case]
    export(model=network())
    repacked(change, more)
    for command in (["ls", "b.pt"], ["convert", "b.pt", "c.pth"]):
        ran = ckpt(*command)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("ckpt: error: b.pt: ")
        assert words in ran.err


def test_old_forms_of_calls_are_records() -> None:
    """Without an id (before torch 1.10), and those of torch.deploy."""
    export(model={"w": torch.ones(2)})
    for pid in (("reduce_package", print, (1,)), ("reduce_deploy", print, (1,))):
        repacked(same, {"a/m/x.pkl": with_id(pid)})
        found = cs.inspect("b.pt").root["m/x.pkl"]["w"]
        assert (found.name, found.args) == ("builtins.print", (1,))


def test_a_package_that_is_cut_or_flipped_is_opened_or_refused_and_never_crashes() -> None:
    export(model=torch.nn.Linear(2, 2))
    raw = Path("a.pt").read_bytes()
    assert_never_crashes(raw, 17)

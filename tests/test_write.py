"""What is written is taken by torch and safetensors, strictly, bit for bit."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import leftovers
from helpers import KEY, assert_same_tensor, assert_same_tensors, save_legacy
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import state_dicts
from test_open_torch import FORMS, NEW_DTYPES

import ckptsurgeon as cs
from ckptsurgeon.formats import _torch_zip_layout

LOADS = {
    "plain": {"weights_only": True},
    "mmap": {"weights_only": True, "mmap": True},
}
EVERY = {
    **{name: make().detach() for name, make in FORMS.items()},
    **{name: torch.arange(5).float().to(dtype) for name, dtype in NEW_DTYPES.items()},
}


@pytest.mark.parametrize("how", LOADS)
def test_a_torch_zip_holds_every_form_and_torch_loads_it(how: str) -> None:
    torch.save(EVERY, "a.pth")
    cs.convert("a.pth", "b.pt")
    assert_same_tensors(torch.load("b.pt", **LOADS[how]), EVERY)
    assert list(torch.load("b.pt", map_location="meta")) == list(EVERY)
    with zipfile.ZipFile("b.pt") as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "archive/data.pkl"


def test_tensor_data_is_aligned_as_torch_aligns_it() -> None:
    torch.save(EVERY, "a.pth")
    cs.convert("a.pth", "b.pt")
    for ref in cs.open("b.pt").values():
        assert ref.source.offset % 64 == 0


def test_a_safetensors_file_holds_every_form_that_safetensors_knows() -> None:
    state = {key: value for key, value in EVERY.items() if key != "complex128"}
    torch.save(state, "a.pth")
    cs.convert("a.pth", "b.safetensors")
    assert_same_tensors(load_file("b.safetensors"), state, ordered=False)
    with safe_open("b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", KEY: file.metadata()[KEY]}


def test_a_dtype_that_the_format_cannot_hold_is_named_and_nothing_is_written() -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, "a.pth")
    with pytest.raises(cs.PlanError, match=r"safetensors has no dtype complex128: 'w' \[2\]"):
        cs.convert("a.pth", "b.safetensors")
    assert sorted(os.listdir(".")) == ["a.pth"]


@given(state_dicts())
def test_a_plan_of_no_rules_copies_the_bytes_between_all_kinds(state: dict[str, torch.Tensor]) -> None:
    torch.save(state, "zip.pth")
    save_legacy(state, "legacy.pth")
    for source in ("zip.pth", "legacy.pth"):
        cs.convert(source, "out.pth", force=True)
        cs.convert(source, "out.safetensors", force=True)
        assert_same_tensors(torch.load("out.pth", weights_only=True), state)
        assert_same_tensors(load_file("out.safetensors"), state, ordered=False)
        assert list(cs.open("out.safetensors")) == list(state)
        cs.convert("out.safetensors", "back.pth", force=True)
        assert_same_tensors(torch.load("back.pth", weights_only=True), state)


def test_ties_are_kept_in_torch_zips_and_written_in_full_in_safetensors() -> None:
    shared = torch.randn(3)
    torch.save({"a": shared, "b": shared, "c": shared.clone()}, "a.pth")
    cs.convert("a.pth", "b.pth")
    loaded = torch.load("b.pth", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["c"].data_ptr()
    cs.convert("a.pth", "b.safetensors")
    assert_same_tensors(load_file("b.safetensors"), {"a": shared, "b": shared, "c": shared})


def test_views_that_only_begin_alike_are_not_tied() -> None:
    """Equal offsets and strides, other shapes."""
    x = torch.arange(8.0)
    states = (
        {"a": x[:1].expand(2), "b": x[:1].expand(5)},
        {"a": x.as_strided((4, 2), (1, 3)), "b": x.as_strided((1, 3), (1, 3)), "c": x.as_strided((4, 1, 2), (1, 1, 3))},
    )
    for state in states:
        torch.save(state, "a.pth")
        cs.convert("a.pth", "b.pth", force=True)
        cs.convert("a.pth", "b.safetensors", force=True)
        assert_same_tensors(torch.load("b.pth", weights_only=True), state)
        assert_same_tensors(load_file("b.safetensors"), state)


def test_a_tensor_never_takes_the_name_of_a_kept_extra() -> None:
    for obj in (
        {"w": torch.ones(2), "epoch": 3},
        {"m": {"w": torch.ones(2), "epoch": 3}},
        [{"w": torch.ones(2), "epoch": 3}],
    ):
        torch.save(obj, "a.pth")
        with pytest.raises(cs.PlanError, match="'epoch' is a tensor now and something else in the source"):
            cs.remap("a.pth", "b.pth", ["w => epoch"], keep_extras=True)
        assert not os.path.exists("b.pth")
        cs.remap("a.pth", "c.pth", ["w => v"], keep_extras=True, force=True)
        got = torch.load("c.pth", weights_only=True)
        inner = got["m"] if "m" in got else got[0] if isinstance(got, list) else got
        assert plain(inner) == {"v": [1.0, 1.0], "epoch": 3}
        assert len(got) == (1 if inner is not got else 2)


def test_a_place_of_any_key_is_found_again() -> None:
    for key in (("net", 0), 0.5, 7, None):
        torch.save({key: {"w": torch.ones(2), "b": torch.ones(1)}, "epoch": 3}, "a.pth")
        cs.remap("a.pth", "b.pth", ["w => v"], keep_extras=True, force=True)
        got = torch.load("b.pth", weights_only=True)
        assert list(got) == [key, "epoch"]
        assert list(got[key]) == ["v", "b"]


def test_a_bundle_with_a_whole_optimizer_object_opens() -> None:
    """Its state is keyed by the parameters themselves."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for save in (torch.save, save_legacy):
        save({"state_dict": model.state_dict(), "optimizer": optimizer, "seen": {torch.ones(1)}}, "a.pth")
        assert_same_tensors(cs.open("a.pth"), model.state_dict())
        written = cs.convert("a.pth", "b.pth", keep_extras=True, force=True)
        assert [name.split(" ")[0] for name in written.lost] == ["optimizer", "seen"]


def test_a_copy_has_a_storage_of_its_own() -> None:
    torch.save({"a": torch.randn(3)}, "a.pth")
    cs.remap("a.pth", "b.pth", ["copy ^a$ => b", "copy ^a$ => c"])
    loaded = torch.load("b.pth", weights_only=True)
    assert len({value.data_ptr() for value in loaded.values()}) == 3


def test_the_versions_of_a_state_dict_are_carried_and_renamed() -> None:
    model = torch.nn.DataParallel(
        torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.ReLU())
    )
    torch.save(model.state_dict(), "a.pth")
    cs.remap("a.pth", "b.pth", ["strip module."])
    got, want = torch.load("b.pth", weights_only=True), model.module.state_dict()
    assert type(got) is OrderedDict
    assert dict(got._metadata) == dict(want._metadata)


EXTRAS = {
    "epoch": 3,
    "big": 2**70,
    "negative": -5,
    "loss": 0.25,
    "name": "réseau",
    "none": None,
    "flag": True,
    "tuple": (1, (2.5, "x"), (), (1, 2, 3, 4, 5)),
    "list": [1, [2, {"a": b"\x00\xff"}]],
    "set": {1, 2},
    "complex": 1 + 2j,
    "size": torch.Size([2, 3]),
    "device": torch.device("cuda", 1),
    "dtype": torch.bfloat16,
    "ordered": OrderedDict(z=1, a=2),
    "numbers": {0: "zero", 1: torch.arange(3)},
}


def test_kept_extras_are_the_sources_own_object() -> None:
    state = OrderedDict(w=torch.randn(2, 3))
    torch.save({"epoch": 3, "state_dict": state, **EXTRAS}, "a.pth")
    written = cs.remap("a.pth", "b.pth", ["w => v"], keep_extras=True)
    got = torch.load("b.pth", weights_only=True)
    assert list(got) == ["epoch", "state_dict", *[key for key in EXTRAS if key != "epoch"]]
    assert_same_tensors(got["state_dict"], {"v": state["w"]})
    assert_same_tensor(got["numbers"].pop(1), torch.arange(3))
    assert {key: value for key, value in got.items() if key != "state_dict"} == {
        **EXTRAS,
        "numbers": {0: "zero"},
    }
    assert type(got["ordered"]) is OrderedDict
    assert written.lost == ()


def test_without_keep_extras_the_file_is_the_flat_state_dict() -> None:
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, "a.pth")
    cs.convert("a.pth", "b.pth")
    assert list(torch.load("b.pth", weights_only=True)) == ["w"]


def test_opaque_extras_are_left_out_by_name() -> None:
    from argparse import Namespace

    torch.save(
        {"args": Namespace(lr=0.1), "deep": [1, Namespace()], "model": {"w": torch.ones(2)}, "epoch": 1}, "a.pth"
    )
    written = cs.convert("a.pth", "b.pth", keep_extras=True)
    assert written.lost == ("args (argparse.Namespace)", "deep.1 (argparse.Namespace; None in its place)")
    got = torch.load("b.pth", weights_only=True)
    assert list(got) == ["deep", "model", "epoch"]
    assert got["deep"] == [1, None]


def test_what_weights_only_refuses_is_left_out_wherever_it_is() -> None:
    from enum import Enum

    kind = Enum("Kind", "A", module=__name__)
    globals()["Kind"] = kind
    sd = OrderedDict(w=torch.ones(2))
    sd._metadata = OrderedDict({"": {"version": 1, "kind": kind.A}})
    torch.save({"set": {kind.A}, "keys": {(1, kind.A): 2, (1, 2): 3}, "sets": {frozenset({1})}, "model": sd}, "a.pth")
    written = cs.convert("a.pth", "b.pth", keep_extras=True)
    assert [name.split(" ")[0] for name in written.lost] == ["set", "keys.(1,", "sets", "model._metadata..kind"]
    got = torch.load("b.pth", weights_only=True)
    assert got["keys"] == {(1, 2): 3}
    assert got["model"]._metadata == {"": {"version": 1}}
    cs.convert("a.pth", "c.pth")
    assert torch.load("c.pth", weights_only=True)._metadata == {"": {"version": 1}}


def test_an_opaque_object_in_a_list_around_the_state_dict() -> None:
    run = Run()
    run.sd = {"w": torch.ones(2)}
    torch.save([run, 1], "a.pth")
    cs.convert("a.pth", "b.pth", keep_extras=True)
    assert plain(torch.load("b.pth", weights_only=True)) == [{"sd": {"w": [1.0, 1.0]}}, 1]


def test_initialised_ties_are_ties(tmp_path: Path) -> None:
    torch.save({}, "a.pth")
    spec = f"{Path(__file__).parent.parent}/fixtures/models.py:Tied"
    cs.remap("a.pth", "b.pth", to=spec, missing="init")
    got = torch.load("b.pth", weights_only=True)
    assert got["embed.weight"].data_ptr() == got["head.weight"].data_ptr()


def test_a_replaced_file_keeps_its_mode() -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    os.chmod("a.pth", 0o600)
    cs.convert("a.pth", "a.pth", force=True)
    assert os.stat("a.pth").st_mode & 0o777 == 0o600


def test_nested_and_listed_places_are_found_again() -> None:
    for obj, select in (
        ({"a": {"b": [1, {"model": {"w": torch.ones(2)}}]}, "c": 1}, "a.b.1.model"),
        ([{"w": torch.ones(2)}, 3], "0"),
        (({"w": torch.ones(2)}, {"epoch": 3}), "0"),
    ):
        torch.save(obj, "a.pth")
        assert cs.open("a.pth").origin.selected == select
        cs.convert("a.pth", "b.pth", keep_extras=True, force=True)
        assert plain(torch.load("b.pth", weights_only=True)) == plain(obj)


def plain(obj: object) -> object:
    """The same object with lists for tensors and dicts for OrderedDicts."""
    if isinstance(obj, dict):
        return {key: plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return type(obj)(plain(value) for value in obj)
    return obj.tolist() if isinstance(obj, torch.Tensor) else obj


class Run:
    """A training run that somebody pickled whole."""


def test_an_opaque_object_around_the_state_dict_is_named() -> None:
    run = Run()
    run.weights = {"w": torch.ones(2)}
    run.lr = 0.1
    torch.save(run, "a.pth")
    written = cs.convert("a.pth", "b.pth", keep_extras=True)
    assert written.lost == ("test_write.Run, the object around weights (a dict in its place)",)
    assert plain(torch.load("b.pth", weights_only=True)) == {"weights": {"w": [1.0, 1.0]}}


def test_state_dicts_with_other_items_keep_them() -> None:
    torch.save({"w": torch.ones(2), "epoch": 3, "sub._extra_state": {"calibrated": True}}, "a.pth")
    cs.convert("a.pth", "b.pth", keep_extras=True)
    got = torch.load("b.pth", weights_only=True)
    assert got["epoch"] == 3
    assert got["sub._extra_state"] == {"calibrated": True}


def test_extras_into_safetensors_is_a_usage_error_before_anything_is_written() -> None:
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, "a.pth")
    with pytest.raises(cs.UsageError, match=r"--keep-extras asks to keep epoch; write a \.pth"):
        cs.convert("a.pth", "b.safetensors", keep_extras=True)
    assert not Path("b.safetensors").exists()


def test_metadata_of_safetensors_is_kept() -> None:
    save_file({"w": torch.ones(2)}, "a.safetensors", metadata={"who": "me"})
    cs.remap("a.safetensors", "b.safetensors", ["w => v"])
    with safe_open("b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me", KEY: file.metadata()[KEY]}
    cs.remap("a.safetensors", "c.safetensors", ["w => v"], provenance=False)
    with safe_open("c.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_the_same_input_and_rules_give_the_same_bytes() -> None:
    torch.save({"state_dict": {"a": torch.randn(3), "b": torch.randn(4)}, "epoch": 3}, "a.pth")
    for suffix in ("pth", "safetensors"):
        outputs = [f"{name}.{suffix}" for name in ("one", "two")]
        for output in outputs:
            cs.remap("a.pth", output, ["a => c"], keep_extras=suffix == "pth")
        assert Path(outputs[0]).read_bytes() == Path(outputs[1]).read_bytes()


def test_a_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    torch.save({"stem.weight": torch.ones(8, 3, 3, 3)}, "a.pth")
    spec = f"{Path(__file__).parent.parent}/fixtures/models.py:Net"
    for name, seed in (("a1", 1), ("b1", 1), ("a2", 2)):
        cs.remap("a.pth", f"{name}.safetensors", to=spec, missing="init", seed=seed)
    assert Path("a1.safetensors").read_bytes() == Path("b1.safetensors").read_bytes()
    one, two = load_file("a1.safetensors"), load_file("a2.safetensors")
    assert not torch.equal(one["fc.weight"], two["fc.weight"])
    assert torch.equal(one["stem.weight"], two["stem.weight"])


def test_an_existing_output_is_refused_without_force() -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    Path("b.pth").write_text("mine")
    with pytest.raises(cs.OutputError, match=r"b\.pth: exists; --force"):
        cs.convert("a.pth", "b.pth")
    assert Path("b.pth").read_text() == "mine"
    cs.convert("a.pth", "b.pth", force=True)
    assert list(torch.load("b.pth", weights_only=True)) == ["w"]


def test_a_file_can_replace_itself() -> None:
    want = torch.randn(1000)
    torch.save({"w": want}, "a.pth")
    cs.remap("a.pth", "a.pth", ["w => v"], force=True)
    assert_same_tensors(torch.load("a.pth", weights_only=True), {"v": want})


def test_a_link_stays_and_its_file_is_replaced() -> None:
    os.mkdir("real")
    torch.save({"w": torch.ones(2)}, "real/a.pth")
    os.symlink("real/a.pth", "link.pth")
    cs.remap("link.pth", "link.pth", ["w => v"], force=True)
    assert os.path.islink("link.pth")
    assert list(torch.load("real/a.pth", weights_only=True)) == ["v"]


def test_a_source_that_changes_while_it_is_written_leaves_no_output() -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    plan = cs.plan("a.pth")
    Path("a.pth").write_bytes(b"other")
    with pytest.raises(cs.InputError, match="changed since it was opened"):
        cs.save(plan.result, "b.pth")
    assert sorted(os.listdir(".")) == ["a.pth"]
    assert not leftovers()


def test_memory_stays_flat_and_large_strided_tensors_are_gathered_in_cuts() -> None:
    """Cuts far smaller than the tensor give the bytes of the whole."""
    base = torch.arange(5 * 7 * 11 * 13, dtype=torch.int32).reshape(5, 7, 11, 13)
    for order in ((3, 2, 1, 0), (1, 0, 3, 2), (0, 3, 1, 2), (2, 3, 0, 1)):
        want = base.permute(order)
        torch.save({"w": want}, "a.pth")
        ref = cs.open("a.pth")["w"]
        blocks = [bytes(block) for block in ref.blocks(256)]
        assert len(blocks) > 1
        assert b"".join(blocks) == want.contiguous().numpy().tobytes()


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (3, 500), (64, 64)])
def test_a_large_transpose_reads_only_the_runs_that_it_needs(shape: tuple[int, int]) -> None:
    want = torch.arange(shape[0] * shape[1], dtype=torch.int16).reshape(shape).t()
    torch.save({"w": want, "wide": torch.zeros(50, 4000)[:, 7:9].t()}, "a.pth")
    for key, tensor in (("w", want), ("wide", torch.zeros(2, 50))):
        ref = cs.open("a.pth")[key]
        assert b"".join(bytes(block) for block in ref.blocks(256)) == tensor.contiguous().numpy().tobytes()


def test_more_members_than_a_plain_zip_can_count() -> None:
    """Over 65,535 records need the zip64 end record."""
    records = [_torch_zip_layout._Record("data.pkl", b"\x80\x02}.")]
    records += [_torch_zip_layout._Record(f"data/{i}", b"") for i in range(66_000)]
    layout = _torch_zip_layout._archive(records)
    Path("a.zip").write_bytes(b"".join(part for part in layout.parts if isinstance(part, bytes)))
    with zipfile.ZipFile("a.zip") as archive:
        assert len(archive.namelist()) == 66_001
    assert len(cs.inspect("a.zip").root) == 0


def test_a_tensor_over_four_gib_is_laid_out_as_zip64() -> None:
    """Five GiB that take no room: the archive is written by hand around a hole and read by zipfile and by us."""
    size = 5 << 30
    spec = cs.TensorSpec(cs.open(_sparse(size))["w"].dtype, (size,))
    source = cs.open("sparse.safetensors")
    assert source["w"].spec == spec
    layout, _ = cs_layout(source)
    at = 0
    with open("b.pth", "wb") as file:
        for part in layout.parts:
            if isinstance(part, bytes):
                file.seek(at)
                file.write(part)
            at += len(part) if isinstance(part, bytes) else part.nbytes
    assert os.path.getsize("b.pth") == layout.nbytes == at
    (big,) = [info for info in zipfile.ZipFile("b.pth").infolist() if info.filename.endswith("data/0")]
    assert big.file_size == size
    assert cs.open("b.pth")["w"].spec == spec
    assert torch.load("b.pth", map_location="meta")["w"].shape == (size,)


def _sparse(size: int) -> str:
    from helpers import safetensors_bytes

    header = f'{{"w":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    Path("sparse.safetensors").write_bytes(safetensors_bytes(header))
    os.truncate("sparse.safetensors", 8 + len(header) + size)
    return "sparse.safetensors"


def cs_layout(source: cs.Checkpoint) -> tuple[object, list[str]]:
    from ckptsurgeon import formats

    files, lost = formats.files(source, formats.output("x.pth"))
    return files[0][1], lost

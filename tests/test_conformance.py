"""What is true of every kind of checkpoint; a new kind gets all of it by its line in `kinds.KINDS`."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import leftovers
from faulty import tree
from helpers import assert_same_tensors, bits
from hypothesis import given, reject, settings
from kinds import KINDS, CannotHold, Kind, State, bundle, files
from safetensors.torch import load_file
from strategies import state_dicts
from test_open_torch import FORMS, NEW_DTYPES

import ckptsurgeon as cs

FORMS_OF_TENSORS = OrderedDict(
    (f"layer.w_{name.replace(' ', '_')}", make) for name, make in {**FORMS, **NEW_DTYPES}.items()
)
numbers = itertools.count()


def every() -> OrderedDict[str, torch.Tensor]:
    """One tensor of every form and dtype."""
    return OrderedDict(
        (key, torch.arange(5).float().to(make) if isinstance(make, torch.dtype) else make().detach())
        for key, make in FORMS_OF_TENSORS.items()
    )


def small() -> OrderedDict[str, torch.Tensor]:
    return OrderedDict({"a.w": torch.randn(3, 5), "a.n": torch.arange(4), "b.t": torch.randn(4, 6).t()})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that asks for a `kind` is run on all of them."""
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def made(kind: Kind, state: State) -> Path:
    """The state dict in a new file of this kind, beside nothing else."""
    return kind.save(state, Path(f"made-{next(numbers)}") / "a")


def in_order(kind: Kind, state: State, path: Path) -> OrderedDict[str, torch.Tensor]:
    keys = kind.order(state, path)
    assert sorted(keys) == sorted(state)
    return OrderedDict((key, state[key]) for key in keys)


def groups(state: State, keys: list[str]) -> set[frozenset[str]]:
    """Names of one tensor object; without elements nothing is shared."""
    found: dict[int, list[str]] = {}
    for key in keys:
        if state[key].numel():
            found.setdefault(id(state[key]), []).append(key)
    return {frozenset(group) for group in found.values() if len(group) > 1}


def test_every_form_is_read_in_order_and_bit_for_bit(kind: Kind) -> None:
    state = kind.holding(every())
    assert len(state) >= 8
    path = made(kind, state)
    found = cs.open(path)
    assert found.origin.format == kind.format
    assert_same_tensors(found, in_order(kind, state, path))


def test_a_dtype_that_is_said_not_to_be_held_is_not_held(kind: Kind) -> None:
    """So that the column of the table cannot hide a form that should have been tested."""
    lacking = {key: value for key, value in every().items() if not kind.can_hold(value.dtype)}
    assert len(lacking) <= 9
    for key, value in lacking.items():
        with pytest.raises((KeyError, cs.PlanError)):
            made(kind, {key: value})


@settings(max_examples=15, deadline=None)
@given(state=state_dicts())
def test_any_state_dict_is_read_as_it_was_saved(kind: Kind, state: dict[str, torch.Tensor]) -> None:
    state = kind.holding(state)
    try:
        path = made(kind, state)
    except CannotHold:
        reject()
    found = cs.open(path)
    want = in_order(kind, state, path)
    assert_same_tensors(found, want)
    assert set(map(frozenset, found.tied())) == (groups(state, list(want)) if kind.ties else set())


def test_names_of_one_tensor_are_tied_and_equal_tensors_are_not(kind: Kind) -> None:
    shared = torch.randn(4, 6)
    state = OrderedDict({"a.w": shared, "b.w": torch.randn(3), "c.w": shared, "d.w": shared.clone()})
    path = made(kind, state)
    found = cs.open(path)
    assert_same_tensors(found, in_order(kind, state, path))
    assert set(map(frozenset, found.tied())) == ({frozenset({"a.w", "c.w"})} if kind.ties else set())


def test_views_of_one_storage_keep_their_own_values(kind: Kind) -> None:
    flat = torch.arange(24.0)
    state = OrderedDict(
        {"r.w": flat[:12].view(3, 4), "r.b": flat[12:16], "r.over": flat[10:14], "r.t": flat.view(4, 6).t()}
    )
    path = made(kind, state)
    assert_same_tensors(cs.open(path), in_order(kind, state, path))
    assert cs.open(path).tied() == ()


def test_module_versions_are_kept_where_the_kind_has_them(kind: Kind) -> None:
    state = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)).state_dict()
    want = {prefix: dict(entry) for prefix, entry in state._metadata.items()} if kind.versions else {}
    assert cs.open(made(kind, state)).versions == want


def test_what_lies_beside_the_state_dict_is_kept_where_the_kind_has_it(kind: Kind) -> None:
    path = made(kind, small())
    if not kind.extras:
        assert not cs.open(path).extras
        return
    assert cs.open(path).origin.selected == "state_dict"
    assert cs.convert(path, "out.ckpt", keep_extras=True).lost == ()
    got, want = torch.load("out.ckpt", weights_only=True), bundle(small())
    assert list(got) == list(want)
    for name in ("epoch", "global_step", "loops", "optimizer_states", "hyper_parameters", "callbacks"):
        assert got[name] == want[name]
    assert_same_tensors(got["state_dict"], cs.open(path).state_dict())


def test_opening_reads_the_header_and_nothing_else(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the system calls, on 24 MB of random bits, which no compression makes less of."""
    state = OrderedDict((f"l{i}.w", torch.randint(1 << 30, (1 << 21,), dtype=torch.int32)) for i in range(3))
    path = made(kind, state)
    size = sum(file.stat().st_size for file in files(path))
    assert size > 20e6
    read = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            nonlocal read
            got = call(*args)
            read += got if isinstance(got, int) else len(got)
            return got

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("pread", "preadv", "read", "readv"):
            patch.setattr(os, name, counted(getattr(os, name)))
        found = cs.open(path)
    assert found.nbytes == 3 << 23
    assert 0 < read < len(files(path)) * kind.header < size / 15


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """What torch or safetensors loads of a file; of shards, of all of them."""
    if not path.is_dir():
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)
    parts = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    assert len({key for part in parts for key in part}) == sum(map(len, parts))
    return {key: value for part in parts for key, value in part.items()}


OUTPUTS: dict[str, dict[str, Any]] = {
    "out.pth": {},
    "out.safetensors": {},
    "out": {"shard_size": 64},
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_it_is_converted_to_is_loaded_by_others_bit_for_bit(kind: Kind, output: str) -> None:
    state = kind.holding(every())
    if output != "out.pth":
        state.pop("layer.w_complex128", None)
    path = made(kind, state)
    written = cs.convert(path, output, **OUTPUTS[output])
    assert written.tensors == len(state)
    assert_same_tensors(loaded(Path(output)), in_order(kind, state, path), ordered=output == "out.pth")
    if output == "out":
        assert len(written.files) > 3
        assert Path("out/model.safetensors.index.json").exists()


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_same_input_gives_the_same_bytes(kind: Kind, output: str) -> None:
    path = made(kind, small())
    outputs = []
    for name in ("one", "two"):
        place = Path(output.replace("out", name))
        cs.convert(path, place, **OUTPUTS[output])
        outputs.append([(file.name, file.read_bytes()) for file in files(place)])
    assert [raw for _, raw in outputs[0]] == [raw for _, raw in outputs[1]]
    assert len(outputs[0]) == (1 if output != "out" else len(small()) + 1)


_MARKS = re.compile(rb"PK[\1-\10][\1-\10]|\x80[\2-\5]|[{},]|ustar|\0{8}(?=[^\0])")


def cuts(raw: bytes, most: int = 40) -> list[int]:
    """Places to cut a file: its ends, even steps, and where something begins or ends in it."""
    chance = random.Random(len(raw))
    marks = [at for mark in _MARKS.finditer(raw) for at in (mark.start(), mark.end())]
    chosen = {0, 1, 8, 9, len(raw) // 2, len(raw) - 22, len(raw) - 1, *range(0, len(raw), -(-len(raw) // (most // 3)))}
    chosen.update(chance.sample(marks, min(len(marks), most // 2)))
    return sorted(cut for cut in chosen if 0 <= cut < len(raw))


def test_a_file_that_is_cut_is_an_error_that_names_it_and_writes_nothing(kind: Kind, ckpt: Any) -> None:
    """Or, where only padding is gone, the very same tensors."""
    state = kind.holding(small())
    path = made(kind, state)
    want = in_order(kind, state, path)
    parts = files(path)
    refused, before = 0, sorted(os.listdir("."))
    for file in parts:
        raw = file.read_bytes()
        whole = len(raw) - (1 if file.suffix == ".json" and raw.endswith(b"\n") else kind.slack(raw))
        for number, cut in enumerate(cuts(raw, 40 // len(parts))):
            file.write_bytes(raw[:cut])
            if cut >= whole:
                cs.convert(path, "out.pth")
                assert_same_tensors(torch.load("out.pth", weights_only=True), want)
                os.unlink("out.pth")
                continue
            with pytest.raises(cs.InputError) as caught:
                cs.convert(path, "out.pth")
            assert str(caught.value).startswith(f"{file}: "), f"cut at {cut} of {len(raw)}"
            refused += 1
            if number % 8 == 0:
                ran = ckpt("convert", path, "out.pth")
                assert (ran.code, ran.out, ran.err) == (2, "", f"ckpt: error: {caught.value}\n")
        file.write_bytes(raw)
    assert sorted(os.listdir(".")) == before
    assert not leftovers()
    assert refused >= 12
    assert_same_tensors(cs.open(path), want)


def test_more_members_than_a_plain_zip_counts() -> None:
    """Over 65,535, by torch's own writer of archives: they end with a zip64 record."""
    torch.save({"w": torch.arange(5.0)}, "a.pth")
    writer = torch._C.PyTorchFileWriter("b.pth")
    with zipfile.ZipFile("a.pth") as archive:
        for name in archive.namelist():
            if not name.endswith(("version", "serialization_id")):  # the writer adds its own
                raw = archive.read(name)
                writer.write_record(name.partition("/")[2], raw, len(raw))
    for number in range(65_600):
        writer.write_record(f"more/{number}", b"", 0)
    writer.write_end_of_file()
    assert b"PK\6\6" in Path("b.pth").read_bytes()[-200:]
    assert cs.open("b.pth")["w"].read().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


LARGE = {"legacy 2": "out", "shards, bin, index": "out.safetensors"}


@pytest.mark.parametrize("name", LARGE)
def test_memory_stays_flat_while_converting(name: str) -> None:
    """300 MB, one large tensor transposed, by a process that never held 160 MiB."""
    state = {f"l{i}.w": torch.full((1 << 22,), i, dtype=torch.int32) for i in range(14)}
    state["t.w"] = torch.arange(1 << 24, dtype=torch.int32).view(1 << 12, 1 << 12).t()
    path = made(KINDS[name], state)
    script = (
        "import sys\nimport ckptsurgeon as cs\n"
        "cs.convert(sys.argv[1], sys.argv[2], shard_size=None if '.' in sys.argv[2] else '50MB')\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    ran = subprocess.run([sys.executable, "-c", script, path, LARGE[name]], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 160 * 1024, f"{int(ran.stdout) // 1024} MiB"
    out = Path(LARGE[name])
    assert sum(file.stat().st_size for file in files(out)) > 300e6
    got = loaded(out)
    assert torch.equal(got["t.w"][5, :3], torch.tensor([5, 4101, 8197], dtype=torch.int32))
    assert bits(got["l13.w"]).view(torch.int32).unique().tolist() == [13]


# -- every dtype, every byte of a header, every machine -----------------------------------------

_NUMBERS = (
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex32 complex64 "
    "complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
)
"""All that lies in a file as whole bytes, two numbers of four bits in one among them."""


def numbers_of(name: str) -> torch.Tensor:
    """Many patterns of bits; of truth values only the two that there are."""
    dtype = getattr(torch, name)
    raw = (torch.arange(dtype.itemsize * 16, dtype=torch.int32) * 7).to(torch.uint8)
    return (raw & 1).bool() if dtype is torch.bool else raw.view(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_every_dtype_is_read_and_written_bit_for_bit(kind: Kind) -> None:
    """Whatever the writer of a kind, which is not ours, is able to write; what safetensors has no name for is named."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name in _NUMBERS.split():
        if not kind.can_hold(getattr(torch, name)):
            continue
        one = {f"w.t_{name}": numbers_of(name)}
        try:
            made(kind, one)
        except (KeyError, AttributeError, cs.PlanError, RuntimeError, ValueError):
            assert name in OFTEN_LACKING, name
            continue
        state.update(one)
    assert len(state) >= (8 if kind.holds is not None else 14)
    path = made(kind, state)
    want = in_order(kind, state, path)
    assert_same_tensors(cs.open(path), want)
    cs.convert(path, "out.pth")
    assert_same_tensors(cs.open("out.pth"), want)
    for key in ("w.t_complex32", "w.t_complex128"):
        if want.pop(key, None) is not None:
            with pytest.raises(cs.PlanError, match=re.escape(key)):
                cs.convert(path, "refused.safetensors")
    cs.remap("out.pth", "out.safetensors", ["drop complex(32|128)$"], allow_unused=True)
    assert_same_tensors(cs.open("out.safetensors"), want)


OFTEN_LACKING = {"complex32", "float4_e2m1fn_x2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16",
                 "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"}  # fmt: skip
"""Newer than some writers."""


def test_a_file_cut_wherever_something_begins_or_ends_in_it_is_an_error(kind: Kind) -> None:
    """At every mark of its structure: nothing of it is taken for a whole one."""
    path = made(kind, kind.holding(small()))
    parts, tried = files(path), 0
    for file in parts:
        raw = file.read_bytes()
        whole = len(raw) - (1 if file.suffix == ".json" and raw.endswith(b"\n") else kind.slack(raw))
        for cut in cuts(raw, 1000 // len(parts)):
            if cut < whole:
                file.write_bytes(raw[:cut])
                with pytest.raises(cs.InputError) as caught:
                    cs.open(path)
                assert str(caught.value).startswith(f"{file}: "), f"cut at {cut} of {len(raw)}"
                tried += 1
        file.write_bytes(raw)
    assert tried > 100


def test_a_header_with_any_byte_changed_is_an_error_that_names_the_file_or_read(kind: Kind) -> None:
    """Bytes of the header flipped, and numbers of eight bytes in it made huge: no crash, no hang, no memory."""
    state = kind.holding(small())
    path = made(kind, state)
    chance, refused = random.Random(0), 0
    for file in files(path):
        raw = file.read_bytes()
        places = chance.sample(range(len(raw)), min(len(raw), 90 // len(files(path))))
        for at in {*range(0, 16, 3), *places} & set(range(len(raw))):
            for patch in (bytes([raw[at] ^ 0xFF]), b"\xff" * 7 + b"\x7f", b"\0" * 8):
                file.write_bytes((raw[:at] + patch + raw[at + len(patch) :])[: len(raw)])
                try:
                    cs.open(path)
                except cs.InputError as error:
                    refused += 1
                    assert str(error).startswith(str(path.parent)), error
        file.write_bytes(raw)
    assert refused > 8
    assert_same_tensors(cs.open(path), in_order(kind, state, path))


ELSEWHERE = """
import os, sys, pathlib
import ckptsurgeon as cs
for turn, path in enumerate(sys.argv[3:]):
    for output, size in (("out.pth", None), ("out.safetensors", None), ("out/", 64)):
        place = pathlib.Path(f"{sys.argv[1]}-{turn}")
        place.mkdir(exist_ok=True)
        jobs, memory = sys.argv[2].split()
        cs.remap(path, f"{place}/{output}", ["^b => x", "cast ^a.w$ bf16"],
                 shard_size=size, jobs=int(jobs), max_memory=memory)
"""


def test_the_same_bytes_come_of_any_process_threads_memory_and_folder() -> None:
    """Another seed of hashes, another number of threads, another ceiling, another name of the source's folder."""
    state = small() | {"a.big": torch.randn(600_000)}
    kinds = ("zip 2", "zip, deflated", "legacy 2", "safetensors", "our shards", "shards, bin, index")
    paths = [str(made(KINDS[name], state)) for name in kinds]
    os.makedirs("elsewhere/deep")
    for path in paths:
        folder = Path(path).parts[0]
        shutil.copytree(folder, f"elsewhere/deep/{folder}")
    ways = {"one": ("1", "1 64MiB", ""), "two": ("2", "4 4MiB", "elsewhere/deep/"), "three": ("3", "3 16MiB", "")}
    for way, (seed, how, folder) in ways.items():
        command = [sys.executable, "-c", ELSEWHERE, way, how, *(folder + path for path in paths)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    for turn in range(len(paths)):
        want = tree(f"one-{turn}")
        assert 7 <= len(want) <= 8
        assert tree(f"two-{turn}") == want
        assert tree(f"three-{turn}") == want

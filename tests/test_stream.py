"""The streaming engine: what the kernel copies, what is proven on the way, and that memory stays within its ceiling."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, leftovers
from helpers import assert_same_tensor, assert_same_tensors, damaged_in, deflated, safetensors_bytes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import state_dicts

import ckptsurgeon as cs
from ckptsurgeon.dtypes import DTYPES
from ckptsurgeon.ops._casts import cast
from ckptsurgeon.stream import copying, schedule, staging
from ckptsurgeon.stream import workers as threads

BIG = 40_000
"""Elements of a float32 tensor that is too large to be put together in memory with its neighbours."""


def big_state(count: int = 5) -> dict[str, torch.Tensor]:
    return {f"layers.{i}.weight": torch.randn(BIG) for i in range(count)}


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a function of `os`."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(os, name)

    def call(*args: Any, **how: Any) -> Any:
        calls.append(args)
        return real(*args, **how)

    monkeypatch.setattr(os, name, call)
    return calls


# -- copies ----------------------------------------------------------------------------------


def test_neighbours_in_both_files_are_one_copy_inside_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename of safetensors is its header and one call, small tensors between large ones included."""
    state = big_state() | {"small": torch.randn(3), "scalar": torch.tensor(2.0)} | {"last.weight": torch.randn(BIG)}
    save_file(state, "a.safetensors")
    plan = cs.plan("a.safetensors", ["layers => blocks"])
    calls, reads = counted(monkeypatch, "copy_file_range"), counted(monkeypatch, "preadv")
    cs.save(plan.result, "b.safetensors")
    nbytes = sum(value.nbytes for value in state.values())
    assert [(call[2], call[3] - call[4]) for call in calls] == [(nbytes, calls[0][3] - calls[0][4])]
    assert reads == []
    want = {key.replace("layers", "blocks"): value for key, value in state.items()}
    assert_same_tensors(load_file("b.safetensors"), want, ordered=False)


def test_reads_go_forward_through_the_file_whatever_the_order_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    state = big_state(8)
    torch.save(state, "a.pth")
    save_file(state, "a.safetensors")
    for source, call, place in (("a.safetensors", "copy_file_range", 3), ("a.pth", "preadv", 2)):
        turned = cs.open(source).replace(tensors=dict(reversed(list(cs.open(source).items()))))
        with monkeypatch.context() as patch:
            calls = counted(patch, call)
            cs.save(turned, "b.safetensors", jobs=1, force=True)
        begins = [call[place] for call in calls]
        assert len(begins) >= 8
        assert begins == sorted(begins)
    assert_same_tensors(load_file("b.safetensors"), state, ordered=False)
    assert list(cs.open("b.safetensors")) == list(reversed(state))


def refuses(number: int) -> Callable[..., int]:
    def call(*args: Any, **how: Any) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("kernel", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, None])
@pytest.mark.parametrize("sendfile", [True, False])
def test_where_the_kernel_refuses_to_copy_the_bytes_are_the_same(
    kernel: int | None, sendfile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: it copies nothing and says so, as some file systems do."""
    state = big_state() | {"s": torch.randn(2)}
    save_file(state, "a.safetensors")
    monkeypatch.setattr(os, "copy_file_range", (lambda *args: 0) if kernel is None else refuses(kernel))
    sent = counted(monkeypatch, "sendfile")
    if not sendfile:
        monkeypatch.setattr(os, "sendfile", refuses(errno.EINVAL))
    cs.convert("a.safetensors", "b.safetensors")
    assert_same_tensors(load_file("b.safetensors"), state, ordered=False)
    assert bool(sent) == sendfile


def test_a_copy_that_the_kernel_breaks_off_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    state = big_state(2)
    save_file(state, "a.safetensors")
    real, calls = os.copy_file_range, 0

    def short(source: int, out: int, count: int, begin: int, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(source, out, min(count, 1000), begin, offset)

    monkeypatch.setattr(os, "copy_file_range", short)
    cs.convert("a.safetensors", "b.safetensors", jobs=1)
    assert_same_tensors(load_file("b.safetensors"), state, ordered=False)


def test_without_calls_for_it_a_copier_still_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other systems have neither of the two calls."""
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.delattr(os, "sendfile")
    Path("a").write_bytes(bytes(range(256)) * 9000)
    source, out = os.open("a", os.O_RDONLY), os.open("b", os.O_RDWR | os.O_CREAT)
    copying.Copier(out).copy(source, 5, 2_000_000, 7, "a")
    assert Path("b").read_bytes() == bytes(7) + Path("a").read_bytes()[5:2_000_005]


@given(state_dicts(), st.randoms(use_true_random=False))
def test_any_order_of_any_tensors_is_written_as_it_is_read(state: dict[str, torch.Tensor], chance: Any) -> None:
    """The jobs of a schedule tile the output, whatever lies where."""
    torch.save(state, "a.pth")
    tensors = list(cs.open("a.pth").items())
    chance.shuffle(tensors)
    shuffled = cs.open("a.pth").replace(tensors=dict(tensors))
    for name, load in (("b.pth", torch.load), ("b.safetensors", load_file)):
        cs.save(shuffled, name, force=True)
        assert_same_tensors(load(name), state, ordered=False)


def test_a_hundred_thousand_small_tensors_take_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"l{i}": torch.full((2,), float(i)) for i in range(3000)}
    torch.save(state, "a.pth")
    reads, writes = counted(monkeypatch, "preadv"), counted(monkeypatch, "pwrite")
    cs.convert("a.pth", "b.safetensors")
    assert len(reads) < 60
    assert len(writes) < 10
    assert_same_tensors(load_file("b.safetensors"), state, ordered=False)


# -- checksums -------------------------------------------------------------------------------


def crcs(path: str) -> dict[str, int]:
    return {info.filename.rpartition("/")[2]: info.CRC for info in zipfile.ZipFile(path).infolist()}


def test_a_record_that_is_copied_whole_keeps_its_checksum_and_others_get_theirs() -> None:
    state = big_state(2) | {"s": torch.randn(3)}
    torch.save(state, "a.pth")
    cs.convert("a.pth", "b.pth")
    cs.remap("a.pth", "c.pth", ["cast layers.0 f64", "reshape layers.1 200,200", "transpose layers.1"])
    before, after = crcs("a.pth"), crcs("b.pth")
    assert [after[str(i)] for i in range(3)] == [before[str(i)] for i in range(3)]
    assert zipfile.ZipFile("b.pth").testzip() is None
    assert zipfile.ZipFile("c.pth").testzip() is None
    assert crcs("c.pth")["2"] == before["2"]
    assert crcs("c.pth")["1"] != before["1"]


CHANGES = {
    "whole": [],
    "cast": ["cast . f64"],
    "turned": ["reshape layers 200,200", "transpose layers"],
    "turned and cast": ["reshape layers 200,200", "transpose layers", "cast . bf16"],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("output", ["b.pth", "b.safetensors"])
@pytest.mark.parametrize("place", ["large", "small"])
def test_a_damaged_record_is_found_whatever_becomes_of_it(change: str, output: str, place: str) -> None:
    """Nothing is published; the error names the key and the record."""
    state = big_state(2) | {"small.weight": torch.randn(200, 2)}
    torch.save(state, "a.pth")
    key, record = ("layers.1.weight", "data/1") if place == "large" else ("small.weight", "data/2")
    damaged_in("a.pth", record)
    with pytest.raises(cs.InputError, match=rf"^a\.pth: '{key}': the record \S*{record} does not have its checksum"):
        cs.remap("a.pth", output, CHANGES[change])
    assert os.listdir(".") == ["a.pth"]


@pytest.mark.parametrize("output", ["b.pth", "b.safetensors"])
def test_a_small_view_of_a_damaged_record_is_refused_too(output: str) -> None:
    """However little of a record is copied, all of it is proven."""
    whole = torch.randn(1_000_000)
    torch.save({"view": whole[10:13], "other": whole[500_000:600_000]}, "a.pth")
    damaged_in("a.pth", "data/0")
    with pytest.raises(cs.InputError, match="'view': the record .*data/0 does not have its checksum"):
        cs.convert("a.pth", output)
    assert os.listdir(".") == ["a.pth"]


def test_an_archive_whose_checksums_are_all_zero_is_copied_and_gets_right_ones() -> None:
    """torch writes such archives with `set_crc32_options(False)`."""
    state = big_state(2)
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(state, "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    if any(crcs("a.pth").values()):  # torch gives its own sums to what it writes as bytes
        _without_sums("a.pth")
    cs.convert("a.pth", "b.pth")
    assert zipfile.ZipFile("b.pth").testzip() is None
    assert_same_tensors(torch.load("b.pth", weights_only=True), state)


def _without_sums(path: str) -> None:
    raw = bytearray(Path(path).read_bytes())
    for info in zipfile.ZipFile(path).infolist():
        raw[info.header_offset + 14 : info.header_offset + 18] = bytes(4)
    at = raw.find(b"PK\1\2")
    while at >= 0:
        raw[at + 16 : at + 20] = bytes(4)
        at = raw.find(b"PK\1\2", at + 4)
    Path(path).write_bytes(raw)


def test_a_sum_is_of_stretches_in_their_order_whatever_thread_was_first() -> None:
    from ckptsurgeon.stream.digests import Digest

    data = bytes(range(200))
    parts = [(150, data[150:]), (0, data[:70]), (70, data[70:150])]
    digest = Digest()
    for at, part in parts:
        digest.put(at, zlib.crc32(part), len(part))
    assert digest.value() == zlib.crc32(data)
    assert Digest.joined([digest, digest], 400) == zlib.crc32(data + data)
    with pytest.raises(AssertionError, match="200 bytes were summed up where 201 were written"):
        Digest.joined([digest], 201)


def test_a_compressed_member_is_inflated_once_for_all_of_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(50, 40)
    torch.save({f"v{i}": base[i : i + 2] for i in range(40)} | {"t": base.t()}, "a.pth")
    deflated("a.pth")
    from ckptsurgeon import evaluate

    real, begun = evaluate.whole, []
    monkeypatch.setattr(evaluate, "whole", lambda extent, size: begun.append(extent.record.name) or real(extent, size))
    cs.convert("a.pth", "b.safetensors")
    assert [name.rpartition("/")[2] for name in begun] == ["0"]
    assert_same_tensor(load_file("b.safetensors")["v7"], base[7:9])


@pytest.mark.parametrize("change", CHANGES)
def test_compressed_archives_are_copied_turned_and_proven(change: str) -> None:
    """Each member is inflated once, however many views of it there are."""
    base = torch.randn(300, 400)
    state = {"layers.0": base, "layers.1": base[10:20], "layers.2": base.t()[3:5], "s": torch.randn(3)}
    torch.save(state, "a.pth")
    deflated("a.pth")
    rules = [rule.replace("200,200", "-1,10") for rule in CHANGES[change]]
    cs.remap("a.pth", "b.safetensors", rules)
    want = cs.plan("a.pth", rules).result
    got = load_file("b.safetensors")
    for key, ref in want.items():
        assert_same_tensor(got[key], ref.read(), key)
    if not rules:
        assert_same_tensors(got, state, ordered=False)
    assert sorted(os.listdir(".")) == ["a.pth", "b.safetensors"]
    raw = bytearray(Path("a.pth").read_bytes())
    info = next(info for info in zipfile.ZipFile("a.pth").infolist() if info.filename.endswith("data/0"))
    raw[info.header_offset + 5000] ^= 1
    Path("a.pth").write_bytes(raw)
    with pytest.raises(cs.InputError, match=r"^a\.pth: 'layers\.0': .*(damaged|shorter)"):
        cs.remap("a.pth", "c.safetensors", rules)
    assert sorted(os.listdir(".")) == ["a.pth", "b.safetensors"]


# -- values ----------------------------------------------------------------------------------

FLOATS = ("float64", "float32", "float16", "bfloat16")


def awkward(name: str) -> torch.Tensor:
    """Every value of 16 bits; of wider types random bits, and values beside the borders of narrower ones."""
    dtype = getattr(torch, name)
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    if dtype.itemsize == 2:
        return words.view(dtype)
    borders = torch.cat([words.view(torch.float16).float(), words.view(torch.bfloat16).float()]).view(torch.int32)
    steps = (-0x8001, -0x8000, -0x7FFF, -0x1001, -0x1000, -1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    near = torch.cat([borders + step for step in steps]).view(torch.float32)
    random = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 4:
        return torch.cat([near, random])
    wide = near.double().view(torch.int64)
    return torch.cat([random, *[(wide + step).view(dtype) for step in (-(1 << 28), -1, 0, 1, 1 << 28, (1 << 28) + 1)]])


@pytest.mark.parametrize("have", FLOATS)
@pytest.mark.parametrize("want", FLOATS)
def test_a_cast_without_torch_is_torchs(have: str, want: str) -> None:
    """Bit for bit, signs of zero and infinities included; NaN is NaN."""
    values = awkward(have)
    made = cast(memoryview(values.view(torch.uint8).numpy()), DTYPES[have], DTYPES[want])
    assert made is not None
    got, expected = torch.frombuffer(bytearray(made), dtype=getattr(torch, want)), values.to(getattr(torch, want))
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.itemsize]
    assert torch.equal(got.view(word)[~nan], expected.view(word)[~nan])


def test_types_that_only_torch_computes_are_left_to_it() -> None:
    assert cast(memoryview(b"\0\0"), DTYPES["float8_e5m2"], DTYPES["float32"]) is None
    assert cast(memoryview(b"\0\0\0\0"), DTYPES["float32"], DTYPES["float8_e4m3fn"]) is None


def test_a_cast_between_usual_types_imports_no_torch() -> None:
    save_file({"w": torch.randn(1000, 30)}, "a.safetensors")
    script = (
        "import sys\nimport ckptsurgeon as cs\n"
        "cs.remap('a.safetensors', 'b.safetensors', ['transpose w', 'cast w bf16'])\n"
        "print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )
    assert_same_tensor(load_file("b.safetensors")["w"], load_file("a.safetensors")["w"].t().bfloat16().contiguous())


ORDERS = [(1, 0, 2, 3), (3, 2, 1, 0), (0, 3, 1, 2), (2, 0, 3, 1)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("dims", ORDERS, ids=str)
def test_a_permuted_tensor_is_gathered_in_small_cuts(dims: tuple[int, ...], dtype: torch.dtype) -> None:
    """Cut to a hundredth of the tensor, in several threads, and after a cast or a slice too."""
    base = (torch.randn(150, 130, 3, 5) * 50).to(dtype)
    torch.save({"w": base, "part": base[3:, 1:129:2]}, "a.pth")
    order = ",".join(map(str, dims))
    ref = cs.plan("a.pth", [f"permute . {order}"]).result
    for key, whole in (("w", base), ("part", base[3:, 1:129:2])):
        want = whole.permute(dims).contiguous()
        blocks = [bytes(block) for block in ref[key].blocks(want.nbytes // 100)]
        assert max(map(len, blocks)) < want.nbytes // 20
        assert_same_tensor(torch.frombuffer(bytearray(b"".join(blocks)), dtype=dtype).reshape(want.shape), want)
    cs.remap("a.pth", "b.pth", [f"permute . {order}"], max_memory="4MiB", jobs=2)
    assert_same_tensors(
        torch.load("b.pth", weights_only=True), {"w": base.permute(dims), "part": base[3:, 1:129:2].permute(dims)}
    )


def test_operations_on_computed_tensors_are_pushed_down_to_the_bytes() -> None:
    """A permute of a cast is a cast of a permute; what else is to be turned goes over the disk."""
    base = torch.randn(1000, 1200)
    torch.save({"w": base.t()}, "a.pth")
    rules = ["cast w f64", "transpose w", "reshape w 400,3000", "transpose w"]
    cs.remap("a.pth", "b.pth", rules, max_memory="4MiB")
    want = base.double().reshape(400, 3000).t()
    assert_same_tensor(torch.load("b.pth", weights_only=True)["w"], want.contiguous())
    rules = ["transpose w", "reshape w 400,3000", "permute w 1,0", "reshape w 1000,1200", "permute w 1,0"]
    torch.save({"w": base}, "a.pth")
    cs.remap("a.pth", "c.pth", rules, max_memory="4MiB")
    want = base.t().reshape(400, 3000).t().reshape(1000, 1200).t()
    assert_same_tensor(torch.load("c.pth", weights_only=True)["w"], want.contiguous())
    assert not leftovers()


# -- memory ----------------------------------------------------------------------------------


def sparse(path: str, header: str, nbytes: int) -> str:
    raw = header.encode()
    Path(path).write_bytes(safetensors_bytes(raw))
    os.truncate(path, 8 + len(raw) + nbytes)
    return path


def peak(call: str) -> tuple[int, int]:
    """MiB that a process held at most, and what it held before `call`."""
    script = (
        "import numpy, sys\nimport ckptsurgeon as cs\nfrom ckptsurgeon import stream\n{}"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "cs.remap\nbefore = peak()\n{}\nprint(before, peak())"
    )
    ran = subprocess.run([sys.executable, "-c", script.format("", call)], capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    return after // 1024, before // 1024


LARGE = 1 << 27
ONE = f'{{"w":{{"dtype":"F32","shape":[16384,{LARGE // 65536}],"data_offsets":[0,{LARGE}]}}}}'
SURGERIES = {
    "rename": "cs.remap('a.safetensors', 'o.safetensors', ['w => v'], max_memory=8 << 20)",
    "to a zip": "cs.remap('a.safetensors', 'o.pth', ['w => v'], max_memory=8 << 20)",
    "cast": "cs.remap('a.safetensors', 'o.safetensors', ['cast w bf16'], max_memory=8 << 20)",
    "cast to a zip": "cs.remap('a.safetensors', 'o.pth', ['cast w f16'], max_memory=8 << 20)",
    "transpose": "cs.remap('a.safetensors', 'o.safetensors', ['transpose w'], max_memory=16 << 20)",
    "cast, transpose, reshape": (
        "cs.remap('a.safetensors', 'o.safetensors', ['cast w bf16', 'transpose w', "
        "'reshape w -1', 'reshape w 8192,-1', 'transpose w'], max_memory=16 << 20)"
    ),
}


@pytest.mark.parametrize("name", SURGERIES)
def test_one_tensor_of_an_eighth_of_a_gib_passes_through_a_few_mib(name: str) -> None:
    """A single tensor, larger than all of the memory that it may take."""
    sparse("a.safetensors", ONE, LARGE)
    after, before = peak(SURGERIES[name])
    assert after - before < 40, f"{before} MiB before, {after} MiB at most"


def test_what_cannot_keep_the_ceiling_is_a_problem_before_anything_starts(ckpt: Any) -> None:
    """A model that is built to initialise a tensor is built whole."""
    torch.save({"stem.weight": torch.ones(8, 3, 3, 3)}, "a.pth")
    spec = f"{ROOT}/fixtures/models.py:Net,num_classes=200000"
    ran = ckpt("remap", "a.pth", "-o", "b.pth", "--to", spec, "--fit", "--max-memory", "4MiB")
    assert (ran.code, ran.out) == (1, "")
    assert re.search(
        r"making '[\w.]+' and \d+ more takes 7,\d\d\d,\d\d\d bytes of memory at once, .*--max-memory is", ran.err
    )
    ran = ckpt("remap", "a.pth", "--to", spec, "--fit", "--max-memory", "4MiB", "--dry-run")
    assert (ran.code, os.listdir(".")) == (1, ["a.pth"])
    assert ckpt("remap", "a.pth", "-o", "b.pth", "--to", spec, "--fit", "--max-memory", "9MB").code == 0
    assert ckpt("remap", "a.pth", "-o", "c.pth", "--to", spec, "--fit").code == 0


@pytest.mark.parametrize("words", [["--max-memory", "1MiB"], ["--max-memory", "much"], ["--jobs", "0"]])
def test_a_ceiling_and_a_number_of_threads_that_are_none(words: list[str], ckpt: Any) -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    ran = ckpt("convert", "a.pth", "b.pth", *words)
    assert ran.code == 2
    assert not os.path.exists("b.pth")


def test_overlapping_parts_of_a_large_tensor_come_row_by_row() -> None:
    """The kernel that takes what two tensors share is cut along the first dimension."""
    from ckptsurgeon.evaluate import holds

    torch.save({"w": torch.randn(900, 500)}, "a.pth")
    torch.save({"w": torch.randn(1000, 400)}, "b.pth")
    plan = cs.plan("a.pth", to="b.pth", mismatched="overlap")
    cs.remap("a.pth", "c.pth", to="b.pth", mismatched="overlap", max_memory="4MiB")
    assert holds(plan.result["w"]) == 0
    assert max(map(len, plan.result["w"].blocks(100_000))) <= 100_000
    have, other = (torch.load(name, weights_only=True)["w"] for name in ("a.pth", "b.pth"))
    want = other.clone()
    want[:900, :400] = have[:900, :400]
    assert_same_tensor(torch.load("c.pth", weights_only=True)["w"], want)


# -- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [[], ["cast . bf16"]])
def test_the_bytes_do_not_depend_on_how_many_threads_write_them(rules: list[str]) -> None:
    state = big_state(12) | {"s": torch.randn(3)}
    torch.save(state, "a.pth")
    made: dict[int, dict[str, bytes]] = {}
    for jobs in (1, 2, 5):
        cs.remap("a.pth", f"{jobs}/", rules, shard_size=500_000, jobs=jobs)
        cs.remap("a.pth", f"{jobs}/whole.pth", rules, jobs=jobs)
        made[jobs] = {name: Path(f"{jobs}", name).read_bytes() for name in sorted(os.listdir(str(jobs)))}
    assert len(made[1]) > 3
    assert made[1] == made[2] == made[5]


def test_shards_are_written_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are threads are open for writing at once, and no more."""
    torch.save(big_state(12), "a.pth")
    calls, now, most, lock = 0, 0, 0, threading.Lock()
    gate = threading.Barrier(3)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls, now, most
        with lock:
            calls, now = calls + 1, now + 1
            most, early = max(most, now), calls <= 3
        if early:
            gate.wait(30)  # nobody comes this far alone
        real(descriptor)
        with lock:
            now -= 1

    monkeypatch.setattr(os, "fsync", fsync)
    cs.convert("a.pth", "out/", shard_size=500_000, jobs=3)
    assert most == 3


def test_the_first_failure_ends_the_work_of_all_threads() -> None:
    done: list[int] = []
    before = threading.active_count()

    def work() -> Iterator[Callable[[], None]]:
        for i in range(1000):
            yield lambda i=i: fail() if i == 20 else done.append(i)

    def fail() -> None:
        raise ValueError("the twentieth")

    with pytest.raises(ValueError, match="the twentieth"):
        threads.run(work(), 3)
    assert len(done) < 1000
    assert threading.active_count() == before


def test_a_schedule_is_made_of_few_jobs_that_tile_the_output() -> None:
    state = big_state(3) | {f"s{i}": torch.randn(5) for i in range(500)}
    torch.save(state, "a.pth")
    from ckptsurgeon import formats
    from ckptsurgeon.stream.digests import Digests

    files, _ = formats.files(cs.open("a.pth"), formats.output("b.pth"))
    at, placed = 0, []
    for part in files[0][1].parts:
        placed.append((at, part if isinstance(part, bytes) else schedule.Part(at, part)))
        at += len(part) if isinstance(part, bytes) else part.nbytes
    jobs = [job for job in schedule.schedule(placed, True, Digests()) if not isinstance(job, schedule.Check)]
    ends = sorted((job.offset, job.offset + _size(job)) for job in jobs)
    assert [end for _, end in ends] == [*(begin for begin, _ in ends[1:]), at]
    assert len(jobs) < 12


def _size(job: Any) -> int:
    if isinstance(job, schedule.Copy):
        return job.nbytes
    if isinstance(job, schedule.Compute):
        return job.ref.nbytes
    return sum(len(part) if isinstance(part, bytes) else part.ref.nbytes for part in job.parts)


# -- sources that do not hold still ----------------------------------------------------------


@pytest.mark.parametrize("way", ["truncated", "replaced", "touched"])
@pytest.mark.parametrize("output", ["b.pth", "b.safetensors", "out/"])
def test_a_source_that_changes_while_it_is_read_leaves_no_output(
    way: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(big_state(6), "a.pth")
    shutil.copy("a.pth", "other.pth")
    plan = cs.plan("a.pth")
    real, done = os.preadv, 0

    def late(*args: Any) -> int:
        nonlocal done
        done += 1
        if done == 3:
            if way == "truncated":
                os.truncate("a.pth", 500_000)
            elif way == "replaced":
                os.replace("other.pth", "a.pth")
            else:
                os.utime("a.pth")
        return real(*args)

    monkeypatch.setattr(os, "preadv", late)
    words = "ends at byte 500000|changed since it was opened|changed while it was read"
    with pytest.raises(cs.InputError, match=rf"^a\.pth: .*({words})"):
        cs.save(plan.result, output, jobs=1)
    assert set(os.listdir(".")) <= {"a.pth", "other.pth"}


def test_large_records_lie_as_in_their_source_and_are_copied_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within pages, so that a file system can share blocks; in zips still aligned to 64 bytes."""
    state = {"small": torch.randn(7), "a": torch.randn(3_000_001), "b": torch.randn(2_500_000)}
    torch.save(state, "a.pth")
    save_file(state, "a.safetensors", metadata={"about": "x" * 999})
    for source, output in (("a.pth", "b.pth"), ("a.safetensors", "b.safetensors")):
        calls = counted(monkeypatch, "copy_file_range")
        cs.remap(source, output, ["^a$ => layers.a"])
        assert calls
        for key, ref in cs.open(source).items():
            place = cs.open(output)[key.replace("a", "layers.a") if key == "a" else key].source.offset
            assert place % (64 if output == "b.pth" else 4) == 0
            if ref.nbytes > 8 << 20:
                assert (place - ref.source.offset) % 65536 == 0
    want = {key.replace("a", "layers.a") if key == "a" else key: value for key, value in state.items()}
    assert_same_tensors(torch.load("b.pth", weights_only=True, mmap=True), want)
    assert zipfile.ZipFile("b.pth").testzip() is None
    assert_same_tensors(load_file("b.safetensors"), want, ordered=False)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_output_that_is_another_name_of_the_source(link: Callable[[str, str], None]) -> None:
    """Refused without --force; with it the new file takes that name, and a hard-linked source stays as it is."""
    state = big_state(2)
    torch.save(state, "a.pth")
    before = Path("a.pth").read_bytes()
    link("a.pth", "b.pth")
    with pytest.raises(cs.OutputError, match="exists; --force replaces it"):
        cs.remap("a.pth", "b.pth", ["layers => blocks"])
    assert Path("a.pth").read_bytes() == before
    cs.remap("a.pth", "b.pth", ["layers => blocks"], force=True)
    want = {key.replace("layers", "blocks"): value for key, value in state.items()}
    assert_same_tensors(torch.load("b.pth", weights_only=True), want)
    if link is os.link:
        assert Path("a.pth").read_bytes() == before
    assert not leftovers()


# -- runs that are killed --------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
import ckptsurgeon as cs
from ckptsurgeon import stream, planner, surgery, formats  # nothing is left to import when the clock runs
import ckptsurgeon.stream.commit, ckptsurgeon.checksum, ckptsurgeon.formats._pickler, difflib
source, output, rounds, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(seed)
def once():
    cs.remap(source, output, ["layers => blocks"], force=True, shard_size=300_000 if output.endswith("/") else None)
def timed():
    began = time.perf_counter(); once(); return time.perf_counter() - began
usual = min(timed() for _ in range(6))
killed = 0
for turn in range(rounds):
    child = os.fork()
    if child == 0:
        once()
        os._exit(0)
    time.sleep(chance.random() * usual * 1.2)
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(turn, flush=True)
    assert sys.stdin.readline() == "go on\\n"
print("killed", killed, flush=True)
"""


@pytest.mark.parametrize("output", ["b.pth", "b.safetensors", "new/"])
def test_a_run_that_is_killed_anywhere_leaves_the_old_file_or_the_whole_new_one(output: str) -> None:
    """A hundred times each, at random moments; the next run leaves no stray file."""
    state = big_state(4) | {"s": torch.randn(3)}
    torch.save(state, "a.pth")
    source = Path("a.pth").read_bytes()
    want = {key.replace("layers", "blocks"): value for key, value in state.items()}
    command = [sys.executable, "-c", KILLED, "a.pth", output, "100", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("killed"):
                assert int(line.split()[1]) > 20
                break
            assert Path("a.pth").read_bytes() == source
            if output != "new/" or not any("journal" in name for name in os.listdir("new")):
                assert_same_tensors(cs.open(output), want, ordered=False)
            process.stdin.write("go on\n")
            process.stdin.flush()
        assert process.wait() == 0
    cs.remap("a.pth", output, ["layers => blocks"], force=True, shard_size=300_000 if output == "new/" else None)
    assert_same_tensors(cs.open(output), want, ordered=False)
    assert [
        name for name in (*os.listdir("."), *(os.listdir("new") if output == "new/" else ())) if name[0] == "."
    ] == []


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_holds_is_not() -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    place = os.path.abspath("b.pth")
    dead, descriptor = staging.create(place)
    os.close(descriptor)
    alive, held = staging.create(place)
    folder, other = staging.create_folder(place)
    os.close(other)
    Path(folder, "shard").write_text("x")
    Path(".b.pth.notours.part").write_text("mine")
    cs.convert("a.pth", "b.pth")
    assert not os.path.exists(dead)
    assert not os.path.exists(folder)
    assert os.path.exists(alive)
    assert os.path.exists(".b.pth.notours.part")
    os.close(held)
    cs.convert("a.pth", "b.pth", force=True)
    assert not os.path.exists(alive)


@pytest.mark.parametrize("at", range(9))
def test_shards_that_were_being_published_are_finished_by_a_repair(at: int, ckpt: Any) -> None:
    """Killed between any two of the renames: what is new was whole by then, and takes its place."""
    torch.save(big_state(4), "old.pth")
    torch.save(big_state(6), "new.pth")
    cs.convert("old.pth", "out/", shard_size=300_000)
    script = (
        f"import os, ckptsurgeon as cs\nleft = {at}\n"
        "def dying(real):\n"
        "    def call(*args):\n"
        "        global left\n"
        "        if any('journal' in str(name) for name in args): return real(*args)\n"
        "        left -= 1\n"
        "        if left < 0: os._exit(9)\n"
        "        return real(*args)\n"
        "    return call\n"
        "for name in ('rename', 'replace', 'link'): setattr(os, name, dying(getattr(os, name)))\n"
        "cs.convert('new.pth', 'out/', shard_size=300_000, force=True)"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=False)
    assert ran.returncode == (9 if at < 9 else 0)
    journal = [name for name in os.listdir("out") if name.endswith(".journal")]
    assert len(journal) == 1
    lost = not os.path.exists("out/model.safetensors.index.json")
    ran = ckpt("ls", "out")
    assert ran.code == (2 if lost else 0)
    assert ("`ckpt verify --repair` of the folder finishes it" in ran.err) == lost
    ran = ckpt("verify", "out", "--repair")
    assert ran.code == 0
    assert "put the shards of model.safetensors.index.json in their places" in ran.out
    assert_same_tensors(cs.open("out"), torch.load("new.pth", weights_only=True), ordered=False)
    assert not [name for name in os.listdir("out") if name.startswith(".") and at]
    cs.convert("new.pth", "out/", shard_size=300_000, force=True)
    assert not [name for name in os.listdir("out") if name.startswith(".")]


def test_shards_that_a_living_run_puts_in_their_places_are_left_to_it(ckpt: Any) -> None:
    os.mkdir("out")
    torch.save(big_state(2), "a.pth")
    index = os.path.abspath("out/model.safetensors.index.json")
    staged, held = staging.create(index)
    Path(f"out/.{os.path.basename(index)}.journal").write_text(
        json.dumps({"moves": [[os.path.basename(staged), os.path.basename(index)]], "aside": []})
    )
    for words in (["verify", "out", "--repair"], ["convert", "a.pth", "out/", "--force"]):
        ran = ckpt(*words)
        assert ran.code == 2
        assert "another run puts its shards in their places there just now" in ran.err
    assert os.path.exists(staged)
    os.close(held)
    assert ckpt("convert", "a.pth", "out/", "--force").code == 0
    assert os.listdir("out") == ["model.safetensors"]


def test_a_journal_that_says_nonsense_or_leads_elsewhere_is_refused(ckpt: Any) -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    Path("mine").write_text("mine")
    os.mkdir("out")
    for text in (
        "",
        "[]",
        '{"moves": [["../mine", "x"]], "aside": []}',
        '{"moves": [], "aside": ["../mine"]}',
        '{"moves": 3}',
        '{"moves": [["notes.part", "x"]], "aside": []}',
        '{"moves": [["notes/n.part", "x"]], "aside": []}',
        '{"moves": [], "aside": ["notes.part"]}',
        '{"moves": [[".a.01234567.part/../../mine", "x"]], "aside": []}',
        "link",
    ):
        Path("out/notes.part").write_text("mine")
        journal = Path("out/.model.safetensors.index.json.journal")
        journal.unlink(missing_ok=True)
        if text == "link":
            os.symlink("notes.part", journal)
        else:
            journal.write_text(text)
        ran = ckpt("convert", "a.pth", "out/", "--force")
        assert ran.code == 2
        assert ".journal: cannot be understood" in ran.err
        assert Path("out/notes.part").read_text() == "mine"
    assert Path("mine").read_text() == "mine"


def test_a_narrow_column_of_a_wide_matrix_is_read_without_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.randn(200, 50_000)
    torch.save({"w": wide[:, 7:9]}, "a.pth")
    ref, read, real = cs.open("a.pth")["w"], 0, os.preadv

    def counted_bytes(descriptor: int, views: list[memoryview], at: int) -> int:
        nonlocal read
        got = real(descriptor, views, at)
        read += got
        return got

    monkeypatch.setattr(os, "preadv", counted_bytes)
    assert_same_tensor(ref.read(), wide[:, 7:9].contiguous())
    assert read == 200 * 2 * 4


def test_more_shards_than_a_process_may_hold_open() -> None:
    """Only what is being written is open, in a folder that is locked as a whole."""
    state = {f"l{i}": torch.full((10,), float(i)) for i in range(300)}
    torch.save(state, "a.pth")
    os.mkdir("there")
    script = (
        "import resource, sys\nimport ckptsurgeon as cs\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "for folder in ('new/', 'there'): cs.convert('a.pth', folder, shard_size=40, jobs=3)\n"
        "cs.convert('new', 'there', shard_size=80, force=True)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    assert len(os.listdir("new")) == 301
    assert len(os.listdir("there")) == 151
    for folder in ("new", "there"):
        assert_same_tensors(cs.open(folder), state, ordered=False)


def test_a_model_is_built_once_however_many_threads_ask_for_its_values() -> None:
    Path("slow.py").write_text(
        "import time, torch\nbuilt = []\n"
        "def make():\n"
        "    time.sleep(0.3)\n"
        "    built.append(1)\n"
        "    made = torch.nn.Sequential(*[torch.nn.Linear(200, 200) for _ in range(8)])\n"
        "    open('built', 'a').write(str(made[0].weight.device) + ' ')\n"
        "    return made\n"
    )
    torch.save({"other": torch.ones(1)}, "a.pth")
    for jobs in (1, 4):
        cs.remap("a.pth", f"{jobs}.pth", to="slow.py:make", missing="init", unexpected="drop", jobs=jobs)
    assert Path("built").read_text().split() == ["meta", "cpu", "meta", "cpu"]
    assert Path("1.pth").read_bytes() == Path("4.pth").read_bytes()


def test_small_tensors_far_apart_take_no_more_memory_than_they_are() -> None:
    """What lies between them is read along in bounded stretches, and not kept."""
    count, gap = 40_000, 3000
    entries = []
    for i in range(count):
        at = i * (gap + 8)
        entries.append(f'"s{i}":{{"dtype":"F32","shape":[2],"data_offsets":[{at},{at + 8}]}}')
        entries.append(f'"gap{i}":{{"dtype":"U8","shape":[{gap}],"data_offsets":[{at + 8},{at + 8 + gap}]}}')
    sparse("a.safetensors", "{" + ",".join(entries) + "}", count * (gap + 8))
    after, before = peak(
        "plan = cs.plan('a.safetensors', ['keep ^s']); before = peak(); cs.save(plan.result, 'o.safetensors')"
    )
    assert after - before < 60, f"{before} MiB before, {after} MiB at most"
    assert os.path.getsize("o.safetensors") < 5_000_000


def test_what_could_not_be_put_back_is_never_swept() -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    cs.convert("a.pth", "out/")
    folder, descriptor = staging.create_folder(os.path.abspath("out/model.safetensors"))
    os.close(descriptor)
    Path(folder, "old-model.safetensors.part").write_text("the only one")
    cs.convert("a.pth", "out/", force=True)
    assert Path(folder, "old-model.safetensors.part").read_text() == "the only one"

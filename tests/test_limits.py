"""Limits: each is met by a file that asks for more, says its name and the flag, and can be raised."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptsurgeon as cs
from ckptsurgeon import charges
from ckptsurgeon.formats import _pickle
from ckptsurgeon.limits import current, limited
from ckptsurgeon.stream import workers


def _safetensors() -> None:
    save_file({"a": torch.ones(2, 2)}, "a", {"format": "pt"})


def _entries() -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, "a")


def _names_of_two() -> None:
    save_file({"a": torch.ones(2)}, "s.safetensors")
    save_file({"b": torch.ones(2)}, "t.safetensors")
    Path("a").write_text(json.dumps({"weight_map": {"a": "s.safetensors", "b": "t.safetensors"}}))


def _torch() -> None:
    torch.save({"a": torch.ones(2, 2), "b": [[1, 2], {"c": "d"}]}, "a")


def _legacy() -> None:
    torch.save({"a": torch.ones(2, 2)}, "a", _use_new_zipfile_serialization=False)


def _deflated() -> None:
    torch.save({"a": torch.ones(2, 2)}, "b")
    with zipfile.ZipFile("b") as old, zipfile.ZipFile("a", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def _index() -> None:
    save_file({"a": torch.ones(2)}, "s.safetensors")
    Path("a").write_text(json.dumps({"weight_map": {"a": "s.safetensors"}}))


def _repeated() -> None:
    torch.save({"a": torch.ones(1).expand(1000)}, "a")


def _shared() -> None:
    one = torch.ones(1000)
    torch.save({str(number): one for number in range(300)}, "a")


def _names() -> None:
    root: Any = {"w": torch.ones(1)}
    for _ in range(8):
        root = {"a" * 20: root}
    torch.save(root, "a")


def _modules() -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)), "a")


def _script() -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save("a")


def _twice() -> None:
    module = torch.nn.Linear(2, 2)
    for _ in range(3):
        module = torch.nn.Sequential(module, module)
    torch.save(module, "a")


MET: list[tuple[str, int, Callable[[], None]]] = [
    ("safetensors_header", 10, _safetensors),
    ("metadata_bytes", 10, _safetensors),
    ("index_bytes", 10, _index),
    ("archive_members", 1, _entries),
    ("archive_members", 1, _names_of_two),
    ("pickle_bytes", 10, _torch),
    ("pickle_bytes", 10, _legacy),
    ("inflated_bytes", 10, _deflated),
    ("pickle_memory", 100, _torch),
    ("opcodes", 10, _torch),
    ("marks", 1, _torch),
    ("code_bytes", 10, _script),
    ("archive_members", 2, _torch),
    ("dimensions", 1, _safetensors),
    ("dimensions", 1, _torch),
    ("view_bytes", 100, _repeated),
    ("name_characters", 20, _names),
    ("modules", 1, _modules),
    ("repeats", 1, _twice),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize(("name", "most", "make"), MET, ids=[f"{name}-{make.__name__}" for name, _, make in MET])
def test_a_limit_that_is_met_is_named_with_its_flag(
    name: str, most: int, make: Callable[[], None], ckpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    lowered = replace(current(), **{name: most} | ({"view_ratio": 1} if name == "view_bytes" else {}))
    with pytest.raises(cs.LimitError) as met:
        cs.open("a", limits=lowered)
    assert (met.value.limit, met.value.most) == (name, most)
    flag = name.replace("_", "-")
    ratio = ("--reader-limit", "view-ratio=1") if name == "view_bytes" else ()
    ran = ckpt("ls", "a", "--reader-limit", f"{flag}={most}", *ratio)
    assert ran.code == 2
    assert ran.err.startswith("ckpt: error: a: ")
    assert (
        f", over the limit of {most}; where the file is what you expect, `--reader-limit {flag}=N` raises it" in ran.err
    )
    assert len(ran.err.splitlines()) == 1
    assert ckpt("ls", "a").code == 0


def test_every_limit_can_be_met() -> None:
    """The others are a factor of one that is here, a depth at which a search ends without an error, and one that is
    met when values are read."""
    left = {field.name for field in fields(cs.Limits)} - {name for name, _, _ in MET}
    assert left == {"view_ratio", "depth", "inflated_view"}


def test_what_is_nested_deeper_than_the_limit_is_not_flattened() -> None:
    root: Any = {"w": torch.ones(1)}
    for _ in range(20):
        root = {"a": root}
    torch.save(root, "a")
    assert list(cs.open("a", "a.a")) == ["a." * 18 + "w"]
    with pytest.raises(cs.LimitError, match="is nested too deeply, over the limit of 5; .*`--reader-limit depth=N`"):
        cs.open("a", "a", limits=cs.Limits(depth=5))


@pytest.mark.parametrize("word", ["pickle=3", "opcodes", "opcodes=many", "opcodes=0", "=3"])
def test_an_unknown_limit_or_number_is_a_wrong_usage(word: str, ckpt: Any) -> None:
    _torch()
    ran = ckpt("ls", "a", "--reader-limit", word)
    assert ran.code == 2
    assert ran.err.startswith("ckpt: error: --reader-limit")


def test_an_output_that_is_many_times_its_source_is_refused_before_it_is_written(ckpt: Any) -> None:
    """Three hundred names of one tensor, each of which safetensors writes in full; a torch file keeps them tied."""
    _shared()
    lowered = ("--reader-limit", "view-bytes=100", "--reader-limit", "view-ratio=200")
    ran = ckpt("convert", "a", "out.safetensors", *lowered)
    assert ran.code == 2
    assert "its tensors, each in full (a .pth, or --tied alias, keeps what is shared), take 12" in ran.err
    assert "of 4000 that the file has for them, over the limit of 100; where the file is what you expect" in ran.err
    assert sorted(path.name for path in Path().iterdir()) == ["a"]
    assert ckpt("convert", "a", "out.pth", *lowered).code == 0
    assert ckpt("convert", "a", "out.safetensors", "--tied", "alias", *lowered).code == 0
    assert ckpt("convert", "a", "full.safetensors").code == 0


_TIGHT = ("--reader-limit", "view-bytes=1000", "--reader-limit", "view-ratio=64")
READING: dict[str, tuple[str, ...]] = {
    "stats": ("ls", "a", "--stats"),
    "values": ("diff", "a", "b", "--values"),
    "nan": ("verify", "a", "--nan"),
    "digest": ("verify", "a", "--digest"),
    "against": ("verify", "a", "--against", "b"),
    "proof": ("verify", "a", "--against", "b", "--rule", "prefix x."),
}


def _deflate(name: str) -> None:
    Path(name).rename("stored")
    with zipfile.ZipFile("stored") as old, zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    Path("stored").unlink()


@pytest.mark.parametrize("words", READING.values(), ids=READING.keys())
@pytest.mark.parametrize("form", ["overlapping", "far behind in a compressed record"])
def test_reading_many_times_what_a_file_holds_is_refused(form: str, words: tuple[str, ...], ckpt: Any) -> None:
    """Views of one storage that overlap are each as large as it; a small one that lies far behind in a compressed
    record costs all that is before it."""
    for name in "ab":
        base = torch.arange(1000.0)
        size = 900 if form == "overlapping" else 1
        prefix = "x." if name == "a" and "--rule" in words else ""
        torch.save({f"{prefix}{n}": base[99 - n :][:size] if size > 1 else base[999 - n] for n in range(99)}, name)
        if size == 1:
            _deflate(name)
    assert ckpt(*words).code == 0
    ran = ckpt(*words, *_TIGHT)
    assert ran.code == 2
    assert "to read its tensors one by one takes " in ran.err
    assert ", over the limit of 1000; where the file is what you expect, `--reader-limit view-bytes=N`" in ran.err


def test_a_file_of_views_that_overlap_is_not_proven_without_end(ckpt: Any) -> None:
    """It takes as long as its source, which holds each of them by itself, only where it is as large."""
    base = torch.arange(1000.0)
    torch.save({str(n): base[n : n + 900].clone() for n in range(99)}, "a")
    torch.save({f"x.{n}": base[n : n + 900] for n in range(99)}, "b")
    words = ("verify", "b", "--against", "a", "--rule", "prefix x.")
    assert ckpt(*words).code == 0
    ran = ckpt(*words, *_TIGHT)
    assert (ran.code, "to read its tensors one by one takes 356400 bytes, of 4000" in ran.err) == (2, True)


def test_what_lies_far_apart_costs_what_must_be_read(ckpt: Any) -> None:
    """Two views of a column: what is read along counts, and where that is too much, each call to the system."""
    base = torch.arange(200_000, dtype=torch.uint8)
    near, far = base.as_strided((49, 1), (4096, 1)), base.as_strided((10, 2), (20_000, 8400))
    torch.save({"near": near}, "near")
    torch.save({"far": far}, "far")
    for name, read in (("near", 48 * 4096 + 1), ("far", 20 * 8193)):
        tight = ("--reader-limit", "view-bytes=1000", "--reader-limit", "view-ratio=1")
        assert ckpt("verify", name, "--digest", *tight).code == 0
        assert ckpt("verify", name, "--digest").code == 0
        refs = [cs.open(name)[name]]
        with limited(cs.Limits(view_bytes=read - 1, view_ratio=0)):
            with pytest.raises(cs.LimitError, match=f"one by one takes {read} bytes, of 200000"):
                charges.reading(refs)
            with pytest.raises(cs.LimitError, match=f"take {read} bytes, of 200000"):
                charges.writing(refs, refs[0].nbytes)
        with limited(cs.Limits(view_bytes=read, view_ratio=0)):
            charges.reading(refs)
        assert torch.equal(refs[0].read(), {"near": near, "far": far}[name])


def test_members_that_nobody_names_are_not_inflated_without_end(ckpt: Any) -> None:
    torch.save({"w": torch.ones(3)}, "a")
    with zipfile.ZipFile("a", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/99", bytes(1 << 20))
    assert ckpt("verify", "a").code == 0
    ran = ckpt("verify", "a", *_TIGHT)
    assert ran.code == 2
    assert "compressed records of 1048576 bytes, in 10" in ran.err


def test_views_that_overlap_are_no_output_of_any_size(ckpt: Any) -> None:
    base = torch.arange(1000.0)
    torch.save({str(n): base[n : n + 900] for n in range(100)}, "a")
    for out in ("out.safetensors", "out.pth", "out/"):
        ran = ckpt("convert", "a", out, *_TIGHT)
        assert ran.code == 2
        assert "of 4000 that the file has for them, over the limit of 1000" in ran.err
    assert [path.name for path in Path().iterdir()] == ["a"]
    with (
        pytest.raises(cs.LimitError, match="to read its tensors one by one takes 360000 bytes, of 4000"),
        limited(cs.Limits(view_bytes=1000)),
    ):
        cs.open("a").state_dict()


def test_what_is_tied_is_read_once(ckpt: Any) -> None:
    """Three hundred names of one tensor cost as much as one, which is computed with in float64."""
    one = torch.ones(1000)
    torch.save({str(number): one[:] for number in range(300)}, "a")
    assert ckpt("ls", "a", "--stats", *_TIGHT, "--reader-limit", "view-ratio=2").code == 0
    ran = ckpt("ls", "a", "--stats", *_TIGHT, "--reader-limit", "view-ratio=1")
    assert (ran.code, "one by one takes 8000 bytes, of 4000 that the file has" in ran.err) == (2, True)


def test_a_view_in_a_compressed_record_is_inflated_once_and_within_a_limit(ckpt: Any) -> None:
    base = torch.arange(6 << 20, dtype=torch.int32).view(2048, -1)
    torch.save({"w": base.t(), "few": base[::2047, ::3000]}, "a")
    _deflate("a")
    found = cs.open("a")
    assert torch.equal(found["w"].read(), base.t())
    assert torch.equal(found["few"].read(), base[::2047, ::3000])
    assert b"".join(bytes(block) for block in found["w"].blocks(1 << 20)) == base.t().contiguous().numpy().tobytes()
    words = "in 25165824 bytes of a compressed record, over the limit of 20000000;"
    with pytest.raises(cs.LimitError, match=words), limited(cs.Limits(inflated_view=20_000_000)):
        found["w"].read()
    ran = ckpt("ls", "a", "--stats", "--reader-limit", "inflated-view=20000000")
    assert ran.code == 2
    assert "`--reader-limit inflated-view=N` raises it" in ran.err
    assert ckpt("convert", "a", "out.safetensors", "--reader-limit", "inflated-view=20000000").code == 0  # by the disk
    assert torch.equal(cs.open("out.safetensors")["w"].read(), base.t())


def test_limits_hold_in_every_thread_that_reads() -> None:
    met, found = threading.Barrier(3), list[int]()

    def work() -> None:
        met.wait(10)  # no thread does two of them
        found.append(current().depth)

    with limited(cs.Limits(depth=3)):
        workers.run([work] * 3, 3)
    assert found == [3, 3, 3]


def test_limits_hold_for_a_context_and_no_longer() -> None:
    with limited(cs.Limits(depth=3)):
        assert current().depth == 3
        with limited(None):
            assert current().depth == 3
    assert current() == cs.Limits()


BOMBS: dict[str, bytes] = {
    "lists": b"]" * 1_000_000,
    "dicts": b"}" * 1_000_000,
    "sets": b"\x8f" * 500_000,
    "tuples": b"N\x85" * 1_000_000,
    "texts": b"".join(b"\x8c\x03%03d" % (number % 1000) for number in range(800_000)),
    "numbers": b"M\xe8\x03" * 1_250_000,
    "memo": b"N" + b"".join(b"r" + struct.pack("<I", number) for number in range(750_000)),
    "memoised": b"N" + b"\x94" * 1_500_000,
    "calls": b"\x80\x02ccollections\nOrderedDict\nq\x00" + b"h\x00)R" * 500_000,
    "unknown calls": b"\x80\x02ca\nb\nq\x00" + b"h\x00)R" * 500_000,
    "instances": b"\x80\x02ca\nb\nq\x00" + b"h\x00)\x81" * 500_000,
    "pairs": b"}" + b"".join(b"(M" + struct.pack("<H", n % 65536) + b"Ku" for n in range(10)) + b"]" * 1_125_000,
}
EIGHTH = 48
"""MiB: an eighth of what the objects of a pickle may take where nothing else is said."""


def grown(raw: bytes, mib: int) -> int:
    """By how many MiB a process grows that reads a bomb within so many, and is refused."""
    Path("bomb").write_bytes(raw)
    script = (
        "import ckptsurgeon as cs\n"
        "from ckptsurgeon.formats import _pickle\n"
        "data = open('bomb', 'rb').read()\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "try:\n"
        f"    _pickle.loads(data, limits=cs.Limits(pickle_memory={mib} << 20))\n"
        "except (cs.LimitError, _pickle.BadPickle) as error:\n"
        "    print(type(error).__name__, (peak() - before) // 1024)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return int(ran.stdout.split()[1])


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_objects_is_charged_before_it_is_made(name: str) -> None:
    """A pickle of a megabyte that would be many of objects ends at its budget: measured in a process."""
    assert grown(BOMBS[name], EIGHTH) < 64


def test_the_budget_of_objects_is_what_it_says() -> None:
    """Eight times the bomb, for the limit that holds where nothing else is said."""
    assert cs.Limits().pickle_memory == 8 * EIGHTH << 20
    assert grown(BOMBS["lists"] * 8, 8 * EIGHTH) < 512


def test_a_header_of_brackets_is_no_tree_of_objects() -> None:
    """Thirty million brackets in a safetensors header are refused before any is an object."""
    header = b'{"a":' + b"[" * 15_000_000 + b"]" * 15_000_000 + b"}"
    Path("a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    script = (
        "import ckptsurgeon as cs\n"
        "try:\n"
        "    cs.open('a.safetensors')\n"
        "except cs.InputError as error:\n"
        "    print(error)\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    error, peak = ran.stdout.splitlines()
    assert error == ("a.safetensors: damaged safetensors header: 'a' is no entry of dtype, shape and data_offsets")
    assert int(peak) < 200_000


def test_the_budget_of_a_pickle_grows_with_its_bytes() -> None:
    data = b"(" + b"]" * 1000 + b"l."
    tree, _ = _pickle.loads(data, limits=cs.Limits(pickle_memory=71_000))
    assert tree == [[]] * 1000
    with pytest.raises(cs.LimitError, match="near byte 97[0-9]"):
        _pickle.loads(data, limits=cs.Limits(pickle_memory=68_000))


def test_the_budget_is_one_for_all_pickles_of_an_opening() -> None:
    """Two shards that fit alone do not fit together, and neither do two packages' pickles."""
    for name in "ab":
        torch.save({f"{name}{number}": torch.ones(1) for number in range(200)}, f"{name}.bin")
    names = {f"{name}{number}": f"{name}.bin" for name in "ab" for number in range(200)}
    Path("i.bin.index.json").write_text(json.dumps({"weight_map": names}))
    lowered = cs.Limits(pickle_memory=120_000)
    for path in ("a.bin", "b.bin"):
        assert len(cs.open(path, limits=lowered)) == 200
    with pytest.raises(cs.LimitError, match="more memory, near byte"):
        cs.open("i.bin.index.json", limits=lowered)
    assert len(cs.open("i.bin.index.json", limits=cs.Limits(pickle_memory=240_000))) == 400
    steps = cs.Limits(opcodes=9000)
    assert len(cs.open("b.bin", limits=steps)) == 200
    with pytest.raises(cs.LimitError, match="more steps of pickles, over the limit of 9000"):
        cs.open("i.bin.index.json", limits=steps)

"""Many keys and many shards: what is read at once is what is read one by one, and little is kept."""

from __future__ import annotations

import gc
import json
import os
import pickletools
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_legacy
from safetensors.torch import save_file

import ckptsurgeon as cs
from ckptsurgeon.dtypes import DType
from ckptsurgeon.formats import _pickle, _records
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.formats._rebuild import builders
from ckptsurgeon.formats._tensors import Storage, Storages
from ckptsurgeon.inert import Opaque
from ckptsurgeon.limits import DEFAULT, Limits
from ckptsurgeon.sources import Absent, File, Record
from ckptsurgeon.tensor import TensorRef


def state(layers: int = 20) -> OrderedDict[str, Any]:
    """Tensors of many forms: views, ties, parameters, scalars, many dimensions, other values between them."""
    made: OrderedDict[str, Any] = OrderedDict()
    flat = torch.arange(600.0)
    for i in range(layers):
        made[f"layers.{i}.weight"] = torch.zeros(3, 4)
        made[f"layers.{i}.bias"] = torch.zeros(300)
        made[f"layers.{i}.norm.num_batches_tracked"] = torch.tensor(i)
        made[f"layers.{i}.kernel"] = torch.zeros(2, 1, 3, 3, 2)
        made[f"layers.{i}.half"] = torch.zeros(70_000, dtype=torch.bfloat16)
        made[f"layers.{i}.turned"] = torch.zeros(4, 3).t()
        made[f"layers.{i}.part"] = torch.zeros(40)[10:30]
        made[f"layers.{i}.view"] = flat[i * 10 : i * 10 + 10]
        made[f"layers.{i}.empty"] = torch.zeros(0, 3)
        made[f"layers.{i}.tied é"] = made[f"layers.{i}.weight"]
        made[f"layers.{i}.parameter"] = torch.nn.Parameter(torch.zeros(2))
        made[f"layers.{i}.grad"] = torch.zeros(2, requires_grad=True)
    made["word"] = "layers"
    made["epoch"] = 3
    return made


def bundle() -> dict[str, Any]:
    model = torch.nn.Sequential(*(torch.nn.BatchNorm2d(3) for _ in range(30)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "state_dict": model.state_dict(), "ema": state(), "model": model}


def plain(value: Any, above: tuple[int, ...] = ()) -> Any:
    """A tree as something that compares by value, with everything that is in it."""
    if id(value) in above:
        return "above"
    above = (*above, id(value))
    if isinstance(value, TensorRef):
        source: Any = value.source
        if isinstance(source, Absent):  # which is compared by identity
            source = (source.form, [(name, plain(part, above)) for name, part in source.parts], source.closed)
        return ("tensor", value.spec, source, value.stored, value.quantizer)
    if isinstance(value, dict):
        items = [(plain(key, above), plain(member, above)) for key, member in value.items()]
        return (type(value).__name__, items, plain(getattr(value, "_metadata", None), above))
    if isinstance(value, list | tuple):
        return (type(value).__name__, [plain(member, above) for member in value])
    if isinstance(value, Opaque):
        parts = (value.args, value.state, value.items, value.pairs)
        return (value.name, [plain(part, above) for part in parts])
    return (type(value).__name__, value if value == value else "nan")


def pickled(
    obj: object, save: Callable[..., None] = torch.save
) -> tuple[bytes, Callable[[str, DType, int, str], Storage]]:
    """The pickle that torch makes of an object, and where its storages would be."""
    save(obj, "a.pth")
    if save is torch.save:
        with zipfile.ZipFile("a.pth") as archive:
            raw = archive.read("a/data.pkl")
            sizes = {name.rpartition("/")[2]: archive.getinfo(name).file_size for name in archive.namelist()}
    else:
        file, start = Path("a.pth").read_bytes(), 0
        for _ in range(3):
            start = _pickle.loads(file, start=start)[1]
        raw, sizes = file[start : max(at for _, _, at in pickletools.genops(file[start:])) + start + 1], None

    def locate(key: str, dtype: DType, elements: int, device: str) -> Storage:
        nbytes = elements * dtype.itemsize
        if sizes is not None and sizes.get(key) != nbytes:
            raise BadRecord(f"the storage {key!r} is not there")
        begin = 64 * int(key) if key.isdigit() else 0
        return Storage(File("f", 1 << 60, 0, 0), begin, nbytes, dtype, device, record=Record(key, begin, nbytes, 7))

    return raw, locate


def outcome(raw: bytes, locate: Any, limits: Limits = DEFAULT) -> Any:
    """The tree, and where it ends; or the error, and the key that it names."""
    try:
        tree, end = _pickle.loads(raw, builders=builders(limits), persistent=Storages(locate), limits=limits)
        return plain(tree), end
    except (_pickle.BadPickle, BadRecord, cs.LimitError) as error:
        return type(error), getattr(error, "cause", str(error)), getattr(error, "key", None)


def both(raw: bytes, locate: Any, limits: Limits = DEFAULT) -> tuple[Any, Any]:
    """What is read with whole records, and opcode by opcode."""
    fast = outcome(raw, locate, limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_records.Records, "read", lambda self, at, stack, room: (at, 0))
        return fast, outcome(raw, locate, limits)


OBJECTS: dict[str, Callable[[], object]] = {
    "a state dict": state,
    "a bundle": bundle,
    "a list": lambda: list(state().values()),
    "the state dict of a model": lambda: torch.nn.TransformerEncoderLayer(8, 2).state_dict(),
    "a quantised tensor": lambda: {
        str(i): torch.quantize_per_tensor(torch.ones(2), 0.1, 1, torch.qint8) for i in range(60)
    },
    "conjugates": lambda: {str(i): torch.ones(2, dtype=torch.complex64).conj() for i in range(60)},
    "sparse": lambda: {str(i): torch.eye(2).to_sparse() for i in range(60)},
}


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.filterwarnings("ignore")
def test_whole_records_give_the_very_tree_of_the_opcodes(name: str, save: Any) -> None:
    fast, slow = both(*pickled(OBJECTS[name](), save))
    assert len(fast) == 2, fast
    assert fast == slow


def test_most_tensors_are_read_as_whole_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the persistent ids: one for each form and batch of items, not one for each tensor."""
    for save in (torch.save, save_legacy):
        raw, locate = pickled({f"layers.{i}.weight": torch.zeros(2) for i in range(5000)}, save)
        calls = 0

        class Counted(Storages):
            def __call__(self, pid: Any) -> Any:
                nonlocal calls
                calls += 1
                return super().__call__(pid)

        _pickle.loads(raw, builders=builders(DEFAULT), persistent=Counted(locate))
        assert calls < 100


@pytest.mark.no_cover
@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_a_damaged_pickle_is_read_or_refused_alike_both_ways(save: Any) -> None:
    raw, locate = pickled(state(3), save)
    chance = random.Random(0)
    for _ in range(1500):
        damaged = bytearray(raw)
        for _ in range(chance.choice((1, 1, 2))):
            at = chance.randrange(len(raw))
            damaged[at] = chance.choice((chance.randrange(256), raw[chance.randrange(len(raw))]))
        fast, slow = both(bytes(damaged), locate)
        assert fast == slow
    for cut in range(0, len(raw), 37):
        fast, slow = both(raw[:cut], locate)
        assert fast == slow


@pytest.mark.no_cover
def test_the_steps_of_whole_records_are_counted() -> None:
    """At every limit around the steps of the pickle both ways end alike, and below it with an error."""
    for save in (torch.save, save_legacy):
        raw, locate = pickled(state(3), save)
        steps = sum(1 for _ in pickletools.genops(raw))
        for most in (*range(300, 360), *range(steps - 40, steps + 3)):
            fast, slow = both(raw, locate, Limits(opcodes=most))
            assert fast == slow
            assert (len(fast) == 3) == (most < steps - 1)


def asked(raw: bytes) -> tuple[bytes, list[int]]:
    """The pickle, with everything that it put aside put into a tuple behind its object."""
    numbers = [arg for opcode, arg, _ in pickletools.genops(raw) if opcode.name in ("BINPUT", "LONG_BINPUT")]
    gets = b"".join(b"j" + struct.pack("<I", number) for number in numbers)
    return raw[:-1] + b"(" + gets + b"t\x86.", numbers


def test_what_a_whole_record_put_aside_is_there_for_who_asks() -> None:
    raw, locate = pickled(state(5))
    (again, numbers), limits = asked(raw), DEFAULT
    assert len(numbers) > 300
    fast, slow = both(again, locate)
    assert fast == slow
    tree, put = _pickle.loads(again, builders=builders(limits), persistent=Storages(locate))[0]
    refs = {id(value) for value in put if isinstance(value, TensorRef)}
    assert {id(value) for value in tree.values() if isinstance(value, TensorRef)} <= refs


def test_numbers_that_are_put_anew_are_what_was_put_last() -> None:
    """Among them those that whole records had, that they are to get, and those that are counted on (MEMOIZE)."""
    raw, locate = pickled(state(5))
    last = max(asked(raw)[1])
    for number in (300, last - 100, last, last + 1):
        for early in (0, 1):
            put = b"K\x07r" + struct.pack("<I", number) + b"0"
            begin = raw.index(b"X", 2)
            body = raw[:begin] + put + raw[begin:-1] if early else raw[:-1] + put
            for end in (
                b"j" + struct.pack("<I", number),
                b"\x94j" + struct.pack("<I", last + 1),
                b"K\x05\x94j" + struct.pack("<I", last + 2),
            ):
                fast, slow = both(body + end + b"\x86.", locate)
                assert fast == slow


@pytest.mark.no_cover
def test_a_number_put_anew_stays_when_its_record_is_made_again() -> None:
    raw, locate = pickled(state(5))
    last = max(asked(raw)[1])
    for number in range(last - 100, last):
        put = b"K\x07r" + struct.pack("<I", number) + b"0."
        fast, slow = both(asked(raw[:-1] + put)[0], locate)
        assert fast == slow


def test_a_number_out_of_turn_is_found() -> None:
    raw, locate = pickled(state(5))
    for number in range(400, 430):
        old, new = (b"r" + struct.pack("<I", value) for value in (number, number + 70_000))
        fast, slow = both(asked(raw.replace(old, new, 1))[0], locate)
        assert fast == slow


def test_a_tuple_of_fewer_numbers_than_stand_before_it() -> None:
    raw, locate = pickled({str(i): torch.zeros(3, 4) for i in range(60)})
    at = raw.rindex(b"K\x03K\x04\x86")
    fast, slow = both(raw[:at] + b"K\x03K\x04\x85" + raw[at + 5 :], locate)
    assert fast == slow
    assert "shape is no tuple" in fast[1]


def test_a_type_that_is_put_anew_between_two_batches_is_seen() -> None:
    raw, locate = pickled({str(i): torch.zeros(3) for i in range(1200)})
    at = raw.index(b"u(X") + 1
    number = raw[raw.index(b"FloatStorage\n") + len(b"FloatStorage\n") :][:2]
    assert number[:1] == b"q"
    fast, slow = both(raw[:at] + b"ctorch\nDoubleStorage\n" + number + b"0" + raw[at:], locate)
    assert fast == slow
    assert "is not there" in fast[1]


def test_no_record_is_read_beyond_the_steps_that_are_allowed() -> None:
    raw, locate = pickled({str(i): torch.zeros(3) for i in range(900)})
    found: list[str] = []

    def noted(key: str, *rest: Any) -> Storage:
        found.append(key)
        return locate(key, *rest)

    assert outcome(raw, noted, Limits(opcodes=3000))[1] == "more steps of pickles, over the limit of 3000"
    assert 90 < len(found) < 110


def test_headers_of_small_members_are_read_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({str(i): torch.zeros(2) for i in range(1000)}, "a.pth")
    calls = 0
    pread = os.pread

    def counted(*args: int) -> bytes:
        nonlocal calls
        calls += 1
        return pread(*args)

    monkeypatch.setattr(os, "pread", counted)
    assert len(cs.open("a.pth")) == 1000
    assert calls < 50


def test_the_garbage_collector_is_as_it_was() -> None:
    torch.save({"a": torch.zeros(2)}, "a.pth")
    Path("b.pth").write_bytes(b"nothing")
    assert gc.isenabled()
    cs.open("a.pth")
    with pytest.raises(cs.InputError):
        cs.open("b.pth")
    assert gc.isenabled()


# -- memory


def peak(*words: str) -> int:
    """The most MiB that a command ever held, in a process of its own."""
    script = (
        "import sys\nfrom ckptsurgeon.cli.app import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code in (0, 1), end.code\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    return int(ran.stderr.splitlines()[-1]) // 1024


def test_forty_thousand_keys_take_little_memory() -> None:
    """In processes of their own, by the most that each ever held."""
    names = ("attn.qkv.weight", "attn.qkv.bias", "norm.weight", "norm.running_mean")
    torch.save({f"layers.{i // 4}.{names[i % 4]}": torch.zeros(2, 2) for i in range(40_000)}, "a.pth")
    rules = [rf"^layers\.(\d+)\.(.*) => stages.\1.{i}.\2" for i in range(1)] + [
        rf"^stages\.(\d+)\.{i}\. => stages.\1.{i + 1}." for i in range(5)
    ]
    assert peak("ls", "a.pth") < 85
    assert peak("diff", "a.pth", "a.pth") < 110
    assert peak("remap", "a.pth", "--dry-run", *(word for rule in rules for word in ("--rule", rule))) < 120


# -- plans


def test_the_edges_of_a_plan_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon import planner

    torch.save({f"a.{i}": torch.zeros(2) for i in range(30)}, "a.pth")
    rules = ["a => b", r"drop b\.0$", "cast b\\.1$ bf16", r"b\.2$ => b.2"]
    applied = 0
    apply = planner._Work.apply

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal applied
        applied += 1
        apply(self, *args, **kwargs)

    monkeypatch.setattr(planner._Work, "apply", counted)
    plan = cs.plan("a.pth", rules)
    assert [len(step.edges) for step in plan.steps] == [30, 1, 1, 0]
    assert [step.edges.first for step in plan.steps] == [
        (("a.0",), ("b.0",)),
        (("b.0",), ()),
        (("b.1",), ("b.1",)),
        None,
    ]
    assert applied == 4
    assert list(plan.steps[0].edges) == [((f"a.{i}",), (f"b.{i}",)) for i in range(30)]
    assert plan.steps[1].edges[0] == (("b.0",), ())
    assert list(plan.steps[3].edges) == []
    assert applied == 8


def test_a_cast_beside_an_empty_name_is_about_its_own_key_alone() -> None:
    torch.save({"": torch.zeros(2), "a": torch.zeros(2)}, "a.pth")
    plan = cs.plan("a.pth", ["cast a bf16"])
    assert plan.ok
    assert [ref.dtype.name for ref in plan.result.values()] == ["float32", "bfloat16"]


# -- what is shown


@pytest.fixture
def differing() -> None:
    torch.save(
        {f"layer.{i}.w": torch.zeros(2) for i in range(50)} | {"fc.w": torch.zeros(3), "fc.b": torch.zeros(1)}, "a.pth"
    )
    shapes = {f"layer.{i}.w": torch.zeros(i + 3) for i in range(50)}
    torch.save(shapes | {"fc.w": torch.zeros(4), "fc.b": torch.zeros(1)}, "b.pth")


@pytest.mark.usefixtures("differing")
def test_diff_shows_at_most_so_many_rows_and_counts_them_all(ckpt: Any) -> None:
    whole, some, none = (ckpt("diff", "a.pth", "b.pth", *more) for more in ((), ("--limit", 3), ("--limit", 0)))
    assert {whole.code, some.code, none.code} == {1}
    rows, rest = whole.out.split("\n\n", 1)
    assert len(rows.splitlines()) == 52
    assert "51 of another shape" in rest
    shown, counted = some.out.split("\n\n", 1)
    assert len(shown.splitlines()) == 5
    assert shown.splitlines()[-1] == "… and 48 more rows (--limit, --match)"
    assert [line.split() for line in shown.splitlines()[:4]] == [line.split() for line in rows.splitlines()[:4]]
    assert counted == rest
    assert none.out == "… and 51 more rows (--limit, --match)\n\n" + rest


@pytest.mark.usefixtures("differing")
def test_diff_shows_the_keys_that_match_and_judges_all(ckpt: Any) -> None:
    fc = ckpt("diff", "a.pth", "b.pth", "--match", "^fc")
    assert fc.code == 1
    assert [line.split()[:2] for line in fc.out.split("\n\n")[0].splitlines()[1:]] == [["shape", "fc.w"]]
    equal = ckpt("diff", "a.pth", "b.pth", "--match", "^fc.b$")
    assert equal.code == 1
    assert equal.out == fc.out.split("\n\n", 1)[1]
    wrong = ckpt("diff", "a.pth", "b.pth", "--match", "(")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("ckpt: error: --match (: not a regular expression")


@pytest.mark.usefixtures("differing")
def test_the_json_of_diff_keeps_the_keys_that_are_asked_for(ckpt: Any) -> None:
    whole = ckpt("diff", "a.pth", "b.pth", "--json").json
    some = ckpt("diff", "a.pth", "b.pth", "--json", "--match", "layer", "--limit", 2).json
    assert (whole["not_shown"], some["not_shown"]) == (0, 48)
    assert some["keys"] == whole["keys"][:2]
    assert {key: whole[key] for key in ("counts", "coverage", "same")} == {
        key: some[key] for key in ("counts", "coverage", "same")
    }


def test_the_values_that_differ_are_limited_too(ckpt: Any) -> None:
    for value in (0.0, 1.0):
        torch.save({str(i): torch.full((2,), value) for i in range(9)}, f"{value}.pth")
    ran = ckpt("diff", "0.0.pth", "1.0.pth", "--values", "--limit", 2)
    assert ran.code == 1
    assert [line.split()[:2] for line in ran.out.splitlines()[1:3]] == [["values", "0"], ["values", "1"]]
    assert ran.out.splitlines()[3] == "… and 7 more rows (--limit, --match)"
    assert "9 of other values" in ran.out


# -- shards


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened."""
    names: list[str] = []
    os_open = os.open

    def noted(path: Any, *args: Any, **kwargs: Any) -> int:
        names.append(os.path.basename(os.fsdecode(path)))
        return os_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", noted)
    return names


def test_a_shard_by_its_own_name_is_the_only_file_that_is_opened(opened: list[str]) -> None:
    names = [f"model-{i + 1:05}-of-00030.safetensors" for i in range(30)]
    for i, name in enumerate(names):
        save_file({f"layers.{i}.{j}": torch.zeros(2) for j in range(3)}, name)
    weight_map = {f"layers.{i}.{j}": name for i, name in enumerate(names) for j in range(3)}
    Path("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    opened.clear()
    assert list(cs.open(names[7])) == ["layers.7.0", "layers.7.1", "layers.7.2"]
    assert opened == [names[7]]
    opened.clear()
    assert len(cs.open("model.safetensors.index.json")) == 90
    assert sorted(opened) == sorted(["model.safetensors.index.json", *names])

"""The tar form of the earliest torch: made here by hand, as `legacy_load` of torch reads it."""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, bits

import ckptsurgeon as cs


class Key:
    """Stands in the object for a tensor or storage that the archive stores beside it."""

    def __init__(self, key: int) -> None:
        self.key = key


class _Pickler(pickle.Pickler):
    """Names tensors and storages by their keys, and a module's class, the first time, with its source (none)."""

    noted: frozenset[Any] = frozenset()

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Key):
            return str(obj.key)
        if not isinstance(obj, type) or not issubclass(obj, torch.nn.Module) or obj in self.noted:
            return None
        self.noted |= {obj}
        return obj, None, None


STORAGES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
}
"""All that the earliest torch had."""


class Legacy:
    """The three members of the archive; change a field before `members()` to make a bad one."""

    def __init__(self) -> None:
        self.storages: list[tuple[Any, str, Any, int, bytes]] = []
        self.views: list[Any] = []
        self.tensors: list[tuple[Any, Any, list[int], list[int], int]] = []
        self.count: dict[str, int] = {}

    def storage(self, key: Any, tensor: torch.Tensor, device: str = "cpu") -> None:
        kind = getattr(torch, STORAGES[tensor.dtype] + "Storage")
        self.storages.append((key, device, kind, tensor.numel(), bits(tensor).numpy().tobytes()))

    def tensor(self, key: Any, storage: Any, shape: list[int], strides: list[int], offset: int = 0) -> Key:
        self.tensors.append((key, storage, shape, strides, offset))
        return Key(key)

    def members(self, obj: Any) -> dict[str, bytes]:
        stored = pickle.dumps(self.count.get("storages", len(self.storages)), 2)
        for key, device, kind, elements, raw in self.storages:
            stored += pickle.dumps((key, device, kind), 2) + struct.pack("<q", elements) + raw
        stored += pickle.dumps(self.views, 2)
        tensors = pickle.dumps(self.count.get("tensors", len(self.tensors)), 2)
        for key, storage, shape, strides, offset in self.tensors:
            n = len(shape)
            tensors += pickle.dumps((key, storage, torch.FloatTensor), 2) + struct.pack("<ii", n, 0)
            tensors += struct.pack(f"<{2 * n + 1}q", *shape, *strides, offset)
        buffer = io.BytesIO()
        _Pickler(buffer, 2).dump(obj)
        info = pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2)
        return {"sys_info": info, "pickle": buffer.getvalue(), "tensors": tensors, "storages": stored}


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.mtime = size, kind, 1480000000.25  # type: ignore[assignment]  # a pax header, as then
    return made


def tar(members: dict[str, bytes] | list[tuple[Any, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, raw in members.items() if isinstance(members, dict) else members:
            header = name if isinstance(name, tarfile.TarInfo) else info(name, len(raw))
            archive.addfile(header, io.BytesIO(raw))
    return buffer.getvalue()


W, FLAT, COUNT = torch.arange(12.0).reshape(3, 4) / 7, torch.arange(6.0) - 2.5, torch.tensor(9)


def example() -> tuple[Legacy, OrderedDict[str, Key], OrderedDict[str, torch.Tensor]]:
    """A state dict with a plain tensor, a tied one, a transposed one, a view of a storage view, a scalar."""
    made = Legacy()
    made.storage(101, W, "cuda:1")
    made.storage(102, FLAT)
    made.storage(103, COUNT)
    made.views.append((104, 102, 2, 3))
    keys = OrderedDict(
        w=made.tensor(1, 101, [3, 4], [4, 1]),
        tied=Key(1),
        t=made.tensor(2, 101, [4, 3], [1, 4]),
        row=made.tensor(3, 101, [4], [1], 8),
        view=made.tensor(4, 104, [2], [1], 1),
        n=made.tensor(5, 103, [], []),
    )
    want = OrderedDict(w=W, tied=W, t=W.t(), row=W[2], view=FLAT[3:5], n=COUNT)
    return made, keys, want


def write(raw: bytes, name: str = "a.pth.tar") -> None:
    Path(name).write_bytes(raw)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_every_form_of_tensor_is_read_bit_for_bit(format: int) -> None:
    made, keys, want = example()
    write(tar(made.members(keys), format))
    ckpt = cs.open("a.pth.tar")
    assert ckpt.origin.format == "torch-tar"
    assert_same_tensors(ckpt, want)
    assert ckpt.tied() == (("w", "tied"),)
    assert ckpt["w"].stored.device == "cuda:1"
    assert ckpt["row"].stored.nbytes == 48


def test_a_bundle_is_opened_and_converted_to_a_file_that_torch_loads(ckpt: Any) -> None:
    made, keys, want = example()
    write(tar(made.members({"epoch": 3, "state_dict": keys, "storage": Key(102)})))
    assert cs.open("a.pth.tar").origin.selected == "state_dict"
    assert ckpt("ls", "--tree", "a.pth.tar").code == 0
    assert ckpt("convert", "a.pth.tar", "b.pth").code == 0
    assert_same_tensors(torch.load("b.pth", weights_only=True), want)


def test_a_pickled_module_is_its_state_dict_and_its_class_is_a_container() -> None:
    """Classes of modules are persistent ids too: a tuple of the class and its source."""
    made, keys, want = example()

    class Parameter:
        def __reduce__(self) -> Any:
            return torch.nn.parameter.Parameter, (keys["w"],), (True, False, None)

    class Module:
        def __reduce__(self) -> Any:
            state = {"_parameters": {"weight": Parameter()}, "_buffers": {"n": keys["n"]}, "_modules": {}}
            return copyreg._reconstructor, (torch.nn.Linear, object, None), state  # type: ignore[attr-defined]

    write(tar(made.members(Module())))
    ckpt = cs.open("a.pth.tar")
    assert_same_tensors(ckpt, {"weight": want["w"], "n": want["n"]})
    assert ckpt["weight"].role == "parameter"


def test_a_list_of_storages_larger_than_the_first_look() -> None:
    made = Legacy()
    made.storage(0, torch.arange(4000.0))
    made.views = [(i, 0, i, 1) for i in range(1, 4000)]
    write(tar(made.members({"w": made.tensor(9999, 3999, [1], [1])})))
    assert cs.open("a.pth.tar")["w"].read().tolist() == [3999.0]


def test_a_file_that_is_cut_anywhere_is_an_input_error() -> None:
    made, keys, _ = example()
    raw = tar(made.members(keys))
    end = len(raw.rstrip(b"\0"))
    for cut in [*range(0, end, 37), *range(0, end + 1024, 512)]:
        write(raw[: min(cut, len(raw))], "cut")
        with pytest.raises(cs.InputError, match="^cut: "):
            cs.open("cut")


def _change(**fields: Any) -> Callable[[Legacy], None]:
    def change(made: Legacy) -> None:
        for name, value in fields.items():
            setattr(made, name, value)

    return change


def _resized(elements: int) -> Callable[[Legacy], None]:
    def change(made: Legacy) -> None:
        made.storages[-1] = (*made.storages[-1][:3], elements, made.storages[-1][4])

    return change


BAD_CONTENT: dict[str, tuple[Callable[[Legacy], None], str]] = {
    "a tensor larger than its storage": (
        lambda made: made.tensors.append((6, 103, [2], [1], 0)),
        "needs 16 bytes of a storage of 8",
    ),
    "a stride past the storage": (lambda made: made.tensors.append((6, 101, [3], [6], 0)), "needs 52 bytes"),
    "a negative stride": (lambda made: made.tensors.append((6, 101, [3], [-1], 2)), "-1, no count"),
    "a negative offset": (lambda made: made.tensors.append((6, 101, [3], [1], -1)), "-1, no count"),
    "a storage that is missing": (_change(storages=[]), "the storage 102, of which another is a view, is missing"),
    "a tensor of a storage that is missing": (
        lambda made: made.tensors.append((6, 999, [1], [1], 0)),
        "the storage 999 of the tensor 6 is missing",
    ),
    "a tensor that is missing": (lambda made: made.tensors.pop(0) and None, "the tensor 1 is missing"),
    "too many storages announced": (_change(count={"storages": 9}), "a storage is described by list"),
    "too few storages announced": (_change(count={"storages": 2}), "storage views are no list"),
    "too many tensors announced": (_change(count={"tensors": 9}), "pickle"),
    "too few tensors announced": (_change(count={"tensors": 2}), "bytes follow the end of 'tensors'"),
    "a negative number of tensors": (_change(count={"tensors": -1}), "-1, no count"),
    "a storage larger than the file": (_resized(1 << 60), "announces 9223372036854775808 bytes"),
    "a storage of negative size": (_resized(-1), "-1, no count"),
    "a storage one element short": (_resized(0), "is no opcode"),
    "two storages of one key": (lambda made: made.storages.append(made.storages[0]), "two objects have the key 101"),
    "two tensors of one key": (lambda made: made.tensors.append(made.tensors[0]), "two objects have the key 1"),
    "a tensor with a storage's key": (
        lambda made: made.tensors.append((101, 101, [1], [1], 0)),
        "two objects have the key 101",
    ),
    "a view past its storage": (_change(views=[(104, 102, 4, 3)]), "a storage view of bytes 16–28 of 24"),
    "a view of nothing": (_change(views=[(104, 77, 0, 1)]), "the storage 77, of which another is a view, is missing"),
    "a view that is no view": (_change(views=[7]), "a storage view that torch does not write"),
    "too many dimensions": (lambda made: made.tensors.append((6, 101, [1] * 65, [1] * 65, 0)), "65 dimensions"),
    "a key that is no number": (lambda made: made.tensors.append(("x", 101, [1], [1], 0)), "'x', no count"),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_contents_that_disagree_are_refused(case: str, ckpt: Any) -> None:
    change, words = BAD_CONTENT[case]
    made, keys, _ = example()
    change(made)
    write(tar(made.members(keys)))
    ran = ckpt("ls", "a.pth.tar")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("ckpt: error: a.pth.tar: ")
    assert ("damaged torch tar: " in ran.err) == (case != "too many dimensions")  # which is a limit that can be raised
    assert words in ran.err


def _swapped(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def _without(name: str) -> Callable[[dict[str, bytes]], bytes]:
    return lambda members: tar({key: raw for key, raw in members.items() if key != name})


BAD_ARCHIVES: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "no pickle": (_without("pickle"), "the member 'pickle' is missing"),
    "no tensors": (_without("tensors"), "the member 'tensors' is missing"),
    "no storages": (_without("storages"), "the member 'storages' is missing"),
    "a doubled member": (lambda m: tar([*m.items(), ("pickle", m["pickle"])]), "two members are named 'pickle'"),
    "a path out of the archive": (lambda m: tar({**m, "../../x": b""}), "'../../x' (a file) is no member"),
    "an absolute path": (lambda m: tar({**m, "/tmp/x": b""}), "'/tmp/x' (a file) is no member"),
    "a link": (lambda m: tar([*m.items(), (info("x", kind=tarfile.SYMTYPE), b"")]), "'x' (a link) is no member"),
    "a link for a member": (
        lambda m: tar([(info("pickle", kind=tarfile.LNKTYPE), b"")]),
        "'pickle' (a link) is no member",
    ),
    "a device": (lambda m: tar([*m.items(), (info("x", kind=tarfile.CHRTYPE), b"")]), "'x' (a device) is no member"),
    "a sparse member": (
        lambda m: tar([*m.items(), (info("x", kind=tarfile.GNUTYPE_SPARSE), b"")]),
        "a member of the kind b'S'",
    ),
    "another archive behind it": (lambda m: tar(m) + tar(m), "more follows the end of the archive"),
    "bytes after a pickle": (lambda m: tar({**m, "pickle": m["pickle"] + b"x"}), "1 bytes follow the end of 'pickle'"),
    "bytes after the storages": (lambda m: tar({**m, "storages": m["storages"] + b"x"}), "follow the end of 'storages"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_archives_that_torch_does_not_write_are_refused(case: str) -> None:
    make, words = BAD_ARCHIVES[case]
    made, keys, _ = example()
    write(make(made.members(keys)))
    with pytest.raises(cs.InputError, match=r"^a\.pth\.tar: damaged torch tar: ") as caught:
        cs.open("a.pth.tar")
    assert words in str(caught.value)


def test_headers_are_checked() -> None:
    """A wrong checksum, a size that is no number, a pax record of a wrong length, one block of zeros at the end."""
    made, keys, _ = example()
    raw = tar(made.members(keys), tarfile.USTAR_FORMAT)
    second = 512 + 512
    assert raw[second : second + 6] == b"pickle"
    pax = tar(made.members(keys))
    end = len(raw.rstrip(b"\0"))
    end += -end % 512
    for damaged, words in (
        (_swapped(raw, second, b"pickled"), "its checksum is wrong"),
        (_swapped(pax, pax.index(b"mtime=") - 3, b"99"), "records do not fit"),
        (raw[: end + 512], "one block of zeros"),
        (raw[:end], "without an end mark"),
    ):
        write(damaged)
        with pytest.raises(cs.InputError, match=words):
            cs.open("a.pth.tar")


def test_a_file_with_flipped_bytes_is_opened_or_refused_and_never_crashes() -> None:
    import random

    made, keys, _ = example()
    raw = tar(made.members(keys))
    raw = raw[: len(raw.rstrip(b"\0")) + 1024]
    chance = random.Random(0)
    for _ in range(1000):
        damaged = bytearray(raw)
        damaged[chance.randrange(len(raw))] = chance.randrange(256)
        write(damaged, "flipped")
        try:
            for ref in cs.open("flipped").values():
                sum(len(block) for block in ref.blocks())
        except cs.CkptError as error:
            assert str(error).startswith("flipped: ")

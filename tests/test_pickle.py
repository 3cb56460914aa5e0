"""The inert reader: every opcode that data needs, and nothing that a file names is ever run."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import save_legacy
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgeon as cs
from ckptsurgeon.formats import _pickle
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.inert import Opaque

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(PLAIN, st.integers(0, 5))
def test_plain_data_of_every_protocol_is_itself(value: object, protocol: int) -> None:
    raw = pickle.dumps(value, protocol)
    got, end = _pickle.loads(raw)
    assert got == value
    assert end == len(raw)


@given(PLAIN)
def test_a_pickle_that_ends_anywhere_is_truncated(value: object) -> None:
    raw = pickle.dumps(value, 2)
    for cut in range(len(raw)):
        with pytest.raises(_pickle.BadPickle):
            _pickle.loads(raw[:cut])


def test_python_2_strings_and_longs() -> None:
    assert _pickle.loads(b"(S'a\\x41'\np0\nI01\nL5L\nU\x01zt.")[0] == ("aA", True, 5, "z")


class Canary:
    """Pickled, it is a call that would make a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


CALLS = {
    "REDUCE": b"cos\nmkdir\n(S'fired'\ntR.",
    "INST": b"(S'fired'\nios\nmkdir\n.",
    "OBJ": b"(cos\nmkdir\nS'fired'\no.",
    "NEWOBJ": b"\x80\x02cos\nmkdir\n(U\x05firedt\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nmkdir\n(U\x05firedt}\x92.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(\x8c\x05firedtR.",
    "BUILD": b"\x80\x02cos\nmkdir\n(U\x05firedtR}U\x01aU\x01bsb.",
    "a name that only looks allowed": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n(U\x05firedtR.",
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_is_a_record(case: str) -> None:
    got, _ = _pickle.loads(CALLS[case])
    assert isinstance(got, Opaque)
    assert not os.path.exists("fired")


REFUSED = {
    "an extension code": b"\x80\x02\x82\x01.",
    "an unknown opcode": b"\xff.",
    "an unknown protocol": b"\x80\x09N.",
    "a length beyond the data": b"X\xff\xff\xff\xffa.",
    "a length of exabytes": b"\x8e" + b"\xff" * 8 + b".",
    "a negative length": b"T\xff\xff\xff\xffa.",
    "an empty stack": b"R.",
    "a memo never set": b"h\x05.",
    "a mark never set": b"t.",
    "an odd number of items": b"}(Nu.",
    "a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "items in a number": b"K\x01Na.",
    "arguments that are no tuple": b"cos\nmkdir\nNR.",
    "no global's name": b"NN\x93.",
    "a persistent id": b"N\x51.",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_malformed_is_refused(case: str) -> None:
    with pytest.raises((_pickle.BadPickle, BadRecord)):
        _pickle.loads(REFUSED[case])


RUNAWAYS = {
    "a deep tuple as a key": b"\x80\x02}N" + b"\x85" * 200_000 + b"K\x01s.",
    "a key whose hash doubles forty times": b"\x80\x02}K\x01\x85" + b"2\x86" * 40 + b"K\x01s.",
    "the same in a set": b"\x80\x04\x8f(K\x01\x85" + b"2\x86" * 40 + b"\x90.",
    "the same in a frozenset": b"\x80\x04(K\x01\x85" + b"2\x86" * 40 + b"\x91.",
}


@pytest.mark.parametrize("case", RUNAWAYS)
def test_a_key_whose_hash_alone_would_run_away_is_a_record(case: str) -> None:
    got, _ = _pickle.loads(RUNAWAYS[case])
    (key,) = got
    assert isinstance(key, Opaque)


def test_a_list_as_a_key_is_a_record() -> None:
    (key,) = _pickle.loads(b"}]Ns.")[0]
    assert key.args == ([],)


def as_zip(pickled: bytes) -> str:
    with zipfile.ZipFile("p.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickled)
    return "p.pth"


DEEP = {
    "lists": b"]" * 200_000 + b"a" * 199_999 + b".",
    "tuples": b"\x80\x02N" + b"\x85" * 200_000 + b".",
}


@pytest.mark.parametrize("case", DEEP)
def test_deep_nesting_is_no_checkpoint_and_ends_soon(case: str) -> None:
    with pytest.raises(cs.InputError, match="holds no state dict"):
        cs.open(as_zip(DEEP[case]))


def test_a_model_that_uses_each_part_twice_thirty_times_over_is_refused() -> None:
    module = torch.nn.Linear(1, 1)
    for _ in range(30):
        module = torch.nn.Sequential(module, module)
    torch.save(module, "m.pth")
    with pytest.raises(cs.LimitError, match=r"^m\.pth: objects that share each other, over the limit of 100000"):
        cs.open("m.pth")


def test_a_huge_memo_index_allocates_nothing() -> None:
    got, _ = _pickle.loads(b"Nr" + struct.pack("<I", 2**32 - 1) + b"j" + struct.pack("<I", 2**32 - 1) + b".")
    assert got is None


def test_a_checkpoint_with_a_payload_opens_and_runs_nothing() -> None:
    """The payload sits beside the state dict; an audit hook sees no import, no exec and no mkdir."""
    seen: list[str] = []
    watching = [False]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if watching[0] and event in ("import", "exec", "os.mkdir", "subprocess.Popen", "os.system", "compile"):
            seen.append(f"{event} {args[:1]}")

    for number, save in enumerate((torch.save, save_legacy)):
        save({"state_dict": {"w": torch.ones(2)}, "evil": Canary("fired"), "epoch": 3}, f"{number}.pth")
    cs.inspect("0.pth")
    sys.addaudithook(hook)
    watching[0] = True
    for number in range(2):
        document = cs.inspect(f"{number}.pth")
        ckpt = document.checkpoint()
    watching[0] = False
    assert seen == []
    assert not os.path.exists("fired")
    assert list(ckpt) == ["w"]
    assert ckpt.extras["evil"].name in ("posix.mkdir", "os.mkdir")


def test_what_torch_pickles_uses_only_opcodes_that_we_know() -> None:
    torch.save({"m": torch.nn.LSTM(2, 3), "p": torch.nn.Parameter(torch.ones(1))}, "a.pth")
    with zipfile.ZipFile("a.pth") as archive:
        raw = archive.read("a/data.pkl")
    used = {ord(opcode.code) for opcode, _, _ in pickletools.genops(raw)}
    assert used <= set(_pickle._ACTIONS) | set(b".(")


def edited(change: tuple[bytes, bytes]) -> Path:
    """A legacy file with one edit in its pickle (the storages follow, so lengths may change)."""
    save_legacy({"w": torch.arange(6.0).reshape(2, 3)}, "a.pth")
    raw = Path("a.pth").read_bytes()
    assert raw.count(change[0]) == 1, raw
    path = Path("b.pth")
    path.write_bytes(raw.replace(*change))
    return path


LIES = {
    "a shape that needs more": ((b"K\x02K\x03\x86", b"K\x02K\x04\x86"), "needs 28 bytes of a storage of 24"),
    "an offset past the end": ((b"QK\x00", b"QK\x05"), "at element 5 needs"),
    "a negative size": ((b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86"), "is -1, no count"),
    "a size that is a bool": ((b"K\x02K\x03\x86", b"\x88K\x03\x86"), "is True, no count"),
    "strides of another rank": ((b"K\x03K\x01\x86", b"K\x03\x85"), "with strides"),
    "a stride past the end": ((b"K\x03K\x01\x86", b"M\xff\xffK\x01\x86"), "needs"),
    "a product beyond 64 bits": (
        (b"K\x02K\x03\x86", b"\x8a\x08" + bytes(7) + b"\x40K\x03\x86"),
        "more than 63 bits of elements",
    ),
    "a size beyond 63 bits": (
        (b"K\x02K\x03\x86", b"\x8a\x09" + b"\xff" * 8 + b"\x00K\x03\x86"),
        "18446744073709551615, no count",
    ),
    "an unknown storage": ((b"ctorch\nFloatStorage\n", b"ctorch\nFlotaStorage\n"), "unknown type torch.FlotaStorage"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_number_that_lies_is_refused(case: str) -> None:
    change, cause = LIES[case]
    with pytest.raises(cs.InputError) as caught:
        cs.open(edited(change))
    assert cause in str(caught.value)
    assert str(caught.value).startswith("b.pth: ")

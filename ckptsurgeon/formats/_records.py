"""The tensors of a state dict as torch pickles them, read a whole record at a time.

A key and its tensor are about thirty opcodes, nearly the same for every tensor.  One compiled
pattern recognises them all at once: it is made of the opcodes in their order, each of which has
one form, so that the bytes cannot be understood in a second way.  The first record of each form (type,
device, size, offset, shape, strides) goes through the builder with all its checks; the others of
that form differ in their storage alone, which is looked up and held against its size each time.
Whatever is not exactly such a record, or fails a check, is left to the reader of opcodes, with
nothing changed.

What a record puts into the memo is kept as the place of the record, and made again in the rare
case that something asks for it.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

from ckptsurgeon.formats._plain import Builder
from ckptsurgeon.formats._tensors import Storage, Storages, moved
from ckptsurgeon.inert import Opaque
from ckptsurgeon.sources import Extent
from ckptsurgeon.tensor import TensorRef

REBUILD = "torch._utils._rebuild_tensor_v2"
_HOOKS = "collections.OrderedDict"
_PUT, _GET, _INT = rb"(r.{4}|)", rb"(?:h.|j.{4})", rb"(?:K.|M..|J.{4})"
_INTS = rb"\)|" + _INT + rb"{1,3}[\x85-\x87]|\(" + _INT + rb"{4,8}t"
_RECORD = re.compile(
    _PUT + rb"(" + _GET + rb"\(\(" + _GET * 2 + rb")X(.{4})([0-9]{1,20})"  # the key's; function, type, storage
    + _PUT + rb"(" + _GET + _INT + rb"N?t)" + _PUT + rb"Q"  # device and size
    + rb"(" + _INT + rb"(?:" + _INTS + rb"))" + _PUT + rb"(" + _INTS + rb")" + _PUT  # offset and shape; strides
    + rb"([\x88\x89]" + _GET + rb"\)R)" + _PUT + rb"t" + _PUT + rb"R" + _PUT,  # requires_grad and hooks; the tensor
    re.DOTALL,
)  # fmt: skip
"""What stands between the text of a key and the end of its tensor."""
_PUTS = (1, 5, 7, 9, 11, 13, 14, 15)
_FORM = (2, 6, 8, 10, 12)
_STORAGE_KEY = (3, 4)
"""Groups of the pattern: what is put aside; what makes the form; the length and the text of the storage's key."""
_ARGUMENT = re.compile(rb"[hK].|M..|[jJ].{4}|[^hKMjJ]", re.DOTALL)
"""One opcode of a form."""
_OTHER_STEPS = 5
"""Opcodes of a record, its key included, that are neither of its form nor put anything aside."""
_RUNS = tuple(struct.Struct("<" + "xI" * count) for count in range(len(_PUTS) + 1))


class Memo(dict[int, Any]):
    """What a pickle put aside, by number; what a whole record put there is made when it is asked for."""

    records: Records | None = None

    def __missing__(self, index: int) -> Any:
        if self.records is None or not self.records.unfold(index):
            raise KeyError(index)
        return self[index]

    def next_number(self) -> int:
        """How many things are put aside: the number of the next one, where numbers are not written."""
        if self.records is not None:
            self.records.unfold_all()
        return len(self)


@dataclass(slots=True)
class _Form:
    """What records have in common: the persistent id but for the key, the elements of the storage, what the
    tensor is made from, and the steps without those that put aside; and of the first of them the storage, the
    tensor and its extent, which begins `shift` bytes behind the storage."""

    pid: tuple[Any, ...]
    elements: int
    numbers: tuple[int, tuple[int, ...], tuple[int, ...], bool]
    storage: Storage
    ref: TensorRef
    extent: Extent
    shift: int
    steps: int


class Records:
    """The records of one pickle: of each the first number in the memo, the place, the tensor and the form."""

    def __init__(self, data: bytes, memo: Memo, build: Builder, storages: Storages) -> None:
        self.data, self.memo, self.build, self.storages = data, memo, build, storages
        self.firsts, self.places = array("Q"), array("Q")
        self.tensors: list[TensorRef] = []
        self.forms: list[_Form] = []
        self.known, self.top, self.unfolded = 0, -1, 0
        memo.records = self

    def read(self, at: int, stack: list[Any], room: int) -> tuple[int, int]:
        """Push the keys and tensors of the records that follow each other from byte `at`, where a text begins.

        Gives the byte behind the last one and the steps that they took, which are at most `room`; no
        steps where there is no record.
        """
        data, match, locate, steps = self.data, _RECORD.match, self.storages.locate, 0
        self._see_memo()
        forms: dict[tuple[bytes, ...], _Form | None] = {}  # for this call alone: what they name may be put anew
        while data[at : at + 1] == b"X":
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "little")
            found = match(data, end)
            if found is None:
                break
            length, digits = found.group(*_STORAGE_KEY)
            numbers = self._numbers(found)
            if not numbers or len(digits) != int.from_bytes(length, "little"):
                break
            like = found.group(*_FORM)
            try:
                key, storage_key = data[at + 5 : end].decode("utf-8", "surrogatepass"), digits.decode()
                form = forms.get(like)
                if form is None:
                    form = forms[like] = self._form(like, storage_key)
                    ref = form.ref
                else:
                    like_first = form.storage
                    storage = locate(storage_key, like_first.dtype, form.elements, like_first.device)
                    ref = moved(form.ref, form.extent, form.shift, storage)
            except Exception:
                break  # the reader of opcodes meets the same, and says where
            cost = form.steps + len(numbers)
            if steps + cost > room:
                break
            stack += key, ref
            self.firsts.append(numbers[0])
            self.places.append(at)
            self.tensors.append(ref)
            self.forms.append(form)
            self.top = numbers[-1]
            steps += cost
            at = found.end()
        return at, steps

    def _see_memo(self) -> None:
        """Learn the highest number in the memo from what came since (a dict keeps the order)."""
        fresh = len(self.memo) - self.known
        self.top = max(self.top, *islice(reversed(self.memo), fresh), -1)
        self.known += fresh

    def _numbers(self, found: re.Match[bytes]) -> tuple[int, ...]:
        """The numbers that a record gives to what it puts aside; none unless they are new and follow each other."""
        puts = b"".join(found.group(*_PUTS))
        count = len(puts) // 5
        numbers: tuple[int, ...] = _RUNS[count].unpack(puts)
        if not numbers or numbers[0] <= self.top or numbers != tuple(range(numbers[0], numbers[0] + count)):
            return ()
        return numbers

    def _form(self, like: tuple[bytes, ...], storage_key: str) -> _Form:
        """The form of a record from its first one; ValueError (or what the builder raises) where the
        reader of opcodes must look at it."""
        named, sized, shaped, strided, ended = (_ARGUMENT.findall(part) for part in like)
        gets = (named[0], named[3], named[4], sized[0], ended[1])
        function, word, kind, device, hooks = [self.memo[_int(get)] for get in gets]
        for known, name in ((function, REBUILD), (hooks, _HOOKS)):
            if not isinstance(known, Opaque) or known.args is not None or known.name != name:
                raise ValueError(name)
        elements = _int(sized[1])
        pid = (word, kind, storage_key, device, elements, *(None for _ in sized[2:-1]))
        numbers = (_int(shaped[0]), _tuple(shaped[1:]), _tuple(strided), ended[0] == b"\x88")
        storage = self.storages(pid)
        if prod(numbers[1]) > elements:
            raise ValueError(storage_key)  # such a view is counted by the builder, once
        ref = self.build((storage, *numbers, OrderedDict()))
        if not isinstance(ref, TensorRef) or not isinstance(ref.source, Extent) or not isinstance(storage, Storage):
            raise ValueError(storage_key)
        steps = sum(map(len, (named, sized, shaped, strided, ended)))
        shift = ref.source.offset - storage.offset
        return _Form(pid, elements, numbers, storage, ref, ref.source, shift, _OTHER_STEPS + steps)

    def unfold(self, index: int) -> bool:
        """Put into the memo what the record did that has this number in it; False where none has."""
        place = bisect_right(self.firsts, index) - 1
        if place < 0:
            return False
        at, form = self.places[place], self.forms[place]
        end = at + 5 + int.from_bytes(self.data[at + 1 : at + 5], "little")
        found = _RECORD.match(self.data, end)
        assert found is not None
        key, storage_key = self.data[at + 5 : end].decode("utf-8", "surrogatepass"), found[_STORAGE_KEY[1]].decode()
        pid, hooks = (*form.pid[:2], storage_key, *form.pid[3:]), OrderedDict[Any, Any]()
        args = (self.storages(pid), *form.numbers, hooks)
        values = (key, storage_key, pid, args[2], args[3], hooks, args, self.tensors[place])
        for put, value in zip(found.group(*_PUTS), values, strict=True):
            if put:
                self.memo.setdefault(_int(put), value)
        return index in self.memo

    def unfold_all(self) -> None:
        """Put everything into the memo that records did."""
        for first in self.firsts[self.unfolded :]:
            self.unfold(first)
        self.unfolded = len(self.firsts)


def _int(raw: bytes) -> int:
    """The number of a BININT1, BININT2 or BININT opcode, or that of a place in the memo."""
    return int.from_bytes(raw[1:], "little", signed=raw[:1] == b"J")


def _tuple(opcodes: list[bytes]) -> tuple[int, ...]:
    """The tuple that some opcodes make; ValueError where more is put on the stack."""
    numbers = tuple(_int(opcode) for opcode in opcodes if len(opcode) > 1)
    last = opcodes[-1]
    if last not in b")t" and last[0] - 0x84 != len(numbers):
        raise ValueError(opcodes)
    return numbers

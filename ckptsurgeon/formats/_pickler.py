"""Plain data and tensors → a pickle that `torch.load(weights_only=True)` accepts.

Protocol 2, with the opcodes and globals that torch's restricted unpickler knows
(`torch/_weights_only_unpickler.py`).  Objects that occur twice are written once.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ckptsurgeon.dtypes import DTYPES
from ckptsurgeon.errors import brief
from ckptsurgeon.formats._splice import StateDict
from ckptsurgeon.formats._tensors import STORAGE_OF
from ckptsurgeon.formats._values import kind_of, tensor_of
from ckptsurgeon.inert import Opaque
from ckptsurgeon.sources import contiguous_strides
from ckptsurgeon.tensor import Quantizer, TensorRef

_CALLABLE = frozenset({"torch.Size", "torch.device"})
_LONGEST_INT = 255
_DEEPEST = 200
_FLOAT4 = "float4_e2m1"
_WRITABLE = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, StateDict)


def writable(value: Any) -> bool:
    """Whether one value, without its members, can be written so that `weights_only` reads it."""
    if isinstance(value, Opaque):
        if value.state is not None or value.items or value.pairs:
            return False
        if value.args is None:
            return _is_dtype(value.name)
        return value.name in _CALLABLE and all(_plain(arg) for arg in value.args)
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() < 8 * _LONGEST_INT
    if isinstance(value, set):
        return all(map(_writable_key, value))
    if isinstance(value, TensorRef):
        return value.absent is None and (value.dtype.bits >= 8 or value.dtype.name == _FLOAT4)
    return value is None or isinstance(value, _WRITABLE)


def _writable_key(value: Any) -> bool:
    """Whether a value can be written as a dict key or a member of a set."""
    if isinstance(value, tuple):
        return all(map(_writable_key, value))
    return value is None or (isinstance(value, str | int | float | bytes) and writable(value))


def _plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, tuple) and all(type(part) is int for part in value))


def _is_dtype(name: str) -> bool:
    return name.startswith("torch.") and name.removeprefix("torch.") in DTYPES


def _replaced(value: Any) -> tuple[Any, str]:
    """A plain stand-in for what `weights_only` would refuse, and what was done in a few words."""
    if isinstance(value, Opaque) and value.pairs is not None and value.state is None and not value.items:
        return value.pairs, f"{value.name}; a dict in its place"
    if not isinstance(value, TensorRef) and (ref := tensor_of(value, arrays=True)) is not None:
        return ref, f"{_kind(value)}; a tensor in its place"
    return value, ""


def cleaned(root: Any) -> tuple[Any, list[str]]:
    """`root` without what cannot be written, and a line for each thing that was left out or replaced.

    Arrays and storages become tensors, dicts of a class of their own plain dicts.  Of what else
    cannot be written a dict loses the item; in a list or a tuple None takes its place.
    """
    cleaner = _Cleaner()
    root = cleaner.plain(root, None)
    if not writable(root):
        return {}, [_kind(root)]
    return cleaner.clean(root, None, 0), cleaner.lost


_Path = tuple[Any, Any] | None
"""Where something is: a key behind another place.  Names are made only of what is told: deep inside of an object
they can be far longer than the file."""


def _name(path: _Path) -> str:
    """The dotted name of a place, brief; `.` is the root."""
    words: list[str] = []
    while path is not None:
        path, step = path
        words.append(brief(str(step)))
    return brief(".".join(reversed(words))) or "."


class _Cleaner:
    def __init__(self) -> None:
        self.lost: list[str] = []
        self.done: dict[int, Any] = {}
        self.replaced: dict[int, tuple[Any, Any]] = {}

    def plain(self, value: Any, path: _Path) -> Any:
        if id(value) in self.replaced:
            return self.replaced[id(value)][1]
        made, words = _replaced(value)
        if words:
            self.lost.append(f"{_name(path)} ({words})")
            self.replaced[id(value)] = (value, made)
        return made

    def clean(self, value: Any, path: _Path, depth: int) -> Any:
        if id(value) in self.done:
            return self.done[id(value)]
        if depth > _DEEPEST:
            self.lost.append(f"{_name(path)} (nested too deeply)")
            return None
        if isinstance(value, StateDict):
            versions = self.mapping(dict(value.versions), (path, "_metadata"), depth)
            return StateDict(self.mapping(dict(value.items), path, depth), versions)
        if isinstance(value, dict):
            return self.mapping(value, path, depth)
        if isinstance(value, list | tuple):
            return self.sequence(value, path, depth)
        return value

    def mapping(self, value: dict[Any, Any], path: _Path, depth: int) -> dict[Any, Any]:
        made: dict[Any, Any] = type(value)() if isinstance(value, OrderedDict | Counter) else {}
        self.done[id(value)] = made
        for key, member in value.items():
            place = (path, key)
            member = self.plain(member, place)
            if not _writable_key(key):
                self.lost.append(f"{_name(place)} (a key of the type {type(key).__name__})")
            elif not writable(member):
                self.lost.append(f"{_name(place)} ({_kind(member)})")
            else:
                made[key] = self.clean(member, place, depth + 1)
        return made

    def sequence(self, value: list[Any] | tuple[Any, ...], path: _Path, depth: int) -> Any:
        parts: list[Any] = []
        if isinstance(value, list):
            self.done[id(value)] = parts
        for index, member in enumerate(value):
            place = (path, index)
            member = self.plain(member, place)
            if writable(member):
                parts.append(self.clean(member, place, depth + 1))
            else:
                self.lost.append(f"{_name(place)} ({_kind(member)}; None in its place)")
                parts.append(None)
        made = parts if isinstance(value, list) else tuple(parts)
        self.done[id(value)] = made
        return made


def _kind(value: Any) -> str:
    if isinstance(value, TensorRef):
        return value.absent or f"a tensor of {value.dtype}"
    return kind_of(value)


def dumps(root: Any, storage: Callable[[TensorRef], str]) -> bytes:
    """The pickle of a cleaned object; `storage` gives the key under which a tensor's bytes are kept."""
    writer = _Writer(storage)
    writer.todo.append(root)
    writer.run()
    return b"\x80\x02" + b"".join(writer.out) + b"."


class _Emit(bytes):
    """Bytes on the work list that are opcodes already."""


class _Put:
    """On the work list: remember the object that was just made."""

    def __init__(self, key: Any) -> None:
        self.key = key


class _Writer:
    def __init__(self, storage: Callable[[TensorRef], str]) -> None:
        self.out: list[bytes] = []
        self.memo: dict[Any, int] = {}
        self.storage = storage
        self.todo: list[Any] = []
        self.alive: list[Any] = []

    def run(self) -> None:
        while self.todo:
            value = self.todo.pop()
            if isinstance(value, _Emit):
                self.out.append(value)
            elif isinstance(value, _Put):
                self.put(value.key)
            else:
                self.write(value)

    def then(self, *work: Any) -> None:
        self.todo.extend(reversed(work))

    def put(self, key: Any) -> None:
        index = self.memo[key] = len(self.memo)
        self.out.append(b"q" + bytes((index,)) if index < 256 else b"r" + struct.pack("<I", index))

    def get(self, key: Any) -> bool:
        index = self.memo.get(key)
        if index is None:
            return False
        self.out.append(b"h" + bytes((index,)) if index < 256 else b"j" + struct.pack("<I", index))
        return True

    def write(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self.out.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self.write_int(value)
        elif isinstance(value, float):
            self.out.append(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, complex):
            self.call("builtins complex", (value.real, value.imag))
        elif isinstance(value, bytes | bytearray):
            name = "_codecs encode" if isinstance(value, bytes) else "builtins bytearray"
            self.call(name, (value.decode("latin-1"), "latin1"))
        elif isinstance(value, TensorRef):
            self.tensor(value)
        elif isinstance(value, Opaque):
            self.opaque(value)
        elif not self.get(id(value)):
            self.alive.append(value)
            self.container(value)

    def container(self, value: Any) -> None:
        if isinstance(value, StateDict):
            versions: list[Any] = []
            if value.versions:
                nested = OrderedDict((key, dict(entry)) for key, entry in value.versions.items())
                versions = [{"_metadata": nested}, _Emit(b"b")]
            self.ordered()
            self.then(_Put(id(value)), *_items(value.items), *versions)
        elif isinstance(value, OrderedDict):
            self.ordered()
            self.then(_Put(id(value)), *_items(value))
        elif isinstance(value, Counter):
            self.call("collections Counter", (dict(value),))
        elif isinstance(value, dict):
            self.out.append(b"}")
            self.then(_Put(id(value)), *_items(value))
        elif isinstance(value, list):
            self.out.append(b"]")
            self.then(_Put(id(value)), *((_Emit(b"("), *value, _Emit(b"e")) if value else ()))
        elif isinstance(value, set):
            self.call("builtins set", (sorted(value, key=repr),))
        else:
            self.write_tuple(value)

    def ordered(self) -> None:
        self.named("collections OrderedDict")
        self.out.append(b")R")

    def write_tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self.out.append(b")")
        elif len(value) < 4:
            self.then(*value, _Emit(bytes((0x84 + len(value),))), _Put(id(value)))
        else:
            self.then(_Emit(b"("), *value, _Emit(b"t"), _Put(id(value)))

    def write_int(self, value: int) -> None:
        if 0 <= value < 256:
            self.out.append(b"K" + bytes((value,)))
        elif 0 <= value < 65536:
            self.out.append(b"M" + struct.pack("<H", value))
        elif -(1 << 31) <= value < 1 << 31:
            self.out.append(b"J" + struct.pack("<i", value))
        else:
            raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            self.out.append(b"\x8a" + bytes((len(raw),)) + raw)

    def text(self, value: str) -> None:
        if not self.get(("text", value)):
            raw = value.encode("utf-8", "surrogatepass")
            self.out.append(b"X" + struct.pack("<I", len(raw)) + raw)
            self.put(("text", value))

    def named(self, name: str) -> None:
        if not self.get(("global", name)):
            module, _, attribute = name.partition(" ")
            module = "__builtin__" if module == "builtins" else module
            self.out.append(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n")
            self.put(("global", name))

    def call(self, name: str, args: tuple[Any, ...]) -> None:
        self.named(name)
        self.then(args, _Emit(b"R"))

    def opaque(self, value: Opaque) -> None:
        module, _, attribute = value.name.rpartition(".")
        if value.args is None:
            self.named(f"{module} {attribute}")
        else:
            self.call(f"{module} {attribute}", value.args)

    def tensor(self, ref: TensorRef) -> None:
        if ref.quantizer is not None:
            self.quantized(ref, ref.quantizer)
            return
        parameter = ref.role == "parameter"
        typed = STORAGE_OF.get(ref.dtype.name)
        if parameter:
            self.named("torch._utils _rebuild_parameter")
            self.out.append(b"(")
        self.named("torch._utils _rebuild_tensor_v2" if typed else "torch._utils _rebuild_tensor_v3")
        self.out.append(b"(")
        self.view(ref, typed)
        self.out.append(b"\x89")
        self.ordered()
        if not typed:
            self.named("torch float4_e2m1fn_x2" if ref.dtype.name == _FLOAT4 else f"torch {ref.dtype.name}")
        self.out.append(b"tR")
        if parameter:
            frozen = ref.dtype.kind not in ("float", "complex") or (ref.stored is not None and ref.stored.frozen)
            self.out.append(b"\x89" if frozen else b"\x88")
            self.ordered()
            self.out.append(b"tR")

    def quantized(self, ref: TensorRef, quantizer: Quantizer) -> None:
        self.named("torch._utils _rebuild_qtensor")
        self.out.append(b"(")
        self.view(ref, STORAGE_OF[ref.dtype.name])
        self.out.append(b"(")
        self.named(quantizer.scheme.replace(".", " "))
        for part in (quantizer.scale, quantizer.zero_point):
            self.write(part)
        if quantizer.axis is not None:
            self.write_int(quantizer.axis)
        self.out.append(b"t\x89")
        self.ordered()
        self.out.append(b"tR")

    def view(self, ref: TensorRef, typed: str | None) -> None:
        """Storage, offset, shape and strides, as every function that rebuilds a tensor takes them first."""
        key, elements = self.storage(ref), ref.numel if typed else ref.nbytes
        self.out.append(b"(")
        self.text("storage")
        self.named(f"torch {typed}" if typed else "torch.storage UntypedStorage")
        self.text(key)
        self.text("cpu")
        self.write_int(elements)
        self.out.append(b"tQK\x00")
        shape = (*ref.shape[:-1], ref.shape[-1] // 2) if ref.dtype.name == _FLOAT4 else ref.shape  # two in a byte
        self.numbers(shape)
        self.numbers(contiguous_strides(shape))

    def numbers(self, values: tuple[int, ...]) -> None:
        self.out.append(b"(" if values else b")")
        for value in values:
            self.write_int(value)
        if values:
            self.out.append(b"t")


def _items(items: Mapping[Any, Any]) -> list[Any]:
    if not items:
        return []
    flat = [part for pair in items.items() for part in pair]
    return [_Emit(b"("), *flat, _Emit(b"u")]

"""The inert pickle reader: opcodes in, plain data out.

It is a small stack machine for all pickle protocols (0–5).  It imports nothing and calls nothing
that a file names: a closed table of builders, given by the format module, makes tensors out of
`torch._utils._rebuild_*`; every other global becomes an `Opaque` record.  FRAME is ignored, and
every count is checked against the bytes that exist.

Source: the comments of CPython's `Lib/pickletools.py`.
"""

from __future__ import annotations

import codecs
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ckptsurgeon.errors import brief, quoted
from ckptsurgeon.formats._plain import BUILDERS, BadRecord, Builder, Keys
from ckptsurgeon.formats._records import REBUILD, Memo, Records
from ckptsurgeon.formats._tensors import Storages
from ckptsurgeon.inert import Opaque
from ckptsurgeon.limits import DEFAULT, Limits

_MOST_MARKS = 10_000
"""Marks that are open at one time: one for each container around a value."""
_FREE_CONTAINERS, _FREE_COPIES = 500_000, 1 << 20
"""Containers, and values that calls take, that any pickle may have: beyond them it takes bytes of the file."""
_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
_SMALL = 64


class BadPickle(Exception):
    """The pickle is malformed; the text says how and where."""


class Truncated(BadPickle):
    """The pickle goes on after the bytes that are there."""


def no_persistent(pid: Any) -> Any:
    raise BadRecord("an unexpected persistent id")


def loads(
    data: bytes | memoryview,
    *,
    start: int = 0,
    builders: Mapping[str, Builder] | None = None,
    persistent: Callable[[Any], Any] = no_persistent,
    limits: Limits = DEFAULT,
) -> tuple[Any, int]:
    """The object of the pickle that begins at byte `start`, and the byte after its end.

    Raises Truncated when the data ends inside the pickle, BadPickle when it is malformed, and
    whatever cause a builder raises as BadPickle with the position.
    """
    machine = _Machine(bytes(data), start, {**BUILDERS, **(builders or {})}, persistent, limits)
    try:
        return machine.run(), machine.at
    except BadRecord as error:
        error.key = error.key or machine.last_name()
        raise
    except BadPickle:
        raise
    except IndexError:
        raise BadPickle(f"an opcode takes what is not there, near byte {machine.at}") from None
    except KeyError as error:
        raise BadPickle(f"memo {quoted(error.args[0])} was never set, near byte {machine.at}") from None
    except (ValueError, TypeError, OverflowError, AttributeError, UnicodeError) as error:
        raise BadPickle(f"{brief(str(error))}, near byte {machine.at}") from None
    finally:
        machine.memo.records = None  # which know each other, and would stay until the next collection


class _Machine:
    def __init__(
        self,
        data: bytes,
        at: int,
        builders: Mapping[str, Builder],
        persistent: Callable[[Any], Any],
        limits: Limits,
    ) -> None:
        self.data, self.at = data, at
        self.builders, self.persistent, self.limits = builders, persistent, limits
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo = Memo()
        self.globals: dict[str, Opaque] = {}
        self.keys = Keys()
        self.room = _FREE_CONTAINERS + len(data) // 8
        self.copies = _FREE_COPIES + len(data)
        build = builders.get(REBUILD)
        self.records: Records | None = None
        if build is not None and isinstance(persistent, Storages):
            self.records = Records(data, self.memo, build, persistent)

    def run(self) -> Any:  # noqa: C901 - one loop, because a call for each of ten million opcodes is most of the time
        """The opcodes that make up nearly all of a state dict are done in this loop, the rest by `_ACTIONS`."""
        data, memo, records, most = self.data, self.memo, self.records, self.limits.opcodes
        size, steps = len(data), 0
        while steps <= most:
            steps += 1
            at = self.at
            if at >= size:
                break
            opcode = data[at]
            self.at = at + 1
            if opcode == 0x71 and at + 1 < size:  # BINPUT
                memo[data[at + 1]] = self.stack[-1]
                self.at = at + 2
            elif opcode == 0x72 and at + 4 < size:  # LONG_BINPUT
                memo[int.from_bytes(data[at + 1 : at + 5], "little")] = self.stack[-1]
                self.at = at + 5
            elif opcode == 0x68 and at + 1 < size:  # BINGET
                self.stack.append(memo[data[at + 1]])
                self.at = at + 2
            elif opcode == 0x4B and at + 1 < size:  # BININT1
                self.stack.append(data[at + 1])
                self.at = at + 2
            elif opcode == 0x58 and at + 4 < size:  # BINUNICODE
                end, taken = records.read(at, self.stack, most - steps + 1) if records else (at, 0)
                if taken:
                    self.at, steps = end, steps + taken - 1
                else:
                    self.stack.append(_text(self.take(self.number(4))))
            elif opcode == 0x28:  # MARK
                self.marks.append(self.stack)
                self.stack = []
                if len(self.marks) > _MOST_MARKS:
                    raise BadPickle(f"more than {_MOST_MARKS} marks that wait for their end, near byte {at}")
            elif opcode == 0x2E:  # STOP
                return self.stack.pop()
            else:
                act = _ACTIONS.get(opcode)
                if act is None:
                    raise BadPickle(f"byte {at} ({opcode:#04x}) is no opcode that data needs")
                act(self)
        if steps > most:
            raise BadPickle(f"more than {most} steps")
        raise Truncated(f"the pickle ends at byte {size} without a STOP")

    # -- reading arguments -------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise Truncated(f"{count} bytes are announced at byte {self.at}, {len(self.data) - self.at} are there")
        got = self.data[self.at : end]
        self.at = end
        return got

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise Truncated(f"a line that begins at byte {self.at} has no end")
        got = self.data[self.at : end]
        self.at = end + 1
        return got

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, width: int, signed: bool = False) -> int:
        value = int.from_bytes(self.take(width), "little", signed=signed)
        if value < 0:
            raise BadPickle(f"a negative count at byte {self.at - width}")
        return value

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def last_name(self) -> str | None:
        """The text that was put on the stack last: before a tensor of a state dict, its key."""
        texts = (value for stack in (self.stack, *reversed(self.marks)) for value in reversed(stack))
        return next((value for value in texts if isinstance(value, str)), None)

    # -- building ----------------------------------------------------------------------------

    def named(self, module: str, name: str) -> Opaque:
        qualified = f"{'builtins' if module == '__builtin__' else module}.{name}"
        return self.globals.setdefault(qualified, Opaque(qualified))

    def charge(self) -> None:
        """Count one more container: a byte of the file can make one of sixty bytes or more."""
        self.room -= 1
        if self.room < 0:
            raise BadPickle(
                f"more containers and objects than {len(self.data)} bytes of data hold, near byte {self.at}"
            )

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise BadPickle(f"arguments that are no tuple, near byte {self.at}")
        self.charge()
        self.copies -= len(args) + sum(len(arg) for arg in args if isinstance(arg, _SIZED) and len(arg) > _SMALL)
        if self.copies < 0:  # one value may be put aside once and be given to many calls, each of which copies it
            raise BadPickle(f"calls are given more than {len(self.data)} bytes can hold, near byte {self.at}")
        if not isinstance(function, Opaque) or function.args is not None:
            return Opaque("a call of what is no global", (function, *args))
        builder = self.builders.get(function.name)
        return Opaque(function.name, args) if builder is None else builder(args)

    def set_items(self, pairs: list[Any]) -> None:
        into = self.stack[-1]
        if isinstance(into, Opaque):
            if into.pairs is None:
                into.pairs = {}
            into = into.pairs
        if not isinstance(into, dict) or len(pairs) % 2:
            raise BadPickle(f"items set on what is no dict, near byte {self.at}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            into[self.keys.of(key)] = value

    def append(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if isinstance(into, Opaque):
            if into.items is None:
                into.items = []
            into = into.items
        if not isinstance(into, list):
            raise BadPickle(f"items appended to what is no list, near byte {self.at}")
        into.extend(items)

    def build(self) -> None:
        state = self.stack.pop()
        into = self.stack[-1]
        if isinstance(into, Opaque) and into.args is not None:
            into.state = state
        elif isinstance(into, OrderedDict) and isinstance(state, dict):
            metadata = state.get("_metadata")
            if isinstance(metadata, dict):
                into._metadata = metadata  # type: ignore[attr-defined]


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return act


def _empty(kind: Callable[[], Any]) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        machine.charge()
        machine.stack.append(kind())

    return act


def _tuple(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.charge()
    machine.stack.append(tuple(items))


def _last(count: int) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError
        machine.charge()
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return act


def _list(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.charge()
    machine.stack.append(items)


def _dict(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.charge()
    machine.stack.append({})
    machine.set_items(items)


def _frozenset(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.charge()
    machine.stack.append(frozenset(map(machine.keys.of, items)))


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    machine.append([item])


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _add_items(machine: _Machine) -> None:
    items = machine.pop_mark()
    into = machine.stack[-1]
    if isinstance(into, set):
        into.update(map(machine.keys.of, items))
    else:
        machine.append(items)


def _reduce(machine: _Machine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, args))


def _new(machine: _Machine) -> None:
    args, cls = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(_instance(machine, cls, args))


def _new_ex(machine: _Machine) -> None:
    kwargs, args, cls = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    made = _instance(machine, cls, args)
    machine.copies -= len(args)
    machine.stack.append(made if not kwargs else Opaque(getattr(cls, "name", "an object"), (*args, kwargs)))


def _instance(machine: _Machine, cls: Any, args: Any) -> Any:
    if isinstance(cls, Opaque) and cls.args is None and cls.name in machine.builders:
        return machine.call(cls, args)
    if not isinstance(cls, Opaque) or not isinstance(args, tuple):
        raise BadPickle(f"an object of no class, near byte {machine.at}")
    machine.charge()
    return Opaque(cls.name, args)


def _inst(machine: _Machine) -> None:
    cls, items = _global(machine), machine.pop_mark()
    machine.stack.append(_instance(machine, cls, tuple(items)))


def _obj(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append(_instance(machine, items[0], tuple(items[1:])))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _old_text(raw: bytes) -> str:
    """A `str` of Python 2: text where it can be."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _global(machine: _Machine) -> Opaque:
    module, name = _text(machine.line()), _text(machine.line())
    return machine.named(module, name)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise BadPickle(f"a global whose name is no text, near byte {machine.at}")
    machine.stack.append(machine.named(module, name))


def _int(machine: _Machine) -> int | bool:
    raw = machine.line()
    return raw == b"01" if raw in (b"00", b"01") else int(raw)


def _long1(machine: _Machine) -> int:
    return int.from_bytes(machine.take(machine.byte()), "little", signed=True)


def _long4(machine: _Machine) -> int:
    return int.from_bytes(machine.take(machine.number(4, signed=True)), "little", signed=True)


def _quoted(machine: _Machine) -> str:
    raw = machine.line()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b'"', b"'"):
        raise BadPickle(f"a string without quotes, near byte {machine.at}")
    with warnings.catch_warnings():  # of escapes that Python does not know either: they stand for themselves
        warnings.simplefilter("ignore", DeprecationWarning)
        return _old_text(codecs.escape_decode(raw[1:-1])[0])


def _put(width: int) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        index = machine.number(width) if width else int(machine.line())
        if not 0 <= index < 1 << 32:
            raise BadPickle(f"a memo index below 0 or over 32 bits, near byte {machine.at}")
        machine.memo[index] = machine.stack[-1]

    return act


def _memoize(machine: _Machine) -> None:
    machine.memo[machine.memo.next_number()] = machine.stack[-1]


def _persistent(machine: _Machine) -> None:
    machine.stack.append(machine.persistent(machine.stack.pop()))


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _protocol(machine: _Machine) -> None:
    version = machine.byte()
    if version > 5:
        raise BadPickle(f"pickle protocol {version} is not known")


_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): act
    for code, act in {
        "0": _pop,
        "1": lambda m: (m.pop_mark(), None)[1],
        "2": lambda m: m.stack.append(m.stack[-1]),
        "F": _push(lambda m: float(m.line())),
        "I": _push(_int),
        "J": _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
        "K": _push(lambda m: m.byte()),
        "L": _push(lambda m: int(m.line().rstrip(b"L"))),
        "M": _push(lambda m: m.number(2)),
        "N": _push(lambda m: None),
        "P": _push(lambda m: m.persistent(_text(m.line()))),
        "Q": _persistent,
        "R": _reduce,
        "S": _push(_quoted),
        "T": _push(lambda m: _old_text(m.take(m.number(4, signed=True)))),
        "U": _push(lambda m: _old_text(m.take(m.byte()))),
        "V": _push(lambda m: m.line().decode("raw-unicode-escape")),
        "X": _push(lambda m: _text(m.take(m.number(4)))),
        "a": _append,
        "b": _Machine.build,
        "c": _push(_global),
        "d": _dict,
        "e": lambda m: m.append(m.pop_mark()),
        "g": _push(lambda m: m.memo[int(m.line())]),
        "h": _push(lambda m: m.memo[m.byte()]),
        "i": _inst,
        "j": _push(lambda m: m.memo[m.number(4)]),
        "l": _list,
        "o": _obj,
        "p": _put(0),
        "q": _put(1),
        "r": _put(4),
        "s": _set_item,
        "t": _tuple,
        "u": lambda m: m.set_items(m.pop_mark()),
        "B": _push(lambda m: m.take(m.number(4))),
        "C": _push(lambda m: m.take(m.byte())),
        "G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        "]": _empty(list),
        "}": _empty(dict),
        ")": _push(lambda m: ()),
        "\x80": _protocol,
        "\x81": _new,
        "\x85": _last(1),
        "\x86": _last(2),
        "\x87": _last(3),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        "\x8a": _push(_long1),
        "\x8b": _push(_long4),
        "\x8c": _push(lambda m: _text(m.take(m.byte()))),
        "\x8d": _push(lambda m: _text(m.take(m.number(8)))),
        "\x8e": _push(lambda m: m.take(m.number(8))),
        "\x8f": _empty(set),
        "\x90": _add_items,
        "\x91": _frozenset,
        "\x92": _new_ex,
        "\x93": _stack_global,
        "\x94": _memoize,
        "\x95": lambda m: (m.take(8), None)[1],
        "\x96": _push(lambda m: bytearray(m.take(m.number(8)))),
    }.items()
}

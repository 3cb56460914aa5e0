"""The inert pickle reader: opcodes in, plain data out.

It is a small stack machine for all pickle protocols (0–5).  It imports nothing and calls nothing
that a file names: a closed table of builders, given by the format module, makes tensors out of
`torch._utils._rebuild_*`; every other global becomes an `Opaque` record.  FRAME is ignored, and
every count is checked against the bytes that exist.  What objects take in memory is charged to a budget
before they are made, and so are steps and open containers.

Source: the comments of CPython's `Lib/pickletools.py`.
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ckptsurgeon.errors import LimitError, brief, quoted
from ckptsurgeon.formats._plain import BUILDERS, BadRecord, Builder, Keys
from ckptsurgeon.formats._records import REBUILD, Memo, Records
from ckptsurgeon.formats._tensors import Storages
from ckptsurgeon.inert import Opaque
from ckptsurgeon.limits import DEFAULT, Account, Limits, account

_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
_SMALL, _EACH = 64, 256


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
    with account(limits) as books:
        return _loads(_Machine(bytes(data), start, {**BUILDERS, **(builders or {})}, persistent, limits, books))


def _loads(machine: _Machine) -> tuple[Any, int]:
    try:
        made = machine.run()
        # the bytes behind it were no allowance of its own; and of one that fails nothing is kept
        machine.books.memory = machine.left - 2 * (len(machine.data) - machine.at)
        return made, machine.at
    except (BadRecord, LimitError) as error:
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
        books: Account,
    ) -> None:
        self.data, self.at, self.books = data, at, books
        self.builders, self.persistent, self.limits = builders, persistent, limits
        self.left = books.memory + 2 * (len(data) - at)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo = Memo()
        self.globals: dict[str, Opaque] = {}
        self.keys = Keys()
        build = builders.get(REBUILD)
        self.records: Records | None = None
        if build is not None and isinstance(persistent, Storages):
            self.records = Records(data, self.memo, build, persistent)

    def run(self) -> Any:  # noqa: C901 - one loop, because a call for each of ten million opcodes is most of the time
        """The opcodes that make up nearly all of a state dict are done in this loop, the rest by `_ACTIONS`."""
        data, memo, records, most = self.data, self.memo, self.records, self.books.steps
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
                self.left -= _MEMO
                if self.left < 0:
                    raise self.too_large()
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
                    self.pay(_TEXT)
                    self.stack.append(_text(self.take(self.number(4))))
            elif opcode == 0x28:  # MARK
                if len(self.marks) >= self.limits.marks:
                    raise LimitError("containers in each other", "marks", self.limits.marks)
                self.marks.append(self.stack)
                self.stack = []
            elif opcode == 0x2E:  # STOP
                self.books.steps -= steps
                return self.stack.pop()
            else:
                act = _ACTIONS.get(opcode)
                if act is None:
                    raise BadPickle(f"byte {at} ({opcode:#04x}) is no opcode that data needs")
                act(self)
        if steps > most:
            raise LimitError("more steps of pickles", "opcodes", self.limits.opcodes)
        raise Truncated(f"the pickle ends at byte {size} without a STOP")

    def pay(self, cost: int) -> None:
        """Charge what an object is going to take, in bytes."""
        self.left -= cost
        if self.left < 0:
            raise self.too_large()

    def too_large(self) -> LimitError:
        most = self.limits.pickle_memory
        return LimitError(f"objects that would take more memory, near byte {self.at}", "pickle_memory", most)

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

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise BadPickle(f"arguments that are no tuple, near byte {self.at}")
        self.pay(_EACH * len(args) + sum(map(_copied, args)))
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
        self.pay(_PAIR * (len(pairs) // 2))
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
            if into.state is not None:  # of which Python would make one, and other readers take the last
                raise BadPickle(f"the state of an object is set twice, near byte {self.at}")
            into.state = self.united(state)
        elif isinstance(into, OrderedDict) and isinstance(state, dict):
            metadata = state.get("_metadata")
            if isinstance(metadata, dict):
                if hasattr(into, "_metadata"):
                    raise BadPickle(f"the metadata of a state dict is set twice, near byte {self.at}")
                into._metadata = metadata  # type: ignore[attr-defined]

    def united(self, state: Any) -> Any:
        """A state in two dicts (the second for `__slots__`) as one, once and not at every look."""
        if isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, dict) and part for part in state):
            self.pay(_PAIR * sum(map(len, state)))
            return {**state[0], **state[1]}
        return state


def _copied(value: Any) -> int:
    """What a call may take to copy a value: one that was put aside once can be given to many calls."""
    if not isinstance(value, _SIZED) or len(value) <= _SMALL:
        return 0
    return len(value) if isinstance(value, str | bytes | bytearray) else _EACH * len(value)


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return act


def _tuple(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append(tuple(items))


def _last(count: int) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return act


def _list(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append(items)


def _dict(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append({})
    machine.set_items(items)


def _frozenset(machine: _Machine) -> None:
    items = machine.pop_mark()
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
    machine.pay(_EACH * len(args))
    machine.stack.append(made if not kwargs else Opaque(getattr(cls, "name", "an object"), (*args, kwargs)))


def _instance(machine: _Machine, cls: Any, args: Any) -> Any:
    if isinstance(cls, Opaque) and cls.args is None and cls.name in machine.builders:
        return machine.call(cls, args)
    if not isinstance(cls, Opaque) or not isinstance(args, tuple):
        raise BadPickle(f"an object of no class, near byte {machine.at}")
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


_ESCAPE = re.compile(rb"""\\(?:([\\'"abfnrtv\n])|([0-7]{1,3})|x([0-9a-fA-F]{0,2}))""")
_PLAIN_ESCAPES = dict(zip(b"\\'\"abfnrtv\n", (*b"\\'\"\a\b\f\n\r\t\v", None), strict=True))


def _unescaped(match: re.Match[bytes]) -> bytes:
    """The byte of an escape in a literal of Python 2; what is none stays as it is."""
    if match[1]:
        byte = _PLAIN_ESCAPES[match[1][0]]
        return b"" if byte is None else bytes([byte])
    if match[2]:
        return bytes([int(match[2], 8) & 0xFF])
    if len(match[3]) < 2:
        raise BadPickle("a string with half of an escape")
    return bytes([int(match[3], 16)])


def _quoted(machine: _Machine) -> str:
    raw = machine.line()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b'"', b"'"):
        raise BadPickle(f"a string without quotes, near byte {machine.at}")
    return _old_text(_ESCAPE.sub(_unescaped, raw[1:-1]))


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


_MEMO, _PAIR, _TEXT, _LIST, _DICT, _SET, _TUPLE, _NUMBER, _MADE = 100, 100, 64, 72, 72, 224, 64, 40, 170
"""What CPython takes for each (64 bits, with their place in a stack or table), measured with tracemalloc; `_MADE` is an
OrderedDict, a tensor, a storage or a record of what was not imported."""
_COSTS = {
    **dict.fromkeys("pq\x94", _MEMO),
    **dict.fromkeys("STUVX\x8c\x8dBC\x8e\x96", _TEXT),
    **dict.fromkeys("]l", _LIST),
    **dict.fromkeys("}d", _DICT),
    **dict.fromkeys("\x8f\x91", _SET),
    **dict.fromkeys("t\x85\x86\x87", _TUPLE),
    **dict.fromkeys("FIJLMG\x8a\x8b", _NUMBER),
    **dict.fromkeys("RPQic\x81\x92\x93o", _MADE),
}
"""What an opcode is charged before it is done; the others make nothing, or are charged where they do."""


def _paid(cost: int, act: Callable[[_Machine], None]) -> Callable[[_Machine], None]:
    def paid(machine: _Machine) -> None:
        machine.left -= cost
        if machine.left < 0:
            raise machine.too_large()
        act(machine)

    return paid if cost else act


_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): _paid(_COSTS.get(code, 0), act)
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
        "]": _push(lambda m: []),
        "}": _push(lambda m: {}),
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
        "\x8f": _push(lambda m: set()),
        "\x90": _add_items,
        "\x91": _frozenset,
        "\x92": _new_ex,
        "\x93": _stack_global,
        "\x94": _memoize,
        "\x95": lambda m: (m.take(8), None)[1],
        "\x96": _push(lambda m: bytearray(m.take(m.number(8)))),
    }.items()
}

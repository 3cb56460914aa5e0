"""Class declarations in the code text of a TorchScript archive: which attributes a module has.

Only the head of a class is looked at, up to its first method; nothing is executed.  It declares
the attributes in the order of their slots, and which of them are parameters and buffers.

Source: `PythonPrintImpl::printNamedType` in torch/csrc/jit/serialization/python_print.cpp, and
`SourceImporterImpl::importClass` in torch/csrc/jit/serialization/import_source.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptsurgeon.formats._plain import BadRecord

_CLASS = re.compile(r"class ([A-Za-z_]\w*)(?:\((\w*)\))?:")
_ATTRIBUTE = re.compile(r"  ([A-Za-z_]\w*) : (.+)")
_QUOTED_ATTRIBUTE = re.compile(r'  __annotations__\[("(?:[^"\\]|\\.)*+")\] = (.+)')
_LIST = re.compile(r"  (__\w+__) = \[(.*)\]")
_STRING = re.compile(r'[ ,]*+(?:"((?:[^"\\]|\\.)*+)"|\'((?:[^\'\\]|\\.)*+)\')')
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([0-7]{1,3})|(.))")
_PLAIN_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


@dataclass(frozen=True)
class Class:
    """A class: the kind of thing it is (`Module`), its attributes in slot order with their types
    as text, and those that are parameters and buffers."""

    base: str
    slots: dict[str, str]
    parameters: frozenset[str]
    buffers: frozenset[str]


def parse(text: str) -> dict[str, Class]:
    """Every class of one file, by its name; BadRecord when a declaration cannot be understood."""
    found: dict[str, Class] = {}
    for match in re.finditer(r"^class .*$", text, re.MULTILINE):
        head = _CLASS.fullmatch(match[0])
        if head is None:
            raise BadRecord(f"a class that torch does not write: {match[0][:80]!r}")
        if head[1] in found:
            raise BadRecord(f"the class {head[1]!r} is declared twice")
        found[head[1]] = _declared(head[1], head[2] or "", text, match.end() + 1)
    return found


def _declared(name: str, base: str, text: str, at: int) -> Class:
    slots: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        line = text[at:end]
        if not line.startswith("  ") or line.startswith("  def "):
            break
        at = end + 1
        if (listed := _LIST.fullmatch(line)) and listed[1] in ("__parameters__", "__buffers__"):
            lists[listed[1]] = _strings(listed[2])
        elif (declared := _attribute(line)) is not None:
            slot, kind = declared
            if slot in slots:
                raise BadRecord(f"the class {name!r} has two attributes {slot!r}")
            slots[slot] = kind
    parameters = frozenset(lists.get("__parameters__", ()))
    # Before torch 1.6 nothing marked buffers: they were all tensors that are no parameters.  Since
    # 1.8 torch loads such an archive without them, and so without the statistics of its norms.
    unmarked = (slot for slot, kind in slots.items() if kind == "Tensor")
    buffers = frozenset(lists.get("__buffers__", unmarked)) - parameters
    return Class(base, slots, parameters, buffers)


def _attribute(line: str) -> tuple[str, str] | None:
    """The name and type of the attribute that a line declares; None for a constant or other line."""
    if quoted := _QUOTED_ATTRIBUTE.fullmatch(line):
        return _strings(quoted[1])[0], quoted[2].strip()
    plain = _ATTRIBUTE.fullmatch(line)
    if plain is None or plain[2].startswith("Final["):  # a constant takes no slot
        return None
    return plain[1], plain[2].strip()


def _strings(text: str) -> list[str]:
    """The string literals in a list; BadRecord for anything else in it."""
    found, at = list[str](), 0
    while match := _STRING.match(text, at):
        found.append(_ESCAPE.sub(_unescaped, match[1] or match[2] or ""))
        at = match.end()
    if text[at:].strip(" ,"):
        raise BadRecord(f"a list of names that torch does not write: {text[at : at + 80]!r}")
    return found


def _unescaped(match: re.Match[str]) -> str:
    if match[1]:
        return chr(int(match[1], 16))
    if match[2]:
        return chr(int(match[2], 8))
    return _PLAIN_ESCAPES.get(match[3], match[3])

"""Which model format a protobuf file is, by the numbers of its outermost fields alone.

Protobuf has no magic number: a file is told by fields that fit together from the first byte on.
Sources: onnx.proto3 (ModelProto), CoreML's Model.proto, TensorFlow's saved_model.proto and
graph.proto.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MOST_FIELDS = 64
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
_ONNX = {1: _VARINT, 5: _VARINT, **dict.fromkeys((2, 3, 4, 6, 7, 8, 14, 20, 25, 26), _BYTES)}


@dataclass(frozen=True, slots=True)
class _Field:
    """A field: its number and wire type, its value (a varint's) and the bytes of its contents."""

    number: int
    wire: int
    value: int
    start: int
    stop: int


def kind(read: Callable[[int, int], bytes], size: int) -> str | None:
    """The words for a protobuf model of `size` bytes; `read` gives bytes by count and offset."""
    fields = _fields(read, size)
    if not fields:
        return None
    first, numbers = fields[0], {field.number for field in fields}
    if first.number == 1 and first.wire == _VARINT:
        if 7 in numbers and all(_ONNX.get(field.number) == field.wire for field in fields):
            return "an ONNX model"
        if len(fields) > 1 and first.value == 1 and all(f.number == 2 and f.wire == _BYTES for f in fields[1:]):
            return "a TensorFlow SavedModel"
        if 2 in numbers and max(numbers) >= 200:
            return "a CoreML model"
    elif numbers <= {1, 2, 3, 4} and first.number == 1 and first.wire == _BYTES and _is_node(read, first):
        return "a TensorFlow graph (frozen GraphDef)"
    return None


def _is_node(read: Callable[[int, int], bytes], field: _Field) -> bool:
    """Whether this is a NodeDef: a name, then the name of an operation."""
    head = read(min(256, field.stop - field.start), field.start)
    if len(head) < 4 or head[0] != 0x0A or head[1] > 0x7F:
        return False
    rest = head[2 + head[1] :]
    operation = rest[2 : 2 + rest[1]] if len(rest) > 2 and rest[0] == 0x12 else b""
    return operation.isalnum() and head[2 : 2 + head[1]].isascii()


def _fields(read: Callable[[int, int], bytes], size: int) -> list[_Field]:
    """The first outermost fields; none when the bytes are no protobuf. The last may be cut."""
    found: list[_Field] = []
    at = 0
    while at < size and len(found) < _MOST_FIELDS:
        head = read(min(20, size - at), at)
        tag, used = _varint(head)
        number, wire = tag >> 3, tag & 7
        value, more = _varint(head[used:]) if wire in (_VARINT, _BYTES) else (0, 0)
        if not used or not number or wire not in (_VARINT, _BYTES, *_FIXED) or (wire in (_VARINT, _BYTES) and not more):
            return []
        start = at + used + more
        at = start + (value if wire == _BYTES else _FIXED.get(wire, 0))
        found.append(_Field(number, wire, value, start, min(at, size)))
    return found


def _varint(data: bytes) -> tuple[int, int]:
    """A number and the bytes it takes; 0 bytes when there is none."""
    value = 0
    for index, byte in enumerate(data[:10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, index + 1
    return 0, 0

"""JSON headers: safetensors, the index of a sharded checkpoint, and the side files and journals of changes."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from .draw import TEXTS, Draw, number, pick, scratched, text

_WIDTHS = {"F32": 4, "F16": 2, "I64": 8, "BOOL": 1, "U8": 1, "F8_E5M2": 1, "BF16": 2, "F64": 8, "C64": 8, "F8_E8M0": 1}
_CODES = (*_WIDTHS, "F4", "F6_E2M3", "F6_E3M2", "C128", "f32", "", "F8_E4M3FNUZ", "U16", "I8", "X")
_SHAPES = ((2, 2), (3,), (), (0,), (1, 4), (2, 0, 3), (4, 1, 1, 2))
_ODD = (
    "null", "true", "1.0", "-1", "1e3", "1e400", "NaN", "Infinity", "\"1\"", "[]", "{}", "[[]]", "[1, 2, 3]", "-0",
    "007",
    "18446744073709551616", "9" * 5000, "[" * 300 + "]" * 300, "{\"a\":" * 300 + "1" + "}" * 300, "9223372036854775808",
    "\"\\ud800\"", "\"\\u0000\"", "{\"a\": 1, \"a\": 1}", "1E2", "0.0", "\"F32\"", "[0, 4]", "[4, 0]",
    "9223372036854775807",
)  # fmt: skip
"""JSON values where others should stand."""


def _entries(draw: Draw) -> list[tuple[str, dict[str, str], int]]:
    """Names with the JSON of what their entries say, and the bytes of each tensor; laid end to end."""
    made, at = [], 0
    for place in range(draw.below(5)):
        name = text(draw) if draw.below(3) == 2 else f"layers.{place}.weight"
        code, shape = pick(draw, _CODES) if draw.below(2) else "F32", pick(draw, _SHAPES)
        size = _WIDTHS.get(code, 1)
        for count in shape:
            size *= count
        size = size // 2 if code == "F4" else size
        words = {"dtype": json.dumps(code), "shape": json.dumps(list(shape)), "data_offsets": f"[{at},{at + size}]"}
        made.append((name, words, size))
        at += size
    return made


def _lied(draw: Draw, entries: list[tuple[str, dict[str, str], int]]) -> None:
    name, words, _ = pick(draw, entries)
    how = draw.below(9)
    if how == 0:
        words[pick(draw, ("dtype", "shape", "data_offsets"))] = pick(draw, _ODD)
    elif how == 1:
        words["data_offsets"] = f"[{number(draw)},{number(draw)}]"
    elif how == 2:
        words["shape"] = json.dumps([number(draw) for _ in range(draw.below(4))])
    elif how == 3:
        words["shape"] = json.dumps([pick(draw, (1, 0, 2**32))] * pick(draw, (2, 63, 64, 65, 500)))
    elif how == 4:
        words.pop(pick(draw, ("dtype", "shape", "data_offsets")), None)
    elif how == 5:
        words[pick(draw, ("extra", "Dtype", "data_offset"))] = pick(draw, _ODD)
    elif how == 6:
        entries.append((name, dict(words), 0))
    elif how == 7:
        words["dtype"] = json.dumps(pick(draw, _CODES))
    else:
        entries.reverse()


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in pairs) + "}"


def safetensors(draw: Draw) -> bytes:
    """A safetensors file."""
    entries = _entries(draw)
    total = sum(size for _, _, size in entries)
    how = draw.below(8)
    if how in (3, 4, 5) and entries:
        for _ in range(1 + draw.below(2)):
            _lied(draw, entries)
    pairs = [(name, _object(list(words.items()))) for name, words, _ in entries]
    if draw.below(3) == 2:
        words = [(text(draw), json.dumps(pick(draw, (*TEXTS[:4], "layers.0.weight")))) for _ in range(draw.below(3))]
        words += [(text(draw), pick(draw, _ODD))] if draw.below(6) == 5 else []
        pairs.insert(0, ("__metadata__", _object(words) if draw.below(8) < 7 else pick(draw, _ODD)))
    raw = _object(pairs).encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8 if draw.below(2) else 0)
    length = len(raw)
    if how == 6:
        raw, length, total = _framed(draw, raw, total)
    made = struct.pack("<Q", length % 2**64) + raw + bytes(range(256)) * (total // 256) + bytes(range(total % 256))
    return scratched(draw, made) if how == 7 else made


def _framed(draw: Draw, raw: bytes, total: int) -> tuple[bytes, int, int]:
    """The header, what it says of its length, and the bytes behind it: one of them odd."""
    how = draw.below(6)
    if how == 0:
        return raw, number(draw), total
    if how == 1:
        return raw, len(raw) + pick(draw, (-1, 1, 8)), total
    if how == 2:
        return raw, len(raw), pick(draw, (total + 1, max(0, total - 1), 0, total + 512))
    odd = pick(draw, (b" " + raw, raw + b"\0", raw + b"x", raw + raw, b"\xef\xbb\xbf" + raw, raw.replace(b"\"", b"'"),
                      raw.replace(b":", b" : "), raw[:-1] + b",}", b"{" * 2000, raw.replace(b"a", b"\\u0061"),
                      raw + b"\n", raw.replace(b"a", b"\xff"), b"{}", b"[]", b"null", raw[:-1]))  # fmt: skip
    return odd, len(odd), total


def sparse_header(key: str, size: int, metadata: dict[str, str] | None = None) -> bytes:
    """The header of a file of one tensor of bytes."""
    return _head({key: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, metadata)


def _head(told: dict[str, Any], metadata: dict[str, str] | None, length: int = 0) -> bytes:
    raw = json.dumps({**({"__metadata__": metadata} if metadata else {}), **told}).encode()
    raw += b" " * (length - 8 - len(raw))
    return struct.pack("<Q", len(raw)) + raw


def safetensors_bytes(sizes: dict[str, int], header: int = 0, metadata: dict[str, str] | None = None) -> bytes:
    """A sound file of tensors of so many bytes, its header padded to so many."""
    told, at = {}, 0
    for key, size in sizes.items():
        told[key] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    return _head(told, metadata, header) + bytes(range(at))


FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "pytorch_model-00001-of-00002.bin",
         "pytorch_model-00002-of-00002.bin", "doubled.safetensors", "damaged.safetensors", "empty.safetensors",
         "folder", "pipe", "link.safetensors", "away.safetensors", "other.index.json", "big.safetensors",
         "aliases.safetensors", "gone.safetensors")  # fmt: skip
"""What lies beside an index; `targets` puts it there."""
_PLACES = (
    *FILES, "../secret.safetensors", "/etc/passwd", "", ".", "..", "folder/../x", "a\0b", "a\x1b[31m", "\udc80",
    "x" * 300,
    "folder\\..\\..\\x", "./model-00001-of-00002.safetensors", "model.safetensors.index.json", "folder/x", "C:\\x",
)  # fmt: skip
SHARDS = {
    "model-00001-of-00002.safetensors": ("layers.0.weight", "layers.1.weight"),
    "model-00002-of-00002.safetensors": ("layers.2.weight", "layers.3.weight"),
    "pytorch_model-00001-of-00002.bin": ("layers.0.weight", "layers.1.weight"),
    "pytorch_model-00002-of-00002.bin": ("layers.2.weight", "layers.3.weight"),
}
"""The keys of the sound ones."""


def index(draw: Draw) -> bytes:
    """The JSON of an index over `FILES`."""
    names = tuple(SHARDS)[2 * draw.below(2) :][:2]
    pairs = [(key, json.dumps(name)) for name in names for key in SHARDS[name]]
    for _ in range(draw.below(4)):
        how, at = draw.below(8), draw.below(max(1, len(pairs)))
        if how == 0 and pairs:
            del pairs[at]
        elif how == 1 and pairs:
            pairs[at] = pairs[at][0], json.dumps(pick(draw, _PLACES))
        elif how == 2:
            pairs.insert(at, (text(draw), json.dumps(pick(draw, _PLACES))))
        elif how == 3 and pairs:
            pairs[at] = pairs[at][0], pick(draw, _ODD)
        elif how == 4 and pairs:
            pairs.append(pairs[at])
        elif how == 5:
            pairs.reverse()
        elif pairs:
            pairs[at] = text(draw), pairs[at][1]
    total = pick(draw, ("96", "96.0", "48", "24", *_ODD)) if draw.below(3) == 2 else "192"
    outer = [("metadata", _object([("total_size", total), (text(draw), json.dumps(text(draw)))])),
             ("weight_map", _object(pairs))]  # fmt: skip
    if draw.below(8) == 7:
        outer[draw.below(2)] = (pick(draw, ("weight_map", "metadata", "x")), pick(draw, _ODD))
    raw = _object(outer).encode()
    return scratched(draw, raw) if draw.below(10) == 9 else raw


MAGIC = b"ckptsurgeon in-place 1\n"


def side(draw: Draw, name: str, old: bytes, new: bytes, sizes: tuple[int, int]) -> bytes:
    """A side file of a file called `name` whose beginning was `old` and is to be `new`, most of it sound."""
    told: dict[str, Any] = {
        "name": name, "run": "r", "before": sizes[0], "after": sizes[1], "redo": bool(draw.below(2)), "part_of": None,
        "shards": [], "emptied": [], "regions": [len(old), len(new)],
    }  # fmt: skip
    for _ in range(draw.below(3)):
        key = pick(draw, tuple(told))
        told[key] = pick(draw, (
            number(draw), text(draw), None, True, [], [number(draw)], {}, "model.safetensors.index.json", ["../x"],
            [{"name": pick(draw, ("../secret.safetensors", "other.safetensors", name)), "size": number(draw),
              "header": number(draw), "digest": hashlib.sha256(old).hexdigest()}], 1.5, [len(old), len(new)],
        ))  # fmt: skip
    if draw.below(5) == 4:
        del told[pick(draw, tuple(told))]
    if draw.below(6) == 5:
        old, new = scratched(draw, old), scratched(draw, new)
    head = json.dumps(told).encode() if draw.below(12) < 11 else pick(draw, _ODD).encode()
    length = number(draw) % 2**64 if draw.below(16) == 15 else len(head)
    body = MAGIC + struct.pack("<Q", length) + head + old + new
    raw = body + hashlib.sha256(body).digest()
    return scratched(draw, raw) if draw.below(12) == 11 else raw


STAGED = ".f.0123abcd.part"


def journal(draw: Draw) -> bytes:
    """A journal of files that are to take their places."""
    names = (f"{STAGED}/a.part", f"{STAGED}/b.part", ".f.ffffffff.part", "../secret.safetensors", "/etc/passwd", "keep",
             f"{STAGED}/../../secret.safetensors", "", ".", "..", "\0", ".x.0123abcd.part/../keep", STAGED)  # fmt: skip
    places = ("f", "keep", "new", "../secret.safetensors", "/tmp/x", "", "..", "a/b", "\0", "\udc80", STAGED)
    moves = [[pick(draw, names), pick(draw, places)] for _ in range(draw.below(3))]
    told: Any = {"moves": moves, "aside": [pick(draw, names) for _ in range(draw.below(3))]}
    if draw.below(6) == 5:
        told[pick(draw, ("moves", "aside"))] = json.loads(pick(draw, ("null", "[1]", "[[1,2]]", "{}", "[[]]", '"a"')))
    raw = json.dumps(told).encode()
    return scratched(draw, raw) if draw.below(8) == 7 else raw

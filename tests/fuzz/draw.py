"""Choices: made by chance, or read from the bytes that a coverage-guided fuzzer mutates.

The first of several things is always the sound one, so that bytes that have come to an end make sound files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")
NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 63, 64, 65, 127, 128, 200, 255, 256, 4095, 4096, 65535, 65536, 100_000, 2**31 - 1,
    2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -8, -(2**31), -(2**63),
)  # fmt: skip
"""Where counts, sizes and offsets go wrong."""
TEXTS = (
    "a", "b", "weight", "layers.0.weight", "0", "1", "", ".", "..", "../x", "/etc/passwd", "a\nb", "\x1b[31mred\x1b[0m",
    "nul\0", "\u202egnp", "\x9b1m", "\udc80", "é", "__class__", "__metadata__", "_metadata", "_parameters", "_buffers",
    "_modules", "state", "param_groups", "state_dict", "model", "module", "a.running_mean", "a.num_batches_tracked",
    "_local_tensor", "_spec", "placements", "conj", "neg", "values", "cpu", "cuda:0", "meta", "format", "x" * 300,
    "\u2028", "a\tb", "Ⅷ", "٣", "²", "storage", "module.weight", "_non_persistent_buffers_set", "data", "C:\\x",
)  # fmt: skip
"""Keys, names and words: usual ones, those that mean something, and those that do harm where they are shown."""


class Draw(Protocol):
    """`below(n)` is a number from 0 to n - 1."""

    def below(self, n: int) -> int: ...
    def raw(self, count: int) -> bytes: ...


class Chance:
    """By chance, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._draw = self._random.random

    def below(self, n: int) -> int:
        return int(self._draw() * n)

    def raw(self, count: int) -> bytes:
        return self._random.randbytes(count)


class Stream:
    """From bytes; zeros when they have come to an end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, n: int) -> int:
        width = 1 if n <= 256 else 2 if n <= 65536 else 8
        return int.from_bytes(self.raw(width), "little") % n

    def raw(self, count: int) -> bytes:
        got = self._data[self._at : self._at + count]
        self._at += count
        return got + bytes(count - len(got))


def pick(draw: Draw, things: Sequence[T]) -> T:
    """One of some things."""
    return things[draw.below(len(things))]


def often(draw: Draw, least: int, of: int) -> bool:
    """True `least` times in `of`; never where the choices have come to an end."""
    return draw.below(of) >= of - least


def number(draw: Draw) -> int:
    """A count, a size or an offset, in half of the cases a small one."""
    return draw.below(10) if draw.below(2) == 0 else NUMBERS[draw.below(len(NUMBERS))] + (-1, 0, 0, 0, 1)[draw.below(5)]


def text(draw: Draw) -> str:
    """A key, a name or a word."""
    word = TEXTS[draw.below(len(TEXTS))]
    return word if draw.below(6) < 5 else f"{word}.{TEXTS[draw.below(len(TEXTS))]}"


def scratched(draw: Draw, raw: bytes) -> bytes:
    """Bytes with a few of them changed, moved, gone or doubled, whatever they mean."""
    made = bytearray(raw)
    for _ in range(1 + draw.below(3)):
        if not made:
            break
        at, how = draw.below(len(made)), draw.below(6)
        if how == 0:
            made[at] = draw.below(256)
        elif how == 1:
            made[at] ^= 1 << draw.below(8)
        elif how == 2:
            del made[at:]
        elif how == 3:
            del made[at : at + 1 + draw.below(16)]
        elif how == 4:
            made[at:at] = draw.raw(1 + draw.below(8))
        else:
            width = (1, 2, 4, 8)[draw.below(4)]
            made[at : at + width] = (number(draw) % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(made)

"""Casts between the floating types of 16, 32 and 64 bits, on bytes: with numpy alone, and torch's results.

torch takes every type that is narrower than float32, and every way to one, through float32; so does this.
bfloat16 is the upper half of a float32, rounded to nearest, ties to even.  The sign and the bits of a
NaN are not torch's to the letter, which depend on the processor there.
"""

from __future__ import annotations

from typing import Any

from ckptsurgeon.dtypes import DType

_WORDS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
_STEP = 1 << 16
"""Elements that are changed at a time: few enough to stay in the cache."""


def cast(data: memoryview, have: DType, want: DType) -> memoryview | None:
    """The elements of `data` in another type; None for types that only torch computes."""
    if have.name not in _WORDS or want.name not in _WORDS:
        return None
    import numpy as np

    source = np.frombuffer(data, _WORDS[have.name])
    out = np.empty(len(source), _WORDS[want.name])
    with np.errstate(all="ignore"):
        for begin in range(0, len(source), _STEP):
            _fill(out[begin : begin + _STEP], source[begin : begin + _STEP], have.name, want.name)
    raw: Any = out.view(np.uint8)
    return memoryview(raw)


def _fill(out: Any, source: Any, have: str, want: str) -> None:
    import numpy as np

    if have == want:
        out[...] = source
        return
    if have == "bfloat16":
        source = np.left_shift(source, 16, dtype=np.uint32).view(np.float32)
    if want == "bfloat16":
        _rounded(out, source.astype(np.float32, copy=False))
    elif want == "float16":
        _halved(out.view(np.uint16), source.astype(np.float32, copy=False))
    else:
        out[...] = source


def _rounded(out: Any, source: Any) -> None:
    """The upper halves of float32 words, rounded to nearest, ties to even."""
    import numpy as np

    bits = source.view(np.uint32)
    carry = bits >> np.uint32(16)
    carry &= np.uint32(1)
    carry += np.uint32(0x7FFF)
    carry += bits  # of a NaN it may wrap around, which is mended below
    carry >>= np.uint32(16)
    out[...] = carry
    odd = np.isnan(source)
    if odd.any():
        out[odd] = 0x7FC0


def _halved(out: Any, source: Any) -> None:
    """float32 as the words of float16, rounded to nearest, ties to even; numpy's own way takes ten times as long.

    Source: the usual integer way, as in F. Giesen's `float_to_half_fast3_rtne`.
    """
    import numpy as np

    bits = source.view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    odd = size >> np.uint32(13)
    odd &= np.uint32(1)
    made = size + np.uint32(0xC8000FFF)  # the exponent's offset, 15 for 127, and just under half of the last place
    made += odd
    made >>= np.uint32(13)
    small = size < np.uint32(0x38800000)  # under 2**-14: the addition of 0.5 rounds at float16's last place
    if small.any():
        made[small] = (size[small].view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    large = size >= np.uint32(0x47800000)  # 65536 and more
    if large.any():
        made[large] = np.where(size[large] > np.uint32(0x7F800000), np.uint32(0x7E00), np.uint32(0x7C00))
    made |= (bits >> np.uint32(16)) & np.uint32(0x8000)
    out[...] = made

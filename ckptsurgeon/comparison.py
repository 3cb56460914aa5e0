"""Two tensors value by value, in bounded memory: what `ckpt diff --values` says of a key.

Both are read in lockstep.  Blocks of two dtypes have different sizes in bytes, so they are lined up
by elements; every sum is of float64 products, and sums of blocks are added exactly, so that neither
huge nor tiny values overflow or vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from ckptsurgeon import charges, evaluate
from ckptsurgeon.dtypes import DTYPES, DType
from ckptsurgeon.errors import InputError, UsageError
from ckptsurgeon.sources import Absent, Extent, Inline
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 17
"""Elements that are compared at a time: few enough that their float64 values stay in the cache."""
_HALVES = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
_SPLIT = 2.0**32


@dataclass(frozen=True)
class Comparison:
    """How the values of `a` differ from those of `b`.

    With `a` and `b` as vectors in float64 (a complex element is its two parts), over the elements
    where both are finite:

    - `max_abs`: max |a - b|, the modulus for complex elements; 0 where there is no such element
    - `relative_l2`: ||a - b|| / ||b||; 0 where ||a - b|| is 0, None where only ||b|| is
    - `cosine`: a·b / (||a|| ||b||), for complex elements the real part of a·conj(b); None where
      either is 0

    and over all elements: `equal`, whether every value is the same (NaN is NaN, -0 is 0, a complex
    value is its two parts; integers are exact beyond 2**53), `differing`, the elements whose values
    are not, and `nan` and `inf`, the elements of `a` and of `b` with a NaN or an infinity.

    A figure that overflows float64 is None.  Elements that share bytes (fewer than 8 bits) are
    compared by their bytes, equal nothing of another dtype, and have no figures; tensors without dense
    bytes are equal when all of their parts are.  Where no element is finite on both sides `max_abs` and
    `relative_l2` are None too.  Where nothing was
    read, because both are the same bytes of the same file, `cosine`, `nan` and `inf` are None.
    """

    equal: bool
    differing: int | None
    max_abs: float | None
    relative_l2: float | None
    cosine: float | None
    nan: tuple[int, int] | None
    inf: tuple[int, int] | None


_UNREAD = Comparison(True, 0, 0.0, 0.0, None, None, None)


def is_one(a: TensorRef, b: TensorRef) -> bool:
    """Whether both are the same bytes of the same file, so that they are equal without a look."""
    return isinstance(a.source, Extent) and a == b


def compare(a: TensorRef, b: TensorRef, tick: Callable[[int], None] | None = None) -> Comparison:
    """The figures of two tensors of one shape, read block by block; the dtypes may differ.

    `tick` is called with the bytes of both that each step read.  Raises UsageError when the shapes
    differ, InputError when one of them cannot be read or torch cannot compute with its dtype.

    >>> from ckptsurgeon.sources import Inline
    >>> a, b = (TensorRef(TensorSpec(DTYPES["int8"], (2,)), Inline(bytes(data))) for data in ([3, 4], [3, 2]))
    >>> found = compare(a, b)
    >>> found.differing, found.max_abs, round(found.relative_l2, 4)
    (1, 2.0, 0.5547)
    """
    if a.shape != b.shape:
        raise UsageError(f"tensors of one shape are compared, not {list(a.shape)} and {list(b.shape)}")
    if is_one(a, b):
        return _UNREAD
    if a.absent is not None or b.absent is not None:
        equal = _same_parts(a, b)
        return Comparison(equal, 0 if equal else None, None, None, None, None, None)
    a, b = _as_numbers(a), _as_numbers(b)
    if a.dtype.bits < 8 or b.dtype.bits < 8:
        equal = a.dtype == b.dtype and _same_bytes(a, b, tick)
        return Comparison(equal, 0 if equal else None, None, None, None, None, None)
    sums, parts = _Sums(), 2 if "complex" in (a.dtype.kind, b.dtype.kind) else 1
    wide = any(dtype.name in ("int64", "uint64") for dtype in (a.dtype, b.dtype))
    chunks = (in_steps(ref, _CHUNK * ref.dtype.itemsize) for ref in (a, b))
    for left, right in zip(*chunks, strict=True):
        sums.add(_side(left, a.dtype, parts, wide), _side(right, b.dtype, parts, wide))
        if tick is not None:
            tick(len(left) + len(right))
    return sums.figures()


def _same_parts(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors without dense bytes (sparse, nested …) are made of the same parts."""
    if not isinstance(a.source, Absent) or not isinstance(b.source, Absent) or a.source.form != b.source.form:
        return False
    if not a.source.closed or not b.source.closed:
        return False  # there may be more to it than its tensors
    left, right = dict(a.source.parts), dict(b.source.parts)
    same = list(left) == list(right) and all(left[name].spec == right[name].spec for name in left)
    return same and all(compare(left[name], right[name]).equal for name in left)


def _as_numbers(ref: TensorRef) -> TensorRef:
    """A quantised tensor as the numbers that its integers stand for; any other as it is."""
    if ref.quantizer is None:
        return ref
    raw = ref.read().dequantize().contiguous().numpy().tobytes()
    return TensorRef(TensorSpec(DTYPES["float32"], ref.shape), Inline(raw))


def compare_all(
    pairs: Mapping[str, tuple[TensorRef, TensorRef]], progress: Callable[[int, int], None] | None = None
) -> dict[str, Comparison]:
    """The figures of each pair, by key; `progress` is called with the bytes read and those to read.

    The errors of `compare` come with their key.
    """
    apart = [pair for pair in pairs.values() if not is_one(*pair)]
    charges.reading(ref for pair in apart for ref in pair)
    total = sum(a.nbytes + b.nbytes for a, b in apart)
    done, found = 0, {}

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    for key, (a, b) in pairs.items():
        try:
            found[key] = compare(a, b, tick)
        except InputError as error:
            error.key = error.key or key
            raise
    return found


def _same_bytes(a: TensorRef, b: TensorRef, tick: Callable[[int], None] | None) -> bool:
    same = True
    for left, right in zip(in_steps(a, _CHUNK), in_steps(b, _CHUNK), strict=True):
        same = same and left == right
        if tick is not None:
            tick(len(left) + len(right))
    return same


def in_steps(ref: TensorRef, nbytes: int) -> Iterator[memoryview]:
    """The bytes of a tensor in steps of exactly `nbytes`, but for the last; copied only where blocks end between."""
    held = bytearray()
    for block in ref.blocks():
        while block:
            if not held and len(block) >= nbytes:
                yield block[:nbytes]
                block = block[nbytes:]
                continue
            missing = nbytes - len(held)
            held += block[:missing]
            block = block[missing:]
            if len(held) == nbytes:
                yield memoryview(held)
                held = bytearray()
    if held:
        yield memoryview(held)


@dataclass(frozen=True)
class _Side:
    """A chunk of one tensor: float64 values, `(elements, parts)`, and where either tensor is of
    64-bit integers the same values once more, exactly, as `high * 2**32 + low`."""

    values: torch.Tensor
    split: tuple[torch.Tensor, torch.Tensor] | None


def _side(data: memoryview, dtype: DType, parts: int, wide: bool) -> _Side:
    half = _HALVES.get(dtype.name)
    stored = DTYPES["int64"] if dtype.name == "uint64" else dtype if half is None else DTYPES[half]
    raw = evaluate.to_torch(data, TensorSpec(stored, (len(data) // dtype.itemsize, 1 if half is None else 2)))
    try:
        values = raw.double()
        if not wide:
            return _Side(_wider(values, parts), None)
        high, low = _split(raw, values, dtype)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"torch cannot compute with {dtype}: {error}") from None
    if dtype.name == "uint64":
        values = high * _SPLIT + low
    return _Side(_wider(values, parts), (_wider(high, parts), _wider(low, parts)))


def _wider(values: torch.Tensor, parts: int) -> torch.Tensor:
    """A real number is a complex one whose second part is 0."""
    if values.shape[1] == parts:
        return values
    made = values.new_zeros(len(values), parts)
    made[:, :1] = values
    return made


def _split(raw: torch.Tensor, values: torch.Tensor, dtype: DType) -> tuple[torch.Tensor, torch.Tensor]:
    """`high` and `low`, both of the sign of the value and |low| < 2**32: so a difference of two
    highs or two lows never rounds to 0, and the two cancel for equal values alone."""
    if dtype.name == "uint64":
        return ((raw >> 32) & 0xFFFFFFFF).double(), (raw & 0xFFFFFFFF).double()
    if dtype.name == "int64":
        top = raw.div(1 << 32, rounding_mode="trunc")
        return top.double(), (raw - (top << 32)).double()
    high = (values / _SPLIT).trunc()
    return high, values - high * _SPLIT


def _difference(a: _Side, b: _Side) -> torch.Tensor:
    if a.split is None or b.split is None:
        return a.values - b.values
    return (a.split[0] - b.split[0]) * _SPLIT + (a.split[1] - b.split[1])


@dataclass
class _Sums:
    """What is known of the chunks so far; the sums of squares and products are exact sums."""

    differing: int = 0
    finite: int = 0
    largest: float = 0.0
    nan: list[int] = field(default_factory=lambda: [0, 0])
    inf: list[int] = field(default_factory=lambda: [0, 0])
    squares: Fraction = Fraction(0)
    left: Fraction = Fraction(0)
    right: Fraction = Fraction(0)
    product: Fraction = Fraction(0)

    def add(self, a: _Side, b: _Side) -> None:
        x, y, apart = a.values, b.values, _difference(a, b)
        squares = float(x.reshape(-1).dot(x.reshape(-1))), float(y.reshape(-1).dot(y.reshape(-1)))
        self.finite += len(x)
        if not math.isfinite(sum(squares)):
            x, y, apart = self._only_finite(x, y, apart)
        different = int((apart != 0).any(1).sum())
        self.differing += different
        left, right = _scaled(x, squares[0]), _scaled(y, squares[1])
        self.left += _dot(left, left)
        self.right += _dot(right, right)
        self.product += _dot(left, right)
        if different:
            sizes = apart.abs() if x.shape[1] == 1 else apart[:, 0].hypot(apart[:, 1])
            self.largest = max(self.largest, float(sizes.max()))
            if math.isfinite(self.largest):
                difference = _scaled(apart, float(apart.reshape(-1).dot(apart.reshape(-1))))
                self.squares += _dot(difference, difference)

    def _only_finite(self, *three: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both sides and their difference with 0 where either is not finite, which is counted here."""
        x, y, apart = three
        for at, values in enumerate((x, y)):
            self.nan[at] += int(values.isnan().any(1).sum())
            self.inf[at] += int(values.isinf().any(1).sum())
        finite = (x.isfinite() & y.isfinite()).all(1, keepdim=True)
        same = ((x == y) | (x.isnan() & y.isnan())).all(1, keepdim=True)
        self.differing += int((~same & ~finite).sum())
        self.finite -= int((~finite).sum())
        zero = x.new_zeros(())
        return x.where(finite, zero), y.where(finite, zero), apart.where(finite, zero)

    def figures(self) -> Comparison:
        relative: float | None = None
        unknown = self.differing > 0 and not self.finite
        if not unknown and math.isfinite(self.largest) and (self.right or not self.squares):
            relative = _root(self.squares / (self.right or 1))
        cosine: float | None = None
        if self.left and self.right:
            cosine = min(1.0, math.sqrt(self.product**2 / (self.left * self.right))) * (1 if self.product > 0 else -1)
        return Comparison(
            not self.differing,
            self.differing,
            self.largest if math.isfinite(self.largest) and not unknown else None,
            relative,
            cosine,
            (self.nan[0], self.nan[1]),
            (self.inf[0], self.inf[1]),
        )


def _scaled(x: torch.Tensor, squares: float) -> tuple[torch.Tensor, Fraction]:
    """The flat values, divided by a power of two where the sum of their squares leaves float64."""
    x = x.reshape(-1)
    if 1e-200 < squares < math.inf:
        return x, Fraction(1)
    most = float(x.abs().max())
    exponent = math.frexp(most)[1] - 1
    return (x / math.ldexp(1.0, exponent), Fraction(2) ** exponent) if most else (x, Fraction(1))


def _dot(x: tuple[torch.Tensor, Fraction], y: tuple[torch.Tensor, Fraction]) -> Fraction:
    return Fraction(float(x[0].dot(y[0]))) * x[1] * y[1]


def _root(value: Fraction) -> float | None:
    try:
        return math.sqrt(value)
    except OverflowError:
        return None

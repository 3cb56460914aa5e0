"""Element types: their names, their sizes, and the only size arithmetic of the project.

Names are torch's (`float32`), without the `torch.`; `code` is the name in a safetensors header, empty
for types that it does not have.
Sources: the torch documentation ("Tensor Attributes"), safetensors `tensor.rs` (`Dtype`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod


@dataclass(frozen=True)
class DType:
    """One element type.

    `bits` are the bits that one block takes, `block` the number of elements in a block (1 for
    all types that can be addressed element by element), `kind` is one of `float`, `int`,
    `uint`, `bool`, `complex`, `quantized` (integers that a scale and a zero point make numbers of).
    """

    name: str
    bits: int
    kind: str
    code: str
    block: int = 1

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The bytes that a contiguous tensor of `shape` takes; ValueError if they are not whole."""
        blocks, rest = divmod(prod(shape), self.block)
        size, odd = divmod(blocks * self.bits, 8)
        if rest or odd:
            raise ValueError(f"shape {list(shape)} of {self.name} does not end on a whole byte")
        return size

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element; ValueError for types whose elements share bytes."""
        if self.block != 1 or self.bits % 8:
            raise ValueError(f"elements of {self.name} are not whole bytes")
        return self.bits // 8

    @property
    def plain(self) -> DType:
        """The type without its quantisation: what its elements are in the file."""
        return DTYPES[self.name.removeprefix("q")] if self.kind == "quantized" else self

    @property
    def bounds(self) -> tuple[int | float, int | float]:
        """The least and the greatest finite number that an element can be; ValueError for types that are no numbers."""
        if self.kind == "bool":
            return 0, 1
        if self.kind in ("int", "uint"):
            half = 1 << (self.bits - 1)
            return (-half, half - 1) if self.kind == "int" else (0, 2 * half - 1)
        if self.name not in _LARGEST:
            raise ValueError(f"{self.name} has no bounds")
        return (0.0 if self.name == "float8_e8m0fnu" else -_LARGEST[self.name]), _LARGEST[self.name]

    @property
    def swap_unit(self) -> int:
        """Bytes that a change of byte order turns around: half an element for complex types, and none where elements
        share a byte."""
        if self.bits < 8:
            return 1
        return self.itemsize // 2 if self.kind == "complex" else self.itemsize

    def __str__(self) -> str:
        return self.name


_ALL = (
    DType("float64", 64, "float", "F64"),
    DType("float32", 32, "float", "F32"),
    DType("float16", 16, "float", "F16"),
    DType("bfloat16", 16, "float", "BF16"),
    DType("float8_e4m3fn", 8, "float", "F8_E4M3"),
    DType("float8_e4m3fnuz", 8, "float", "F8_E4M3FNUZ"),
    DType("float8_e5m2", 8, "float", "F8_E5M2"),
    DType("float8_e5m2fnuz", 8, "float", "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 8, "float", "F8_E8M0"),
    DType("float6_e2m3", 6, "float", "F6_E2M3"),
    DType("float6_e3m2", 6, "float", "F6_E3M2"),
    DType("float4_e2m1", 4, "float", "F4"),
    DType("complex128", 128, "complex", "C128"),
    DType("complex64", 64, "complex", "C64"),
    DType("complex32", 32, "complex", "C32"),
    DType("int64", 64, "int", "I64"),
    DType("int32", 32, "int", "I32"),
    DType("int16", 16, "int", "I16"),
    DType("int8", 8, "int", "I8"),
    DType("uint64", 64, "uint", "U64"),
    DType("uint32", 32, "uint", "U32"),
    DType("uint16", 16, "uint", "U16"),
    DType("uint8", 8, "uint", "U8"),
    DType("bool", 8, "bool", "BOOL"),
    DType("qint8", 8, "quantized", ""),
    DType("quint8", 8, "quantized", ""),
    DType("qint32", 32, "quantized", ""),
)

_LARGEST = {
    "float64": 1.7976931348623157e308,
    "float32": 3.4028234663852886e38,
    "bfloat16": 3.3895313892515355e38,
    "float16": 65504.0,
    "float8_e4m3fn": 448.0,
    "float8_e4m3fnuz": 240.0,
    "float8_e5m2": 57344.0,
    "float8_e5m2fnuz": 57344.0,
    "float8_e8m0fnu": 2.0**127,
}
"""The largest finite number of a floating type; `torch.finfo(dtype).max`."""
DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}
"""Every element type by its torch name."""
BY_CODE: dict[str, DType] = {dtype.code: dtype for dtype in _ALL if dtype.code}
"""Every element type by its name in a safetensors header."""
_SPELLINGS = {
    **{code.lower(): dtype for code, dtype in BY_CODE.items()},
    **DTYPES,
    "half": DTYPES["float16"],
    "float": DTYPES["float32"],
    "double": DTYPES["float64"],
    "fp16": DTYPES["float16"],
    "fp32": DTYPES["float32"],
    "fp64": DTYPES["float64"],
    "long": DTYPES["int64"],
    "int": DTYPES["int32"],
    "short": DTYPES["int16"],
    "cfloat": DTYPES["complex64"],
    "cdouble": DTYPES["complex128"],
}


def parse_dtype(text: str) -> DType:
    """The type that `text` names in any common spelling; ValueError with the choices if none.

    >>> [parse_dtype(word).name for word in ("bf16", "torch.bfloat16", "BF16", "bfloat16")]
    ['bfloat16', 'bfloat16', 'bfloat16', 'bfloat16']
    """
    found = _SPELLINGS.get(text.lower().removeprefix("torch."))
    if found is None:
        raise ValueError(f"no dtype is named {text!r}; there are {', '.join(DTYPES)}")
    return found

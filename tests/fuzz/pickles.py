"""Pickles: written by a grammar of what torch and Python write, or taken from sound ones, with opcodes changed.

Nothing here pickles anything: opcodes are put together by hand, and may name whatever they like.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise

from .draw import NUMBERS, TEXTS, Draw, number, pick, text

Ops = list[bytes]
REBUILDS = (
    "_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_qtensor",
    "_rebuild_sparse_tensor", "_rebuild_sparse_csr_tensor", "_rebuild_nested_tensor", "_rebuild_meta_tensor_no_storage",
    "_rebuild_wrapper_subclass", "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy",
    "_rebuild_xla_tensor", "_rebuild_parameter_with_state",
)  # fmt: skip
NAMES = (
    *(("torch._utils", name) for name in REBUILDS),
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter"), ("builtins", "set"),
    ("torch", "Size"), ("torch", "float32"), ("torch", "float8_e5m2"), ("torch", "float4_e2m1fn_x2"), ("torch",
    "int64"),
    ("torch", "FloatStorage"), ("torch", "LongStorage"), ("torch", "QInt8Storage"), ("torch", "QUInt4x2Storage"),
    ("torch.storage", "UntypedStorage"), ("torch", "per_tensor_affine"), ("torch", "per_channel_affine"),
    ("torch.nn.parameter", "Parameter"), ("torch.autograd.variable", "Variable"), ("torch", "device"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch._tensor", "_rebuild_from_type"),
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"), ("torch.fx.graph_module", "reduce_graph_module"),
    ("torch.serialization", "_get_layout"), ("torch.jit._pickle", "build_tensorlist"),
    ("torch.jit._pickle", "restore_type_tag"), ("torch.jit._script", "unpackage_script_module"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"), ("numpy", "dtype"),
    ("numpy._core.numeric", "_frombuffer"), ("numpy", "ndarray"), ("_codecs", "encode"), ("builtins", "complex"),
    ("builtins", "bytearray"), ("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("builtins", "bytes"),
    ("__torch__", "M"), ("__torch__.m", "Inner"), ("x", "ShardedTensor"), ("torch.nn.modules.linear", "Linear"),
    ("os", "system"), ("builtins", "eval"), ("posix", "system"), ("torch", "_utils._rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v2.x"), ("a\x1b[31m", "b\u202e"), ("__main__", "Net"), ("", ""),
)  # fmt: skip
"""Globals: every one that a reader has a builder for, what stands beside them, and what an attacker names."""
_DTYPES = ("float32", "int64", "float8_e5m2", "float4_e2m1fn_x2", "bfloat16", "bool", "nothing")
_STORAGES = ("FloatStorage", "LongStorage", "BoolStorage", "HalfStorage", "QInt8Storage", "ComplexDoubleStorage", "X")


def utf8(word: str) -> bytes:
    raw = word.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def glob(name: tuple[str, str]) -> bytes:
    return b"c" + "\n".join(name).encode("utf-8", "surrogatepass") + b"\n"


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def numbers(*values: int) -> bytes:
    return tuple_of(*map(integer, values))


def reduced(name: tuple[str, str], *args: bytes) -> bytes:
    return glob(name) + tuple_of(*args) + b"R"


_NONE, _TRUE, _FALSE = b"N", b"\x88", b"\x89"
_HOOKS = b"ccollections\nOrderedDict\n)R"
_CLAIMS = tuple(
    code + (value % (1 << 8 * width)).to_bytes(width, "little")
    for code, width in ((b"X", 4), (b"B", 4), (b"T", 4), (b"\x8b", 4), (b"\x8d", 8), (b"\x8e", 8), (b"\x96", 8))
    for value in (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, -1)
)
"""Lengths of what is not there."""
ALPHABET = (
    b"0", b"1", b"2", b"(", b"t", b"l", b"d", b"]", b"}", b")", b"e", b"a", b"s", b"u", b"b", b"R", b"o", b"Q", b"N",
    b".", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94",
    b"\x97", b"\x98", b"\x82\1", b"\x83\1\0", b"\x84\1\0\0\0", b"\x80\2", b"\x80\5", b"\x80\xff", b"\x95" + b"\xff" * 8,
    b"ios\nsystem\n", b"cos\nsystem\n", b"P1\n", b"Pstorage\n", b"q\0", b"q\1", b"h\0", b"h\1", b"h\x40", b"r\0\1\0\0",
    b"r\xff\xff\xff\xff", b"j\0\1\0\0", b"j\xff\xff\xff\xff", b"p0\n", b"p-1\n", b"p99999999999999999999\n", b"g0\n",
    b"I01\n", b"I5\n", b"I" + b"9" * 5000 + b"\n", b"L5L\n", b"L" + b"9" * 5000 + b"L\n", b"Ix\n", b"I1_0\n", b"F1.5\n",
    b"Fnan\n", b"F1_0\n", b"Finf\n", b"S'a'\n", b"S'\\x41\\q'\n", b"S'\n", b"Va\\u0041\\ud800\n", b"V\\uzzzz\n",
    b"\x8a\0", b"\x8a\xff" + b"\x7f" * 255, b"\x8b\0\0\0\0", b"\x8b\0\4\0\0" + b"\1" * 1024, b"U\1a", b"T\1\0\0\0\xff",
    b"C\1\xff", b"\x8c\1a", b"G\x7f\xf8\0\0\0\0\0\0", b"G\x3f\xf0\0\0\0\0\0\0", b"K\1", b"J\xff\xff\xff\xff",
    b"M\xff\xff",
    b"]q\1h\1a", b"}q\1X\1\0\0\0ah\1s", b"2\x86" * 40, b"22\x87" * 30, b"]" * 30 + b"a" * 29, b"(" * 300,
    b")" + b"\x85" * 300, b"]" + b"2a" * 3, b"(" + b"(2\x86K\1\x86l" * 9, b"\x8f(K\1K\1\x90", b"(K\1l\x91", _HOOKS,
    b"}", b"X\1\0\0\0a", *_CLAIMS,
)  # fmt: skip
"""Opcodes with their arguments, and short runs of them: all that there are, sound, lying, and repeated to a bomb."""


def parsed(raw: bytes) -> Ops:
    """A sound pickle as a list of opcodes; what is put aside by a short number is so by a long one, as in large
    files, whose tensors are read a whole record at a time."""
    ends = [at for _, _, at in pickletools.genops(raw)] + [len(raw)]
    ops = [raw[a:b] for a, b in pairwise(ends)]
    return [b"r" + op[1:] + b"\0\0\0" if op[:1] == b"q" else op for op in ops]


def storage(draw: Draw, elements: int = 12) -> bytes:
    """A persistent id of torch's, in most cases a sound one."""
    if draw.below(8) == 7:
        return pick(draw, (numbers(), utf8("storage"), numbers(1), b"N", tuple_of(utf8("module"), b"N"))) + b"Q"
    odd = draw.below(6)
    kind = glob(("torch", _STORAGES[draw.below(7)] if odd == 1 else "FloatStorage"))
    key = utf8(text(draw)) if odd == 2 else utf8(str(draw.below(9)))
    size = integer(number(draw) if odd == 3 else elements)
    device = utf8(text(draw)) if odd == 4 else utf8("cpu")
    view = [b"N"] if draw.below(8) == 1 else []
    if odd == 5 and draw.below(4) == 3:
        view = [tuple_of(utf8("v"), integer(number(draw)), integer(number(draw)))]
    return tuple_of(utf8("storage"), kind, key, device, size, *view) + b"Q"


def shaped(draw: Draw) -> tuple[bytes, bytes, bytes]:
    """An offset, a shape and strides, in most cases sound ones."""
    shape = [(3, 4), (12,), (), (2, 1, 3), (0, 3), (4, 3)][draw.below(6)]
    strides = [(4, 1), (1,), (), (3, 3, 1), (3, 1), (1, 4)][[(3, 4), (12,), (), (2, 1, 3), (0, 3), (4, 3)].index(shape)]
    offset, how = 0, draw.below(8)
    if how == 5:
        offset = number(draw)
    elif how == 6 and shape:
        shape = (*shape[1:], number(draw))
    elif how == 7 and strides:
        strides = (*strides[1:], number(draw))
    elif how == 4:
        count = (2, 63, 64, 65, 300)[draw.below(5)]
        shape, strides = (1,) * count, (pick(draw, NUMBERS),) * (count + draw.below(2))
    return integer(offset), numbers(*shape), numbers(*strides)


def tensor(draw: Draw, depth: int = 0) -> bytes:
    """A tensor, a parameter, or one of the rarer forms that torch has."""
    kind = draw.below(16)
    offset, shape, strides = shaped(draw)
    dtype = glob(("torch", _DTYPES[draw.below(7)]))
    plain = (storage(draw), offset, shape, strides, _FALSE, _HOOKS)
    if kind == 8:
        inner = reduced(NAMES[0], *plain)
        return reduced(("torch._utils", "_rebuild_parameter"), inner, _TRUE, _HOOKS)
    if kind == 9:
        return reduced(("torch._utils", "_rebuild_tensor_v3"), *plain, dtype)
    if kind == 10:
        scale = tuple_of(glob(("torch", "per_tensor_affine")), b"G\x3f\xf0\0\0\0\0\0\0", integer(number(draw)))
        if draw.below(2):
            parts = reduced(NAMES[0], *plain), reduced(NAMES[0], *plain), integer(number(draw))
            scale = tuple_of(glob(("torch", "per_channel_affine")), *parts)
        return reduced(("torch._utils", "_rebuild_qtensor"), *plain[:4], scale, _FALSE, _HOOKS)
    if kind == 11:
        layout = reduced(("torch.serialization", "_get_layout"), utf8("torch.sparse_coo"))
        one = tensor(draw, depth + 1) if depth < 4 else reduced(NAMES[0], *plain)
        parts = tuple_of(one + b"q\3", b"h\3", shape)
        return reduced(("torch._utils", "_rebuild_sparse_tensor"), layout, parts)
    if kind == 12:
        return reduced(("torch._utils", "_rebuild_meta_tensor_no_storage"), dtype, shape, strides, _FALSE)
    if kind == 13:
        function, cls = glob(pick(draw, NAMES)), glob(pick(draw, NAMES))
        return reduced(
            ("torch._tensor", "_rebuild_from_type_v2"), function, cls, tuple_of(*plain), value(draw, depth + 1)
        )
    if kind == 14:
        code = utf8(("f4", "i8", "c16", "U4", "O", "M8")[draw.below(6)])
        kindof = (
            reduced(("numpy", "dtype"), code, _FALSE, _TRUE) + tuple_of(integer(3), utf8("<>=|"[draw.below(4)])) + b"b"
        )
        data = b"C\x30" + bytes(48) if draw.below(4) < 3 else value(draw, depth + 1)
        made = reduced(("numpy.core.multiarray", "_reconstruct"), glob(("numpy", "ndarray")), numbers(0), b"C\1b")
        return made + tuple_of(integer(1), shape, kindof, (_FALSE, _TRUE)[draw.below(2)], data) + b"b"
    if kind == 15:
        flags = b"}(" + utf8(("conj", "neg", "x")[draw.below(3)]) + _TRUE + b"u"
        return reduced(NAMES[draw.below(2)], *plain, flags)
    return reduced(NAMES[0], *plain)


def module(draw: Draw, depth: int) -> bytes:
    """A pickled `nn.Module`."""

    def members(some: Callable[[], bytes]) -> bytes:
        pairs = b"".join(utf8(TEXTS[draw.below(8)]) + some() for _ in range(draw.below(3)))
        return _HOOKS + b"(" + pairs + b"u"

    inner = (lambda: module(draw, depth + 1)) if depth < 3 else (lambda: b"N")
    parts = ("_parameters", members(lambda: tensor(draw, depth))), ("_buffers", members(lambda: tensor(draw, depth)))
    parts = (*parts, ("_modules", members(inner)), ("_non_persistent_buffers_set", b"\x8f"))
    names = ("builtins", "object")
    made = (
        reduced(("copyreg", "_reconstructor"), glob(pick(draw, NAMES)), glob(names), b"N")
        if draw.below(2)
        else (glob(("torch.nn.modules.linear", "Linear")) + b")\x81")
    )
    return made + b"}(" + b"".join(utf8(name) + part for name, part in parts) + b"ub"


def value(draw: Draw, depth: int = 0) -> bytes:  # noqa: C901 - a line a kind
    """Any value."""
    kind = draw.below(20) if depth < 4 else draw.below(6)
    if kind == 0:
        return integer(number(draw))
    if kind == 1:
        return utf8(text(draw))
    if kind in (2, 3):
        return tensor(draw, depth)
    if kind == 4:
        return pick(draw, (b"N", _TRUE, b"G\x3f\xf0\0\0\0\0\0\0", b"C\1a", b"\x8f", b"]", b"}", b")"))
    if kind == 5:
        return glob(pick(draw, NAMES))
    if kind in (6, 7, 8, 9):
        return mapping(draw, depth)
    some = [value(draw, depth + 1) for _ in range(draw.below(4))]
    if kind in (10, 11):
        return b"](" + b"".join(some) + b"e"
    if kind == 12:
        return tuple_of(*some)
    if kind == 13:
        return module(draw, depth)
    if kind in (14, 15):
        return reduced(pick(draw, NAMES), *some)
    if kind == 16:
        return glob(pick(draw, NAMES)) + tuple_of(*some) + b"\x81" + value(draw, depth + 1) + b"b"
    if kind == 17:
        code = pick(draw, (b"\x90", b"e", b"u"))
        return glob(pick(draw, NAMES)) + b")\x81(" + b"".join(some) + code
    if kind == 18:
        return value(draw, depth + 1) + b"q\2" + tuple_of(b"h\2", b"h\2")
    optimizer = utf8("state") + value(draw, depth + 1) + utf8("param_groups") + value(draw, depth + 1)
    return b"}(" + optimizer + b"u"


def mapping(draw: Draw, depth: int) -> bytes:
    """A dict, in most cases a state dict."""
    begin = (b"}", _HOOKS)[draw.below(2)]
    any_key = draw.below(5) == 4
    pairs = []
    for at in range(1 + draw.below(4)):
        key = value(draw, depth + 2) if any_key else utf8(text(draw) if draw.below(3) == 2 else f"layers.{at}.weight")
        pairs.append(key + (tensor(draw, depth) if draw.below(3) < 2 else value(draw, depth + 1)))
    end = b"}" + utf8("_metadata") + b"}" + utf8(text(draw)) + b"}" + utf8("version") + integer(number(draw)) + b"sssb"
    return begin + b"(" + b"".join(pairs) + b"u" + (end if draw.below(8) == 7 else b"")


def grown(draw: Draw) -> bytes:
    """A pickle by the grammar."""
    return b"\x80\2" + (mapping(draw, 0) if draw.below(2) == 0 else value(draw)) + b"."


def changed(draw: Draw, ops: Ops, others: Sequence[Ops]) -> Ops:  # noqa: C901 - a line a change
    """Opcodes with some of them gone, doubled, moved, replaced, or with another argument."""
    made = list(ops)
    for _ in range(draw.below(4)):
        at, how = draw.below(len(made)), draw.below(12)
        if how == 0:
            del made[at]
        elif how == 1:
            made.insert(at, made[at])
        elif how == 2:
            other = draw.below(len(made))
            made[at], made[other] = made[other], made[at]
        elif how == 3:
            made[at] = pick(draw, ALPHABET)
        elif how == 4:
            made.insert(at, pick(draw, ALPHABET))
        elif how == 5:
            other_ops = pick(draw, others)
            begin = draw.below(len(other_ops))
            made[at:at] = other_ops[begin : begin + draw.below(12)]
        elif how == 6:
            made[at : at + draw.below(12)] = []
        elif how == 7:
            made[at] = value(draw, 3)
        else:
            made[at] = _argued(draw, made[at])
        if not made:
            return [b"."]
    return made


def _argued(draw: Draw, op: bytes) -> bytes:
    """An opcode with another argument."""
    code = op[:1]
    if code in (b"K", b"M", b"J", b"\x8a"):
        return integer(number(draw))
    if code in (b"X", b"\x8c"):
        return utf8(text(draw))
    if code in (b"c", b"i"):
        return code + glob(pick(draw, NAMES))[1:]
    if len(op) > 1:
        at = 1 + draw.below(len(op) - 1)
        return op[:at] + bytes([draw.below(256)]) + op[at + 1 :]
    return pick(draw, ALPHABET)


def pickled(draw: Draw, seeds: Sequence[Ops]) -> bytes:
    """A pickle: a sound one with changes, or one by the grammar, or a grown one with changes."""
    how = draw.below(10)
    if how < 6:
        return b"".join(changed(draw, pick(draw, seeds), seeds))
    made = grown(draw)
    if how == 9:
        at = draw.below(len(made))
        return made[:at] + pick(draw, ALPHABET) + made[at + draw.below(3) :]
    return made

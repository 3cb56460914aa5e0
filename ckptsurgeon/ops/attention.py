"""Operations on the projections of attention: joined queries, keys and values, and the order of rotary pairs.

Rows of a projection belong to heads: with `heads` query heads and `kv` heads of keys and values of `size` rows each,
a joined one has `(heads + 2 kv) size` rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptsurgeon.ops._patterns import gathered, matching, scattered
from ckptsurgeon.ops._registry import Args, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import dim_of, divisible, one_dtype
from ckptsurgeon.ops._views import joined, permuted, reshaped, sliced, taken
from ckptsurgeon.tensor import TensorRef, TensorSpec

_PATTERN = Param("pattern", "pattern")
_HEADS = Param("heads", "int", required=False, help="how many heads the queries have")
_KV = Param("kv", "int", required=False, help="how many heads keys and values have, where they are fewer")
_LAYOUT = Param(
    "layout",
    "choice",
    required=False,
    choices=("blocks", "groups"),
    help="blocks: all queries, all keys, all values; groups: of each head of keys its queries, the key, the value",
)
_DIM = Param("dim", "int", required=False, help="the dimension of the rows, 0 if not given")
_FAMILY = "attention"


def _dim(args: Args, shape: tuple[int, ...]) -> int:
    return dim_of(args.get("dim", 0), len(shape), shape)


def _heads(args: Args) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
    heads = args.get("heads")
    if heads is None:
        raise OperationError("heads=N must say how many heads the queries have")
    kv = args.get("kv", heads)
    if heads < 1 or kv < 1 or heads % kv:
        raise OperationError(
            f"heads={heads} is no multiple of kv={kv}: each head of keys serves as many queries", "heads"
        )
    return heads, kv


def _stretches(args: Args, size: int) -> Iterator[tuple[int, int, int]]:
    """Which of queries (0), keys (1) and values (2) the rows of a joined tensor are: its kind, the first row in the
    joined tensor, and how many; `size` are the rows of a head."""
    heads, kv = _heads(args)
    at = 0
    for _ in range(kv if args.get("layout") == "groups" else 1):
        each = 1 if args.get("layout") == "groups" else kv
        for kind, count in ((0, heads // kv * each), (1, each), (2, each)):
            yield kind, at, count * size
            at += count * size


def _head_size(args: Args, rows: int, count: int, shape: tuple[int, ...], what: str) -> int:
    if rows % count:
        raise OperationError(f"{rows} rows of {list(shape)} are not {count} {what}", "heads")
    return rows // count


def _joined_size(args: Args, spec: TensorSpec) -> int:
    heads, kv = _heads(args)
    what = f"heads of equal size ({heads} of queries, {kv} of keys, {kv} of values)"
    return _head_size(args, spec.shape[_dim(args, spec.shape)], heads + 2 * kv, spec.shape, what)


def _split(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    divisible(spec)
    if len(args["templates"]) != 3:
        raise OperationError(f"three names are made, for queries, keys and values, not {len(args['templates'])}")
    dim, size = _dim(args, spec.shape), _joined_size(args, spec)
    heads, kv = _heads(args)
    return tuple(
        TensorSpec(spec.dtype, (*spec.shape[:dim], count * size, *spec.shape[dim + 1 :])) for count in (heads, kv, kv)
    )


def _split_refs(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    (ref,) = refs
    rows: tuple[list[int], list[int], list[int]] = ([], [], [])
    for kind, at, count in _stretches(args, _joined_size(args, ref.spec)):
        rows[kind].extend(range(at, at + count))
    return tuple(taken(ref, _dim(args, ref.shape), part) for part in rows)


def _join(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    if len(specs) != 3:
        raise OperationError(f"three tensors are joined, queries, keys and values, not {len(specs)}", "patterns")
    one_dtype(specs)
    heads, kv = _heads(args)
    sizes = []
    for spec, count, what in zip(specs, (heads, kv, kv), ("queries", "keys", "values"), strict=True):
        divisible(spec)
        dim = _dim(args, spec.shape)
        rows, others = spec.shape[dim], (*spec.shape[:dim], *spec.shape[dim + 1 :])
        sizes.append((_head_size(args, rows, count, spec.shape, f"heads of {what} of equal size"), others))
    if len(set(sizes)) > 1:
        shapes = ", ".join(str(list(spec.shape)) for spec in specs)
        raise OperationError(f"{shapes} with heads={heads} kv={kv} are not heads of one size", "heads")
    dim = _dim(args, specs[0].shape)
    whole = sum(spec.shape[dim] for spec in specs)
    return (TensorSpec(specs[0].dtype, (*specs[0].shape[:dim], whole, *specs[0].shape[dim + 1 :])),)


def _join_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    dim = _dim(args, refs[0].shape)
    taken_of, parts = [0, 0, 0], []
    for kind, _, count in _stretches(args, refs[0].shape[dim] // _heads(args)[0]):
        ref, at = refs[kind], taken_of[kind]
        ranges = tuple((at, count, 1) if i == dim else (0, n, 1) for i, n in enumerate(ref.shape))
        parts.append(sliced(ref, ranges))
        taken_of[kind] += count
    return (joined(parts, dim, specs[0]),)


def _same_options(args: Args) -> dict[str, Any]:
    return {name: args[name] for name in ("heads", "kv", "layout", "dim") if args.get(name) is not None}


# -- rotary ------------------------------------------------------------------------------------


def _turned(args: Args, spec: TensorSpec) -> tuple[int, int, int]:
    """Heads, rows of a head, and those of them that are turned."""
    heads, dim = args.get("heads"), _dim(args, spec.shape)
    if heads is None or heads < 1:
        raise OperationError("heads=N must say how many heads the tensor has")
    size = _head_size(args, spec.shape[dim], heads, spec.shape, "heads of equal size")
    turned = args.get("size", size)
    if turned % 2 or not 0 < turned <= size:
        raise OperationError(f"heads of {size} rows, of which {turned} are turned, are no pairs")
    return heads, size, turned


def _rotary(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    divisible(specs[0])
    _turned(args, specs[0])
    return specs


def _rotary_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    (ref,), dim = refs, _dim(args, refs[0].shape)
    heads, size, turned = _turned(args, ref.spec)
    before, after = ref.shape[:dim], ref.shape[dim + 1 :]
    by_head = reshaped(ref, (*before, heads, size, *after))

    def part(begin: int, count: int) -> TensorRef:
        ranges = tuple((0, n, 1) for n in by_head.shape)
        return sliced(by_head, (*ranges[: dim + 1], (begin, count, 1), *ranges[dim + 2 :]))

    pair = (2, turned // 2) if args["to"] == "pairs" else (turned // 2, 2)
    paired = reshaped(part(0, turned), (*before, heads, *pair, *after))
    order = [*range(len(paired.shape))]
    order[dim + 1], order[dim + 2] = dim + 2, dim + 1
    made = reshaped(permuted(paired, tuple(order)), (*before, heads, turned, *after))
    if turned < size:
        made = joined([made, part(turned, size - turned)], dim + 1, TensorSpec(ref.dtype, by_head.shape))
    return (reshaped(made, ref.shape),)


register(
    Operation(
        "split_qkv",
        (_PATTERN, Param("templates", "template", arrow=True, many=True)),
        "Cut joined queries, keys and values apart, also where they alternate by head or keys have fewer heads.",
        r"split_qkv ^(.*)\.query_key_value\.weight$ => \1.q.weight \1.k.weight \1.v.weight heads=12 layout=groups",
        "exact",
        scattered,
        _split,
        _split_refs,
        lambda args, specs: ("join_qkv", _same_options(args)),
        options=(_HEADS, _KV, _LAYOUT, _DIM),
        family=_FAMILY,
    )
)
register(
    Operation(
        "join_qkv",
        (Param("patterns", "pattern", many=True), Param("template", "template", arrow=True)),
        "Join queries, keys and values into one tensor, block by block or head by head.",
        r"join_qkv ^(.*)\.q\.weight$ ^(.*)\.k\.weight$ ^(.*)\.v\.weight$ => \1.qkv.weight heads=32 kv=8",
        "exact",
        gathered,
        _join,
        _join_ref,
        lambda args, specs: ("split_qkv", _same_options(args)),
        options=(_HEADS, _KV, _LAYOUT, _DIM),
        family=_FAMILY,
    )
)
register(
    Operation(
        "rotary",
        (_PATTERN, Param("to", "choice", choices=("half", "pairs"))),
        "Put the rows of each head into the order of the other rotary convention: two halves, or pairs side by side.",
        r"rotary \.wq\.weight$ half heads=32",
        "exact",
        matching,
        _rotary,
        _rotary_ref,
        lambda args, specs: (
            "rotary",
            {
                **{name: args[name] for name in ("heads", "size", "dim") if args.get(name) is not None},
                "to": "half" if args["to"] == "pairs" else "pairs",
            },
        ),
        options=(
            Param("heads", "int", required=False, help="how many heads the tensor has: of keys, those of the keys"),
            Param("size", "int", required=False, help="rows of each head that are turned, if not all"),
            _DIM,
        ),
        family=_FAMILY,
    )
)

"""Operations on parts: one tensor into several, several into one, and some of a tensor's entries.

Along the leading dimension they are arithmetic on extents; along another one they are on strides, or read row by row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.ops._patterns import NUMBER, Numbered, expanded, found, gathered, matching, scattered
from ckptsurgeon.ops._registry import Args, Match, Names, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import dim_of, divisible, one_dtype, resolved
from ckptsurgeon.ops._views import joined, reshaped, sliced, taken
from ckptsurgeon.tensor import TensorRef, TensorSpec

_PATTERN = Param("pattern", "pattern")
_TEMPLATE = Param("template", "template", arrow=True)
_DIM = Param("dim", "int", required=False, help="the dimension, 0 if not given; negative ones count from the last")
_START = Param("start", "int", required=False, help="the first number, 0 if not given")
_FAMILY = "parts"
_MOST_PARTS = 100_000


def _dim(args: Args, shape: tuple[int, ...], rank: int | None = None) -> int:
    return dim_of(args.get("dim", 0), len(shape) if rank is None else rank, shape)


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


# -- split and concat --------------------------------------------------------------------------


def _sizes(args: Args, spec: TensorSpec) -> tuple[int, ...]:
    """How the dimension is divided."""
    count, dim = len(args["templates"]), _dim(args, spec.shape)
    whole, sizes = spec.shape[dim], args.get("sizes")
    if sizes is None:
        if whole % count:
            raise OperationError(
                f"dimension {dim} of {list(spec.shape)} is no multiple of {count}; give the sizes, as sizes="
                f"{','.join(map(str, [whole // count] * (count - 1) + [whole - whole // count * (count - 1)]))}"
            )
        return (whole // count,) * count
    if len(sizes) != count:
        raise OperationError(f"{len(sizes)} sizes for {count} names", "sizes")
    if sum(sizes) != whole:
        raise OperationError(
            f"the sizes {'+'.join(map(str, sizes))} add up to {sum(sizes)}, and dimension {dim} of {list(spec.shape)} "
            f"is {whole}",
            "sizes",
        )
    return tuple(sizes)


def _split(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    divisible(spec)
    dim = _dim(args, spec.shape)
    return tuple(TensorSpec(spec.dtype, _with(spec.shape, dim, size)) for size in _sizes(args, spec))


def _split_refs(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    (ref,), dim = refs, _dim(args, refs[0].shape)
    made, at = [], 0
    for size in _sizes(args, ref.spec):
        made.append(sliced(ref, tuple((at, size, 1) if i == dim else (0, n, 1) for i, n in enumerate(ref.shape))))
        at += size
    return tuple(made)


def _concat(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    first, dim = specs[0], _dim(args, specs[0].shape)
    for spec in specs:
        divisible(spec)
    one_dtype(specs)
    for spec in specs[1:]:
        if len(spec.shape) != len(first.shape) or _with(spec.shape, dim, 0) != _with(first.shape, dim, 0):
            raise OperationError(
                f"{list(first.shape)} and {list(spec.shape)} cannot be joined along dimension {dim}: every other "
                "dimension must be the same"
            )
    return (TensorSpec(first.dtype, _with(first.shape, dim, sum(spec.shape[dim] for spec in specs))),)


def _concat_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    return (joined(refs, _dim(args, specs[0].shape), specs[0]),)


def _unsplit(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    return "concat", {"dim": args["dim"]} if args.get("dim") else {}


def _unconcat(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    sizes = tuple(spec.shape[_dim(args, spec.shape)] for spec in specs)
    given = {"dim": args["dim"]} if args.get("dim") else {}
    return "split", {**given, "sizes": sizes} if len(set(sizes)) > 1 else given


# -- stack and unstack -------------------------------------------------------------------------


def _numbered(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    """Numbered keys into one: grouped by the name that the template makes, in numeric order."""
    pattern: Numbered = args["pattern"]
    start = args.get("start", 0)
    groups: dict[str, dict[int, str]] = {}
    for key in names:
        hit = pattern.regex.search(key)
        if hit is None:
            continue
        name = expanded(pattern.of(hit["i"]), args["template"], key, 1)
        number = int(hit["i"])
        if groups.setdefault(name, {}).setdefault(number, key) != key:
            pair = f"{groups[name][number]!r} and {key!r}"
            yield Match((key,), (), problem=f"{pair} would both be number {number} of {name!r}")
            return
    for name, members in groups.items():
        numbers = sorted(members)
        keys = tuple(members[number] for number in numbers)
        gaps = [number for number in range(start, numbers[-1] + 1) if number not in members][:10]
        if numbers[0] < start:
            text = f"{members[numbers[0]]!r} has a number below {start}, where {name!r} starts"
            yield Match(keys, (), problem=text)
        elif gaps:
            hint = f"; with start={numbers[0]} it begins there" if numbers[0] == gaps[-1] + 1 else ""
            text = f"{name!r} would have gaps: there is no number {', '.join(map(str, gaps))}{hint}"
            yield Match(keys, (), problem=text)
        else:
            yield Match(keys, (name,))


def _stack(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    first = specs[0]
    divisible(first)
    one_dtype(specs)
    other = next((i for i, spec in enumerate(specs) if spec.shape != first.shape), None)
    if other is not None:
        number = args.get("start", 0) + other
        raise OperationError(
            f"tensors of one shape are stacked; {list(first.shape)} is that of the first, {list(specs[other].shape)} "
            f"that of number {number}"
        )
    dim = _dim(args, (*first.shape, len(specs)), len(first.shape) + 1)
    return (TensorSpec(first.dtype, (*first.shape[:dim], len(specs), *first.shape[dim:])),)


def _stack_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    shape = specs[0].shape
    dim = _dim(args, shape)
    return (joined([reshaped(ref, _with(shape, dim, 1)) for ref in refs], dim, specs[0]),)


def _spread(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    pattern: re.Pattern[str] = args["pattern"]
    if NUMBER not in args["template"] and "i" not in re.findall(r"[A-Za-z_]\w*", args["template"]):
        raise OperationError("{i} must stand in the template for the number", "template")
    start = args.get("start", 0)
    for key, _ in found(args, names):
        shape = names[key].shape
        try:
            count = shape[_dim(args, shape)]
        except OperationError as error:
            yield Match((key,), (), problem=f"{key!r}: {error}")
            continue
        if count > _MOST_PARTS:
            yield Match((key,), (), problem=f"{key!r} would be taken apart into {count} tensors, over {_MOST_PARTS}")
            continue
        made = (expanded(pattern, args["template"], key, 1, {"i": start + i}) for i in range(count))
        yield Match((key,), tuple(made))


def _unstack(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    divisible(spec)
    dim = _dim(args, spec.shape)
    return (TensorSpec(spec.dtype, (*spec.shape[:dim], *spec.shape[dim + 1 :])),) * spec.shape[dim]


def _unstack_refs(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    (ref,), dim = refs, _dim(args, refs[0].shape)
    whole = tuple((0, size, 1) for size in ref.shape)
    parts = (sliced(ref, (*whole[:dim], (i, 1, 1), *whole[dim + 1 :])) for i in range(len(specs)))
    return tuple(reshaped(part, spec.shape) for part, spec in zip(parts, specs, strict=True))


def _same_options(args: Args) -> dict[str, Any]:
    return {name: args[name] for name in ("dim", "start") if args.get(name)}


# -- slice, take and pad -----------------------------------------------------------------------


def _ranges(args: Args, spec: TensorSpec) -> tuple[tuple[int, int, int], ...]:
    wanted: tuple[slice, ...] = args["spec"]
    divisible(spec)
    if len(wanted) > len(spec.shape):
        raise OperationError(f"{len(wanted)} ranges for the {len(spec.shape)} dimensions of {list(spec.shape)}", "spec")
    made = []
    for dim, size in enumerate(spec.shape):
        part = wanted[dim] if dim < len(wanted) else slice(None)
        for bound in (part.start, part.stop):
            if bound is not None and not -size <= bound <= size:
                raise OperationError(f"{bound} is outside of dimension {dim} of {list(spec.shape)}, which is {size}")
        begin, end, step = part.indices(size)
        made.append((begin, len(range(begin, end, step)), step))
    return tuple(made)


def _slice(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return (TensorSpec(specs[0].dtype, tuple(size for _, size, _ in _ranges(args, specs[0]))),)


def _indices(args: Args, spec: TensorSpec) -> tuple[int, ...]:
    divisible(spec)
    return resolved(args["indices"], spec.shape, _dim(args, spec.shape))


def _take(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    return (TensorSpec(spec.dtype, _with(spec.shape, _dim(args, spec.shape), len(_indices(args, spec)))),)


def _untake(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]] | None:
    """Back, where no entry was left out."""
    shape = specs[0].shape
    dim, made = _dim(args, shape), _indices(args, specs[0])
    if set(made) != set(range(shape[dim])):
        return None
    given = {"dim": args["dim"]} if args.get("dim") else {}
    return "take", {"indices": tuple(made.index(i) for i in range(shape[dim])), **given}


register(
    Operation(
        "split",
        (_PATTERN, Param("templates", "template", arrow=True, many=True)),
        "Cut one tensor into several along a dimension, into equal parts or into `sizes`.",
        r"split ^(.*)\.in_proj_(weight|bias)$ => \1.q.\2 \1.k.\2 \1.v.\2",
        "exact",
        scattered,
        _split,
        _split_refs,
        _unsplit,
        options=(
            _DIM,
            Param("sizes", "sizes", required=False, help="the size of each part, which add up to the whole"),
        ),
        family=_FAMILY,
    )
)
register(
    Operation(
        "concat",
        (Param("patterns", "pattern", many=True), _TEMPLATE),
        "Join several tensors along a dimension: those of which each pattern makes the same name.",
        r"concat ^(.*)\.q\.weight$ ^(.*)\.k\.weight$ ^(.*)\.v\.weight$ => \1.qkv.weight",
        "exact",
        gathered,
        _concat,
        _concat_ref,
        _unconcat,
        options=(_DIM,),
        family=_FAMILY,
    )
)
register(
    Operation(
        "stack",
        (Param("pattern", "numbered"), _TEMPLATE),
        "Put numbered tensors into one with a new dimension, in numeric order; {i} stands for the number.",
        r"stack ^(.*)\.experts\.{i}\.w1\.weight$ => \1.experts.w1",
        "exact",
        _numbered,
        _stack,
        _stack_ref,
        lambda args, specs: ("unstack", _same_options(args)),
        options=(_DIM, _START),
        family=_FAMILY,
    )
)
register(
    Operation(
        "unstack",
        (_PATTERN, _TEMPLATE),
        "Take a dimension apart into numbered tensors; {i} stands for the number.",
        r"unstack ^(.*)\.experts\.w1$ => \1.experts.{i}.w1.weight",
        "exact",
        _spread,
        _unstack,
        _unstack_refs,
        lambda args, specs: ("stack", _same_options(args)),
        options=(_DIM, _START),
        family=_FAMILY,
    )
)
register(
    Operation(
        "slice",
        (_PATTERN, Param("spec", "spec")),
        "Keep a range of each dimension, as tensor[…] does.",
        r"slice ^embed\.weight$ 0:30000",
        "lossy",
        matching,
        _slice,
        lambda args, refs, specs, names: (sliced(refs[0], _ranges(args, refs[0].spec)),),
        lambda args, specs: None,
        family=_FAMILY,
    )
)
register(
    Operation(
        "take",
        (_PATTERN, Param("indices", "indices")),
        "Take entries of a dimension in the order named: classes, tokens, channels; exact where none is left out.",
        r"take ^head\.(weight|bias)$ 0,5,7",
        "lossy",
        matching,
        _take,
        lambda args, refs, specs, names: (taken(refs[0], _dim(args, refs[0].shape), _indices(args, refs[0].spec)),),
        _untake,
        options=(_DIM,),
        family=_FAMILY,
    )
)

"""Operations on shape: the same elements, arranged otherwise.

On bytes in a file they are arithmetic on offsets and strides; nothing is read before the end.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ckptsurgeon.ops import _rearrange
from ckptsurgeon.ops._patterns import matching
from ckptsurgeon.ops._registry import Args, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import dim_of, dims_of, divisible
from ckptsurgeon.ops._views import permuted, reshaped
from ckptsurgeon.tensor import TensorRef, TensorSpec

_PATTERN = Param("pattern", "pattern")


def _squeezed(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    shape, wanted = spec.shape, args.get("dims")
    if wanted is None:
        dims = tuple(i for i, size in enumerate(shape) if size == 1)
        if not dims:
            raise OperationError(f"no dimension of {list(shape)} has size 1")
    else:
        dims = dims_of(wanted, len(shape), shape)
        thick = [dim for dim in dims if shape[dim] != 1]
        if thick:
            raise OperationError(f"dimension {thick[0]} of {list(shape)} has size {shape[thick[0]]}, not 1")
    return (TensorSpec(spec.dtype, tuple(size for i, size in enumerate(shape) if i not in dims)),)


def _unsqueezed(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    rank = len(spec.shape) + len(args["dims"])
    try:
        dims = dims_of(args["dims"], rank, (*spec.shape, *[1] * len(args["dims"])))
    except OperationError:
        raise OperationError(
            f"dimensions {list(args['dims'])} cannot be added to {list(spec.shape)}: the result has {rank}"
        ) from None
    left = iter(spec.shape)
    return (TensorSpec(spec.dtype, tuple(1 if i in dims else next(left) for i in range(rank))),)


def _reshape(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,) = specs
    wanted: tuple[int, ...] = args["shape"]
    known = prod(size for size in wanted if size >= 0)
    if -1 in wanted:
        if known == 0 or spec.numel % known:
            raise OperationError(f"{list(spec.shape)} has {spec.numel} elements, which {list(wanted)} cannot take")
        wanted = tuple(spec.numel // known if size == -1 else size for size in wanted)
    elif known != spec.numel:
        raise OperationError(f"{list(spec.shape)} has {spec.numel} elements, {list(wanted)} takes {known}")
    return (TensorSpec(spec.dtype, wanted),)


def _order(args: Args, spec: TensorSpec) -> tuple[int, ...]:
    rank = len(spec.shape)
    dims = dims_of(args["dims"], rank, spec.shape)
    if len(dims) != rank:
        raise OperationError(
            f"{list(spec.shape)} has {rank} dimensions, the order {list(args['dims'])} has {len(dims)}"
        )
    return dims


def _swap(args: Args, spec: TensorSpec) -> tuple[int, ...]:
    rank = len(spec.shape)
    pair = args.get("dims")
    if pair is None:
        if rank != 2:
            raise OperationError(f"{list(spec.shape)} has {rank} dimensions; transpose alone wants 2, so name the two")
        pair = (0, 1)
    first, second = (dim_of(dim, rank, spec.shape) for dim in pair)
    dims = list(range(rank))
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def _permuted(spec: TensorSpec, dims: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    if dims != tuple(range(len(dims))):
        divisible(spec)
    return (TensorSpec(spec.dtype, tuple(spec.shape[dim] for dim in dims)),)


def _reshape_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    return (reshaped(refs[0], specs[0].shape),)


def _unreshape(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    return "reshape", {"shape": specs[0].shape}


def _unsqueeze_again(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    shape = specs[0].shape
    dims = args.get("dims")
    if dims is None:
        gone = tuple(i for i, size in enumerate(shape) if size == 1)
    else:
        gone = tuple(sorted(dim % len(shape) for dim in dims))
    return "unsqueeze", {"dims": gone}


def _squeeze_again(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    rank = len(specs[0].shape) + len(args["dims"])
    return "squeeze", {"dims": tuple(sorted(dim % rank for dim in args["dims"]))}


def _unpermute(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    dims = _order(args, specs[0])
    return "permute", {"dims": tuple(sorted(range(len(dims)), key=dims.__getitem__))}


def _rearranged(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    shape = specs[0].shape
    divisible(specs[0])
    for kind, made in _rearrange.steps(args["rearrangement"], args["axes"], shape):
        shape = made if kind == "reshape" else tuple(shape[dim] for dim in made)
    return (TensorSpec(specs[0].dtype, shape),)


def _rearrange_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    (ref,) = refs
    for kind, made in _rearrange.steps(args["rearrangement"], args["axes"], ref.shape):
        ref = reshaped(ref, made) if kind == "reshape" else permuted(ref, made)
    return (ref,)


def _rearrange_back(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    pattern, axes = _rearrange.inverse(args["rearrangement"], args["axes"], specs[0].shape)
    return "rearrange", {"rearrangement": pattern, "axes": axes}


register(
    Operation(
        "squeeze",
        (_PATTERN, Param("dims", "dims", required=False)),
        "Remove dimensions of size 1: those named, or all.",
        r"squeeze ^conv1\.weight$ 2",
        "exact",
        matching,
        _squeezed,
        _reshape_ref,
        _unsqueeze_again,
        family="shape",
    )
)
register(
    Operation(
        "unsqueeze",
        (_PATTERN, Param("dims", "dims")),
        "Add dimensions of size 1, at their places in the result.",
        r"unsqueeze ^conv1\.weight$ 2",
        "exact",
        matching,
        _unsqueezed,
        _reshape_ref,
        _squeeze_again,
        family="shape",
    )
)
register(
    Operation(
        "reshape",
        (_PATTERN, Param("shape", "shape")),
        "Give the same elements another shape, as torch.reshape; one size may be -1.",
        r"reshape ^head\.weight$ 10,-1",
        "exact",
        matching,
        _reshape,
        _reshape_ref,
        _unreshape,
        family="shape",
    )
)
register(
    Operation(
        "permute",
        (_PATTERN, Param("dims", "dims")),
        "Put the dimensions into another order, as torch.permute.",
        r"permute conv.*\.weight$ 3,2,0,1",
        "exact",
        matching,
        lambda args, specs: _permuted(specs[0], _order(args, specs[0])),
        lambda args, refs, specs, names: (permuted(refs[0], _order(args, refs[0].spec)),),
        _unpermute,
        family="shape",
    )
)
register(
    Operation(
        "transpose",
        (_PATTERN, Param("dims", "pair", required=False)),
        "Swap two dimensions, as torch.transpose; alone it wants a tensor of two dimensions.",
        r"transpose \.c_attn\.weight$",
        "exact",
        matching,
        lambda args, specs: _permuted(specs[0], _swap(args, specs[0])),
        lambda args, refs, specs, names: (permuted(refs[0], _swap(args, refs[0].spec)),),
        lambda args, specs: ("transpose", {"dims": args.get("dims") or (0, 1)}),
        family="shape",
    )
)
register(
    Operation(
        "rearrange",
        (_PATTERN, Param("rearrangement", "einops")),
        "Any rearrangement that einops can say; sizes that it cannot know are given as options.",
        r"rearrange \.qkv\.weight$ '(h three d) c -> (three h d) c' h=12 three=3",
        "exact",
        matching,
        _rearranged,
        _rearrange_ref,
        _rearrange_back,
        axes=True,
        family="shape",
    )
)

"""Operations on names: the tensors stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.ops._patterns import expanded, found, literal, renamed
from ckptsurgeon.ops._registry import Args, Match, Names, Operation, OperationError, Param, register
from ckptsurgeon.ops._views import duplicated
from ckptsurgeon.tensor import TensorRef, TensorSpec

_PATTERN = Param("pattern", "pattern")
_ONLY = Param("pattern", "pattern", required=False)
_TEMPLATE = Param("template", "template", arrow=True)


def _same(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return specs


def _as_is(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    return refs


def _no_inverse(args: Args, specs: tuple[TensorSpec, ...]) -> None:
    return None


def _rename(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    for key, hit in found(args, names):
        new = renamed(hit, args["template"])
        if args.get("when") == "target":
            if target is None:
                raise OperationError("when=target needs a target: a model or checkpoint that the result must fit")
            if new not in target.entries:
                yield Match((key,), (key,), refused=f"{new!r} is no name of {target.label}")
                continue
        yield Match((key,), (new,))


def _drop(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    return (Match((key,), ()) for key, _ in found(args, names))


def _keep(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    kept = {key for key, _ in found(args, names)}
    if not kept:
        return iter(())
    return (Match((key,), (key,) if key in kept else ()) for key in names)


def _copies(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    pattern: re.Pattern[str] = args["pattern"]
    for key, _ in found(args, names):
        yield Match((key,), (expanded(pattern, args["template"], key, 1),), keep=True)


def _duplicate(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    return tuple(duplicated(ref, name) for ref, name in zip(refs, names, strict=True))


def _drop_again(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    return "drop", {}


def _expected(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    shape: tuple[int, ...] | None = args.get("shape")
    for key, _ in found(args, names):
        have = names[key].shape
        fits = shape is None or (
            len(shape) == len(have) and all(want in (-1, size) for want, size in zip(shape, have, strict=True))
        )
        words = None if fits or shape is None else f"{key!r} is {list(have)}, and {fitting(shape)} is expected"
        yield Match((key,), (key,), problem=words)


def _refused(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    for key, _ in found(args, names):
        yield Match((key,), (key,), problem=f"{key!r} is there, and must not be")


def fitting(shape: tuple[int, ...]) -> str:
    """A shape in which -1 stands for any size, in words."""
    return f"[{', '.join('any' if size == -1 else str(size) for size in shape)}]"


def _unstrip(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    return "prefix", {"prefix": args["prefix"]}


def _unprefix(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[str, dict[str, Any]]:
    return "strip", {"prefix": args["prefix"]}


register(
    Operation(
        "rename",
        (_PATTERN, _TEMPLATE),
        "Rename every key that matches, as re.sub does on the key.",
        r"^layers\.(\d+)\. => blocks.\1.",
        "names",
        _rename,
        _same,
        _as_is,
        _no_inverse,
        as_is=True,
        options=(Param("when", "choice", required=False, choices=("target",)),),
    )
)
register(
    Operation(
        "strip",
        (Param("prefix", "prefix"),),
        "Remove a literal prefix from the keys that have it.",
        "strip module.",
        "names",
        literal(lambda key, prefix: key[len(prefix) :] if key.startswith(prefix) and key != prefix else None),
        _same,
        _as_is,
        _unstrip,
        as_is=True,
        when_unused="no key begins with this prefix",
    )
)
register(
    Operation(
        "prefix",
        (Param("prefix", "prefix"), _ONLY),
        "Put a literal prefix before every key, or before those that match.",
        "prefix backbone.",
        "names",
        literal(lambda key, prefix: prefix + key),
        _same,
        _as_is,
        _unprefix,
        as_is=True,
    )
)
register(
    Operation(
        "drop",
        (_PATTERN,),
        "Remove the keys that match.",
        r"drop ^fc\.",
        "lossy",
        _drop,
        _same,
        _as_is,
        _no_inverse,
        as_is=True,
    )
)
register(
    Operation(
        "keep",
        (_PATTERN,),
        "Remove the keys that do not match.",
        r"keep ^encoder\.",
        "lossy",
        _keep,
        _same,
        _as_is,
        _no_inverse,
        as_is=True,
        needed=True,  # else all would stay
    )
)
register(
    Operation(
        "copy",
        (_PATTERN, _TEMPLATE),
        "Write the tensor a second time, under a second name.",
        r"copy ^q\.(weight|bias)$ => k.\1",
        "names",
        _copies,
        _same,
        _duplicate,
        _drop_again,
    )
)
register(
    Operation(
        "tie",
        (_PATTERN, _TEMPLATE),
        "Give the tensor a second name that shares its storage.",
        r"tie ^embed\.weight$ => head.weight",
        "names",
        _copies,
        _same,
        _as_is,
        _drop_again,
        as_is=True,
    )
)
register(
    Operation(
        "expect",
        (_PATTERN, Param("shape", "dims", required=False)),
        "Go on only where a key matches, and every one that does has this shape (-1: any size).",
        r"expect ^conv1\.weight$ -1,3,7,7",
        "names",
        _expected,
        _same,
        _as_is,
        _no_inverse,
        as_is=True,
        guards=True,
        needed=True,
        when_unused="the checkpoint has no such key",
    )
)
register(
    Operation(
        "refuse",
        (_PATTERN,),
        "Go on only where no key matches.",
        r"refuse lora_",
        "names",
        _refused,
        _same,
        _as_is,
        _no_inverse,
        as_is=True,
        guards=True,
        needed=True,
        when_unused="",
    )
)

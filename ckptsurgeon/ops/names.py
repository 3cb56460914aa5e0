"""Operations on names: the tensors stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.ops._patterns import expanded, literal
from ckptsurgeon.ops._registry import Args, Match, Operation, OperationError, Param, register
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


def _rename(args: Args, keys: Sequence[str], target: Target | None) -> Iterator[Match]:
    pattern: re.Pattern[str] = args["pattern"]
    for key in keys:
        if not pattern.search(key):
            continue
        new = expanded(pattern, args["template"], key, 0)
        if args.get("when") == "target":
            if target is None:
                raise OperationError("when=target needs a target: a model or checkpoint that the result must fit")
            if new not in target.entries:
                yield Match((key,), (key,), refused=f"{new!r} is no name of {target.label}")
                continue
        yield Match((key,), (new,))


def _drop(args: Args, keys: Sequence[str], target: Target | None) -> Iterator[Match]:
    pattern: re.Pattern[str] = args["pattern"]
    return (Match((key,), ()) for key in keys if pattern.search(key))


def _keep(args: Args, keys: Sequence[str], target: Target | None) -> Iterator[Match]:
    pattern: re.Pattern[str] = args["pattern"]
    kept = {key for key in keys if pattern.search(key)}
    if not kept:
        return iter(())
    return (Match((key,), (key,) if key in kept else ()) for key in keys)


def _copies(args: Args, keys: Sequence[str], target: Target | None) -> Iterator[Match]:
    pattern: re.Pattern[str] = args["pattern"]
    for key in keys:
        if pattern.search(key):
            yield Match((key,), (expanded(pattern, args["template"], key, 1),), keep=True)


def _duplicate(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    return tuple(duplicated(ref, name) for ref, name in zip(refs, names, strict=True))


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
        _no_inverse,
    )
)

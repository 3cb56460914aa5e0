"""einops' rearrangements as the reshapes and permutations that they consist of, found by einops on a shape alone.

einops works on any tensor for which somebody says how it is reshaped and transposed.  Ours is a shape that writes
down what is asked of it; the steps are then done on sources, where nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from ckptsurgeon.ops._registry import OperationError

Step = tuple[str, tuple[int, ...]]
"""`reshape` and a shape, or `permute` and an order."""
_TOKEN = re.compile(r"[A-Za-z_]\w*|\.\.\.|…|\d+")


@dataclass(frozen=True)
class Traced:
    """A shape, and the steps that led to it."""

    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()


def steps(pattern: str, axes: Mapping[str, int], shape: tuple[int, ...]) -> tuple[Step, ...]:
    """The steps of a rearrangement of a tensor of `shape`; OperationError when it has none."""
    import einops

    _teach_einops()
    for name, size in axes.items():
        if size < 1:
            raise OperationError(f"the axis {name}={size} has no such size", name)
    try:
        made: Traced = einops.rearrange(Traced(shape), pattern, **axes)
    except (einops.EinopsError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise OperationError(f"einops on {list(shape)}: {reason}", "rearrangement") from None
    return made.steps


@cache
def _teach_einops() -> type:
    """Tell einops of our shapes; it finds those who do among the classes that live, so this one is kept alive."""
    from einops._backends import AbstractBackend

    class _Shapes(AbstractBackend):
        framework_name = __name__

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, Traced)

        def shape(self, x: Traced) -> tuple[int, ...]:
            return x.shape

        def reshape(self, x: Traced, shape: Any) -> Traced:
            wanted = tuple(int(size) for size in shape)
            return Traced(wanted, (*x.steps, ("reshape", wanted)))

        def transpose(self, x: Traced, axes: Any) -> Traced:
            order = tuple(int(axis) for axis in axes)
            return Traced(tuple(x.shape[axis] for axis in order), (*x.steps, ("permute", order)))

    return _Shapes


def inverse(pattern: str, axes: Mapping[str, int], shape: tuple[int, ...]) -> tuple[str, dict[str, int]]:
    """The pattern and the axes that take a rearrangement of a tensor of `shape` back."""
    left, right = pattern.split("->")
    named = [token for token in _TOKEN.findall(left) if not token.isdecimal()]
    first = next((made for kind, made in steps(pattern, axes, shape) if kind == "reshape"), None)
    sizes = list(first if first is not None and prod(first) == prod(shape) and "(" in left else _thick(left, shape))
    rest = len(sizes) - sum(token not in ("...", "…") for token in named)
    known: dict[str, int] = {}
    for token in named:
        if token in ("...", "…"):
            del sizes[:rest]
        else:
            known[token] = sizes.pop(0)
    return f"{right.strip()} -> {left.strip()}", known


def _thick(left: str, shape: tuple[int, ...]) -> list[int]:
    """The sizes of the axes that have names: a bare 1 has none."""
    tokens = _TOKEN.findall(left)
    rest = len(shape) - sum(token not in ("...", "…") for token in tokens)
    sizes: list[int] = []
    at = 0
    for token in tokens:
        count = rest if token in ("...", "…") else 1
        sizes += [] if token.isdecimal() else shape[at : at + count]
        at += count
    return sizes

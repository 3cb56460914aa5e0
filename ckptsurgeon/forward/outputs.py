"""What two forwards gave, output by output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from ckptsurgeon.forward.report import OutputCheck

if TYPE_CHECKING:
    import torch

Outputs = dict[str, "torch.Tensor"]
_MAIN = ("logits", "last_hidden_state")


class DifferentError(Exception):
    """Outputs that cannot be held against each other."""


def flat(made: Any) -> Outputs:
    """The tensors of what a forward gave, by where they are in it."""
    return dict(_flat(made, ""))


def _flat(made: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(made, torch.Tensor):
        yield path or "output", made.detach()
    elif isinstance(made, Mapping):
        for key, value in made.items():
            yield from _flat(value, f"{path}.{key}".lstrip("."))
    elif isinstance(made, tuple | list):
        names = getattr(made, "_fields", range(len(made)))
        for name, value in zip(names, made, strict=True):
            yield from _flat(value, f"{path}.{name}".lstrip("."))
    elif is_dataclass(made) and not isinstance(made, type):
        for name, value in made.__dict__.items():
            yield from _flat(value, f"{path}.{name}".lstrip("."))


def paired(source: Outputs, target: Outputs) -> list[tuple[str, str]]:
    """Which output goes with which: by name where the names are the same, else in order; only the main ones of a
    model that has more.  DifferentError where their numbers differ all the same."""
    if len(source) != len(target):
        source, target = (_main(one) for one in (source, target))
    if not source or not target or len(source) != len(target):
        raise DifferentError(f"not comparable: the outputs are {_named(source)} and {_named(target)}")
    if set(source) == set(target):
        return [(name, name) for name in source]
    return list(zip(source, target, strict=True))


def _main(some: Outputs) -> Outputs:
    """The logits of a transformers output, or its last hidden state; all outputs where it has neither."""
    name = next((name for name in _MAIN if name in some), None)
    return some if name is None else {name: some[name]}


def _named(some: Outputs) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in list(some.items())[:4]) or "none"


def compared(source: Outputs, target: Outputs) -> tuple[OutputCheck, ...]:
    """The error of every pair of outputs; DifferentError where shapes differ, or numbers are not finite."""
    made = []
    pairs = paired(source, target)
    for here, there in pairs:
        a, b = target[there], source[here]
        if a.shape != b.shape:
            raise DifferentError(f"not comparable: {here} is {list(b.shape)}, and {there} is {list(a.shape)}")
        made.append(OutputCheck(here, there, tuple(b.shape), _error(a, b, here)))
    if all(_says_nothing(source[here]) for here, _ in pairs):
        raise DifferentError(
            "not comparable: every output of the source model is one number everywhere, which tells nothing"
        )
    return tuple(made)


def distance(source: Outputs, target: Outputs) -> float:
    """How far all outputs are from each other, in the mean: smoother than the largest error."""
    total = 0.0
    for here, there in paired(source, target):
        a, b = target[there].double(), source[here].double()
        total += float((a - b).norm() / b.norm().clamp_min(1e-300))
    return total


def _error(a: torch.Tensor, b: torch.Tensor, name: str) -> float:
    import torch

    if not a.numel():
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise DifferentError(f"not comparable: {name} has numbers that are not finite")
    off, scale = float((a - b).abs().max()), float(b.abs().max())
    return off / scale if scale else (0.0 if not off else float("inf"))


def _says_nothing(value: torch.Tensor) -> bool:
    """Whether an output does not depend on anything, as that of a head that begins with zeros."""
    return not value.numel() or (value.numel() > 1 and bool((value == value.flatten()[0]).all()))

"""What both models are given: inputs of the caller, or random ones of shapes that the models may take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import TargetError, UsageError
from ckptsurgeon.forward import shapes
from ckptsurgeon.forward.shapes import Made, Random

if TYPE_CHECKING:
    from ckptsurgeon.forward.subjects import Subject

_WORD = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:[x,]\d+)*)(?::(?P<below>\d+))?")
_MOST = 1 << 28
"""Elements of one input."""


@dataclass(frozen=True)
class Inputs:
    """Values by name, in order, and how they were made."""

    values: Mapping[str, Any]
    how: str


def described(words: Iterable[str]) -> Inputs:
    """Random inputs from words: `2x3x64x64`, `2x16:1000` for whole numbers below 1000, each with `NAME=` before it
    where the forward is to get it by name.

    >>> described(["ids=2x4:10"]).values["ids"].shape
    torch.Size([2, 4])
    """
    made: dict[str, Random] = {}
    for word in words:
        found = _WORD.fullmatch(word.replace(" ", ""))
        if found is None:
            raise UsageError(
                f"--input {word}: write a shape, as 2x3x224x224, or 2x16:1000 for whole numbers below 1000"
            )
        name = found["name"] or str(len(made))
        sizes = tuple(map(int, re.split("[x,]", found["shape"])))
        one = Random(sizes, None if found["below"] is None else int(found["below"]))
        if name in made or not 0 < one.numel <= _MOST or one.below == 0:
            raise UsageError(f"--input {word}: a name stands twice, or there is nothing (or too much) of this shape")
        made[name] = one
    return _drawn(Made(made, "as given: " + ", ".join(map(str, made.values()))))


def run(source: Subject, target: Subject, given: Any) -> tuple[Inputs, Any, Any]:
    """The inputs, and what each model makes of them: those that were given, else the first of which both make
    something."""
    if given is not None:
        told = _given(given)
        return told, source.run(told), target.run(told)
    failed: TargetError | None = None
    for made in shapes.candidates(source.module, target.module):
        told = _drawn(made)
        try:
            return told, source.run(told), target.run(told)
        except TargetError as error:
            failed = failed or error
    if failed is not None:
        raise TargetError(f"{failed}; if other inputs are meant, give them (inputs=…, --input SHAPE)") from failed
    raise UsageError(
        f"{source.label} and {target.label}: nothing in them says what inputs they take; "
        "give some (inputs=…, --input SHAPE)"
    )


def _given(given: Any) -> Inputs:
    import torch

    if isinstance(given, Inputs):
        return given
    if isinstance(given, torch.Tensor):
        values: dict[str, Any] = {"0": given}
    elif isinstance(given, Mapping):
        values = {str(name): value for name, value in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        values = {str(at): value for at, value in enumerate(given)}
    else:
        raise UsageError(f"inputs are a tensor, several, or a mapping by name, not {type(given).__name__}")
    if not values:
        raise UsageError("inputs are empty: give a tensor, several, or a mapping by name")
    return Inputs(values, "as given: " + ", ".join(_shown(value) for value in values.values()))


def _shown(value: Any) -> str:
    import torch

    return (
        f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
        if isinstance(value, torch.Tensor)
        else type(value).__name__
    )


def _drawn(made: Made) -> Inputs:
    """Values from one seed."""
    import torch

    chance = torch.Generator().manual_seed(0)
    return Inputs(dict(_values(made.values, chance)), made.how)


def _values(wanted: Mapping[str, Random], chance: Any) -> Iterator[tuple[str, Any]]:
    import torch

    for name, one in wanted.items():
        if one.value is not None:
            yield name, one.value
        elif one.below is None:
            yield name, torch.randn(one.shape, generator=chance)
        else:
            low = min(_SPECIAL, one.below - 1) if one.below > 4 * _SPECIAL else 0
            yield name, torch.randint(low, one.below, one.shape, generator=chance)


_SPECIAL = 4
"""Ids that tokenizers give to padding, beginnings and ends, which some models treat by themselves."""

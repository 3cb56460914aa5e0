"""What a run of two models on the same inputs came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ckptsurgeon.errors import shown

_NAMED = 3
"""Keys that a line names before it counts the rest."""


@dataclass(frozen=True)
class OutputCheck:
    """One output of both models: its name on each side, its shape, and max|a - b| / max|b|, where b is what the source
    model gives."""

    source: str
    target: str
    shape: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class ForwardCheck:
    """Whether two models compute the same, each with its checkpoint.

    `same` is true where every output is equal within `tolerance`; `reason` says why it is not.  `outputs` are what was
    compared, in `dtype`: float64 where float32 alone was over the tolerance.  `inputs` says what the models were given.
    `not_loaded` are the keys of each model (`source`, `target`) that its checkpoint did not bring, `not_used` those of
    the source's checkpoint that its model does not have.
    """

    same: bool
    outputs: tuple[OutputCheck, ...]
    dtype: str
    tolerance: float
    inputs: str
    reason: str = ""
    not_loaded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    not_used: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest error of all outputs; infinite where they cannot be compared."""
        return max((one.error for one in self.outputs), default=float("inf")) if self.comparable else float("inf")

    @property
    def errors(self) -> dict[str, float]:
        """The error of every output, by its name in the source model."""
        return {one.source: one.error for one in self.outputs}

    @property
    def comparable(self) -> bool:
        """Whether both models gave outputs that could be held against each other."""
        return bool(self.outputs)

    def __str__(self) -> str:
        return "\n".join(map(shown, self._lines()))

    def _lines(self) -> Iterator[str]:
        yield "the same outputs" if self.same else f"not the same: {self.reason}"
        for one in self.outputs:
            name = one.source if one.source == one.target else f"{one.source} and {one.target}"
            yield f"  {name} {list(one.shape)}: relative error {one.error:.2g} in {self.dtype}"
        yield f"  inputs: {self.inputs}"
        for side, keys in self.not_loaded.items():
            if keys:
                yield f"  not from the checkpoint in the {side} model: {_some(keys)}"
        if self.not_used:
            yield f"  of the source's checkpoint not in its model: {_some(self.not_used)}"
        for note in self.notes:
            yield f"  {note}"


def _some(keys: tuple[str, ...]) -> str:
    more = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more

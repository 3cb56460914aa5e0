"""The bench: the target model, into which one assignment after another is put, and the error of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptsurgeon.aligner import Opening, Verdict
from ckptsurgeon.forward import outputs
from ckptsurgeon.forward.outputs import DifferentError, Outputs
from ckptsurgeon.forward.subjects import Subject
from ckptsurgeon.tensor import TensorRef

if TYPE_CHECKING:
    from ckptsurgeon.forward.inputs import Inputs

State = tuple[Verdict, ...]
"""A decision about every opening."""
Piece = tuple[Opening, int, int, int]
"""An opening, one of its targets, the source that it takes, and which way that lies."""
Pieces = dict[Piece, Mapping[str, TensorRef]]


class Bench:
    """Errors of assignments, each found once."""

    def __init__(self, target: Subject, told: Inputs, reference: Outputs, pieces: Pieces) -> None:
        self.target, self.told, self.reference, self.pieces = target, told, reference, pieces
        self.errors: dict[State, float] = {}
        self.distances: dict[State, float] = {}
        self._there: set[Piece] = set()

    def error(self, state: State) -> float:
        """The largest relative error of the outputs; infinite where they cannot be compared."""
        if state not in self.errors:
            self._put(state)
            try:
                given = outputs.flat(self.target.run(self.told))
                found = outputs.compared(self.reference, given)
                self.errors[state] = max(one.error for one in found)
                self.distances[state] = outputs.distance(self.reference, given)
            except DifferentError:
                self.errors[state] = self.distances[state] = float("inf")
        return self.errors[state]

    def distance(self, state: State) -> float:
        """How far the outputs are off in the mean, which leads downhill better than the largest error."""
        self.error(state)
        return self.distances[state]

    def _put(self, state: State) -> None:
        """The tensors of an assignment, in the place of those that were there."""
        import torch

        wanted = set(pieces_of(state))
        live = self.target.module.state_dict(keep_vars=True)
        with torch.no_grad():
            for piece in wanted - self._there:
                for key, ref in self.pieces[piece].items():
                    if key in live:
                        live[key].copy_(ref.read())
        self._there = wanted


def pieces_of(state: State) -> list[Piece]:
    """What an assignment is made of."""
    return [
        (one.opening, at, place, way)
        for one in state
        for at, (place, way) in enumerate(zip(one.places, one.turns, strict=True))
    ]

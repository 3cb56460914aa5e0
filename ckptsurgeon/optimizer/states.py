"""One parameter's state in an optimizer: what its entries are, and what a surgery makes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import copysign
from typing import Any

from ckptsurgeon.dtypes import DTYPES
from ckptsurgeon.ops import Initial, making
from ckptsurgeon.ops._views import duplicated
from ckptsurgeon.optimizer.leaves import leaf_of
from ckptsurgeon.optimizer.moments import DEGREES, MAGNITUDES, WEIGHTS, Follower, Inexact, shifts
from ckptsurgeon.optimizer.positions import Shape
from ckptsurgeon.sources import Inline
from ckptsurgeon.tensor import TensorRef, TensorSpec

State = Mapping[str, Any]
_FACTORS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))
"""The two factors of a second moment, in torch's Adafactor and in that of transformers."""
_FACTORED = frozenset(name for pair in _FACTORS for name in pair)
_OF_VECTORS = frozenset(("variance", "RMS"))
"""Entries that tell an Adafactor which did not factor, since its parameter was a vector."""
_EIGHT_BIT = ("state1", "state2", "absmax1", "qmap1")
_WHOLE = frozenset(("func_evals", "n_iter", "old_dirs", "old_stps", "prev_flat_grad"))
"""Entries of LBFGS, whose one state is about all parameters together."""


def is_whole(state: State) -> bool:
    """Whether a state is about all parameters together, laid end to end."""
    return not _WHOLE.isdisjoint(state)


def shape_of(state: State) -> Shape | None:
    """The shape of the parameter that a state is about, as its moments tell; None where there are none."""
    tensors = {name: value for name, value in state.items() if isinstance(value, TensorRef)}
    for name in (*DEGREES, *WEIGHTS, "variance", *_EIGHT_BIT[:2]):
        if name in tensors:
            return tensors[name].shape
    for row, column in _FACTORS:
        if row in tensors and column in tensors:
            rows, columns = tensors[row].shape, tensors[column].shape
            return (*(rows[:-1] if row == "row_var" else rows), columns[-1]) if rows and columns else None
    shapes = {ref.shape for ref in tensors.values() if ref.shape}
    return next(iter(shapes)) if len(shapes) == 1 else None


@dataclass
class States:
    """The states of an optimizer by keys of the source, and what becomes of them.

    `options` are the hyperparameters of the group of each.  What was `used` once is copied when it is used again:
    torch counts steps in place.
    """

    of: Mapping[str, State]
    options: Mapping[str, Mapping[str, Any]]
    used: set[Hashable] = field(default_factory=set)

    def follow(self, key: str, formula: TensorRef, keys: Sequence[str]) -> dict[str, Any]:
        """The state of a parameter of the result, made of those of `keys`; Inexact where nothing exact is."""
        leaf = leaf_of(formula)
        if leaf is not None:
            return {name: self._once(value, key) for name, value in self.of[leaf].items()}
        names = self._names(keys)
        if any(name in _EIGHT_BIT for name in names):
            raise Inexact("its state is of 8 bits, which no change of shape or value keeps")
        if any(name in _FACTORED for name in names) or (_OF_VECTORS & set(names) and len(formula.shape) > 1):
            raise Inexact("its state is factored, which no change of shape or value keeps")
        return {name: self._entry(name, key, formula, keys, names) for name in names}

    def _names(self, keys: Sequence[str]) -> list[str]:
        names = list(self.of[keys[0]])
        for key in keys[1:]:
            if set(self.of[key]) != set(names):
                raise Inexact(f"{keys[0]!r} and {key!r}, of which it is made, have different entries")
        return names

    def _entry(self, name: str, key: str, formula: TensorRef, keys: Sequence[str], names: list[str]) -> Any:
        values = [self.of[one][name] for one in keys]
        if not self._is_moment(name, keys, values):
            if len({_comparable(value) for value in values}) > 1:
                raise Inexact(f"{name!r} differs among {', '.join(map(repr, keys[:3]))}, of which it is made")
            return self._once(values[0], key)
        if name in WEIGHTS:
            return self._weight(name, formula)
        if name not in DEGREES and shifts(formula):
            raise Inexact(f"the weight is shifted or bounded, and what {name!r} is, is not known")
        factor = self._factor(name, names, keys[0])
        follower = Follower(lambda leaf: self._moment(leaf, name), factor=factor, fresh=self._fresh(keys[0], names))
        return follower.follow(formula)

    def _factor(self, name: str, names: Sequence[str], key: str) -> Callable[[float], float] | None:
        """By what an entry is multiplied where its weight is multiplied by a number; None where it is not known."""
        if name not in DEGREES:
            return None
        options = self.options[key]

        def factor(slope: float) -> float:
            if options.get("weight_decay") and not options.get("decoupled_weight_decay"):
                raise Inexact("the weight is multiplied, and its decay is a part of the gradient that was gathered")
            if options.get("initial_accumulator_value"):
                raise Inexact("the weight is multiplied, and what was gathered began with a number of its own")
            if name == "momentum_buffer" and "square_avg" in names:  # RMSprop divides by the root before it adds up
                return copysign(1.0, slope)
            return float((abs(slope) if name in MAGNITUDES else slope) ** -DEGREES[name])

        return factor

    def _is_moment(self, name: str, keys: Sequence[str], values: list[Any]) -> bool:
        """Whether an entry has the parameter's shape; Inexact where it has some other."""
        if not all(isinstance(value, TensorRef) for value in values):
            if any(isinstance(value, TensorRef | dict | list | tuple) for value in values):
                raise Inexact(f"{name!r} is no tensor of the parameter's shape")
            return False
        shapes = [shape_of(self.of[key]) for key in keys]
        known = name in DEGREES or name in WEIGHTS
        alike = all(value.shape == shape for value, shape in zip(values, shapes, strict=True))
        if alike and (known or values[0].shape):
            if any(value.dtype.kind not in ("float", "complex") or value.dtype.bits < 16 for value in values):
                raise Inexact(f"{name!r} is of {values[0].dtype}, which no change of shape or value keeps")
            return True
        if all(value.numel <= 1 for value in values) and not known:
            return False
        raise Inexact(f"{name!r} has not the parameter's shape")

    def _moment(self, leaf: str, name: str) -> TensorRef:
        found = self.of[leaf][name]
        assert isinstance(found, TensorRef)
        return found

    def _weight(self, name: str, formula: TensorRef) -> TensorRef:
        return Follower(lambda leaf: self._moment(leaf, name), values=True).follow(formula)

    def _fresh(self, key: str, names: Sequence[str]) -> float | None:
        """What new elements of a moment begin with, where an optimizer counts no steps for its moments."""
        options, there = self.options[key], set(names)
        if "momentum_buffer" in there and there <= {"momentum_buffer"}:
            return 0.0 if not options.get("dampening") else None
        if "step" not in there:
            return None
        if there <= {"step", "square_avg", "momentum_buffer", "grad_avg"} or there == {
            "step",
            "square_avg",
            "acc_delta",
        }:
            return 0.0
        if there == {"step", "sum"} and not options.get("lr_decay"):
            return _number(options.get("initial_accumulator_value", 0.0))
        return None

    def _once(self, value: Any, key: str) -> Any:
        """A value that is written once: two parameters must not count in one tensor."""
        if not isinstance(value, TensorRef):
            return value
        tie = value.tie
        if tie is None:
            return value
        if tie in self.used:
            return duplicated(value, key)
        self.used.add(tie)
        return value


def fresh(options: Mapping[str, Any], key: str, spec: TensorSpec) -> dict[str, Any]:
    """The state that a parameter must begin with; {} where the optimizer makes it itself, as all of torch's do but
    Adagrad, which makes it with the optimizer and not with the first step."""
    if "initial_accumulator_value" not in options or "lr_decay" not in options:
        return {}
    step = TensorRef(TensorSpec(DTYPES["float32"], ()), Inline(bytes(4)))
    begin = _number(options["initial_accumulator_value"])
    if begin is None:
        return {}
    return {"step": step, "sum": making.filled(spec, Initial("constant", (begin,)), key, 0)}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _comparable(value: Any) -> Any:
    if isinstance(value, TensorRef):
        return value.spec, b"".join(bytes(block) for block in value.blocks())
    if value is not None and not isinstance(value, bool | int | float | complex | str | bytes):
        raise Inexact(f"it has a {type(value).__name__} in its state, and several of them cannot be joined")
    return type(value).__name__, value

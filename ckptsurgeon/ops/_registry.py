"""What an operation is, and the table that all of them join.

An operation is declared by one `register(Operation(...))`.  An incomplete or doubled entry refuses
to import.  The grammar, the help, `docs/rules.md` and the law tests are made from the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.tensor import TensorRef, TensorSpec

Kind = Literal["pattern", "template", "prefix", "dims", "pair", "shape", "dtype", "choice"]
Exactness = Literal["exact", "lossy", "names"]
Args = Mapping[str, Any]


class OperationError(Exception):
    """A short cause why an operation cannot be done on what it was given."""


@dataclass(frozen=True)
class Param:
    """One word of an operation's grammar: its name, what it is, and whether it may be left out.

    `arrow` parameters stand behind `=>`. `choices` are the values of a `choice`.
    """

    name: str
    kind: Kind
    required: bool = True
    arrow: bool = False
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        word = self.name.upper()
        return word if self.required else f"[{word}]"


@dataclass(frozen=True, slots=True)
class Match:
    """The names that one application of an operation takes and makes.

    `keep` leaves the inputs where they are; `refused` is why a match was not applied.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keep: bool = False
    refused: str | None = None


Matcher = Callable[[Args, Sequence[str], Target | None], Iterable[Match]]
ShapeRule = Callable[[Args, tuple[TensorSpec, ...]], tuple[TensorSpec, ...]]
Build = Callable[[Args, tuple[TensorRef, ...], tuple[TensorSpec, ...], tuple[str, ...]], tuple[TensorRef, ...]]
Inverse = Callable[[Args, tuple[TensorSpec, ...]], "tuple[str, dict[str, Any]] | None"]


@dataclass(frozen=True)
class Operation:
    """One operation.

    `match` decides on names, `shape` on specs (both pure); `build` makes the output refs, by
    arithmetic on sources where it can and with a kernel where values change.  `inverse` gives the
    operation that takes it back, from the arguments and the input specs, or None.  `exactness`
    is `names` when values and shapes stay, `exact` when nothing is lost, else `lossy`.
    """

    name: str
    params: tuple[Param, ...]
    help: str
    example: str
    exactness: Exactness
    match: Matcher
    shape: ShapeRule
    build: Build
    inverse: Inverse
    options: tuple[Param, ...] = ()
    when_unused: str = field(default="the pattern matches no key", compare=False)

    def usage(self) -> str:
        """The grammar in one line, as the help shows it."""
        words = [str(param) for param in self.params if not param.arrow]
        arrows = [str(param) for param in self.params if param.arrow]
        options = [f"[{option.name}={'|'.join(option.choices) or option.kind.upper()}]" for option in self.options]
        name = [] if self.name == "rename" else [self.name]
        return " ".join([*name, *words, *(["=>", *arrows] if arrows else []), *options])


_TABLE: dict[str, Operation] = {}
OPERATIONS: Mapping[str, Operation] = MappingProxyType(_TABLE)
"""Every operation by name, in the order of the documentation."""


def register(operation: Operation) -> Operation:
    """Add an operation; ValueError when the entry is incomplete or its name is taken."""
    if operation.name in _TABLE:
        raise ValueError(f"the operation {operation.name!r} is registered twice")
    if not operation.help.endswith(".") or not operation.example.strip() or not operation.params:
        raise ValueError(f"the operation {operation.name!r} lacks its help sentence, its example or its parameters")
    needed = [param.required for param in operation.params]
    if needed != sorted(needed, reverse=True):
        raise ValueError(f"the operation {operation.name!r} has an optional word before a required one")
    _TABLE[operation.name] = operation
    return operation

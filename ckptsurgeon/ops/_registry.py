"""What an operation is, and the table that all of them join.

An operation is declared by one `register(Operation(...))`.  An incomplete or doubled entry refuses
to import.  The grammar, the help, `docs/rules.md` and the law tests are made from the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.tensor import TensorRef, TensorSpec

Kind = Literal[
    "pattern", "numbered", "template", "prefix", "key", "dims", "pair", "shape", "sizes", "spec", "pads", "indices",
    "dtype", "choice", "int", "number", "numbers", "einops", "init", "expression",
]  # fmt: skip
Exactness = Literal["exact", "rounded", "lossy", "initialisation", "names"]
Args = Mapping[str, Any]
Names = Mapping[str, TensorRef]
"""The tensors as they are called when a rule begins."""


class OperationError(Exception):
    """A short cause why an operation cannot be done on what it was given; `argument` is the one at fault."""

    def __init__(self, text: str, argument: str | None = None) -> None:
        self.argument = argument
        super().__init__(text)


@dataclass(frozen=True)
class Param:
    """One word of an operation's grammar: its name, what it is, and whether it may be left out.

    `arrow` parameters stand behind `=>`; of `many` there are one or more words, and their argument is a tuple.
    `choices` are the values of a `choice`, `help` says more of an option than its name does.
    """

    name: str
    kind: Kind
    required: bool = True
    arrow: bool = False
    choices: tuple[str, ...] = ()
    many: bool = False
    help: str = ""

    def __str__(self) -> str:
        word = self.name.upper()
        if self.many:
            word = f"{word.removesuffix('S')}1 {word.removesuffix('S')}2 …"
        return word if self.required else f"[{word}]"


@dataclass(frozen=True, slots=True)
class Match:
    """The names that one application of an operation takes and makes.

    `keep` leaves the inputs where they are; `refused` is why a match was not applied, `problem` why it cannot be.
    `args` are what the names alone tell, as which of the inputs is what: they join the rule's for shape and build.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keep: bool = False
    refused: str | None = None
    problem: str | None = None
    args: Args | None = None


Matcher = Callable[[Args, Names, Target | None], Iterable[Match]]
ShapeRule = Callable[[Args, tuple[TensorSpec, ...]], tuple[TensorSpec, ...]]
Build = Callable[[Args, tuple[TensorRef, ...], tuple[TensorSpec, ...], tuple[str, ...]], tuple[TensorRef, ...]]
Inverse = Callable[[Args, tuple[TensorSpec, ...]], "tuple[str, dict[str, Any]] | None"]

WHERE = Param("where", "expression", required=False, help="only keys of which this is so")
OPTIONAL = Param("optional", "choice", required=False, choices=("yes",), help="the rule may match nothing")


@dataclass(frozen=True)
class Operation:
    """One operation.

    `match` decides on names, `shape` on specs (both pure); `build` makes the output refs, by
    arithmetic on sources where it can and with a kernel where values change.  `inverse` gives the
    operation that takes it back, from the arguments and the input specs, or None; patterns and templates
    of it are the names that were made and taken.  `exactness` is `names` when values and shapes stay,
    `exact` when nothing is lost, `rounded` when the inverse gives the values back but for rounding,
    `initialisation` when values are made anew, else `lossy`.  With `axes` any `name=number` is an option.
    `family` is the heading that it stands under in the documentation.  One that `guards` changes nothing: where it
    does not hold, nothing more is done.  One that is `needed` must match something whatever is tolerated, one with
    an empty `when_unused` need not.  What it makes `as_is` are the very tensors that it takes.
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
    axes: bool = False
    family: str = "names"
    guards: bool = False
    needed: bool = False
    as_is: bool = False
    when_unused: str = field(default="the pattern matches no key", compare=False)

    def usage(self) -> str:
        """The grammar in one line, as the help shows it."""
        words = [str(param) for param in self.params if not param.arrow]
        arrows = [str(param) for param in self.params if param.arrow]
        shown = [option for option in self.options if option not in (WHERE, OPTIONAL)]
        options = [f"[{option.name}={'|'.join(option.choices) or option.kind.upper()}]" for option in shown]
        options += ["[axis=INT …]"] if self.axes else []
        name = [] if self.name == "rename" else [self.name]
        return " ".join([*name, *words, *(["=>", *arrows] if arrows else []), *options])


_TABLE: dict[str, Operation] = {}
OPERATIONS: Mapping[str, Operation] = MappingProxyType(_TABLE)
"""Every operation by name, in the order of the documentation."""


def register(operation: Operation) -> Operation:
    """Add an operation; ValueError when the entry is incomplete or its name is taken.

    Every operation on the keys of one pattern has the option `where`, and all but those that are needed `optional`.
    """
    if operation.name in _TABLE:
        raise ValueError(f"the operation {operation.name!r} is registered twice")
    if not operation.help.endswith(".") or not operation.example.strip() or not operation.params:
        raise ValueError(f"the operation {operation.name!r} lacks its help sentence, its example or its parameters")
    needed = [param.required for param in operation.params]
    if needed != sorted(needed, reverse=True):
        raise ValueError(f"the operation {operation.name!r} has an optional word before a required one")
    for arrow in (False, True):
        many = [param.many for param in operation.params if param.arrow is arrow]
        if any(many[:-1]):
            raise ValueError(f"the operation {operation.name!r} has words behind those of which there may be many")
    if any(param.name == "pattern" and param.kind == "pattern" for param in operation.params):
        operation = replace(operation, options=(*operation.options, WHERE))
    if not operation.needed:
        operation = replace(operation, options=(*operation.options, OPTIONAL))
    _TABLE[operation.name] = operation
    return operation

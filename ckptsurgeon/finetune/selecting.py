"""Which parameters of a live model are meant: by pattern, module type, number, or what was loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptsurgeon import kinds
from ckptsurgeon.errors import UsageError, quoted
from ckptsurgeon.finetune import names as live_names
from ckptsurgeon.finetune.names import peeled
from ckptsurgeon.finetune.report import LoadReport
from ckptsurgeon.ops import nearest

if TYPE_CHECKING:
    import torch

Pattern = str | re.Pattern[str]
Patterns = Pattern | Iterable[Pattern]
Type = str | type
STATISTICS = "running_mean"
"""The buffer that stands for a norm's running statistics."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A name of a parameter, or of a norm's running statistics.

    `path` are the modules around it, the model first, its owner last.  `index` is that of `model.parameters()`; of
    statistics, that of the parameter before them.  A tied parameter has a slot for each of its names.
    """

    name: str
    tensor: torch.Tensor
    path: tuple[torch.nn.Module, ...]
    index: int
    is_statistics: bool

    @property
    def owner(self) -> torch.nn.Module:
        return self.path[-1]


def slots(model: torch.nn.Module) -> list[Slot]:
    """Every name, in the order of `model.parameters()`; wrappers take no part in names and paths."""
    numbers: dict[int, int] = {}

    def walk(prefix: str, module: torch.nn.Module, around: tuple[torch.nn.Module, ...]) -> Iterator[Slot]:
        module = peeled(module)
        path = (*around, module)
        for step, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(prefix + step, parameter, path, numbers.setdefault(id(parameter), len(numbers)), False)
        mean = module._buffers.get(STATISTICS)
        if mean is not None:
            yield Slot(prefix + STATISTICS, mean, path, max(0, len(numbers) - 1), True)
        for step, child in module._modules.items():
            if child is not None:
                yield from walk(f"{prefix}{step}.", child, path)

    return list(walk("", model, ()))


def owner_types(slot: Slot) -> list[str]:
    """The names of the class of a parameter's owner, and of those that it is made from."""
    return [one.__name__ for one in type(slot.owner).__mro__]


@dataclass(frozen=True)
class Selection:
    """One way of saying which parameters are meant; see `freeze` for what each is. None of all: every parameter."""

    pattern: Patterns | None = None
    types: Type | Sequence[Type] | None = None
    until: int | None = None
    children: int | None = None
    modules: int | None = None
    loaded: LoadReport | None = None

    def __post_init__(self) -> None:
        ways = {
            "pattern": self.pattern,
            "types": self.types,
            "until": self.until,
            "children": self.children,
            "modules": self.modules,
            "loaded": self.loaded,
        }
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(given)} are {len(given)} ways of saying which parameters are meant, and a call takes "
                "one; for what either of them means, call twice"
            )

    def of(self, model: torch.nn.Module, found: Sequence[Slot]) -> list[Slot]:
        """The slots that are meant, in order. UsageError where that is none, or a part of what was said means none."""
        if self.pattern is not None:
            return by_pattern(self.pattern, found)
        if self.types is not None:
            return by_type(self.types, found)
        if self.until is not None:
            until = _count("until", self.until, len({slot.index for slot in found if not slot.is_statistics}))
            return [slot for slot in found if slot.index < until]
        if self.children is not None:
            return _by_children(self.children, model, found)
        if self.modules is not None:
            return _by_modules(self.modules, model, found)
        if self.loaded is not None:
            return _by_report(self.loaded, model, found)
        return list(found)


def patterns(given: Patterns) -> list[re.Pattern[str]]:
    """Patterns compiled; UsageError for what is none."""
    made: list[re.Pattern[str]] = []
    if not isinstance(given, Iterable | re.Pattern):
        raise UsageError(f"a pattern is a regular expression, or several, not {quoted(given)}")
    for one in [given] if isinstance(given, str | re.Pattern) else given:
        try:
            made.append(re.compile(one))
            if not isinstance(made[-1].pattern, str):
                raise TypeError("names are text and no bytes")
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise UsageError(f"{quoted(one)} is not a regular expression: {error}") from None
    if not made:
        raise UsageError("an empty list of patterns means no parameter")
    return made


def by_pattern(given: Patterns, found: Sequence[Slot]) -> list[Slot]:
    """What any of the patterns is found in."""
    compiled = patterns(given)
    silent = [one.pattern for one in compiled if not any(one.search(slot.name) for slot in found)]
    if silent:
        names = [slot.name for slot in found]
        raise UsageError("\n".join(f"`{text}` matches no parameter; {near(text, names)}" for text in silent))
    return [slot for slot in found if any(one.search(slot.name) for one in compiled)]


def near(text: str, names: Iterable[str]) -> str:
    """Which parameters a pattern may have meant, in words."""
    return nearest(text, names, "parameters", "the model")


def types(given: Type | Iterable[Type]) -> list[Type]:
    """Module types as a list; UsageError for what is none."""
    made = [given] if isinstance(given, str | type) else list(given) if isinstance(given, Iterable) else None
    wrong = [given] if made is None else [one for one in made if not isinstance(one, str | type)]
    if made is None or wrong:
        raise UsageError(
            f"a module type is a class, its name or one of {', '.join(kinds.KINDS)}, not {quoted(wrong[0])}"
        )
    return made


def by_type(given: Type | Sequence[Type], found: Sequence[Slot]) -> list[Slot]:
    """What lies in a module of one of the types; of a kind of `kinds`, what such a module owns, or a bias is."""
    wanted = types(given)
    if not wanted:
        raise UsageError("an empty list of module types means no parameter")
    picked = [{id(slot) for slot in found if is_of(one, slot)} for one in wanted]
    silent = [_type_name(one) for one, some in zip(wanted, picked, strict=True) if not some]
    if silent:
        there = [type(module).__name__ for slot in found for module in slot.path]
        raise UsageError("\n".join(no_type(name, there) for name in silent))
    together = set().union(*picked)
    return [slot for slot in found if id(slot) in together]


def is_of(wanted: Type, slot: Slot) -> bool:
    """Whether a parameter belongs to a module type: a class, its name, or a kind (`norm`, `bias` …)."""
    if isinstance(wanted, type):
        return any(isinstance(module, wanted) for module in slot.path)
    if wanted in kinds.KINDS:
        return wanted in tuple(kinds.kinds(slot.name, owner_types(slot)))
    return any(wanted == one.__name__ for module in slot.path for one in type(module).__mro__)


def _type_name(wanted: Type) -> str:
    return wanted.__name__ if isinstance(wanted, type) else wanted


def no_type(name: str, known: Iterable[str]) -> str:
    """That the model has no parameters of a type, in words, and which types it knows."""
    from difflib import get_close_matches

    there = list(dict.fromkeys(known))
    close = get_close_matches(name, there, 3, 0.4) or sorted(there)[:5]
    words = f"the nearest types in it are {', '.join(close)}" if close else "it has no parameters"
    kind = f"; {', '.join(kinds.KINDS)} are words for many types" if name not in kinds.KINDS else ""
    return f"the model has no parameters in modules of the type {name}; {words}{kind}"


def _count(word: str, n: int, most: int) -> int:
    """A number as the end of a slice has it; UsageError past either end, and for what means nothing."""
    noun = "parameters" if word == "until" else word
    if isinstance(n, bool) or not isinstance(n, int):
        raise UsageError(f"{word} is a number of {noun}, not {quoted(n)}")
    end = n if n >= 0 else most + n
    if not 0 < end <= most:
        which = "none" if end == 0 else f"{'the first' if n > 0 else 'all but the last'} {abs(n)}"
        raise UsageError(f"{word}={n} means {which} of {most} {noun}; give 1 to {most}, or -1 to leave out the last")
    return end


def _by_children(n: int, model: torch.nn.Module, found: Sequence[Slot]) -> list[Slot]:
    there = list(peeled(model).children())
    first = {id(peeled(child)) for child in there[: _count("children", n, len(there))]}
    inside = [slot for slot in found if len(slot.path) > 1 and id(slot.path[1]) in first]
    return _some(inside, f"the children that children={n} means have no parameters")


def _by_modules(n: int, model: torch.nn.Module, found: Sequence[Slot]) -> list[Slot]:
    there = [module for _, module in live_names.modules(model)]
    first = {id(module) for module in there[: _count("modules", n, len(there))]}
    return _some(
        [slot for slot in found if id(slot.owner) in first], f"the modules that modules={n} means own no parameters"
    )


def _by_report(report: LoadReport, model: torch.nn.Module, found: Sequence[Slot]) -> list[Slot]:
    """What was loaded whole. Names may be those of the wrapped or of the bare model."""
    whole = loaded_whole(report, model, found)
    return _some([slot for slot in found if id(slot.tensor) in whole], "no parameter was loaded whole")


def loaded_whole(report: LoadReport, model: torch.nn.Module, found: Sequence[Slot]) -> set[int]:
    """The tensors (`id`) that were loaded whole; UsageError where the report is about another model, or something was
    replaced since by another shape. What is no parameter need not be there: a module may make it for its state dict."""
    if not isinstance(report, LoadReport):
        raise UsageError(f"what was loaded is told by the report of cs.load_into, not by {quoted(report)}")
    live = _live(model, found)
    wanted = [key for key in report.loaded if key in live or report.role(key) == "parameter"]
    partly = set(report.unfilled)
    names = by_names(wanted, live, "the report's") - by_names([key for key in wanted if key in partly], live, "")
    shapes = {name: tuple(value.shape) for name, value in live.items()}
    report.check_model(shapes, f"the {type(peeled(model)).__name__}")
    return names


def _live(model: torch.nn.Module, found: Sequence[Slot]) -> dict[str, torch.Tensor]:
    """The parameters and buffers by all of their names, those of wrappers as well."""
    return {
        **{slot.name: slot.tensor for slot in found},
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(peeled(model).named_buffers(remove_duplicate=False)),
    }


def named(names: Any, model: torch.nn.Module, found: Sequence[Slot], whose: str) -> set[int]:
    """The tensors (`id`) of these names of the model's state dict. UsageError for names that are not in it."""
    given = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    if wrong := [name for name in given if not isinstance(name, str)]:
        raise UsageError(f"{whose} {quoted(wrong[0])} is no name of a parameter, and no report of cs.load_into")
    return by_names(given, _live(model, found), whose)


def by_names(names: Sequence[str], live: Mapping[str, torch.Tensor], whose: str) -> set[int]:
    """The tensors (`id`) of these names; UsageError for names that are not among the `live`."""
    unknown = [name for name in names if name not in live]
    if unknown:
        raise UsageError(
            f"{whose} {unknown[0]!r} is no name of this model; {near(unknown[0], live)}"
            + (f"; {len(unknown) - 1} more are unknown: is it about another model?" if len(unknown) > 1 else "")
        )
    return {id(live[name]) for name in names}


def _some(found: list[Slot], otherwise: str) -> list[Slot]:
    if not found:
        raise UsageError(otherwise)
    return found

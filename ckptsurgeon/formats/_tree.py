"""Where in nested objects the state dicts are, and what they consist of.

They are found by structure: a mapping whose values are tensors, or a pickled
module.  Known names only settle which of several is the main one.  All walks are iterative and
visit each object once, so that shared or cyclic objects cost nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from ckptsurgeon.checkpoint import Step, Versions
from ckptsurgeon.errors import LimitError, brief
from ckptsurgeon.formats._values import tensor_of
from ckptsurgeon.inert import Opaque, children
from ckptsurgeon.limits import current
from ckptsurgeon.tensor import Role, Stored, TensorRef

MAIN_NAMES = frozenset(
    (
        "state_dict",
        "model_state_dict",
        "model_state",
        "model",
        "module",
        "net",
        "network",
        "weights",
        "params",
        "parameters",
    )
)
"""Names that make a state dict the main one when all others are far smaller."""
_SETTINGS = frozenset(("hyper_parameters", "datamodule_hyper_parameters", "hparams", "args", "config"))
"""Names of what a model was built from: modules in there are arguments, whose trained tensors stand
in the state dict beside them."""
_MINOR = 0.05
BARE = "tensor"
"""The key of a tensor that is the whole object of its file."""
_FORM = frozenset(("_parameters", "_buffers", "_modules"))
_CONTAINERS = (dict, list, tuple, Opaque)
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Place:
    """Where in an object a walk is: a step below another place.  Paths and names are made of it only where they are
    asked for: containers in containers have names that are far longer than the file."""

    __slots__ = ("above", "depth", "length", "step")

    def __init__(self, step: Step, above: Place | None) -> None:
        self.step, self.above = step, above
        self.depth: int = 1 + (0 if above is None else above.depth)
        self.length: int = len(str(step)) + (0 if above is None else 1 + above.length)

    def path(self) -> tuple[Step, ...]:
        """The steps from the root."""
        steps: list[Step] = []
        place: Place | None = self
        while place is not None:
            steps.append(place.step)
            place = place.above
        return tuple(reversed(steps))


def steps_of(place: Place | None) -> tuple[Step, ...]:
    """The steps to a place; None is the root."""
    return () if place is None else place.path()


class Allowance:
    """What names may be made of one object: so many characters, and so many visits to what was visited before
    (all of it must stay alive)."""

    def __init__(self) -> None:
        self.limits = current()
        self.characters, self.visits = self.limits.name_characters, self.limits.modules
        self.repeats, self.seen = self.limits.repeats, set[int]()

    def name(self, length: int) -> None:
        """Take a name of so many characters; LimitError when there have been too many."""
        self.characters -= length
        if self.characters < 0:
            raise LimitError("longer names of what it holds", "name_characters", self.limits.name_characters)

    def visit(self, value: Any) -> None:
        """Take one visit; LimitError when there have been too many, or too many to what was visited before."""
        self.visits -= 1
        if isinstance(value, dict | list | Opaque | TensorRef) or (isinstance(value, tuple) and value):
            self.repeats -= id(value) in self.seen
            self.seen.add(id(value))
        if self.repeats < 0:
            raise LimitError("objects that share each other", "repeats", self.limits.repeats)
        if self.visits < 0:
            raise LimitError("more modules or values, each counted at every use", "modules", self.limits.modules)


@dataclass(frozen=True)
class Candidate:
    """A state dict in a file: the steps to it, its tensors, torch's `_metadata`, and the items
    beside the tensors (`rest`).  `loose` are the attributes of a pickled module that hold tensors
    which are neither parameters nor buffers, and so in no `state_dict()`, or packed in one."""

    path: tuple[Step, ...]
    tensors: Mapping[str, TensorRef]
    versions: Versions
    rest: Mapping[Any, Any]
    loose: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path as `--select` spells it."""
        return ".".join(str(step) for step in self.path) or "."

    @property
    def numel(self) -> int:
        return sum(ref.numel for ref in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())


def is_optimizer(value: Any) -> bool:
    """Whether this is an optimizer or its `state_dict()`."""
    fields = value.fields() if isinstance(value, Opaque) else value
    if not isinstance(fields, dict) or "state" not in fields or "param_groups" not in fields:
        return False
    return not isinstance(fields["param_groups"], TensorRef)  # a model may call its tensors so


def is_module(value: Any) -> bool:
    """Whether this is a pickled `nn.Module`."""
    if not isinstance(value, Opaque):
        return False
    fields = value.fields()
    return isinstance(fields.get("_parameters"), dict) and isinstance(fields.get("_modules"), dict)


_Kind = Literal["named", "numbered", "arrays"]


def candidates(root: Any) -> tuple[Candidate, ...]:
    """Every state dict below `root`, outermost first, in file order.

    Tensors in lists and under numbers count only where none has a name, and numpy's arrays only
    where there are no tensors: beside a state dict they are something else (states of random
    number generators, statistics).  Modules without tensors (activations, losses) count only where
    there is nothing else.
    """
    if isinstance(root, TensorRef):
        return (Candidate((), {BARE: root}, {}, {}),)
    kinds: tuple[_Kind, ...] = ("named", "numbered", "arrays")
    empty: tuple[Candidate, ...] = ()
    for kind in kinds:
        every = tuple(_outnumbered(_found(root, kind)))
        found = tuple(candidate for candidate in every if candidate.tensors)
        if found:
            return found
        empty = empty or every
    return empty


def _found(root: Any, kind: _Kind) -> list[tuple[Candidate, int | None]]:
    """The candidates, each with the number of the next one around it."""
    found: list[tuple[Candidate, int | None]] = []
    allowance = Allowance()
    numbers: dict[Place | None, int] = {}
    for place, value in _walk(root):
        if is_module(value):
            allowance.name(0 if place is None else place.length)
            made = module_state(steps_of(place), value, allowance)
        elif (mapping := _mapping(value, kind)) is not None and (direct := _direct(mapping, kind)) is not None:
            allowance.name(0 if place is None else place.length)
            made = Candidate(steps_of(place), direct[0], versions_of(value), direct[1])
        else:
            continue
        around = None if place is None else place.above
        while around is not None and around not in numbers:
            around = around.above
        outer = None if place is None else numbers.get(around)
        numbers[place] = len(found)
        found.append((made, outer))
    return found


def _outnumbered(found: list[tuple[Candidate, int | None]]) -> Iterator[Candidate]:
    """Leave out mappings with a few loose tensors around larger state dicts, and small mappings
    inside of a state dict."""
    inner, least = [0] * len(found), [-1] * len(found)
    for number in range(len(found) - 1, -1, -1):
        candidate, outer = found[number]
        if outer is not None:
            inner[outer] += inner[number] + len(candidate.tensors)
    for number, (candidate, outer) in enumerate(found):
        if outer is not None:
            least[number] = max(least[outer], 1, int(len(found[outer][0].tensors) * _MINOR))
        size = len(candidate.tensors)
        if inner[number] <= size and size > least[number]:
            yield candidate


def main(found: tuple[Candidate, ...]) -> Candidate | None:
    """The candidate that is clearly meant: the only one, or one with a main name beside which the
    others are negligible.

    What lies in settings and mappings of nothing but single numbers (the scores that Lightning's
    callbacks keep) are negligible whatever their count.
    """
    if len(found) == 1:
        return found[0]
    meant = [candidate for candidate in found if _SETTINGS.isdisjoint(candidate.path)]
    named = [candidate for candidate in meant if candidate.path and candidate.path[-1] in MAIN_NAMES]
    if len(named) != 1:
        return None
    allowed = max(1, int(len(named[0].tensors) * _MINOR))
    others = [candidate for candidate in meant if candidate is not named[0]]
    if not _is_figures(named[0]):
        others = [candidate for candidate in others if not _is_figures(candidate)]
    return named[0] if sum(len(candidate.tensors) for candidate in others) <= allowed else None


def _is_figures(candidate: Candidate) -> bool:
    return all(ref.numel == 1 for ref in candidate.tensors.values())


def _walk(root: Any) -> Iterator[tuple[Place | None, Any]]:
    """All containers below `root` with their places, each once, in file order; optimizers and
    modules are not looked into."""
    todo: list[tuple[Place | None, Any]] = [(None, root)]
    seen: set[int] = set()
    depth = current().depth
    while todo:
        place, value = todo.pop()
        if isinstance(value, TensorRef) or id(value) in seen or is_optimizer(value):
            continue
        seen.add(id(value))
        yield place, value
        if not is_module(value) and (place is None or place.depth < depth):
            inner = [(Place(step, place), member) for step, member in children(value) if is_container(member)]
            todo.extend(reversed(inner))


def is_container(value: Any) -> bool:
    return isinstance(value, _CONTAINERS)


def _mapping(value: Any, kind: _Kind) -> dict[Any, Any] | None:
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value)) if kind != "named" else None
    return value.pairs if isinstance(value, Opaque) else None


def versions_of(value: Any) -> Versions:
    versions = getattr(value, "_metadata", None) if isinstance(value, OrderedDict) else None
    if not isinstance(versions, dict):
        return {}
    return {key: entry for key, entry in versions.items() if isinstance(key, str) and isinstance(entry, dict)}


def _direct(mapping: dict[Any, Any], kind: _Kind) -> tuple[dict[str, TensorRef], dict[Any, Any]] | None:
    """The tensors and the rest of a mapping; None where there are no tensors."""
    tensors: dict[str, TensorRef] = {}
    rest: dict[Any, Any] = {}
    for key, member in mapping.items():
        if isinstance(member, TensorRef) and isinstance(key, str) and key not in tensors:  # nearly all of them
            tensors[key] = _as("buffer", member) if key.endswith(_BUFFERS) and _role(key) == "buffer" else member
            continue
        named = isinstance(key, str) or (kind != "named" and type(key) is int)
        ref = member if isinstance(member, TensorRef) else tensor_of(member, arrays=kind == "arrays") if named else None
        if named and ref is not None and str(key) not in tensors:
            tensors[str(key)] = ref if ref.role != "tensor" else _as(_role(str(key)), ref)
        else:
            rest[key] = member
    return (tensors, rest) if tensors else None


def _role(key: str) -> Role:
    """A state dict does not tell what is trained, but a few names do."""
    return "buffer" if key.rpartition(".")[2] in _BUFFERS else "tensor"


def _as(role: Role, ref: TensorRef) -> TensorRef:
    if role == ref.role:
        return ref
    stored = _stored_as(role, ref.stored or Stored("cpu", ref.nbytes))
    return TensorRef(ref.spec, ref.source, stored, ref.quantizer)


@lru_cache(maxsize=1024)
def _stored_as(role: Role, stored: Stored) -> Stored:
    return replace(stored, role=role)


def module_state(path: tuple[Step, ...], root: Opaque, allowance: Allowance | None = None) -> Candidate:
    """Parameters, then persistent buffers, depth first: what `state_dict()` would give."""
    allowance = allowance or Allowance()
    tensors: dict[str, TensorRef] = {}
    rest: dict[str, Any] = {}
    todo: list[tuple[str, Opaque, frozenset[int]]] = [("", root, frozenset())]
    loose, seen, limits = list[str](), set[int](), current()
    while todo:
        prefix, module, above = todo.pop()
        allowance.visit(module)
        if len(above) > limits.depth:
            raise LimitError("modules in each other", "depth", limits.depth)
        fields = module.fields()
        hidden = fields.get("_non_persistent_buffers_set")
        kinds: tuple[tuple[Any, Any, Role], ...] = (
            (fields["_parameters"], None, "parameter"),
            (fields.get("_buffers"), hidden, "buffer"),
        )
        for members, skip, role in kinds:
            for name, value in members.items() if isinstance(members, dict) else ():
                if value is None or (isinstance(skip, set) and name in skip):
                    continue
                allowance.visit(value)
                allowance.name(len(prefix) + len(str(name)))
                ref = tensor_of(value)
                if ref is None:
                    rest[f"{prefix}{name}"] = value
                else:
                    tensors[f"{prefix}{name}"] = _as(role, ref)
        held = [name for name, value in fields.items() if name not in _FORM and _holds(value, seen)]
        allowance.name(sum(len(prefix) + len(str(name)) for name in held))
        loose += [f"{prefix}{name}" for name in held]
        above = above | {id(module)}
        for name, child in reversed(fields["_modules"].items()):
            if is_module(child) and id(child) not in above:
                allowance.name(len(prefix) + len(str(name)))
                todo.append((f"{prefix}{name}.", child, above))
    return Candidate(path, tensors, {}, rest, tuple(dict.fromkeys(loose)))


def _holds(value: Any, seen: set[int]) -> bool:
    """Whether there is a tensor in an attribute of a module; modules in it are looked at by themselves."""
    todo, found = [value], False
    while todo:
        value = todo.pop()
        if isinstance(value, TensorRef):
            found = True
        elif isinstance(value, Opaque) and not is_module(value) and id(value) not in seen:
            seen.add(id(value))
            todo += [value.args or (), value.state, value.items or (), value.pairs or {}]
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value
    return found


def optimizers(root: Any) -> list[str]:
    """The dotted places of optimizer state below `root`."""
    found, seen, allowance = list[str](), set[int](), Allowance()
    todo: list[tuple[Place | None, Any]] = [(None, root)]
    while todo:
        place, value = todo.pop()
        if id(value) in seen or not is_container(value):
            continue
        seen.add(id(value))
        if is_optimizer(value):
            found.append(_dotted(place, allowance) or ".")
        else:
            todo += [(Place(step, place), member) for step, member in children(value)][::-1]
    return found


def tensors(root: Any) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor at and below `root`, in state dicts and beside them, each object once, with its dotted place."""
    todo: list[tuple[Place | None, Any]] = [(None, root)]
    seen: set[int] = set()
    allowance = Allowance()
    while todo:
        place, value = todo.pop()
        ref = tensor_of(value, arrays=True)
        if ref is not None:
            yield _dotted(place, allowance) or BARE, ref
        elif is_container(value) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(reversed([(Place(step, place), member) for step, member in children(value)]))


def _dotted(place: Place | None, allowance: Allowance) -> str:
    """The steps to a place with dots between them, within what names may take."""
    allowance.name(0 if place is None else place.length)
    return ".".join(str(step) for step in steps_of(place))


def describe(value: Any) -> str:
    """A few words for what a file holds."""
    if isinstance(value, TensorRef):
        return f"one bare tensor ({value.spec})"
    if isinstance(value, Opaque):
        return f"an object of the class {brief(value.name)}"
    if isinstance(value, dict | list | tuple | set):
        return f"{_article(value)} of {len(value)} item{'' if len(value) == 1 else 's'}"
    return "nothing (None)" if value is None else _article(value)


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def summary(extras: Any) -> str:
    """The names of the extras, for a sentence."""
    if isinstance(extras, dict):
        names = [brief(str(key)) for key in islice(extras, 9)]
        return ", ".join(names[:8]) + (f" and {len(extras) - 8} more" if len(extras) > 8 else "")
    return describe(extras)

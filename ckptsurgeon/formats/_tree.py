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
from typing import Any, Literal

from ckptsurgeon.checkpoint import Step, Versions
from ckptsurgeon.errors import LimitError
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
_LONGEST_PATH = 10_000
"""Characters of the names on the way to a state dict, and of a place in words."""
BARE = "tensor"
"""The key of a tensor that is the whole object of its file."""
_FORM = frozenset(("_parameters", "_buffers", "_modules"))
_CONTAINERS = (dict, list, tuple, Opaque)
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


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


def _found(root: Any, kind: _Kind) -> list[Candidate]:
    found: list[Candidate] = []
    for path, value in _walk(root):
        if is_module(value):
            found.append(module_state(path, value))
        elif (mapping := _mapping(value, kind)) is not None:
            direct = _direct(path, mapping, value, kind)
            if direct.tensors:
                found.append(direct)
    return found


def _outnumbered(found: list[Candidate]) -> Iterator[Candidate]:
    """Leave out mappings with a few loose tensors around larger state dicts, and small mappings
    inside of a state dict."""
    around = _around(found)
    inner = [0] * len(found)
    for candidate, outer in zip(found, around, strict=True):
        for number in outer:
            inner[number] += len(candidate.tensors)
    for candidate, outer, below in zip(found, around, inner, strict=True):
        size = len(candidate.tensors)
        if below > size:
            continue
        if not any(size <= max(1, int(len(found[number].tensors) * _MINOR)) for number in outer):
            yield candidate


def _lies_in(path: tuple[Step, ...], outer: tuple[Step, ...]) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _around(found: list[Candidate]) -> list[tuple[int, ...]]:
    """Of each candidate the numbers of those that it lies in; whatever lies in another one comes right behind it."""
    around: list[tuple[int, ...]] = []
    above: list[int] = []
    for number, candidate in enumerate(found):
        while above and not _lies_in(candidate.path, found[above[-1]].path):
            above.pop()
        around.append(tuple(above))
        above.append(number)
    return around


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


def _walk(root: Any) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """All containers below `root` with their paths, each once, in file order; optimizers and
    modules are not looked into."""
    todo: list[tuple[tuple[Step, ...], Any, int]] = [((), root, _LONGEST_PATH)]
    seen: set[int] = set()
    depth = current().depth
    while todo:
        path, value, room = todo.pop()
        if isinstance(value, TensorRef) or id(value) in seen or is_optimizer(value):
            continue
        seen.add(id(value))
        yield path, value
        if not is_module(value) and len(path) < depth and room >= 0:
            inner = [
                ((*path, step), member, room - (len(step) if isinstance(step, str) else 1))
                for step, member in children(value)
                if is_container(member)
            ]
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


def _direct(path: tuple[Step, ...], mapping: dict[Any, Any], value: Any, kind: _Kind) -> Candidate:
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
    return Candidate(path, tensors, versions_of(value), rest)


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


def module_state(path: tuple[Step, ...], root: Opaque) -> Candidate:
    """Parameters, then persistent buffers, depth first: what `state_dict()` would give."""
    tensors: dict[str, TensorRef] = {}
    rest: dict[str, Any] = {}
    todo: list[tuple[str, Opaque, frozenset[int]]] = [("", root, frozenset())]
    visits, repeats, met, loose, seen, limits = 0, 0, set[int](), list[str](), set[int](), current()
    room = limits.names
    while todo:
        prefix, module, above = todo.pop()
        visits += 1
        repeats += id(module) in met
        met.add(id(module))
        deep = len(above) > limits.depth
        if deep or max(visits, len(tensors)) > limits.modules or repeats > limits.repeats:
            name = "depth" if deep else "repeats" if repeats > limits.repeats else "modules"
            raise LimitError(
                "modules in each other" if deep else "a model of too many modules or tensors",
                name,
                getattr(limits, name),
            )
        fields = module.fields()
        held = [part for part in (fields["_parameters"], fields.get("_buffers")) if isinstance(part, dict)]
        room -= len(prefix.encode("utf-8", "surrogatepass")) * sum(map(len, (fields, *held)))
        if room < 0:
            raise LimitError("a model with very long names", "names", limits.names)
        hidden = fields.get("_non_persistent_buffers_set")
        kinds: tuple[tuple[Any, Any, Role], ...] = (
            (fields["_parameters"], None, "parameter"),
            (fields.get("_buffers"), hidden, "buffer"),
        )
        for members, skip, role in kinds:
            for name, value in members.items() if isinstance(members, dict) else ():
                if value is None or (isinstance(skip, set) and name in skip):
                    continue
                ref = tensor_of(value)
                if ref is None:
                    rest[f"{prefix}{name}"] = value
                else:
                    tensors[f"{prefix}{name}"] = _as(role, ref)
        loose += [f"{prefix}{name}" for name, value in fields.items() if name not in _FORM and _holds(value, seen)]
        above = above | {id(module)}
        for name, child in reversed(fields["_modules"].items()):
            if is_module(child) and id(child) not in above:
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
    found, seen = [], set()
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        name, value = todo.pop()
        if id(value) in seen or not is_container(value):
            continue
        seen.add(id(value))
        if is_optimizer(value):
            found.append(name or ".")
        else:
            todo += [(_joined(name, step), member) for step, member in children(value)][::-1]
    return found


def _joined(name: str, step: Step) -> str:
    """A place below another; of a very long one the end is left out."""
    if len(name) > _LONGEST_PATH:
        return name if name.endswith("…") else f"{name}…"
    return f"{name}.{step}" if name else str(step)


def tensors(root: Any) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor at and below `root`, in state dicts and beside them, each object once, with its dotted place."""
    todo: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while todo:
        name, value = todo.pop()
        ref = tensor_of(value, arrays=True)
        if ref is not None:
            yield name or BARE, ref
        elif is_container(value) and id(value) not in seen:
            seen.add(id(value))
            inner = [(_joined(name, step), member) for step, member in children(value)]
            todo.extend(reversed(inner))


def describe(value: Any) -> str:
    """A few words for what a file holds."""
    if isinstance(value, TensorRef):
        return f"one bare tensor ({value.spec})"
    if isinstance(value, Opaque):
        return f"an object of the class {value.name}"
    if isinstance(value, dict | list | tuple | set):
        return f"{_article(value)} of {len(value)} item{'' if len(value) == 1 else 's'}"
    return "nothing (None)" if value is None else _article(value)


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def summary(extras: Any) -> str:
    """The names of the extras, for a sentence."""
    if isinstance(extras, dict):
        names = [str(key) for key in extras]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return describe(extras)

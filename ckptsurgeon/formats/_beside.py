"""What lies beside a state dict and may go with it: optimizer states, and mappings and lists of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptsurgeon.checkpoint import Step
from ckptsurgeon.formats._splice import replaced_at
from ckptsurgeon.formats._tree import Place, is_container, is_module, is_optimizer, steps_of
from ckptsurgeon.inert import children
from ckptsurgeon.tensor import TensorRef

Path = tuple[Step, ...]


def optimizer_states(extras: Any) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """Every `state_dict()` of an optimizer with the steps to it; one that stands in several places, each time."""
    for path, value in _walk(extras):
        if is_optimizer(value) and isinstance(value, dict):
            yield path, value


def gatherings(extras: Any) -> Iterator[tuple[Path, Any]]:
    """Every dict that has tensors under names, and every list of nothing but tensors, outside of optimizers."""
    for path, value in _walk(extras):
        if is_optimizer(value):
            continue
        named = isinstance(value, dict) and any(isinstance(key, str) and _is_tensor(value[key]) for key in value)
        if named or (isinstance(value, list | tuple) and value and all(map(_is_tensor, value))):
            yield path, value


def put(extras: Any, path: Path, value: Any) -> Any:
    """The extras with another value at a place."""
    return replaced_at(extras, path, value)


def taken_out(extras: Any, path: Path) -> Any:
    """The extras without what is at a place: a dict loses the item, a list too where all of it is gone; else None
    stands there, so that the others keep their places."""
    if not path:
        return {}
    above = extras
    for step in path[:-1]:
        above = dict(children(above))[step]
    if isinstance(above, dict):
        rest = type(above)((key, value) for key, value in above.items() if key != path[-1])
        return replaced_at(extras, path[:-1], rest)
    extras = replaced_at(extras, path, None)
    if isinstance(above, list) and all(value is None or index == path[-1] for index, value in enumerate(above)):
        return replaced_at(extras, path[:-1], [])
    return extras


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorRef)


def _walk(root: Any) -> Iterator[tuple[Path, Any]]:
    """All containers below `root`, each object once, but those that may be yielded; nothing inside of an optimizer or
    a pickled module."""
    todo: list[tuple[Place | None, Any]] = [(None, root)]
    seen: set[int] = set()
    while todo:
        place, value = todo.pop()
        if not is_container(value) or isinstance(value, TensorRef) or is_module(value):
            continue
        if id(value) in seen and not is_optimizer(value):
            continue
        seen.add(id(value))
        yield steps_of(place), value
        if not is_optimizer(value):
            todo += [(Place(step, place), member) for step, member in children(value) if is_container(member)][::-1]

"""What a `--select` path names."""

from __future__ import annotations

from typing import Any

from ckptsurgeon.checkpoint import Step
from ckptsurgeon.errors import InputError, LimitError, brief
from ckptsurgeon.formats._tree import (
    BARE,
    Candidate,
    is_container,
    is_module,
    is_optimizer,
    module_state,
    versions_of,
)
from ckptsurgeon.inert import Opaque, children
from ckptsurgeon.limits import current
from ckptsurgeon.tensor import TensorRef


def at(root: Any, select: str) -> Candidate | None:
    """The node that `select` names, with all tensors below it under dotted names."""
    found = [] if select == "." else _resolve(root, select)
    if found is None:
        return None
    path = tuple(step for step, _ in found)
    node = found[-1][1] if found else root
    if is_module(node):
        return module_state(path, node)
    if isinstance(node, TensorRef):
        return Candidate(path, {str(path[-1]) if path else BARE: node}, {}, {})
    if not isinstance(node, dict | list | tuple | Opaque):
        return None
    tensors: dict[str, TensorRef] = {}
    rest: dict[Any, Any] = {}
    for step, member in children(node):
        inner, others = _flattened(str(step), member)
        for name, ref in inner.items():
            _put(tensors, name, ref)
        rest.update(others if inner else {step: member})
    return Candidate(path, tensors, versions_of(node), rest) if tensors else None


def _flattened(name: str, value: Any) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """All tensors at and below a value under dotted names, and what else lies beside them.

    What occurs twice is taken twice, up to a limit, since a few objects that share each other have no end; only
    cycles are cut.
    """
    limits = current()
    tensors: dict[str, TensorRef] = {}
    others: dict[str, Any] = {}
    todo: list[tuple[str, Any, tuple[int, ...]]] = [(name, value, ())]
    seen: set[int] = set()
    repeats, room = 0, limits.names
    while todo:
        name, value, above = todo.pop()
        if is_container(value) or isinstance(value, TensorRef):
            repeats += id(value) in seen
            seen.add(id(value))
            room -= len(name) * (1 if name.isascii() else 4)
            if repeats > limits.repeats:
                raise LimitError(f"objects that share each other below {brief(name)}", "repeats", limits.repeats)
            if room < 0:
                raise LimitError(f"very long names below {brief(name)}", "names", limits.names)
        if isinstance(value, TensorRef):
            _put(tensors, name, value)
        elif not is_container(value) or is_optimizer(value):
            others[name] = value
        elif len(above) >= limits.depth:
            raise LimitError(f"{brief(name)} is nested too deeply", "depth", limits.depth)
        elif id(value) not in above:
            inner = (*above, id(value))
            todo.extend([(f"{name}.{step}", member, inner) for step, member in children(value)][::-1])
        if len(tensors) + len(todo) > limits.modules:
            raise LimitError(f"too many tensors below {brief(name)}", "modules", limits.modules)
    return tensors, others


def _put(tensors: dict[str, TensorRef], name: str, ref: TensorRef) -> None:
    if name in tensors:
        raise InputError(f"two tensors have the dotted name {name!r}", hint="choose one of the inner state dicts")
    tensors[name] = ref


def node_of(root: Any, select: str) -> Any:
    """The object that `select` names; None when there is none."""
    found = [] if select == "." else _resolve(root, select)
    return None if found is None else found[-1][1] if found else root


def _resolve(root: Any, select: str) -> list[tuple[Step, Any]] | None:
    """The steps that spell `select`; keys may hold dots themselves, so every cut is tried."""
    todo: list[tuple[Any, str, list[tuple[Step, Any]]]] = [(root, select, [])]
    while todo:
        node, left, taken = todo.pop()
        for step, member in children(node):
            word = str(step)
            if left == word:
                return [*taken, (step, member)]
            if left.startswith(word + "."):
                todo.append((member, left[len(word) + 1 :], [*taken, (step, member)]))
    return None

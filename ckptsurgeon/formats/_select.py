"""What a `--select` path names."""

from __future__ import annotations

from typing import Any

from ckptsurgeon.checkpoint import Step
from ckptsurgeon.errors import InputError, LimitError, quoted
from ckptsurgeon.formats._tree import (
    BARE,
    Allowance,
    Candidate,
    is_container,
    is_module,
    is_optimizer,
    module_state,
    versions_of,
)
from ckptsurgeon.inert import Opaque, children
from ckptsurgeon.limits import DEFAULT
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
    allowance = Allowance()
    for step, member in children(node):
        inner, others = _flattened(str(step), member, allowance)
        for name, ref in inner.items():
            _put(tensors, name, ref)
        rest.update(others if inner else {step: member})
    return Candidate(path, tensors, versions_of(node), rest) if tensors else None


def _flattened(name: str, value: Any, allowance: Allowance) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """All tensors at and below a value under dotted names, and what else lies beside them.

    What occurs twice is taken twice; only cycles are cut.
    """
    tensors: dict[str, TensorRef] = {}
    others: dict[str, Any] = {}
    todo: list[tuple[str, Any, tuple[int, ...]]] = [(name, value, ())]
    while todo:
        name, value, above = todo.pop()
        allowance.visit(value)
        allowance.name(len(name))
        if isinstance(value, TensorRef):
            _put(tensors, name, value)
        elif not is_container(value) or is_optimizer(value):
            others[name] = value
        elif len(above) >= DEFAULT.depth:
            raise LimitError(f"{quoted(name)} is nested more than {DEFAULT.depth} deep")
        elif id(value) not in above:
            inner = (*above, id(value))
            todo.extend([(f"{name}.{step}", member, inner) for step, member in children(value)][::-1])
    return tensors, others


def _put(tensors: dict[str, TensorRef], name: str, ref: TensorRef) -> None:
    if name in tensors:
        raise InputError(f"two tensors have the dotted name {quoted(name)}", hint="choose one of the inner state dicts")
    tensors[name] = ref


def node_of(root: Any, select: str) -> Any:
    """The object that `select` names; None when there is none."""
    found = [] if select == "." else _resolve(root, select)
    return None if found is None else found[-1][1] if found else root


def _resolve(root: Any, select: str) -> list[tuple[Step, Any]] | None:
    """The steps that spell `select`; keys may hold dots themselves, so every cut is tried."""
    todo: list[tuple[Any, str, list[tuple[Step, Any]]]] = [(root, select, [])]
    seen: set[tuple[int, int]] = set()
    while todo:
        node, left, taken = todo.pop()
        if (id(node), len(left)) in seen:
            continue
        seen.add((id(node), len(left)))
        for step, member in children(node):
            word = str(step)
            if left == word:
                return [*taken, (step, member)]
            if left.startswith(word + "."):
                todo.append((member, left[len(word) + 1 :], [*taken, (step, member)]))
    return None

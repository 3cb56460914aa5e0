"""The extras without their state dict, and with another one in its place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.checkpoint import Step
from ckptsurgeon.inert import Opaque, children


@dataclass
class StateDict:
    """A state dict to be written: the items in order, tensors first, and torch's `_metadata`."""

    items: Mapping[str, Any]
    versions: Mapping[str, Any]


def remove(root: Any, path: tuple[Step, ...], rest: Mapping[Any, Any]) -> tuple[Any, int | None]:
    """`root` without the state dict at `path`, and its place among its siblings; None when its
    other items, `rest`, stay there."""
    if not path:
        return dict(rest), None
    if len(path) == 1:
        return _without(root, path[0], rest)
    child = dict(children(root))[path[0]]
    inner, place = remove(child, path[1:], rest)
    return _with(root, path[0], inner), place


def _without(node: Any, step: Step, rest: Mapping[Any, Any]) -> tuple[Any, int | None]:
    if rest:
        return _with(node, step, dict(rest)), None
    place = [key for key, _ in children(node)].index(step)
    if isinstance(node, dict):
        return _like(node, {key: value for key, value in node.items() if key != step}), place
    if isinstance(node, list | tuple):
        return type(node)(value for index, value in enumerate(node) if index != step), place
    return _opaque_like(node, {key: value for key, value in node.fields().items() if key != step}), place


def _with(node: Any, step: Step, value: Any) -> Any:
    if isinstance(node, dict):
        return _like(node, {key: (value if key == step else old) for key, old in node.items()})
    if isinstance(node, list | tuple):
        return type(node)(value if index == step else old for index, old in enumerate(node))
    return _opaque_like(node, {key: (value if key == step else old) for key, old in node.fields().items()})


def replaced_at(root: Any, path: tuple[Step, ...], value: Any) -> Any:
    """`root` with another value at a place that it has; the containers on the way are new ones."""
    if not path:
        return value
    return _with(root, path[0], replaced_at(dict(children(root))[path[0]], path[1:], value))


def _like(node: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    return OrderedDict(items) if isinstance(node, OrderedDict) else items


def _opaque_like(node: Opaque, fields: dict[Any, Any]) -> Opaque:
    copy = Opaque(node.name, node.args)
    copy.items, copy.state = node.items, node.state
    if node.pairs is not None:
        copy.pairs = fields
    else:
        copy.state = fields
    return copy


def insert(extras: Any, path: tuple[Step, ...], place: int | None, value: StateDict) -> tuple[Any, list[str]]:
    """`extras` with a state dict back at `path`: the inverse of `remove`.

    An opaque object on the way cannot be written again: a dict with the state dict alone takes
    its place, and the second result says so.
    """
    if not path:
        return StateDict({**value.items, **extras}, value.versions), []
    if isinstance(extras, Opaque):
        inner, lost = insert({}, path, 0, value)
        return inner, [f"{extras.name}, the object around {path[0]} (a dict in its place)", *lost]
    step = path[0]
    members = dict(children(extras))
    if len(path) > 1:
        inner, lost = insert(members.get(step, {}), path[1:], place, value)
        return (_with(extras, step, inner) if step in members else {**extras, step: inner}), lost
    if place is None:
        return _with(extras, step, StateDict({**value.items, **members[step]}, value.versions)), []
    if isinstance(extras, dict):
        pairs: list[tuple[Any, Any]] = list(extras.items())
        pairs.insert(place, (step, value))
        return _like(extras, dict(pairs)), []
    items: list[Any] = list(extras)
    items.insert(place, value)
    return type(extras)(items), []


def beside(extras: Any, path: tuple[Step, ...], place: int | None) -> Mapping[Any, Any]:
    """What will stand in the state dict beside its tensors when it is inserted again."""
    if place is not None:
        return {}
    for step in path:
        extras = dict(children(extras)).get(step, {})
    return extras if isinstance(extras, dict) else {}

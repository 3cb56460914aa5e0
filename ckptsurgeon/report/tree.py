"""The object in a file as a tree: `ckpt ls --tree`.

Keys of a state dict are nested at their dots, and numbered siblings that are alike are merged.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from ckptsurgeon import formats
from ckptsurgeon.formats import Document
from ckptsurgeon.inert import Opaque, children, width
from ckptsurgeon.report._text import brief, plural, short, shown, size
from ckptsurgeon.report.grouping import ranges
from ckptsurgeon.tensor import TensorRef

SCHEMA = "ckptsurgeon.tree/1"
_WIDEST = 60
_DEEPEST = 60
_LINES = 20_000
"""Of what is shown in several places; a container that was not shown yet always is."""
_CHARACTERS = 1 << 26
"""Of all names together: one key may stand in many places."""


@dataclass
class Node:
    """A line of the tree: a name, what it is, and what is in it (`nbytes` of tensors)."""

    name: str
    text: str
    children: list[Node] = field(default_factory=list)
    nbytes: int = 0
    tensors: int = 0

    def form(self) -> Hashable:
        """What makes two nodes alike, names of their own apart."""
        return (self.text, tuple((child.name, child.form()) for child in self.children))

    def data(self) -> dict[str, Any]:
        made: dict[str, Any] = {"name": self.name, "is": self.text, "nbytes": self.nbytes}
        return {**made, "children": [child.data() for child in self.children]} if self.children else made


def tree(document: Document, select: str | None = None) -> Node:
    """The whole object of a file, or the part of it that `select` names."""
    value = document.root if select is None else document.node(select)
    root = node(document.path if select is None else f"{document.path} {select}", value)
    root.text = f"{document.format}: {root.text}"
    return root


def node(name: str, value: Any) -> Node:
    """A value with everything in it."""
    return _Builder().node(name, value, 0)


class _Builder:
    def __init__(self) -> None:
        self.above: set[int] = set()
        self.lines = 0
        self.characters = _CHARACTERS
        self.seen: set[int] = set()
        self.dull: set[int] = set()

    def node(self, name: str, value: Any, depth: int) -> Node:
        self.characters -= len(name)
        if self.characters < 0:
            return Node("…", "… (the names have too many characters)")
        if isinstance(value, TensorRef):
            return Node(name, _tensor(value), nbytes=value.nbytes, tensors=1)
        ref = formats.tensor_of(value, arrays=True)
        if ref is not None:
            return Node(name, f"{shown(formats.kind_of(value))} {ref.spec}", nbytes=ref.nbytes, tensors=1)
        if not isinstance(value, dict | list | tuple | Opaque):
            return Node(name, _scalar(value))
        if id(value) in self.seen:
            self.lines += 1 + width(value)
        self.seen.add(id(value))
        if id(value) in self.above or depth > _DEEPEST or self.lines > _LINES:
            return Node(name, "… (shown above, or too deep)")
        self.above.add(id(value))
        made = Node(name, "")
        if self.is_worth(value):
            made.children = self.members(value, depth)
        made.children = _merged(made.children)
        made.nbytes = sum(child.nbytes for child in made.children)
        made.tensors = sum(child.tensors for child in made.children)
        made.text = _container(value, made)
        self.above.discard(id(value))
        return made

    def is_worth(self, value: Any) -> bool:
        """Whether the members of a container are shown in lines of their own; of a long list that is looked up once."""
        if not isinstance(value, list | tuple):
            return True
        if id(value) in self.dull:
            return False
        found = any(_interesting(member) for member in value)
        if not found:
            self.dull.add(id(value))
        return found

    def members(self, value: Any, depth: int) -> list[Node]:
        nested: dict[str, Any] = {}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value) and _is_state(value):
            for key, member in value.items():
                _nest(nested, key.split(".", _DEEPEST), member)
            return [self.branch(name, member, depth + 1) for name, member in nested.items()]
        return [self.node(str(step), member, depth + 1) for step, member in children(value)]

    def branch(self, name: str, value: Any, depth: int) -> Node:
        """A module of a state dict, whose keys were nested at their dots."""
        if not isinstance(value, _Branch) or depth > _DEEPEST:
            return self.node(name, value, depth)
        made = Node(name, "")
        made.children = _merged([self.branch(step, member, depth + 1) for step, member in value.items()])
        made.nbytes = sum(child.nbytes for child in made.children)
        made.tensors = sum(child.tensors for child in made.children)
        return made


class _Branch(dict[str, Any]):
    pass


def _nest(into: dict[str, Any], path: list[str], value: Any) -> None:
    for at, step in enumerate(path[:-1]):
        inner = into.setdefault(step, _Branch())
        if not isinstance(inner, _Branch):
            into[".".join(path[at:])] = value
            return
        into = inner
    if path[-1] in into:
        into[".".join(["", path[-1]])] = value
    else:
        into[path[-1]] = value


def _is_state(value: dict[str, Any]) -> bool:
    return sum(isinstance(member, TensorRef) for member in value.values()) * 2 > len(value)


def _interesting(value: Any) -> bool:
    return isinstance(value, TensorRef | dict | list | tuple | Opaque)


def _tensor(ref: TensorRef) -> str:
    text = f"{ref.dtype.name} {list(ref.shape)}"
    if ref.absent is not None:
        text += f" ({shown(ref.absent)})"
    if ref.quantizer is not None:
        text += f", quantised ({shown(ref.quantizer.scheme.removeprefix('torch.'))})"
    if ref.stored is not None:
        if ref.stored.device != "cpu":
            text += f" on {shown(ref.stored.device)}"
        if ref.stored.nbytes > ref.nbytes:
            text += f", {size(ref.nbytes)} of a storage of {size(ref.stored.nbytes)}"
    return text


def _scalar(value: Any) -> str:
    text = short(value)
    return f"{type(value).__name__} {shown(text if len(text) <= _WIDEST else text[:_WIDEST] + '…')}"


def _container(value: Any, made: Node) -> str:
    if isinstance(value, Opaque):
        text = f"{shown(brief(value.name))} (not imported)" if value.args is not None else shown(brief(value.name))
    else:
        text = f"{type(value).__name__} of {len(value)}"
        if not made.children and value and not isinstance(value, dict):
            return _scalar(value)
    if made.tensors:
        text += f": {plural(made.tensors, 'tensor')}, {size(made.nbytes)}"
    return text


def _merged(nodes: list[Node]) -> list[Node]:
    """Numbered siblings that are alike, as one; a merged name stands for exactly its members."""
    alike: dict[Hashable, list[Node]] = {}
    for node in nodes:
        key: Hashable = ("number", node.form()) if node.name.isdecimal() and node.name.isascii() else ("own", id(node))
        alike.setdefault(key, []).append(node)
    made: list[Node] = []
    for group in alike.values():
        first = group[0]
        if len(group) > 1:
            name = "{" + ranges(sorted(int(node.name) for node in group)) + "}"
            nbytes, tensors = sum(node.nbytes for node in group), sum(node.tensors for node in group)
            made.append(Node(name, first.text, first.children, nbytes, tensors))
        else:
            made.append(first)
    return made


def text(root: Node, limit: int | None = None) -> str:
    """The tree in lines; at most `limit` children of each node."""
    lines = [f"{shown(root.name)}  {root.text}"]
    _draw(root, "", lines, limit)
    return "\n".join(lines)


def _draw(node: Node, indent: str, lines: list[str], limit: int | None) -> None:
    kept = node.children if limit is None else node.children[:limit]
    more = len(node.children) - len(kept)
    for at, child in enumerate(map(_chained, kept)):
        last = at == len(kept) - 1 and not more
        lines.append(
            f"{indent}{'└── ' if last else '├── '}{shown(brief(child.name))}{'  ' + child.text if child.text else ''}"
        )
        _draw(child, indent + ("    " if last else "│   "), lines, limit)
    if more:
        lines.append(f"{indent}└── … {more} more (--limit)")


def _chained(node: Node) -> Node:
    """A module with one member, and the member, in one line: `conv1.weight`."""
    while not node.text and len(node.children) == 1:
        (child,) = node.children
        node = Node(f"{node.name}.{child.name}", child.text, child.children, node.nbytes, node.tensors)
    return node


def data(document: Document, root: Node) -> dict[str, Any]:
    """The JSON object of `ckpt ls --tree --json`."""
    return {"schema": SCHEMA, "file": document.path, "format": document.format, "tree": root.data()}

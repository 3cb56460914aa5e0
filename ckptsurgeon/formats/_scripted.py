"""Script modules, as TorchScript archives and packages hold them.

A pickle holds objects of classes that the code beside it declares.  The modules among them are given
the form of a pickled `nn.Module`.  The code is read as text for its declarations, never run; its
paths are those of `qualifierToArchivePath` in torch/csrc/jit/serialization/import_source.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.errors import LimitError
from ckptsurgeon.formats import _archive, _classes, _rebuild
from ckptsurgeon.formats._classes import Class
from ckptsurgeon.formats._plain import BadRecord, Builder
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.inert import Opaque, children
from ckptsurgeon.limits import Limits
from ckptsurgeon.tensor import TensorRef

_FORM = ("_parameters", "_buffers", "_modules")
_FROZEN = "is a frozen TorchScript module: its weights are nameless constants of its code, and it has no state dict"
_PACKED = "is a TorchScript module without parameters and buffers (quantised weights are packed), and has no state dict"


def builders(limits: Limits) -> Mapping[str, Builder]:
    """The calls that a pickle of TorchScript may make."""
    return {**_rebuild.builders(limits), **_PLAIN}


def _first(args: tuple[Any, ...]) -> Any:
    if not args:
        raise BadRecord("a TorchScript value without its contents")
    return args[0]


_PLAIN: dict[str, Builder] = {
    **{f"torch.jit._pickle.build_{kind}list": _first for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": _first,
}


class Code:
    """The classes that an archive's code declares, read where they are asked for."""

    def __init__(self, probe: Probe, folder: str) -> None:
        self.probe, self.folder = probe, folder
        self.files: dict[str, dict[str, Class]] = {}
        self.left = probe.limits.code_bytes

    def find(self, qualified: str) -> Class:
        """The class of a dotted name; BadRecord when the code does not declare it."""
        module, _, name = qualified.rpartition(".")
        path = f"{self.folder}{module.replace('.', '/')}.py"
        if path not in self.files:
            self.files[path] = _classes.parse(self.text(path))
        if name not in self.files[path]:
            raise BadRecord(f"the class {qualified} is not in the archive's code")
        return self.files[path][name]

    def text(self, path: str) -> str:
        member = self.probe.members.get(path)
        if member is None:
            return ""
        self.left -= member.size
        if self.left < 0:
            most = self.probe.limits.code_bytes
            raise LimitError(f"{most - self.left} bytes of code as far as {path}", "code_bytes", most)
        raw = _archive.content(self.probe, member, self.probe.limits.code_bytes, "code_bytes")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRecord(f"{path} is no text") from None


@dataclass(frozen=True)
class _Module:
    """A module of the archive with its class: what it holds, in the order of its slots."""

    object: Opaque
    declared: Class

    def state(self, modules: dict[int, _Module]) -> dict[str, Any]:
        """Its attributes as a pickled `nn.Module` has them."""
        held: dict[str, Any] = self.object.state
        if set(held) != set(self.declared.slots):
            odd = ", ".join(sorted(map(str, set(held) ^ set(self.declared.slots)))[:5])
            raise BadRecord(f"{self.object.name} has other attributes in its data than in its code: {odd}")
        if not set(_FORM).isdisjoint(held):
            raise BadRecord(f"{self.object.name} has an attribute that no module can have")
        parameters, buffers, inner, others = {}, {}, {}, {}
        for name in self.declared.slots:
            value = held[name]
            if name in self.declared.parameters:
                parameters[name] = value
            elif name in self.declared.buffers:
                buffers[name] = value
            elif id(value) in modules:
                inner[name] = value
            else:
                others[name] = value
        return {**others, **dict(zip(_FORM, (parameters, buffers, inner), strict=True))}


def _modules(tree: Any, code: Code) -> dict[int, _Module]:
    """Every module at and below `tree`, by identity; each object is visited once."""
    found: dict[int, _Module] = {}
    todo, seen = [tree], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        todo.extend(member for _, member in children(value) if isinstance(member, dict | list | tuple | Opaque))
        if isinstance(value, Opaque) and isinstance(value.state, dict) and _is_declared(value.name):
            declared = code.find(value.name)
            if declared.base == "Module":
                found[id(value)] = _Module(value, declared)
    return found


def _is_declared(name: str) -> bool:
    """Whether the archive's own code declares a class, not torch's C++."""
    return name.startswith("__torch__.") and not name.startswith("__torch__.torch.classes.")


def form(tree: Any, constants: Any, code: Code, weighty: bool) -> str | None:
    """Give the modules of `tree` the form of pickled ones, or say why there is no state dict.

    `constants` are those of the code; `weighty` tells that there are bytes of tensors.
    """
    held = _weights(constants)
    modules = _modules(tree, code)
    states = [(module.object, module.state(modules)) for module in modules.values()]
    why = None
    named = any(isinstance(ref, TensorRef) for _, state in states for kind in _FORM[:2] for ref in state[kind].values())
    if named or not weighty:
        for value, state in states:
            value.state = state
    else:  # an empty state dict would hide the weights
        why = _FROZEN if held else _PACKED
    if held and isinstance(tree, Opaque) and isinstance(tree.state, dict):
        tree.state.setdefault("constants", held)
    return why


def _weights(constants: Any) -> tuple[TensorRef, ...]:
    """The tensors among the constants of the code, in their order."""
    members = constants if isinstance(constants, tuple | list) else ()
    return tuple(value for value in members if isinstance(value, TensorRef) and value.nbytes)

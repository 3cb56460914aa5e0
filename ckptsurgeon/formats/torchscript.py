"""TorchScript archives: `torch.jit.save`, `torch::save` of C++, and models of the lite interpreter.

A torch zip with `constants.pkl` beside `data.pkl`, whose object is of classes that `code/…py`
declares.  The module is given the form of a pickled `nn.Module`, so that its state dict is what
`torch.jit.load(…).state_dict()` gives.  The code is read as text for its declarations, never run.

Source: torch/csrc/jit/serialization/export_module.cpp and import.cpp; `code/` paths are those of
`qualifierToArchivePath`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckptsurgeon.errors import InputError
from ckptsurgeon.formats import _archive, _classes
from ckptsurgeon.formats._classes import Class
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._plain import BadRecord, Builder
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._rebuild import builders
from ckptsurgeon.formats._tensors import persistent_loader
from ckptsurgeon.inert import Opaque, children
from ckptsurgeon.tensor import TensorRef

NAME = "torchscript"
_FORM = ("_parameters", "_buffers", "_modules")
_CONSTANTS = "constants"
_FROZEN = "is a frozen TorchScript module: its weights are nameless constants of its code, and it has no state dict"
_PACKED = "is a TorchScript module without parameters and buffers (quantised weights are packed), and has no state dict"


def sniff(probe: Probe) -> bool:
    """Whether this is a torch zip with the constants of code beside its object."""
    return any(f"{root}constants.pkl" in probe.members for root in _archive.roots(probe.members, "data.pkl"))


def read(probe: Probe) -> Document:
    """The module in the archive; InputError when it is damaged, or its code and data disagree."""
    roots = _archive.roots(probe.members, "data.pkl")
    if len(roots) > 1:
        raise InputError(f"holds {len(roots)} pickles named data.pkl", path=probe.file.path)
    root = roots[0]
    tree, constants = _pickled(probe, root, "data"), _pickled(probe, root, _CONSTANTS)
    storages = (f"{root}data/", f"{root}{_CONSTANTS}/")
    weighty = any(member.size for name, member in probe.members.items() if name.startswith(storages))
    try:
        why = _form(tree, _weights(constants), _Code(probe, root), weighty)
    except BadRecord as error:
        raise InputError(f"damaged: {error}", path=probe.file.path) from None
    return Document(probe.file.path, NAME, tree, lacks=why)


def _pickled(probe: Probe, root: str, archive: str) -> Any:
    locate = _archive.locator(probe, lambda key: f"{root}{archive}/{key}", _archive.byteorder(probe, root))
    known = {**builders(probe.limits), **_PLAIN}
    return _archive.unpickled(probe, f"{root}{archive}.pkl", known, persistent_loader(locate))


def _first(args: tuple[Any, ...]) -> Any:
    if not args:
        raise BadRecord("a TorchScript value without its contents")
    return args[0]


_PLAIN: dict[str, Builder] = {
    **{f"torch.jit._pickle.build_{kind}list": _first for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": _first,
}


class _Code:
    """The classes that an archive's code declares, read where they are asked for."""

    def __init__(self, probe: Probe, root: str) -> None:
        self.probe, self.root = probe, root
        self.files: dict[str, dict[str, Class]] = {}
        self.left = probe.limits.code_bytes

    def find(self, qualified: str) -> Class:
        """The class of a dotted name; BadRecord when the code does not declare it."""
        module, _, name = qualified.rpartition(".")
        path = f"{self.root}code/{module.replace('.', '/')}.py"
        if path not in self.files:
            self.files[path] = _classes.parse(self.text(path))
        if name not in self.files[path]:
            raise BadRecord(f"the class {qualified} is not in the archive's code")
        return self.files[path][name]

    def text(self, path: str) -> str:
        member = self.probe.members.get(path)
        if member is None:
            return ""
        raw = _archive.content(self.probe, member, self.left)
        self.left -= len(raw)
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


def _modules(tree: Any, code: _Code) -> dict[int, _Module]:
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


def _form(tree: Any, held: tuple[TensorRef, ...], code: _Code, weighty: bool) -> str | None:
    """Give the modules of `tree` the form of pickled ones, or say why there is no state dict.

    `held` are the constants of the code; `weighty` tells that the archive has bytes of tensors.
    """
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
        tree.state.setdefault(_CONSTANTS, held)
    return why


def _weights(constants: Any) -> tuple[TensorRef, ...]:
    """The tensors among the constants of the code, in their order."""
    members = constants if isinstance(constants, tuple | list) else ()
    return tuple(value for value in members if isinstance(value, TensorRef) and value.nbytes)

"""torch.package archives: `PackageExporter.save_pickle`.

A torch zip without an object of its own: pickles are resources of packages (`model/model.pkl`),
their storages lie in `.data/KEY.storage`, and `.data/extern_modules` marks the kind.  Script modules
that a pickle refers to by a number lie in `.data/ts_code/NUMBER`, with storages among the others and
one code for all of them.  The Python sources in it are never looked at.

Source: `torch/package/package_exporter.py` (`_persistent_id`), `package_importer.py` and
`ScriptModuleSerializer` in torch/csrc/jit/serialization/export_module.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptsurgeon.errors import InputError, quoted
from ckptsurgeon.formats import _archive, _scripted
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._rebuild import builders, graph_module
from ckptsurgeon.formats._tensors import Storages
from ckptsurgeon.formats._zip import Member
from ckptsurgeon.inert import Opaque

NAME = "torch-package"
_MARK = ".data/extern_modules"


def sniff(probe: Probe) -> bool:
    """Whether this is a zip archive with the mark of torch.package in its top folder."""
    return bool(_roots(probe))


def read(probe: Probe) -> Document:
    """The pickles in the archive by their names in it; InputError when one is damaged."""
    roots = _roots(probe)
    if len(roots) > 1:
        raise InputError(f"holds {len(roots)} packages", path=probe.file.path)
    root = roots[0]
    if f"{root}data.pkl" in probe.members:
        raise InputError("is a torch.package archive and a torch.save file at once", path=probe.file.path)
    locate = _archive.locator(probe, lambda key: f"{root}.data/{key}.storage", _archive.byteorder(probe, root))
    load = _with_reduced(Storages(locate), _Scripts(probe, root))
    known = builders(probe.limits)
    names = [name for name in probe.members if name.startswith(root) and not name.startswith(f"{root}.data/")]
    tree = {
        name.removeprefix(root): _archive.unpickled(probe, name, known, load)
        for name in names
        if name.endswith(".pkl") or _is_pickle(probe, probe.members[name])
    }
    if not tree:
        raise InputError("is a torch.package archive without a pickle", path=probe.file.path)
    return Document(probe.file.path, NAME, tree)


def _roots(probe: Probe) -> list[str]:
    found = [name.removesuffix(_MARK) for name in probe.members if name == _MARK or name.endswith(f"/{_MARK}")]
    return [root for root in found if root.count("/") <= 1]


def _is_pickle(probe: Probe, member: Member) -> bool:
    """Whether a resource of any name begins and ends as the pickles of torch.package do."""
    if member.deflated or member.size < 3 or member.name.endswith(".py"):
        return False
    protocol = probe.read(2, member.offset)
    return protocol[0] == 0x80 and protocol[1] <= 5 and probe.read(1, member.offset + member.size - 1) == b"."


class _Scripts:
    """The script modules of a package, each read once, where a pickle refers to it."""

    def __init__(self, probe: Probe, root: str) -> None:
        self.probe, self.root = probe, root
        self.code = _scripted.Code(probe, f"{root}.data/ts_code/code/")
        self.made: dict[str, Any] = {}

    def find(self, key: Any) -> Any:
        if key not in self.made:
            tree = self._pickled(key, "data")
            _scripted.form(tree, self._pickled(key, "constants"), self.code, weighty=True)
            self.made[key] = tree
        return self.made[key]

    def _pickled(self, key: str, what: str) -> Any:
        name = f"{self.root}.data/ts_code/{key}/{what}.pkl"
        if name not in self.probe.members:
            raise BadRecord(f"the script module {quoted(key)} is missing from the archive")
        order = _archive.byteorder(self.probe, self.root)
        locate = _archive.locator(self.probe, lambda storage: f"{self.root}.data/{storage}", order)
        known = _scripted.builders(self.probe.limits)
        return _archive.unpickled(self.probe, name, known, Storages(locate))


def _with_reduced(load: Callable[[Any], Any], scripts: _Scripts) -> Callable[[Any], Any]:
    """Persistent ids of packages: storages, whose keys are numbers, script modules, and objects that
    another function of the package would make, which are records here."""
    made: dict[int, Any] = {}

    def reduced(pid: Any) -> Any:
        if not isinstance(pid, tuple) or not pid or pid[0] not in ("reduce_package", "reduce_deploy"):
            if isinstance(pid, tuple) and len(pid) == 5 and type(pid[2]) is int:
                return load((*pid[:2], str(pid[2]), *pid[3:]))
            return load(pid)
        if len(pid) not in (3, 4) or not isinstance(pid[-1], tuple):
            raise BadRecord(f"a persistent id of the kind {pid[0]!r} that torch does not write")
        if len(pid) == 3 or type(pid[1]) is not int:
            return _made(pid[-2], pid[-1], scripts)
        if not 0 <= pid[1] < 1 << 61:
            raise BadRecord(f"an object has the number {quoted(pid[1])}")
        if pid[1] not in made:
            made[pid[1]] = _made(pid[-2], pid[-1], scripts)
        return made[pid[1]]

    return reduced


def _made(function: Any, args: tuple[Any, ...], scripts: _Scripts) -> Any:
    """What `function(importer, *args)` would make: a script module, or a record."""
    name = function.name if isinstance(function, Opaque) else "an object"
    if name == "torch.jit._script.unpackage_script_module" and len(args) == 1 and isinstance(args[0], str):
        return scripts.find(args[0])
    return graph_module(name, args)

"""torch.package archives: `PackageExporter.save_pickle`.

A torch zip without an object of its own: pickles are resources of packages (`model/model.pkl`),
their storages lie in `.data/KEY.storage`, and `.data/extern_modules` marks the kind.  The Python
sources in it are never looked at.

Source: `torch/package/package_exporter.py` (`_persistent_id`) and `package_importer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptsurgeon.errors import InputError
from ckptsurgeon.formats import _archive
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._rebuild import builders, graph_module
from ckptsurgeon.formats._tensors import persistent_loader
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
    locate = _archive.locator(probe, lambda key: f"{root}.data/{key}.storage", _archive.byteorder(probe, root))
    load = _with_reduced(persistent_loader(locate))
    known = builders(probe.limits)
    names = [name for name in probe.members if name.startswith(root) and name.endswith(".pkl")]
    tree = {
        name.removeprefix(root): _archive.unpickled(probe, name, known, load)
        for name in names
        if not name.startswith(f"{root}.data/")
    }
    if not tree:
        raise InputError("is a torch.package archive without a pickle", path=probe.file.path)
    return Document(probe.file.path, NAME, tree)


def _roots(probe: Probe) -> list[str]:
    found = [name.removesuffix(_MARK) for name in probe.members if name == _MARK or name.endswith(f"/{_MARK}")]
    return [root for root in found if root.count("/") <= 1]


def _with_reduced(load: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Persistent ids of packages: storages, whose keys are numbers, and objects that a function of
    the package would make, which are records here."""
    made: dict[int, Opaque] = {}

    def reduced(pid: Any) -> Any:
        if not isinstance(pid, tuple) or not pid or pid[0] not in ("reduce_package", "reduce_deploy"):
            if isinstance(pid, tuple) and len(pid) == 5 and type(pid[2]) is int:
                return load((*pid[:2], str(pid[2]), *pid[3:]))
            return load(pid)
        if len(pid) not in (3, 4) or not isinstance(pid[-1], tuple):
            raise BadRecord(f"a persistent id of the kind {pid[0]!r} that torch does not write")
        if len(pid) == 3 or type(pid[1]) is not int:
            return _record(*pid[-2:])
        return made.setdefault(pid[1], _record(*pid[-2:]))

    return reduced


def _record(function: Any, args: tuple[Any, ...]) -> Opaque:
    """What `function(importer, *args)` would make."""
    name = function.name if isinstance(function, Opaque) else "an object"
    return graph_module(name, args)

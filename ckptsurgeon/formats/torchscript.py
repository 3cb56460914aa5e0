"""TorchScript archives: `torch.jit.save`, `torch::save` of C++, and models of the lite interpreter.

A torch zip with `constants.pkl` beside `data.pkl`, whose object is of classes that `code/…py`
declares.  Its state dict is what `torch.jit.load(…).state_dict()` gives.

Source: torch/csrc/jit/serialization/export_module.cpp and import.cpp.
"""

from __future__ import annotations

from typing import Any

from ckptsurgeon.errors import InputError
from ckptsurgeon.formats import _archive, _scripted
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._tensors import Storages

NAME = "torchscript"


def sniff(probe: Probe) -> bool:
    """Whether this is a torch zip with the constants of code beside its object."""
    return any(f"{root}constants.pkl" in probe.members for root in _archive.roots(probe.members, "data.pkl"))


def read(probe: Probe) -> Document:
    """The module in the archive; InputError when it is damaged, or its code and data disagree."""
    roots = _archive.roots(probe.members, "data.pkl")
    if len(roots) > 1:
        raise InputError(f"holds {len(roots)} pickles named data.pkl", path=probe.file.path)
    root = roots[0]
    tree, constants = _pickled(probe, root, "data"), _pickled(probe, root, "constants")
    storages = (f"{root}data/", f"{root}constants/")
    weighty = any(member.size for name, member in probe.members.items() if name.startswith(storages))
    try:
        why = _scripted.form(tree, constants, _scripted.Code(probe, f"{root}code/"), weighty)
    except BadRecord as error:
        raise InputError(f"damaged: {error}", path=probe.file.path) from None
    return Document(probe.file.path, NAME, tree, lacks=why)


def _pickled(probe: Probe, root: str, archive: str) -> Any:
    locate = _archive.locator(probe, lambda key: f"{root}{archive}/{key}", _archive.byteorder(probe, root))
    known = _scripted.builders(probe.limits)
    return _archive.unpickled(probe, f"{root}{archive}.pkl", known, Storages(locate))

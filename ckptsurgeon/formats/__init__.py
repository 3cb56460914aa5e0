"""file ⇄ Checkpoint: the table of formats, and what all of them share.

A format joins by a line in `FORMATS`; nothing elsewhere changes.  Readers are found by content,
never by name; writers by the output's suffix.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ckptsurgeon.checkpoint import Checkpoint, Step
from ckptsurgeon.errors import InputError, Problem, UsageError
from ckptsurgeon.formats import (
    _foreign,
    _tree,
    safetensors,
    torch_legacy,
    torch_package,
    torch_tar,
    torch_zip,
    torchscript,
)
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._layout import Layout
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._tree import Candidate
from ckptsurgeon.limits import DEFAULT, Limits
from ckptsurgeon.sources import File

__all__ = [
    "FORMATS",
    "Candidate",
    "Document",
    "Format",
    "Layout",
    "check_extras",
    "inspect",
    "layout",
    "optimizers",
    "problems",
    "summary",
    "writer_for",
]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    `sniff` looks at the beginning, or at an archive's directory; `read` makes the Document;
    `suffixes` are what an output of this kind is called (none: it is only read); `problems` says
    what the kind cannot hold, and `layout` lays out a file of it; `extras` tells whether it holds
    more than tensors.
    """

    name: str
    sniff: Callable[[Probe], bool]
    read: Callable[[Probe], Document]
    suffixes: tuple[str, ...] = ()
    extras: bool = False
    problems: Callable[[Checkpoint], list[Problem]] = lambda ckpt: []
    layout: Callable[[Checkpoint, Any], Layout] | None = None


FORMATS: tuple[Format, ...] = (
    Format(
        safetensors.NAME,
        safetensors.sniff,
        safetensors.read,
        (".safetensors",),
        problems=safetensors.problems,
        layout=safetensors.layout,
    ),
    Format(torch_package.NAME, torch_package.sniff, torch_package.read),
    Format(torchscript.NAME, torchscript.sniff, torchscript.read),
    Format(
        torch_zip.NAME,
        torch_zip.sniff,
        torch_zip.read,
        (".pth", ".pt", ".bin", ".ckpt"),
        extras=True,
        problems=torch_zip.problems,
        layout=torch_zip.layout,
    ),
    Format(torch_legacy.NAME, torch_legacy.sniff, torch_legacy.read),
    Format(torch_tar.NAME, torch_tar.sniff, torch_tar.read),
)


def inspect(path: str | os.PathLike[str], limits: Limits = DEFAULT) -> Document:
    """The whole object in a checkpoint file, as inert data; only headers are read.

    Raises InputError when the file is missing, damaged, or of no known kind.
    """
    name = os.fspath(path)
    descriptor = _open(name)
    try:
        probe = Probe.of(File.of(name, os.fstat(descriptor)), descriptor, limits)
        for format in FORMATS:
            if format.sniff(probe):
                return format.read(probe)
        cause, hint = _foreign.describe(probe)
        raise InputError(cause, path=name, hint=hint or f"readable are {_kinds()}")
    finally:
        os.close(descriptor)


def _kinds() -> str:
    return ", ".join(format.name for format in FORMATS)


def _open(path: str) -> int:
    """A descriptor of a regular file: never a FIFO or a device, which could block or never end."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError("is a folder, not a checkpoint file", path=path)
        if not stat.S_ISREG(mode):
            raise InputError("is no regular file", path=path)
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError("no such file", path=path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be opened: {getattr(error, 'strerror', None) or error}", path=path) from None


def writer_for(path: str | os.PathLike[str]) -> Format:
    """The format that an output's suffix names; UsageError for any other suffix."""
    name = os.path.basename(os.fspath(path))
    suffix = os.path.splitext(name)[1].lower()
    for format in FORMATS:
        if suffix in format.suffixes:
            return format
    known = ", ".join(suffix for format in FORMATS for suffix in format.suffixes)
    raise UsageError(f"{os.fspath(path)}: the suffix {suffix or '(none)'} names no format to write; use one of {known}")


def layout(ckpt: Checkpoint, format: Format, keep_extras: bool = False) -> tuple[Layout, list[str]]:
    """The file that `format` makes of a checkpoint, and the names of the extras that are not in it.

    Without `keep_extras` the file is the flat state dict.  Raises UsageError for a format without
    a writer, or one that cannot hold the extras which are to be kept.
    """
    if format.layout is None:
        raise UsageError(f"{format.name} files are only read; write a torch zip (.pth) or .safetensors")
    check_extras(ckpt.extras if keep_extras else None, format)
    plain = {key: replace(ref, stored=None) for key, ref in ckpt.items()}  # tensors, not parameters
    state = _tree.StateDict(plain, ckpt.versions)
    if not keep_extras or not ckpt.extras:
        return format.layout(ckpt, _cleaned(state)), []
    from ckptsurgeon.formats import _pickler

    select, place = _place(ckpt)
    placed, opened = _tree.insert(ckpt.extras, select, place, state)
    root, lost = _pickler.cleaned(placed)
    return format.layout(ckpt, root), [*opened, *lost]


def _cleaned(state: _tree.StateDict) -> _tree.StateDict:
    """Without module versions that are no plain data; a flat state dict holds nothing else to lose."""
    from ckptsurgeon.formats import _pickler

    return _pickler.cleaned(state)[0] if state.versions else state


def _place(ckpt: Checkpoint) -> tuple[tuple[Step, ...], int | None]:
    return (ckpt.origin.select, ckpt.origin.place) if ckpt.origin else ((), None)


def problems(ckpt: Checkpoint, format: Format, keep_extras: bool) -> list[Problem]:
    """What a file of this format cannot hold of a checkpoint, and names that kept extras have too."""
    found = format.problems(ckpt)
    if keep_extras:
        clashes = [name for name in _tree.beside(ckpt.extras, *_place(ckpt)) if name in ckpt.tensors]
        found += [
            Problem(f"{name!r} is a tensor now and something else in the source; rename it", key=name, kind="collision")
            for name in clashes
        ]
    return found


def check_extras(extras: Any, format: Format) -> None:
    """UsageError when there are extras to be kept that `format` cannot hold."""
    if extras and not format.extras:
        raise UsageError(
            f"{format.name} holds tensors only, and --keep-extras asks to keep {summary(extras)}; write a .pth"
        )


def optimizers(extras: Any) -> list[str]:
    """The places of optimizer state in the extras."""
    return _tree.optimizers(extras)


def summary(extras: Any) -> str:
    """The names of the extras, for a sentence."""
    if isinstance(extras, dict):
        names = [str(key) for key in extras]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return _tree.describe(extras)

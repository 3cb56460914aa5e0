"""The table of formats, and opening a file by it.

A format joins by a line in `FORMATS`; nothing elsewhere changes.  Readers are found by content,
never by name.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.collecting import uncollected
from ckptsurgeon.errors import InputError, LimitError, Problem
from ckptsurgeon.formats import (
    _folder,
    safetensors,
    sharded,
    torch_dcp,
    torch_legacy,
    torch_package,
    torch_tar,
    torch_zip,
    torchscript,
)
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._layout import Layout
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.limits import Limits, account, current
from ckptsurgeon.sources import Deflate, Extent, File, Record


@dataclass(frozen=True)
class Format:
    """One kind of file.

    `sniff` looks at the beginning, or at an archive's directory; `read` makes the Document;
    `suffixes` are what an output of this kind is called (none: it is only read); `problems` says
    what the kind cannot hold, and `layout` lays out a file of it; `extras` tells whether it holds
    more than tensors.  `shards` is the format of the shards of a sharded kind; `listed` says why the
    tensors of a kind are listed and not read.
    """

    name: str
    sniff: Callable[[Probe], bool]
    read: Callable[[Probe], Document]
    suffixes: tuple[str, ...] = ()
    extras: bool = False
    problems: Callable[[Checkpoint], list[Problem]] = lambda ckpt: []
    layout: Callable[[Checkpoint, Any, str | None], Layout] | None = None
    shards: str = ""
    listed: str = ""


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
    Format(torch_dcp.NAME, torch_dcp.sniff, torch_dcp.read, listed=torch_dcp.LISTED),
    Format(
        sharded.SAFETENSORS, sharded.sniff, lambda probe: sharded.read(probe, _shard(probe)), shards=safetensors.NAME
    ),
    Format(sharded.TORCH_ZIP, lambda probe: False, torch_zip.read, shards=torch_zip.NAME),
)


def named(name: str) -> Format:
    """The format of this name."""
    return next(format for format in FORMATS if format.name == name)


def inspect(path: str | os.PathLike[str], limits: Limits | None = None) -> Document:
    """The whole object in a checkpoint file, as inert data; only headers are read.

    Raises InputError when the file is missing, damaged, or of no known kind.
    """
    name, limits = os.fsdecode(path), limits or current()
    with uncollected(), _readable(name), account(limits):
        if os.path.isdir(name):
            return _folder.read(name, lambda inner: inspect(inner, limits))
        return _inspect(name, limits)


def _inspect(name: str, limits: Limits, *, is_shard: bool = False) -> Document:
    """A file; a shard is never an index, which could name itself and have no end."""
    descriptor = _open(name)
    try:
        with _readable(name):
            return _read(name, descriptor, limits, is_shard)
    finally:
        os.close(descriptor)


def _read(name: str, descriptor: int, limits: Limits, is_shard: bool) -> Document:
    probe = Probe.of(File.of(name, os.fstat(descriptor)), descriptor, limits)
    for format in FORMATS:
        if format.sniff(probe):
            if is_shard and format.shards:
                raise sharded.nested(name)
            return format.read(probe)
    from ckptsurgeon.formats import _foreign  # and the decompressors that only it needs

    cause, hint = _foreign.describe(probe)
    raise InputError(cause, path=name, hint=hint or f"readable are {_kinds()}")


@contextlib.contextmanager
def probe(path: str, limits: Limits | None = None) -> Iterator[Probe]:
    """A file as its format sees it, open for as long as the context lasts; InputError."""
    descriptor = _open(path)
    try:
        with _readable(path):
            opened = Probe.of(File.of(path, os.fstat(descriptor)), descriptor, limits or current())
        yield opened
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """What the system refuses while a header is read becomes an InputError about `path`; a limit that is met deep
    inside, where the name of the file is not known, gets it."""
    try:
        yield
    except LimitError as error:
        error.path = error.path or path
        raise
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", path=path) from error


def members(path: str) -> list[Extent]:
    """Every member of a zip archive with its checksum, tensors or not; nothing for other files."""
    with probe(path) as opened:
        file, found = opened.file, opened.members.values()
    made: list[Extent] = []
    for member in found:
        begin = 0 if member.deflated else member.offset
        codec = Deflate(member.offset, member.packed) if member.deflated else None
        record = Record(member.name, begin, member.size, member.crc)
        made.append(Extent(file, begin, member.size, codec=codec, record=record))
    return made


def _shard(index: Probe) -> Callable[[str], Document]:
    return lambda path: _inspect(path, index.limits, is_shard=True)


def _kinds() -> str:
    return ", ".join(format.name for format in FORMATS)


def _open(path: str) -> int:
    """A descriptor of a regular file: never a FIFO or a device, which could block or never end."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise InputError("is no regular file", path=path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # what the path leads to now
            os.close(descriptor)
            raise InputError("is no regular file", path=path)
        return descriptor
    except FileNotFoundError:
        raise _folder.unfinished(path) or InputError("no such file", path=path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be opened: {getattr(error, 'strerror', None) or error}", path=path) from None

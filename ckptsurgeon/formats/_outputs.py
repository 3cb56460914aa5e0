"""From a checkpoint to the files that hold it: which format, what it cannot hold, and its layout."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ckptsurgeon import charges
from ckptsurgeon.checkpoint import Checkpoint, Step
from ckptsurgeon.errors import InputError, Problem, UsageError
from ckptsurgeon.evaluate import ABSENT_HINT
from ckptsurgeon.formats import _aliases, _splice, _tree, safetensors, sharded
from ckptsurgeon.formats._layout import Layout
from ckptsurgeon.formats._table import FORMATS, Format, named
from ckptsurgeon.tensor import TensorRef

Tied = Literal["full", "alias"]
SHARD_SIZE = 5_000_000_000
"""Bytes of a shard, as huggingface_hub cuts them."""
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE | re.ASCII)
_INDEX = ".index.json"


@dataclass(frozen=True)
class Output:
    """Where a checkpoint goes and how.

    `path` is the file; for a sharded format it is the index, and `folder` tells whether the name
    of a folder was given, in which one shard alone needs no index.
    """

    path: str
    format: Format
    shard_size: int = 0
    folder: bool = False
    tied: Tied = "full"

    @property
    def holder(self) -> Format:
        """The format that the tensors themselves are written in."""
        return named(self.format.shards) if self.format.shards else self.format

    def is_kin(self, name: str) -> bool:
        """Whether a file of this name, in the same folder, is an earlier output of the same kind: a
        reader would mix it with the new one, or take it instead."""
        if not self.format.shards:
            return False
        index = os.path.basename(self.path)
        stem, suffix = sharded.parts_of(index)
        return name in (stem + suffix, index) or bool(
            re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+{re.escape(suffix)}", name)
        )


def output(path: str | os.PathLike[str], shard_size: int | str | None = None, tied: Tied = "full") -> Output:
    """The output that a path names: by its suffix, or a folder of shards.

    A folder is one that exists, a name that ends with `/`, or with `shard_size` a name without a
    suffix.  `shard_size` is in bytes, or a text such as `5GB`.  Raises UsageError.
    """
    name = os.fsdecode(path)
    if not name:
        raise UsageError("the output has no name; `.` is the current folder")
    size = parse_size(shard_size, "a shard size") or 0
    if tied not in ("full", "alias"):
        raise UsageError(f"tied is 'full' or 'alias', not {tied!r}")
    base = os.path.basename(name)
    suffix = os.path.splitext(base)[1].lower()
    known = any(suffix in format.suffixes for format in FORMATS)
    if not base or (os.path.isdir(name) and not known) or (size and not suffix):
        index = os.path.join(name, f"model.safetensors{_INDEX}")
        return Output(index, named(sharded.SAFETENSORS), size or SHARD_SIZE, folder=True, tied=tied)
    if base.lower().endswith(_INDEX):
        inner = os.path.splitext(base[: -len(_INDEX)])[1].lower() or ".safetensors"
        kind = {".safetensors": sharded.SAFETENSORS}.get(inner) or (sharded.TORCH_ZIP if inner in _torch() else "")
        if not kind:
            raise UsageError(f"{name}: no shards can be named so; use NAME.safetensors{_INDEX} or NAME.bin{_INDEX}")
        return Output(name, named(kind), size or SHARD_SIZE, tied=tied)
    format = writer_for(name)
    if size:
        index = f"{os.path.splitext(base)[0]}.safetensors{_INDEX}"
        raise UsageError(f"{name}: --shard-size makes several files; name a folder, or {index}")
    return Output(name, format, tied=tied)


def _torch() -> tuple[str, ...]:
    return next(format.suffixes for format in FORMATS if format.extras)


def parse_size(given: int | str | None, what: str) -> int | None:
    """Bytes of a number, or of a text such as `5GB`; UsageError, about `what`, for anything else."""
    if given is None:
        return None
    if type(given) is int and given > 0:
        return given
    found = _SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is not None:
        power = " kmgt".index((found[2] or " ").lower())
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
        if size > 0:
            return size
    raise UsageError(f"{what} is a number of bytes such as 5GB or 512MiB, not {given!r}")


def writer_for(path: str | os.PathLike[str]) -> Format:
    """The format that an output's suffix names; UsageError for any other suffix."""
    name = os.path.basename(os.fspath(path))
    suffix = os.path.splitext(name)[1].lower()
    for format in FORMATS:
        if suffix in format.suffixes:
            return format
    known = ", ".join(suffix for format in FORMATS for suffix in format.suffixes)
    raise UsageError(
        f"{os.fspath(path)}: the suffix {suffix or '(none)'} names no format to write; use one of {known}, "
        "or a folder (NAME/) for shards"
    )


def files(
    ckpt: Checkpoint, output: Output, keep_extras: bool = False, provenance: str | None = None
) -> tuple[list[tuple[str, Layout]], list[str]]:
    """The files that an output consists of, in the order in which they come into being (an index is
    the last), and the names of the extras that are in none of them.

    Without `keep_extras` they hold the flat state dict.  The text of the `provenance` stands in the index of
    shards, or in the one file.  Raises UsageError for extras which are to be kept and cannot be.
    """
    check_extras(ckpt.extras if keep_extras else None, output.format)
    safe = output.holder.name == safetensors.NAME
    notes = tuple(safetensors.notes(ckpt)) if safe else ()
    ckpt = safetensors.expanded(ckpt) if safe else ckpt
    aliased = safe and output.tied == "alias"
    if not output.format.shards:
        layout, lost = _layout(_aliases.collapsed(ckpt) if aliased else ckpt, output.format, keep_extras, provenance)
        _charge([layout])
        return [(output.path, replace(layout, notes=notes))], lost
    made = _shards(ckpt, output, aliased, provenance)
    _charge([layout for _, layout in made])
    return [*made[:-1], (made[-1][0], replace(made[-1][1], notes=notes))], []


def _charge(layouts: Sequence[Layout]) -> None:
    """LimitError for an output that is many times what lies in the source."""
    refs = (part for layout in layouts for part in layout.parts if isinstance(part, TensorRef))
    charges.writing(refs, sum(layout.nbytes for layout in layouts))


def _shards(ckpt: Checkpoint, output: Output, aliased: bool, provenance: str | None) -> list[tuple[str, Layout]]:
    """Shards and their index; in a folder one shard alone has none."""
    together: Literal["spec", "dtype"] | None = "spec" if aliased else "dtype" if output.holder.extras else None
    parts = sharded.split(ckpt, output.shard_size, together)
    if aliased:
        parts = [_aliases.collapsed(part) for part in parts]
    alone = output.folder and len(parts) == 1
    laid_out = [_layout(part, output.holder, False, provenance if alone else None)[0] for part in parts]
    if alone:
        return [(output.path.removesuffix(_INDEX), laid_out[0])]
    folder, base = os.path.split(output.path)
    names = sharded.shard_names(base, len(parts))
    place = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    total = sum(sharded.nbytes(part.values(), together=output.holder.extras) for part in parts)
    index = sharded.index_bytes({key: place[key] for key in ckpt if key in place}, total, provenance)
    made = [(os.path.join(folder, name), layout) for name, layout in zip(names, laid_out, strict=True)]
    return [*made, (output.path, Layout((index,)))]


def _layout(ckpt: Checkpoint, format: Format, keep_extras: bool, provenance: str | None) -> tuple[Layout, list[str]]:
    assert format.layout is not None
    plain = {key: replace(ref, stored=None) for key, ref in ckpt.items()}  # a state dict's are no parameters
    state = _splice.StateDict(plain, ckpt.versions)
    keys = {id(ref): key for refs in (ckpt, plain) for key, ref in refs.items()}
    if not keep_extras or not has_place(ckpt):
        return replace(format.layout(ckpt, _cleaned(state), provenance), keys=keys), []
    from ckptsurgeon.formats import _pickler

    select, place = _place(ckpt)
    placed, opened = _splice.insert(ckpt.extras, select, place, state)
    root, lost = _pickler.cleaned(placed)
    return replace(format.layout(ckpt, root, provenance), keys=keys), [*opened, *lost]


def has_place(ckpt: Checkpoint) -> bool:
    """Whether there is anything around the state dict to keep: extras, or the place where it was beside some that could
    not follow a surgery."""
    followed = ckpt.derived is not None and ckpt.derived.followed
    return bool(ckpt.extras) or (followed and ckpt.origin is not None and bool(ckpt.origin.select))


def _cleaned(state: _splice.StateDict) -> _splice.StateDict:
    """Without module versions that are no plain data; a flat state dict holds nothing else to lose."""
    from ckptsurgeon.formats import _pickler

    return _pickler.cleaned(state)[0] if state.versions else state


def _place(ckpt: Checkpoint) -> tuple[tuple[Step, ...], int | None]:
    return (ckpt.origin.select, ckpt.origin.place) if ckpt.origin else ((), None)


def problems(ckpt: Checkpoint, output: Output, keep_extras: bool) -> list[Problem]:
    """What this output cannot hold of a checkpoint, and names that kept extras have too."""
    found = [
        Problem(f"{key!r} is {ref.absent}: the file does not hold its bytes; {ABSENT_HINT}", key=key, kind="absent")
        for key, ref in ckpt.items()
        if ref.absent is not None
    ]
    found += output.holder.problems(ckpt)
    if keep_extras:
        clashes = [name for name in _splice.beside(ckpt.extras, *_place(ckpt)) if name in ckpt.tensors]
        found += [
            Problem(f"{name!r} is a tensor now and something else in the source; rename it", key=name, kind="collision")
            for name in clashes
        ]
    return found


def check_readable(ckpt: Checkpoint) -> None:
    """InputError for a checkpoint of a kind whose tensors are listed and not read."""
    if ckpt.origin is not None and (why := named(ckpt.origin.format).listed):
        raise InputError(why, path=ckpt.origin.path)


def check_extras(extras: Any, format: Format) -> None:
    """UsageError when there are extras to be kept that `format` cannot hold."""
    if extras and not format.extras:
        raise UsageError(
            f"{format.name} holds tensors only, and --keep-extras asks to keep {_tree.summary(extras)}; write a .pth"
        )

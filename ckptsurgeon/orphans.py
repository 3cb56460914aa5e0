"""Files beside a checkpoint that belong to nobody: shards that no index names, and what killed runs left."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckptsurgeon.formats import JOURNAL, Document, numbered, parts_of
from ckptsurgeon.stream import is_held, staged_for

_INDEX = ".index.json"


@dataclass(frozen=True)
class Orphan:
    """A name in the checkpoint's folder, and what it is."""

    name: str
    text: str


def of(document: Document) -> tuple[Orphan, ...]:
    """What lies beside a checkpoint and is no part of it, by name; other checkpoints in the folder are none of this.

    Names alone are looked at, and nothing is opened but what a run may still hold.  A folder that may not be listed
    has none.
    """
    folder = document.path if os.path.isdir(document.path) else os.path.dirname(document.path)
    try:
        names = sorted(
            entry.name for entry in os.scandir(folder or ".") if not entry.is_dir() or staged_for(entry.name)
        )
    except OSError:
        return ()
    own = {os.path.basename(path) for path in (document.path, *document.shards)}
    return (*_shards(document, names, own), *_left(folder, names, own))


def _shards(document: Document, names: Iterable[str], own: set[str]) -> Iterator[Orphan]:
    if not document.shards or os.path.isdir(document.path):
        return
    index = os.path.basename(document.path)
    kin = {(stem, suffix) for stem, suffix, _ in numbered(own)}
    kin |= {parts_of(index)} if index.lower().endswith(_INDEX) else set()
    groups = numbered(name for name in names if name not in own)
    for (stem, suffix, _), found in groups.items():
        for name in found.values() if (stem, suffix) in kin else ():
            yield Orphan(name, f"{index} does not name it")
    for whole in sorted({stem + suffix for stem, suffix in kin} & set(names) - own):
        yield Orphan(whole, f"many programs load it instead of {index}")


def _left(folder: str, names: Iterable[str], own: set[str]) -> Iterator[Orphan]:
    for name in names:
        base = staged_for(name)
        journal = JOURNAL.fullmatch(name)
        if base is not None and _concerns(base, own) and not _is_held(os.path.join(folder, name)):
            yield Orphan(name, "a run that was killed left it; the next one that writes there removes it")
        elif base is None and journal is not None and journal[1] in own:
            yield Orphan(name, "shards were taking their places when their writer was stopped; --repair finishes it")


def _is_held(path: str) -> bool:
    try:
        return is_held(path)
    except OSError:  # a link, or what this user may not open
        return False


def _concerns(base: str, own: set[str]) -> bool:
    """Whether what was staged was to become one of these files, or shards of the same name."""
    journal = JOURNAL.fullmatch(base)
    name = journal[1] if journal is not None else base
    ours = {group[:2] for group in numbered(own)}
    return name in own or any(group[:2] in ours for group in numbered([name]))

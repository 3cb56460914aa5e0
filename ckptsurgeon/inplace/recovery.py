"""What an interrupted in-place change left: taken back before its turning point, completed after it.

Everything is looked at before anything is written: each side file must fit its file, byte by byte, or the file must be
whole without it.  Doing it again after being killed in the middle comes to the same end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckptsurgeon import formats, writing
from ckptsurgeon.errors import OutputError
from ckptsurgeon.formats import safetensors, sharded, sidefile
from ckptsurgeon.formats.sidefile import Emptied, Pending
from ckptsurgeon.inplace import disk
from ckptsurgeon.limits import current


def recover(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Put right what an interrupted change left of a file, an index and its shards, or a folder; what was done, in
    words, and nothing where nothing was left.

    Raises InputError when a side file does not fit a file that is damaged without it, OutputError when it cannot be
    written.
    """
    name = os.path.realpath(os.fsdecode(path))
    if not os.path.isdir(name):
        return _recover(name)
    document = formats.inspect(name)
    names = document.shards if os.path.isdir(document.path) else (document.path,)
    return tuple(words for inner in names for words in _recover(os.path.realpath(inner)))


def _recover(path: str) -> tuple[str, ...]:
    index = _index_of(path)
    if index is not None:
        path = index
    if not any(map(os.path.lexists, _traces(path))):
        return ()
    with formats.probe(path) as probe:
        is_index = not safetensors.sniff(probe)
    with disk.locked(path, is_index) as lock:
        return mend(path, lock)


def _index_of(path: str) -> str | None:
    """The index of the set that a shard's side file makes it a part of."""
    with formats.probe(path) as probe:
        pending = sidefile.of_file(path, probe.file.size, probe.read, current()) if safetensors.sniff(probe) else None
    if pending is None or pending.side is None or pending.side.part_of is None:
        return None
    index = os.path.join(os.path.dirname(path), pending.side.part_of)
    return index if os.path.isfile(index) else None


def _traces(path: str) -> Iterator[str]:
    """The names of all files that a change of it may leave."""
    with formats.probe(path) as probe:
        is_index = not safetensors.sniff(probe) and sharded.sniff(probe)
        shards = set(sharded.read_index(probe).weight_map.values()) if is_index else set()
    folder = os.path.dirname(path)
    yield from _traces_of(path)
    for name in shards:
        yield from _traces_of(os.path.join(folder, name))


def _traces_of(path: str) -> tuple[str, str, str]:
    side = sidefile.beside(path)
    return side, disk.staged_name(side), disk.staged_name(path)


def refuse_pending(path: str, files: Iterable[str]) -> None:
    """OutputError when a change was interrupted since the plan was made."""
    if any(os.path.lexists(sidefile.beside(name)) for name in (path, *files)):
        raise OutputError(path, "an in-place change of it was interrupted just now; run the command again")


@dataclass(frozen=True)
class _Member:
    """A data file and what lies beside it."""

    path: str
    pending: Pending | None


def mend(path: str, lock: disk.Lock, outcome: str = "what is left stays, and can be repaired") -> tuple[str, ...]:
    """Take back or complete what was begun of a file that is held, and of its shards; `outcome` is what an error says
    of the state that it leaves."""
    with formats.probe(path) as probe:
        is_index = not safetensors.sniff(probe)
        if is_index:
            text, index = probe.read(probe.file.size, 0), sharded.read_index(probe)
    if is_index:
        with writing.failures(path, outcome):
            return _mend_set(path, lock, text, index)
    member = _member(path)
    with writing.failures(path, outcome):
        _put_right(member)
        _clean([path])
    return () if member.pending is None else (_words(path, member.pending),)


def _member(path: str) -> _Member:
    """A data file; InputError when its side file does not fit it and it is damaged without."""
    with formats.probe(path) as probe:
        pending = sidefile.of_file(path, probe.file.size, probe.read, current())
        if pending is not None and pending.state == "stale":
            safetensors.header(probe)
    return _Member(path, pending)


def _mend_set(path: str, lock: disk.Lock, text: bytes, index: sharded.Index) -> tuple[str, ...]:
    pending = sidefile.of_index(path, text, current())
    side = None if pending is None else pending.side
    folder = os.path.dirname(path)
    names = set(index.weight_map.values()) | set(side.shards if side is not None else ())
    places = sorted(os.path.join(folder, name) for name in names)
    members = [_member(place) for place in places if os.path.isfile(place)]
    for member in members:
        _put_right(member)
    if pending is not None and side is not None:
        if pending.state == "before" and text != side.old:
            lock.replace(side.old, os.stat(path).st_mode)
        if pending.state == "after":
            _remove_emptied(folder, side.emptied, set(index.weight_map.values()))
    writing.sync_folder(folder)
    _clean(places)
    _clean([path])
    left = [member.pending for member in members if member.pending is not None]
    found = [pending] if pending is not None else left[:1]
    return tuple(_words(path, one) for one in found)


def _put_right(member: _Member) -> None:
    pending = member.pending
    if pending is None or pending.side is None or pending.state not in ("before", "after"):
        return
    descriptor = os.open(member.path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if pending.state == "before":
            # what is there already is not written again: the disk may be full
            if disk.read(descriptor, len(pending.side.old)) != pending.side.old:
                writing.put(descriptor, pending.side.old, 0)
        elif os.fstat(descriptor).st_size != pending.side.after:
            os.ftruncate(descriptor, pending.side.after)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_emptied(folder: str, emptied: Iterable[Emptied], named: set[str]) -> None:
    """Shards that have no tensor any more, if they are still those of the change."""
    for one in emptied:
        path = os.path.join(folder, one.name)
        if one.name in named or os.path.islink(path) or not os.path.isfile(path):
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # a side file is a claim too: what goes is a safetensors file with the very header that it had
            size, length = os.fstat(descriptor).st_size, min(one.header, current().safetensors_header + 8)
            raw = disk.read(descriptor, length)
            whole = raw[8:9] == b"{" and 8 + int.from_bytes(raw[:8], "little") == one.header == len(raw)
            same = whole and size == one.size and hashlib.sha256(raw).hexdigest() == one.digest
        finally:
            os.close(descriptor)
        if same:
            disk.remove(path)


def _clean(paths: Iterable[str]) -> None:
    """The side files of files, and what was being written beside them; synced when it is gone."""
    folders = set()
    for path in paths:
        if [place for place in _traces_of(path) if disk.remove(place)]:
            folders.add(os.path.dirname(path))
    for folder in folders:
        writing.sync_folder(folder)


def _words(path: str, pending: Pending) -> str:
    if pending.state == "before":
        return f"{path}: an in-place change was interrupted, and is taken back"
    if pending.state == "after":
        return f"{path}: an in-place change was interrupted at its end, and is completed"
    return f"{pending.path}: left of an in-place change, and removed"

"""Side files of in-place changes, and what a reader takes from them.

`.NAME.inplace` lies beside NAME while the header of NAME is rewritten.  It holds the beginning of the file as it was
and as it is to be, and ends with a digest of itself.  Until it says `redo` the change is not made: whatever of the
new header is in the file already, the old one counts.  The side file of a shard leaves that word to the side file of
its index, so that one rename turns all shards at once.

Readers write nothing.  Everything in a side file is a claim: it counts only where each byte of the file's beginning
is the old or the new one (a header that is half written is a mixture of both) and the file's size is one of the two.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from ckptsurgeon.errors import InputError, quoted
from ckptsurgeon.evaluate import read_exactly
from ckptsurgeon.formats import _json
from ckptsurgeon.limits import Limits

SUFFIX = ".inplace"
_MAGIC = b"ckptsurgeon in-place 1\n"
_DIGEST = 32
_SLACK = 1 << 20
"""Bytes of what a side file says beside the two beginnings."""
_STEP = 4096

State = Literal["before", "after", "idle", "stale"]


class BadSide(Exception):
    """A side file that cannot be what it poses as (a short cause)."""


@dataclass(frozen=True)
class Emptied:
    """A shard that has no tensor left and goes once the change is made: its name, its size, and the SHA-256 of
    its first `header` bytes."""

    name: str
    size: int
    header: int
    digest: str


@dataclass(frozen=True)
class Side:
    """What a side file holds.

    `name` is the file it is about, `run` what the side files of one change have in common, `before` and `after` are
    the file's sizes, `old` and `new` its beginnings (of an index: the whole).  That of a shard is `part_of` an index;
    that of an index names the `shards` that are rewritten and those that are `emptied`.
    """

    name: str
    run: str
    before: int
    after: int
    old: bytes
    new: bytes
    redo: bool = False
    part_of: str | None = None
    shards: tuple[str, ...] = ()
    emptied: tuple[Emptied, ...] = ()


@dataclass(frozen=True)
class Pending:
    """What a side file means for the file that it lies beside.

    `before`: the old beginning counts, `.side.old`; `after`: the file's own, and its size is `size`, whatever
    follows; `idle`: the change has not begun or is done, the file's own counts; `stale`: it is of another state of
    the file, or damaged, and says nothing.
    """

    path: str
    state: State
    side: Side | None
    size: int

    @property
    def remark(self) -> str:
        """What a reader says of it."""
        subject = os.path.basename(self.path)
        what = "" if self.side is None else self.side.part_of or self.side.name
        if self.state == "before":
            words, end = f"an in-place change of {what} was interrupted; it is read as it was before", "puts it back"
        elif self.state == "after":
            words, end = f"an in-place change of {what} was interrupted at its end", "completes it"
        elif self.state == "idle":
            words, end = f"{subject} is left of an in-place change, and changes nothing", "removes it"
        else:
            words, end = f"{subject} is of another state of the file, and not used", "removes it"
        return f"{words}; `ckpt verify --repair` {end}"


def beside(path: str) -> str:
    """The side file of a file."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}{SUFFIX}")


def encoded(side: Side) -> bytes:
    """The bytes of a side file."""
    told = {key: value for key, value in asdict(side).items() if key not in ("old", "new")}
    head = json.dumps({**told, "regions": [len(side.old), len(side.new)]}).encode()
    if len(head) > _SLACK:
        raise InputError(f"has too many shards ({len(side.shards)}) to be changed in place", path=side.name)
    body = b"".join((_MAGIC, len(head).to_bytes(8, "little"), head, side.old, side.new))
    return body + hashlib.sha256(body).digest()


def load(path: str, region: int) -> Side | None:
    """The side file at a path, of beginnings of at most `region` bytes each; None when there is none.

    Raises BadSide when it is damaged, or too large to be one; InputError when it may be one and cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise BadSide("is no regular file") from None
        hint = "it may hold the header that counts"
        raise InputError(f"cannot be opened: {error.strerror}", path=path, hint=hint) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BadSide("is no side file")
        return _decoded(partial(_read, descriptor, path), found.st_size, region)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSide(f"is damaged: {error}") from None
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: str, at: int, size: int) -> bytes:
    return bytes(read_exactly(descriptor, size, at, path))


def _decoded(read: Callable[[int, int], bytes], size: int, region: int) -> Side:
    """A side file of `size` bytes, read a part at a time: what it holds can be as large as what it is about."""
    at, end = len(_MAGIC) + 8, size - _DIGEST
    head = read(0, at) if size > at + _DIGEST else b""
    length = int.from_bytes(head[-8:], "little")
    if head[:-8] != _MAGIC or length > min(end - at, _SLACK):
        raise ValueError("it does not begin as one")
    text = read(at, length)
    told: dict[str, Any] = _json.loads(text)
    if not isinstance(told, dict):
        raise ValueError("it is no object")
    first, second = map(_count, told.pop("regions"))
    start = at + length
    if start + first + second != end or max(first, second) > region:
        raise ValueError("its parts do not fill it, or are larger than what it is about")
    old, new = read(start, first), read(start + first, second)
    made = hashlib.sha256(head + text)
    made.update(old)
    made.update(new)
    if made.digest() != read(end, _DIGEST):
        raise ValueError("its digest is not right")
    emptied = tuple(
        Emptied(_name(one["name"]), _count(one["size"]), _count(one["header"]), _text(one["digest"]))
        for one in told.pop("emptied")
    )
    shards = tuple(_name(name) for name in told.pop("shards"))
    part_of = None if told["part_of"] is None else _name(told["part_of"])
    if type(told["redo"]) is not bool:
        raise ValueError("its phase is not known")
    before, after = _count(told["before"]), _count(told["after"])
    return Side(
        _name(told["name"]), _text(told["run"]), before, after, old, new, told["redo"], part_of, shards, emptied
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{quoted(value)} is no size")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{quoted(value)} is no text")
    return value


def _name(value: Any) -> str:
    """The name of a file in the very folder."""
    if value in ("", ".", "..") or set(_text(value)) & {"/", "\0"}:
        raise ValueError(f"{quoted(value)} is no file in its own folder")
    return _text(value)


def of_file(path: str, size: int, read: Callable[[int, int], bytes], limits: Limits) -> Pending | None:
    """What lies beside a data file of `size` bytes, which `read(count, offset)` reads; None when nothing does.

    Its `.side.new` is empty: it was held against the file, and may be as large as a header."""
    real = os.path.realpath(path)
    place = beside(real)
    if not os.path.lexists(place):
        return None
    try:
        side = load(place, min(size, limits.safetensors_header + 8))
        if side is None:
            return None
        if side.name != os.path.basename(real) or not 0 < len(side.new) <= size:
            raise BadSide("is of another file")
        state = _state(side, size, read(len(side.new), 0), _phase(side, os.path.dirname(real), limits))
    except BadSide:
        return Pending(place, "stale", None, size)
    return Pending(place, state, replace(side, new=b""), side.after if state == "after" else size)


def _phase(side: Side, folder: str, limits: Limits) -> State:
    """What counts, as far as the side files say: a shard's asks that of its index."""
    if side.part_of is None:
        return "after" if side.redo else "before"
    index = load(beside(os.path.join(folder, side.part_of)), limits.index_bytes)
    if index is None or index.run != side.run or side.name not in index.shards:
        return "idle"
    return "after" if index.redo else "before"


def _state(side: Side, size: int, now: bytes, phase: State) -> State:
    was, is_new = (size, now) == (side.before, side.old), now == side.new
    if phase == "before" and size == side.before and is_mixture(now, side.old, side.new):
        return "before"
    if phase == "after" and size in (side.before, side.after) and is_new:
        return "after"
    if phase == "idle" and (was or (size == side.after and is_new)):
        return "idle"
    return "stale"


def is_mixture(now: bytes, old: bytes, new: bytes) -> bool:
    """Whether every byte is the one of `old` or the one of `new` at its place.

    >>> is_mixture(b"abXY", b"abcd", b"WXXY"), is_mixture(b"abXZ", b"abcd", b"WXXY")
    (True, False)
    """
    if not len(now) == len(old) == len(new):
        return False
    for at in range(0, len(now), _STEP):
        here, first, second = (part[at : at + _STEP] for part in (now, old, new))
        if here not in (first, second) and any(a not in (b, c) for a, b, c in zip(here, first, second, strict=True)):
            return False
    return True


def of_index(path: str, raw: bytes, limits: Limits) -> Pending | None:
    """What lies beside an index whose whole text is `raw`; None when nothing does."""
    real = os.path.realpath(path)
    place = beside(real)
    if not os.path.lexists(place):
        return None
    try:
        side = load(place, limits.index_bytes)
    except BadSide:
        return Pending(place, "stale", None, len(raw))
    if side is None:
        return None
    fits = side.name == os.path.basename(real) and raw in ((side.new,) if side.redo else (side.old, side.new))
    state: State = "stale" if not fits else "after" if side.redo else "before"
    return Pending(place, state, side, len(raw))

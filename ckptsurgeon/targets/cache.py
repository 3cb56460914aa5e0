"""Headers of named models, kept in the user's cache folder, so that a second look need not import torch.

One JSON file an entry, `$XDG_CACHE_HOME/ckptsurgeon/targets/KEY.json` (else under `~/.cache`); see
`dependencies` for the key, and for what else must be as it was.  A cache never fails a command: what
cannot be read, is not the user's own or does not hold together is no entry, and what cannot be
written is not kept.  Values are never kept: where they are wanted, the model is built.

A process that has torch already neither asks the cache nor fills it: little time is left to be won
there, and what its packages make may be other than what their files say (a model that was registered,
a class that was patched).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from ckptsurgeon.checkpoint import Target, TargetEntry
from ckptsurgeon.dtypes import DTYPES
from ckptsurgeon.errors import TargetError
from ckptsurgeon.kinds import OwnerKind
from ckptsurgeon.limits import DEFAULT
from ckptsurgeon.targets import module
from ckptsurgeon.targets.dependencies import Search, Trace, UntraceableError, Watch, key
from ckptsurgeon.tensor import TensorSpec

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.targets.spec import Spec

_MOST_ENTRIES = 256
_LONGEST_UNUSED = 90 * 86_400
"""Seconds after which an entry that nobody asked for goes."""
_STALE = 3600
"""Seconds after which a half-written entry is nobody's."""
_MOST_BYTES = 64 << 20
_NAME = re.compile(r"[0-9a-f]{64}\.json")
_FRAME = re.compile(rb'\{"sha256":"([0-9a-f]{64})","header":(.*)\}\n', re.DOTALL)


def through(spec: Spec, build: Callable[[], Target], use: bool) -> Target:
    """The target of a spec: from the cache if `use` allows and it is there, else what `build` makes, which is kept."""
    place = None if "torch" in sys.modules else _place(spec)
    if place is None:
        return build()
    found = _load(place, spec, build) if use else None
    if found is not None:
        return found
    with Watch(spec) as watch:
        made = build()
    with suppress(OSError, UntraceableError):
        if _place(spec) == place:  # nothing was installed or edited in the meantime
            _store(place, made, watch.trace())
    return made


def _place(spec: Spec) -> str | None:
    """Where the entry of a spec is, whether there is one or not; None where nothing can be kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    try:
        return os.path.join(base, "ckptsurgeon", "targets", f"{key(spec)}.json") if os.path.isabs(base) else None
    except (OSError, UntraceableError):
        return None


def _load(place: str, spec: Spec, build: Callable[[], Target]) -> Target | None:
    try:
        header = json.loads(_read(place))
        target, nbytes, trace = _Reading(header).all(place, spec)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not trace.holds(spec):
        return None
    with suppress(OSError):
        os.utime(place)  # it was of use: see _tidy
    later = _Later(place, target, build)
    initial = module.Values(target.label, later, nbytes)
    return Target(
        target.label, target.entries, True, target.others, target.ties, initial, cached=True, facts=target.facts
    )


def _read(place: str) -> bytes:
    """The header in an entry; ValueError when it is damaged, too large, or another user's."""
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > _MOST_BYTES:
            raise ValueError("no entry of ours")
        frame = _FRAME.fullmatch(file.read(_MOST_BYTES + 1))
    if frame is None or hashlib.sha256(frame[2]).hexdigest().encode() != frame[1]:
        raise ValueError("a damaged entry")
    return frame[2]


class _Reading:
    """The parts of a header, each held against what it must be: ValueError, KeyError or TypeError for another."""

    def __init__(self, header: Any) -> None:
        self.header = _a(dict, header)

    def all(self, place: str, spec: Spec) -> tuple[Target, int, Trace]:
        header = self.header
        if header["key"] != os.path.basename(place).partition(".")[0] or header["label"] != spec.text:
            raise ValueError("the entry of another spec")
        entries = dict(self._entries())
        others, ties = _texts(header["others"]), tuple(map(_texts, _a(list, header["ties"])))
        tied = [name for group in ties for name in group]
        whole = len(entries) == len(header["entries"]) and set(tied) <= set(entries) and len(tied) == len(set(tied))
        if (
            not whole
            or len(others) != len(set(others))
            or set(others) & set(entries)
            or min(map(len, ties), default=2) < 2
        ):
            raise ValueError("keys that do not hold together")
        files = {_a(str, path): _a(str, digest) for path, digest in _a(dict, header["files"]).items()}
        trace = Trace(files, dict(self._imports()))
        facts = {_a(str, name): _count(value) for name, value in _a(dict, header["facts"]).items()}
        return Target(spec.text, entries, True, others, ties, facts=facts), _count(header["nbytes"]), trace

    def _entries(self) -> Iterator[tuple[str, TargetEntry]]:
        for name, dtype, shape, role, owner, kind in _a(list, self.header["entries"]):
            if (
                role not in ("parameter", "buffer")
                or kind not in get_args(OwnerKind)
                or len(_a(list, shape)) > DEFAULT.dimensions
            ):
                raise ValueError("no key of a model")
            spec = TensorSpec(DTYPES[_a(str, dtype)], tuple(map(_count, shape)))
            yield _a(str, name), TargetEntry(spec, role, _a(str, owner), kind)

    def _imports(self) -> Iterator[tuple[Search, str | None]]:
        for name, path, origin in _a(list, self.header["imports"]):
            search = _a(str, name), None if path is None else _texts(path)
            yield search, None if origin is None else _a(str, origin)


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} is wanted")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_a(str, text) for text in _a(list, value))


def _count(value: Any) -> int:
    if not 0 <= _a(int, value) < 1 << 63:
        raise ValueError("no count")
    return int(value)


@dataclass(frozen=True, eq=False)
class _Later:
    """Makes the model of a cached header once its values are wanted, just as it would have been made without
    the cache: so the values are the same, bit for bit."""

    place: str
    header: Target
    build: Callable[[], Target]

    def __call__(self, seed: int) -> Mapping[str, torch.Tensor]:
        return self._values.build(seed)

    @cached_property
    def _values(self) -> module.Values:
        made, header = self.build(), self.header
        same = list(made.entries.items()) == list(header.entries.items())
        if not same or (made.ties, made.others) != (header.ties, header.others):
            with suppress(OSError):
                os.unlink(self.place)
            raise TargetError(
                f"{header.label} is not what it was when its header was kept; that is forgotten, run it again"
            )
        assert isinstance(made.initial, module.Values)
        return made.initial


def _store(place: str, made: Target, trace: Trace) -> None:
    assert isinstance(made.initial, module.Values)
    header = {
        "key": os.path.basename(place).partition(".")[0],
        "label": made.label,
        "entries": [
            [name, entry.spec.dtype.name, list(entry.spec.shape), entry.role, entry.module, entry.kind]
            for name, entry in made.entries.items()
        ],
        "others": made.others,
        "ties": made.ties,
        "facts": made.facts,
        "nbytes": made.initial.nbytes,
        "files": trace.files,
        "imports": [[name, path, origin] for (name, path), origin in trace.imports.items()],
    }
    body = json.dumps(header, separators=(",", ":")).encode()
    if len(body) > _MOST_BYTES >> 1:
        return
    folder = os.path.dirname(place)
    os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    part = os.path.join(folder, f"{os.urandom(16).hex()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(b'{"sha256":"%s","header":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body))
        os.replace(part, place)
    except OSError:
        with suppress(OSError):
            os.unlink(part)
        raise
    _tidy(folder)


def _tidy(folder: str) -> None:
    """Drop entries that were of no use for long, those beyond a number, and what a crash left half-written."""
    now, found = time.time(), []
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with suppress(OSError):  # another process tidies too
            age = now - os.lstat(path).st_mtime
            if _NAME.fullmatch(name):
                found.append((age, path))
            elif name.endswith(".part") and age > _STALE:
                os.unlink(path)
    for at, (age, path) in enumerate(sorted(found)):
        if at >= _MOST_ENTRIES or age > _LONGEST_UNUSED:
            with suppress(OSError):
                os.unlink(path)

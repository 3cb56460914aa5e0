"""What the header of a named model depends on, told without running the model's code.

What is known beforehand makes the key: the spec's words, Python, this program, the files that the
words name, and what is installed.  For that the names and times of all `*.dist-info` and their kin
on `sys.path` stand: more than the versions of the packages that the model came from, but one scan of
a folder instead of a thousand files of metadata, and every installation changes them.

What only shows while the model is built is recorded then (`Watch`) and held against the disk at every
look-up (`Trace`): the files of all code that is not installed, where names were found that something
could hide, and names that were looked for in vain.  Code that reads other files, the environment or
the clock is not noticed, nor is an installed file that is edited by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ckptsurgeon

if TYPE_CHECKING:
    from ckptsurgeon.targets.spec import Spec

LIBRARIES = ("torchvision", "timm", "transformers")
_SCHEMA = 3
"""Of the entries: 2 has the kinds of modules, 3 what the model says of its heads."""
_MOST_BYTES = 64 << 20
"""Files that are hashed at each look-up must be worth it: building the model may be cheaper."""
_METADATA = (".dist-info", ".egg-info", ".egg-link")
_AT_START = ("sitecustomize", "usercustomize")
_TICK = 20_000_000
"""Nanoseconds by which a file's time may lag behind the clock."""

Search = tuple[str, tuple[str, ...] | None]
"""A module's name and the folders where it is looked for; None for the whole path."""


class UntraceableError(Exception):
    """A header that depends on what cannot be held against the disk at a fair price."""


@dataclass
class Digests:
    """SHA-256 of files, as long as they are not too many bytes together."""

    left: int = _MOST_BYTES

    def of(self, path: str) -> str:
        """Raises OSError when there is no such file, UntraceableError when it is too large or no file."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            self.left -= found.st_size
            if not stat.S_ISREG(found.st_mode) or self.left < 0:
                raise UntraceableError(path)
            return hashlib.file_digest(file, "sha256").hexdigest()


def key(spec: Spec) -> str:
    """The name of everything that is known of a header before it is made: 64 hexadecimal digits.

    Raises OSError or UntraceableError where it cannot be told.
    """
    files = _named_files(spec)
    here = os.getcwd() if files or spec.source not in LIBRARIES else None
    told = [_SCHEMA, ckptsurgeon.__version__, sys.version, spec.text, here, files, _installations()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _named_files(spec: Spec) -> dict[str, Any]:
    """The files that the words of a spec name, each with its digest; of a transformers folder the configs
    and the code."""
    digests, found = Digests(), {}
    for text in _texts(spec.args):
        if os.path.exists(text):
            found[os.path.abspath(text)] = digests.of(text)
    if spec.source == "transformers" and os.path.exists(spec.factory):
        names = [""]
        if os.path.isdir(spec.factory):
            names = sorted(name for name in os.listdir(spec.factory) if name.endswith((".json", ".py")))
            found[os.path.abspath(spec.factory)] = "a folder"
        for name in names:
            path = os.path.abspath(os.path.join(spec.factory, name))
            found[path] = digests.of(path)
    return found


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _texts(inner)


def _installations() -> list[Any]:
    """The folders of the path, the metadata of packages in them, and this program's own code that makes headers."""
    made: list[Any] = [_times(os.path.dirname(__file__), (".py",))]
    for folder in sys.path:
        at = folder or os.getcwd()
        made.append([at, _times(at, _METADATA) if os.path.isdir(at) else _time(at)])
    return made


def _times(folder: str, endings: tuple[str, ...]) -> list[Any]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(endings) or entry.name[:12] == "__editable__"]
    return [[name, _time(os.path.join(folder, name))] for name in sorted(names)]


def _time(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


@dataclass(frozen=True)
class Trace:
    """What a header was made with: files by digest, and where modules were found (None: nowhere)."""

    files: dict[str, str]
    imports: dict[Search, str | None]

    def holds(self, spec: Spec) -> bool:
        """Whether all of it is on the disk as it was."""
        digests = Digests()
        try:
            same = all(digests.of(path) == digest for path, digest in self.files.items())
            return same and all(_origin(search, spec) == origin for search, origin in self.imports.items())
        except (OSError, ValueError, UntraceableError):  # ValueError: a NUL in a path
            return False


def _origin(search: Search, spec: Spec) -> str | None:
    """Where the module that a name means begins; nothing is imported."""
    name, path = search
    folder = os.path.dirname(os.path.abspath(spec.source)) if spec.source.endswith(".py") else os.getcwd()
    found = PathFinder.find_spec(name, [*sys.path, folder] if path is None else list(path))
    return None if found is None else found.origin or next(iter(found.submodule_search_locations or []), "")


@dataclass
class Watch:
    """Sees what code is imported while a model is built: a finder that is asked last and finds nothing."""

    spec: Spec
    missed: set[Search] = field(default_factory=set)
    began: int = 0
    is_clean: bool = False

    def __enter__(self) -> Watch:
        self.began = time.time_ns()
        self.is_clean = all(name in _AT_START for name, _ in self._outside())
        sys.meta_path.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: object = None) -> None:
        self.missed.add((name, None if path is None else tuple(map(str, path))))

    def trace(self) -> Trace:
        """What was seen.

        Raises UntraceableError when code was there before, which may be other than its file says now, or when
        a file changed while the model was built.
        """
        if not self.is_clean:
            raise UntraceableError("code was imported before")
        outside = list(self._outside())
        digests, files = Digests(), {}
        for _, path in outside:
            if os.stat(path).st_ctime_ns > self.began - _TICK:
                raise UntraceableError(path)
            files[path] = digests.of(path)
        tops = {name.partition(".")[0] for name, _ in outside if not name.startswith("ckptsurgeon_target_")}
        if not self.spec.source.endswith(".py"):
            tops.add(self.spec.source.partition(".")[0])
        searches: set[Search] = {(top, None) for top in tops}
        if self.spec.source not in LIBRARIES:
            searches |= {(name, path) for name, path in self.missed if path is None or any(map(self._is_own, path))}
        return Trace(files, {search: _origin(search, self.spec) for search in sorted(searches, key=str)})

    def _outside(self) -> Iterator[tuple[str, str]]:
        """The loaded modules that are not installed, with their files; without the program that runs."""
        for name, module in list(sys.modules.items()):
            path = module.__dict__.get("__file__") if isinstance(module, ModuleType) else None
            is_ours = name in ("__main__", "__mp_main__") or name.partition(".")[0] == "ckptsurgeon"
            if isinstance(path, str) and os.path.isabs(path) and not is_ours and self._is_own(path):
                yield name, path

    def _is_own(self, path: str) -> bool:
        """Whether a file or folder is the user's, not the standard library's or an installed package's."""
        return not os.path.join(path, "").startswith(self._installed)

    @cached_property
    def _installed(self) -> tuple[str, ...]:
        import sysconfig

        folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        folders |= {folder for folder in sys.path if os.path.basename(folder) in ("site-packages", "dist-packages")}
        return tuple(os.path.join(folder, "") for folder in sorted(folders))

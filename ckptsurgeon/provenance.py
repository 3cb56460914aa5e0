"""How a checkpoint came about, as its file says: the record that outputs carry, and the digest of a header.

A record is a claim of whoever wrote the file.  It is shown, and held against what can be computed, but never
followed by itself.  It holds no time, no name of a person or machine, and no path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

from ckptsurgeon.dtypes import DTYPES

if TYPE_CHECKING:
    from ckptsurgeon.checkpoint import Checkpoint, TargetEntry
    from ckptsurgeon.tensor import TensorRef, TensorSpec

KEY = "ckptsurgeon.provenance"
"""The entry of the record in the metadata of a safetensors file, and of an index of shards."""
MEMBER = "ckptsurgeon.json"
"""The record of a torch zip, in the folder of `data.pkl`."""
SCHEMA = "ckptsurgeon.provenance/1"
MOST = 1 << 20
"""Bytes of a record's text: a longer one is not read, and none is written."""
_STEPS = 8
"""Earlier steps that a record keeps."""
_WORD = 200
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INIT = re.compile(r"[\w.:=,+* -]{1,2000}", re.ASCII)
"""A scheme of initial values, as `schemes.Scheme` writes it."""
_CHOICES: Mapping[str, frozenset[Any]] = {
    "dtype": frozenset(DTYPES),
    "unexpected": frozenset(("error", "drop", "keep")),
    "mismatched": frozenset(("error", "drop", "reshape", "overlap")),
    "missing": frozenset(("error", "init", "skip")),
    "fit": frozenset((True,)),
    "unwrap": frozenset((True,)),
    "allow_unused": frozenset((True,)),
    "keep_extras": frozenset((True,)),
}


class BadProvenance(Exception):
    """A record that cannot be understood (a short cause)."""


@dataclass(frozen=True)
class Derivation:
    """What the result of a plan was made of, before any of it is put into words: the `source`'s tensors, the kind of
    its file and the place of the state dict in it; the rules' lines, the options that matter, the target's keys.

    `followed` tells that what lies beside the tensors went through the same.
    """

    source: Mapping[str, TensorRef]
    format: str = ""
    select: str = "."
    rules: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, TargetEntry] | None = None
    followed: bool = False


@dataclass(frozen=True)
class Provenance:
    """What a file says of how it came about.

    `version` is that of the ckptsurgeon that wrote it; `format`, `select` and `header` are the kind of its source, the
    place of the state dict in it, and the digest of that header; `rules` are the lines of the recipe (None: too many to
    be kept) and `options` what else decided, by the names of `cs.plan`; `target` is the digest of the header that it
    was made to fit.  `content` is the digest of its own tensors, where one was asked for.  `history` are the same of
    the files before it, the oldest first, and `earlier` counts those that are left out.  Of a record that cannot be
    understood only `problem` says why.
    """

    version: str = ""
    format: str = ""
    select: str = "."
    header: str = ""
    rules: tuple[str, ...] | None = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    content: str | None = None
    history: tuple[Provenance, ...] = ()
    earlier: int = 0
    problem: str = ""

    @property
    def place(self) -> str:
        """Where in the file itself the state dict is that all of this is about, as `--select` spells it."""
        return self.select if self.options.get("keep_extras") else "."

    def data(self) -> dict[str, Any]:
        """The record as plain data, without what it does not say."""
        made = {"schema": SCHEMA, **self._step()}
        if self.history:
            made["history"] = [step._step() for step in self.history]
        return {**made, "earlier": self.earlier} if self.earlier else made

    def _step(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "version": self.version,
            "source": {"format": self.format, "select": self.select, "header": self.header},
            "rules": None if self.rules is None else list(self.rules),
            "options": dict(self.options),
        }
        made |= {} if self.target is None else {"target": self.target}
        return made if self.content is None else {**made, "content": self.content}

    def text(self) -> str:
        """The record as one line of JSON, of ASCII alone."""
        return json.dumps(self.data(), separators=(",", ":"))

    def shorter(self) -> Provenance | None:
        """Without its oldest step; None when there is none."""
        return replace(self, history=self.history[1:], earlier=self.earlier + 1) if self.history else None


def made_of(ckpt: Checkpoint, *, keep_extras: bool = False, content: str | None = None) -> Provenance:
    """The record of a file that is to hold a checkpoint: the result of a plan, or one that is written as it is."""
    from ckptsurgeon import __version__

    found = ckpt.derived
    if found is None:
        origin = ckpt.origin
        found = Derivation(ckpt.tensors, origin.format if origin else "", origin.selected if origin else ".")
    options = {**found.options, "keep_extras": True} if keep_extras else found.options
    target = None if found.target is None else header_digest((key, entry.spec) for key, entry in found.target.items())
    source = header_digest((key, ref.spec) for key, ref in found.source.items())
    made = Provenance(__version__, found.format, found.select, source, found.rules, options, target, content)
    before = ckpt.provenance
    if before is not None and not before.problem:
        steps = (*before.history, replace(before, history=(), earlier=0))
        left = max(0, len(steps) - _STEPS)
        made = replace(made, history=steps[left:], earlier=before.earlier + left)
    return _fitting(made)


def _fitting(made: Provenance) -> Provenance:
    while len(made.text()) > MOST:
        shorter = made.shorter()
        if shorter is None:
            return replace(made, rules=None, select=made.select if len(made.select) <= _WORD else "")
        made = shorter
    return made


def header_digest(specs: Iterable[tuple[str, TensorSpec]]) -> str:
    r"""The digest of a header: SHA-256 over a line that names what it is, and then a line for each key.

    The first line is `ckptsurgeon.header/1`; the others are JSON without blanks and of ASCII alone,
    `["key","dtype",[sizes]]`, sorted by key (by code points); each ends with a newline.  The order of keys, ties, the
    kind of the file, its shards and its place do not matter.

    >>> header_digest([])[:23]
    'sha256:9c80d19d5b87bf38'
    """
    import hashlib

    made = hashlib.sha256(b"ckptsurgeon.header/1\n")
    for key, spec in sorted(specs, key=lambda pair: pair[0]):
        made.update(f"[{line(key, spec)}]\n".encode("ascii"))
    return f"sha256:{made.hexdigest()}"


def line(key: str, spec: TensorSpec) -> str:
    """What a digest takes of a key: its name, dtype and shape."""
    words = _words if 0 in spec.shape else _kept  # of sizes beside a 0 all hashes may be one
    return f"{encode_basestring_ascii(key)},{words(spec.dtype.name, spec.shape)}"


def _words(dtype: str, shape: tuple[int, ...]) -> str:
    return f'"{dtype}",[{",".join(map(str, shape))}]'


_kept = lru_cache(maxsize=4096)(_words)


def of_data(found: Any) -> Provenance:
    """The record that plain data says; BadProvenance for anything of another form.  What is not known is left out."""
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BadProvenance(f"it is no {SCHEMA}")
    history, earlier = found.get("history", []), found.get("earlier", 0)
    if not isinstance(history, list) or type(earlier) is not int or not 0 <= earlier < 1 << 63:
        raise BadProvenance("its history is no list, or what came before it no count")
    left = max(0, len(history) - _STEPS)
    steps = tuple(_step(step) for step in history[left:])
    return replace(_step(found), history=steps, earlier=earlier + left)


def _step(found: Any) -> Provenance:
    source = found.get("source") if isinstance(found, dict) else None
    if not isinstance(source, dict):
        raise BadProvenance("it names no source")
    rules, options = found.get("rules"), found.get("options", {})
    if rules is not None and not (isinstance(rules, list) and all(isinstance(rule, str) for rule in rules)):
        raise BadProvenance("its rules are no lines of text")
    return Provenance(
        _text(found, "version", _WORD),
        _text(source, "format", _WORD),
        _text(source, "select", MOST),
        _digest(source, "header") or "",
        None if rules is None else tuple(rules),
        _options(options),
        _digest(found, "target"),
        _digest(found, "content"),
    )


def _text(found: Mapping[str, Any], name: str, most: int) -> str:
    text = found.get(name, "")
    if not isinstance(text, str) or len(text) > most:
        raise BadProvenance(f"its {name} is no text of up to {most} characters")
    return text


def _digest(found: Mapping[str, Any], name: str) -> str | None:
    text = found.get(name)
    if text is None:
        return None
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise BadProvenance(f"its {name} is no digest")
    return text


def _options(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise BadProvenance("its options are no map")
    for name, value in found.items():
        if name == "seed":
            known = type(value) is int and 0 <= value < 1 << 64
        elif name == "init":
            known = isinstance(value, str) and _INIT.fullmatch(value) is not None
        else:
            known = isinstance(value, str | bool) and value in _CHOICES.get(name, ())
        if not known:
            raise BadProvenance(f"its option {str(name)[:_WORD]!r} is not known, or its value is not")
    return found

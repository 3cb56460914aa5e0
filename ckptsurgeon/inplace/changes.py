"""Plan → what it rewrites in place, or why it cannot be done so.  Only headers are read, and nothing is written."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptsurgeon import formats
from ckptsurgeon.errors import InputError, Problem, UsageError
from ckptsurgeon.formats import safetensors, sharded
from ckptsurgeon.formats._aliases import RESERVED, restored
from ckptsurgeon.formats.sidefile import Emptied
from ckptsurgeon.inplace import disk
from ckptsurgeon.inplace.headers import Misfit, Place, place_of, rewritten
from ckptsurgeon.limits import Limits, current
from ckptsurgeon.plans import Plan
from ckptsurgeon.provenance import KEY, Provenance, made_of
from ckptsurgeon.rules import Recipe
from ckptsurgeon.sources import File, Inline
from ckptsurgeon.tensor import TensorRef


@dataclass(frozen=True)
class FileChange:
    """A data file, its new beginning, and its size afterwards."""

    file: File
    region: bytes
    size: int


@dataclass(frozen=True)
class Changes:
    """A plan, and what it rewrites in place: the `files` whose header changes, shards that are `emptied` and go, and
    the text of the `index` before and after; `crowded` tells that the provenance found no room.  With problems in the
    plan there is nothing of it."""

    plan: Plan
    path: str
    files: tuple[FileChange, ...] = ()
    emptied: tuple[Emptied, ...] = ()
    index: tuple[bytes, bytes] | None = None
    nbytes: int = 0
    crowded: bool = False

    @property
    def any(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.files or self.emptied or self.rewrites_index)

    @property
    def rewrites_index(self) -> bool:
        return self.index is not None and self.index[0] != self.index[1]

    @property
    def rewritten(self) -> int:
        """The bytes of headers and index that are written."""
        index = len(self.index[1]) if self.index is not None and self.rewrites_index else 0
        return sum(len(change.region) for change in self.files) + index

    @property
    def freed(self) -> int:
        """The bytes by which the data files become smaller."""
        return sum(change.file.size - change.size for change in self.files) + sum(one.size for one in self.emptied)

    @property
    def names(self) -> tuple[str, ...]:
        """The files that are rewritten, an index last."""
        return (*(change.file.path for change in self.files), *((self.path,) if self.rewrites_index else ()))


@dataclass
class _Set:
    """The headers of the files of a checkpoint, and its index if it has one."""

    path: str
    headers: dict[str, tuple[File, safetensors.Header]] = field(default_factory=dict)
    index: sharded.Index | None = None

    @property
    def physical(self) -> dict[str, TensorRef]:
        return {key: ref for _, header in self.headers.values() for key, ref in header.tensors.items()}


def fit(plan: Plan, command: str, provenance: bool = True) -> Changes:
    """What a plan rewrites in place; where it cannot, its problems are those of the plan, with the `command` that
    does the same by writing a copy.  With `provenance` the file says how it came about, where there is room for that.

    Raises OutputError for a file that has other names, InputError when one is not as it was when the plan was
    made, UsageError for a plan about a part of a file.
    """
    origin, limits = plan.source.origin, current()
    assert origin is not None
    if not plan.ok:
        return Changes(plan, origin.path)
    if origin.select:
        raise UsageError("--in-place changes the whole file; leave --select away")
    cause = _unfit(origin.path, origin.format)
    if cause is not None:
        return _refused(plan, [Problem(cause, kind="in-place")], command)
    if any(isinstance(ref.source, Inline) for ref in plan.source.values()):  # only a dry run comes here with them
        cause = f"an in-place change of {origin.path} was interrupted; `ckpt verify --repair` puts it back first"
        return Changes(replace(plan, problems=(Problem(cause, kind="in-place"),)), origin.path)
    found = _opened(origin.path, plan, limits)
    wanted, problems = _placed(plan, found)
    problems += [replace(problem, kind="in-place") for problem in safetensors.problems(plan.result)]
    problems += _inconsistent(plan, found)
    said = made_of(plan.result) if provenance else None
    made = None if problems else _made(plan, found, wanted, said, problems, limits)
    return _refused(plan, problems, command) if problems or made is None else made


def _refused(plan: Plan, problems: list[Problem], command: str) -> Changes:
    first = replace(problems[0], text=f"{problems[0].text}; this writes a copy: {command}")
    assert plan.source.origin is not None
    return Changes(replace(plan, problems=(first, *problems[1:])), plan.source.origin.path)


def _unfit(path: str, format: str) -> str | None:
    """Why no plan for a file of this kind can be carried out in place."""
    if format not in (safetensors.NAME, sharded.SAFETENSORS):
        return f"{path} is {format}, and only headers of safetensors can be rewritten in place"
    if os.path.isdir(path):
        return f"the shards in {path} have no index, by which all of them would change at once"
    if format == safetensors.NAME:
        index = _index_of(path)
        if index is not None:
            return f"{path} is a shard of {index}, which names its tensors; name the index instead"
    return None


def _index_of(path: str) -> str | None:
    """The index in the same folder that names a numbered file."""
    folder, name = os.path.split(path)
    if not sharded.numbered([name]):
        return None
    for entry in sorted(os.listdir(folder or ".")):
        if entry.endswith(".index.json"):
            place = os.path.join(folder, entry)
            try:
                with formats.probe(place) as probe:
                    if name in sharded.read_index(probe).weight_map.values():
                        return place
            except InputError:
                continue
    return None


def _opened(path: str, plan: Plan, limits: Limits) -> _Set:
    made = _Set(path)
    names = [path]
    disk.check_own(path)
    with formats.probe(path, limits) as probe:
        if not safetensors.sniff(probe):
            made.index = sharded.read_index(probe)
            folder = os.path.dirname(path)
            names = [os.path.join(folder, name) for name in sorted(set(made.index.weight_map.values()))]
    known = {extent.path: extent.file for ref in plan.source.values() for extent in ref.extents()}
    for name in names:
        disk.check_own(name)
        with formats.probe(name, limits) as probe:
            if known.get(name, probe.file) != probe.file:
                raise InputError("changed since it was opened", path=name, hint="open it again")
            made.headers[name] = probe.file, safetensors.header(probe)
    return made


def _inconsistent(plan: Plan, found: _Set) -> list[Problem]:
    """What no plan may pass over: shards elsewhere, and tensors that it does not know."""
    folder = os.path.dirname(found.path)
    inner = [name for name in found.headers if os.path.dirname(name) != folder]
    problems = [Problem(f"{name} is not in the folder of its index", kind="in-place") for name in inner]
    lost = [key for key in found.physical if key not in plan.source]
    if lost:
        problems.append(Problem(f"the plan does not know {lost[0]!r} of the file", key=lost[0], kind="in-place"))
    for step in plan.steps:
        if step.made_by is not None and step.made_by.operation.name == "tie" and step.edges.first is not None:
            name = step.edges.first[1][0]
            text = f"in place {name!r} could only be an alias in the metadata, which other readers do not see"
            problems.append(Problem(text, step.rule, key=name, kind="in-place"))
    if found.index is not None and not plan.result:
        problems.append(Problem("no tensor would be left in any shard", kind="in-place"))
    return problems


def _placed(plan: Plan, found: _Set) -> tuple[dict[str, dict[str, tuple[TensorRef, Place]]], list[Problem]]:
    """The tensors of the result by file, and for each rule or policy that changes bytes a problem."""
    wanted: dict[str, dict[str, tuple[TensorRef, Place]]] = {name: {} for name in found.headers}
    moved: list[str] = []
    for key, ref in plan.result.items():
        place = place_of(ref)
        if place is None or place.path not in wanted:
            moved.append(key)
        else:
            wanted[place.path][key] = (ref, place)
    return wanted, _blamed(plan, moved)


def _blamed(plan: Plan, keys: Iterable[str]) -> list[Problem]:
    """One problem for each step of the plan that made tensors of other bytes."""
    steps = [(step, {out: ins for ins, outs in step.edges for out in outs}) for step in reversed(plan.steps)]
    by_step: dict[str, list[str]] = {}
    for key in keys:
        name, blame = key, ""
        for step, inputs in steps:
            if name not in inputs:
                continue
            first, taken = step.rule.split(None, 1)[0], inputs[name]
            if len(taken) != 1 or name in taken or first == "copy":
                blame = step.rule
                break
            name = taken[0]
        by_step.setdefault(blame, []).append(key)
    problems = []
    for rule, names in by_step.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"`{rule}` makes" if rule else "the plan makes"
        text = f"in place only names and shapes can change, and {what} other bytes of {names[0]!r}{others}"
        problems.append(Problem(text, key=names[0], kind="in-place"))
    return problems


def _made(
    plan: Plan,
    found: _Set,
    wanted: Mapping[str, dict[str, tuple[TensorRef, Place]]],
    said: Provenance | None,
    problems: list[Problem],
    limits: Limits,
) -> Changes | None:
    if plan.result.metadata == plan.source.metadata and list(plan.result.items()) == list(plan.source.items()):
        return Changes(plan, found.path, nbytes=sum(header.size for _, header in found.headers.values()))
    physical = found.physical
    aliases = {
        key
        for _, header in found.headers.values()
        for key in header.metadata
        if key in plan.source and key not in physical and key not in RESERVED
    }
    files, emptied, nbytes, crowded = [], [], 0, False
    placed: dict[str, str] = {}
    merged: dict[str, str] = {}
    for name, (file, header) in found.headers.items():
        if found.index is not None and not wanted[name]:
            emptied.append(_emptied(file, 8 + header.length))
            continue
        own = {key: text for key, text in header.metadata.items() if key not in aliases and key != KEY}
        metadata = _metadata(own, plan.source.metadata, plan.result.metadata)
        try:
            new = rewritten(
                file, header, wanted[name], metadata, said if found.index is None else None, limits, found.index is None
            )
        except Misfit as misfit:
            problems.append(misfit.problem)
            continue
        if new.region is not None:
            files.append(FileChange(file, new.region, new.size))
            crowded = said is not None and found.index is None and not new.said
        nbytes += new.size
        placed |= {key: name for key in wanted[name] if key not in new.aliases}
        merged = {**metadata, **new.aliases, **merged}
    if not problems:
        odd = set(restored({key: plan.result[key] for key in placed}, merged)[0]) ^ set(plan.result)
        problems += [
            Problem(f"the metadata of another shard would make {key!r} an alias", key=key, kind="in-place")
            for key in sorted(odd)
        ]
    index = None
    if found.index is not None:
        listed = placed
        if aliases & set(found.index.weight_map):  # it lists them too
            listed = {key: name for name, keys in wanted.items() for key in keys}
        index = (found.index.text, _index(plan, found.index, listed, physical, placed, said, bool(files or emptied)))
    return Changes(plan, found.path, tuple(files), tuple(emptied), index, nbytes, crowded)


def _emptied(file: File, header: int) -> Emptied:
    descriptor = file.open()
    try:
        digest = hashlib.sha256(disk.read(descriptor, header)).hexdigest()
    finally:
        os.close(descriptor)
    return Emptied(os.path.basename(file.path), file.size, header, digest)


def _metadata(own: Mapping[str, str], before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata with what a plan changed of that of the whole."""
    changed = {key: text for key, text in after.items() if before.get(key) != text}
    return {key: text for key, text in {**own, **changed}.items() if key in after or key not in before}


def _index(
    plan: Plan,
    index: sharded.Index,
    listed: Mapping[str, str],
    before: Mapping[str, TensorRef],
    after: Iterable[str],
    said: Provenance | None,
    changed: bool,
) -> bytes:
    """The text of the new index; the old one where it says the same.

    The names in `listed` stand in it; `before` and `after` are the tensors that lie in the shards.  Where anything
    changes, in the index or in a shard (`changed`), so does the provenance.
    """
    weight_map = {key: os.path.basename(listed[key]) for key in plan.result if key in listed}
    same = weight_map == index.weight_map and list(plan.result) == list(plan.source)
    if same and (not changed or (said is None and KEY not in index.metadata)):
        return index.text
    old: dict[str, Any] = json.loads(index.text)
    metadata = {name: value for name, value in index.metadata.items() if name != KEY}
    kept = [plan.result[key] for key in after]
    total = sharded.nbytes(kept, together=False)
    if total != sharded.nbytes(before.values(), together=False):
        metadata["total_size"] = total
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(ref.numel for ref in kept)
    if said is not None:
        metadata[KEY] = said.text()
    return (json.dumps({**old, "metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()


def command(source: object, recipe: Recipe, to: object, options: Mapping[str, Any]) -> str:
    """The command that carries a plan out by writing a copy."""
    name = os.path.normpath(os.fsdecode(str(source)))
    stem, suffix = os.path.splitext(os.path.basename(name))
    copy = f"{stem}-changed.safetensors" if suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt") else "changed/"
    words = ["ckpt", "remap", name, "-o", os.path.join(os.path.dirname(name), copy)]
    for rule in recipe.rules:
        words += ["--rule", rule.text]
    if to is not None:
        words += ["--to", to if isinstance(to, str) else "MODEL"]
    words += ["--no-cache"] if options.get("cache") is False else []
    for option, given in options.items():
        value = given
        if option == "init" and isinstance(value, Mapping):
            value = " ".join(f"{name}={word}" for name, word in value.items())
        if option == "hints":
            words += [word for hint in value for word in ("--hint", hint)]
        elif option not in ("cache", "beside") and value not in (None, False, 0):
            words += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)

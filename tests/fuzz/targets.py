"""The readers, a line each: how their inputs are made, and what is done with them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ckptsurgeon import formats
from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import CkptError, InputError
from ckptsurgeon.formats import Document, _archive, _pickle, sidefile
from ckptsurgeon.formats._pickle import BadPickle
from ckptsurgeon.formats._plain import BadRecord
from ckptsurgeon.formats._rebuild import builders
from ckptsurgeon.formats._tensors import Storage, Storages
from ckptsurgeon.inplace import recovery
from ckptsurgeon.limits import DEFAULT
from ckptsurgeon.rules import Recipe, render
from ckptsurgeon.sources import File, Record
from ckptsurgeon.stream import publishing

from . import archives, headers, look, others, seeds, stacked, zips
from .draw import Draw, number, scratched
from .headers import safetensors_bytes, sparse_header
from .look import Broken
from .names import NAMES
from .pickles import parsed, pickled


class Place:
    """A folder in memory with one file that is written anew for each input, `f`, and what lies beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.path = str(folder / "f")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def put(self, raw: bytes) -> str:
        os.pwrite(self._descriptor, raw, 0)
        os.ftruncate(self._descriptor, len(raw))
        return self.path


@dataclass(frozen=True)
class Target:
    """`make` gives an input of choices, `run` hands it to the reader and raises what must not be."""

    make: Callable[[Draw], bytes]
    run: Callable[[bytes], object]


def _deep(raw: bytes) -> bool:
    """An eighth of all inputs is looked at in every way that there is."""
    return zlib.crc32(raw) % 8 == 0


def _locate(key: str, dtype: DType, elements: int, device: str) -> Storage:
    nbytes = elements * dtype.itemsize
    if nbytes > 1 << 40 or key == "7":
        raise BadRecord(f"the storage {key!r} is not there")
    begin = 64 * int(key) if key.isdecimal() and len(key) < 9 else 0
    return Storage(_SPARSE, begin, nbytes, dtype, device, record=Record(key, begin, nbytes, 7))


_SPARSE = File("f", 1 << 50, 0, 0)


def _outcome(raw: bytes, persistent: Callable[[Any], Any]) -> tuple[Any, tuple[Any, ...] | None]:
    try:
        return _pickle.loads(raw, builders=builders(DEFAULT), persistent=persistent), None
    except (BadPickle, BadRecord, CkptError) as error:
        return None, (type(error), str(error), getattr(error, "key", None))


def run_pickle(raw: bytes) -> None:
    """The inert reader by itself; what it reads a whole record at a time is what it reads opcode by opcode."""
    storages = Storages(_locate)
    found, error = _outcome(raw, storages)
    if b"_rebuild_tensor_v2" in raw and b"Q" in raw:
        again, other = _outcome(raw, lambda pid: storages(pid))  # no `Storages`: then records are not looked for
        table: dict[Any, int] = {}
        if error != other:
            raise Broken(f"whole records: {error}; opcodes: {other}")
        if found is not None and (found[1] != again[1] or _tree(found[0], table) != _tree(again[0], table)):
            raise Broken("whole records and opcodes give two trees")
    if error is not None:
        if len(error[1]) > look.MOST_READ:
            raise Broken(f"an error of {len(error[1])} characters")
        return
    try:
        look.document(Document("f", "pickle", found[0]), None, _deep(raw), reads=False)
    except CkptError as refused:
        look.refused(refused, "f")


_tree = look.fingerprint


def run_zip(place: Place, raw: bytes) -> None:
    """The directory, and each member's bytes: what Python's reader accepts too must be the same."""
    path = place.put(raw)
    try:
        with formats.probe(path) as probe:
            members = probe.members
            held = {name: _content(probe, member) for name, member in members.items()}
    except CkptError as error:
        look.refused(error, path)
        return
    for extent in formats.members(path):
        if extent.codec is None and extent.offset + extent.nbytes > len(raw):
            raise Broken(f"a member up to byte {extent.offset + extent.nbytes} of {len(raw)}")
    if not members:
        return
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            infos = archive.infolist()
            if not all(info.filename.isascii() or info.flag_bits & 0x800 for info in infos):
                return  # names of code page 437 to Python, and of UTF-8 to torch
            theirs = {info.orig_filename: partial(archive.read, info) for info in infos}
            if set(theirs) != set(held) or len(infos) != len(held):
                raise Broken(f"other members to Python: {sorted(held)}, {sorted(theirs)}")
            for name, data in held.items():
                with contextlib.suppress(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
                    if data is not None and theirs[name]() != data:
                        raise Broken(f"other bytes to Python: {name!r}")
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, struct.error, OSError):
        pass  # stricter, or damaged in its own way


def _content(probe: Any, member: Any) -> bytes | None:
    try:
        return _archive.content(probe, member, 1 << 20, "inflated_bytes")
    except CkptError as error:
        look.refused(error, probe.file.path)
        return None


def run_file(place: Place, raw: bytes) -> None:
    """Everything that a look at the file does."""
    look.file(place.put(raw), _deep(raw))


def run_safetensors(place: Place, raw: bytes) -> None:
    """… and the library `safetensors` has the same tensors, or says no too, but for what is known."""
    refs = look.file(place.put(raw), _deep(raw))
    if refs is not None and raw[8:9] != b"{":
        return  # a file of another kind, as coverage-guided mutation makes it
    from safetensors import SafetensorError, deserialize

    try:
        theirs = dict(deserialize(raw))
    except (SafetensorError, UnicodeError, OverflowError):
        if refs is not None:
            raise Broken("the library refuses what we take") from None
        return
    if refs is None:
        if not _only_they_take(place.path, raw):
            raise Broken("the library takes what we refuse")
        return
    own = {name: ref for name, ref in refs if name in theirs}
    if set(own) != set(theirs):
        raise Broken(f"other keys to the library: {sorted(own)}, {sorted(theirs)}")
    for name, ref in own.items():
        same = list(ref.shape) == theirs[name]["shape"] and ref.dtype.code == theirs[name]["dtype"]
        if not same or b"".join(ref.blocks()) != bytes(theirs[name]["data"]):
            raise Broken(f"another tensor to the library: {name!r} {ref.spec}")


def _only_they_take(path: str, raw: bytes) -> bool:
    """What the library reads and we refuse, as docs/security.md lists it: a key that stands twice with one entry, words
    in an entry that mean nothing, blanks before the header, and more dimensions than torch has."""
    pairs = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")], object_pairs_hook=list)
    if len({name for name, _ in pairs}) < len(pairs) or raw[8:9] != b"{":
        return True
    try:
        formats.inspect(path)
    except CkptError as error:
        return any(
            words in str(error)
            for words in ("stands twice", "no entry of dtype", "is no checkpoint", "dimensions", "has the shape")
        )
    return False


def run_rules(raw: bytes) -> None:
    """A line of the rule grammar; what is accepted is the same again in its own words."""
    line = raw.decode("utf-8", "surrogateescape")
    try:
        rule = Recipe.of([line]).rules[0]
    except CkptError as error:
        look.refused(error)
        return
    try:
        said = render(rule.operation.name, rule.args)
    except ValueError:
        return  # a word that holds a blank and both quotes
    again = Recipe.of([said]).rules[0]
    if (again.operation, again.args) != (rule.operation, rule.args):
        raise Broken(f"{line!r} is {said!r}, which is {again.args}")


# side files and journals

_OLD = safetensors_bytes({"module.a": 6, "module.b": 2})
_HEAD = 8 + int.from_bytes(_OLD[:8], "little")
_NEW = safetensors_bytes({"a": 6, "b": 2}, _HEAD)


def make_side(draw: Draw) -> bytes:
    """A file that is being rewritten in place, and its side file; the length of the first stands before both."""
    old, new = _OLD[:_HEAD], _NEW[:_HEAD]
    sizes = (len(_OLD), len(_OLD)) if draw.below(6) < 5 else (number(draw), number(draw))
    now = _mixed(draw, old, new) + _OLD[_HEAD:]
    if draw.below(8) == 7:
        now = scratched(draw, now)
    return struct.pack("<I", len(now)) + now + headers.side(draw, "f", old, new, sizes)


def _mixed(draw: Draw, old: bytes, new: bytes) -> bytes:
    how = draw.below(4)
    cut = draw.below(len(old))
    return old if how == 0 else new if how == 1 else new[:cut] + old[cut:]


def run_side(place: Place, raw: bytes) -> None:
    """A reader takes from a side file what a repair then makes of the file."""
    length = int.from_bytes(raw[:4], "little")
    path = place.put(raw[4 : 4 + length])
    beside = Path(sidefile.beside(path))
    beside.write_bytes(raw[4 + length :])
    refs = look.file(path, _deep(raw))
    before = None if refs is None else _shapes(refs)
    try:
        recovery.recover(path)
    except CkptError as error:
        look.refused(error, path)
    else:
        after = look.file(path, deep=False)
        if before is not None and (after is None or before != _shapes(after)):
            raise Broken(f"repaired to something else: {before}, {after and _shapes(after)}")
    finally:
        beside.unlink(missing_ok=True)
    left = sorted(os.listdir(place.folder))
    if left != ["f", "other.safetensors"] or Path(place.folder, "other.safetensors").read_bytes() != _OTHER:
        raise Broken(f"a repair left {left}")


def _shapes(refs: list[tuple[str, Any]]) -> list[tuple[str, str, bytes]]:
    return [(key, str(ref.spec), b"".join(ref.blocks())) for key, ref in refs if ref.nbytes <= look.MOST_READ]


_OTHER = safetensors_bytes({"c": 4})
_SECRET = b"a file that nobody named"


def run_journal(place: Place, raw: bytes) -> None:
    """A journal moves what was staged beside it, and nothing else."""
    folder, secret = place.folder, place.folder.parent / "secret.safetensors"
    staged = folder / headers.STAGED
    staged.mkdir(exist_ok=True)
    for path in (staged / "a.part", staged / "b.part", folder / "keep", secret):
        path.write_bytes(_SECRET + path.name.encode())
    (folder / ".f.journal").write_bytes(raw)
    try:
        publishing.recover(place.path, lambda name: False)
    except CkptError as error:
        look.refused(error)
        if isinstance(error, InputError) and sorted(os.listdir(staged)) != ["a.part", "b.part"]:
            raise Broken("a journal that is not understood moved something") from None
    if secret.read_bytes() != _SECRET + secret.name.encode() or len(os.listdir(folder.parent)) != 2:
        raise Broken(f"a journal reached further: {sorted(os.listdir(folder.parent))}")
    if b"keep" not in raw and b"\\u" not in raw and (folder / "keep").read_bytes() != _SECRET + b"keep":
        raise Broken("a journal moved what it does not name")
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        elif entry.name != "f":
            os.unlink(entry)


def _beside(folder: Path, named: Mapping[str, bytes]) -> None:
    """What `headers.FILES` says lies beside an index."""
    for name, keys in headers.SHARDS.items():
        sizes = dict.fromkeys(keys, 12)
        (folder / name).write_bytes(named["bin"] if name.endswith(".bin") else safetensors_bytes(sizes))
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(named["other bin"])
    (folder / "doubled.safetensors").write_bytes(safetensors_bytes({"layers.0.weight": 12, "b": 4}))
    (folder / "damaged.safetensors").write_bytes(safetensors_bytes({"a": 12})[:-1])
    (folder / "empty.safetensors").write_bytes(safetensors_bytes({}))
    (folder / "aliases.safetensors").write_bytes(safetensors_bytes({"b": 4}, metadata={"a": "b", "c": "nothing"}))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link.safetensors").symlink_to("model-00001-of-00002.safetensors")
    (folder / "away.safetensors").symlink_to("/dev/zero")
    (folder / "other.index.json").write_text(json.dumps({"weight_map": {"a": "other.index.json"}}))
    with open(folder / "big.safetensors", "wb") as file:
        file.write(sparse_header("big", 1 << 33))
        file.truncate(file.tell() + (1 << 33))


def table(sound: Path, folder: Path) -> dict[str, Target]:
    """Every target, over the seeds in the folder `sound`, with files that are written in `folder`."""
    files = {path.name: path.read_bytes() for path in sorted(sound.iterdir())}
    widths = json.loads(files.pop(seeds.WIDTHS))

    def of(kind: str) -> list[bytes]:
        return [raw for name, raw in files.items() if name.startswith(kind)]

    zipped, scripts, packages = (
        [archives.Archive.of(raw) for raw in of(kind)] for kind in ("zip", "script", "package")
    )
    pool = [ops for one in zipped for ops in one.pickles.values()]
    legacy = [stacked.Stacked.of(raw) for raw in of("legacy")]
    tapes = [stacked.Tape.of(files[f"tar.{name}"], widths[name]) for name in widths]
    place = {name: Place(folder / name / "in") for name in NAMES}
    (place["side"].folder / "other.safetensors").write_bytes(_OTHER)
    _beside(place["index"].folder, {"bin": files["zip-2.plain"], "other bin": files["zip-2.many"]})

    def look_at(name: str) -> Callable[[bytes], None]:
        return partial(run_file, place[name])

    metadata = [parsed(raw) for raw in of("dcp")]
    for name in ("__0_0.distcp", "__0_1.distcp"):
        (place["torch_dcp"].folder / name).write_bytes(bytes(4096))
    every = [*files.values()]
    return {
        "pickle": Target(lambda draw: pickled(draw, pool), run_pickle),
        "zip": Target(zips.archive, partial(run_zip, place["zip"])),
        "torch_zip": Target(lambda draw: archives.archive(draw, zipped, pool), look_at("torch_zip")),
        "torch_legacy": Target(lambda draw: stacked.legacy(draw, legacy, pool), look_at("torch_legacy")),
        "torch_tar": Target(lambda draw: stacked.tape(draw, tapes, pool), look_at("torch_tar")),
        "torchscript": Target(lambda draw: archives.archive(draw, scripts, pool), look_at("torchscript")),
        "torch_package": Target(lambda draw: archives.archive(draw, packages, pool), look_at("torch_package")),
        "safetensors": Target(headers.safetensors, partial(run_safetensors, place["safetensors"])),
        "torch_dcp": Target(lambda draw: others.dcp(draw, metadata, pool), look_at("torch_dcp")),
        "index": Target(headers.index, look_at("index")),
        "side": Target(make_side, partial(run_side, place["side"])),
        "journal": Target(headers.journal, partial(run_journal, place["journal"])),
        "foreign": Target(lambda draw: others.foreign(draw, every), look_at("foreign")),
        "rules": Target(others.rule, run_rules),
    }

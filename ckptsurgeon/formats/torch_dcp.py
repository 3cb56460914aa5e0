"""torch's distributed checkpoints (DCP): a folder of `.distcp` files and a pickled `.metadata`, which is listed.

torch unpickles `.metadata` with Python's own reader; here it is data like any other pickle.  It names tensors with
their dtype, size and chunks, where each chunk lies, and how the flat names were nested.  The bytes are not read yet.

Source: `torch/distributed/checkpoint/metadata.py`, `filesystem.py` (`_StorageInfo`), `_nested_dict.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

from ckptsurgeon.errors import MOST_SHOWN, InputError, LimitError, quoted
from ckptsurgeon.formats import _pickle
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._inside import is_inside, part
from ckptsurgeon.formats._pickle import BadPickle
from ckptsurgeon.formats._plain import BadRecord, Keys
from ckptsurgeon.formats._probe import Probe
from ckptsurgeon.formats._rebuild import builders
from ckptsurgeon.formats._tensors import count, dims, dtype_of
from ckptsurgeon.inert import Opaque, attributes
from ckptsurgeon.limits import Limits, current
from ckptsurgeon.sources import Absent
from ckptsurgeon.tensor import Stored, TensorRef, TensorSpec

NAME, FILE = "torch-dcp", ".metadata"
LISTED = (
    "is a distributed checkpoint of torch (DCP), which is listed and not read yet; "
    "where you trust it, `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT` makes a "
    "file of it"
)
_REMARK = "the tensors of a distributed checkpoint are listed, not read: only the sizes of its files were looked at"
_MODULE = "torch.distributed.checkpoint.metadata"
_TENSOR, _BYTES = f"{_MODULE}.TensorStorageMetadata", f"{_MODULE}.BytesStorageMetadata"
_NEAR = 256


def sniff(probe: Probe) -> bool:
    """Whether a file is a pickle that begins with the class of DCP's metadata."""
    return probe.head[:1] == b"\x80" and _MODULE.encode() in probe.head[:_NEAR]


def read(probe: Probe) -> Document:
    """The names, dtypes and shapes of a distributed checkpoint; InputError when its parts disagree."""
    path = probe.file.path
    if probe.file.size > probe.limits.pickle_bytes:
        raise LimitError(f"a pickle of {probe.file.size} bytes", "pickle_bytes", probe.limits.pickle_bytes, path=path)
    data = probe.read(probe.file.size, 0)
    try:
        tree, end = _pickle.loads(data, builders=builders(probe.limits), limits=probe.limits)
        if end != len(data):
            raise BadRecord(f"{len(data) - end} bytes follow the pickle")
        fields = _fields(tree, f"{_MODULE}.Metadata")
        named = fields.get("state_dict_metadata")
        if not isinstance(named, dict):
            raise BadRecord("it names no tensors")
        places = _places(fields.get("storage_data"))
        _prove(path, places)
        root = _nested(_leaves(named, places, probe.limits), fields.get("planner_data"))
    except (BadPickle, BadRecord) as error:
        raise InputError(f"damaged: {error}", path=path, key=getattr(error, "key", None)) from None
    return Document(path, NAME, root, remarks=(_REMARK,))


@dataclass(frozen=True)
class _Place:
    """Where a chunk lies: the file beside `.metadata`, its first byte there, its bytes, and whether they were
    transformed (compressed) by an extension."""

    file: str
    offset: int
    length: int
    transformed: bool


_Places = Mapping[str, _Place]


def _where(name: str, offset: tuple[int, ...]) -> str:
    """What a chunk is found by: a text, since a file could choose the hashes of numbers.  One that is no chunk of a
    tensor has the empty offset."""
    return f"{list(offset)} {name}"


def _fields(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, Opaque) or value.name != name:
        raise BadRecord(f"no {name.rpartition('.')[2]}, but {quoted(value)}")
    return attributes(value.state)


def _places(data: Any) -> _Places:
    """The places of chunks."""
    if not isinstance(data, dict):
        raise BadRecord("it does not say where its chunks lie")
    found: dict[str, _Place] = {}
    for key, value in data.items():
        index = _fields(key, f"{_MODULE}.MetadataIndex")
        info = attributes(value.state) if isinstance(value, Opaque) else {}
        name, file = index.get("fqn"), info.get("relative_path")
        if not isinstance(name, str) or not isinstance(file, str):
            raise BadRecord("a chunk without a name or a file")
        if not is_inside(file):
            raise BadRecord(f"{name!r} lies in {file!r}, which is no file in its own folder")
        offset = index.get("offset")
        begins = () if offset is None else _sizes(offset, "offset")
        where = _where(name, begins)
        if where in found:
            raise BadRecord(f"two chunks of {quoted(name)} begin at {list(begins)}")
        begin, length = count(info.get("offset"), "an offset"), count(info.get("length"), "a length")
        found[where] = _Place(file, begin, length, bool(info.get("transform_descriptors")))
    return found


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    return dims(value, what, current())


def _prove(path: str, places: _Places) -> None:
    """The files of all chunks must be there and large enough."""
    ends: dict[str, int] = {}
    for place in places.values():
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
    lacking: list[str] = []
    for name in sorted(ends):
        full = part(path, name)
        if not os.path.isfile(full):
            lacking.append(f"{name} is not there")
        elif (size := os.stat(full).st_size) < ends[name]:
            lacking.append(f"{name} has {size} bytes, and chunks reach to byte {ends[name]}")
    if lacking:
        more = f", and {len(lacking) - MOST_SHOWN} more" if len(lacking) > MOST_SHOWN else ""
        cause = f"its files are not all whole: {'; '.join(lacking[:MOST_SHOWN])}{more}"
        raise InputError(cause, path=path, hint="download or copy them again")


def _leaves(named: dict[Any, Any], places: _Places, limits: Limits) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in named.items():
        if not isinstance(name, str) or not isinstance(value, Opaque):
            raise BadRecord(f"the name {quoted(name)} with {quoted(value)}")
        if value.name == _TENSOR:
            fields = attributes(value.state)
            chunks = fields.get("chunks")
            for chunk in chunks if isinstance(chunks, list) else ():
                if id(chunk) in seen:  # many names with one list of chunks would be looked at without end
                    raise BadRecord(f"{quoted(name)} has a chunk that is another one's too")
                seen.add(id(chunk))
            leaves[name] = _tensor(name, fields, places, limits)
        elif value.name == _BYTES and _where(name, ()) not in places:
            raise BadRecord(f"{name!r} lies nowhere")
        else:
            leaves[name] = value
    return leaves


def _tensor(name: str, fields: dict[Any, Any], places: _Places, limits: Limits) -> TensorRef:
    """A tensor, whose chunks must be as many elements as it has, and lie inside of it."""
    try:
        shape = dims(fields.get("size"), "shape", limits)
        dtype = _dtype(fields.get("properties"))
        chunks = fields.get("chunks")
        if dtype is None or not isinstance(chunks, list):
            raise BadRecord("it has no dtype or no chunks")
        elements, whole, boxes = 0, prod(map(int, shape)), list[_Box]()
        for chunk in chunks:
            held = _fields(chunk, f"{_MODULE}.ChunkStorageMetadata")
            begins, sizes = _sizes(held.get("offsets"), "offset"), _sizes(held.get("sizes"), "size")
            if len(begins) != len(shape) or len(sizes) != len(shape):
                raise BadRecord(f"a chunk of {list(sizes)} at {list(begins)} in a tensor of {list(shape)}")
            if any(begin + size > most for begin, size, most in zip(begins, sizes, shape, strict=True)):
                raise BadRecord(f"a chunk of {list(sizes)} at {list(begins)} leaves the tensor of {list(shape)}")
            place = places.get(_where(name, begins))
            if place is None:
                raise BadRecord(f"the chunk at {list(begins)} lies nowhere")
            if (nbytes := TensorSpec(dtype, sizes).nbytes) > place.length and not place.transformed:
                raise BadRecord(
                    f"the chunk at {list(begins)} has {nbytes} bytes, and {place.length} in {quoted(place.file)}"
                )
            if all(sizes):
                boxes.append((begins, tuple(begin + size for begin, size in zip(begins, sizes, strict=True))))
            elements += prod(map(int, sizes))
        if elements != whole:
            raise BadRecord(f"its chunks have {elements} elements, it has {whole}")
        _hold_apart(boxes, limits)
    except (BadRecord, LimitError) as error:
        error.key = name
        raise
    form = f"distributed (DCP, {len(chunks)} chunk{'s' if len(chunks) != 1 else ''})"
    return TensorRef(TensorSpec(dtype, shape), Absent(form), Stored("cpu", 0))


_Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The first element of a chunk in each dimension, and the one behind its last."""


def _hold_apart(boxes: list[_Box], limits: Limits) -> None:
    """BadRecord for chunks that have an element in common: as many elements as the tensor has must be all of them."""
    looked, rank = 0, len(boxes[0][0]) if boxes else 0
    axis = max(range(rank), key=lambda dim: len({begins[dim] for begins, _ in boxes}), default=-1)
    boxes.sort(key=lambda box: box[0][axis] if rank else 0)
    for number, (begins, ends) in enumerate(boxes):
        for other, stops in islice(boxes, number + 1, None):
            if rank and other[axis] >= ends[axis]:
                break
            looked += 1
            if looked > limits.repeats:
                raise LimitError("chunks side by side", "repeats", limits.repeats)
            if all(a < d and c < b for a, b, c, d in zip(begins, ends, other, stops, strict=True)):
                raise BadRecord(f"the chunks at {list(begins)} and {list(other)} overlap")


def _dtype(properties: Any) -> Any:
    """The dtype in TensorProperties, whose state is a tuple (or, of another torch, a dict)."""
    state = properties.state if isinstance(properties, Opaque) else None
    return dtype_of(state[0] if isinstance(state, tuple) and state else attributes(state).get("dtype"))


def _nested(leaves: dict[str, Any], planned: Any) -> dict[Any, Any]:
    """The names in each other, as they were before they were made flat."""
    root: dict[Any, Any] = {}
    keys = Keys()
    for name, value in leaves.items():
        steps = planned.get(name) if isinstance(planned, dict) else None
        if not isinstance(steps, tuple) or not steps or not all(type(step) in (str, int) for step in steps):
            steps = (name,)
        steps = tuple(map(keys.of, steps))
        into = root
        for step in steps[:-1]:
            into = into.setdefault(step, {})
            if not isinstance(into, dict):
                raise BadRecord(f"{name!r} lies inside of another tensor")
        if steps[-1] in into:
            raise BadRecord(f"two entries lie at {'.'.join(map(str, steps))!r}")
        into[steps[-1]] = value
    return root

"""A word for files that are no checkpoint of ours: what they are, and what to do with them."""

from __future__ import annotations

from collections.abc import Callable

from ckptsurgeon.formats import _protobuf, _wrapped
from ckptsurgeon.formats._probe import Probe

_AGAIN = "download it again"
_PICKLED = "where you trust it, load it in Python and write its tensors with torch.save or safetensors"
_EXPORTED = "it was exported for inference: take the checkpoint that it was made from"
_ARRAYS = "read its arrays with {} and save them with safetensors"
_NUMPY = _ARRAYS.format("numpy.load")

_BEGINNINGS: tuple[tuple[bytes, str, str | None], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file", "`git lfs pull` fetches it"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", "unpack it first"),
    (b"\x04\x22\x4d\x18", "an LZ4 archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras?)", _ARRAYS.format("h5py")),
    (b"GGUF", "a GGUF file (llama.cpp)", "take the safetensors or torch checkpoint that it was made from"),
    (b"lmgg", "a GGML file (llama.cpp)", "take the safetensors or torch checkpoint that it was made from"),
    (b"tjgg", "a GGML file (llama.cpp)", "take the safetensors or torch checkpoint that it was made from"),
    (b"\x93NUMPY", "a NumPy array (.npy)", _NUMPY),
    (b"\x7fELF", "a program", None),
    (b"<!DOCTYPE", "a web page (a failed download?)", _AGAIN),
    (b"<!doctype", "a web page (a failed download?)", _AGAIN),
    (b"<html", "a web page (a failed download?)", _AGAIN),
    (b"<?xml", "XML text (a failed download?)", _AGAIN),
    (b"{", "JSON text", None),
)
_FLATBUFFERS = {
    b"TFL3": "a TensorFlow Lite model",
    b"PTMF": "a torch mobile model (flatbuffer)",
    b"ET12": "an ExecuTorch program",
}
_ZIPS: tuple[tuple[str, str, Callable[[list[str]], bool]], ...] = (
    (
        "a NumPy archive (.npz)",
        _NUMPY,
        lambda names: all(name.endswith(".npy") for name in names),
    ),
    ("a Keras model", _ARRAYS.format("Keras"), lambda names: {"config.json", "model.weights.h5"} <= set(names)),
    ("a CoreML package", _EXPORTED, lambda names: any("com.apple.CoreML/" in name for name in names)),
    (
        "a torch.export program (.pt2)",
        "save its `state_dict` with torch.save",
        lambda names: any(
            name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json") for name in names
        ),
    ),
    (
        "a TorchScript archive of torch 1.0 to 1.3",
        "load it with torch.jit.load and save it again",
        lambda names: (
            any(name.endswith("model.json") and name.count("/") <= 1 for name in names)
            and any("tensors/" in name for name in names)
        ),
    ),
)
_LEVELDB = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def describe(probe: Probe) -> tuple[str, str | None]:
    """What the file seems to be, and what to do; None when there is nothing special to do.

    Raises InputError when the file begins as a zip archive and its directory is damaged.
    """
    if not probe.file.size:
        return "the file is empty", None
    if (known := _known(probe)) is not None:
        return f"is {known[0]}, no checkpoint", known[1]
    if (archive := _wrapped.describe(probe)) is not None:
        return f"is {archive[0]}", archive[1]
    if probe.head[:1] == b"\x80" and probe.head[1:2] in b"\x02\x03\x04\x05":
        return "is a plain Python pickle, no checkpoint that torch saved", _PICKLED
    if not probe.head.strip(b"\0"):
        return "begins with zeros only (an interrupted download?), no checkpoint", None
    return "is no checkpoint", None


def _known(probe: Probe) -> tuple[str, str | None] | None:
    head, names = probe.head, [name for name in probe.members if not name.endswith("/")]
    for words, hint, is_one in _ZIPS:
        if names and is_one(names):
            return words, hint
    for beginning, words, advice in _BEGINNINGS:
        if head.startswith(beginning):
            return words, advice
    if head[4:8] in _FLATBUFFERS:
        return _FLATBUFFERS[head[4:8]], _EXPORTED
    if probe.file.size >= 48 and probe.read(8, probe.file.size - 8) == _LEVELDB:
        return "the index of a TensorFlow checkpoint", _ARRAYS.format("tf.train.load_checkpoint")
    if head[64:68] == b"\xef\xbe\xad\xde" and head[4:8] == b"\2\0\0\0":
        return "the weights of a CoreML package", _EXPORTED
    if _is_msgpack(head):
        return "a msgpack file (Flax?)", _ARRAYS.format("flax.serialization.msgpack_restore")
    if (model := _protobuf.kind(probe.read, probe.file.size)) is not None:
        return model, _EXPORTED
    return None


def _is_msgpack(head: bytes) -> bool:
    """A map whose first key is a short text, and whose first value is a map, an array or an extension.

    Source: the msgpack specification; Flax stores arrays as extensions.
    """
    skip = {0xDE: 3, 0xDF: 5}.get(head[0], 1)
    if not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)) or len(head) < skip + 3:
        return False
    length = head[skip] - 0xA0
    key, value = head[skip + 1 : skip + 1 + length], head[skip + 1 + length : skip + 2 + length]
    maps_and_more = (*range(0x80, 0xA0), *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0))
    return (
        0 < length < 32
        and key.isascii()
        and key.decode().isprintable()
        and value[:1] != b""
        and value[0] in maps_and_more
    )

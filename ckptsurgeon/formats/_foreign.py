"""A word for files that are no checkpoint of ours: what they are, as far as their first bytes tell."""

from __future__ import annotations

from ckptsurgeon.formats._probe import Probe

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file (`git lfs pull` fetches it)"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a program"),
    (b"<!DOCTYPE", "a web page (a failed download?)"),
    (b"<html", "a web page (a failed download?)"),
    (b"{", "JSON text"),
)


def describe(probe: Probe) -> tuple[str, str | None]:
    return _describe(probe.head, probe.file.size), None


def _describe(head: bytes, size: int) -> str:
    """What a file that begins with `head` and has `size` bytes seems to be."""
    if not size:
        return "the file is empty"
    if head[:2] == b"PK":
        return "a zip archive, but no torch checkpoint: no data.pkl"
    for beginning, words in _BEGINNINGS:
        if head.startswith(beginning):
            return f"is {words}, no checkpoint"
    if head[257:262] == b"ustar":
        return "is a tar archive, which this version does not read"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "is a plain Python pickle, no checkpoint that torch saved"
    if not head.strip(b"\0"):
        return "begins with zeros only (an interrupted download?), no checkpoint"
    return "is no checkpoint"

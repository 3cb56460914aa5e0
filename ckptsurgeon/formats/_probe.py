"""What a format sees of a file to tell whether it is its own, and to read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ckptsurgeon.errors import InputError
from ckptsurgeon.evaluate import read_exactly
from ckptsurgeon.formats._zip import BadZip, Member, read_directory
from ckptsurgeon.limits import Limits
from ckptsurgeon.sources import File

HEAD = 4096
"""Bytes of the file's beginning that every format may look at."""


@dataclass(frozen=True)
class Probe:
    """An open file: its `head` is in memory, the rest is read through `descriptor`."""

    file: File
    descriptor: int
    head: bytes
    limits: Limits

    @classmethod
    def of(cls, file: File, descriptor: int, limits: Limits) -> Probe:
        return cls(file, descriptor, bytes(read_exactly(descriptor, min(HEAD, file.size), 0, file.path)), limits)

    @property
    def is_zip(self) -> bool:
        """Whether the file begins as a zip archive does, empty ones included."""
        return self.head[:4] in (b"PK\3\4", b"PK\5\6")

    @cached_property
    def members(self) -> dict[str, Member]:
        """The directory of a zip archive, by name; none when the file is no zip at all.

        Raises InputError when the directory is damaged or can be understood in two ways.
        """
        if not self.is_zip:
            return {}
        try:
            return read_directory(self.descriptor, self.file.size, self.limits)
        except BadZip as error:
            raise InputError(f"damaged zip archive: {error}", path=self.file.path) from None

    def read(self, count: int, offset: int) -> bytes:
        """`count` bytes of the file at `offset`; InputError when they are not there."""
        return bytes(read_exactly(self.descriptor, count, offset, self.file.path))

"""Checksums: of every record that is written into a zip, and of every record that is read out of one.

Each is made of stretches that threads sum up in any order; where a record is copied whole, one sum
serves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckptsurgeon.checksum import crc32_combine
from ckptsurgeon.errors import InputError
from ckptsurgeon.evaluate import damaged
from ckptsurgeon.sources import Extent, File

Range = tuple[File, int, int]
"""A file, the byte where a stretch of it begins, and its bytes."""


class Digest:
    """The CRC-32 of consecutive stretches, each told by its place."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, int]] = {}

    def put(self, at: int, crc: int, nbytes: int) -> None:
        """The sum of `nbytes` at byte `at`."""
        self._sums[at] = crc, nbytes

    def value(self) -> int:
        """The sum of all stretches, in the order of their places."""
        made = 0
        for at in sorted(self._sums):
            crc, nbytes = self._sums[at]
            made = crc32_combine(made, crc, nbytes)
        return made

    @staticmethod
    def joined(digests: Sequence[Digest], nbytes: int) -> int:
        """The sum of the stretches of several digests, end to end, which must be of `nbytes` in all."""
        made = total = 0
        for digest in digests:
            size = sum(count for _, count in digest._sums.values())
            made, total = crc32_combine(made, digest.value(), size), total + size
        if total != nbytes:
            raise AssertionError(f"{total} bytes were summed up where {nbytes} were written")
        return made


class Digests:
    """What is to be summed up while files are written: ranges of sources, and what they must come to."""

    def __init__(self) -> None:
        self.ranges: dict[Range, Digest] = {}
        self._expected: dict[Range, tuple[Extent, str | None]] = {}

    def of(self, file: File, begin: int, nbytes: int) -> Digest:
        """The digest of a stretch of a source, which somebody must fill."""
        return self.ranges.setdefault((file, begin, nbytes), Digest())

    def expect(self, extent: Extent, key: str | None) -> None:
        """The record that an extent is a part of is to be proven, whole."""
        record = extent.record
        if record is not None and record.crc is not None and extent.codec is None:
            place = (extent.file, record.offset, record.nbytes)
            self.of(*place)
            self._expected.setdefault(place, (extent, key))

    def prove(self) -> None:
        """InputError, with the key, for the first record that does not have its checksum."""
        for error in self._damaged():
            raise error

    def _damaged(self) -> Iterator[InputError]:
        for place, (extent, key) in self._expected.items():
            assert extent.record is not None
            found = Digest.joined([self.ranges[place]], extent.record.nbytes)
            if found != extent.record.crc:
                error = damaged(extent)
                error.key = key
                yield error

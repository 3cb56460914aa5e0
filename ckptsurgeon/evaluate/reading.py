"""Bytes out of files: exactly those that were asked for, or an error that says where they end."""

from __future__ import annotations

import os
import threading
import zlib
from types import TracebackType

from ckptsurgeon.errors import InputError
from ckptsurgeon.sources import Deflate, File


def read_exactly(descriptor: int, nbytes: int, offset: int, path: str) -> bytearray:
    """`nbytes` from `offset` of a file; InputError when it ends before."""
    buffer = bytearray(nbytes)
    read_into(descriptor, memoryview(buffer), offset, path)
    return buffer


def read_into(descriptor: int, view: memoryview, offset: int, path: str) -> None:
    """Fill `view` from `offset` of a file; InputError when it ends before."""
    done, nbytes = 0, len(view)
    while done < nbytes:
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", path=path) from error
        if not got:
            raise InputError(f"ends at byte {offset + done}, {nbytes - done} bytes too early", path=path)
        done += got


class Handles:
    """The files that a pass reads: each thread keeps the one it read last, so that a thousand shards
    need no thousand descriptors.  To be used in a `with`, which closes them."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: set[int] = set()
        self.files: set[File] = set()

    def __enter__(self) -> Handles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for descriptor in self._open:
                os.close(descriptor)
            self._open.clear()

    def descriptor(self, file: File) -> int:
        """A descriptor of `file` for this thread, until it asks for another one; InputError when it is
        gone or no longer the same."""
        known: tuple[File, int] | None = getattr(self._local, "last", None)
        if known is not None:
            if known[0] is file or known[0] == file:
                return known[1]
            self._close(known[1])
            del self._local.last
        descriptor = file.open()
        with self._lock:
            self._open.add(descriptor)
            self.files.add(file)
        self._local.last = file, descriptor
        return descriptor

    def _close(self, descriptor: int) -> None:
        with self._lock:
            self._open.discard(descriptor)
        os.close(descriptor)


class Inflating:
    """The bytes of a compressed member from first to last, in stretches of any size; nothing is kept."""

    def __init__(self, file: File, codec: Deflate, size: int) -> None:
        self._file, self._size = file, size
        self._inflate = zlib.decompressobj(-15)
        self._at, self._left = codec.start, codec.nbytes

    def skip(self, handles: Handles, count: int) -> None:
        """Leave out `count` bytes."""
        while count:
            step = min(count, self._size)
            self.read(handles, step)
            count -= step

    def finish(self, handles: Handles) -> None:
        """InputError when anything is left of the member, inflated or not."""
        more = b""
        while not self._inflate.eof and not more and (packed := self._packed(handles)):
            more = self._inflate.decompress(packed, 1)
        if more or not self._inflate.eof or self._inflate.unused_data or self._left:
            raise InputError("a compressed record does not end where its compressed data ends", path=self._file.path)

    def _packed(self, handles: Handles) -> bytes | bytearray:
        """What is to be inflated next; nothing at the end of the member."""
        if not self._inflate.unconsumed_tail and self._left:
            step, at = min(self._left, self._size), self._at
            self._at, self._left = at + step, self._left - step
            return read_exactly(handles.descriptor(self._file), step, at, self._file.path)
        return self._inflate.unconsumed_tail

    def read(self, handles: Handles, count: int) -> bytearray:
        """The next `count` bytes; InputError when the member is damaged or ends before."""
        made = bytearray()
        while len(made) < count:
            packed = self._packed(handles)
            try:
                data = self._inflate.decompress(packed, count - len(made))
            except zlib.error as error:
                raise InputError(f"a compressed record is damaged ({error})", path=self._file.path) from error
            if not data and (not packed or self._inflate.eof):  # its end may come before all that it was given
                raise InputError("a compressed record is shorter than the archive says", path=self._file.path)
            made += data
        return made

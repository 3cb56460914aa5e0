"""Bytes from file to file, inside the kernel where that is possible.

`copy_file_range` shares blocks where the file system can, `sendfile` serves between file systems, and a
bounded buffer does the rest, whose errors say which side failed.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

from ckptsurgeon.evaluate import read_into
from ckptsurgeon.formats import PAGES
from ckptsurgeon.writing import put

_BUFFER = 1 << 20
_OUTPUT_IS_AT_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_local = threading.local()


def buffer() -> memoryview:
    """A block of memory that belongs to this thread."""
    made: memoryview | None = getattr(_local, "buffer", None)
    if made is None:
        made = _local.buffer = memoryview(bytearray(_BUFFER))
    return made


class Copier:
    """Copies into one file.  A way that the kernel refuses once is not tried again."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._lock = threading.Lock()
        ways: list[Callable[[int, int, int, int], int]] = []
        if hasattr(os, "copy_file_range"):
            ways.append(self._copy_file_range)
        if hasattr(os, "sendfile"):
            ways.append(self._sendfile)
        self._ways = ways

    def copy(self, source: int, begin: int, nbytes: int, offset: int, path: str) -> None:
        """`nbytes` from `begin` of a file to `offset` of this one.

        InputError (with `path`) when the source cannot be read or ends before, OSError when the output fails.
        """
        done = 0
        # the kernel goes in steps of so many bytes, which are best where pages begin
        head = -offset % PAGES if nbytes > _BUFFER else 0
        while done < nbytes and self._ways:
            way = self._ways[0]
            step = head - done if done < head < nbytes else nbytes - done
            try:
                got = way(source, begin + done, step, offset + done)
            except OSError as error:
                if error.errno in _OUTPUT_IS_AT_FAULT:
                    raise
                got = 0
            if not got:  # refused, or the source is at its end, which the buffer tells from each other
                self._ways = [other for other in self._ways if other is not way]
            done += got
        while done < nbytes:
            view = buffer()[: nbytes - done]
            read_into(source, view, begin + done, path)
            put(self.descriptor, view, offset + done)
            done += len(view)

    def _copy_file_range(self, source: int, begin: int, nbytes: int, offset: int) -> int:
        return os.copy_file_range(source, self.descriptor, nbytes, begin, offset)

    def _sendfile(self, source: int, begin: int, nbytes: int, offset: int) -> int:
        with self._lock:  # it writes where the descriptor stands
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.sendfile(self.descriptor, source, begin, nbytes)

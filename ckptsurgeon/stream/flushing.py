"""Bytes go out to the disk while more are written, so that the last sync finds little left to do."""

from __future__ import annotations

import os
import threading
from types import TracebackType

_EVERY = 64 << 20
"""Bytes between two flushes."""


class Flusher:
    """Syncs a growing file now and then, on a thread of its own; in a `with`, whose end raises what it met."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._since = descriptor, 0
        self._thread: threading.Thread | None = None
        self._wanted, self._over = threading.Event(), False
        self._error: OSError | None = None

    def wrote(self, nbytes: int) -> None:
        """Count bytes that were written; called by one thread at a time."""
        self._since += nbytes
        if self._since >= _EVERY:
            self._since = 0
            if self._thread is None:
                thread = threading.Thread(target=self._run, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more threads: the last sync does it all
                    return
                self._thread = thread
            self._wanted.set()

    def _run(self) -> None:
        try:
            while True:
                self._wanted.wait()
                self._wanted.clear()
                if self._over:
                    return
                os.fdatasync(self._descriptor)
        except OSError as error:
            self._error = error

    def __enter__(self) -> Flusher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._over = True
            self._wanted.set()
            self._thread.join()
        if self._error is not None and error is None:
            raise self._error

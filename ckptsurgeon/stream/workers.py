"""Work that several threads take from one list, the caller among them; the first failure ends it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator

Work = Callable[[], None]


def run(work: Iterable[Work], threads: int) -> None:
    """Do all of `work`, in order as far as `threads` at a time allow; what the first failure raised comes out."""
    if threads <= 1:
        for each in work:
            each()
        return
    shared = _Shared(iter(work))
    helpers: list[threading.Thread] = []
    for _ in range(threads - 1):
        # with the limits that are in force here
        helper = threading.Thread(target=contextvars.copy_context().run, args=(shared.help,), daemon=True)
        try:
            helper.start()
        except RuntimeError:  # the system gives no more of them: those that there are do the work
            break
        helpers.append(helper)
    try:
        shared.work()
    except BaseException as error:
        shared.fail(error)
    finally:
        for helper in helpers:
            helper.join()
    if shared.error is not None:
        raise shared.error


class _Shared:
    def __init__(self, work: Iterator[Work]) -> None:
        self._left, self._lock = work, threading.Lock()
        self.error: BaseException | None = None

    def work(self) -> None:
        while self.error is None:
            with self._lock:
                each = next(self._left, None)
            if each is None:
                return
            each()

    def help(self) -> None:
        try:
            self.work()
        except BaseException as error:  # it is raised by the caller
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        if self.error is None or not isinstance(error, Exception):
            self.error = error

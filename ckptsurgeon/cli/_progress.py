"""Progress on a terminal, for anything that takes longer than a second."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from ckptsurgeon.errors import shown

_PATIENCE = 1.0


@contextlib.contextmanager
def bar(words: str, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback for bytes done and bytes in all; None where no progress is to be shown."""
    if not shown:
        yield None
        return
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        update: Callable[[int, int], None] | None = None

        def report(done: int, total: int) -> None:
            nonlocal update
            if update is None and time.monotonic() - began > _PATIENCE:
                update = _begin(stack, words)
            if update is not None:
                update(done, total)

        yield report


@contextlib.contextmanager
def busy(words: str, shown: bool) -> Iterator[None]:
    """Words with a spinner while something of unknown length goes on, such as building a model."""
    if not shown:
        yield
        return
    with contextlib.ExitStack() as stack:
        timer = threading.Timer(_PATIENCE, lambda: stack.enter_context(_spinner(words)))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _spinner(words: str) -> contextlib.AbstractContextManager[object]:
    from rich.console import Console

    return Console(stderr=True).status(_plain(words))


def _plain(words: str) -> str:
    """Words with the name of a file in them, as they are: nothing in brackets is a colour, nothing moves the cursor."""
    from rich.markup import escape

    return escape(shown(words))


def _begin(stack: contextlib.ExitStack, words: str) -> Callable[[int, int], None]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    drawn = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    stack.enter_context(drawn)
    task = drawn.add_task(_plain(words))
    return lambda done, total: drawn.update(task, completed=done, total=total)

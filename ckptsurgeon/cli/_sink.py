"""Where everything that a command says goes, and how failures become exit codes."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

import typer

from ckptsurgeon.cli._options import limits
from ckptsurgeon.errors import MOST_SHOWN, CkptError, OutputError, PlanError, Problem, RuleError
from ckptsurgeon.limits import limited

NO, BAD = 1, 2
_PIPE_CLOSED = 141
NO_MEMORY = (
    "the machine has no memory left for this; raise its limit (`ulimit -v`, a container's), or take less with "
    "--jobs 1 and a smaller --max-memory where a command has them"
)
_NO_MEMORY_SAID = ("DefaultCPUAllocator: can't allocate memory", "failed to map segment from shared object")
_BATCH = 1000
_F = TypeVar("_F", bound=Callable[..., None])


class Sink:
    """Results to stdout, as text or as one JSON object; notes to stderr; nothing when quiet."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet

    def result(self, text: Callable[[], str | Iterable[str]], data: Callable[[], dict[str, Any]]) -> None:
        """The one result of a command, in the form that was asked for; a text may come in lines."""
        if self.as_json:
            _written(json.dumps(data(), indent=2, ensure_ascii=True))
        elif not self.quiet:
            found = text()
            lines = iter((found,) if isinstance(found, str) else found)
            while batch := list(islice(lines, _BATCH)):
                _written(_encodable("\n".join(batch)))

    def note(self, text: str) -> None:
        """Something worth knowing that is no result."""
        if not self.quiet:
            from ckptsurgeon.errors import shown

            typer.echo(f"ckpt: {_encodable(shown(text))}", err=True)

    def cached(self, label: str) -> None:
        """The note that a model was not built: an answer from the cache must not pass for a fresh one."""
        self.note(f"the header of {label} is from the cache; --no-cache builds the model anew")

    @property
    def shows_progress(self) -> bool:
        return not self.quiet and not self.as_json and sys.stderr.isatty()


def _written(text: str) -> None:
    """Text to stdout; OutputError where it takes no more, as on a full disk, and nothing else will come."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        _closed()
        raise OutputError("the standard output", error.strerror or str(error)) from None


def _closed() -> None:
    """Let what Python still holds for stdout go nowhere: it would fail again at the end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _encodable(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def problems(found: tuple[Problem, ...]) -> None:
    """Problems on stderr: at most ten, then a count."""
    from ckptsurgeon.report._text import shown

    for problem in found[:MOST_SHOWN]:
        lines = [shown(line) for line in str(problem).split("\n")]
        typer.echo(_encodable("ckpt: error: " + "\n".join(lines)), err=True)
    if len(found) > MOST_SHOWN:
        typer.echo(f"ckpt: error: … and {len(found) - MOST_SHOWN} more problems", err=True)


def failing(command: _F) -> _F:
    """A command under its `--reader-limit`, whose errors become `ckpt: error: …` and an exit code; bugs keep their
    traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with limited(limits(kwargs.get("reader_limit"))):
                command(*args, **kwargs)
        except (PlanError, RuleError) as error:
            problems(error.problems)
            raise typer.Exit(NO if isinstance(error, PlanError) else BAD) from None
        except CkptError as error:
            problems((Problem(str(error)),))
            raise typer.Exit(BAD) from None
        except BrokenPipeError:
            _closed()
            raise typer.Exit(_PIPE_CLOSED) from None
        except Exception as error:
            if not lacks_memory(error):
                raise
        else:
            return
        problems((Problem(NO_MEMORY),))  # by now what the failure held is free again
        raise typer.Exit(BAD)

    return run  # type: ignore[return-value]


def lacks_memory(error: BaseException) -> bool:
    """Whether the machine had no memory to give: what Python, torch's allocator and the loader of libraries say then.

    It is no bug, and no fault of the file: what a file may ask for is bounded before.
    """
    found: BaseException | None = error
    while found is not None:
        full = isinstance(found, OSError) and found.errno == errno.ENOMEM
        if full or isinstance(found, MemoryError) or any(words in str(found) for words in _NO_MEMORY_SAID):
            return True
        found = found.__cause__ or found.__context__
    return False

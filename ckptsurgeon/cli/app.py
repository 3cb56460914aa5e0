"""`ckpt` and `ckptsurgeon`: the application and its commands.

A command's module is imported, and its parameters are built, only when it is the one that is
called: typer makes a validator for each parameter of each command, which alone would take longer
than a look into a file.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

COMMANDS = ("ls", "diff", "remap", "align", "check", "convert", "verify", "invert", "freeze-plan", "rules", "recipes")


def _version(wanted: bool) -> None:
    if wanted:
        from ckptsurgeon import __version__

        typer.echo(f"ckptsurgeon {__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def build(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """The application with these commands."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Look into checkpoints, hold them against a model, change them by rules, write clean ones. "
        "Nothing in a checkpoint is ever run.",
    )
    app.callback()(_main)
    for name in commands:
        word = name.replace("-", "_")
        app.command(name)(getattr(import_module(f"ckptsurgeon.cli.commands.{word}"), word))
    return app


def _terminated(number: int, frame: object) -> None:
    """End as an exception does, so that no half-written file stays."""
    sys.exit(128 + number)


def main() -> None:
    """The entry point of both scripts."""
    signal.signal(signal.SIGTERM, _terminated)
    gc.set_threshold(500_000)  # a command makes many objects and hardly any garbage
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy is for bytes here, and its threads take address space
    called = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        build((called,) if called in COMMANDS else COMMANDS)()
    except MemoryError:  # before a command began: see `_sink.failing`
        sys.stderr.write("ckpt: error: the machine has no memory left to start with\n")
        sys.exit(2)
    except OSError as error:  # of a full disk below `--help`; commands tell their own: see `_sink`
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stderr.write(f"ckpt: error: the standard output: {error.strerror}\n")
        sys.exit(2)

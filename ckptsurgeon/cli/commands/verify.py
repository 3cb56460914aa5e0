"""`ckpt verify`: whether a checkpoint is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptsurgeon.cli._options import Json, Quiet, ReaderLimits, Select
from ckptsurgeon.cli._progress import bar
from ckptsurgeon.cli._sink import BAD, NO, Sink, failing, problems


@failing
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint, an index of shards, or their folder.")],
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another checkpoint that must hold the same values.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First take back or complete a `remap --in-place` that was interrupted.")
    ] = False,
    select: Select = None,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every byte of a checkpoint and hold it against its checksums.

    The header is held against the file's size, an index against its shards. Exit 2 when the file is
    damaged; with --against 1 when names, shapes, dtypes or values differ.
    """
    from ckptsurgeon import surgery
    from ckptsurgeon.report import verified

    sink = Sink(as_json, quiet)
    with bar(f"reading {file.name}", sink.shows_progress) as progress:
        found = surgery.verify(file, against, select=select, repair=repair, progress=progress)
    if found.ok or as_json:
        sink.result(lambda: verified.text(found), lambda: verified.data(found))
    if not found.ok:
        problems(found.problems)
        raise typer.Exit(BAD)
    if found.against is not None and not found.against.same:
        raise typer.Exit(NO)

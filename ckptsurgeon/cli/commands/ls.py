"""`ckpt ls`: what is in a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from ckptsurgeon.cli._options import Json, Match, NoCache, Quiet, ReaderLimits, Select, compiled
from ckptsurgeon.cli._progress import busy
from ckptsurgeon.cli._sink import Sink, failing


@failing
def ls(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A checkpoint; its kind is found by its content. With --params also a model spec."
        ),
    ],
    match: Match = None,
    tree: Annotated[
        bool, typer.Option("--tree", help="Draw the whole object in the file, with everything beside the tensors.")
    ] = False,
    extras: Annotated[
        bool, typer.Option("--extras", help="Show what is beside the tensors: epoch, optimizer, hyperparameters …")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the values too: min, max, mean, std, NaN and Inf counts.")
    ] = False,
    params: Annotated[
        bool,
        typer.Option(
            "--params",
            help="List the parameters with their index in model.parameters(): no buffers, tied ones once. "
            "FILE may be a model: torchvision:resnet18",
        ),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="At most N rows; with --tree, N children of each node.")
    ] = None,
    select: Select = None,
    no_cache: NoCache = False,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the tensors of a checkpoint: key, dtype, shape, bytes. Only its header is read.

    With --params FILE may be a model, whose spec names code that is run: torchvision:NAME, timm:NAME,
    transformers:FOLDER, package.module:factory, file.py:factory.
    """
    from ckptsurgeon import targets
    from ckptsurgeon.errors import UsageError

    sink = Sink(as_json, quiet)
    if (tree or extras) and (match or stats or (tree and extras)):
        raise UsageError("--tree and --extras stand alone, with --limit; --match and --stats are about tensors")
    if params and (tree or extras or stats):
        raise UsageError("--params stands alone, with --match and --limit")
    pattern = compiled(match)
    if params:
        _parameters(sink, str(file), pattern, limit, select, no_cache)
        return
    if targets.is_spec(str(file)):
        raise UsageError(f"{file}: no such file; the parameters of a model are listed with --params")
    _file(sink, file, "tree" if tree else "extras" if extras else "tensors", pattern, limit, select, stats)


def _file(
    sink: Sink,
    file: Path,
    what: Literal["tree", "extras", "tensors"],
    pattern: re.Pattern[str] | None,
    limit: int | None,
    select: str | None,
    stats: bool,
) -> None:
    """A file, as its tree, as what is beside its tensors, or as its tensors."""
    from ckptsurgeon import formats
    from ckptsurgeon.report import listing

    document = formats.inspect(file)
    if what == "tree":
        from ckptsurgeon.report import tree as trees

        root = trees.tree(document, select)
        sink.result(lambda: trees.text(root, limit), lambda: trees.data(document, root))
    elif what == "extras":
        from ckptsurgeon.report import extras as rest

        found, place = rest.of(document, select)
        sink.result(lambda: rest.text(document, found, limit), lambda: rest.data(document, found, place))
    elif select is None and document.candidates and document.main is None:
        if pattern is not None or stats:
            sink.note("--match and --stats are about one state dict: choose one with --select")
        sink.result(lambda: listing.candidates_text(document), lambda: listing.candidates_data(document))
    else:
        ckpt = document.checkpoint(select)
        keys, more = listing.selected(ckpt, pattern, limit)
        with busy("reading the values", stats and sink.shows_progress):
            figures = listing.figures(ckpt, keys) if stats else None
        sink.result(lambda: listing.lines(ckpt, keys, more, figures), lambda: listing.data(ckpt, keys, more, figures))


def _parameters(
    sink: Sink, name: str, pattern: re.Pattern[str] | None, limit: int | None, select: str | None, no_cache: bool
) -> None:
    """`--params`: of a model by its header, of a file as far as it tells."""
    from ckptsurgeon import surgery, targets
    from ckptsurgeon.errors import UsageError
    from ckptsurgeon.report import parameters

    if not targets.is_spec(name):
        found = parameters.of_checkpoint(surgery.open_checkpoint(name, select=select))
    elif select is not None:
        raise UsageError("--select is about a file, and a model has one state dict")
    else:
        with busy(f"building {name}", sink.shows_progress):
            found = parameters.of_model(surgery.target_of(name, cache=not no_cache))
    if found.is_cached:
        sink.cached(name)
    rows, more = parameters.selected(found, pattern, limit)
    sink.result(lambda: parameters.text(found, rows, more), lambda: parameters.data(found, rows, more))

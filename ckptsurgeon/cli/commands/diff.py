"""`ckpt diff`: a checkpoint against a model or another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptsurgeon.cli._options import (
    Config,
    Json,
    Match,
    NoCache,
    Quiet,
    ReaderLimits,
    RecipeFile,
    Rules,
    Select,
    Variables,
    compiled,
    rules_of,
)
from ckptsurgeon.cli._progress import bar, busy
from ckptsurgeon.cli._sink import NO, Sink, failing


@failing
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[
        str,
        typer.Argument(metavar="B|MODEL", help="Another checkpoint, or a model: torchvision:resnet18,num_classes=10"),
    ],
    rule: Rules = None,
    recipe: RecipeFile = None,
    variables: Variables = None,
    config: Config = None,
    values: Annotated[
        bool, typer.Option("--values", help="Read the tensors that both have, and compare their values too.")
    ] = False,
    min_coverage: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="X",
            help="Exit 0 when at least this share (0 to 1) of B's tensors and elements is matched; "
            "with --values only equal ones count.",
        ),
    ] = None,
    match: Match = None,
    limit: Annotated[int | None, typer.Option(min=0, metavar="N", help="At most N rows.")] = None,
    select: Select = None,
    no_cache: NoCache = False,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a checkpoint with a model or another checkpoint.

    Names, shapes and dtypes count, and with --values the values; exit 0 when they are the same, 1
    when they differ. Against a model dtypes are shown, but do not count. A model spec names code that is run:
    torchvision:NAME, timm:NAME, transformers:FOLDER, package.module:factory, file.py:factory.
    """
    from ckptsurgeon import surgery
    from ckptsurgeon.report import difference

    sink = Sink(as_json, quiet)
    pattern = compiled(match)
    rules = rules_of(recipe, rule, variables, config)
    if values:
        with bar(f"comparing with {b}", sink.shows_progress) as progress:
            found = surgery.diff(a, b, rules, select=select, values=True, cache=not no_cache, progress=progress)
    else:
        with busy(f"comparing with {b}", sink.shows_progress):
            found = surgery.diff(a, b, rules, select=select, cache=not no_cache)
    for remark in found.remarks:
        sink.note(remark)
    if found.is_cached:
        sink.cached(found.right)
    sink.result(lambda: difference.text(found, pattern, limit), lambda: difference.data(found, pattern, limit))
    enough = found.same if min_coverage is None else found.coverage.least >= min_coverage
    if not enough:
        raise typer.Exit(NO)

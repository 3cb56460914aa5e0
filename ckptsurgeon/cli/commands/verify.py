"""`ckpt verify`: whether a checkpoint is whole, and what it is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptsurgeon.cli._options import (
    Beside,
    Config,
    Dtype,
    Init,
    Json,
    Mismatched,
    Missing,
    Quiet,
    ReaderLimits,
    RecipeFile,
    Rules,
    Select,
    Unexpected,
    Variables,
    beside,
    rules_of,
)
from ckptsurgeon.cli._progress import bar
from ckptsurgeon.cli._sink import BAD, NO, Sink, failing, problems


@failing
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint, an index of shards, or their folder.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Another checkpoint that must hold the same values, or was the source."),
    ] = None,
    rule: Rules = None,
    recipe: RecipeFile = None,
    variables: Variables = None,
    config: Config = None,
    with_: Beside = None,
    recorded: Annotated[
        bool,
        typer.Option(
            "--recorded", help="Take the rules and options that FILE itself says it was made by; never a model."
        ),
    ] = False,
    to: Annotated[str | None, typer.Option(metavar="MODEL|FILE", help="What FILE was made to fit.")] = None,
    unexpected: Annotated[Unexpected | None, typer.Option(help="As it was given to remap.")] = None,
    mismatched: Annotated[Mismatched | None, typer.Option(help="As it was given to remap.")] = None,
    missing: Annotated[Missing | None, typer.Option(help="As it was given to remap.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="As it was given to remap.")] = False,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, metavar="N", help="As it was given to remap.")] = 0,
    init: Init = None,
    allow_unused: Annotated[bool, typer.Option("--allow-unused", help="Tolerate rules that match nothing.")] = False,
    nan: Annotated[bool, typer.Option("--nan", help="Count the NaN and infinities of every tensor.")] = False,
    digest: Annotated[
        bool, typer.Option("--digest", help="Print the digest of the contents, whatever their format and shards.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="First take back or complete a `remap --in-place` that was interrupted.")
    ] = False,
    select: Select = None,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every byte of a checkpoint and hold it against its checksums.

    The header is held against the file's size, an index against its shards and the files beside them, the contents
    against the digest that the file names. Exit 2 when the file is damaged; with --against 1 when names, shapes,
    dtypes or values differ.

    With --against and rules, FILE must be what they make of the other file, bit for bit.
    """
    from ckptsurgeon import audit, surgery
    from ckptsurgeon.report import verified

    sink = Sink(as_json, quiet)
    how: surgery.PlanOptions = {
        "unexpected": None if unexpected is None else unexpected.value,
        "mismatched": None if mismatched is None else mismatched.value,
        "missing": None if missing is None else missing.value,
        "fit": fit,
        "dtype": dtype,
        "seed": seed,
        "init": " ".join(init) if init else None,
        "allow_unused": allow_unused,
        "beside": beside(with_),
    }
    rules = rules_of(recipe, rule, variables, config)
    with bar(f"reading {file.name}", sink.shows_progress) as progress:
        found = audit.verify(
            file, against, rules, to,
            select=select, repair=repair, nan=nan, digest=digest, recorded=recorded, progress=progress, **how,
        )  # fmt: skip
    if found.ok or as_json:
        sink.result(lambda: verified.text(found), lambda: verified.data(found))
    if not found.ok:
        problems(found.problems)
        raise typer.Exit(BAD)
    if (found.against is not None and not found.against.same) or (found.proof is not None and not found.proof.same):
        raise typer.Exit(NO)

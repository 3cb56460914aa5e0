"""`ckpt align`: find the rules that make a checkpoint fit a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptsurgeon.cli._options import (
    Config,
    Force,
    Hints,
    Input,
    Json,
    NoCache,
    Quiet,
    ReaderLimits,
    RecipeFile,
    Rules,
    Select,
    SourceModel,
    Tolerance,
    Variables,
    rules_of,
)
from ckptsurgeon.cli._progress import busy
from ckptsurgeon.cli._sink import NO, Sink, failing, problems


@failing
def align(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint.")],
    target: Annotated[
        str, typer.Argument(metavar="MODEL|FILE", help="What it is to fit: a model, or another checkpoint.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="The recipe to write, as YAML.")
    ] = None,
    rule: Rules = None,
    recipe: RecipeFile = None,
    variables: Variables = None,
    config: Config = None,
    hint: Hints = None,
    attempt: Annotated[
        bool,
        typer.Option(
            "--try",
            help="Settle what is open by experiment: run the model of --source and MODEL, and see what gives equal "
            "outputs.",
        ),
    ] = False,
    model: SourceModel = None,
    input: Input = None,
    tolerance: Tolerance = None,
    force: Force = False,
    select: Select = None,
    no_cache: NoCache = False,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the rules that make a checkpoint fit a model of the same architecture under other names.

    Only headers are read. Shown is what goes where, how sure that is and why, then the rules. Exit 0 where `ckpt remap
    --auto --fit` would apply them; exit 1 where something is open or the architectures differ: then the questions are
    on stderr, with the --hint or --rule that answers each, and no recipe is written.

    With --try twins and square matrices that are open are put one way and another, and what alone makes both models
    give the same outputs is taken; it is shown as tried, with the error. What makes no difference stays open.
    """
    from ckptsurgeon import surgery
    from ckptsurgeon.errors import UsageError
    from ckptsurgeon.report import aligned

    sink = Sink(as_json, quiet)
    if attempt != (model is not None) or ((input or tolerance is not None) and not attempt):
        raise UsageError("--try runs both models: it goes with --source MODEL, and --input and --tolerance with it")
    rules = rules_of(recipe, rule, variables, config)
    with busy(f"aligning with {target}", sink.shows_progress):
        found = surgery.align(source, target, rules, hints=tuple(hint or ()), select=select, cache=not no_cache)
    if found.target.cached:
        sink.cached(found.target.label)
    if model is not None:
        from ckptsurgeon import forward

        given = forward.described(input) if input else None
        with busy("running both models", sink.shows_progress):
            found = forward.try_alignment(
                found, model, target, given, tolerance=forward.TOLERANCE if tolerance is None else tolerance
            )
    refused = found.refusals(fit=True)
    written = None
    if output is not None and not refused:
        aligned.save(found, output, force)
        written = output
    sink.result(lambda: aligned.text(found, written), lambda: aligned.data(found, written))
    if refused:
        problems(refused)
        raise typer.Exit(NO)

"""`ckpt check`: whether a surgery keeps what the network computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptsurgeon.cli._options import (
    Auto,
    Beside,
    Config,
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
    beside,
    rules_of,
)
from ckptsurgeon.cli._progress import busy
from ckptsurgeon.cli._sink import NO, Sink, failing, problems


@failing
def check(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The checkpoint, as it is before the surgery.")],
    model: SourceModel = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that the result is for; a model spec names code, which is run."),
    ] = None,
    rule: Rules = None,
    recipe: RecipeFile = None,
    variables: Variables = None,
    config: Config = None,
    with_: Beside = None,
    auto: Auto = False,
    hint: Hints = None,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="As in `ckpt remap`: what does not fit is dropped, what is missing begins anew."),
    ] = False,
    allow_unused: Annotated[bool, typer.Option("--allow-unused", help="Tolerate rules that match nothing.")] = False,
    input: Input = None,
    tolerance: Tolerance = None,
    select: Select = None,
    no_cache: NoCache = False,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the model before and the model after a surgery on the same inputs, and compare what they give.

    The plan is that of `ckpt remap` with the same options; nothing is written. Inputs are random, made of what the
    models say of themselves. Exit 0 where every output is equal within the tolerance, exit 1 where it is not, or
    the plan has problems. That a model takes the checkpoint says nothing of this: two norms that were exchanged have
    equal shapes.
    """
    from ckptsurgeon import forward, surgery
    from ckptsurgeon.errors import UsageError
    from ckptsurgeon.report import checked

    sink = Sink(as_json, quiet)
    rules = rules_of(recipe, rule, variables, config)
    to = to or (None if rules is None else rules.to)
    if model is None or to is None:
        raise UsageError("check runs two models: name that of IN with --source, and that of the result with --to")
    given = forward.described(input) if input else None
    with busy("planning", sink.shows_progress):
        plan = surgery.prepare(
            source, None, rules, to,
            select=select, fit=fit, allow_unused=allow_unused, beside=beside(with_), auto=auto,
            hints=tuple(hint or ()), cache=not no_cache,
        )  # fmt: skip
    found = None
    if plan.ok:
        with busy("running both models", sink.shows_progress):
            found = forward.check_forward(
                model, to, plan, given, tolerance=forward.TOLERANCE if tolerance is None else tolerance
            )
    if found is not None or as_json:
        sink.result(lambda: str(found), lambda: checked.data(plan, found, model))
    if found is None:
        problems(plan.problems)
    if found is None or not found.same:
        raise typer.Exit(NO)

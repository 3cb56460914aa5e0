"""`ckpt invert`: the way back of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptsurgeon.cli._options import (
    Beside,
    Config,
    Force,
    Json,
    Quiet,
    ReaderLimits,
    Rules,
    Select,
    Variables,
    beside,
    rules_of,
)
from ckptsurgeon.cli._sink import Sink, failing


@failing
def invert(
    source: Annotated[Path, typer.Option("--for", metavar="IN", help="The checkpoint to which the recipe applies.")],
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="The YAML file, or builtin:NAME.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="The YAML file to write; else it is printed.")
    ] = None,
    rule: Rules = None,
    variables: Variables = None,
    config: Config = None,
    with_: Beside = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Leave out the rules that have no inverse, instead of refusing.")
    ] = False,
    force: Force = False,
    select: Select = None,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the recipe that undoes a recipe, for checkpoints with the header of IN.

    It is made from what the rules do to the names of IN, not by turning patterns around, and planned before it is
    written. Where all operations are exact, `ckpt remap` with it gives back every bit. A rule that has no inverse is
    named, and nothing is written (exit 1).
    """
    from ckptsurgeon import cookbook
    from ckptsurgeon.errors import UsageError
    from ckptsurgeon.report import inverted

    sink = Sink(as_json, quiet)
    rules = rules_of(recipe, rule, variables, config)
    if rules is None:
        raise UsageError("name a recipe, or give rules with --rule")
    found = cookbook.invert(rules, source, select=select, lossy=lossy, beside=beside(with_))
    if output is not None:
        found.save(output, force=force)
    for problem in found.problems:
        sink.note(f"warning: {problem.text}")
    sink.result(lambda: inverted.text(found, output), lambda: inverted.data(found, output))

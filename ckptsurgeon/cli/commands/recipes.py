"""`ckpt recipes`: the recipes that come with the program."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptsurgeon.cli._options import Json, Quiet
from ckptsurgeon.cli._sink import Sink, failing


@failing
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this one, as a file to keep.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the built-in recipes, or print one.

    Each is used as `--recipe builtin:NAME`; where it has variables, --set or --config gives them.
    """
    from ckptsurgeon import cookbook
    from ckptsurgeon.report import recipes as report
    from ckptsurgeon.rules import builtin_path

    if name is not None:
        builtin_path(name.removeprefix("builtin:"))
    wanted = None if name is None else name.removeprefix("builtin:")
    found = tuple(one for one in cookbook.recipes() if wanted in (None, one.name))
    sink = Sink(as_json, quiet)
    sink.result(lambda: report.text(found) if name is None else found[0].text.rstrip(), lambda: report.data(found))

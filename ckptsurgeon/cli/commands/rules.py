"""`ckpt rules`: the operations that a rule can name."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptsurgeon.cli._options import Json, Quiet
from ckptsurgeon.cli._sink import Sink, failing


@failing
def rules(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Tell of this operation alone.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the operations of --rule, or tell of one: how it is written, its options, an example.

    A rule is one line. PATTERN is a Python regex, tried on the whole key; TEMPLATE is what re.sub takes, and braces in
    it hold arithmetic on groups ({\\1+1}). Nearly every operation takes where=COND and optional=yes: docs/rules.md.
    """
    from ckptsurgeon.report import operations

    found = operations.named(name)
    sink = Sink(as_json, quiet)
    sink.result(lambda: operations.text(found, name is not None), lambda: operations.data(found))

"""`ckpt freeze-plan`: what `cs.freeze` would freeze of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptsurgeon.cli._options import Json, Quiet
from ckptsurgeon.cli._progress import busy
from ckptsurgeon.cli._sink import Sink, failing


@failing
def freeze_plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model spec: torchvision:resnet18,num_classes=10")],
    pattern: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATTERN", help="Freeze parameters in whose names one of these regexes is found."),
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Freeze what is in modules of this class (BatchNorm2d), or of a kind: norm, embedding, prelu, bias; "
            "may be repeated.",
        ),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(metavar="N", help="Freeze the parameters whose index (`ckpt ls --params`) is below N."),
    ] = None,
    children: Annotated[
        int | None, typer.Option(metavar="N", help="Freeze the first N children; -1: all but the last.")
    ] = None,
    modules: Annotated[
        int | None,
        typer.Option(metavar="N", help="Freeze what the first N of model.modules() own; number 0 is the model."),
    ] = None,
    norm_stats: Annotated[
        bool, typer.Option("--norm-stats", help="Let the running statistics of norms among them stay as they are too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what `cs.freeze` would freeze of a model, and what would train.

    Which parameters are meant is said in one way; in none, all are. The model is built on the meta device, without
    values, and its spec names code that is run: torchvision:NAME, timm:NAME, transformers:FOLDER,
    package.module:factory, file.py:factory.
    """
    from ckptsurgeon import finetune, targets
    from ckptsurgeon.errors import UsageError

    sink = Sink(as_json, quiet)
    if not targets.is_spec(model):
        raise UsageError(f"{model}: freeze-plan wants a model, since a file has no modules; see `ckpt ls --params`")
    with busy(f"building {model}", sink.shows_progress):
        found = finetune.freeze(
            targets.built(model),
            pattern or None,
            types=types or None,
            until=until,
            children=children,
            modules=modules,
            norm_stats=norm_stats,
        )
    sink.result(lambda: str(found), lambda: found.data(model))

"""`ckpt` and `ckptsurgeon`: the application and its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptsurgeon.cli.commands import convert, diff, ls, remap

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look into checkpoints, hold them against a model, change them by rules, write clean ones. "
    "Nothing in a checkpoint is ever run.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from ckptsurgeon import __version__

        typer.echo(f"ckptsurgeon {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("ls")(ls.ls)
app.command("diff")(diff.diff)
app.command("remap")(remap.remap)
app.command("convert")(convert.convert)

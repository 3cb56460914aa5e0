"""`ckpt convert`: the same tensors in another format or dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptsurgeon.cli._options import (
    Dtype,
    Force,
    Jobs,
    Json,
    KeepExtras,
    MaxMemory,
    NoProvenance,
    Quiet,
    ReaderLimits,
    Select,
    ShardSize,
    Tied,
    TiedNames,
    WithDigest,
)
from ckptsurgeon.cli._progress import bar
from ckptsurgeon.cli._sink import Sink, failing


@failing
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint; its kind is found by its content.")],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="The file to write: .safetensors, .pth, .pt, .bin, .ckpt; a folder for shards."
        ),
    ],
    dtype: Dtype = None,
    keep_extras: KeepExtras = False,
    shard_size: ShardSize = None,
    tied: TiedNames = Tied.full,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    no_provenance: NoProvenance = False,
    digest: WithDigest = False,
    force: Force = False,
    select: Select = None,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the same tensors in another format or dtype.

    Exit 1, and nothing is written, when the output cannot hold a tensor: a sparse one, or a dtype
    that the format does not have.
    """
    from ckptsurgeon import surgery
    from ckptsurgeon.report import planned

    sink = Sink(as_json, quiet)
    with bar(f"writing {Path(output).name}", sink.shows_progress) as progress:
        written = surgery.convert(
            source,
            output,
            select=select,
            dtype=dtype,
            keep_extras=keep_extras,
            shard_size=shard_size,
            tied=tied.value,
            max_memory=max_memory,
            jobs=jobs,
            force=force,
            provenance=not no_provenance,
            digest=digest,
            progress=progress,
        )
    for warning in written.warnings:
        sink.note(f"warning: {warning}")
    plan = written.plan
    assert plan is not None
    sink.result(lambda: planned.text(plan, written, keep_extras), lambda: planned.data(plan, written))

"""`ckpt remap`: change a checkpoint by rules, to fit a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptsurgeon.cli._options import (
    Auto,
    Beside,
    Config,
    Dtype,
    Force,
    Hints,
    Init,
    InPlace,
    Jobs,
    Json,
    KeepExtras,
    MaxMemory,
    Mismatched,
    Missing,
    NoCache,
    NoProvenance,
    Optimizers,
    Order,
    Quiet,
    ReaderLimits,
    RecipeFile,
    Rules,
    Select,
    ShardSize,
    StrictExtras,
    Tied,
    TiedNames,
    Unexpected,
    Variables,
    WithDigest,
    beside,
    optimizers,
    rules_of,
)
from ckptsurgeon.cli._progress import bar, busy
from ckptsurgeon.cli._sink import NO, Sink, failing, problems


@failing
def remap(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="The checkpoint to change; it is left as it is, but for --in-place.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The file to write; its suffix says the format. A folder for shards."
        ),
    ] = None,
    rule: Rules = None,
    recipe: RecipeFile = None,
    variables: Variables = None,
    config: Config = None,
    with_: Beside = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="MODEL|FILE", help="What the result must fit; a model spec names code, which is run."),
    ] = None,
    auto: Auto = False,
    hint: Hints = None,
    unexpected: Annotated[Unexpected | None, typer.Option(help="Keys that the target does not have.")] = None,
    mismatched: Annotated[Mismatched | None, typer.Option(help="Keys whose shape differs from the target's.")] = None,
    missing: Annotated[
        Missing | None, typer.Option(help="Keys of the target that the checkpoint does not have.")
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="Make it load: strip wrappers, reshape sizes of 1, drop what is left, initialise what is missing.",
        ),
    ] = False,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, metavar="N", help="The seed of what is initialised.")] = 0,
    init: Init = None,
    keep_extras: KeepExtras = False,
    strict_extras: StrictExtras = False,
    optimizer: Optimizers = None,
    order: Order = None,
    shard_size: ShardSize = None,
    tied: TiedNames = Tied.full,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    no_provenance: NoProvenance = False,
    digest: WithDigest = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    in_place: InPlace = False,
    force: Force = False,
    allow_unused: Annotated[bool, typer.Option("--allow-unused", help="Tolerate rules that match nothing.")] = False,
    select: Select = None,
    no_cache: NoCache = False,
    reader_limit: ReaderLimits = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Change a checkpoint by rules, and write a clean one.

    Rules rename, drop, reshape, split, join, resize, cast … tensors: `ckpt rules` lists them. Nothing
    unresolved is ever written: a rule that matches nothing, two tensors of one name, and with --to every
    key that is unexpected, missing or of another shape, is a problem (exit 1) unless a policy settles it.
    --fit settles all of them. --auto finds the rules by itself where the architecture is the same; what is not
    certain is asked, and nothing is written (exit 1).

    With --in-place the file itself is changed, in no time whatever its size. A kill at any moment leaves
    the old or the new checkpoint, and the next --in-place or `ckpt verify --repair` puts the files right.
    """
    from ckptsurgeon import companions, surgery
    from ckptsurgeon.errors import UsageError
    from ckptsurgeon.report import planned

    sink = Sink(as_json, quiet)
    if output is None and not dry_run and not in_place:
        raise UsageError("-o OUT is missing; --dry-run shows the plan without it")
    about_output: dict[str, object] = {
        "-o": output,
        "--keep-extras": keep_extras,
        "--strict-extras": strict_extras,
        "--optimizer": optimizer,
        "--shard-size": shard_size,
        "--force": force,
        "--max-memory": max_memory,
        "--jobs": jobs,
        "--digest": digest,
    }
    given = [name for name, value in about_output.items() if value] + (["--tied"] if tied is Tied.alias else [])
    if in_place and given:
        raise UsageError(f"--in-place writes no other file, and {given[0]} is about one; leave one of them away")
    files = optimizers(optimizer, strict_extras and not keep_extras)
    companions.check(files, (str(source), output), force or dry_run)
    rules = rules_of(recipe, rule, variables, config)
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
        "order": order,
        "strict_extras": strict_extras and keep_extras,
        "cache": not no_cache,
        "auto": auto,
        "hints": tuple(hint or ()),
    }
    changes = None
    with busy("planning", sink.shows_progress):
        if in_place:
            changes = surgery.prepare_in_place(
                source, rules, to, select=select, dry_run=dry_run, provenance=not no_provenance, **how
            )
            plan = changes.plan
        else:
            plan = surgery.prepare(
                source,
                output,
                rules,
                to,
                select=select,
                keep_extras=keep_extras,
                shard_size=shard_size,
                tied=tied.value,
                max_memory=max_memory,
                jobs=jobs,
                force=force or dry_run,
                **how,
            )
    if plan.target is not None and plan.target.cached:
        sink.cached(plan.target.label)
    plan, others = companions.follow_all(plan, files, strict_extras)
    written = None
    if plan.ok and not dry_run and changes is not None:
        written = surgery.carry_out_in_place(changes)
    elif plan.ok and not dry_run and output is not None:
        what = f"writing {Path(output).name}"
        with companions.staged(others, force) as done, bar(what, sink.shows_progress) as progress:
            written = surgery.carry_out(
                plan,
                output,
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
        written = companions.told(written, done)
    for warning in written.warnings if written is not None else plan.warnings if plan.ok else ():
        sink.note(f"warning: {warning}")
    if plan.ok or dry_run or as_json:
        sink.result(
            lambda: planned.text(plan, written, keep_extras, changes), lambda: planned.data(plan, written, changes)
        )
    if not plan.ok:
        problems(plan.problems)
        raise typer.Exit(NO)

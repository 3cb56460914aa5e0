"""Options that several commands share, declared once."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ckptsurgeon.limits import Limits
    from ckptsurgeon.rules import Recipe


class Unexpected(StrEnum):
    """What to do with keys that the target does not have."""

    error = "error"
    drop = "drop"
    keep = "keep"


class Mismatched(StrEnum):
    """What to do with keys whose shape differs."""

    error = "error"
    drop = "drop"
    reshape = "reshape"
    overlap = "overlap"


class Missing(StrEnum):
    """What to do with keys that the checkpoint does not have."""

    error = "error"
    init = "init"
    skip = "skip"


class Tied(StrEnum):
    """How a format that forbids sharing holds names that share one tensor."""

    full = "full"
    alias = "alias"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no results and no notes, only errors.")]
Select = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="The state dict to take, as `model.state_dict` or `0.ema`; `.` is the root."),
]
Match = Annotated[str | None, typer.Option(metavar="PATTERN", help="Show only keys in which this regex is found.")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", metavar="RULE", help="A rule, such as 'strip module.'; may be repeated, in order."),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="A YAML file of rules, or builtin:NAME (see `ckpt recipes`); they run before --rule.",
    ),
]
Auto = Annotated[
    bool,
    typer.Option(
        "--auto",
        help="Find the rules that make IN fit the target (`ckpt align`), and apply them only where they are certain.",
    ),
]
Hints = Annotated[
    list[str] | None,
    typer.Option(
        "--hint",
        metavar="NAME=NAME",
        help="What is called the one in IN is called the other in the target; may be repeated.",
    ),
]
SourceModel = Annotated[
    str | None,
    typer.Option("--source", metavar="MODEL", help="The model that IN is for; a model spec names code, which is run."),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="What both models are given: 2x3x224x224, or 2x16:1000 for whole numbers below 1000, with NAME= before it "
        "where it goes by name; repeated for several.",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(metavar="X", help="The largest relative error of outputs that are the same; 1e-4 if not given."),
]
Variables = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A variable of the recipe or of --rule: {NAME} stands for it. NAME=@FILE takes the words of a file.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A config.json that has the variables of the recipe that --set does not give."),
]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        "--with", metavar="NAME=FILE", help="Another checkpoint, whose tensors the rules may take as NAME.key."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="D", help="Cast floating tensors to this dtype (bf16, float16, …); never integers."),
]
Init = Annotated[
    list[str] | None,
    typer.Option(
        "--init",
        metavar="SCHEME",
        help="How what is missing begins: kaiming_fan_out, xavier_uniform, normal:0.02, trunc_normal, torchvision, "
        "timm, zeros …, or TYPE=SCHEME, repeated; as the model does if not given.",
    ),
]
KeepExtras = Annotated[
    bool,
    typer.Option(
        "--keep-extras",
        help="Keep the rest of the file (epoch, optimizer …), in a .pth, .pt, .bin or .ckpt; optimizer state and "
        "averages follow the surgery.",
    ),
]
Optimizers = Annotated[
    list[str] | None,
    typer.Option(
        "--optimizer",
        metavar="IN=OUT",
        help="Another file in which there is the optimizer's state (optimizer.pt); OUT is that for the result.",
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model that the optimizer was made for, where the checkpoint's keys are sorted (safetensors): it "
        "counts parameters in that order.",
    ),
]
StrictExtras = Annotated[
    bool,
    typer.Option("--strict-extras", help="Write nothing where optimizer state or an average cannot follow."),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--shard-size",
        metavar="SIZE",
        help="Write shards of at most SIZE (5GB, 512MiB) and their index, into the folder OUT.",
    ),
]
TiedNames = Annotated[
    Tied,
    typer.Option(
        "--tied",
        help="In safetensors: write tied names in full, or one of them and the others as aliases in the metadata.",
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Memory that tensors may take on their way (512MiB), beside the program itself; 64MiB if not given. "
        "What cannot be done within it is a problem.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, max=256, metavar="N", help="Threads that move tensors; shards are written side by side."),
]
NoProvenance = Annotated[
    bool,
    typer.Option("--no-provenance", help="Leave out of the output what it was made of, by which rules and version."),
]
WithDigest = Annotated[
    bool,
    typer.Option(
        "--digest", help="Put a digest of the contents, whatever their format and shards, into the provenance."
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Build the model of a spec anew, though its header is in the cache.")
]
ReaderLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--reader-limit",
        metavar="NAME=N",
        help="Raise or lower what a file may ask for (docs/security.md lists the names); bytes also as 4GiB.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
InPlace = Annotated[
    bool,
    typer.Option(
        "--in-place",
        help="Rewrite only headers (and the index) of safetensors; what would move or change bytes is refused.",
    ),
]


def limits(words: list[str] | None) -> Limits | None:
    """The limits in force with those of `--reader-limit`; None without any. UsageError for other names and numbers."""
    if not words:
        return None
    from dataclasses import fields, replace

    from ckptsurgeon import formats
    from ckptsurgeon.errors import UsageError
    from ckptsurgeon.limits import current

    names = {field.name.replace("_", "-"): field.name for field in fields(current())}
    given: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in names:
            raise UsageError(f"--reader-limit {word}: write NAME=N, where NAME is one of {', '.join(names)}")
        given[names[name]] = formats.parse_size(value, "--reader-limit") or 0
    return replace(current(), **given)


def optimizers(words: list[str] | None, needed: bool) -> dict[str, str]:
    """The files of `--optimizer` and what they become. UsageError for what names none, and where they are `needed`."""
    from ckptsurgeon.errors import UsageError

    if needed and not words:
        raise UsageError("--strict-extras is about what --keep-extras or --optimizer takes along: give one of them")
    made: dict[str, str] = {}
    for word in words or ():
        source, _, output = word.rpartition("=")
        if not source or not output:
            raise UsageError(f"--optimizer {word}: write IN=OUT, as in optimizer.pt=new/optimizer.pt")
        if source in made:
            raise UsageError(f"--optimizer {word}: {source} is given twice")
        made[source] = output
    return made


def beside(words: list[str] | None) -> dict[str, str]:
    """The checkpoints of `--with`, by name. UsageError for what names none."""
    from ckptsurgeon.errors import UsageError

    made: dict[str, str] = {}
    for word in words or ():
        name, _, path = word.partition("=")
        if not name or not path or name in made:
            raise UsageError(f"--with {word}: write NAME=FILE, each name once")
        made[name] = path
    return made


def rules_of(
    recipe: str | None, rules: list[str] | None, variables: list[str] | None, config: Path | None
) -> Recipe | None:
    """What `--recipe`, `--rule`, `--set` and `--config` say together; None when there are no rules."""
    if not (recipe or rules or variables or config):
        return None
    from ckptsurgeon import cookbook
    from ckptsurgeon.rules import assignments

    return cookbook.recipe(recipe, rules, assignments(variables or ()), config)


def compiled(match: str | None) -> re.Pattern[str] | None:
    """The pattern of `--match`; UsageError when it is no regular expression."""
    from ckptsurgeon.errors import UsageError

    try:
        return None if match is None else re.compile(match)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--match {match}: not a regular expression: {error}") from None

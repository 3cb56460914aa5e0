"""The verbs that put it together: open, plan, diff, save, remap, convert, digest.

What only some of them need is imported inside of them: a diff of two files does not wait for the
planner.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ckptsurgeon import formats, targets
from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.dtypes import DType, parse_dtype
from ckptsurgeon.errors import PlanError, UsageError
from ckptsurgeon.limits import Limits, limited
from ckptsurgeon.provenance import made_of

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.aligner import Alignment
    from ckptsurgeon.differ import Diff
    from ckptsurgeon.formats import Tied
    from ckptsurgeon.inplace import Changes
    from ckptsurgeon.plans import Mismatched, Missing, Plan, Unexpected
    from ckptsurgeon.rules import Recipe, Rule
    from ckptsurgeon.stream import Budget, Progress

    Path = str | os.PathLike[str]
    Source = Path | Checkpoint
    Rules = Recipe | Iterable[str | Rule] | None
    Like = Source | Target | torch.nn.Module


def open_checkpoint(path: Path, select: str | None = None, *, limits: Limits | None = None) -> Checkpoint:
    """Open a checkpoint; only headers are read, and nothing in the file is run.

    `select` is the dotted path of the state dict inside the file's object (`.` for the root);
    without it, it is found by structure.

    Raises InputError when the file is damaged or of no known kind, AmbiguousError when several
    state dicts could be meant, UsageError when `select` names nothing.
    """
    with limited(limits):
        return formats.inspect(path).checkpoint(select)


def as_checkpoint(source: Source, select: str | None = None) -> Checkpoint:
    """`source` itself when it is a Checkpoint, else the checkpoint at that path."""
    if isinstance(source, Checkpoint):
        return source
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"a source is a path or a Checkpoint, not {type(source).__name__}")
    return open_checkpoint(source, select)


def _left(source: Source, select: str | None, target: Like) -> Checkpoint:
    """The checkpoint at `source`; `select` may be about the other file alone, where only that has several
    state dicts."""
    if select is None or isinstance(source, Checkpoint):
        return as_checkpoint(source, select)
    try:
        return as_checkpoint(source, select)
    except UsageError:
        if _is_ambiguous(target) and formats.inspect(source).main is not None:
            return as_checkpoint(source)
        raise


def _is_ambiguous(thing: Like) -> bool:
    if not isinstance(thing, str | os.PathLike) or (isinstance(thing, str) and targets.is_spec(thing)):
        return False
    document = formats.inspect(thing)
    return document.main is None and bool(document.candidates)


def target_of(thing: Like, select: str | None = None, *, cache: bool = True) -> Target:
    """What a checkpoint must fit: an `nn.Module`, a model spec, a path, a Checkpoint or a Target.

    An existing path wins over a spec; `select` picks one of several state dicts in the file, where
    none is clearly the main one.  The header of a spec is kept in the user's cache folder and taken from
    there (`.cached`), in a process that has not imported torch yet; without `cache` it is made anew.
    Raises TargetError or InputError.
    """
    if isinstance(thing, os.PathLike) or (isinstance(thing, str) and not targets.is_spec(thing)):
        document = formats.inspect(thing)
        return targets.of(document.checkpoint(select if document.main is None and document.candidates else None))
    return targets.of(thing, cache)


def diff(
    source: Source,
    target: Like,
    rules: Rules = None,
    *,
    select: str | None = None,
    values: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
) -> Diff:
    """A checkpoint (after `rules`, if any) against a model or another checkpoint; headers only.

    With `values` the tensors that both have with one shape are read, block by block, and compared
    too (`Row.values`); then those of a model are what the live module holds.  `cache` is that of
    `target_of`.  `progress` is called with the bytes read so far and those to read.

    Raises PlanError when a rule cannot be applied; with `values` UsageError for a model spec, which
    has none, and InputError when a tensor cannot be read.
    """
    from ckptsurgeon import differ

    against = target_of(target, select, cache=cache)
    if not values:
        against = replace(against, tensors=None, initial=None)  # names, dtypes and shapes are enough: half the memory
    if rules is None:
        left = _left(source, select, target)
        return _with_hint(differ.diff(left, against, values=values, progress=progress), left, against)
    from ckptsurgeon import planner
    from ckptsurgeon.rules import Recipe

    recipe = Recipe.of(rules)
    ckpt = _left(source, select or recipe.select, target)
    made = planner.apply_rules(ckpt, recipe, against).check().result
    return _with_hint(differ.diff(made, against, values=values, progress=progress), made, against)


_MOST_ALIGNED = 20_000
"""Keys of a comparison that is looked at for an alignment too: beyond that it would take longer than the answer."""


def _with_hint(found: Diff, left: Checkpoint, target: Target) -> Diff:
    """The comparison, with how much of the target an alignment reaches, where names and a few prefixes do not."""
    there = found.coverage.numel / found.coverage.of_numel if found.coverage.of_numel else 1.0
    suggested = found.suggestion.tensors / len(target.entries) if found.suggestion else 0.0
    reached = max(there, suggested)
    if not (found.count("missing") and found.count("unexpected")) or reached >= 1 or len(found.rows) > _MOST_ALIGNED:
        return found
    from ckptsurgeon import aligner

    share = aligner.align(left, target).agreement
    return replace(found, alignable=share) if share > reached else found


class PlanOptions(TypedDict, total=False):
    """The options of `plan`, which every verb that plans takes too."""

    unexpected: Unexpected | None
    mismatched: Mismatched | None
    missing: Missing | None
    fit: bool
    unwrap: bool
    dtype: str | DType | None
    seed: int
    init: str | Mapping[str, str] | None
    allow_unused: bool
    cache: bool
    beside: Mapping[str, Source] | None
    extras: bool
    strict_extras: bool
    order: Like | None
    auto: bool
    hints: Sequence[str]


def together(ckpt: Checkpoint, beside: Mapping[str, Source] | None) -> Checkpoint:
    """A checkpoint with the tensors of others, whose keys begin with the name of each and a dot; what else is in the
    files is the first one's.

    Raises UsageError for names that are none, and keys that are there already.
    """
    if not beside:
        return ckpt
    tensors = dict(ckpt.tensors)
    for name, source in beside.items():
        if not name or name != name.strip("."):
            raise UsageError(f"another checkpoint is called by a name of its own, as in --with lora=FILE, not {name!r}")
        for key, ref in as_checkpoint(source).items():
            if f"{name}.{key}" in tensors:
                raise UsageError(f"--with {name}: there is a {name + '.' + key!r} already; choose another name")
            tensors[f"{name}.{key}"] = ref
    return ckpt.replace(tensors=tensors)


def plan(
    source: Source,
    rules: Rules = None,
    to: Like | None = None,
    *,
    select: str | None = None,
    unexpected: Unexpected | None = None,
    mismatched: Mismatched | None = None,
    missing: Missing | None = None,
    fit: bool = False,
    unwrap: bool = False,
    dtype: str | DType | None = None,
    seed: int = 0,
    init: str | Mapping[str, str] | None = None,
    allow_unused: bool = False,
    cache: bool = True,
    beside: Mapping[str, Source] | None = None,
    extras: bool = False,
    strict_extras: bool = False,
    order: Like | None = None,
    auto: bool = False,
    hints: Sequence[str] = (),
) -> Plan:
    """Plan a surgery; no tensor is read, nothing is written, and every problem is in `.problems`.

    `to` is what the result must fit: a model, a model spec or a checkpoint.  What the rules leave
    open is settled by policies: `unexpected` keys are an "error", or "drop" or "keep" them;
    `mismatched` shapes are an "error", "drop" (then they are missing), "reshape" (dimensions of
    size 1) or "overlap" (copy what both have, initialise the rest); `missing` keys are an "error",
    "init" (as the model does, or by the scheme `init`, from `seed`) or "skip".  `fit` stands for drop, reshape and
    init, takes wrappers such as `module.` off the names, and drops what still has another shape; `unwrap` does
    nothing but take wrappers off (or put them on), where that brings more keys to names of `to`.  `dtype`
    casts the floating tensors of the result; `allow_unused` tolerates rules that match nothing;
    `cache` is that of `target_of`.  `beside` are other checkpoints whose tensors the rules may take, as
    `NAME.key`.  What a recipe says of the target and the policies holds where nothing else is given.  With `extras`
    what lies beside the state dict and is about its parameters (optimizer states, averages) goes through the same
    surgery, as `.followed` says; what cannot is left out with a warning, or a problem if `strict_extras`.  An
    optimizer counts parameters in the order of its model, which is that of the keys, but where they are sorted, as in
    safetensors: there `order` is that model.  The order of the new one is that of `to`.  The counters of parameters
    that are joined are read.

    With `auto` the rules that are not given are found (`cs.align`), and applied only where they are certain: what is
    open is a problem, with the question to answer by one of `hints` or a rule.

    `init` is the scheme by which what is missing begins, and what `overlap` does not copy: one word
    (`kaiming_fan_out`, `xavier_uniform`, `normal:0.02`, `trunc_normal`, `torchvision`, `timm`, `zeros` …), or a table
    of them by type of module, kind (`norm`, `embedding`, `prelu`, `bias`) and `*`; `cs.init_missing` says more.

    Raises RuleError for rules that cannot be read, UsageError for policies without `to`.
    """
    from ckptsurgeon import planner
    from ckptsurgeon.plans import Policies
    from ckptsurgeon.rules import Recipe

    recipe = Recipe.of(rules)
    ckpt = together(as_checkpoint(source, select or recipe.select), beside)
    to, said = recipe.to if to is None else to, recipe.options
    if strict_extras and not extras:
        raise UsageError("--strict-extras is about what --keep-extras keeps: give both")
    against = None if to is None else target_of(to, select, cache=cache)
    policies = Policies(
        said.get("unexpected") if unexpected is None else unexpected,
        said.get("mismatched") if mismatched is None else mismatched,
        said.get("missing") if missing is None else missing,
        fit or said.get("fit", False),
        unwrap,
    )
    how: dict[str, Any] = {
        "dtype": as_dtype(dtype or said.get("dtype")),
        "seed": seed or said.get("seed", 0),
        "init": init,
        "allow_unused": allow_unused or said.get("allow_unused", False),
    }
    if hints and not auto:
        raise UsageError("--hint helps to find rules: it goes with --auto")
    if auto and against is None:
        raise UsageError("--auto finds the rules that make a checkpoint fit a target: name one with --to")
    if auto and against is not None:
        made = _aligned(ckpt, against, recipe, hints).planned(policies, **how)
    else:
        made = planner.plan(ckpt, recipe, against, policies, **how)
    made = replace(made, order=None if order is None else target_of(order, cache=cache), beside=tuple(beside or ()))
    return _followed(made, strict_extras) if extras and made.source.extras else made


def align(
    source: Source,
    target: Like,
    rules: Rules = None,
    *,
    hints: Sequence[str] = (),
    select: str | None = None,
    cache: bool = True,
) -> Alignment:
    """The rules that make a checkpoint fit a model of the same architecture under other names; headers only.

    `rules` are applied first, and stand first in the recipe that is found.  `hints` answer what is open: `reduce=conv1`
    says that what is called `reduce` in the source is called `conv1` in the target.  `.certain` tells that every key
    is explained, `.questions` what is open, `.recipe` has the rules and `.matches` say why.

    Raises PlanError when a rule that was given cannot be applied, UsageError for a hint that is about no key.
    """
    from ckptsurgeon.rules import Recipe

    recipe = Recipe.of(rules)
    ckpt = _left(source, select or recipe.select, target)
    return _aligned(ckpt, target_of(target, select, cache=cache), recipe, hints)


def _aligned(ckpt: Checkpoint, target: Target, recipe: Recipe, hints: Sequence[str]) -> Alignment:
    """An alignment after rules that were given."""
    from ckptsurgeon import aligner, planner

    told = aligner.parsed(hints)
    if not recipe.rules:
        return aligner.align(ckpt, target, told)
    made = planner.apply_rules(ckpt, recipe, target).check().result
    found = aligner.align(made, target, told)
    whole = replace(recipe, source=None) + found.recipe
    return replace(found, recipe=whole, before=ckpt, given=len(recipe.rules))


def _followed(made: Plan, strict: bool) -> Plan:
    """The plan, with what lies beside the tensors changed as they are."""
    from ckptsurgeon import optimizer

    made = optimizer.follow(made, strict)
    assert made.result.derived is not None
    return replace(made, result=made.result.replace(derived=replace(made.result.derived, followed=True)))


def as_dtype(dtype: str | DType | None) -> DType | None:
    """A dtype from any common spelling; UsageError when there is none of that name."""
    if dtype is None or isinstance(dtype, DType):
        return dtype
    try:
        return parse_dtype(str(dtype))
    except ValueError as error:
        raise UsageError(str(error)) from None


class SaveOptions(TypedDict, total=False):
    """The options of `save`, which every verb that writes takes too."""

    keep_extras: bool
    shard_size: int | str | None
    tied: Tied
    force: bool
    max_memory: int | str | None
    jobs: int | None
    provenance: bool
    digest: bool
    progress: Progress | None


@dataclass(frozen=True)
class Written:
    """What was written: the file, its size in bytes, its format, how many tensors are in it, the
    plan that made it, the extras that were to be kept and could not be, warnings, all files
    when there are several (`path` is the index of shards then), older ones that were removed, and the
    digest of the contents where it was asked for."""

    path: str
    nbytes: int
    format: str
    tensors: int
    plan: Plan | None = None
    lost: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    digest: str | None = None


def save(
    ckpt: Checkpoint,
    path: Path,
    *,
    keep_extras: bool = False,
    shard_size: int | str | None = None,
    tied: Tied = "full",
    force: bool = False,
    max_memory: int | str | None = None,
    jobs: int | None = None,
    provenance: bool = True,
    digest: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a checkpoint; the format follows the suffix of `path`.

    A `.pth` is the flat state dict, or with `keep_extras` the source's own object with the state
    dict in its old place.  A folder (one that exists, or a name ending with `/`) gets safetensors
    shards of at most `shard_size` (bytes, or a text such as `5GB`, which is the default) and their
    index, `NAME.safetensors.index.json` and `NAME.bin.index.json` too.  In safetensors tied names
    are all written, or with `tied="alias"` the first alone, and the metadata names the others.
    `max_memory` (bytes, or a text such as `512MiB`) bounds what all tensors on their way take in memory,
    beside Python, NumPy and torch themselves; `jobs` threads move them, side by side where there are shards.
    The file says how it came about (`Checkpoint.provenance`), unless `provenance` is false; with `digest` the
    digest of its contents is a part of that, for which all that was written is read once more.
    Raises OutputError when the file exists (without `force`) or cannot be
    written, UsageError for an unknown suffix or extras that the format cannot hold, PlanError for
    tensors that it cannot hold, or that cannot be made within `max_memory`.
    """
    from ckptsurgeon import stream

    if not isinstance(ckpt, Checkpoint):
        raise UsageError(f"what is saved is a Checkpoint, as cs.open or a plan makes it, not {type(ckpt).__name__}")
    formats.check_readable(ckpt)
    if digest and not provenance:
        raise UsageError("the digest of the contents is a part of the provenance: --digest needs it")
    output = formats.output(path, shard_size, tied)
    budget = stream.budget(formats.parse_size(max_memory, "--max-memory"), jobs)
    problems = formats.problems(ckpt, output, keep_extras)
    if budget.strict:
        problems += stream.problems(ckpt, budget)
        problems += stream.problems(dict(formats.tensors(ckpt.extras)), budget) if keep_extras else []
    if problems:
        raise PlanError(problems)
    keeps = keep_extras and formats.has_place(ckpt)
    said = made_of(ckpt, keep_extras=keeps, content=_NO_DIGEST if digest else None) if provenance else None
    files, lost = formats.files(ckpt, output, keep_extras, None if said is None else said.text())
    kin = output.is_kin if output.format.shards else stream.no_kin
    names = tuple(name for name, _ in files)
    kept = {os.path.basename(name) for name in names}
    removed = [name for name in stream.older(output.path, kin) if name not in kept]

    def seal(staged: Sequence[str]) -> list[tuple[str, formats.Layout]]:
        nonlocal said
        assert said is not None
        whole = _staged(ckpt, staged[:-1] if len(staged) > 1 else staged, said.place)
        said = replace(said, content=stream.content_digest(whole, budget))
        return formats.files(ckpt, output, keep_extras, said.text())[0]

    nbytes = stream.write(
        files, force=force, progress=progress, kin=kin, make_folder=output.folder, budget=budget,
        seal=seal if digest else None,
    )  # fmt: skip
    format = output.format if len(files) > 1 else output.holder
    notes = [*dict.fromkeys(note for _, layout in files for note in layout.notes), *(_stale(ckpt) if keeps else ())]
    return Written(
        names[-1],
        nbytes,
        format.name,
        len(ckpt),
        None,
        tuple(lost),
        tuple(notes),
        names if len(files) > 1 else (),
        tuple(removed),
        said.content if said is not None else None,
    )


def _stale(ckpt: Checkpoint) -> list[str]:
    """Warnings about optimizer states of a plan that was made without `extras`: they are kept as they were."""
    derived = ckpt.derived
    if derived is None or derived.followed or list(derived.source.items()) == list(ckpt.items()):
        return []
    return [
        f"the optimizer state at {name!r} is kept as it was, and the parameters changed; plan with extras=True, and it "
        "follows"
        for name in formats.optimizers(ckpt.extras)
    ]


_NO_DIGEST = f"sha256:{0:064}"
"""What stands in a file for the digest of its contents until they are written."""


def _staged(ckpt: Checkpoint, paths: Sequence[str], place: str) -> Checkpoint:
    """What was written, as it is read: the files of a checkpoint before they take their places."""
    found = Checkpoint({key: ref for path in paths for key, ref in open_checkpoint(path, place).items()})
    if formats.expanded(found).keys() != formats.expanded(ckpt).keys():
        raise AssertionError("other tensors were written than were planned")
    return found


def digest(ckpt: Source, *, select: str | None = None, progress: Progress | None = None) -> str:
    """The digest of the contents of a checkpoint (`sha256:…`): its names, dtypes, shapes and every byte, whatever
    file they lie in, in whatever order and shards; every tensor is read once.

    `stream.content_digest` says what it is made of.  Raises InputError, with the key, when a tensor cannot be read.
    """
    from ckptsurgeon import stream

    return stream.content_digest(as_checkpoint(ckpt, select), stream.budget(), progress)


def carry_out(made: Plan, output: Path, **how: Unpack[SaveOptions]) -> Written:
    """Write the result of a plan; PlanError when it has problems, else as `save`."""
    written = save(made.check().result, output, **how)
    return replace(written, plan=made, warnings=(*made.warnings, *written.warnings))


def prepare(
    source: Source,
    output: Path | None,
    rules: Rules = None,
    to: Like | None = None,
    *,
    select: str | None = None,
    keep_extras: bool = False,
    shard_size: int | str | None = None,
    tied: Tied = "full",
    force: bool = False,
    max_memory: int | str | None = None,
    jobs: int | None = None,
    **how: Unpack[PlanOptions],
) -> Plan:
    """The plan of a remap, after a check that `output` may be written at all.

    The check comes first: it costs nothing, and building a model may take long.  What cannot be made
    within `max_memory` is a problem of the plan.
    """
    from ckptsurgeon import stream
    from ckptsurgeon.rules import Recipe

    budget = stream.budget(formats.parse_size(max_memory, "--max-memory"), jobs)
    keep_extras = keep_extras or how.get("extras", False)
    how["extras"] = keep_extras
    recipe = Recipe.of(rules)
    to = recipe.to if to is None else to
    ckpt = (
        _left(source, select or recipe.select, to) if to is not None else as_checkpoint(source, select or recipe.select)
    )
    if output is None:
        return _within(plan(ckpt, recipe, to, select=select, **how), budget)
    formats.check_readable(ckpt)
    place = formats.output(output, shard_size, tied)
    formats.check_extras(ckpt.extras if keep_extras else None, place.format)
    if not stream.is_new_folder(place.path, place.folder):
        stream.check(place.path, force, place.is_kin if place.format.shards else stream.no_kin)
    made = plan(ckpt, recipe, to, select=select, **how)
    made = replace(made, problems=(*made.problems, *formats.problems(made.result, place, keep_extras)))
    return _within(made, budget)


def _within(made: Plan, budget: Budget) -> Plan:
    """A plan that says what takes more memory than the budget: a problem where that was asked for, else a warning."""
    from ckptsurgeon import stream

    found = stream.problems(made.result, budget)
    if budget.strict:
        return replace(made, problems=(*made.problems, *found))
    words = tuple(problem.text.partition(";")[0] for problem in found)
    return replace(made, warnings=(*made.warnings, *words))


def remap(
    source: Source,
    output: Path,
    rules: Rules = None,
    to: Like | None = None,
    *,
    select: str | None = None,
    keep_extras: bool = False,
    shard_size: int | str | None = None,
    tied: Tied = "full",
    force: bool = False,
    max_memory: int | str | None = None,
    jobs: int | None = None,
    provenance: bool = True,
    digest: bool = False,
    progress: Progress | None = None,
    **how: Unpack[PlanOptions],
) -> Written:
    """Open, plan and write in one call; see `plan` (for the other options) and `save`.

    With `keep_extras` (or `extras`, which is the same here) the rest of the file is kept, and optimizer states and
    averages in it go through the same surgery.  Raises PlanError with all problems, and then nothing is written.
    """
    keep_extras = keep_extras or how.get("extras", False)
    made = prepare(
        source, output, rules, to,
        select=select, keep_extras=keep_extras, shard_size=shard_size, tied=tied, force=force,
        max_memory=max_memory, jobs=jobs, **how,
    )  # fmt: skip
    return carry_out(
        made, output,
        keep_extras=keep_extras, shard_size=shard_size, tied=tied, force=force,
        max_memory=max_memory, jobs=jobs, provenance=provenance, digest=digest, progress=progress,
    )  # fmt: skip


def prepare_in_place(
    source: Path,
    rules: Rules = None,
    to: Like | None = None,
    *,
    select: str | None = None,
    dry_run: bool = False,
    provenance: bool = True,
    **how: Unpack[PlanOptions],
) -> Changes:
    """What a remap in place comes to: its `.plan`, and the headers that it rewrites; see `remap_in_place`.

    What an interrupted one left of the file is put right first, unless it is a `dry_run`, and that is a warning of
    the plan.
    """
    from ckptsurgeon import inplace
    from ckptsurgeon.rules import Recipe

    recipe = Recipe.of(rules)
    if how.get("beside"):
        raise UsageError(
            "--in-place moves no tensor, and --with brings some from another file; write a copy with -o OUT"
        )
    to = recipe.to if to is None else to
    repaired = () if dry_run else inplace.recover(source)
    made = prepare(source, None, recipe, to, select=select, **how)
    made = replace(made, warnings=(*repaired, *made.warnings))
    return inplace.fit(made, inplace.command(source, recipe, to, {"select": select, **how}), provenance)


def carry_out_in_place(changes: Changes) -> Written:
    """Rewrite what `prepare_in_place` found; PlanError when the plan has problems."""
    from ckptsurgeon import inplace

    inplace.carry_out(changes)
    made = changes.plan
    return Written(
        changes.path,
        changes.nbytes,
        made.source.origin.format if made.source.origin else "",
        len(made.result),
        made,
        warnings=made.warnings,
        files=changes.names,
        removed=tuple(one.name for one in changes.emptied),
    )


def remap_in_place(
    source: Path,
    rules: Rules = None,
    to: Like | None = None,
    *,
    select: str | None = None,
    provenance: bool = True,
    **how: Unpack[PlanOptions],
) -> Written:
    """Rename, drop and reshape tensors of a safetensors file, or of an index and its shards, by rewriting headers
    only; no tensor moves, so it takes the same time whatever the file's size.

    The options are those of `plan`; the `provenance` is written where the header has room for it.  A kill at any
    moment leaves the old or the new checkpoint: readers take the right header from a side file, and
    `verify(repair=True)` or the next remap in place puts the files right.

    Raises PlanError for what would move or change bytes or does not fit into the header, with the command that
    writes a copy instead; OutputError for a file that has other names or cannot be written.  Then all is as it was.
    """
    return carry_out_in_place(prepare_in_place(source, rules, to, select=select, provenance=provenance, **how))


def convert(
    source: Source,
    output: Path,
    *,
    select: str | None = None,
    dtype: str | DType | None = None,
    **how: Unpack[SaveOptions],
) -> Written:
    """Write a checkpoint in another format or dtype: a remap without rules; see `save` for `how`."""
    return remap(source, output, select=select, dtype=dtype, **how)

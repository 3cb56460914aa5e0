"""`verify`: whether a checkpoint is whole, is what it says, and is what a recipe makes of another one."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack, cast

from ckptsurgeon import formats
from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.errors import AmbiguousError, CkptError, Problem, UsageError
from ckptsurgeon.provenance import Provenance, header_digest
from ckptsurgeon.surgery import PlanOptions, as_checkpoint, diff, plan, target_of
from ckptsurgeon.surgery import digest as digest_of

if TYPE_CHECKING:
    from ckptsurgeon.proofs import Proof
    from ckptsurgeon.stream import Progress
    from ckptsurgeon.surgery import Like, Path, Rules, Source
    from ckptsurgeon.verifier import Verification


def verify(
    source: Path,
    against: Source | None = None,
    rules: Rules = None,
    to: Like | None = None,
    *,
    select: str | None = None,
    repair: bool = False,
    nan: bool = False,
    digest: bool = False,
    recorded: bool = False,
    progress: Progress | None = None,
    **how: Unpack[PlanOptions],
) -> Verification:
    """Read every byte of a checkpoint and hold it against its checksums, and against the digest of its contents where
    its provenance has one; with `against`, compare it with another one, values too.

    With `rules`, `to` or any option of `plan`, the file must be what they make of `against`, bit for bit: `.proof` of
    the result.  With `recorded` the rules and options are those that the file's own provenance names, which are
    somebody else's words (never a target: `to` is yours).  Without any of them `.against` is the comparison.  Both are
    None where the file is damaged.  `nan` counts NaN and infinities, `digest` makes the digest of the contents.

    With `repair` an in-place change that was interrupted is taken back, or completed if it was made, and shards that
    were taking their places when their writer was killed get there; nothing else is written, and `.repaired` says
    what was done.
    Raises InputError when a header or an index is not as it should be, UsageError for rules without `against` and a
    recipe that is not recorded, PlanError for rules that cannot be applied to `against`.
    """
    from ckptsurgeon import orphans, verifier

    proves = recorded or rules is not None or to is not None or any(v for k, v in how.items() if k != "cache")
    if proves and against is None:
        raise UsageError("rules say what another checkpoint is made into: name it with --against")
    if recorded and (rules is not None or any(v for k, v in how.items() if k != "cache")):
        raise UsageError("--recorded takes the rules and options that the file names; give none beside it but --to")
    repaired = _repaired(source) if repair else ()
    document = formats.inspect(source)
    found = replace(verifier.verify(document, progress), repaired=repaired, orphans=orphans.of(document))
    found = _contents(found, document, select, digest, progress)
    if nan and found.ok:
        from ckptsurgeon import nonfinite

        found = replace(found, nan_inf=nonfinite.count_all(document.tensors(), progress))
    if against is None or not found.ok:
        return found
    if proves:
        return replace(found, proof=_proof(document, against, rules, to, select, recorded, progress, how))
    compared = diff(source, against, select=select, values=True, progress=progress)
    made_of_it = None if compared.same else _is_recorded_source(document.provenance, against)
    return replace(found, against=compared, made_of_it=made_of_it)


def _is_recorded_source(said: Provenance | None, against: Source) -> bool | None:
    """Whether a file says that another one was its source; None where it says nothing."""
    if said is None or said.problem:
        return None
    try:
        ckpt = as_checkpoint(against, None if isinstance(against, Checkpoint) else said.select)
    except CkptError:
        return False
    return header_digest((key, ref.spec) for key, ref in ckpt.items()) == said.header


def _repaired(source: Path) -> tuple[str, ...]:
    from ckptsurgeon import inplace, stream

    name = os.fsdecode(source)
    whole = os.path.isdir(name)  # of a file only what is called after it
    done = stream.recover(os.path.join(name, "*") if whole else name, lambda beside: whole)
    return (*(f"put the shards of {output} in their places" for output in done), *inplace.recover(source))


def _contents(
    found: Verification, document: formats.Document, select: str | None, wanted: bool, progress: Progress | None
) -> Verification:
    """With the digest of the contents, where it is wanted or recorded; another one than recorded is a problem."""
    said = document.provenance.content if document.provenance is not None else None
    if not found.ok or not (wanted or said):
        return found
    place = document.provenance.place if said is not None and document.provenance is not None else None
    try:
        made = digest_of(document.checkpoint(place if said is not None else select), progress=progress)
        text = f"the contents have the digest {made}, and the file says {said}: one of them was changed"
    except (AmbiguousError, UsageError) as error:
        if said is None:
            raise
        made, text = None, f"the digest of its contents is about {place!r}, which is not there ({error})"
    if said is not None and made != said:
        problem = Problem(f"{document.path}: {text}", kind="damaged")
        return replace(found, digest=made, problems=(*found.problems, problem))
    if wanted and select is not None and select != place:
        made = digest_of(document.checkpoint(select), progress=progress)
    return replace(found, digest=made)


def _proof(
    document: formats.Document,
    against: Source,
    rules: Rules,
    to: Like | None,
    select: str | None,
    recorded: bool,
    progress: Progress | None,
    how: PlanOptions,
) -> Proof:
    """What the rules make of `against`, planned and held against the file."""
    from ckptsurgeon import proofs
    from ckptsurgeon.rules import Recipe

    said = document.provenance
    recipe = proofs.recorded_recipe(said) if recorded else Recipe.of(rules)
    label = os.fspath(against) if isinstance(against, str | os.PathLike) else "the checkpoint"
    target = None if to is None else target_of(to, select)
    if recorded and said is not None:
        how = cast("PlanOptions", {name: value for name, value in said.options.items() if name != "keep_extras"})
        if said.target is not None and target is None:
            raise UsageError("the file says that it was made to fit a target; name it with --to")
        try:
            against = as_checkpoint(against, None if isinstance(against, Checkpoint) else select or said.select)
        except UsageError as error:
            return proofs.refuted(label, recipe, f"the file says that its source has a state dict there, but {error}")
        wrong = proofs.claims(said, against, target)
        if wrong:
            return proofs.refuted(label, recipe, *wrong)
    made = plan(against, recipe, target, select=select, **how).check()
    if recorded:
        proofs.check_memory(made.result)
    place = said.place if recorded and said is not None else select if document.main is None else None
    ckpt = document.checkpoint(place)
    return proofs.prove(made.result, ckpt, label, recipe, recorded, progress)

"""Files that lie beside a checkpoint and go through its surgery: the `optimizer.pt` of transformers and accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from ckptsurgeon import formats, surgery
from ckptsurgeon.checkpoint import Checkpoint, Origin
from ckptsurgeon.errors import InputError, UsageError
from ckptsurgeon.plans import Plan

Path = str | os.PathLike[str]


def follow(made: Plan, source: Path, strict: bool = False) -> Plan:
    """The plan of a checkpoint, as it is for another file: its `.result.extras` are what that file holds, with the
    optimizer states in it changed as the tensors are, and `.followed` says how.

    Raises InputError for a file without any.
    """
    from ckptsurgeon import optimizer

    document = formats.inspect(source)
    if not any(True for _ in formats.optimizer_states(document.root)):
        raise InputError("holds no optimizer state", path=os.fspath(source), hint="look at it with `ckpt ls --tree`")
    about = Origin(os.fspath(source), document.format)
    there = made.source.replace(extras=document.root, tensors=made.source.tensors)
    result = made.result.replace(extras=document.root, tensors=made.result.tensors, origin=about)
    return optimizer.follow(replace(made, source=there, result=result, warnings=()), strict)


def follow_all(made: Plan, files: Mapping[str, str], strict: bool = False) -> tuple[Plan, dict[str, Plan]]:
    """The plan, which says what becomes of all files, and for each output its own."""
    others: dict[str, Plan] = {}
    plan = made
    for source, output in files.items() if made.ok else ():
        one = others[output] = _settled(follow(plan, source, strict))
        said = tuple(replace(found, place=f"{source}: {found.place}") for found in one.followed)
        made = replace(
            made,
            followed=(*made.followed, *said),
            warnings=(*made.warnings, *(f"{source}: {text}" for text in one.warnings)),
            problems=(*made.problems, *(replace(each, text=f"{source}: {each.text}") for each in one.problems)),
        )
    return made, others


def _settled(followed: Plan) -> Plan:
    """The plan of a file; where nothing is left of it, that is a problem."""
    from ckptsurgeon import optimizer

    if followed.ok and followed.followed and all(one.left for one in followed.followed):
        return replace(followed, problems=(*followed.problems, *optimizer.problems(followed)), warnings=())
    return followed


def remap_optimizer(
    made: Plan, source: Path, output: Path, *, strict: bool = False, force: bool = False
) -> surgery.Written:
    """Write the file `source`, in which there is the optimizer's state of a checkpoint, for the result of a plan.

    `made` is the plan of the checkpoint beside it (`cs.plan`, or `.plan` of what `cs.remap` gives).  What cannot
    follow is left out with a warning, or `strict` is a problem; so it is where nothing is left.  Raises PlanError,
    InputError and OutputError as `cs.remap` does.

    >>> import ckptsurgeon as cs, tempfile, torch
    >>> model = torch.nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(model.state_dict(), folder + "/model.pth")
    ...     torch.save(torch.optim.Adam(model.parameters()).state_dict(), folder + "/optimizer.pt")
    ...     plan = cs.plan(folder + "/model.pth", ["prefix head."])
    ...     len(cs.remap_optimizer(plan, folder + "/optimizer.pt", folder + "/new.pt").plan.followed)
    1
    """
    return write(_settled(follow(made, source, strict)), output, force)


def write(followed: Plan, output: Path, force: bool = False) -> surgery.Written:
    """Write what `follow` gave."""
    result = followed.check().result
    held = Checkpoint({}, extras=result.extras, origin=result.origin)
    written = surgery.save(held, output, keep_extras=True, force=force, provenance=False)
    return replace(written, plan=followed, warnings=(*followed.warnings, *written.warnings))


@contextmanager
def staged(others: Mapping[str, Plan], force: bool = False) -> Iterator[list[surgery.Written]]:
    """Write every file of `follow_all` beside its place; they take their places when all that is done meanwhile was
    done, and go where it was not."""
    done: list[surgery.Written] = []
    beside: dict[str, str] = {}
    try:
        for output, one in others.items():
            folder, name = os.path.split(output)
            beside[output] = os.path.join(folder, f".{os.getpid()}-{name}")
            done.append(replace(write(one, beside[output], force), path=output))
        yield done
        for output, path in beside.items():
            os.replace(path, output)
    finally:
        for path in beside.values():
            with suppress(OSError):
                os.unlink(path)


def told(written: surgery.Written, done: Iterable[surgery.Written]) -> surgery.Written:
    """What was written, with what the files beside it lost and warn of."""
    for one in done:
        lost = (f"{one.path}: {name}" for name in one.lost)
        said = (text for text in one.warnings if one.plan is None or text not in one.plan.warnings)
        written = replace(written, lost=(*written.lost, *lost), warnings=(*written.warnings, *said))
    return written


def check(files: Mapping[str, str], others: Iterable[str | None], force: bool) -> None:
    """OutputError or UsageError for outputs that cannot be written, before anything is; `others` are files that are
    read or written too."""
    from ckptsurgeon import stream

    taken = {os.path.realpath(path) for path in (*others, *files) if path is not None}
    for path in files.values():
        if os.path.realpath(path) in taken:
            raise UsageError(f"--optimizer …={path}: that file is read or written already; choose another name")
        taken.add(os.path.realpath(path))
        place = formats.output(path)
        if not place.format.extras:
            raise UsageError(f"{path}: {place.format.name} holds tensors only; an optimizer's state goes into a .pt")
        stream.check(place.path, force, stream.no_kin)

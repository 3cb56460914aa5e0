"""What lies beside a state dict and is about its parameters follows a surgery: optimizer states, averages.

Its formulas (`leaves`) are the same for all of it; `states` and `moments` say what they make of an optimizer's
entries, `positions` and `groups` which parameter is which, `copies` what they make of other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptsurgeon import formats
from ckptsurgeon.checkpoint import Step
from ckptsurgeon.errors import Problem
from ckptsurgeon.optimizer import copies, following
from ckptsurgeon.optimizer.following import Known, carry, known
from ckptsurgeon.optimizer.leaves import Change
from ckptsurgeon.optimizer.positions import Undecided
from ckptsurgeon.plans import Followed, Plan
from ckptsurgeon.tensor import TensorRef

__all__ = ["Change", "Known", "Undecided", "carry", "follow", "known", "problems"]

Path = tuple[Step, ...]


def follow(made: Plan, strict: bool = False) -> Plan:
    """The plan, whose result has extras that fit it: what goes with the tensors was changed as they are.

    What cannot follow is left out, with a warning, or `strict` with a problem.
    """
    source = made.source
    same = list(source.items()) == list(made.result.items())
    if not made.ok or made.on is None or (same and (made.target is None or not made.target.is_model)):
        return made
    optimizers = list(formats.optimizer_states(source.extras))
    gatherings = list(formats.gatherings(source.extras))
    if not optimizers and not gatherings:
        return made
    change = Change.of(made)
    if same and tuple(change.candidates) == change.parameters:
        return made
    new: dict[Path, Any] = {}
    told: list[Followed] = []
    others: dict[str, Mapping[str, TensorRef]] = {}
    for path, gathering in gatherings:
        found = copies.follow(change, path, gathering)
        if found is not None:
            new[path], report = found
            told.append(report)
        elif isinstance(gathering, dict):
            others[_dotted(path)] = {key: ref for key, ref in gathering.items() if isinstance(ref, TensorRef)}
    reports: list[Followed] = []
    for path, value in optimizers:
        new[path], report = following.follow(change, _dotted(path), value, others)
        reports.append(report)
    reports += told
    said = [_words(report) for report in reports if report.left]
    return replace(
        made,
        result=made.result.replace(extras=_placed(source.extras, new)),
        followed=tuple(reports),
        problems=(*made.problems, *(Problem(text, kind="extras") for text in said if strict)),
        warnings=(
            *made.warnings,
            *(said if not strict else ()),
            *(_begin(one) for one in reports if one.reset),
        ),
    )


def problems(made: Plan) -> tuple[Problem, ...]:
    """What could not follow, as problems."""
    return tuple(Problem(_words(report), kind="extras") for report in made.followed if report.left)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "."


def _words(report: Followed) -> str:
    done = "is kept as it was" if report.kept else "is left out"
    return f"{report.label} {done}: {report.left}"


def _begin(report: Followed) -> str:
    names = list(report.reset)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{report.label} begins anew for {', '.join(map(repr, names[:3]))}{more}: {report.reset[names[0]]}"


def _placed(extras: Any, new: Mapping[Path, Any]) -> Any:
    """The extras with new values in their places; what is None is taken out of dicts, and out of lists in which
    nothing else is left."""
    for path, value in new.items():
        if value is not None:
            extras = formats.put(extras, path, value)
    for path, value in new.items():
        if value is None:
            extras = formats.taken_out(extras, path)
    return extras

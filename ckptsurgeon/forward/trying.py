"""What an alignment leaves open, decided by experiment: the assignment under which both models compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon import aligner
from ckptsurgeon.aligner import Alignment, Match, Opening, Verdict
from ckptsurgeon.aligner.reasons import TRIED
from ckptsurgeon.errors import UsageError
from ckptsurgeon.forward import inputs as making
from ckptsurgeon.forward import outputs, searching
from ckptsurgeon.forward.bench import Bench, Pieces
from ckptsurgeon.forward.checking import TOLERANCE, check
from ckptsurgeon.forward.outputs import DifferentError
from ckptsurgeon.forward.report import ForwardCheck
from ckptsurgeon.forward.searching import Found
from ckptsurgeon.forward.subjects import Subject, subject
from ckptsurgeon.plans import Plan

if TYPE_CHECKING:
    from ckptsurgeon.forward.inputs import Inputs
    from ckptsurgeon.forward.subjects import Model


_MOST_TWINS = 12
"""Slots of one shape up to which they are tried: every one in every place is an alignment each."""


def try_alignment(
    found: Alignment, source_model: Model, target_model: Model, inputs: Any = None, *, tolerance: float = TOLERANCE
) -> Alignment:
    """An alignment with what is open settled by experiment, where one assignment alone makes both models compute the
    same.

    Tried are twins (slots of equal shapes that names do not tell apart) and square matrices that may be transposed, all
    together: every combination where they are few, else downhill from the likeliest by the error of the outputs.  What
    is settled so has the grade `tried`, and `Match.error`; where several assignments give equal outputs, or none does,
    it stays open and the question says so.  `.tried` tells what was done.  Models and `inputs` are those of
    `cs.check_forward`; the source model is that of the checkpoint as it is, before rules that were given.

    Raises UsageError and TargetError as `cs.check_forward` does.
    """
    if not isinstance(found, Alignment):
        raise UsageError(f"try_alignment takes what cs.align found, not {type(found).__name__}")
    if not found.openings:
        return replace(found, tried="nothing is open that an experiment could settle")
    source = subject(source_model, found.before or found.source, "source")
    target = subject(target_model, _planned(_decided(found, _shifted(found.openings, 0, 0))).result, "target")
    told, *both = making.run(source, target, inputs)
    reference = outputs.flat(both[0])
    try:
        outputs.compared(reference, outputs.flat(both[1]))
    except DifferentError as error:
        return replace(found, tried=f"nothing was tried: {error}")
    openings, pieces = _pieces(found, [one for one in found.openings if len(one.sources) <= _MOST_TWINS])
    if not openings:
        why = f"more than {_MOST_TWINS} are alike" if not pieces else "no rule was found for what is open"
        return replace(found, tried=f"nothing was tried: {why}")
    search = searching.best(openings, pieces, Bench(target, told, reference, pieces), tolerance)
    del target
    return _settled(found, search, source, target_model, told, tolerance)


def _settled(
    found: Alignment, search: Found, source: Subject, target_model: Model, told: Inputs, tolerance: float
) -> Alignment:
    """The alignment with what the search found, held against both models as a whole."""
    ways = f"{search.count:,} {'ways were' if search.count != 1 else 'way was'} tried{_lacking(source)}"
    if not search.equal:
        why = f"{ways}, and none gives equal outputs (the relative error of the best is {search.error:.2g})"
        return _asked(replace(found, tried=why), found.openings, why)
    whole = _planned(_decided(found, search.equal[0]))
    report = check(source, subject(target_model, whole.result, "target"), told, tolerance)
    if not report.same:
        why = f"{ways}, and none gives equal outputs ({report.reason})"
        return _asked(replace(found, tried=why), found.openings, why)
    agreed = [one for one in search.equal[0] if all(one in other for other in search.equal)]
    loose = [one.opening for one in search.equal[0] if one not in agreed]
    made = _decided(found, agreed)
    same = f"{ways}, and {len(search.equal)} give equal outputs"
    notes = {rule: note.replace(TRIED, _words(report.error)) for rule, note in made.notes.items()}
    matches = tuple(_graded(match, report.error) for match in made.matches)
    said = same if loose else _said(search, report, ways)
    return _asked(replace(made, matches=matches, notes=notes, tried=said), loose, same)


def _lacking(source: Subject) -> str:
    """What the outputs say nothing of."""
    if not source.kept:
        return ""
    more = ", …" if len(source.kept) > 1 else ""
    return f" ({len(source.kept):,} tensors of the source model are not from the checkpoint: {source.kept[0]}{more})"


def _said(search: Found, report: ForwardCheck, ways: str) -> str:
    others = "" if search.next is None else f", that of the next best {search.next:.2g}"
    near = "" if search.whole else "; not all ways were tried, only those on the way to it and near it"
    return (
        f"{ways}, and one gives equal outputs: its relative error is {report.error:.2g} in {report.dtype}{others}{near}"
    )


def _graded(match: Match, error: float) -> Match:
    """A match that was settled, with the error of the outputs."""
    if match.grade != "tried":
        return match
    return replace(match, error=error, why=tuple(word.replace(TRIED, _words(error)) for word in match.why))


def _words(error: float) -> str:
    return f"by experiment: this alone gives equal outputs (relative error {error:.2g})"


def _asked(made: Alignment, openings: Sequence[Opening], why: str) -> Alignment:
    """The questions about openings, with what was tried in vain."""
    about = {spot.path for opening in openings for spot in opening.targets}
    questions = tuple(
        replace(one, text=f"{one.text}; {why}") if about & set(one.targets) else one for one in made.questions
    )
    return replace(made, questions=questions)


def _decided(found: Alignment, verdicts: Sequence[Verdict]) -> Alignment:
    """The alignment anew, with decisions."""
    made = aligner.align(found.source, found.target, found.hints, verdicts)
    if not found.given:
        return made
    given = replace(found.recipe, rules=found.recipe.rules[: found.given])
    return replace(made, recipe=given + made.recipe, before=found.before, given=found.given)


def _planned(made: Alignment) -> Plan:
    """What the rules come to, though some things are open."""
    return replace(made.plan(fit=True), problems=())


def _shifted(openings: Sequence[Opening], shift: int, turn: int) -> list[Verdict]:
    """Each target takes a source further on, as far as it fits."""
    made = []
    for one in openings:
        count = len(one.sources)
        places = ((at + shift) % count for at in range(len(one.targets)))
        fitting = tuple(place if place in fits else -1 for place, fits in zip(places, one.fits, strict=True))
        made.append(Verdict(one, fitting, tuple(min(turn, turns - 1) for turns in one.turns)))
    return made


def _pieces(found: Alignment, openings: Sequence[Opening]) -> tuple[list[Opening], Pieces]:
    """The tensors of the target for every source that it may take and every way it may lie: as many alignments as there
    are sources do, since all openings change together; and the openings for which all is there."""
    pieces: Pieces = {}
    shifts = max((len(one.sources) for one in openings), default=0)
    for shift in range(shifts):
        for turn in range(max(max(one.turns) for one in openings)):
            verdicts = _shifted(openings, shift, turn)
            made = _decided(found, verdicts)
            sure = {key for edge in made.edges if edge.grade == "tried" for key in edge.targets}
            result = _planned(made).result
            for verdict in verdicts:
                opening = verdict.opening
                for at, (place, way) in enumerate(zip(verdict.places, verdict.turns, strict=True)):
                    if sure.isdisjoint(opening.keys[at]):
                        continue
                    values = {key: result[key] for key in opening.keys[at] if key in result}
                    pieces.setdefault((opening, at, place, way), values)
    return [one for one in openings if all(_any(pieces, one, at) for at in range(len(one.targets)))], pieces


def _any(pieces: Pieces, opening: Opening, at: int) -> bool:
    return any(key[0] == opening and key[1] == at for key in pieces)

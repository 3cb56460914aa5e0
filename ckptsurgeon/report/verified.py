"""Whether a checkpoint is whole: `ckpt verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptsurgeon.report import difference, provenance
from ckptsurgeon.report._text import brief, plural, shown, size
from ckptsurgeon.verifier import Verification

if TYPE_CHECKING:
    from ckptsurgeon.proofs import Proof

SCHEMA = "ckptsurgeon.verify/1"
_SHOWN = 5
_MOST, _LONG = 10, 300


def text(found: Verification) -> str:
    """What was read and checked, what is odd, and the comparison."""
    lines = [f"repaired: {shown(words)}" for words in found.repaired]
    if found.ok:
        files = f" in {plural(len(found.files), 'file')}" if len(found.files) > 1 else ""
        lines.append(f"{shown(found.path)}: {found.format}, whole{files}")
        sums = f"{plural(found.checksums, 'checksum')} right" if found.checksums else "it has no checksums"
        lines.append(f"{plural(found.tensors, 'tensor')}, {size(found.nbytes)} read; {sums}")
    if found.absent:
        more = f" and {len(found.absent) - _SHOWN} more" if len(found.absent) > _SHOWN else ""
        lines.append(f"no bytes to read of {', '.join(map(shown, found.absent[:_SHOWN]))}{more}")
    lines += [f"note: {shown(remark)}" for remark in found.remarks]
    lines += [f"beside it: {shown(orphan.name)}: {orphan.text}" for orphan in found.orphans]
    lines += _said(found)
    lines += [] if found.nan_inf is None else _nan_inf(found.nan_inf)
    lines += [] if found.proof is None else _proof(found.proof)
    return "\n".join(lines + ([difference.text(found.against)] if found.against is not None else []))


def _said(found: Verification) -> list[str]:
    """The digest, and what the file says of itself where that was looked at."""
    said = found.provenance
    lines = [] if said is None or not said.problem else provenance.lines(said)
    if found.digest is not None and found.ok:
        right = " (as the file says)" if said is not None and said.content == found.digest else ""
        lines.append(f"contents: {found.digest}{right}")
    if found.made_of_it and said is not None:
        words = f" by {provenance.how(said)}" if provenance.how(said) else ""
        lines.append(f"hint: the file says that it was made of this one{words}; --recorded tells whether that is so")
    return lines


def _nan_inf(counts: Sequence[tuple[str, int, int]]) -> list[str]:
    """The tensors with a NaN or an infinity."""
    odd = [one for one in counts if any(one[1:])]
    if not odd:
        return [f"no NaN and no infinity in {plural(len(counts), 'tensor')}"]
    lines = [f"{shown(key)}: {nan:,} NaN, {inf:,} infinite" for key, nan, inf in odd]
    nans, infs = sum(nan for _, nan, _ in odd), sum(inf for _, _, inf in odd)
    return [*lines, f"{nans:,} NaN and {infs:,} infinite in {len(odd)} of {plural(len(counts), 'tensor')}"]


def _proof(found: Proof) -> list[str]:
    """Whether it is what the recipe makes, and where it is not."""
    lines = [
        f"{shown(brief(one.key)) or 'provenance'}: {shown(brief(one.text, _LONG))}" for one in found.differences[:_MOST]
    ]
    left = len(found.differences) - _MOST
    lines += [f"… and {plural(left, 'more difference')}"] if left > 0 else []
    what = f"what {plural(len(found.rules), 'rule')} {'of its own record ' if found.recorded else ''}"
    what += f"{'makes' if len(found.rules) == 1 else 'make'} of {shown(found.source)}"
    if found.same:
        return [*lines, f"it is {what}: {plural(found.tensors, 'tensor')}, {size(found.nbytes)}, bit for bit"]
    return [*lines, f"it is not {what}: {plural(len(found.differences), 'difference')}"]


def data(found: Verification) -> dict[str, Any]:
    """The JSON object of `ckpt verify --json`."""
    return {
        "schema": SCHEMA,
        "file": found.path,
        "format": found.format,
        "files": list(found.files),
        "ok": found.ok,
        "tensors": found.tensors,
        "nbytes": found.nbytes,
        "checksums": found.checksums,
        "absent": list(found.absent),
        "repaired": list(found.repaired),
        "remarks": list(found.remarks),
        "problems": [{"text": problem.text, "key": problem.key} for problem in found.problems],
        "orphans": [{"name": orphan.name, "text": orphan.text} for orphan in found.orphans],
        "provenance": None if found.provenance is None else provenance.data(found.provenance),
        "digest": found.digest,
        "nan_inf": None
        if found.nan_inf is None
        else [{"key": key, "nan": nan, "inf": inf} for key, nan, inf in found.nan_inf],
        "against": None if found.against is None else difference.data(found.against),
        "proof": None
        if found.proof is None
        else {
            "same": found.proof.same,
            "source": found.proof.source,
            "rules": list(found.proof.rules),
            "recorded": found.proof.recorded,
            "tensors": found.proof.tensors,
            "nbytes": found.proof.nbytes,
            "differences": [{"key": one.key or None, "text": one.text} for one in found.proof.differences],
        },
    }

"""Whether a checkpoint is whole: `ckpt verify`."""

from __future__ import annotations

from typing import Any

from ckptsurgeon.report import difference
from ckptsurgeon.report._text import plural, shown, size
from ckptsurgeon.verifier import Verification

SCHEMA = "ckptsurgeon.verify/1"
_SHOWN = 5


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
    return "\n".join(lines + ([difference.text(found.against)] if found.against is not None else []))


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
        "against": None if found.against is None else difference.data(found.against),
    }

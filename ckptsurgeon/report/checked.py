"""Whether two models compute the same: `ckpt check`."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from ckptsurgeon.plans import Plan

if TYPE_CHECKING:
    from ckptsurgeon.forward import ForwardCheck

SCHEMA = "ckptsurgeon.check/1"


def data(plan: Plan, found: ForwardCheck | None, model: str) -> dict[str, Any]:
    """The JSON object of `ckpt check --json`; nothing was run where the plan has problems."""
    return {
        "schema": SCHEMA,
        "source": plan.source.origin.path if plan.source.origin else None,
        "source_model": model,
        "target": plan.target.label if plan.target is not None else None,
        "same": found is not None and found.same,
        "reason": "the plan has problems" if found is None else found.reason or None,
        "error": None if found is None else number(found.error),
        "outputs": [
            {"source": one.source, "target": one.target, "shape": list(one.shape), "error": number(one.error)}
            for one in (() if found is None else found.outputs)
        ],
        "dtype": None if found is None else found.dtype,
        "tolerance": None if found is None else found.tolerance,
        "inputs": None if found is None else found.inputs,
        "not_loaded": {} if found is None else {side: list(keys) for side, keys in found.not_loaded.items()},
        "not_used": [] if found is None else list(found.not_used),
        "notes": [] if found is None else list(found.notes),
        "problems": [problem.text for problem in plan.problems],
    }


def number(error: float | None) -> float | None:
    """An error for JSON, which has no infinity."""
    return None if error is None or not isfinite(error) else error

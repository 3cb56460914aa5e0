"""A checkpoint against a target: `ckpt diff`."""

from __future__ import annotations

import shlex
from typing import Any

from ckptsurgeon.differ import Diff, Row
from ckptsurgeon.report._text import columns, percent, plural, shown
from ckptsurgeon.report.grouping import group
from ckptsurgeon.tensor import TensorSpec

SCHEMA = "ckptsurgeon.diff/1"
_ORDER = ("shape", "dtype", "missing", "unexpected")


def text(diff: Diff) -> str:
    """The differences, like keys merged, then the counts and the coverage."""
    rows: list[list[str]] = []
    for status in _ORDER:
        found = {row.key: row for row in diff.rows if row.status == status}
        for merged in group(
            (key, (row.left, row.right, row.role, row.mend and row.mend.text)) for key, row in found.items()
        ):
            row = found[merged.keys[0]]
            count = f"×{len(merged.keys)}" if len(merged.keys) > 1 else ""
            rows.append(
                [
                    status,
                    shown(merged.name),
                    count,
                    _spec(row.left),
                    _spec(row.right),
                    _remark(row, len(merged.keys)),
                ]
            )
    lines = columns([["", "key", "", "checkpoint", "model" if diff.is_model else "target", ""], *rows]) if rows else []
    return "\n".join([*lines, *([""] if lines else []), *_totals(diff)])


def _spec(spec: TensorSpec | None) -> str:
    return "–" if spec is None else str(spec)


def _remark(row: Row, members: int) -> str:
    if row.status == "missing" and row.role == "buffer":
        return "buffer"
    if row.mend is None:
        return ""
    if row.mend.rule is None:
        return row.mend.text
    return f"{row.mend.text}: {shown(row.mend.rule)}" if members == 1 else f"{row.mend.text} (a rule for each: --json)"


def _totals(diff: Diff) -> list[str]:
    counts = ", ".join(f"{diff.count(status)} {word}" for status, word in _counted(diff))
    coverage = diff.coverage
    lines = [
        f"{shown(diff.left)} against {shown(diff.right)}: {counts}",
        f"coverage: {coverage.tensors} of {plural(coverage.of_tensors, 'tensor')} ({percent(coverage.by_tensors)}), "
        f"{coverage.numel:,} of {plural(coverage.of_numel, 'element')} ({percent(coverage.by_numel)})",
    ]
    if diff.is_model:
        other = [
            row
            for row in diff.rows
            if row.status == "matched" and row.left and row.right and row.left.dtype != row.right.dtype
        ]
        if other:
            pairs = sorted({f"{row.left.dtype} for {row.right.dtype}" for row in other if row.left and row.right})
            count = plural(len(other), "matched tensor")
            lines.append(f"dtype: {count} with another dtype ({', '.join(pairs)}); loading casts them")
    if diff.suggestion is not None:
        found = diff.suggestion
        if found.alternatives:
            ways = ", or ".join(found.alternatives)
            lines.append(f"hint: the names of {found.tensors} instead of {found.now} tensors are found with {ways}")
            return lines
        rules = " ".join(f"--rule {quote(rule)}" for rule in found.rules)
        lines.append(f"hint: with {rules} the names of {found.tensors} instead of {found.now} tensors are found")
    return lines


def quote(rule: str) -> str:
    """A rule as one word of a shell."""
    return shlex.quote(rule)


def _counted(diff: Diff) -> list[tuple[Any, str]]:
    words = [("matched", "matched"), ("shape", "of another shape"), ("dtype", "of another dtype")]
    kinds = [*words, ("missing", "missing"), ("unexpected", "unexpected")]
    return [(status, word) for status, word in kinds if status == "matched" or diff.count(status)]  # type: ignore[arg-type]


def data(diff: Diff) -> dict[str, Any]:
    """The JSON object of `ckpt diff --json`: every key of both sides."""
    coverage = diff.coverage
    return {
        "schema": SCHEMA,
        "checkpoint": diff.left,
        "target": diff.right,
        "target_is_model": diff.is_model,
        "same": diff.same,
        "counts": {status: diff.count(status) for status in ("matched", *_ORDER)},  # type: ignore[arg-type]
        "coverage": {
            "tensors": coverage.tensors,
            "of_tensors": coverage.of_tensors,
            "by_tensors": coverage.by_tensors,
            "numel": coverage.numel,
            "of_numel": coverage.of_numel,
            "by_numel": coverage.by_numel,
        },
        "suggestion": None
        if diff.suggestion is None
        else {
            "rules": list(diff.suggestion.rules),
            "alternatives": list(diff.suggestion.alternatives),
            "tensors": diff.suggestion.tensors,
            "now": diff.suggestion.now,
        },
        "keys": [_row(row) for row in diff.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "key": row.key,
        "status": row.status,
        "checkpoint": _side(row.left),
        "target": _side(row.right),
        "role": row.role,
        "module": row.module,
        "mend": None if row.mend is None else {"text": row.mend.text, "rule": row.mend.rule},
    }


def _side(spec: TensorSpec | None) -> dict[str, Any] | None:
    return None if spec is None else {"dtype": spec.dtype.name, "shape": list(spec.shape)}

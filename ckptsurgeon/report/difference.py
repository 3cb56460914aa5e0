"""A checkpoint against a target: `ckpt diff`."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

from ckptsurgeon.checkpoint import buffer_words
from ckptsurgeon.differ import Diff, Row
from ckptsurgeon.report._text import columns, percent, plural, shown
from ckptsurgeon.report.grouping import group
from ckptsurgeon.tensor import TensorSpec

if TYPE_CHECKING:
    from ckptsurgeon.comparison import Comparison

SCHEMA = "ckptsurgeon.diff/1"
_ORDER = ("shape", "dtype", "missing", "unexpected")
_ALMOST = 0.9999995


def text(diff: Diff, match: re.Pattern[str] | None = None, limit: int | None = None) -> str:
    """The differences, like keys merged, then those of values, the counts and the coverage.

    `match` and `limit` are about what is shown: the keys, and the rows of each table.  The counts and
    the coverage are of the whole.
    """
    rows = diff.rows if match is None else tuple(row for row in diff.rows if match.search(row.key))
    parts = [part for part in (_keys(diff, rows, limit), _values(rows, limit)) if part]
    return "\n".join(line for part in [*parts, _totals(diff)] for line in [*part, ""])[:-1]


def _limited(rows: list[list[str]], limit: int | None, right: frozenset[int] = frozenset()) -> list[str]:
    """A table with its head, of at most `limit` rows; a last line tells how many more there are."""
    if len(rows) == 1:
        return []
    more = 0 if limit is None else max(0, len(rows) - 1 - limit)
    shown = rows[: len(rows) - more]
    lines = columns(shown, right) if len(shown) > 1 else []
    return [*lines, f"… and {plural(more, 'more row')} (--limit, --match)"] if more else lines


def _keys(diff: Diff, shown_rows: tuple[Row, ...], limit: int | None) -> list[str]:
    rows = [["", "key", "", "checkpoint", "model" if diff.is_model else "target", ""]]
    for status in _ORDER:
        found = {row.key: row for row in shown_rows if row.status == status}
        for merged in group(
            (key, (row.left, row.right, row.role, _buffer(row), row.mend and row.mend.text))
            for key, row in found.items()
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
    return _limited(rows, limit)


def _values(shown_rows: tuple[Row, ...], limit: int | None) -> list[str]:
    """A row for each tensor whose values differ, in file order."""
    rows = [["", "key", "differing", "max abs", "rel L2", "cosine", "nan", "inf"]]
    for row in shown_rows:
        found = row.values
        if found is None or found.equal or row.right is None:
            continue
        of = "–" if found.differing is None else f"{found.differing:,} of {row.right.numel:,}"
        figures = [_figure(found.max_abs), _figure(found.relative_l2), _cosine(found.cosine)]
        rows.append(["values", shown(row.key), of, *figures, _counts(found.nan), _counts(found.inf)])
    return _limited(rows, limit, frozenset(range(2, 8)))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _cosine(value: float | None) -> str:
    """Never rounded up to 1."""
    if value is None:
        return "–"
    return ">0.999999" if _ALMOST <= value < 1 else f"{value:.6f}"


def _counts(pair: tuple[int, int] | None) -> str:
    """The counts of both sides, in short where they are the same."""
    if pair is None:
        return "–"
    return f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} / {pair[1]:,}"


def _values_total(diff: Diff) -> str:
    found = {row.key: row.values for row in diff.rows if row.values is not None}
    equal = sum(values.equal for values in found.values())
    line = f"values: {equal:,} of {plural(len(found), 'tensor')} equal"
    sizes = {key: values.max_abs for key, values in found.items() if values.max_abs}
    most = max(sizes, key=lambda key: sizes[key] or 0.0, default=None)
    return line if most is None else f"{line}; largest difference {_figure(sizes[most])} in {shown(most)}"


def _spec(spec: TensorSpec | None) -> str:
    return "–" if spec is None else str(spec)


def _remark(row: Row, members: int) -> str:
    if row.mend is None:
        return _buffer(row)
    if not row.mend.operation:
        return row.mend.text
    if members > 1:
        return f"{row.mend.text} (a rule for each: --json)"
    rule = row.mend.rule
    return row.mend.text if rule is None else f"{row.mend.text}: {shown(rule)}"


def _buffer(row: Row) -> str:
    """What a missing buffer is."""
    return buffer_words(row.key, row.role, row.module) if row.status == "missing" else ""


def _totals(diff: Diff) -> list[str]:
    counts = ", ".join(f"{diff.count(status)} {word}" for status, word in _counted(diff))
    coverage = diff.coverage
    lines = [
        f"{shown(diff.left)} against {shown(diff.right)}: {counts}",
        *([_values_total(diff)] if diff.has_values else []),
        f"coverage: {coverage.tensors} of {plural(coverage.of_tensors, 'tensor')} ({percent(coverage.by_tensors)}), "
        f"{coverage.numel:,} of {plural(coverage.of_numel, 'element')} ({percent(coverage.by_numel)})",
    ]
    if diff.is_model:
        other = [
            row
            for row in diff.rows
            if row.status in ("matched", "values") and row.left and row.right and row.left.dtype != row.right.dtype
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
            return lines + _alignable(diff)
        rules = " ".join(f"--rule {quote(rule)}" for rule in found.rules)
        lines.append(f"hint: with {rules} the names of {found.tensors} instead of {found.now} tensors are found")
    return lines + _alignable(diff)


def _alignable(diff: Diff) -> list[str]:
    """What an alignment would reach."""
    if diff.alignable is None:
        return []
    what = f"{percent(diff.alignable)} of the elements of {shown(diff.right)}"
    return [f"hint: `ckpt align` finds rules for {what}, and `ckpt remap --auto` applies them where they are certain"]


def quote(rule: str) -> str:
    """A rule as one word of a shell."""
    return shlex.quote(rule)


def _counted(diff: Diff) -> list[tuple[Any, str]]:
    words = [("matched", "matched"), ("values", "of other values")]
    words += [("shape", "of another shape"), ("dtype", "of another dtype")]
    kinds = [*words, ("missing", "missing"), ("unexpected", "unexpected")]
    return [(status, word) for status, word in kinds if status == "matched" or diff.count(status)]  # type: ignore[arg-type]


def data(diff: Diff, match: re.Pattern[str] | None = None, limit: int | None = None) -> dict[str, Any]:
    """The JSON object of `ckpt diff --json`: every key of both sides, or those that `match` and `limit` leave."""
    rows = [row for row in diff.rows if match is None or match.search(row.key)]
    kept = rows if limit is None else rows[:limit]
    coverage = diff.coverage
    statuses = ("matched", *(("values",) if diff.has_values else ()), *_ORDER)
    return {
        "schema": SCHEMA,
        "checkpoint": diff.left,
        "target": diff.right,
        "target_is_model": diff.is_model,
        "target_is_cached": diff.is_cached,
        "same": diff.same,
        "counts": {status: diff.count(status) for status in statuses},
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
        "alignable": diff.alignable,
        "keys": [_row(row, diff.has_values) for row in kept],
        "not_shown": len(rows) - len(kept),
    }


def _row(row: Row, with_values: bool) -> dict[str, Any]:
    return {
        "key": row.key,
        "status": row.status,
        "checkpoint": _side(row.left),
        "target": _side(row.right),
        "role": row.role,
        "module": row.module,
        "mend": None if row.mend is None else {"text": row.mend.text, "rule": row.mend.rule},
        **({"values": _compared(row.values)} if with_values else {}),
    }


def _compared(found: Comparison | None) -> dict[str, Any] | None:
    if found is None:
        return None
    counts = {"nan": found.nan, "inf": found.inf}
    return {
        "equal": found.equal,
        "differing": found.differing,
        "max_abs": found.max_abs,
        "relative_l2": found.relative_l2,
        "cosine": found.cosine,
        **{name: pair and {"checkpoint": pair[0], "target": pair[1]} for name, pair in counts.items()},
    }


def _side(spec: TensorSpec | None) -> dict[str, Any] | None:
    return None if spec is None else {"dtype": spec.dtype.name, "shape": list(spec.shape)}

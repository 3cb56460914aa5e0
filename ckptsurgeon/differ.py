"""Two key sets side by side, and what would mend each mismatch.  Nothing is applied."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import permutations
from math import isqrt, prod
from typing import TYPE_CHECKING, Literal

from ckptsurgeon.checkpoint import Checkpoint, Target, TargetEntry
from ckptsurgeon.errors import UsageError
from ckptsurgeon.tensor import Role, TensorRef, TensorSpec, only_ones_differ

if TYPE_CHECKING:
    from ckptsurgeon.comparison import Comparison
    from ckptsurgeon.stream import Progress

Status = Literal["matched", "values", "dtype", "shape", "missing", "unexpected"]
_POSITIONS = re.compile(r"pos(ition)?(al)?_?emb|relative_position_bias_table|position_ids", re.IGNORECASE)
_EMBEDDING = re.compile(r"(^|[._])(tok|token|word|wte|emb|embed|embedding|embeddings|embed_tokens|shared)([._]|$)")
_HEADS = frozenset(
    (
        "fc",
        "head",
        "heads",
        "head_dist",
        "classifier",
        "logits",
        "last_linear",
        "fclass",
        "lm_head",
        "score",
        "qa_outputs",
    )
)
_HEAD_MODULES = frozenset(("", "Linear", "Conv1d", "Conv2d", "NonDynamicallyQuantizableLinear"))


@dataclass(frozen=True, slots=True)
class Mend:
    """What would make a mismatch of `key` fit: in words, and where one operation does it, that with its arguments."""

    text: str
    key: str = ""
    operation: str = ""
    args: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def rule(self) -> str | None:
        """The operation as a rule for the key; None for a key that no line can hold. Made when it is asked for: a
        diff may have a hundred thousand of them, and show one."""
        from ckptsurgeon.errors import RuleError
        from ckptsurgeon.rules import parse, render

        if not self.operation:
            return None
        pattern = re.compile(f"^{re.escape(self.key)}$")
        try:
            return parse(render(self.operation, {"pattern": pattern, **dict(self.args)})).text
        except (RuleError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Row:
    """One key of either side. `left` is the checkpoint's spec, `right` the target's.

    `values` is how their values differ, where that was asked for and the shapes are equal.
    """

    key: str
    status: Status
    left: TensorSpec | None
    right: TensorSpec | None
    role: Role = "tensor"
    module: str = ""
    mend: Mend | None = None
    values: Comparison | None = None


@dataclass(frozen=True)
class Coverage:
    """How much of the target the checkpoint fills; with values, only with equal ones."""

    tensors: int
    of_tensors: int
    numel: int
    of_numel: int

    @property
    def by_tensors(self) -> float:
        """Between 0 and 1."""
        return self.tensors / self.of_tensors if self.of_tensors else 1.0

    @property
    def by_numel(self) -> float:
        """Between 0 and 1."""
        return self.numel / self.of_numel if self.of_numel else 1.0

    @property
    def least(self) -> float:
        """The smaller of the two: what a gate looks at."""
        return min(self.by_tensors, self.by_numel)


@dataclass(frozen=True)
class Suggestion:
    """Rules that would bring `tensors` of the target's keys to their names, against `now`; or, in
    words, several that would do so equally well with other tensors."""

    rules: tuple[str, ...]
    tensors: int
    now: int
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diff:
    """A checkpoint against a target: rows in the target's order, then what the target lacks.

    `has_values` tells whether the values were compared too, `is_cached` whether the target's header is
    from the cache; `remarks` are those of both sides.  `alignable` is the share of the elements of the target's
    parameters for which `align` finds the tensors, where that is more than names and suggestions reach.
    """

    left: str
    right: str
    is_model: bool
    rows: tuple[Row, ...]
    coverage: Coverage
    suggestion: Suggestion | None = None
    has_values: bool = False
    remarks: tuple[str, ...] = ()
    is_cached: bool = False
    alignable: float | None = None

    @property
    def same(self) -> bool:
        """Whether names, shapes and dtypes agree, and the values where they were compared; against
        a model dtypes do not count."""
        return self.count("matched") == len(self.rows)

    def count(self, status: Status) -> int:
        """The number of keys with a status."""
        return self._counts[status]

    @cached_property
    def _counts(self) -> Counter[Status]:
        return Counter(row.status for row in self.rows)


def diff(left: Checkpoint, target: Target, *, values: bool = False, progress: Progress | None = None) -> Diff:
    """Every key of both sides with its status; headers are enough, but for `values`.

    `progress` is called with the bytes of both sides read so far, and those to read.  Raises
    UsageError when values are asked of a target that has none, InputError (with the key) when a
    tensor cannot be read.
    """
    rows = tuple(_rows(left, target))
    if values:
        if target.tensors is None:
            raise UsageError(
                f"{target.label} is a model spec, whose values are not there to compare; "
                "compare with a checkpoint, or in Python with a live module"
            )
        rows = tuple(_with_values(rows, left, target.tensors, target.ties, progress))
    matched = [row for row in rows if row.status == "matched"]
    coverage = Coverage(
        len(matched),
        len(target.entries),
        sum(row.right.numel for row in matched if row.right),
        target.numel,
    )
    suggestion = _suggested(left, target) if any(row.status == "missing" for row in rows) else None
    label = left.origin.path if left.origin else "the checkpoint"
    remarks = tuple(dict.fromkeys((*left.remarks, *target.remarks)))
    return Diff(label, target.label, target.is_model, rows, coverage, suggestion, values, remarks, target.cached)


def _with_values(
    rows: tuple[Row, ...],
    left: Checkpoint,
    right: Mapping[str, TensorRef],
    ties: tuple[tuple[str, ...], ...],
    progress: Progress | None,
) -> Iterator[Row]:
    """The rows with their values compared: once for each pair of sources, whatever their names."""
    from ckptsurgeon import comparison

    one_name = {key: group[0] for group in ties for key in group}
    pairs: dict[str, Hashable] = {}
    for row in rows:
        if row.left and row.right and row.left.shape == row.right.shape:
            pairs[row.key] = left[row.key].tie or row.key, row.left, one_name.get(row.key, row.key), row.right
    first = {pair: key for key, pair in reversed(pairs.items())}
    found = comparison.compare_all(
        {key: (left[key], right[key]) for key in pairs if first[pairs[key]] == key}, progress
    )
    for row in rows:
        if row.key not in pairs:
            yield row
            continue
        values = found[first[pairs[row.key]]]
        differs = row.status == "matched" and not values.equal
        yield replace(row, values=values, status="values" if differs else row.status)


def _suggested(left: Checkpoint, target: Target) -> Suggestion | None:
    from ckptsurgeon import wrappers

    found = wrappers.find(
        {key: ref.shape for key, ref in left.items()},
        {key: entry.spec.shape for key, entry in target.entries.items()},
    )
    if not found.rules and not found.alternatives:
        return None
    return Suggestion(tuple(rule.text for rule in found.rules), found.hits, found.before, found.alternatives)


def _rows(left: Checkpoint, target: Target) -> Iterator[Row]:
    kin = {key: group for group in target.ties for key in group}
    for key, entry in target.entries.items():
        ref = left.tensors.get(key)
        if ref is None:
            shared = next((name for name in kin.get(key, ()) if name in left), None)
            mend = Mend(f"shared with {shared}, which is there; --missing init ties it") if shared else None
            yield Row(key, "missing", None, entry.spec, entry.role, entry.module, mend)
        else:
            status = _status(ref.spec, entry.spec, target.is_model)
            mend = mend_of(key, ref.spec, entry) if status == "shape" else None
            yield Row(key, status, ref.spec, entry.spec, entry.role, entry.module, mend)
    for key, ref in left.items():
        if key not in target.entries:
            yield Row(key, "unexpected", ref.spec, None)


def _status(left: TensorSpec, right: TensorSpec, is_model: bool) -> Status:
    if left.shape != right.shape:
        return "shape"
    return "matched" if is_model or left.dtype == right.dtype else "dtype"


def mend_of(key: str, left: TensorSpec, entry: TargetEntry) -> Mend:
    """What would make `left` fit, as far as a header can tell."""
    have, want = left.shape, entry.spec.shape
    if only_ones_differ(have, want):
        return _ones(key, have, want)
    if sorted(have) == sorted(want):
        return _turned(key, have, want)
    if prod(have) == prod(want):
        return Mend("the same number of elements: a reshape", key, "reshape", (("shape", want),))
    differing = [i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b]
    if len(have) != len(want):
        if len(want) == len(have) + 1 and len(have) >= 4:
            return Mend(
                f"kernels of {len(have) - 2} dimensions where {len(want) - 2} are wanted: they must be inflated"
            )
        return Mend(f"{len(have)} dimensions where {len(want)} are wanted")
    if _POSITIONS.search(key) and len(differing) == 1:
        return Mend(
            f"another position grid: {_grid(have[differing[0]])} → {_grid(want[differing[0]])}; it must be resized"
        )
    if differing == [0]:
        return _rows_differ(key, have[0], want[0], entry)
    if differing == [1]:
        what = "input channels" if len(have) > 2 else "input features"
        return Mend(f"other {what}: {have[1]} → {want[1]}")
    if len(have) > 2 and min(differing) >= 2:
        return Mend(f"another kernel size: {_times(have[2:])} → {_times(want[2:])}")
    return Mend("other sizes; no single operation mends this")


def _rows_differ(key: str, have: int, want: int, entry: TargetEntry) -> Mend:
    if entry.module == "Embedding" or (not entry.module and _EMBEDDING.search(key)):
        return Mend(f"another vocabulary: {have} → {want} rows; load the rest with --mismatched overlap --missing init")
    if not _is_head(key, entry):
        return Mend(f"another number of outputs: {have} → {want}")
    return Mend(f"a head of another size: {have} → {want} outputs; --mismatched drop --missing init begins it anew")


def _is_head(key: str, entry: TargetEntry) -> bool:
    """A layer with the name of a head that does not stand in a numbered block."""
    for segment in key.split(".")[:-1]:
        if segment in _HEADS:
            return entry.module in _HEAD_MODULES
        if segment.isdigit():
            return False
    return False


def _ones(key: str, have: tuple[int, ...], want: tuple[int, ...]) -> Mend:
    gone, new = _unmatched_ones(have, want), _unmatched_ones(want, have)
    if gone and not new:
        dims = ",".join(map(str, gone))
        return Mend(f"squeeze dimension {dims}", key, "squeeze", (("dims", tuple(gone)),))
    if new and not gone:
        dims = ",".join(map(str, new))
        return Mend(f"unsqueeze dimension {dims}", key, "unsqueeze", (("dims", tuple(new)),))
    return Mend("dimensions of size 1 in other places: a reshape", key, "reshape", (("shape", want),))


def _unmatched_ones(a: tuple[int, ...], b: tuple[int, ...]) -> list[int]:
    """The places of the 1s of `a` that have no partner in `b`, matching runs of 1s between the
    other sizes from the front."""
    extra: list[int] = []
    j = 0
    for i, size in enumerate(a):
        if j < len(b) and size == b[j]:
            j += 1
        elif size == 1:
            extra.append(i)
        else:
            while j < len(b) and b[j] == 1:
                j += 1
            j += 1
    return extra


def _turned(key: str, have: tuple[int, ...], want: tuple[int, ...]) -> Mend:
    if len(have) == 2:
        return Mend("transpose", key, "transpose")
    if len(have) > 6:
        return Mend("the same sizes in another order: a permute")
    fits = _permutes(have, want)
    if len(fits) == 1:
        return Mend("permute", key, "permute", (("dims", fits[0]),))
    return Mend(f"the same sizes in another order: {len(fits)} permutes fit, so look at the values")


@lru_cache(maxsize=256)
def _permutes(have: tuple[int, ...], want: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [order for order in permutations(range(len(have))) if tuple(have[dim] for dim in order) == want]


def _grid(tokens: int) -> str:
    for extra in (0, 1, 2):
        side = isqrt(max(0, tokens - extra))
        if side > 1 and side * side == tokens - extra:
            return f"{tokens} ({side}×{side}{f' + {extra}' if extra else ''})"
    return str(tokens)


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))

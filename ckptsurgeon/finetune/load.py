"""Loading a checkpoint into a live module, with a report that says what was and was not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptsurgeon import surgery
from ckptsurgeon.checkpoint import buffer_words
from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import PlanError, Problem, UsageError
from ckptsurgeon.plans import Mismatched, Missing, Plan, Unexpected

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did. `loaded` are the model's keys that came from the checkpoint, `kept`
    those that keep the model's own values, `partly` those of which a part came."""

    plan: Plan
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    partly: tuple[str, ...]
    numel_loaded: int
    numel: int

    @property
    def dropped(self) -> tuple[str, ...]:
        """The checkpoint's keys that were not used."""
        return tuple(self.plan.dropped)

    @property
    def coverage(self) -> float:
        """The share of the model's elements that came from the checkpoint, between 0 and 1."""
        return self.numel_loaded / self.numel if self.numel else 1.0

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.kept)
        lines = [f"loaded {len(self.loaded)} of {total} tensors, {100 * self.coverage:.2f} % of the elements"]
        lines += [f"  kept as it was: {key} ({self._why_kept(key)})" for key in self.kept]
        lines += [f"  partly loaded: {key} ({self.plan.mismatched[key]})" for key in self.partly]
        lines += [f"  not used: {key} ({why})" for key, why in self.plan.dropped.items()]
        return "\n".join([*lines, *(f"  warning: {warning}" for warning in self.plan.warnings)])

    def _why_kept(self, key: str) -> str:
        if key in self.plan.mismatched or self.plan.target is None:
            return self.plan.mismatched.get(key, "")
        entry = self.plan.target.entries[key]
        buffer = buffer_words(key, entry.role, entry.module)
        return f"not in the checkpoint; {buffer}" if buffer else "not in the checkpoint"


def load_into(
    model: torch.nn.Module,
    source: surgery.Source,
    rules: surgery.Rules = None,
    *,
    select: str | None = None,
    unexpected: Unexpected | None = None,
    mismatched: Mismatched | None = None,
    missing: Missing | None = None,
    fit: bool = False,
    allow_unused: bool = False,
) -> LoadReport:
    """Load a checkpoint (after `rules`) into `model`, tensor by tensor, on the device where it is.

    Values are cast to the model's dtypes.  Keys that the checkpoint does not bring keep the
    model's own values, when a policy (`missing="init"` or `"skip"`, or `fit`) allows it.  Raises
    PlanError with every problem before anything is changed.
    """
    import torch

    if isinstance(source, torch.nn.Module):
        raise UsageError("the source of load_into is a checkpoint or a path, and comes second")
    made = surgery.plan(
        source,
        rules,
        model,
        select=select,
        unexpected="drop" if unexpected == "keep" else unexpected,
        mismatched=mismatched,
        missing=missing,
        fit=fit,
        allow_unused=allow_unused,
    ).check()
    live = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    on_meta = [key for key, value in live.items() if value.is_meta]
    if on_meta:
        raise UsageError(f"the model is on the meta device ({on_meta[0]!r}, …); give it memory with model.to_empty()")
    _check_kinds(made)
    fresh = set(made.initialised)
    loaded = tuple(key for key in live if key in made.result.tensors and key not in fresh)
    with torch.no_grad():
        for key in loaded:
            live[key].copy_(made.result[key].read())
    counts = made.loaded()
    return LoadReport(
        made,
        loaded,
        tuple(key for key in live if key not in loaded),
        tuple(key for key in loaded if key in made.overlapped),
        sum(counts[key] for key in loaded),
        sum(value.numel() for value in live.values()),
    )


def _check_kinds(made: Plan) -> None:
    """A copy into a live tensor casts; what it would cut off (fractions, imaginary parts) is a problem."""
    target = made.target
    assert target is not None
    problems = []
    for key, entry in target.entries.items():
        ref = made.result.tensors.get(key)
        if ref is not None and ref.absent is not None:
            problems.append(Problem(f"{key!r} is {ref.absent}: the file does not hold its bytes", key=key))
        elif ref is not None and not _fits(ref.dtype, entry.spec.dtype):
            problems.append(
                Problem(f"{key!r} is {ref.dtype} in the checkpoint and {entry.spec.dtype} in the model", key=key)
            )
    if problems:
        raise PlanError(problems)


def _fits(have: DType, want: DType) -> bool:
    """Whether a copy loses nothing but precision; quantised tensors go into their own kind alone."""
    if "quantized" in (have.kind, want.kind):
        return have == want
    rank = {"bool": 0, "uint": 1, "int": 1, "float": 2, "complex": 3}
    return rank[have.kind] <= rank[want.kind]

"""What loading a checkpoint into a live module came to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from ckptsurgeon.checkpoint import buffer_words
from ckptsurgeon.differ import Coverage
from ckptsurgeon.errors import PlanError, Problem, UsageError, shown
from ckptsurgeon.plans import Edges, Plan

_NAMED = 5
"""Keys that an error names."""
_ROWS = 200
"""Rows of a table in a notebook: a hundred thousand of them would stop it."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did, in the names that the network itself gives its tensors, without those of wrappers.

    `loaded` are the keys that came from the checkpoint, `kept` those that keep the model's own values, `partly`
    those of `loaded` of which only a part came.  `numel_loaded` of `numel` elements came; names that share a tensor
    count each.

    A report does not keep the model alive, and can be pickled, alone or as an attribute of the model.  What comes back
    then tells the same, but no longer how the plan would be made again, which `cs.load_optimizer` asks.
    """

    plan: Plan
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    partly: tuple[str, ...]
    numel_loaded: int
    numel: int

    @classmethod
    def of(cls, plan: Plan) -> LoadReport:
        """The report of a plan for a model."""
        assert plan.target is not None
        counts = plan.loaded()
        return cls(
            plan,
            tuple(counts),
            tuple(key for key in plan.target.entries if key not in counts),
            tuple(key for key in counts if key in plan.overlapped),
            sum(counts.values()),
            plan.target.numel,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled: no functions, but what they would say."""
        steps = tuple(replace(step, edges=Edges(tuple(step.edges)), made_by=None) for step in self.plan.steps)
        return {**self.__dict__, "plan": replace(self.plan, steps=steps, on=None)}

    def __copy__(self) -> LoadReport:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadReport:
        return self  # nothing of it ever changes

    @property
    def dropped(self) -> tuple[str, ...]:
        """The checkpoint's keys that were not used."""
        return tuple(self.plan.dropped)

    @property
    def unfilled(self) -> tuple[str, ...]:
        """Those of `partly` that keep elements of the model's own: a part of a larger tensor fills the others."""
        target = self.plan.target
        assert target is not None
        return tuple(key for key in self.partly if self.plan.overlapped[key] < target.entries[key].spec.numel)

    @property
    def others(self) -> tuple[str, ...]:
        """The keys of the model's state dict that are no tensors (`get_extra_state`); they are as they were."""
        return self.plan.target.others if self.plan.target is not None else ()

    @property
    def unwrapped(self) -> tuple[str, ...]:
        """The rules that took wrappers off the checkpoint's names, or put them on, which nobody had to write."""
        return tuple(step.rule for step in self.plan.steps if step.by == "fit")

    @property
    def buffers_kept(self) -> tuple[str, ...]:
        """Those of `kept` that are buffers, such as running statistics."""
        return tuple(key for key in self.kept if self.role(key) == "buffer")

    @property
    def coverage(self) -> float:
        """The share of the model's elements that came from the checkpoint, between 0 and 1."""
        return self.numel_loaded / self.numel if self.numel else 1.0

    @property
    def covered(self) -> Coverage:
        """How many tensors (in full) and elements came, of all parameters and buffers; `.least` is the smaller of the
        two shares, at which `min_coverage` looks, as `ckpt diff --min-coverage` does."""
        return self._covered((*self.loaded, *self.kept))

    @property
    def covered_parameters(self) -> Coverage:
        """The same of the parameters alone."""
        return self._covered(key for key in (*self.loaded, *self.kept) if self.role(key) == "parameter")

    def _covered(self, keys: Iterable[str]) -> Coverage:
        target, counts = self.plan.target, self.plan.loaded()
        assert target is not None
        names = list(keys)
        whole = sum(counts.get(key) == target.entries[key].spec.numel for key in names)
        numel = sum(target.entries[key].spec.numel for key in names)
        return Coverage(whole, len(names), sum(counts.get(key, 0) for key in names), numel)

    def raise_for(self, min_coverage: float) -> LoadReport:
        """This report; PlanError when less than a share (0 to 1) of the tensors, or of their elements, came.

        Raises UsageError for what is no such share.
        """
        if not isinstance(min_coverage, int | float) or isinstance(min_coverage, bool) or not 0 <= min_coverage <= 1:
            raise UsageError(f"min_coverage is a share from 0 to 1, not {min_coverage!r}")
        found = self.covered
        if found.least >= min_coverage:
            return self
        without = (*self.kept, *self.unfilled)
        named = ", ".join(map(repr, without[:_NAMED]))
        more = f" and {len(without) - _NAMED:,} more" if len(without) > _NAMED else ""
        text = (
            f"only {found.tensors:,} of {found.of_tensors:,} tensors and {found.numel:,} of {found.of_numel:,} elements"
            f" come from the checkpoint, less than min_coverage={min_coverage:g}; not, or not in full: {named}{more}"
        )
        raise PlanError([Problem(text, kind="coverage")])

    def check_model(self, shapes: Mapping[str, tuple[int, ...]], label: str, grown: bool = True) -> None:
        """UsageError where something that was loaded has another shape in a model whose tensors have these; unless it
        may have `grown`, where any tensor of it has, is gone, or is new."""
        before = self.plan.target.entries if self.plan.target is not None else {}
        for key in self.loaded if grown else (*self.kept, *self.loaded):
            want = before[key].spec.shape
            if key not in shapes and grown:
                continue  # names are held against the model by those who look them up
            if shapes.get(key) != want:
                what = f"has it as {list(shapes[key])}" if key in shapes else "has none"
                raise UsageError(f"the report is of a model with {key!r} {list(want)}, and {label} {what}")
        new = None if grown else next((key for key in shapes if key not in before), None)
        if new is not None:
            raise UsageError(f"{label} has {new!r}, and the model of the report had none; load into it anew")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data that `json.dumps` takes: the lists of keys, why each was kept, cut or dropped, the
        rules that took wrappers off, warnings, and the coverage of all tensors and of the parameters."""
        return {
            "loaded": list(self.loaded),
            "kept": {key: self._why_kept(key) for key in self.kept},
            "buffers_kept": list(self.buffers_kept),
            "partly": {key: self.plan.mismatched[key] for key in self.partly},
            "dropped": dict(self.plan.dropped),
            "others": list(self.others),
            "unwrapped": list(self.unwrapped),
            "warnings": list(self.plan.warnings),
            "coverage": _data(self.covered),
            "coverage_of_parameters": _data(self.covered_parameters),
        }

    def __str__(self) -> str:
        return "\n".join([self._summary(), *(f"  {what}: {shown(text)}" for what, text in self._notes())])

    def _summary(self) -> str:
        total = len(self.loaded) + len(self.kept)
        return f"loaded {len(self.loaded)} of {total} tensors, {100 * self.coverage:.2f} % of the elements"

    def _notes(self) -> Iterator[tuple[str, str]]:
        """What there is to say, each with what it is."""
        for rule in self.unwrapped:
            yield "wrappers", rule
        for key in self.kept:
            yield "kept as it was", f"{key} ({self._why_kept(key)})"
        for key in self.partly:
            yield "partly loaded", f"{key} ({self.plan.mismatched[key]})"
        for key, why in self.plan.dropped.items():
            yield "not used", f"{key} ({why})"
        for warning in self.plan.warnings:
            yield "warning", warning

    def _repr_html_(self) -> str:
        """A table for a notebook: everything but what was simply loaded."""
        notes = list(self._notes())
        rows = [f"<tr><th>{escape(what)}</th><td>{escape(shown(text))}</td></tr>" for what, text in notes[:_ROWS]]
        if len(notes) > _ROWS:
            rows.append(f"<tr><th></th><td>… and {len(notes) - _ROWS:,} more: print(report)</td></tr>")
        own = self.covered_parameters
        parameters = f"{own.tensors:,} of {own.of_tensors:,} parameters in full, {100 * own.by_numel:.2f} % of theirs"
        head = f"<p><b>{escape(self._summary())}</b>; {parameters}</p>"
        return f"<div>{head}<table>{''.join(rows)}</table></div>" if rows else f"<div>{head}</div>"

    def role(self, key: str) -> str:
        """Whether a key of the model is a `parameter` or a `buffer`."""
        assert self.plan.target is not None
        return self.plan.target.entries[key].role

    def _why_kept(self, key: str) -> str:
        if key in self.plan.mismatched or self.plan.target is None:
            return self.plan.mismatched.get(key, "")
        entry = self.plan.target.entries[key]
        buffer = buffer_words(key, entry.role, entry.module)
        return f"not in the checkpoint; {buffer}" if buffer else "not in the checkpoint"


def _data(found: Coverage) -> dict[str, float]:
    return {
        "tensors": found.tensors,
        "of_tensors": found.of_tensors,
        "by_tensors": found.by_tensors,
        "numel": found.numel,
        "of_numel": found.of_numel,
        "by_numel": found.by_numel,
    }

"""Loading a checkpoint into a live module, with a report that says what was and was not loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckptsurgeon import surgery
from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import PlanError, Problem, TargetError, UsageError, quoted
from ckptsurgeon.finetune import _assigning, _live, _placing, _sharing, _survey
from ckptsurgeon.finetune.report import LoadReport
from ckptsurgeon.plans import Mismatched, Missing, Plan, Unexpected
from ckptsurgeon.rules import Recipe

if TYPE_CHECKING:
    import torch


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
    beside: Mapping[str, surgery.Source] | None = None,
    assign: bool = False,
    min_coverage: float = 0.0,
    verify: bool = False,
) -> LoadReport:
    """Load a checkpoint (after `rules`) into `model`, on the device where it is, without ever holding it twice.

    Names are those of the network itself: what torch.compile, DataParallel, DistributedDataParallel, FSDP, activation
    checkpointing, Fabric or a LightningModule put around them, in the checkpoint or in the model, takes no part; the
    rules that this takes stand in the report.  Under FSDP, and in processes that share a DTensor, every process
    calls this, and each keeps its own part.  Values are cast to the model's dtypes.  Keys that the checkpoint does not
    bring keep the model's own values, when a policy (`missing="init"` or `"skip"`, or `fit`) allows it; policies,
    `select`, `allow_unused` and `beside` are those of `cs.plan`.

    A model on the meta device takes `assign=True`: its parameters and buffers are made real on the CPU, of the model's
    dtypes, and read into without a copy between; what shared a parameter still does.  Create its optimizer afterwards.

    With `verify` the records of a torch zip are held against their checksums on the way, which torch never does; on
    two processors that takes another two thirds of the time.  Without it only those are that pass through a
    computation or a decompression anyway; `ckpt verify` holds them all.

    Before anything is changed, raises PlanError with every problem: what no policy settles, two values for
    parameters that share memory, fractions and imaginary parts that a cast would cut, what would stay on the meta
    device, and less than a share `min_coverage` (0 to 1) of the tensors, parameters and buffers alike, or of their
    elements, as `ckpt diff --min-coverage` counts.  UsageError for
    a model on the meta device without `assign`, TargetError for a model whose own code fails.  InputError, with the
    key, when a file cannot be read to its end: then the model is partly loaded.

    >>> import ckptsurgeon as cs, torch, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"module.weight": torch.ones(1, 2)}, folder + "/a.pth")
    ...     print(cs.load_into(torch.nn.Linear(2, 1), folder + "/a.pth", missing="init"))
    loaded 1 of 2 tensors, 66.67 % of the elements
      wrappers: strip module.
      kept as it was: bias (not in the checkpoint)
    """
    parts, found = _looked_at(model, source, rules, assign)
    made = surgery.plan(
        source,
        rules,
        found.target,
        select=select,
        unexpected="drop" if unexpected == "keep" else unexpected,
        mismatched=mismatched,
        missing=missing,
        fit=fit,
        unwrap=True,
        allow_unused=allow_unused,
        beside=beside,
    ).check()
    report = LoadReport.of(made).raise_for(min_coverage)
    if problems := list(_problems(report, found, parts)):
        raise PlanError(problems)
    real = _assigning.made_real(model) if assign else {}
    for part in parts:
        with part.open(True) as held:
            _load(report, _live.renewed(held, real), found, verify)
    return report


def _looked_at(model: Any, source: Any, rules: Any, assign: bool) -> tuple[list[_live.Part], _survey.Survey]:
    """The model's parts and what it wants, when the arguments are what they must be."""
    import torch

    if isinstance(source, torch.nn.Module):
        raise UsageError("the source of load_into is a checkpoint or a path, and comes second")
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"load_into loads into an nn.Module, not a {type(model).__name__}")
    if rules is not None and not isinstance(rules, Recipe | Iterable):
        raise UsageError(f"rules are lines, or a recipe, not {quoted(rules)}")
    parts = _live.parts(model)
    found = _survey.look(model, parts)
    if not assign and (bare := (*found.on_meta, *found.unreachable)):
        raise UsageError(
            f"the model is on the meta device ({bare[0]!r}, …); give load_into assign=True, or the model memory with "
            "model.to_empty(device=…)"
        )
    return parts, found


def _problems(report: LoadReport, found: _survey.Survey, parts: list[_live.Part]) -> Iterator[Problem]:
    """Everything that stands against copying what the plan has into the live tensors."""
    yield from _cuts(report.plan, report.loaded)
    yield from (found.problems[key] for key in report.loaded if key in found.problems)
    refs = {key: report.plan.result[key] for key in report.loaded}
    yield from _sharing.contradictions(found.target.label, found.target.ties, found.overlaps, refs)
    if found.on_meta or found.unreachable:
        (part,) = parts
        whole = [key for key in report.loaded if key not in report.unfilled]
        with part.open(False) as held:
            yield from _assigning.unsettled(found, held.tensors, whole)


def _cuts(made: Plan, loaded: tuple[str, ...]) -> Iterator[Problem]:
    """A copy into a live tensor casts; what it would cut off (fractions, imaginary parts) is a problem."""
    assert made.target is not None
    for key in loaded:
        ref, want = made.result[key], made.target.entries[key].spec.dtype
        if ref.absent is not None:
            text = f"{key!r} is {ref.absent}: the file does not hold its bytes"
            yield Problem(f'{text}; drop it by a rule, with missing="init"', key=key)
        elif not _fits(ref.dtype, want):
            text = f"{key!r} is {ref.dtype} in the checkpoint and {want} in the model"
            yield Problem(f'{text}; cast it by a rule, or drop it, with missing="init"', key=key)


def _fits(have: DType, want: DType) -> bool:
    """Whether a copy loses nothing but precision; quantised tensors go into their own kind alone."""
    if "quantized" in (have.kind, want.kind):
        return have == want
    rank = {"bool": 0, "uint": 1, "int": 1, "float": 2, "complex": 3}
    return rank[have.kind] <= rank[want.kind]


def _load(report: LoadReport, held: _live.Held, found: _survey.Survey, verify: bool) -> None:
    """Fill what a part of the model holds; of names that are one tensor, one."""
    first = {key: group[0] for group in found.target.ties for key in group}
    refs = report.plan.result
    once = {first.get(key, key): key for key in reversed(report.loaded) if key in held.tensors}
    places = [_placing.place(key, held.tensors[key], refs[key]) for key in once.values() if key not in held.setters]
    _placing.fill(places, verify)
    for key in [key for key in held.setters if key in report.loaded]:
        value = refs[key].read()
        try:
            held.setters[key](value)
        except Exception as error:  # the model's own code
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise TargetError(
                f"{found.target.label}: its set_extra_state does not take {key!r}: {words}; the model is partly loaded"
            ) from error

"""Initialising what a checkpoint did not bring, and nothing else."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.errors import UsageError
from ckptsurgeon.finetune import _live, _sharing, _survey, names
from ckptsurgeon.finetune._local import is_sharded, local, storage
from ckptsurgeon.finetune._placing import part_of
from ckptsurgeon.finetune.report import LoadReport
from ckptsurgeon.ops import Initial
from ckptsurgeon.ops.making import Named
from ckptsurgeon.report._text import plural, shown
from ckptsurgeon.schemes import Choice, Scheme

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Groups = Mapping[str, tuple[str, ...]]
"""Each of the names that share one tensor → all of them."""


@dataclass(frozen=True)
class Initialised:
    """What `init_missing` did, by the network's own names.

    `made` says by which scheme each tensor was initialised; `partly` of those of which a part had been loaded how many
    elements are new; `left` are those that a checkpoint did not bring and that are as they were, and why.
    """

    made: Mapping[str, str]
    partly: Mapping[str, int]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"initialised {plural(len(self.made), 'tensor')}, {len(self.left):,} left as they were"]
        for key, word in self.made.items():
            part = f" (its {plural(self.partly[key], 'new element')})" if key in self.partly else ""
            lines.append(f"  {shown(word)}: {shown(key)}{part}")
        return "\n".join([*lines, *(f"  left: {shown(key)} ({shown(why)})" for key, why in self.left.items())])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def init_missing(
    model: torch.nn.Module,
    report: LoadReport,
    scheme: str | float | Callable[..., Any] | Mapping[Any, Any] = "kaiming_fan_out",
    seed: int = 0,
) -> Initialised:
    """Initialise what `load_into` did not load (`report.kept`), and the rest of what it loaded a part of (`.unfilled`).

    `scheme` is a word for all weights: `kaiming_fan_out`, `kaiming_uniform`, `xavier_uniform`, `normal:0.02`,
    `trunc_normal`, `orthogonal`, `zeros`, a number …; `torchvision` (convolutions by fan-out, matrices normal:0.01) or
    `timm` (normal:0.02).  Or a table of them by the type of the module that owns a parameter (`Conv2d`), its kind
    (`norm`, `embedding`, `prelu`, `bias`) and `*` for all others; the word `keep` leaves what is there.

    Weights are named so and have two dimensions or more.  Whatever the scheme, norms begin with 1 and 0, their
    statistics with 0 and 1, PReLU with 0.25, other biases with 0, and embeddings with normal:0.02 where it goes by
    fans.  Only what the table names by its own type or kind is made otherwise; that may be any parameter, such as the
    class token of a `VisionTransformer`.  All else (layer scales, tokens, other buffers) keeps the model's value.
    A padding row of an embedding is drawn as the others are.

    Values follow from `seed` and the name alone, in whatever order, made in float32 and cast; where the dtypes are the
    model's, they are the bytes that `ckpt remap --missing init --init SCHEME --seed N` writes.  A parameter whose
    memory overlaps that of another one is left as it is.  A function, as the scheme or in a table, is given
    (name, tensor, module) and fills the tensor in place, with torch's random state begun anew for each name and put
    back afterwards; alone it is given every new parameter, of norms and biases too.

    Raises UsageError, before anything is changed, for another model than the report's or one that was changed since,
    one on the meta device, a scheme or a type that there is not, a scheme that cannot make a tensor, and a function
    that returns another tensor than the one that it is given.

    >>> import ckptsurgeon as cs, torch
    >>> model = torch.nn.Linear(2, 1)
    >>> report = cs.load_into(model, cs.Checkpoint({}), missing="init")
    >>> print(cs.init_missing(model, report, "normal:0.02"))
    initialised 2 tensors, 0 left as they were
      normal:0.02: weight
      zeros: bias
    """
    import torch

    if not isinstance(model, torch.nn.Module) or not isinstance(report, LoadReport):
        raise UsageError("init_missing takes a model and the report that cs.load_into gave of it")
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise UsageError(f"a seed is a whole number from 0 to 2**64 - 1, not {seed!r}")
    parts = _live.parts(model)
    found = _survey.look(model, parts)
    target = found.target
    report.check_model({key: entry.spec.shape for key, entry in target.entries.items()}, target.label, grown=False)
    chosen = Scheme.of(scheme).check(target)
    groups = {key: group for group in target.ties for key in group}
    new = _new(report, target, groups)
    todo = {key: chosen.choice(key, target.entries[key]) for key in new}
    choices = {key: choice for key, choice in todo.items() if choice is not None}
    across = _across(choices, report, groups, found)
    made = {key: choice for key, choice in choices.items() if key not in across}
    left = _left(report, groups, {**todo, **dict.fromkeys(across)}) | across
    _check(made, found)
    _fill(parts, made, new, _Filler(target, dict(names.modules(model)), model, seed))
    partly = {
        key: _numel(target, key) - _shared(target, key, region) for key in made if (region := new[key]) is not None
    }
    return Initialised({key: _words(choice) for key, choice in made.items()}, partly, left)


def _fill(
    parts: Sequence[_live.Part], todo: Mapping[str, Choice], new: Mapping[str, Shape | None], filler: _Filler
) -> None:
    """Make the values and put them where they belong; those of functions, which may fail, before any other."""
    ready: dict[str, torch.Tensor] = {}
    by_function = {key: choice for key, choice in todo.items() if not isinstance(choice, Initial)}
    for part in parts if by_function else ():
        with part.open(False) as held:
            ready |= {
                key: filler.called(key, choice, held.tensors[key])
                for key, choice in by_function.items()
                if key in held.tensors
            }
    for part in parts:
        with part.open(True) as held:
            for key, choice in todo.items():
                if key in held.tensors:
                    value = filler.drawn(key, choice) if isinstance(choice, Initial) else ready.pop(key)
                    _put(held.tensors[key], value, new[key])


def _across(todo: Mapping[str, Choice], report: LoadReport, groups: Groups, found: _survey.Survey) -> dict[str, str]:
    """What lies over a part of another tensor's memory, so that one cannot be filled without the other, and why."""
    loaded = {groups[key][0] if key in groups else key for key in report.loaded}
    made: dict[str, str] = {}
    for pair in found.overlaps:
        if any(view.key in todo for view in pair) and _sharing.meet(*pair):
            for one, other in (pair, pair[::-1]):
                if one.key in todo:
                    what = "was loaded" if other.key in loaded else "was not"
                    made[one.key] = f"shares its memory in part with {other.key!r}, which {what}"
    return made


def _check(todo: Mapping[str, Choice], found: _survey.Survey) -> None:
    """UsageError for a tensor that cannot be filled."""
    for key in todo:
        if key in found.on_meta:
            raise UsageError(
                f"{key!r} is on the meta device; give load_into assign=True, or the model memory with "
                "model.to_empty(device=…)"
            )
        if key in found.problems:
            raise UsageError(str(found.problems[key]))


def _numel(target: Target, key: str) -> int:
    return target.entries[key].spec.numel


def _shared(target: Target, key: str, region: Shape) -> int:
    return prod(min(a, b) for a, b in zip(region, target.entries[key].spec.shape, strict=True))


def _regions(report: LoadReport) -> dict[str, Shape]:
    """The names of which a part was loaded, with its sizes, from the first element of every dimension."""
    parts = {key: part_of(report.plan.result[key]) for key in report.loaded}
    return {key: part.shape for key, part in parts.items() if part is not None}


def _new(report: LoadReport, target: Target, groups: Groups) -> dict[str, Shape | None]:
    """The keys that were not loaded (None), or in part; of names that share one tensor the first, and none where one
    of them was loaded in full."""
    regions = _regions(report)
    whole = {*report.loaded} - regions.keys()
    known = {*report.loaded, *report.kept}
    made: dict[str, Shape | None] = {}
    for key in target.entries:
        group = groups.get(key, (key,))
        if key in known and key == group[0] and not any(name in whole for name in group):
            region = next((regions[name] for name in group if name in regions), None)
            if region is None or _shared(target, key, region) < _numel(target, key):  # else nothing of it is new
                made[key] = region
    return made


def _left(report: LoadReport, groups: Groups, todo: Mapping[str, Choice | None]) -> dict[str, str]:
    """What is left as it was, and why."""
    left = {}
    for key in (*report.kept, *report.unfilled):
        other = next((name for name in groups.get(key, ()) if name != key), None)
        if key not in todo and other is not None:
            left[key] = f"shares its memory with {other!r}"
        elif key in todo and todo[key] is None:
            left[key] = "no rule of the scheme is about it"
    return left


@dataclass(frozen=True)
class _Filler:
    """Makes whole tensors of a model: `owners` are its modules by name."""

    target: Target
    owners: Mapping[str, torch.nn.Module]
    model: torch.nn.Module
    seed: int

    def drawn(self, key: str, choice: Initial) -> torch.Tensor:
        """As a scheme makes it."""
        spec = self.target.entries[key].spec
        return Named(choice, key, spec.nbytes).make(spec, self.seed)

    def called(self, key: str, choice: Callable[..., Any], value: torch.Tensor) -> torch.Tensor:
        """As a function fills a copy of it. UsageError where it makes another tensor of it."""
        import torch

        if is_sharded(value):
            raise UsageError(
                f"{key!r} is spread over processes (a DTensor), which a function cannot fill; name a scheme"
            )
        made = value.detach().clone()
        digest = hashlib.sha256(f"{self.seed}\n{key}".encode()).digest()
        devices = [made.device] if made.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            try:
                said = choice(key, made, self.owners.get(key.rpartition(".")[0], self.model))
            except Exception as error:
                error.add_note(f"while {key!r} was initialised; the model is as it was")
                raise
        if isinstance(said, torch.Tensor) and said is not made and storage(said) != storage(made):
            raise UsageError(
                f"the function returns a new tensor for {key!r}; it is to fill the one that it is given in place, "
                "as torch.nn.init does"
            )
        if made.shape != value.shape:
            raise UsageError(f"the function made {list(made.shape)} of {key!r}, which is {list(value.shape)}")
        return made


def _put(value: torch.Tensor, new: torch.Tensor, region: Shape | None) -> None:
    """Copy what is new into a tensor, or its part that is here, but for a region at its beginning."""
    import torch

    here, offset = local(value)
    begins = offset or (0,) * new.dim()
    with torch.inference_mode(value.is_inference()), torch.no_grad():
        part = new[tuple(slice(at, at + size) for at, size in zip(begins, here.shape, strict=True))]
        known = [
            max(0, min(size - at, there)) for size, at, there in zip(region or begins, begins, here.shape, strict=True)
        ]
        if region is None or not prod(known):
            here.copy_(part)
            return
        for dim, size in enumerate(known):  # what lies behind the region in this dimension, and within it before
            box = (*(slice(0, end) for end in known[:dim]), slice(size, None))
            here[box].copy_(part[box])


def _words(choice: Choice) -> str:
    return str(choice) if isinstance(choice, Initial) else getattr(choice, "__name__", "a function")

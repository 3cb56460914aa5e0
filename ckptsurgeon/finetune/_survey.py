"""A look at a live model before anything is loaded: the target that it is, and what cannot be loaded into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

from ckptsurgeon.checkpoint import Target, TargetEntry
from ckptsurgeon.errors import Problem, TargetError
from ckptsurgeon.finetune import _sharing, names
from ckptsurgeon.finetune._live import Part
from ckptsurgeon.finetune._local import storage, unplaced
from ckptsurgeon.targets import module as modules

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Survey:
    """What a model wants: the `target` that it is, its keys without memory of their own (on the meta device), and
    names of tensors that no checkpoint brings and that are without memory too.  `ties` are names of one memory,
    `overlaps` pairs of names whose memory may overlap otherwise; `problems` are keys that cannot be loaded, by key."""

    target: Target
    on_meta: tuple[str, ...]
    unreachable: tuple[str, ...]
    overlaps: tuple[_sharing.Overlap, ...]
    problems: Mapping[str, Problem]


def look(model: torch.nn.Module, parts: Sequence[Part]) -> Survey:
    """Look at every part once.  TargetError where the model's own code fails."""
    label = f"the {type(names.peeled(model)).__name__}"
    owners = {name: modules.types(module) for name, module in names.modules(model)}
    _check_shapes(label, model)
    known = _known(model)
    entries: dict[str, TargetEntry] = {}
    ties: list[tuple[str, ...]] = []
    others: list[str] = []
    on_meta: list[str] = []
    overlaps: list[_sharing.Overlap] = []
    problems: dict[str, Problem] = {}
    for part in parts:
        with ExitStack() as stack:
            with _named(label):
                held = stack.enter_context(part.open(False))
            entries |= modules.of_values(label, held.tensors, owners).entries
            others += held.others
            on_meta += [key for key, value in held.tensors.items() if value.is_meta]
            real = {key: value for key, value in held.tensors.items() if key not in held.setters}
            ties += _sharing.ties(real)
            overlaps += _sharing.overlaps(real)
            problems |= _unfit(real, known if part.unit is None else None)
    initial = modules.Values(label, _Now(label, parts), 0)
    target = Target(label, entries, True, tuple(others), tuple(ties), initial)
    unreachable = tuple(name for name in _meta(model) if name not in entries)
    return Survey(target, tuple(on_meta), unreachable, tuple(overlaps), problems)


@contextmanager
def _named(label: str) -> Iterator[None]:
    try:
        yield
    except (TargetError, KeyboardInterrupt):
        raise
    except Exception as error:  # the model's own code, such as state_dict hooks
        words = " ".join(str(error).split())[:300]
        raise TargetError(f"{label}: its state dict cannot be made: {type(error).__name__}: {words}") from error


def _check_shapes(label: str, model: torch.nn.Module) -> None:
    if (why := _sharing.unsized((*names.parameters(model).items(), *model.named_buffers()))) is not None:
        raise TargetError(f"{label}: {why}")


class _Now:
    """Tells the values that a model has now, as long as somebody else keeps it: a report is no reason to.

    Pickled, it knows of no model.
    """

    def __init__(self, label: str, parts: Sequence[Part]) -> None:
        self.label = label
        self.parts = [(part.prefix, part.bare, ref(part.module), part.unit and ref(part.unit)) for part in parts]

    def __call__(self, seed: int) -> dict[str, torch.Tensor]:
        there = []
        for prefix, bare, module, unit in self.parts:
            if (found := module()) is not None:
                there.append(Part(found, prefix, unit and unit(), bare))
        if not there or len(there) < len(self.parts):
            raise TargetError(f"{self.label} that was loaded into is no more, and its values with it")
        return _now(there)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Now, (self.label, ())


def _now(found: Sequence[Part]) -> dict[str, torch.Tensor]:
    """The values that a model has now; of what is only there as long as a part is open, copies."""
    made: dict[str, torch.Tensor] = {}
    for part in found:
        with part.open(False) as held:
            made |= {
                key: value.detach() if part.unit is None else value.detach().clone()
                for key, value in held.tensors.items()
            }
    return made


def _known(model: torch.nn.Module) -> tuple[set[int], set[int | None]]:
    """What tells the tensors that a model has from those that it makes for its state dict: themselves, and their
    storages."""
    have = [*model.parameters(), *model.buffers()]
    return {id(value) for value in have}, {place for value in have if (place := storage(value)) is not None}


def _unfit(tensors: Mapping[str, torch.Tensor], known: tuple[set[int], set[int | None]] | None) -> dict[str, Problem]:
    """The tensors that nothing can be copied into, and why."""
    import torch

    made = {}
    for key, value in tensors.items():
        if known is not None and id(value) not in known[0] and storage(value) not in known[1]:
            text = "is made by its module's code for the state dict alone; load it with model.load_state_dict"
        elif value.layout is not torch.strided:
            text = "is sparse in the model; make it dense, or drop it"
        elif any(size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True)):
            text = "repeats its memory in the model (expand); give it memory of its own with .contiguous()"
        elif (why := unplaced(value)) is not None:
            text = why
        else:
            continue
        made[key] = Problem(f"{key!r} {text}", key=key, kind="model")
    return made


def _meta(model: torch.nn.Module) -> list[str]:
    """The names of all parameters and buffers without memory, also of those that no checkpoint brings."""
    return [
        f"{name}.{step}" if name else step
        for name, module in names.modules(model)
        for step, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and value.is_meta
    ]

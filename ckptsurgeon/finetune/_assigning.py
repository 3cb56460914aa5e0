"""Memory for tensors on the meta device: what a checkpoint brings is read straight into it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import Problem
from ckptsurgeon.finetune import _sharing
from ckptsurgeon.finetune._local import is_plain

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.finetune._survey import Survey

_ADVICE = (
    "give it memory and values before loading (module.to_empty(device='cpu') and module.reset_parameters()), "
    "or build the model outside of torch.device('meta')"
)


def unsettled(found: Survey, tensors: Mapping[str, torch.Tensor], loaded: Collection[str]) -> Iterator[Problem]:
    """What would be left without memory, or could not be given any, were `loaded` (in full) the keys that come."""
    reached = {_sharing.memory(tensors[key]) for key in loaded}
    crosswise = {view.key for pair in found.overlaps for view in pair}
    for key in found.on_meta:
        if not is_plain(tensors[key]):
            text = f"{key!r} is a {type(tensors[key]).__name__} on the meta device; use model.to_empty(device=…) first"
            yield Problem(text, key=key, kind="meta")
        elif key in crosswise:
            text = f"{key!r} is on the meta device and shares memory with others in part; use model.to_empty() first"
            yield Problem(text, key=key, kind="meta")
        elif _sharing.memory(tensors[key]) not in reached:
            text = f"{key!r} is on the meta device, and the checkpoint does not bring all of it; {_ADVICE}"
            yield Problem(text, key=key, kind="meta")
    for name in found.unreachable:
        text = f"{name!r} is on the meta device, and no checkpoint has it (it is not persistent); {_ADVICE}"
        yield Problem(text, key=name, kind="meta")


def made_real(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Give all of a model's tensors on the meta device memory, of their dtypes, shapes and strides, on the CPU.

    What shared memory shares it again; classes, attributes and `requires_grad` are kept.  Returns what was made by
    the `id` of what it stands for.
    """
    import torch

    memory: dict[Hashable, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    kept: list[torch.Tensor] = []  # as long as the old ones live, no `id` is given again
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for own in held:
            for name, value in own.items():
                if value is None or not value.is_meta:
                    continue
                if id(value) not in made:
                    place = _sharing.memory(value)
                    data = memory.setdefault(place, torch.empty_like(value, device="cpu", requires_grad=False))
                    new = torch.Tensor._make_subclass(type(value), data, value.requires_grad)
                    new.__dict__.update(value.__dict__)
                    made[id(value)] = new
                    kept.append(value)
                own[name] = made[id(value)]
    return made

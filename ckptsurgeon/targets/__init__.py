"""What a checkpoint must fit: a live module, a model named in words, or another checkpoint."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ckptsurgeon.checkpoint import Checkpoint, Target

if TYPE_CHECKING:
    import torch

__all__ = ["built", "is_spec", "of", "quiet", "real"]


def is_spec(name: str) -> bool:
    """Whether `name` is a model spec: it has a `:` behind a source, and no such path exists."""
    from ckptsurgeon.targets import spec

    return not os.path.exists(name) and spec.looks_like(name)


def of(thing: object, cache: bool = True) -> Target:
    """The target that `thing` is: a Target, a Checkpoint, an `nn.Module`, or a model spec, whose header may
    come from the cache.

    Paths of checkpoints are opened by the caller. Raises TargetError.
    """
    if isinstance(thing, Target):
        return thing
    if isinstance(thing, Checkpoint):
        from ckptsurgeon.targets import checkpoint

        return checkpoint.target(thing)
    if isinstance(thing, str):
        from ckptsurgeon.targets import spec

        return spec.target(thing, cache)
    from ckptsurgeon.targets import module

    return module.target(thing)


def built(name: str) -> torch.nn.Module:
    """The live module that a model spec names: on the meta device where its code can do that, without values.

    Raises TargetError when it cannot be found, imported or built.
    """
    from ckptsurgeon.targets import spec

    return spec.built(name)


def real(name: str, seed: int = 0) -> torch.nn.Module:
    """The live module that a model spec names, with values on the CPU that are drawn from `seed`.

    Code of one's own may give the same module every time.
    Raises TargetError when it cannot be found, imported or built.
    """
    from ckptsurgeon.targets import spec

    return spec.real(name, seed)


def quiet() -> AbstractContextManager[None]:
    """While the code of a model runs: what it prints goes to stderr, its warnings nowhere, and what it draws at random
    leaves the caller's random state as it was."""
    from ckptsurgeon.targets import spec

    return spec.quiet()

"""Operations on the first convolution: other input channels, and kernels that reach over time.

Sources: timm's `adapt_input_conv`; Carreira and Zisserman, "Quo Vadis, Action Recognition?" (inflation); Wang et al.,
"Temporal Segment Networks" (the mean over colours, for optical flow).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ckptsurgeon.ops._kernels import all_rows, widened
from ckptsurgeon.ops._patterns import matching
from ckptsurgeon.ops._registry import Args, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import floating
from ckptsurgeon.sources import Apply, Kernel
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

_PATTERN = Param("pattern", "pattern")
_FAMILY = "first layers"


@dataclass(frozen=True, slots=True)
class Channels(Kernel):
    """A kernel of shape (out, in, …) for `count` input channels, computed in float32 as timm does."""

    count: int
    how: Literal["tile", "mean"]

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        (kernel,), have = inputs, inputs[0].shape[1]
        wide = widened(kernel)
        if self.how == "mean":
            made = wide.mean(1, keepdim=True).expand(-1, self.count, *kernel.shape[2:])
        elif self.count == 1:
            made = wide.sum(1, keepdim=True)
        else:
            times = (1, -(-self.count // have), *[1] * (kernel.ndim - 2))
            made = wide.repeat(times)[:, : self.count] * (have / self.count)
        return made.to(kernel.dtype)

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        return all_rows(inputs, begin, end)


def _channels(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,), count = specs, args["count"]
    floating(spec, "channels")
    if count < 1:
        raise OperationError(f"a kernel has one channel or more, not {count}", "count")
    if len(spec.shape) < 3 or not spec.shape[1]:
        raise OperationError(
            f"{list(spec.shape)} is no kernel of a convolution, which is (out, in, width), (out, in, height, width) or "
            "(out, in, depth, height, width) with one channel or more"
        )
    return (TensorSpec(spec.dtype, (spec.shape[0], count, *spec.shape[2:])),)


def _channels_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    how = args.get("how", "tile")
    if how == "tile" and specs[0] == refs[0].spec:
        return refs
    return (TensorRef(specs[0], Apply(Channels(args["count"], how), refs), refs[0].stored),)


@dataclass(frozen=True, slots=True)
class Inflate(Kernel):
    """A kernel of shape (out, in, height, width) over `frames` frames: (out, in, frames, height, width)."""

    frames: int
    how: Literal["mean", "center"]

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        (kernel,) = inputs
        if self.how == "mean":
            made = (widened(kernel) / self.frames).to(kernel.dtype)
            return made.unsqueeze(2).expand(-1, -1, self.frames, -1, -1)
        out = kernel.new_zeros((*kernel.shape[:2], self.frames, *kernel.shape[2:]))
        out[:, :, self.frames // 2] = kernel
        return out

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        return all_rows(inputs, begin, end)


def _inflate(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (spec,), frames = specs, args["frames"]
    floating(spec, "inflate")
    if frames < 1:
        raise OperationError(f"a kernel reaches over one frame or more, not {frames}", "frames")
    if len(spec.shape) != 4:
        raise OperationError(f"{list(spec.shape)} is no kernel of two dimensions, which is (out, in, height, width)")
    return (TensorSpec(spec.dtype, (*spec.shape[:2], frames, *spec.shape[2:])),)


def _inflate_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    kernel = Inflate(args["frames"], args.get("how", "mean"))
    return (TensorRef(specs[0], Apply(kernel, refs), refs[0].stored),)


register(
    Operation(
        "channels",
        (_PATTERN, Param("count", "int")),
        "Change the input channels of a convolution: one is the sum of all, more are copies scaled as timm does.",
        r"channels ^conv1\.weight$ 4",
        "lossy",
        matching,
        _channels,
        _channels_ref,
        lambda args, specs: None,
        options=(
            Param(
                "how",
                "choice",
                required=False,
                choices=("tile", "mean"),
                help="tile: the sum for one channel, else copies in turn times OLD / NEW; mean: each the mean of all",
            ),
        ),
        family=_FAMILY,
    )
)
register(
    Operation(
        "inflate",
        (_PATTERN, Param("frames", "int")),
        "Make two-dimensional kernels three-dimensional, over a number of frames.",
        r"inflate ^patch_embed\.proj\.weight$ 2",
        "lossy",
        matching,
        _inflate,
        _inflate_ref,
        lambda args, specs: None,
        options=(
            Param(
                "how",
                "choice",
                required=False,
                choices=("mean", "center"),
                help="mean: the same kernel for each frame, divided by their number; center: zeros but in the middle",
            ),
        ),
        family=_FAMILY,
    )
)

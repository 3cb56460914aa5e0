"""One operation, `resize`: position embeddings, tables of relative positions and patch kernels for another size.

Sources: timm's `resample_abs_pos_embed`, `resize_rel_pos_bias_table_simple` and `resample_patch_embed`; Beyer et al.,
"FlexiViT" (the pseudo-inverse of the resizing).  All is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

from ckptsurgeon.ops._kernels import all_rows, product, widened
from ckptsurgeon.ops._patterns import matching
from ckptsurgeon.ops._registry import Args, Operation, OperationError, Param, register
from ckptsurgeon.ops._shapes import floating
from ckptsurgeon.sources import Apply, Kernel
from ckptsurgeon.tensor import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
"""Height and width."""

_MOST_PREFIX = 16
"""Tokens of no place that a hint may suggest: more are more likely another grid."""


@dataclass(frozen=True)
class _Plan:
    """How a tensor is resized: the kernel and the shape that it makes; none where it has the size already."""

    kernel: Kernel | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Sampling:
    """How `torch.nn.functional.interpolate` samples."""

    mode: str
    antialias: bool

    def __call__(self, images: torch.Tensor, size: Size) -> torch.Tensor:
        """Images of shape (n, channels, height, width) in another size."""
        from torch.nn.functional import interpolate

        if self.mode == "nearest":
            return interpolate(images, size, mode="nearest")
        return interpolate(images, size, mode=self.mode, align_corners=False, antialias=self.antialias)


@dataclass(frozen=True, slots=True)
class Tokens(Kernel):
    """A grid of vectors, of shape (…, before + height · width + after, dim); what is before and after stays."""

    old: Size
    new: Size
    before: int
    after: int
    sampling: _Sampling

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        (tensor,), dim = inputs, inputs[0].shape[-1]
        flat = tensor.reshape(-1, dim)
        end = len(flat) - self.after
        grid = widened(flat[self.before : end]).reshape(1, *self.old, dim).permute(0, 3, 1, 2)
        made = self.sampling(grid, self.new).permute(0, 2, 3, 1).reshape(-1, dim).to(tensor.dtype)
        made = torch.cat([flat[: self.before], made, flat[end:]])
        return made.reshape(*tensor.shape[:-2], -1, dim)


@dataclass(frozen=True, slots=True)
class Images(Kernel):
    """Images of shape (n, channels, height, width), or with the channels `last`."""

    new: Size
    last: bool
    sampling: _Sampling

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = inputs
        if self.last:
            return self.sampling(widened(tensor).permute(0, 3, 1, 2), self.new).permute(0, 2, 3, 1).to(tensor.dtype)
        return self.sampling(widened(tensor), self.new).to(tensor.dtype)


@dataclass(frozen=True, slots=True)
class Heads(Kernel):
    """Images of shape (heads, height, width)."""

    new: Size
    sampling: _Sampling

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.sampling(widened(inputs[0])[None], self.new)[0].to(inputs[0].dtype)


@dataclass(frozen=True, slots=True)
class Patches(Kernel):
    """Kernels of shape (out, in, height, width), so that patches of the new size give what resized ones gave.

    Computed in float64, so that slices of rows make no difference; the rank is judged as in float32, as timm does.
    """

    new: Size
    sampling: _Sampling

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        (kernel,) = inputs
        height, width = kernel.shape[2:]
        basis = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
        resizing = self.sampling(basis, self.new).reshape(height * width, -1).T
        back = torch.linalg.pinv(resizing, rtol=max(resizing.shape) * torch.finfo(torch.float32).eps)
        return product(kernel.reshape(-1, height * width), back).reshape(*kernel.shape[:2], *self.new).to(kernel.dtype)

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        return all_rows(inputs, begin, end)


def _size(args: Args, name: str) -> Size | None:
    """Height and width as they were given; one number is both."""
    found = args.get(name)
    if found is None:
        return None
    if len(found) == 1:
        found = (found[0], found[0])
    if len(found) != 2 or min(found) < 1:
        words = ",".join(map(str, found)) or "none"
        raise OperationError(f"a size is height and width, such as 16,24, or one number for both, not {words}", name)
    return found[0], found[1]


def _new(args: Args) -> Size:
    made = _size(args, "size")
    assert made is not None
    return made


def _sampling(args: Args, antialias: bool) -> _Sampling:
    """`antialias` is what it is when nothing is said."""
    mode, said = args.get("mode", "bicubic"), args.get("antialias")
    if mode == "nearest" and said == "yes":
        raise OperationError("nearest takes single values, which leaves nothing to antialias", "antialias")
    return _Sampling(mode, mode != "nearest" and (antialias if said is None else said == "yes"))


def _prefix(args: Args) -> int:
    prefix: int = args.get("prefix", 0)
    if prefix < 0:
        raise OperationError(f"there are none or more tokens without a place, not {prefix}", "prefix")
    return prefix


def _without(args: Args, what: str, *names: str) -> None:
    """OperationError for options that say nothing of such a tensor."""
    for name in names:
        if args.get(name):
            raise OperationError(f"{name} says nothing of {what}", name)


def _grid_of(args: Args, count: int, odd: bool, what: str) -> Size:
    """Height and width of `count` rows of which some lie on no grid; `odd` sides where they are of 2 n - 1."""
    prefix, given = _prefix(args), _size(args, "from")
    if given is not None:
        old = (2 * given[0] - 1, 2 * given[1] - 1) if odd else given
        if old[0] * old[1] + prefix != count:
            raise OperationError(f"{count} {what} are not {old[0]}×{old[1]} + {prefix}{_hint(count, odd)}", "from")
        return old
    side = isqrt(max(0, count - prefix))
    if side * side + prefix != count or not side or (odd and side % 2 == 0):
        raise OperationError(
            f"{count} {what}, {prefix} of them without a place, make no square{_hint(count, odd)}; of another grid "
            "from=H,W says the height and width"
        )
    return side, side


def _hint(count: int, odd: bool) -> str:
    """The prefix that would fit."""
    side = isqrt(count)
    side -= odd and side % 2 == 0
    rest = count - side * side
    return f" ({count} = {side}×{side} + {rest}: prefix={rest})" if 0 <= rest <= _MOST_PREFIX and side > 1 else ""


def _grid(args: Args, spec: TensorSpec) -> _Plan:
    """Position embeddings: one row for each place, or an image of them."""
    new, shape, sampling = _new(args), spec.shape, _sampling(args, antialias=True)
    if len(shape) == 4 and shape[0] == 1:
        return _image(args, shape, sampling)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise OperationError(
            f"{list(shape)} is no position embedding, which is (1, tokens, dim), (tokens, dim), (1, dim, height, "
            "width) or (1, height, width, dim)"
        )
    _without(args, f"{list(shape)}, whose last dimension holds the channels", "channels")
    prefix = _prefix(args)
    old = _grid_of(args, shape[-2], False, f"tokens of {list(shape)}")
    kernel = None if old == new else Tokens(old, new, prefix, 0, sampling)
    return _Plan(kernel, (*shape[:-2], prefix + new[0] * new[1], shape[-1]))


def _image(args: Args, shape: tuple[int, ...], sampling: _Sampling) -> _Plan:
    _without(args, f"{list(shape)}, where every vector has a place", "prefix")
    new, where = _new(args), args.get("channels")
    if where is None and shape[1] == shape[2] != shape[3]:
        raise OperationError(
            f"{list(shape)} looks like (1, height, width, dim): channels=last says so, channels=first that it is "
            "(1, dim, height, width)"
        )
    last = where == "last"
    old = (shape[1], shape[2]) if last else (shape[2], shape[3])
    given = _size(args, "from")
    if given not in (None, old):
        raise OperationError(f"{list(shape)} is of height and width {old[0]},{old[1]}", "from")
    made = (1, *new, shape[3]) if last else (1, shape[1], *new)
    return _Plan(None if old == new else Images(new, last, sampling), made)


def _table(args: Args, spec: TensorSpec) -> _Plan:
    """Tables of relative positions: a row for each distance in a window, or an image for each head."""
    shape, sampling = spec.shape, _sampling(args, antialias=False)
    _without(args, "a table of relative positions", "channels")
    height, width = _new(args)
    new = (2 * height - 1, 2 * width - 1)
    if len(shape) == 3:
        _without(args, f"{list(shape)}, which is (heads, 2·height-1, 2·width-1)", "prefix", "from")
        if shape[1] % 2 == 0 or shape[2] % 2 == 0:
            raise OperationError(f"{list(shape)} is no table of relative positions, which has odd sides 2·n-1")
        same = new == (shape[1], shape[2])
        return _Plan(None if same else Heads(new, sampling), (shape[0], *new))
    if len(shape) != 2:
        raise OperationError(
            f"{list(shape)} is no table of relative positions, which is ((2·height-1)·(2·width-1), heads) or "
            "(heads, 2·height-1, 2·width-1)"
        )
    prefix = _prefix(args)
    old = _grid_of(args, shape[0], True, f"rows of {list(shape)}")
    kernel = None if old == new else Tokens(old, new, 0, prefix, sampling)
    return _Plan(kernel, (new[0] * new[1] + prefix, shape[1]))


def _patch(args: Args, spec: TensorSpec) -> _Plan:
    """Kernels that embed patches."""
    new, shape, sampling = _new(args), spec.shape, _sampling(args, antialias=True)
    _without(args, "a kernel of patches", "prefix", "from", "channels")
    if len(shape) != 4:
        raise OperationError(f"{list(shape)} is no kernel of patches, which is (out, in, height, width)")
    return _Plan(None if shape[2:] == new else Patches(new, sampling), (*shape[:2], *new))


_KINDS: dict[str, Callable[[Args, TensorSpec], _Plan]] = {"grid": _grid, "table": _table, "patch": _patch}


def _planned(args: Args, spec: TensorSpec) -> _Plan:
    floating(spec, "resize")
    if not spec.numel:
        raise OperationError(f"{list(spec.shape)} holds no values that could be resized")
    return _KINDS[args.get("as", "grid")](args, spec)


def _resize(args: Args, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return (TensorSpec(specs[0].dtype, _planned(args, specs[0]).shape),)


def _resize_ref(
    args: Args, refs: tuple[TensorRef, ...], specs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorRef, ...]:
    kernel = _planned(args, refs[0].spec).kernel
    return refs if kernel is None else (TensorRef(specs[0], Apply(kernel, refs), refs[0].stored),)


def _lost(args: Args, specs: tuple[TensorSpec, ...]) -> Any:
    return None


register(
    Operation(
        "resize",
        (Param("pattern", "pattern"), Param("size", "sizes")),
        "Interpolate position embeddings, tables of relative positions or patch kernels to a height and width.",
        r"resize ^pos_embed$ 24,24 prefix=1",
        "lossy",
        matching,
        _resize,
        _resize_ref,
        _lost,
        options=(
            Param(
                "as",
                "choice",
                required=False,
                choices=tuple(_KINDS),
                help="grid: position embeddings; table: biases of relative positions, for windows of SIZE; patch: "
                "kernels of SIZE, by the pseudo-inverse",
            ),
            Param(
                "prefix",
                "int",
                required=False,
                help="rows that have no place and are kept: the first of a grid (class and register tokens), the last "
                "of a table; 0 if not given",
            ),
            Param("from", "sizes", required=False, help="the old height and width, where they are no square"),
            Param(
                "mode",
                "choice",
                required=False,
                choices=("bicubic", "bilinear", "nearest"),
                help="as torch interpolates, bicubic if not given",
            ),
            Param(
                "antialias",
                "choice",
                required=False,
                choices=("yes", "no"),
                help="as timm does if not given: yes, but no for tables",
            ),
            Param(
                "channels",
                "choice",
                required=False,
                choices=("first", "last"),
                help="where the vectors of an embedding of four dimensions lie; first if not given",
            ),
        ),
        family="positions",
    )
)

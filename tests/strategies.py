"""What Hypothesis draws: specs, tensors, keys, and arguments of operations."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SIZES = st.lists(st.integers(1, 4), max_size=4).map(tuple)
WORDS = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
SEGMENTS = WORDS | st.integers(0, 12).map(str)
KEYS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])


@st.composite
def tensors(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = SHAPES) -> torch.Tensor:
    """A tensor of any layout: contiguous, transposed, or a view of a larger storage."""
    shape, dtype = draw(shapes), draw(DTYPES)
    order = draw(st.permutations(range(len(shape))))
    stored = [shape[dim] for dim in order]
    pad = draw(st.integers(0, 2)) if stored else 0
    size = [stored[0] + pad, *stored[1:]] if stored else []
    numel = int(torch.Size(size).numel()) if size else 1
    base = (torch.arange(numel) % 251).reshape(size).to(dtype)
    part = base[pad:] if stored else base
    return part.permute([order.index(dim) for dim in range(len(shape))]) if shape else part


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A few named tensors, some of them tied."""
    keys = draw(st.lists(KEYS, min_size=1, max_size=6, unique=True))
    made = {key: draw(tensors()) for key in keys}
    if len(keys) > 1 and draw(st.booleans()):
        made[keys[1]] = made[keys[0]]
    return made

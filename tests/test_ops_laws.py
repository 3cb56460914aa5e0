"""Laws that every operation keeps, made from the registry, with torch as the truth."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
from helpers import assert_same_tensor, bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import SIZES, tensors

import ckptsurgeon as cs
from ckptsurgeon.dtypes import DTYPES
from ckptsurgeon.ops import OPERATIONS, Operation
from ckptsurgeon.ops._registry import register
from ckptsurgeon.rules import parse, render
from ckptsurgeon.sources import Inline
from ckptsurgeon.tensor import TensorRef, TensorSpec

Several = tuple[torch.Tensor, dict[str, Any], int, Callable[[torch.Tensor], Any]]
Drawn = tuple[torch.Tensor, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]


def _squeeze(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    ones = [dim for dim, size in enumerate(w.shape) if size == 1]
    if not ones:
        return w[None], {"dims": (0,)}, lambda t: t.squeeze(0)
    dims = tuple(draw(st.lists(st.sampled_from(ones), min_size=1, unique=True)))
    return w, {"dims": dims}, lambda t: t.squeeze(dims)


def _unsqueeze(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    dim = draw(st.integers(-w.ndim - 1, w.ndim))
    return w, {"dims": (dim,)}, lambda t: t.unsqueeze(dim)


def _reshape(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    shape = (-1,) if draw(st.booleans()) else tuple(draw(st.permutations(list(w.shape))))
    return w, {"shape": shape or (1,)}, lambda t: t.reshape(shape or (1,))


def _permute(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    dims = tuple(draw(st.permutations(range(w.ndim))))
    signed = tuple(dim - w.ndim * draw(st.integers(0, 1)) for dim in dims)
    return (w, {"dims": signed}, lambda t: t.permute(signed)) if w.ndim else (w[None], {"dims": (0,)}, lambda t: t)


def _transpose(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    w = w if w.ndim else w[None]
    pair = (draw(st.integers(-w.ndim, w.ndim - 1)), draw(st.integers(-w.ndim, w.ndim - 1)))
    return w, {"dims": pair}, lambda t: t.transpose(*pair)


def _rearrange(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    """The axes in another order, the first one cut in two and the last two joined."""
    w = w.reshape(1, *w.shape) if w.ndim < 2 else w
    names = [f"a{i}" for i in range(w.ndim)]
    factor = draw(st.sampled_from([n for n in range(1, w.shape[0] + 1) if w.shape[0] % n == 0]))
    order = draw(st.permutations(["x", "y", *names[1:]]))
    pattern = f"(x y) {' '.join(names[1:])} -> {' '.join(order[:-2])} ({' '.join(order[-2:])})"
    args = {"rearrangement": pattern, "axes": {"x": factor}}
    return w, args, lambda t: einops.rearrange(t, pattern, x=factor)


def _rotary(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    heads, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = 2 * pairs + draw(st.integers(0, 2))
    w = (torch.arange(heads * size * 5) % 251).reshape(heads * size, 5).to(w.dtype)

    def half(t: torch.Tensor) -> torch.Tensor:
        by_head = t.reshape(heads, size, 5).clone()
        turned = by_head[:, : 2 * pairs].clone().reshape(heads, pairs, 2, 5).transpose(1, 2)
        by_head[:, : 2 * pairs] = turned.reshape(heads, 2 * pairs, 5)
        return by_head.reshape(heads * size, 5)

    return w, {"to": "half", "heads": heads, "size": 2 * pairs}, half


def _pad(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    w = w if w.ndim else w[None]
    pads = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(w.ndim))
    value = 1 if w.dtype == torch.bool else draw(st.integers(0, 3))
    flat = [count for pair in reversed(pads) for count in pair]
    return w, {"spec": pads, "value": value}, lambda t: torch.nn.functional.pad(t, flat, value=value)


def _take_all(draw: st.DrawFn, w: torch.Tensor) -> Drawn:
    w = w if w.ndim else w[None]
    dim = draw(st.integers(-w.ndim, w.ndim - 1))
    order = draw(st.permutations(range(w.shape[dim])))
    indices = tuple(order) + tuple(order[: draw(st.integers(0, 2))])
    return w, {"indices": indices, "dim": dim}, lambda t: t.index_select(dim, torch.tensor(indices))


TRUTH = {
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "reshape": _reshape,
    "permute": _permute,
    "transpose": _transpose,
    "rearrange": _rearrange,
    "rotary": _rotary,
    "pad": _pad,
    "take": _take_all,
}
"""Operations of one tensor that lose nothing: arguments, and what torch makes of it."""


def _split(draw: st.DrawFn, w: torch.Tensor) -> Several:
    w = w if w.ndim else w[None]
    dim = draw(st.integers(-w.ndim, w.ndim - 1))
    cuts = sorted(draw(st.lists(st.integers(0, w.shape[dim]), min_size=1, max_size=3)))
    sizes = tuple(b - a for a, b in itertools.pairwise([0, *cuts, w.shape[dim]]))
    return w, {"dim": dim, "sizes": sizes}, len(sizes), lambda t: t.split(sizes, dim)


def _unstack(draw: st.DrawFn, w: torch.Tensor) -> Several:
    w = w if w.ndim else w[None]
    dim = draw(st.integers(-w.ndim, w.ndim - 1))
    return w, {"dim": dim}, w.shape[dim], lambda t: t.unbind(dim)


def _qkv(draw: st.DrawFn, w: torch.Tensor) -> Several:
    kv, each, size = (draw(st.integers(1, 3)) for _ in range(3))
    layout, dim = draw(st.sampled_from(["blocks", "groups"])), draw(st.integers(0, 1))
    heads, rows = kv * each, (kv * each + 2 * kv) * size
    w = (torch.arange(rows * 3) % 251).reshape(rows, 3).to(w.dtype)

    def parts(t: torch.Tensor) -> list[torch.Tensor]:
        t = t.transpose(0, dim)
        if layout == "blocks":
            found = list(t.split([heads * size, kv * size, kv * size]))
        else:
            by_group = t.reshape(kv, each + 2, size, 3)
            pieces = by_group[:, :each], by_group[:, each : each + 1], by_group[:, each + 1 :]
            found = [piece.reshape(-1, 3) for piece in pieces]
        return [part.transpose(0, dim) for part in found]

    args = {"heads": heads, "kv": kv, "layout": layout, "dim": dim}
    return w.transpose(0, dim), args, 3, parts


PARTS = {"split": _split, "unstack": _unstack, "split_qkv": _qkv}
"""Operations that make several tensors of one; their inverses are the operations that put them together."""
JOINED = {"concat": "split", "stack": "unstack", "join_qkv": "split_qkv"}


def test_every_exact_operation_has_a_law_here() -> None:
    exact = {op.name for op in OPERATIONS.values() if op.exactness == "exact"}
    assert {*TRUTH, *PARTS, *JOINED} - {"take"} == exact
    assert {name: back for back, name in ((op, _inverse_of(op)) for op in PARTS)} == JOINED


def _inverse_of(name: str) -> str:
    args = {"heads": 1, "dim": 0}
    inverse = OPERATIONS[name].inverse(args, (TensorSpec(DTYPES["float32"], (3, 2)),))
    assert inverse is not None
    return inverse[0]


@st.composite
def cases(draw: st.DrawFn, name: str) -> Drawn:
    return TRUTH[name](draw, draw(tensors(SIZES)))


@st.composite
def several(draw: st.DrawFn, name: str) -> Several:
    return PARTS[name](draw, draw(tensors(SIZES)))


def _run(name: str, args: dict[str, Any], refs: tuple[TensorRef, ...]) -> tuple[TensorRef, ...]:
    op = OPERATIONS[name]
    specs = op.shape(args, tuple(ref.spec for ref in refs))
    made = op.build(args, refs, specs, tuple(f"w{i}" for i in range(len(specs))))
    assert tuple(ref.spec for ref in made) == specs, "the predicted shape is the produced one"
    for ref in made:
        assert b"".join(map(bytes, ref.blocks(48))) == b"".join(map(bytes, ref.blocks())), "in pieces as in one"
    return made


def _applied(name: str, args: dict[str, Any], ref: TensorRef) -> TensorRef:
    (made,) = _run(name, args, (ref,))
    return made


def _in_memory(w: torch.Tensor) -> TensorRef:
    """A tensor without an extent, so that kernels must do what is arithmetic on bytes in a file."""
    spec = TensorSpec(DTYPES[str(w.dtype).removeprefix("torch.")], tuple(w.shape))
    return TensorRef(spec, Inline(bits(w).numpy().tobytes()))


@pytest.mark.parametrize("name", TRUTH)
@given(data=st.data())
def test_an_operation_gives_what_torch_gives_and_its_inverse_takes_it_back(name: str, data: st.DataObject) -> None:
    """From bytes in a file, by arithmetic, and from memory, by kernels."""
    w, args, truth = data.draw(cases(name))
    torch.save({"w": w}, "law.pth")
    ref = cs.open("law.pth")["w"]
    made = _applied(name, args, ref)
    assert_same_tensor(made.read(), truth(w).contiguous())
    assert_same_tensor(_applied(name, args, _in_memory(w)).read(), truth(w).contiguous())
    inverse = OPERATIONS[name].inverse(args, (ref.spec,))
    assert inverse is not None
    assert_same_tensor(_applied(*inverse, made).read(), w.contiguous())


@pytest.mark.parametrize("name", PARTS)
@given(data=st.data())
def test_an_operation_makes_the_parts_that_torch_makes_and_its_inverse_joins_them(
    name: str, data: st.DataObject
) -> None:
    w, args, count, truth = data.draw(several(name))
    args["templates"] = ("",) * count
    torch.save({"w": w}, "law.pth")
    want = [part.contiguous() for part in truth(w)]
    for ref in (cs.open("law.pth")["w"], _in_memory(w)):
        made = _run(name, args, (ref,))
        for got, part in zip(made, want, strict=True):
            assert_same_tensor(got.read(), part)
        inverse = OPERATIONS[name].inverse(args, (ref.spec,))
        assert inverse is not None
        (joined,) = _run(inverse[0], inverse[1], made)
        assert_same_tensor(joined.read(), w.contiguous())
        again = OPERATIONS[inverse[0]].inverse(inverse[1], tuple(part.spec for part in made))
        assert again is not None
        back = _run(again[0], {"templates": args["templates"], **again[1]}, (joined,))
        for got, part in zip(back, want, strict=True):
            assert_same_tensor(got.read(), part)


@given(tensors(SIZES.filter(bool)), st.data())
def test_slice_and_take_are_what_indexing_is(w: torch.Tensor, data: st.DataObject) -> None:
    spec = tuple(
        slice(data.draw(st.integers(-n, n)), data.draw(st.integers(-n, n)), data.draw(st.integers(1, 3)))
        for n in w.shape[: data.draw(st.integers(1, w.ndim))]
    )
    dim = data.draw(st.integers(0, w.ndim - 1))
    indices = tuple(data.draw(st.lists(st.integers(-w.shape[dim], w.shape[dim] - 1), min_size=1, max_size=6)))
    torch.save({"w": w}, "law.pth")
    for ref in (cs.open("law.pth")["w"], _in_memory(w)):
        assert_same_tensor(_applied("slice", {"spec": spec}, ref).read(), w[spec].contiguous())
        taken = w.index_select(dim, torch.tensor(indices) % w.shape[dim])
        assert_same_tensor(_applied("take", {"indices": indices, "dim": dim}, ref).read(), taken.contiguous())


ARITHMETIC = {
    "add": ({"number": 1}, lambda t: t + 1),
    "scale": ({"number": 0.5}, lambda t: t * 0.5),
    "clamp": ({"min": 2, "max": 100}, lambda t: t.clamp(2, 100)),
}


@pytest.mark.parametrize("name", ARITHMETIC)
@given(w=tensors(SIZES), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_arithmetic_is_what_torch_does(name: str, w: torch.Tensor, dtype: torch.dtype) -> None:
    args, truth = ARITHMETIC[name]
    made = _applied(name, args, _in_memory(w.to(dtype)))
    assert_same_tensor(made.read(), truth(w.to(dtype)).contiguous())
    inverse = OPERATIONS[name].inverse(args, (made.spec,))
    if name == "clamp":
        assert inverse is None
    else:
        assert inverse is not None
        torch.testing.assert_close(_applied(*inverse, made).read(), w.to(dtype).contiguous())


def test_whole_numbers_stay_whole() -> None:
    torch.save({"n": torch.arange(4), "h": torch.ones(2).to(torch.float8_e4m3fn)}, "a.pth")
    made = cs.plan("a.pth", ["add n 3", "clamp n min=4", "scale h 2"]).check().result
    assert made["n"].read().tolist() == [4, 4, 5, 6]
    assert made["h"].read().float().tolist() == [2, 2]
    (problem,) = cs.plan("a.pth", ["add n 0.5"]).problems
    assert "0.5 is no whole number, and int64 holds no others" in problem.text


@pytest.mark.parametrize(
    ("init", "low", "high"),
    [("zeros", 0, 0), ("ones", 1, 1), ("0.25", 0.25, 0.25), ("uniform:2,3", 2, 3), ("trunc_normal:0.02", -0.04, 0.04)],
)
def test_fill_makes_values_within_their_bounds(init: str, low: float, high: float) -> None:
    torch.save({"w": torch.ones(1)}, "a.pth")
    made = cs.plan("a.pth", [f"fill x 40,30 {init} dtype=bf16"]).check().result["x"].read()
    assert (made.dtype, made.shape) == (torch.bfloat16, (40, 30))
    assert low - 1e-3 <= made.min() <= made.max() <= high + 1e-2


def test_what_fill_makes_follows_from_the_seed_and_the_name_alone() -> None:
    torch.save({"w": torch.ones(1)}, "a.pth")
    first = cs.plan("a.pth", ["fill x 4,4 normal", "fill y 4,4 normal"], seed=3).check().result
    other = cs.plan("a.pth", ["fill y 4,4 normal", "fill x 4,4 normal seed=3"], seed=3).check().result
    assert_same_tensor(first["x"].read(), other["x"].read())
    assert not torch.equal(first["x"].read(), first["y"].read())
    assert not torch.equal(first["x"].read(), cs.plan("a.pth", ["fill x 4,4 normal"]).result["x"].read())
    assert first.tied() == ()


def test_the_schemes_of_fill_have_the_deviations_of_torch() -> None:
    torch.save({"w": torch.ones(1)}, "a.pth")
    shape = (256, 128, 3, 3)
    want = {
        "kaiming_normal": (2 / (128 * 9)) ** 0.5,
        "kaiming_fan_out": (2 / (256 * 9)) ** 0.5,
        "kaiming_uniform": (1 / (3 * 128 * 9)) ** 0.5,
        "xavier_normal": (2 / (384 * 9)) ** 0.5,
        "xavier_uniform": (2 / (384 * 9)) ** 0.5,
        "normal:0.3": 0.3,
    }
    rules = [f"fill x{i} {','.join(map(str, shape))} {init}" for i, init in enumerate(want)]
    made = cs.plan("a.pth", [*rules, "fill o 8,8 orthogonal", "fill v 2,2 values:1,2,3,4"]).check().result
    for i, std in enumerate(want.values()):
        assert abs(float(made[f"x{i}"].read().std()) / std - 1) < 0.02
    square = made["o"].read()
    torch.testing.assert_close(square @ square.T, torch.eye(8))
    assert made["v"].read().tolist() == [[1, 2], [3, 4]]


@given(tensors(SIZES), st.sampled_from(["bf16", "f16", "f64"]))
def test_operations_work_on_what_is_computed_too(w: torch.Tensor, dtype: str) -> None:
    """The kernel path gives the same as the free path: after a cast there is no extent."""
    torch.save({"w": w}, "law.pth")
    order = ",".join(str(dim) for dim in reversed(range(w.ndim)))
    rules = [f"cast w {dtype}", *([f"permute w {order}"] if w.ndim else []), "reshape w -1"]
    name = {"bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}[dtype]
    want = (w.to(name) if w.is_floating_point() else w).permute(tuple(reversed(range(w.ndim)))).reshape(-1)
    assert_same_tensor(cs.plan("law.pth", rules).check().result["w"].read(), want)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_example_of_an_operation_is_a_rule_of_it(name: str) -> None:
    rule = parse(OPERATIONS[name].example)
    assert rule.operation.name == name
    assert parse(render(name, rule.args)).args == rule.args


@pytest.mark.parametrize(
    ("change", "cause"),
    [({}, "twice"), ({"name": "x", "help": "no sentence"}, "lacks"), ({"name": "x", "example": " "}, "lacks")],
)
def test_an_incomplete_or_doubled_entry_is_refused(change: dict[str, str], cause: str) -> None:
    fields = {name: getattr(OPERATIONS["drop"], name) for name in Operation.__dataclass_fields__}
    with pytest.raises(ValueError, match=cause):
        register(Operation(**{**fields, **change}))
    assert "x" not in OPERATIONS


@given(tensors(), st.sampled_from(["float16", "bfloat16", "float64", "float32", "float8_e4m3fn"]))
def test_cast_is_what_torch_does_and_leaves_integers(w: torch.Tensor, dtype: str) -> None:
    torch.save({"w": w}, "law.pth")
    made = cs.plan("law.pth", [f"cast . {dtype}"]).check().result["w"]
    want = w.to(getattr(torch, dtype)) if w.is_floating_point() else w
    assert_same_tensor(made.read(), want.contiguous())


def test_a_block_is_as_good_as_the_whole() -> None:
    """A cast in small blocks gives the bytes of a cast in one."""
    w = torch.randn(1000, 7)
    torch.save({"w": w.t()}, "a.pth")
    ref = cs.plan("a.pth", ["cast w f16"]).result["w"]
    whole = b"".join(bytes(block) for block in ref.blocks())
    small = [bytes(block) for block in ref.blocks(160)]
    assert len(small) > 5
    assert b"".join(small) == whole == w.t().half().contiguous().view(torch.uint8).numpy().tobytes()


SHAPE_ERRORS = {
    "squeeze w 0": r"dimension 0 of \[2, 3\] has size 2, not 1",
    "squeeze w": r"no dimension of \[2, 3\] has size 1",
    "squeeze w 5": r"dimension 5 is not one of the 2 of \[2, 3\]",
    "unsqueeze w 9": r"dimensions \[9\] cannot be added to \[2, 3\]",
    "unsqueeze w 0,0": r"dimensions \[0, 0\] cannot be added",
    "reshape w 4,2": r"\[2, 3\] has 6 elements, \[4, 2\] takes 8",
    "reshape w 4,-1": r"\[2, 3\] has 6 elements, which \[4, -1\] cannot take",
    "permute w 0": r"\[2, 3\] has 2 dimensions, the order \[0\] has 1",
    "permute w 0,0": r"name one of \[2, 3\] twice",
    "transpose v": r"\[2, 3, 4\] has 3 dimensions; transpose alone wants 2",
    "rearrange w '(h d) c -> h d c' h=3": r"einops on \[2, 3\]: Shape mismatch, can't divide axis of length 2",
    "rearrange w 'a b c -> c b a'": r"einops on \[2, 3\]: Wrong shape: expected 3 dims. Received 2-dim tensor",
    "split w => a b sizes=1,2": r"the sizes 1\+2 add up to 3, and dimension 0 of \[2, 3\] is 2",
    "split w => a b dim=1": r"dimension 1 of \[2, 3\] is no multiple of 2; give the sizes, as sizes=1,2",
    "split w => a b sizes=1,1,0": "3 sizes for 2 names",
    "split w => a b dim=2": r"dimension 2 is not one of the 2 of \[2, 3\]",
    "slice w 0:3": r"3 is outside of dimension 0 of \[2, 3\], which is 2",
    "slice w :,:,:": r"3 ranges for the 2 dimensions of \[2, 3\]",
    "take w 0,2": r"2 is outside of dimension 0 of \[2, 3\], which is 2",
    "pad w 1,1,1": r"3 pads for the 2 dimensions of \[2, 3\]",
    "split_qkv w => q k v heads=3": r"2 rows of \[2, 3\] are not 9 heads of equal size \(3 of queries",
    "split_qkv w => q k v heads=3 kv=2": "heads=3 is no multiple of kv=2",
    "split_qkv w => q k v": "heads=N must say how many heads",
    "split_qkv w => q k heads=1": "three names are made",
    "rotary w half heads=2": r"heads of 1 rows, of which 1 are turned, are no pairs",
    "rotary w half heads=7": r"2 rows of \[2, 3\] are not 7 heads of equal size",
    "clamp w": "min=X, max=X or both must say the bounds",
}


@pytest.mark.parametrize("rule", SHAPE_ERRORS)
def test_a_shape_that_cannot_be_taken_names_rule_key_and_shapes(rule: str) -> None:
    torch.save({"w": torch.ones(2, 3), "v": torch.ones(2, 3, 4)}, "a.pth")
    (problem,) = cs.plan("a.pth", [rule]).problems
    assert re.search(SHAPE_ERRORS[rule], str(problem))
    assert problem.key == rule.split()[1]
    assert rule in str(problem)


def test_einops_knows_our_shapes_whatever_was_collected() -> None:
    """It finds them among the classes that live."""
    import gc

    from ckptsurgeon.ops import _rearrange

    assert _rearrange.steps("a b -> b a", {}, (2, 3)) == (("permute", (1, 0)),)
    gc.collect()
    import einops._backends

    einops._backends._loaded_backends.clear()
    einops._backends._type2backend.clear()
    assert _rearrange.steps("a b -> b a", {}, (2, 3)) == (("permute", (1, 0)),)

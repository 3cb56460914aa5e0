"""Laws that every operation keeps, made from the registry, with torch as the truth."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import SIZES, tensors

import ckptsurgeon as cs
from ckptsurgeon.ops import OPERATIONS, Operation
from ckptsurgeon.ops._registry import register
from ckptsurgeon.rules import parse, render
from ckptsurgeon.tensor import TensorRef

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


TRUTH = {
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "reshape": _reshape,
    "permute": _permute,
    "transpose": _transpose,
}


def test_every_exact_operation_has_a_law_here() -> None:
    assert set(TRUTH) == {op.name for op in OPERATIONS.values() if op.exactness == "exact"}


@st.composite
def cases(draw: st.DrawFn, name: str) -> Drawn:
    return TRUTH[name](draw, draw(tensors(SIZES)))


def _applied(name: str, args: dict[str, Any], ref: TensorRef) -> TensorRef:
    op = OPERATIONS[name]
    specs = op.shape(args, (ref.spec,))
    (made,) = op.build(args, (ref,), specs, ("w",))
    assert made.spec == specs[0], "the predicted shape is the produced one"
    return made


@pytest.mark.parametrize("name", TRUTH)
@given(data=st.data())
def test_an_operation_gives_what_torch_gives_and_its_inverse_takes_it_back(name: str, data: st.DataObject) -> None:
    w, args, truth = data.draw(cases(name))
    torch.save({"w": w}, "law.pth")
    ref = cs.open("law.pth")["w"]
    made = _applied(name, args, ref)
    assert_same_tensor(made.read(), truth(w).contiguous())
    inverse = OPERATIONS[name].inverse(args, (ref.spec,))
    assert inverse is not None
    assert_same_tensor(_applied(*inverse, made).read(), w.contiguous())


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
}


@pytest.mark.parametrize("rule", SHAPE_ERRORS)
def test_a_shape_that_cannot_be_taken_names_rule_key_and_shapes(rule: str) -> None:
    torch.save({"w": torch.ones(2, 3), "v": torch.ones(2, 3, 4)}, "a.pth")
    (problem,) = cs.plan("a.pth", [rule]).problems
    assert re.search(SHAPE_ERRORS[rule], str(problem))
    assert problem.key == rule.split()[1]
    assert f"`{rule}`" in str(problem)

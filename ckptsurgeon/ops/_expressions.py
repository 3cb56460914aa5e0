r"""Whole numbers of names and shapes: `{\1+1}` in a template, `where=\1%2==0` in a rule.

    expression = condition { "," condition }                     all of them, where there are several
    condition  = any of  NUMBER  GROUP  NAME  ( )  + - * // %  == != < <= > >=
    GROUP = \1, \g<name>: what a group of the pattern found, which must be a number
    NAME  = rank, numel, d0 … d9 (sizes of the tensor, from the first dimension), or what the operation counts

Parsed by Python's own parser; only these nodes are let through, and nothing of it is run as code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from ckptsurgeon.ops._registry import OperationError

_GROUP = re.compile(r"\\(?:(\d{1,2})|g<(\w+)>)")
_LONGEST, _LARGEST = 200, 1 << 62
_BINARY: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Eq: lambda a, b: int(a == b),
    ast.NotEq: lambda a, b: int(a != b),
    ast.Lt: lambda a, b: int(a < b),
    ast.LtE: lambda a, b: int(a <= b),
    ast.Gt: lambda a, b: int(a > b),
    ast.GtE: lambda a, b: int(a >= b),
}


@dataclass(frozen=True)
class Expression:
    """A parsed expression; `text` is how it is written."""

    text: str
    conditions: tuple[ast.expr, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    def value(self, found: re.Match[str] | None, names: Mapping[str, int]) -> int:
        """The number that it comes to for a key; OperationError where there is none."""
        if len(self.conditions) == 1:
            return _value(self.conditions[0], found, names, self.text)
        # one that is not so ends it: `rank==4,d3==1` asks no vector for its fourth size
        return int(all(_value(condition, found, names, self.text) for condition in self.conditions))


_NUMBERS = re.compile(r"(?<!\w)\d\w*")


@lru_cache(maxsize=1024)
def arithmetic(text: str) -> Expression:
    """An expression that is a number and no condition, though it may hold one, which counts as 0 or 1; ValueError for
    others."""
    made = expression(text)
    if len(made.conditions) > 1 or isinstance(made.conditions[0], ast.Compare):
        raise ValueError(f"{text!r} is a condition, and a name is made of a number")
    return made


@lru_cache(maxsize=1024)
def expression(text: str) -> Expression:
    """The expression that `text` says; ValueError with the reason when it says none.

    >>> expression("2*(3+1)%5 == 3").value(None, {})
    1
    """
    if len(text) > _LONGEST:
        raise ValueError(f"an expression has at most {_LONGEST} characters")
    odd = next((word for word in _NUMBERS.findall(text) if not (word.isascii() and word.isdecimal())), None)
    if odd is not None:
        raise ValueError(f"{odd!r} in {text!r} is no whole number")
    plain = _GROUP.sub(lambda group: f"(_{group[1] or group[2]})", text)
    # `_1` is no number and `_name` no name of ours, so that groups cannot be taken for anything else
    try:
        tree = ast.parse(plain.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no arithmetic on whole numbers") from None
    conditions = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    for condition in conditions:
        for node in ast.walk(condition):
            _check(node, text)
    return Expression(text, tuple(conditions))


def _check(node: ast.AST, text: str) -> None:
    if isinstance(node, ast.Constant):
        fine = type(node.value) is int and node.value < _LARGEST
    elif isinstance(node, ast.BinOp):
        fine = type(node.op) in _BINARY
    elif isinstance(node, ast.Compare):
        fine = len(node.ops) == 1 and type(node.ops[0]) in _BINARY
    elif isinstance(node, ast.UnaryOp):
        fine = isinstance(node.op, ast.USub)
    else:
        fine = isinstance(node, ast.Name | ast.Load | ast.operator | ast.cmpop | ast.USub)
    if not fine:
        raise ValueError(f"{text!r} is no arithmetic on whole numbers: + - * // % and comparisons")


def _value(node: ast.AST, found: re.Match[str] | None, names: Mapping[str, int], text: str) -> int:
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return node.value
    if isinstance(node, ast.Name):
        return _named(node.id, found, names, text)
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, found, names, text)
    kind: type[ast.AST]
    if isinstance(node, ast.BinOp):
        left, right, kind = node.left, node.right, type(node.op)
    else:
        assert isinstance(node, ast.Compare)
        left, right, kind = node.left, node.comparators[0], type(node.ops[0])
    try:
        made = _BINARY[kind](_value(left, found, names, text), _value(right, found, names, text))
    except ZeroDivisionError:
        raise OperationError(f"{text!r} divides by zero") from None
    if abs(made) > _LARGEST:
        raise OperationError(f"{text!r} comes to more than 2**62")
    return made


def _named(name: str, found: re.Match[str] | None, names: Mapping[str, int], text: str) -> int:
    if name.startswith("_") and found is not None:
        group = name[1:]
        try:
            word = found[int(group) if group.isdecimal() else group]
        except IndexError:
            raise OperationError(f"{text!r}: the pattern has no group {group}") from None
        if word is None or not re.fullmatch(r"\d{1,18}", word, re.ASCII):
            raise OperationError(f"{text!r}: group {group} is {word!r}, which is no number")
        return int(word)
    if name not in names:
        known = ", ".join(names) or "none"
        raise OperationError(f"{text!r}: {name!r} is not known here; the names are {known}, and groups (\\1)")
    return names[name]


def of_shape(shape: tuple[int, ...], numel: int) -> dict[str, int]:
    """What an expression may say of a tensor."""
    return {"rank": len(shape), "numel": numel, **{f"d{i}": size for i, size in enumerate(shape)}}

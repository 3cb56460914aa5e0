"""What the words of a rule stand for: from text to a value, and back."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

from ckptsurgeon.dtypes import parse_dtype
from ckptsurgeon.ops import Initial, Numbered, Param, expression
from ckptsurgeon.rules.tokens import Word, quoted

_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)
_RANGE = re.compile(r"(-?\d{1,18})?:(-?\d{1,18})?(?::(\d{1,18}))?", re.ASCII)
_PADS = re.compile(r"(\d{1,18}):(\d{1,18})|(\d{1,18})?", re.ASCII)


class BadWord(Exception):
    """What is wrong with a word, and the span of it, from the word's beginning; None for all of it."""

    def __init__(self, text: str, span: tuple[int, int] | None = None) -> None:
        self.text, self.span = text, span


def value_of(param: Param, word: Word) -> Any:
    """What a word stands for as this parameter; BadWord when it says nothing."""
    if param.kind == "choice" and word.text not in param.choices:
        raise BadWord(f"{param.name} is one of {', '.join(param.choices)}")
    read = _READ.get(param.kind)
    try:
        return word.text if read is None else read(word.text, param)
    except BadWord as bad:
        if bad.span is None:
            raise
        shift = int(word.quoted)
        raise BadWord(bad.text, (bad.span[0] + shift, min(bad.span[1] + shift, word.end - word.start))) from None


def written(value: Any) -> str:
    """A value as a word of a rule."""
    if isinstance(value, re.Pattern | Numbered):
        return quoted(value.pattern)
    if isinstance(value, tuple):
        return quoted(",".join(map(_item, value)))
    return quoted(_item(value))


def _item(value: Any) -> str:
    if isinstance(value, slice):
        step = "" if value.step in (None, 1) else f":{value.step}"
        begin, end = ("" if bound is None else str(bound) for bound in (value.start, value.stop))
        return f"{begin}:{end}{step}"
    if isinstance(value, tuple):
        return f"{value[0]}:{value[1]}"
    return repr(value) if isinstance(value, float) else str(value)


def _pattern(text: str, param: Param) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may mean something else in a later Python
            return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        at = getattr(error, "pos", None)
        span = None if at is None else (at, at + 1)
        raise BadWord(f"not a regular expression: {getattr(error, 'msg', error)}", span) from None


def _numbered(text: str, param: Param) -> Numbered:
    if "{i}" not in text:
        raise BadWord("{i} must stand in it for the number, as in experts\\.{i}\\.weight")
    made = Numbered(text)
    _pattern(made.text.replace("{i}", "0"), param)
    try:
        _ = made.regex
    except (re.error, OverflowError, RecursionError) as error:
        raise BadWord(f"not a regular expression: {getattr(error, 'msg', error)}") from None
    return made


def _integers(text: str, param: Param) -> tuple[int, ...]:
    if param.kind == "sizes" and not text:
        return ()
    if not all(_INTEGER.fullmatch(part) for part in text.split(",")):
        raise BadWord(f"{param.name.upper()} is numbers with commas between them, such as 3,2,0,1")
    numbers = tuple(int(number) for number in text.split(","))
    if param.kind == "pair" and len(numbers) != 2:
        raise BadWord("two dimensions are swapped, such as 0,1")
    if param.kind == "shape" and (min(numbers) < -1 or numbers.count(-1) > 1):
        raise BadWord("a shape holds sizes, one of which may be -1")
    if param.kind == "sizes" and min(numbers) < 0:
        raise BadWord(f"{param.name.upper()} is sizes with commas between them, none of them negative")
    return numbers


def _ranges(text: str, param: Param) -> tuple[slice, ...]:
    made = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        if found is None or found[3] == "0":
            raise BadWord("SPEC is one range for each dimension, such as 0:10 or :,0:3 or ::2")
        begin, end, step = (None if bound is None else int(bound) for bound in found.groups())
        made.append(slice(begin, end, step))
    return tuple(made)


def _indices(text: str, param: Param) -> tuple[int | slice, ...]:
    made: list[int | slice] = []
    for part in text.split(","):
        if _INTEGER.fullmatch(part):
            made.append(int(part))
            continue
        try:
            made += _ranges(part, param)
        except BadWord:
            raise BadWord(f"{param.name.upper()} is numbers and ranges, such as 0,5,7 or 1:91,0") from None
    return tuple(made)


def _pads(text: str, param: Param) -> tuple[tuple[int, int], ...]:
    made = []
    for part in text.split(","):
        found = _PADS.fullmatch(part)
        if found is None:
            raise BadWord("SPEC is how much to add to each dimension, at its end or BEFORE:AFTER, such as 8 or 0,1:1")
        before, after, alone = found.groups()
        made.append((int(before or 0), int(after or alone or 0)))
    return tuple(made)


def _integer(text: str, param: Param) -> int:
    if not _INTEGER.fullmatch(text):
        raise BadWord(f"{param.name} is a whole number, not {text!r}")
    return int(text)


def _number(text: str, param: Param) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        made = float(text) if text.strip() == text and "_" not in text else math.nan
    except ValueError:
        made = math.nan
    if not math.isfinite(made):
        raise BadWord(f"{param.name} is a number, not {text!r}")
    return made


def _numbers(text: str, param: Param) -> tuple[int | float, ...]:
    return tuple(_number(part, param) for part in text.split(","))


def _of(read: Callable[[str], Any]) -> Callable[[str, Param], Any]:
    """A reader that says what is wrong with a ValueError."""

    def value(text: str, param: Param) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise BadWord(str(error)) from None

    return value


def _einops(text: str, param: Param) -> str:
    if text.count("->") != 1:
        raise BadWord("an einops pattern has two sides, such as '(h d) c -> h d c'")
    return text


def _named(text: str, param: Param) -> str:
    if not text:
        raise BadWord(f"an empty {param.name}")
    return text


_READ: dict[str, Callable[[str, Param], Any]] = {
    "pattern": _pattern,
    "numbered": _numbered,
    "prefix": _named,
    "key": _named,
    "dims": _integers,
    "pair": _integers,
    "shape": _integers,
    "sizes": _integers,
    "spec": _ranges,
    "indices": _indices,
    "pads": _pads,
    "dtype": _of(parse_dtype),
    "int": _integer,
    "number": _number,
    "numbers": _numbers,
    "einops": _einops,
    "init": _of(Initial.of),
    "expression": _of(expression),
}

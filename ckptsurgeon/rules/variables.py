r"""Variables of recipes: `{heads}` in a rule, and where their values come from.

    brace = "{" NAME "}" | "{" arithmetic on names "}"

A name that is declared stands for its value, in patterns and templates alike; arithmetic is whole numbers
(`{hidden//heads}`).  In arithmetic with groups (`{\1+offset}`) names become numbers, and the rest is left to the
template.  Quantifiers of patterns (`{2,3}`) and the number of `stack` (`{i}`) are left alone, and `{{` is no brace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ckptsurgeon.errors import InputError, UsageError
from ckptsurgeon.ops import OperationError, expression
from ckptsurgeon.rules import document

Value = str | int | float
Values = Mapping[str, Value]
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
RESERVED = "i"
_BRACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_WORD = re.compile(r"\\g<\w+>|[A-Za-z_]\w*", re.ASCII)
_LARGEST_CONFIG, _LARGEST_LIST = 16 << 20, 4 << 20


class Unset(Exception):
    """A variable of a rule that has no value; the name is its argument."""


def substituted(text: str, values: Values, lenient: bool = False) -> str:
    """A rule with its variables replaced; Unset for one without a value, unless it is `lenient` (then the
    brace stays), ValueError for arithmetic that cannot be done.

    >>> substituted(r"split ^(\\w{3})$ => \\1.a {n}.b sizes={2*n},{n}", {"n": 8})
    'split ^(\\\\w{3})$ => \\\\1.a 8.b sizes=16,8'
    """

    def replaced(brace: re.Match[str]) -> str:
        inner = brace[1]
        if inner is None or inner == RESERVED or not _WORD.search(inner):
            return brace[0]
        if inner in values:
            return str(values[inner])
        if lenient and any(name not in values for name in NAME.findall(inner)):
            return brace[0]
        return _worked_out(inner, values)

    return _BRACE.sub(replaced, text)


def _worked_out(inner: str, values: Values) -> str:
    def named(word: re.Match[str]) -> str:
        if word[0].startswith("\\") or word[0] == RESERVED:
            return word[0]
        if word[0] not in values:
            raise Unset(word[0])
        return str(values[word[0]])

    plain = _WORD.sub(named, inner)
    if "\\" in inner or re.search(rf"\b{RESERVED}\b", inner):
        return f"{{{plain}}}"
    try:
        return str(expression(plain).value(None, {}))
    except OperationError as error:
        raise ValueError(str(error)) from None


def used(text: str) -> set[str]:
    """The names in the braces of a rule."""
    return {name for brace in _BRACE.finditer(text) for name in NAME.findall(brace[1] or "")}


def assignments(words: list[str] | tuple[str, ...]) -> dict[str, Value]:
    """The values of `--set NAME=VALUE`; `NAME=@FILE` takes the words of a file, with commas between them.

    Raises UsageError for what is no assignment, InputError for a file that cannot be read.
    """
    made: dict[str, Value] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not NAME.fullmatch(name) or name == RESERVED:
            raise UsageError(f"--set {word}: write NAME=VALUE, where NAME is a word (and not {RESERVED})")
        if name in made:
            raise UsageError(f"--set {name} stands twice")
        made[name] = _listed(text[1:]) if text.startswith("@") else value_of(text)
    return made


def value_of(text: str) -> Value:
    """A whole number where the text is one, else the text."""
    return int(text) if re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else text


def _listed(path: str) -> str:
    return ",".join(document.text_of(path, path, _LARGEST_LIST, "a list").replace(",", " ").split())


def config(path: str) -> Callable[[str], Value | None]:
    """What a `config.json` says of a dotted name; None where it says nothing. InputError where it is none."""
    try:
        found = json.loads(document.text_of(path, path, _LARGEST_CONFIG, "a config"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {str(error)[:200]}", path=path) from None
    if not isinstance(found, dict):
        raise InputError("a config is a JSON object", path=path)

    def value(name: str) -> Value | None:
        inner: Any = found
        for part in name.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, bool):
            return "yes" if inner else "no"
        if inner and not isinstance(inner, str | int | float):
            raise InputError(f"{name!r} is no single value, and so cannot be a variable's", path=path)
        return inner if isinstance(inner, str | int | float) else None

    return value

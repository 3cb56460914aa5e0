r"""The rule language: one operation a line.

    rule    = operation | rename
    operation = NAME { word } [ "=>" { word } ] { option }     NAME: the bare name of an operation
    rename  = PATTERN "=>" [ TEMPLATE ] { option }
    option  = NAME "=" VALUE                                   bare, after the required words

A line whose first, bare word is the name of an operation is that operation; any other line is a
rename.  Nothing after `=>` is the empty template.  PATTERN is a Python regular expression, tried
with `re.search` on the whole key; TEMPLATE is a replacement of `re.sub` (`\1`, `\g<name>`).
DIMS and SHAPE are one comma-separated word (`3,2,0,1`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from ckptsurgeon.dtypes import parse_dtype
from ckptsurgeon.errors import Problem, RuleError
from ckptsurgeon.ops import OPERATIONS, Operation, Param
from ckptsurgeon.rules.tokens import Word, quoted, words


@dataclass(frozen=True)
class Rule:
    """One operation with its arguments; `text` is the line it came from, `spans` where each
    argument stands in it, `note` what the recipe's author says of it."""

    operation: Operation
    args: Mapping[str, Any]
    text: str
    spans: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}), compare=False)
    note: str = ""

    def __str__(self) -> str:
        return self.text


class _Bad(Exception):
    def __init__(self, text: str, span: tuple[int, int]) -> None:
        self.text, self.span = text, span


def parse(line: str, note: str = "") -> Rule:
    """The rule that a line says; RuleError (with the span) when it says none.

    >>> parse(r"strip module.").operation.name
    'strip'
    """
    if not isinstance(line, str):
        raise RuleError([Problem(f"a rule is a line of text, not {type(line).__name__}: {line!r}", kind="syntax")])
    if "\n" in line.strip():
        raise RuleError([Problem("a rule is one line", line.strip().replace("\n", " "), kind="syntax")])
    line = line.strip()
    found = words(line)
    try:
        return _rule(line, found, note)
    except _Bad as bad:
        raise RuleError([Problem(bad.text, line, bad.span, kind="syntax")]) from None


def parse_all(lines: Iterable[str | Rule]) -> tuple[Rule, ...]:
    """Every rule, in order; RuleError with the problems of all lines at once."""
    if isinstance(lines, str):
        lines = [lines]
    rules: list[Rule] = []
    problems: list[Problem] = []
    for line in lines:
        try:
            rules.append(line if isinstance(line, Rule) else parse(line))
        except RuleError as error:
            problems += error.problems
    if problems:
        raise RuleError(problems)
    return tuple(rules)


def _rule(line: str, found: list[Word], note: str) -> Rule:
    whole = (0, max(1, len(line)))
    if not found:
        raise _Bad("an empty rule", whole)
    first = found[0]
    if not first.quoted and first.text in OPERATIONS and first.text != "rename":
        operation, rest, begin = OPERATIONS[first.text], found[1:], first.end
    else:
        operation, rest, begin = OPERATIONS["rename"], found, 0
    end = (max(begin, len(line) - 1), max(1, len(line)))
    arrow = next((i for i, word in enumerate(rest) if word.is_arrow), None)
    wants_arrow = any(param.arrow for param in operation.params)
    if arrow is None and wants_arrow:
        raise _Bad(_no_arrow(operation, first), whole if operation.name == "rename" else end)
    if arrow is not None and not wants_arrow:
        raise _Bad(f"`{operation.name}` takes no `=>`; it is written `{operation.usage()}`", rest[arrow].span)
    if operation.name == "rename" and arrow == 0:
        raise _Bad("the pattern before `=>` is missing", rest[0].span)
    if operation.name == "rename" and arrow is not None and arrow != 1:
        span = (rest[0].start, rest[arrow - 1].end)
        raise _Bad("a rename has one pattern before `=>`; quote a pattern that holds blanks", span)
    args: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    before = rest if arrow is None else rest[:arrow]
    left = _take(operation, [p for p in operation.params if not p.arrow], before, args, spans, end)
    if arrow is not None:
        if left:
            raise _Bad(f"one word too many; `{operation.name}` is written `{operation.usage()}`", left[0].span)
        behind = rest[arrow + 1 :]
        if not behind:
            args["template"], spans["template"] = "", rest[arrow].span
        else:
            left = _take(operation, [p for p in operation.params if p.arrow], behind, args, spans, end)
    _options(operation, left, args, spans)
    _check(args, spans)
    return Rule(operation, MappingProxyType(args), line, MappingProxyType(spans), note)


def _no_arrow(operation: Operation, first: Word) -> str:
    if operation.name != "rename":
        return f"`{operation.name}` needs `=>`; it is written `{operation.usage()}`"
    near = get_close_matches(first.text, OPERATIONS, 1)
    hint = f"did you mean `{near[0]}`?" if near else "a rename is written `PATTERN => TEMPLATE`"
    return f"this is no operation and has no `=>`; {hint}"


def _take(
    operation: Operation,
    params: list[Param],
    found: list[Word],
    args: dict[str, Any],
    spans: dict[str, tuple[int, int]],
    end: tuple[int, int],
) -> list[Word]:
    """Words to parameters, in order; what is left are options."""
    left = list(found)
    for param in params:
        if not left or (not param.required and _is_option(operation, left[0])):
            if param.required:
                raise _Bad(f"{param.name.upper()} is missing; `{operation.name}` is written `{operation.usage()}`", end)
            continue
        word = left.pop(0)
        args[param.name], spans[param.name] = _value(param, word), word.span
    return left


def _is_option(operation: Operation, word: Word) -> bool:
    name, equals, _ = word.text.partition("=")
    return bool(equals) and not word.quoted and any(option.name == name for option in operation.options)


def _options(operation: Operation, left: list[Word], args: dict[str, Any], spans: dict[str, tuple[int, int]]) -> None:
    for word in left:
        if not _is_option(operation, word):
            raise _Bad(f"one word too many; `{operation.name}` is written `{operation.usage()}`", word.span)
        name, _, value = word.text.partition("=")
        if name in args:
            raise _Bad(f"the option {name} stands twice", word.span)
        param = next(option for option in operation.options if option.name == name)
        args[name] = _value(param, Word(value, word.start + len(name) + 1, word.end))
        spans[name] = word.span


def _value(param: Param, word: Word) -> Any:
    text = word.text
    if param.kind == "pattern":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what may mean something else in a later Python
                return re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            at = getattr(error, "pos", None)
            start = word.start + int(word.quoted) + (at or 0)
            span = word.span if at is None else (start, min(start + 1, word.end))
            raise _Bad(f"not a regular expression: {getattr(error, 'msg', error)}", span) from None
    if param.kind in ("dims", "pair", "shape"):
        return _numbers(param, word)
    if param.kind == "dtype":
        try:
            return parse_dtype(text)
        except ValueError as error:
            raise _Bad(str(error), word.span) from None
    if param.kind == "choice" and text not in param.choices:
        raise _Bad(f"{param.name} is one of {', '.join(param.choices)}", word.span)
    if param.kind == "prefix" and not text:
        raise _Bad("an empty prefix", word.span)
    return text


def _numbers(param: Param, word: Word) -> tuple[int, ...]:
    if not re.fullmatch(r"-?\d{1,18}(,-?\d{1,18})*", word.text, re.ASCII):
        raise _Bad(f"{param.name.upper()} is numbers with commas between them, such as 3,2,0,1", word.span)
    numbers = tuple(int(number) for number in word.text.split(","))
    if param.kind == "pair" and len(numbers) != 2:
        raise _Bad("two dimensions are swapped, such as 0,1", word.span)
    if param.kind == "shape" and (min(numbers) < -1 or numbers.count(-1) > 1):
        raise _Bad("a shape holds sizes, one of which may be -1", word.span)
    return numbers


def _check(args: Mapping[str, Any], spans: Mapping[str, tuple[int, int]]) -> None:
    """A template must be one that `re` can read; groups it lacks are found when it is used."""
    template = args.get("template")
    if template is None:
        return
    try:
        args["pattern"].sub(template, "")
    except IndexError:
        return
    except re.error as error:
        if "group reference" not in error.msg:
            raise _Bad(f"not a replacement: {error.msg}", spans["template"]) from None


def render(operation: str, args: Mapping[str, Any]) -> str:
    """The line of a rule, from its operation and arguments: `parse(render(…))` gives them back."""
    entry = OPERATIONS[operation]
    line = [] if operation == "rename" else [operation]
    for arrow in (False, True):
        params = [param for param in entry.params if param.arrow is arrow]
        if arrow and params:
            line.append("=>")
        line += [_word(args[param.name]) for param in params if args.get(param.name) is not None]
        if line[:1] and operation == "rename" and not arrow and line[0] in OPERATIONS:
            line[0] = f"'{line[0]}'"
    line += [f"{option.name}={args[option.name]}" for option in entry.options if args.get(option.name) is not None]
    return " ".join(line)


def _word(value: Any) -> str:
    if isinstance(value, re.Pattern):
        return quoted(value.pattern)
    if isinstance(value, tuple):
        return ",".join(str(number) for number in value)
    return quoted(str(value))

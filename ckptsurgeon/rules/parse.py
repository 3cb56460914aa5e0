r"""The rule language: one operation a line.

    rule    = operation | rename
    operation = NAME { word } [ "=>" { word } ] { option }     NAME: the bare name of an operation
    rename  = PATTERN "=>" [ TEMPLATE ] { option }
    option  = NAME "=" VALUE                                   bare, after the required words

A line whose first, bare word is the name of an operation is that operation; any other line is a
rename.  Nothing after `=>` is the empty template.  PATTERN is a Python regular expression, tried
with `re.search` on the whole key; TEMPLATE is a replacement of `re.sub` (`\1`, `\g<name>`), in which
braces hold arithmetic on groups (`{\1+1}`).  DIMS, SHAPE, SIZES and SPEC are one comma-separated word
(`3,2,0,1`).  Of a parameter that may be many, every word up to the options is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from ckptsurgeon.errors import Problem, RuleError
from ckptsurgeon.ops import OPERATIONS, Numbered, Operation, Param, template_parts
from ckptsurgeon.rules.tokens import Word, words
from ckptsurgeon.rules.values import BadWord, value_of, written

_AXIS = re.compile(r"[A-Za-z]\w*", re.ASCII)


@dataclass(frozen=True)
class Rule:
    """One operation with its arguments; `text` is the line it came from, `spans` where each
    argument stands in it, `note` what the recipe's author says of it, `place` the file and line of
    the recipe that it stands in."""

    operation: Operation
    args: Mapping[str, Any]
    text: str
    spans: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}), compare=False)
    note: str = ""
    place: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.text


class _Bad(Exception):
    def __init__(self, text: str, span: tuple[int, int]) -> None:
        self.text, self.span = text, span


def parse(line: str, note: str = "", place: str = "") -> Rule:
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
        return _rule(line, found, note, place)
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


def _rule(line: str, found: list[Word], note: str, place: str) -> Rule:
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
        behind, params = rest[arrow + 1 :], [p for p in operation.params if p.arrow]
        if not behind and not params[0].many:
            args["template"], spans["template"] = "", rest[arrow].span
        else:
            left = _take(operation, params, behind, args, spans, end)
    _options(operation, left, args, spans)
    _check(args, spans)
    return Rule(operation, MappingProxyType(args), line, MappingProxyType(spans), note, place)


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
                raise _Bad(f"{_missing(param)} is missing; `{operation.name}` is written `{operation.usage()}`", end)
            continue
        word = left.pop(0)
        made, span = _value(param, word), word.span
        if param.many:
            made = [made]
            while left and not _is_option(operation, left[0]):
                word = left.pop(0)
                made.append(_value(param, word))
                span = (span[0], word.end)
            made = tuple(made)
        args[param.name], spans[param.name] = made, span
    return left


def _missing(param: Param) -> str:
    return param.name.upper().removesuffix("S") if param.many else param.name.upper()


def _option(operation: Operation, word: Word) -> Param | None:
    name, equals, _ = word.text.partition("=")
    if not equals or word.quoted:
        return None
    found = next((option for option in operation.options if option.name == name), None)
    if found is None and operation.axes and _AXIS.fullmatch(name):
        return Param(name, "int", required=False)
    return found


def _is_option(operation: Operation, word: Word) -> bool:
    return _option(operation, word) is not None


def _options(operation: Operation, left: list[Word], args: dict[str, Any], spans: dict[str, tuple[int, int]]) -> None:
    known = {option.name for option in operation.options}
    axes: dict[str, int] = {}
    for word in left:
        param = _option(operation, word)
        if param is None:
            raise _Bad(f"one word too many; `{operation.name}` is written `{operation.usage()}`", word.span)
        value = _value(param, Word(word.text.partition("=")[2], word.start + len(param.name) + 1, word.end))
        into = args if param.name in known else axes
        if param.name in into:
            raise _Bad(f"the option {param.name} stands twice", word.span)
        into[param.name] = value
        spans[param.name] = word.span
    if operation.axes:
        args["axes"] = MappingProxyType(axes)


def _value(param: Param, word: Word) -> Any:
    try:
        return value_of(param, word)
    except BadWord as bad:
        span = word.span if bad.span is None else (word.start + bad.span[0], word.start + bad.span[1])
        raise _Bad(bad.text, span) from None


def _check(args: Mapping[str, Any], spans: Mapping[str, tuple[int, int]]) -> None:
    """A template must be one that `re` can read; groups it lacks are found when it is used."""
    for name in ("template", "templates"):
        templates = args.get(name, ())
        for template in (templates,) if isinstance(templates, str) else templates:
            try:
                parts = template_parts(template)
            except ValueError as error:
                raise _Bad(str(error), spans[name]) from None
            for pattern in _patterns(args):
                for part in parts:
                    if isinstance(part, str):
                        _check_replacement(pattern, part, spans[name])


def _patterns(args: Mapping[str, Any]) -> list[re.Pattern[str]]:
    found = [args["pattern"]] if "pattern" in args else list(args.get("patterns", ()))
    return [pattern.of("0") if isinstance(pattern, Numbered) else pattern for pattern in found]


def _check_replacement(pattern: re.Pattern[str], part: str, span: tuple[int, int]) -> None:
    try:
        pattern.sub(part, "")
    except IndexError:
        return
    except re.error as error:
        if "group reference" not in error.msg:
            raise _Bad(f"not a replacement: {error.msg}", span) from None


def render(operation: str, args: Mapping[str, Any]) -> str:
    """The line of a rule, from its operation and arguments: `parse(render(…))` gives them back."""
    entry = OPERATIONS[operation]
    line = [] if operation == "rename" else [operation]
    for arrow in (False, True):
        params = [param for param in entry.params if param.arrow is arrow]
        if arrow and params:
            line.append("=>")
        for param in params:
            value = args.get(param.name)
            line += [] if value is None else map(written, value) if param.many else [written(value)]
        if line[:1] and operation == "rename" and not arrow and line[0] in OPERATIONS:
            line[0] = f"'{line[0]}'"
    line += [f"{name}={number}" for name, number in args.get("axes", {}).items()]
    for option in entry.options:
        if args.get(option.name) is not None:
            line.append(f"{option.name}={written(args[option.name])}")
    return " ".join(line)

"""Patterns and templates: how operations over keys find their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import islice

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.ops._expressions import Expression, arithmetic, of_shape
from ckptsurgeon.ops._registry import Args, Match, Matcher, Names, OperationError

NUMBER = "{i}"
_LOOKED_AT = 300
_DIGITS, _AGAIN = r"(?P<i>\d+)", "(?P=i)"
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ESCAPE = re.compile(r"\\(?:g<(\w+)>|(\d{1,2})(?!\d)|.?)", re.DOTALL)
_NO_NAMES: Mapping[str, int] = {}


@dataclass(frozen=True)
class Numbered:
    """A pattern in which `{i}` stands for a number."""

    text: str

    @cached_property
    def regex(self) -> re.Pattern[str]:
        first, *rest = self.text.split(NUMBER)
        return re.compile(first + "".join((_AGAIN if n else _DIGITS) + part for n, part in enumerate(rest)))

    @property
    def pattern(self) -> str:
        """The text, as a compiled pattern has it."""
        return self.text

    def of(self, number: str) -> re.Pattern[str]:
        """The pattern for one number: its groups are those that its author counts."""
        return _compiled(self.text.replace(NUMBER, number))


@lru_cache(maxsize=4096)
def _compiled(text: str) -> re.Pattern[str]:
    return re.compile(text)


def found(args: Args, names: Names) -> Iterator[tuple[str, re.Match[str]]]:
    """Every key that `pattern` matches and of which `where` is so."""
    pattern: re.Pattern[str] = args["pattern"]
    where: Expression | None = args.get("where")
    for key in names:
        hit = pattern.search(key)
        if hit is None:
            continue
        if where is None:
            yield key, hit
            continue
        ref = names[key]
        try:
            holds = where.value(hit, of_shape(ref.shape, ref.numel))
        except OperationError as error:
            raise OperationError(f"{key!r}: {error}", "where") from None
        if holds:
            yield key, hit


def matching(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    """Every key that the pattern matches, under its own name."""
    return (Match((key,), (key,)) for key, _ in found(args, names))


@lru_cache(maxsize=4096)
def template_parts(template: str) -> tuple[str | Expression, ...]:
    r"""A template as literal parts and the expressions between them; ValueError for braces that say nothing.

    >>> [str(part) for part in template_parts("blocks.{d0+1}.x")]
    ['blocks.', 'd0+1', '.x']
    """
    parts: list[str | Expression] = []
    text, at = "", 0
    for brace in _BRACES.finditer(template):
        text += template[at : brace.start()]
        at = brace.end()
        if brace[0] in ("{{", "}}"):
            text += brace[0][0]
        elif brace[1] is None:
            raise ValueError(f"a lone {brace[0]} in {template!r}; a literal one is written {2 * brace[0]}")
        else:
            parts += [text, arithmetic(brace[1])]
            text = ""
    return (*parts, text + template[at:])


def expanded(
    pattern: re.Pattern[str], template: str, key: str, count: int, names: Mapping[str, int] = _NO_NAMES
) -> str:
    """`re.sub` on one key; `count` 0 replaces every match. OperationError for an unknown group."""
    try:
        made = _replacement(pattern, template)
        replace = made if made is not None else partial(_joined, template_parts(template), names)
        return pattern.sub(replace, key, count=count)
    except (re.error, IndexError, ValueError) as error:
        raise OperationError(f"the template {template!r} does not fit the pattern: {error}", "template") from None


def renamed(hit: re.Match[str], template: str) -> str:
    """The key of a match with every match in it replaced."""
    key, pattern = hit.string, hit.re
    made = _replacement(pattern, template)
    if made is None or not pattern.pattern.startswith("^") or "|" in pattern.pattern:
        return expanded(pattern, template, key, 0)
    return key[: hit.start()] + made(hit) + key[hit.end() :]  # there is no other match behind a beginning


@lru_cache(maxsize=4096)
def _replacement(pattern: re.Pattern[str], template: str) -> Callable[[re.Match[str]], str] | None:
    """What a template of text and groups makes of a match; None for one that holds arithmetic, or other escapes.

    It is five times as fast as `re` itself, and names are many.
    """
    if "{" in template or "}" in template:
        return None
    parts: list[str | int] = []
    at = 0
    for found in _ESCAPE.finditer(template):
        group = found[1] or found[2]
        if group is None or group.startswith("0"):
            return None
        number = int(group) if group.isdecimal() else pattern.groupindex.get(group, -1)
        if not 0 < number <= pattern.groups:
            return None
        parts += [template[at : found.start()], number]
        at = found.end()
    parts.append(template[at:])
    if len(parts) == 1:
        return lambda hit: template
    return lambda hit: "".join([part if isinstance(part, str) else hit[part] or "" for part in parts])


def _joined(parts: tuple[str | Expression, ...], names: Mapping[str, int], hit: re.Match[str]) -> str:
    return "".join([_part(part, hit, names) for part in parts])


def _part(part: str | Expression, hit: re.Match[str], names: Mapping[str, int]) -> str:
    if isinstance(part, str):
        return hit.expand(part) if "\\" in part else part
    value = part.value(hit, names)
    if value < 0:
        raise OperationError(f"{part} makes {value} of {hit.string!r}", "template")
    return str(value)


def literal(change: Callable[[str, str], str | None]) -> Matcher:
    """A matcher for a literal prefix; `change` gives the new key, or None to leave it."""

    def match(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
        keys = names if args.get("pattern") is None else (key for key, _ in found(args, names))
        for key in keys:
            new = change(key, args["prefix"])
            if new is not None:
                yield Match((key,), (new,))

    return match


def scattered(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    """One key into several: a name for each of `templates`."""
    pattern: re.Pattern[str] = args["pattern"]
    for key, _ in found(args, names):
        yield Match((key,), tuple(expanded(pattern, template, key, 1) for template in args["templates"]))


def gathered(args: Args, names: Names, target: Target | None) -> Iterator[Match]:
    """Several keys into one: grouped by the name that each of `patterns` makes of its key."""
    patterns: tuple[re.Pattern[str], ...] = args["patterns"]
    silent = [pattern for pattern in patterns if not any(map(pattern.search, names))]
    if silent and len(silent) < len(patterns):
        hint = nearest(silent[0].pattern, names)
        raise OperationError(f"`{silent[0].pattern}` matches no key, though others do; {hint}", "patterns")
    groups: dict[str, list[list[str]]] = {}
    for key in names:
        for place, pattern in enumerate(patterns):
            if pattern.search(key):
                name = expanded(pattern, args["template"], key, 1)
                groups.setdefault(name, [[] for _ in patterns])[place].append(key)
    for name, members in groups.items():
        there = tuple(key for keys in members for key in keys)
        lacking = [pattern.pattern for pattern, keys in zip(patterns, members, strict=True) if not keys]
        doubled = next((keys for keys in members if len(keys) > 1), None)
        if lacking:
            which = " and ".join(f"`{pattern}`" for pattern in lacking)
            yield Match(there, (), problem=f"{_named(there)} would be part of {name!r}, to which {which} gives nothing")
        elif doubled:
            yield Match(there, (), problem=f"{_named(doubled)} would all be one part of {name!r}")
        elif len(set(there)) < len(there):
            twice = next(key for key in there if there.count(key) > 1)
            yield Match(there, (), problem=f"{twice!r} would be two parts of {name!r}")
        else:
            yield Match(there, (name,))


def nearest(pattern: str, names: Iterable[str], noun: str = "keys", of: str = "the checkpoint") -> str:
    """Which keys (or what else the `noun` says, `of` what) a pattern, or a prefix, may have meant, in words."""
    from difflib import get_close_matches

    keys = list(islice(names, _LOOKED_AT))
    near = get_close_matches(pattern.replace("\\", "").strip("^$"), keys, 3, 0.4) or keys[:3]
    return f"the nearest {noun} are {', '.join(map(repr, near))}" if near else f"{of} has no {noun}"


def _named(keys: list[str] | tuple[str, ...]) -> str:
    shown = " and ".join(repr(key) for key in keys[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown

"""Patterns and templates: how operations over keys find their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.ops._registry import Args, Match, Matcher, OperationError


def matching(args: Args, keys: Sequence[str], target: Target | None) -> Iterator[Match]:
    """Every key that the pattern matches, under its own name."""
    pattern: re.Pattern[str] = args["pattern"]
    return (Match((key,), (key,)) for key in keys if pattern.search(key))


def expanded(pattern: re.Pattern[str], template: str, key: str, count: int) -> str:
    """`re.sub` on one key; `count` 0 replaces every match. OperationError for an unknown group."""
    try:
        return pattern.sub(template, key, count=count)
    except (re.error, IndexError) as error:
        raise OperationError(f"the template {template!r} does not fit the pattern: {error}") from None


def literal(change: Callable[[str, str], str | None]) -> Matcher:
    """A matcher for a literal prefix; `change` gives the new key, or None to leave it."""

    def match(args: Args, keys: Sequence[str], target: Target | None) -> Iterator[Match]:
        only: re.Pattern[str] | None = args.get("pattern")
        for key in keys:
            new = change(key, args["prefix"]) if only is None or only.search(key) else None
            if new is not None:
                yield Match((key,), (new,))

    return match

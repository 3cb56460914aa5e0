"""Every error that ckptsurgeon raises on purpose, by who has to act.

    CkptError
    ├── InputError          a file: it is damaged, of another kind, or not what was asked for
    │   ├── AmbiguousError  it holds several state dicts and none is clearly the main one
    │   └── LimitError      it asks for more than the limits allow
    ├── RuleError           a rule or recipe: its text cannot be read
    ├── UsageError          a call: options that contradict each other, an unknown name
    ├── TargetError         a model: it cannot be found, imported or built
    ├── PlanError           a surgery: what the rules make is not what was asked for
    └── OutputError         the machine: no permission, no room, the output exists

Anything else that comes out of the package is a bug.  `RuleError` and `PlanError` carry all
of their problems at once (`.problems`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath

_LONGEST_KEY, _LONGEST_CAUSE = 200, 1500
"""Characters of a key, and of what is wrong, that an error prints: both may come from a file."""
MOST_SHOWN = 10
"""How many problems an error prints before it only counts the rest."""


def shown(text: str) -> str:
    """A key or name with control, bidirectional and other unprintable characters escaped.

    >>> shown("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(text: str, most: int = _LONGEST_KEY) -> str:
    """`text`, or its beginning and its end with what is left out counted between them.

    >>> brief("a" * 1000, 20)
    'aaaaaaaaaa… 980 characters …aaaaaaaaaa'
    """
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}… {len(text) - 2 * half} characters …{text[-half:]}"


def quoted(value: object, most: int = _LONGEST_KEY) -> str:
    """Something of a file for an error: text and bytes in quotes, numbers as they are, all of it brief;
    of other things, which may be without end, the kind."""
    if isinstance(value, str | bytes):
        return brief(repr(value[: 4 * most] if len(value) > 8 * most else value), most)
    if isinstance(value, int) and value.bit_length() > most:
        return f"a number of {value.bit_length()} bits"
    return repr(value) if value is None or isinstance(value, int | float | complex) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with where: a rule and the span of its text, a key, or both."""

    text: str
    rule: str | None = None
    span: tuple[int, int] | None = None
    key: str | None = None
    kind: str = "other"

    def __str__(self) -> str:
        if self.rule is None:
            return self.text
        if self.span is None or len(self.rule) > _LONGEST_CAUSE:
            return f"rule `{brief(self.rule, _LONGEST_CAUSE)}`: {brief(self.text, _LONGEST_CAUSE)}"
        start, end = self.span
        mark = " " * start + "^" * max(1, end - start)
        return f"{self.text}\n    {self.rule}\n    {mark}"


class CkptError(Exception):
    """The root of all errors of this package."""


class InputError(CkptError):
    """A file that cannot be used as it is.

    `path` is the file, `cause` what is wrong with it, `key` the tensor it was about (or None),
    `hint` what to do.
    """

    def __init__(
        self,
        cause: str,
        *,
        path: str | PathLike[str] | None = None,
        key: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.cause, self.key, self.hint = cause, key, hint
        self.path = None if path is None else fspath(path)
        super().__init__(cause)

    def __str__(self) -> str:
        text = brief(self.cause, _LONGEST_CAUSE)
        if self.key is not None:
            text = f"{quoted(self.key)}: {text}"
        if self.path is not None:
            text = f"{self.path}: {text}"
        return shown(text if self.hint is None else f"{text}; {self.hint}")


class AmbiguousError(InputError):
    """A file with several state dicts, none of them clearly the main one (`.paths` names them)."""

    def __init__(self, paths: Sequence[str], *, path: str | PathLike[str]) -> None:
        self.paths = tuple(paths)
        named = ", ".join(map(brief, self.paths[:MOST_SHOWN]))
        more = len(self.paths) - MOST_SHOWN
        first = next((path for path in self.paths if path != "."), self.paths[0])
        super().__init__(
            f"{len(self.paths)} state dicts could be meant: {named}" + (f" and {more} more" if more > 0 else ""),
            path=path,
            hint=f"choose one with --select {brief(first)}, or --select . for all of them",
        )


class LimitError(InputError):
    """A file that asks for more than `Limits` allows: `limit` is the name of the bound, `most` what it was."""

    def __init__(
        self,
        cause: str,
        limit: str,
        most: int,
        *,
        path: str | PathLike[str] | None = None,
        key: str | None = None,
    ) -> None:
        self.limit, self.most = limit, most
        raised = f"where the file is what you expect, `--reader-limit {limit.replace('_', '-')}=N` raises it"
        super().__init__(f"{cause}, over the limit of {most}", path=path, key=key, hint=raised)


class UsageError(CkptError):
    """A call whose arguments contradict each other or name something that is not there."""


class TargetError(CkptError):
    """A model that cannot be found, imported or built."""


class OutputError(CkptError):
    """An output that cannot be written: it exists, or there is no permission or no room."""

    def __init__(self, path: str | PathLike[str], cause: str) -> None:
        self.path, self.cause = fspath(path), cause
        super().__init__(shown(f"{self.path}: {cause}"))


class _Problems(CkptError):
    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        shown = [str(problem) for problem in self.problems[:MOST_SHOWN]]
        more = len(self.problems) - MOST_SHOWN
        return "\n".join(shown + ([f"… and {more} more problems"] if more > 0 else []))


class RuleError(_Problems):
    """Rules whose text cannot be read; `.problems` has every one, with its span."""


class PlanError(_Problems):
    """A plan that may not be carried out; `.problems` has every reason."""

"""A rule line → words with their places.

    line  = { blank } [ word { blank { blank } word } ] { blank }
    word  = quoted | bare
    quoted = "'" { any but "'" } "'" | '"' { any but '"' } '"'
    bare  = any but blank, quote { any but blank }

A word is quoted when it begins with a quote; it ends at the next same mark, and backslashes are
left alone.  `''` is a word.  `=>` counts as the arrow only as a whole, bare word.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptsurgeon.errors import Problem, RuleError

ARROW = "=>"


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a rule: its text without quotes, its span in the line, and whether it was quoted."""

    text: str
    start: int
    end: int
    quoted: bool = False

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.end

    @property
    def is_arrow(self) -> bool:
        return self.text == ARROW and not self.quoted


def words(line: str) -> list[Word]:
    """The words of a rule; RuleError for a quote that does not end."""
    found: list[Word] = []
    at = 0
    while at < len(line):
        if line[at].isspace():
            at += 1
            continue
        start = at
        if line[at] in "'\"":
            end = line.find(line[at], at + 1)
            if end < 0:
                raise RuleError([Problem("a quoted word has no end", line, (start, len(line)), kind="syntax")])
            at = end + 1
            if at < len(line) and not line[at].isspace():
                raise RuleError([Problem("a blank must follow a quoted word", line, (start, at + 1), kind="syntax")])
            found.append(Word(line[start + 1 : end], start, at, True))
        else:
            while at < len(line) and not line[at].isspace():
                at += 1
            found.append(Word(line[start:at], start, at))
    return found


def quoted(text: str) -> str:
    """`text` as one word: bare where it can be, else in quotes; ValueError if it holds both marks."""
    bare = text and text[0] not in "'\"" and not any(c.isspace() for c in text) and text != ARROW
    if bare:
        return text
    for mark in "'\"":
        if mark not in text:
            return f"{mark}{text}{mark}"
    raise ValueError(f"{text!r} holds blanks and both quotes; write a blank as \\s in a pattern")

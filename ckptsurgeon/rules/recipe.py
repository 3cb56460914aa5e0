"""Recipes: ordered rules with notes, kept in a YAML file.

version: 1
description: what it is for        (optional)
select: model.state_dict           (optional: which state dict of the source)
rules:
  - strip module.
  - rule: drop ^fc\\.
    note: the new task has other classes
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.errors import InputError, Problem, RuleError
from ckptsurgeon.rules.parse import Rule, parse, parse_all

VERSION = 1
_WORDS = {"version", "description", "select", "rules"}
_LARGEST = 10 << 20


@dataclass(frozen=True)
class Recipe:
    """Ordered rules, with what they are for and which state dict they want."""

    rules: tuple[Rule, ...] = ()
    description: str = ""
    select: str | None = None

    @classmethod
    def of(cls, rules: Recipe | Iterable[str | Rule] | None) -> Recipe:
        """A recipe from rule lines; a Recipe is returned as it is. RuleError with all problems."""
        if isinstance(rules, Recipe):
            return rules
        return cls(parse_all(rules or ()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a YAML file; InputError or RuleError, which names the file and the line."""
        name = os.fspath(path)
        data = _yaml(name)
        if not isinstance(data, dict):
            raise InputError("a recipe is a YAML mapping with `version` and `rules`", path=name)
        unknown = [str(word) for word in data if word not in _WORDS]
        if unknown:
            raise InputError(f"unknown words {', '.join(unknown)}; a recipe has {', '.join(sorted(_WORDS))}", path=name)
        if data.get("version") != VERSION:
            raise InputError(
                f"version {data.get('version')!r} of recipes is not known; write `version: {VERSION}`", path=name
            )
        for word in ("description", "select"):
            if data.get(word) is not None and not isinstance(data[word], str):
                raise InputError(f"`{word}` is text", path=name)
        rules = data.get("rules") or []
        if not isinstance(rules, list):
            raise InputError("`rules` is a list of lines", path=name)
        return cls(_rules(rules, name), str(data.get("description") or ""), data.get("select"))

    def __add__(self, other: Recipe) -> Recipe:
        """This recipe's rules, then the other's."""
        return Recipe(self.rules + other.rules, self.description or other.description, other.select or self.select)


def _rules(entries: list[Any], path: str) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        line, note = entry, ""
        if isinstance(entry, Mapping):
            if set(entry) - {"rule", "note"} or "rule" not in entry:
                problems.append(
                    Problem(f"{path}: rule {index + 1} has `rule` and `note`, not {', '.join(map(str, entry))}")
                )
                continue
            line, note = entry["rule"], str(entry.get("note") or "")
        try:
            rules.append(parse(str(line) if isinstance(line, str) else line, note))
        except RuleError as error:
            at = f"{path}, line {_line(entries, index)}: "
            problems += [
                Problem(at + problem.text, problem.rule, problem.span, kind="syntax") for problem in error.problems
            ]
    if problems:
        raise RuleError(problems)
    return tuple(rules)


def _line(entries: Any, index: int) -> int:
    position = getattr(entries, "lc", None)
    return index + 1 if position is None else int(position.item(index)[0]) + 1


def _yaml(path: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
            raise InputError(f"a recipe is a regular file of at most {_LARGEST} bytes", path=path)
        with open(path, encoding="utf-8") as file:
            return YAML(typ="rt", pure=True).load(file)
    except FileNotFoundError:
        raise InputError("no such recipe", path=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", path=path) from None
    except YAMLError as error:
        words = " ".join(str(error).split())
        raise InputError(f"not YAML: {words}", path=path) from None

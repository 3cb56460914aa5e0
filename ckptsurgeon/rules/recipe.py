r"""Recipes: ordered rules with what they are for, kept in a YAML file.

version: 1
description: what it is for
expects:                           keys that must be there, with their shapes (-1, ~: any)
  conv1.weight: [64, 3, 7, 7]
yields:                            keys that are there afterwards: how a second run is recognised
  stem.weight: ~
variables:
  heads: {help: attention heads, config: num_attention_heads, default: 12}
select: model.state_dict           which state dict of the source
rules:
  - strip module.
  - rule: drop ^fc\\.
    note: the new task has other classes
    optional: true                 it may match nothing
  - recipe: builtin:unwrap         another recipe, here
    set: {heads: "{heads}"}
to: torchvision:resnet18           what the result must fit, and the policies
fit: true
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ckptsurgeon.rules import document
from ckptsurgeon.rules.parse import Rule, parse_all
from ckptsurgeon.rules.variables import Values, substituted

VERSION = 1
OPTIONS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "unexpected": (str,),
        "mismatched": (str,),
        "missing": (str,),
        "fit": (bool,),
        "dtype": (str,),
        "seed": (int,),
        "allow_unused": (bool,),
    }
)
"""The policies that a recipe may set, by the names of `cs.plan`, and what they are."""
WORDS = ("version", "description", "expects", "yields", "variables", "select", "rules", "to", *OPTIONS)

Shape = tuple[int, ...] | None
"""Sizes, -1 for any; None for any shape."""


@dataclass(frozen=True)
class Recipe:
    """Ordered rules, with what they are for, which state dict they want, and what the result must fit.

    `options` are policies by the names of `cs.plan`; `yields` are keys, with shapes, of a checkpoint to which the
    recipe was applied; `name` is the file that it was read from, "" for rules that were given, `source` its text.
    """

    rules: tuple[Rule, ...] = ()
    description: str = ""
    select: str | None = None
    to: str | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    yields: tuple[tuple[str, Shape], ...] = ()
    name: str = ""
    source: str | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, rules: Recipe | Iterable[str | Rule] | None) -> Recipe:
        """A recipe from rule lines; a Recipe is returned as it is. RuleError with all problems."""
        if isinstance(rules, Recipe):
            return rules
        return cls(parse_all(rules or ()))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        variables: Values | None = None,
        *,
        config: str | os.PathLike[str] | None = None,
        elsewhere: Collection[str] = (),
    ) -> Recipe:
        """The recipe in a YAML file, or a built-in one (`builtin:NAME`).

        `variables` are values for what it leaves open; those that it does not get are read from the JSON file
        `config`, where the recipe says under which name.  Raises InputError or RuleError, which name the file and
        the line, and UsageError for a variable that the recipe does not have (but for those that are used `elsewhere`).
        """
        from ckptsurgeon.rules import reading

        return reading.load(os.fspath(path), variables or {}, config, elsewhere)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the recipe as YAML, with the comments that it was read with; OutputError if the file exists."""
        document.write(path, self.text(), force)

    def text(self) -> str:
        """The recipe as YAML, with the comments that it was read with."""
        return self.source if self.source is not None else document.dumped(self._data())

    def _data(self) -> dict[str, Any]:
        made: dict[str, Any] = {"version": VERSION}
        made |= {"description": self.description} if self.description else {}
        made |= {"select": self.select} if self.select else {}
        made["rules"] = [_written(rule) for rule in self.rules]
        made |= {"to": self.to} if self.to else {}
        return made | dict(self.options)

    def __add__(self, other: Recipe) -> Recipe:
        """This recipe's rules, then the other's; what only one of them says holds for both."""
        source = None
        if self.source is not None and other.source is None:
            data = document.parsed(self.source, self.name)
            data.setdefault("rules", []).extend(_written(rule) for rule in other.rules)
            source = document.dumped(data)
        return Recipe(
            self.rules + other.rules,
            self.description or other.description,
            self.select or other.select,
            other.to or self.to,
            {**self.options, **other.options},
            self.yields or other.yields,
            self.name or other.name,
            source,
        )


def _written(rule: Rule) -> Any:
    return {"rule": rule.text, "note": rule.note} if rule.note else rule.text


def with_values(lines: Iterable[str | Rule], values: Values) -> tuple[Rule, ...]:
    """Rules in which the names of `values` in braces stand for them; other braces are left as they are."""
    return parse_all([substituted(line, values, lenient=True) if isinstance(line, str) else line for line in lines])

"""The small language of rules: one line, one operation."""

from ckptsurgeon.rules import condense, document
from ckptsurgeon.rules.parse import Rule, parse, parse_all, render
from ckptsurgeon.rules.reading import BUILTIN, builtin_names, builtin_path
from ckptsurgeon.rules.recipe import Recipe, with_values
from ckptsurgeon.rules.variables import assignments, used

__all__ = [
    "BUILTIN",
    "Recipe",
    "Rule",
    "assignments",
    "builtin_names",
    "builtin_path",
    "condense",
    "document",
    "parse",
    "parse_all",
    "render",
    "used",
    "with_values",
]

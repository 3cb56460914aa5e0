"""The small language of rules: one line, one operation."""

from ckptsurgeon.rules.parse import Rule, parse, parse_all, render
from ckptsurgeon.rules.recipe import Recipe

__all__ = ["Recipe", "Rule", "parse", "parse_all", "render"]

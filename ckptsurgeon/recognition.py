"""Whether a recipe was applied to a checkpoint already: by what its file says, or by the names that it has."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from ckptsurgeon.checkpoint import Checkpoint
from ckptsurgeon.rules import Recipe, Rule
from ckptsurgeon.tensor import TensorRef

_REFERENCE = re.compile(r"\\(?:\d{1,2}|g<\w+>)|\{[^{}]*\}")
_AGAIN = "give its rules by --rule if you want them once more"


def recorded(recipe: Recipe, source: Checkpoint) -> str | None:
    """Why, where the checkpoint's provenance names the recipe's rules as the last that changed it; else None."""
    said = source.provenance
    if not recipe.name or not recipe.rules or said is None or said.problem:
        return None
    texts = tuple(rule.text for rule in recipe.rules)
    for step in (said, *reversed(said.history)):
        if step.rules is None:
            return None
        if step.rules:
            if step.rules[: len(texts)] != texts:
                return None
            return f"{recipe.name}: already applied: the file says that it was made by these rules; {_AGAIN}"
    return None


def yielded(recipe: Recipe, tensors: Mapping[str, TensorRef]) -> str | None:
    """Why, where all keys are there that the recipe yields; else None."""
    if not recipe.yields:
        return None
    for key, shape in recipe.yields:
        ref = tensors.get(key)
        if ref is None or (shape is not None and not _fits(ref.shape, shape)):
            return None
    keys = ", ".join(repr(key) for key, _ in recipe.yields[:3])
    return f"{recipe.name}: already applied: the keys that it yields are there ({keys})"


def _fits(have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    return len(have) == len(want) and all(size in (-1, got) for size, got in zip(want, have, strict=True))


def named(recipe: Recipe, unused: Collection[str | None], tensors: Mapping[str, TensorRef]) -> str | None:
    """Why, where names are there as each of the recipe's renames would make them, and no other rule is `unused`."""
    renames = [rule for rule in recipe.rules if rule.operation.name == "rename"]
    if not recipe.name or not renames or not {rule.text for rule in renames} >= set(unused):
        return None
    examples = [_made(rule, tensors) for rule in renames]
    if None in examples:
        return None
    words = f"no rule matches, and names as they would make are there, such as {examples[0]!r}"
    return f"{recipe.name}: already applied, it seems: {words}"


def _made(rule: Rule, tensors: Mapping[str, TensorRef]) -> str | None:
    """A name that looks as if the rule had made it."""
    template: str = rule.args["template"]
    literal = _REFERENCE.split(template)
    if not any(re.search(r"\w", part) for part in literal):
        return None
    made = re.compile(".+".join(re.escape(part) for part in literal))
    return next((key for key in tensors if made.search(key)), None)

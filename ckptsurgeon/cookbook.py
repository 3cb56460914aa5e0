"""The verbs about recipes: put together what a command line says, undo one, list those that come with the package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

from ckptsurgeon import surgery
from ckptsurgeon.errors import PlanError, UsageError

if TYPE_CHECKING:
    from ckptsurgeon.inverter import Inversion
    from ckptsurgeon.rules import Recipe, Rule


def recipe(
    path: surgery.Path | None,
    rules: Iterable[str | Rule] | None,
    variables: Mapping[str, str | int | float] | None = None,
    config: surgery.Path | None = None,
) -> Recipe | None:
    """The rules of a recipe (a file, or `builtin:NAME`), then `rules`; None when there are neither.

    `variables`, and what a `config.json` says, are for both; UsageError for one that neither has.
    """
    values = variables or {}
    if path is None and (config is not None or (values and not rules)):
        raise UsageError("--set and --config are about the variables of a recipe: give one with --recipe")
    if path is None and not rules:
        return None
    from ckptsurgeon.rules import Recipe, used, with_values

    lines = list(rules or ())
    own = {name for name in values if any(name in used(line) for line in lines if isinstance(line, str))}
    strange = [name for name in values if path is None and name not in own]
    if strange:
        raise UsageError(f"--set {strange[0]}: no rule has {{{strange[0]}}} in it")
    kept = Recipe() if path is None else Recipe.load(path, values, config=config, elsewhere=own)
    if not lines:
        return kept
    return kept + Recipe.of(with_values(lines, values) if values else lines)


def invert(
    rules: Recipe | str | os.PathLike[str] | Iterable[str | Rule],
    source: surgery.Source,
    to: surgery.Like | None = None,
    *,
    select: str | None = None,
    lossy: bool = False,
    **how: Unpack[surgery.PlanOptions],
) -> Inversion:
    """The way back of a recipe (or of rules, or the path of a recipe) for checkpoints with the header of `source`.

    What `remap` makes of the result by its `.lines` has the names, dtypes and shapes of `source` again, and every bit
    of them where all operations are exact.  Raises PlanError when the recipe cannot be applied, or, unless `lossy`,
    when a rule has no inverse; each of them is named.
    """
    from ckptsurgeon import inverter
    from ckptsurgeon.rules import Recipe

    recipe = Recipe.load(rules) if isinstance(rules, str | os.PathLike) else Recipe.of(rules)
    made = surgery.plan(source, recipe, to, select=select, **how).check()
    found = inverter.invert(
        made.source, recipe, made.target, allow_unused=bool(how.get("allow_unused")), seed=how.get("seed", 0)
    )
    policies = [step for step in made.steps if step.by != "rule" and step.edges]
    problems = (*found.problems, *(inverter.no_way_back(step) for step in policies))
    if problems and not lossy:
        raise PlanError(problems)
    return replace(found, problems=problems)


@dataclass(frozen=True)
class Builtin:
    """A built-in recipe: its name, what it is for, its variables with what they are, and its text."""

    name: str
    description: str
    variables: Mapping[str, str]
    text: str


def recipes() -> tuple[Builtin, ...]:
    """The recipes that come with the package, by name; each is used as `builtin:NAME`."""
    from ckptsurgeon.rules import builtin_names, builtin_path, document

    made = []
    for name in builtin_names():
        data, text = document.read(builtin_path(name), f"builtin:{name}")
        said = {
            str(variable): str(about.get("help", "")) if isinstance(about, Mapping) else f"{about} if not given"
            for variable, about in (data.get("variables") or {}).items()
        }
        made.append(Builtin(name, str(data["description"]), said, text))
    return tuple(made)

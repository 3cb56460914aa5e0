"""Recipe files read: their words checked, their variables replaced, other recipes put in where they are named."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ckptsurgeon.errors import InputError, Problem, RuleError, UsageError
from ckptsurgeon.rules import document
from ckptsurgeon.rules.parse import Rule, parse, render
from ckptsurgeon.rules.recipe import OPTIONS, VERSION, WORDS, Recipe, Shape
from ckptsurgeon.rules.variables import NAME, RESERVED, Unset, Value, Values, config, substituted, value_of

BUILTIN = "builtin:"
_ENTRY, _INCLUDED, _VARIABLE = {"rule", "note", "optional"}, {"recipe", "set", "note"}, {"help", "config", "default"}
_DEEPEST, _MOST_RULES = 8, 10_000
_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "builtin")
_TARGETS = ("torchvision:", "timm:", "transformers:")


def builtin_names() -> tuple[str, ...]:
    """The names of the built-in recipes, in order."""
    return tuple(sorted(name.removesuffix(".yaml") for name in os.listdir(_FOLDER) if name.endswith(".yaml")))


def builtin_path(name: str) -> str:
    """The file of a built-in recipe; UsageError, with the names alike, when there is none."""
    known = builtin_names()
    if name not in known:
        from difflib import get_close_matches

        near = get_close_matches(name, known, 3, 0.4)
        hint = f"the nearest are {', '.join(near)}" if near else "`ckpt recipes` lists them"
        raise UsageError(f"no built-in recipe is called {name!r}; {hint}")
    return os.path.join(_FOLDER, f"{name}.yaml")


def load(
    path: str, given: Values, config_path: str | os.PathLike[str] | None, elsewhere: Collection[str] = ()
) -> Recipe:
    """The recipe in a file or a built-in one; see `Recipe.load`."""
    said = config(os.fspath(config_path)) if config_path is not None else (lambda name: None)
    reading = _Reading(said)
    made = reading.recipe(path, given, ())
    unknown = [name for name in given if name not in reading.declared and name not in elsewhere]
    if unknown:
        names = ", ".join(reading.declared) or "none"
        raise UsageError(f"{path} has no variable {unknown[0]!r}; its variables: {names}")
    if reading.problems:
        raise RuleError(reading.problems)
    return made


class _Reading:
    """A recipe, and those that it is composed of, while they are read; the problems of all of them."""

    def __init__(self, config: Callable[[str], Value | None]) -> None:
        self.config = config
        self.problems: list[Problem] = []
        self.declared: dict[str, None] = {}
        self.count = 0
        self.unsound = False

    def recipe(self, path: str, given: Values, trail: tuple[str, ...]) -> Recipe:
        file = builtin_path(path.removeprefix(BUILTIN)) if path.startswith(BUILTIN) else path
        data, text = document.read(file, path)
        if not isinstance(data, dict):
            raise InputError("a recipe is a YAML mapping with `version` and `rules`", path=path)
        one = _File(path, data)
        one.check()
        values = self._variables(one, given)
        rules = [*self._expected(one, values), *self._rules(one, values, given, (*trail, os.path.realpath(file)))]
        self.count += len(rules)
        if self.count > _MOST_RULES:
            raise InputError(f"it comes to more than {_MOST_RULES} rules", path=path)
        to = data.get("to")
        return Recipe(
            tuple(rules),
            str(data.get("description") or ""),
            data.get("select"),
            None if to is None else self._target(one, self._text(one, str(to), values, "to")),
            MappingProxyType({name: data[name] for name in OPTIONS if data.get(name) is not None}),
            tuple(self._shapes(one, "yields", values)),
            path,
            text,
        )

    def _variables(self, one: _File, given: Values) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for name, said in one.mapping("variables").items():
            self.declared[name] = None
            about = said if isinstance(said, Mapping) else {"default": said}
            value: Any = given.get(name)
            if value is None and about.get("config"):
                value = self.config(str(about["config"]))
            if value is None and about.get("default") is not None:
                value = about["default"]
                self.unsound = False
                value = self._text(one, value, values, "variables", name) if isinstance(value, str) else value
                value = None if self.unsound else value_of(value) if isinstance(value, str) else value
            if value is not None:
                values[name] = value
            else:
                one.unset[name] = about
        return values

    def _text(self, one: _File, text: str, values: Values, *place: Any) -> str:
        """A text with its variables replaced; what cannot be replaced is a problem, and then it stays."""
        try:
            return substituted(text, values)
        except Unset as unset:
            words = one.words_for(str(unset))
            if str(unset) in one.told or place[:1] == ("variables",):
                self.unsound = True
                return text
            one.told.add(str(unset))
        except ValueError as error:
            words = str(error)
        self.problems.append(Problem(f"{one.at(*place)}: {words}", text, kind="variable"))
        return text

    def _shapes(self, one: _File, word: str, values: Values) -> Iterable[tuple[str, Shape]]:
        for key, shape in one.mapping(word).items():
            if shape is None:
                yield str(key), None
                continue
            sizes = [self._size(one, size, values, word, key) for size in (shape if isinstance(shape, list) else ["?"])]
            if None in sizes:
                words = f"{one.at(word, key)}: {key!r} has a list of sizes (-1 or ~: any), or ~"
                self.problems.append(Problem(words, kind="syntax"))
            else:
                yield str(key), tuple(size for size in sizes if size is not None)

    def _size(self, one: _File, size: Any, values: Values, *place: Any) -> int | None:
        """A size, -1 for any; None for what is none."""
        text = self._text(one, size, values, *place) if isinstance(size, str) else size
        if text is None:
            return -1
        plain = value_of(text) if isinstance(text, str) else text
        return int(plain) if isinstance(plain, int) and not isinstance(plain, bool) and plain >= -1 else None

    def _expected(self, one: _File, values: Values) -> Iterable[Rule]:
        for key, shape in self._shapes(one, "expects", values):
            args: dict[str, Any] = {"pattern": re.compile(f"^{re.escape(key)}$")}
            args |= {} if shape is None else {"shape": shape}
            yield parse(render("expect", args), place=one.at("expects", key))

    def _rules(self, one: _File, values: Values, given: Values, trail: tuple[str, ...]) -> Iterable[Rule]:
        entries = one.data.get("rules") or []
        if not isinstance(entries, list):
            raise InputError("`rules` is a list of lines", path=one.path)
        for index, entry in enumerate(entries):
            place = one.at("rules", index)
            if isinstance(entry, Mapping) and "recipe" in entry:
                yield from self._included(one, entry, place, values, given, trail)
                continue
            line, note = entry, ""
            if isinstance(entry, Mapping):
                if set(entry) - _ENTRY or not isinstance(entry.get("rule"), str):
                    words = f"{place}: a rule has `rule`, `note` and `optional`, not {', '.join(map(str, entry))}"
                    self.problems.append(Problem(words, kind="syntax"))
                    continue
                line, note = entry["rule"], str(entry.get("note") or "")
                line += " optional=yes" if entry.get("optional") is True else ""
            yield from self._rule(one, line, note, place, values, index)

    def _rule(self, one: _File, line: Any, note: str, place: str, values: Values, index: int) -> Iterable[Rule]:
        before, self.unsound = len(self.problems), False
        text = self._text(one, str(line), values, "rules", index) if isinstance(line, str) else line
        if self.unsound or len(self.problems) > before:
            return
        try:
            yield parse(text, note, place)
        except RuleError as error:
            self.problems += [
                Problem(f"{place}: {problem.text}", problem.rule, problem.span, kind="syntax")
                for problem in error.problems
            ]

    def _included(
        self, one: _File, entry: Mapping[str, Any], place: str, values: Values, given: Values, trail: tuple[str, ...]
    ) -> Iterable[Rule]:
        name, set_ = entry["recipe"], entry.get("set") or {}
        if set(entry) - _INCLUDED or not isinstance(name, str) or not isinstance(set_, Mapping):
            raise InputError(f"{place}: another recipe has `recipe`, a name, and `set`, a mapping", path=one.path)
        path = name if name.startswith(BUILTIN) else os.path.join(os.path.dirname(one.path), name)
        file = builtin_path(name.removeprefix(BUILTIN)) if name.startswith(BUILTIN) else path
        if os.path.realpath(file) in trail:
            raise InputError(f"{place}: {name} is a part of itself", path=one.path)
        if len(trail) >= _DEEPEST:
            raise InputError(f"{place}: recipes within recipes are nested too deeply", path=one.path)
        own = {
            str(key): self._text(one, value, values, "rules") if isinstance(value, str) else value
            for key, value in set_.items()
        }
        yield from self.recipe(path, {**given, **values, **own}, trail).rules

    def _target(self, one: _File, to: str) -> str:
        """What a recipe may name: files, and the models of three libraries; what else is code is the user's to name."""
        beside = os.path.join(os.path.dirname(one.path), to)
        if not to.startswith(_TARGETS) and os.path.exists(beside):
            return beside
        if to.startswith(_TARGETS) or ":" not in to:
            return to
        words = f"{one.at('to')}: a recipe names no code; leave `to` out and give --to {to}"
        self.problems.append(Problem(words, kind="target"))
        return to


class _File:
    """The data of one recipe file, and where things stand in it."""

    def __init__(self, path: str, data: Any) -> None:
        self.path, self.data = path, data
        self.unset: dict[str, Mapping[str, Any]] = {}
        self.told: set[str] = set()

    def at(self, *steps: Any) -> str:
        """The file and the line of an entry, as far as it is known."""
        holder, line = self.data, None
        for step in steps:
            line = document.line_of(holder, step) or line
            holder = (
                holder.get(step) if isinstance(holder, dict) else holder[step] if isinstance(holder, list) else None
            )
        return self.path if line is None else f"{self.path}, line {line}"

    def words_for(self, name: str) -> str:
        """What to do about a variable without a value."""
        about = self.unset.get(name)
        if about is None:
            known = ", ".join(self.mapping("variables")) or "none"
            return f"no variable is called {name!r} (a literal brace is doubled); the recipe's variables: {known}"
        help = f" ({about['help']})" if about.get("help") else ""
        source = f", or --config with a config.json that has {about['config']!r}" if about.get("config") else ""
        return f"the variable {name!r}{help} has no value; give --set {name}=VALUE{source}"

    def mapping(self, word: str) -> Mapping[str, Any]:
        found = self.data.get(word)
        return found if isinstance(found, Mapping) else {}

    def check(self) -> None:
        """InputError for words, versions and kinds that a recipe does not have."""
        unknown = [str(word) for word in self.data if word not in WORDS]
        if unknown:
            known = ", ".join(WORDS)
            raise InputError(f"unknown words {', '.join(unknown)}; a recipe has {known}", path=self.at(unknown[0]))
        if type(self.data.get("version")) is not int or self.data["version"] != VERSION:
            found = self.data.get("version")
            raise InputError(f"version {found!r} of recipes is not known; write `version: {VERSION}`", path=self.path)
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("description", "select", "to"), (str,)),
            **dict.fromkeys(("expects", "yields", "variables"), (dict,)),
            **OPTIONS,
        }
        for word, kind in kinds.items():
            value = self.data.get(word)
            if value is not None and not (isinstance(value, kind) and (bool in kind or not isinstance(value, bool))):
                names = {str: "text", dict: "a mapping", bool: "true or false", int: "a whole number"}
                raise InputError(f"`{word}` is {names[kind[0]]}", path=self.at(word))
        self._check_variables()

    def _check_variables(self) -> None:
        for name, said in self.mapping("variables").items():
            place = self.at("variables", name)
            if not isinstance(name, str) or not NAME.fullmatch(name) or name == RESERVED:
                raise InputError(f"{name!r} is no name of a variable", path=place)
            plain = said is None or isinstance(said, str | int | float)
            if not plain and (not isinstance(said, Mapping) or set(said) - _VARIABLE):
                words = ", ".join(map(str, said)) if isinstance(said, Mapping) else "a list"
                raise InputError(
                    f"the variable {name!r} has a default, or help, config and default, not {words}", path=place
                )

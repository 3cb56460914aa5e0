r"""Few rules for many names: from pairs of names to patterns and templates that say the same.

Numbers that vary become `(\d+)`, last segments that vary alternatives (`(weight|bias)`), and what two names have in
common at their ends is left alone.  Nothing is guessed: a rule is taken only if it does on all names there are exactly
what the pairs say, else it is cut smaller, down to a rule for each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.ops import OPERATIONS, Numbered, OperationError, expanded

MARK = "\ue000"
"""Stands in a name for the number of `stack` and `unstack`, which is written `{i}`."""
ASIDE = "~."
"""Begins the names of tensors whose own name is not free yet."""
_DIGITS = re.compile(r"(\d+)")
_MOST_FACTOR = 64
_MOST_COLUMNS = 4

_READ: dict[str, Callable[[str], Any]] = {"pattern": re.compile, "numbered": Numbered, "template": str}

Names = tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    """Names that are there, and those to make of them; `members` are all that the first pattern may match."""

    there: Names
    made: Names
    members: Names = ()


@dataclass(frozen=True)
class Line:
    """Patterns of names that are there, and templates of those to make."""

    patterns: Names
    templates: Names = ()


def lines(edges: Sequence[Edge], universe: Collection[str]) -> list[Line]:
    """The rules that do to `universe` what the edges say, each pattern matching nothing else."""
    made: list[Line] = []
    for group in _grouped(edges, tails=True):
        line = _line(group, universe, tails=True)
        if line is not None:
            made.append(line)
            continue
        for part in _grouped(group, tails=False):
            line = _line(part, universe, tails=False)
            made += [line] if line is not None else _by_number(part, universe)
    return made


def _by_number(edges: Sequence[Edge], universe: Collection[str]) -> list[Line]:
    """A rule for each value of one number where that is enough, else a rule for each name."""
    columns = _columns([_forms(edge, False)[0][0] for edge in edges])
    for column in sorted(columns, key=lambda column: len(set(column)))[:_MOST_COLUMNS]:
        parts: dict[str, list[Edge]] = {}
        for value, edge in zip(column, edges, strict=True):
            parts.setdefault(value, []).append(edge)
        if 1 < len(parts) < len(edges):
            made = [_line(part, universe, tails=False) for part in parts.values()]
            if None not in made:
                return [line for line in made if line is not None]
    return [_literal(edge) for edge in edges]


def drops(names: Iterable[str], universe: Collection[str]) -> list[dict[str, Any]]:
    """The arguments of `drop` rules that remove these names and no others."""
    return [words("drop", line) for line in lines([Edge((name,), ()) for name in names], universe)]


def words(name: str, line: Line) -> dict[str, Any]:
    """The patterns and templates of a line as the operation calls them."""
    made: dict[str, Any] = {}
    for param in OPERATIONS[name].params:
        read = _READ.get(param.kind)
        if read is None:
            continue
        texts = line.templates if param.kind == "template" else line.patterns
        made[param.name] = tuple(map(read, texts)) if param.many else read(texts[0])
    return made


def renames(goals: Mapping[str, str], universe: Collection[str]) -> list[tuple[str, str]]:
    """Patterns and templates that, one after another, rename every key of `goals` to its value and no other name of
    `universe`; the last one may be `^~\\.` and nothing, which puts names in their places that were not free before."""
    found = _renames(goals, universe)
    if found is None:
        found = _renames({name: ASIDE + goal for name, goal in goals.items()}, universe)
        assert found is not None
        found.append((f"^{re.escape(ASIDE)}", ""))
    return found


# -- groups of names that differ in numbers and last segments ----------------------------------


@dataclass(frozen=True)
class _Form:
    """A name taken apart: the text around its numbers, the numbers, and its last segment where that is apart."""

    texts: Names
    numbers: Names
    tail: str | None = None

    @classmethod
    def of(cls, name: str, tail: bool) -> _Form:
        head, dot, last = name.rpartition(".")
        if not tail or not dot or MARK in last or _DIGITS.search(last):
            parts = _DIGITS.split(name)
            return cls(tuple(parts[::2]), tuple(parts[1::2]))
        parts = _DIGITS.split(head)
        return cls(tuple(parts[::2]), tuple(parts[1::2]), last)


def _forms(edge: Edge, tails: bool) -> tuple[list[_Form], list[_Form]]:
    names = (*edge.there, *edge.made)
    lasts = {name.rpartition(".")[2] if "." in name else None for name in names}
    one = tails and len(lasts) == 1 and None not in lasts
    forms = [_Form.of(name, one) for name in names]
    return forms[: len(edge.there)], forms[len(edge.there) :]


def _grouped(edges: Iterable[Edge], tails: bool) -> list[list[Edge]]:
    groups: dict[object, list[Edge]] = {}
    for edge in edges:
        there, made = _forms(edge, tails)
        key = tuple((form.texts, form.tail is None) for form in (*there, *made)), len(there)
        groups.setdefault(key, []).append(edge)
    return list(groups.values())


def _line(group: Sequence[Edge], universe: Collection[str], tails: bool) -> Line | None:
    """One rule for all edges; None where there is none."""
    forms = [_forms(edge, tails) for edge in group]
    columns = [_columns([form[0][i] for form in forms]) for i in range(len(forms[0][0]))]
    varying = [[column for column in own if len(set(column)) > 1] for own in columns]
    if any(own != varying[0] for own in varying[1:]):
        return None  # the groups of every pattern must mean the same
    words = list(dict.fromkeys(form[0][0].tail for form in forms))
    tail = None if words == [None] else [word for word in words if word is not None]
    templates = []
    for i in range(len(forms[0][1])):
        template = _template([form[1][i] for form in forms], varying[0], len(varying[0]) + 1, tail)
        if template is None:
            return None
        templates.append(template)
    for exact in (False, True):
        patterns = [_pattern(forms[0][0][i], columns[i], tail, exact) for i in range(len(forms[0][0]))]
        if all(_matches_only(pattern, _members(group, i), universe) for i, pattern in enumerate(patterns)):
            return Line(tuple(patterns), tuple(templates))
    return None


def _members(group: Sequence[Edge], place: int) -> set[str]:
    return {name for edge in group for name in (edge.members if edge.members else (edge.there[place],))}


def _matches_only(pattern: str, wanted: set[str], universe: Collection[str]) -> bool:
    regex = re.compile(pattern.replace("{i}", r"\d+"))
    return {name for name in universe if regex.search(name)} == wanted


def _columns(forms: Sequence[_Form]) -> list[Names]:
    return list(zip(*(form.numbers for form in forms), strict=True))


def _pattern(form: _Form, columns: Sequence[Names], tail: Sequence[str] | None, exact: bool) -> str:
    parts = [_escaped(form.texts[0])]
    for column, text in zip(columns, form.texts[1:], strict=True):
        values = list(dict.fromkeys(column))
        number = values[0] if len(values) == 1 else f"({'|'.join(values)})" if exact else r"(\d+)"
        parts += [number, _escaped(text)]
    if tail is not None:
        words = "|".join(map(_escaped, tail))
        parts.append(rf"\.({words})" if len(tail) > 1 else rf"\.{words}")
    return f"^{''.join(parts)}$"


def _escaped(text: str) -> str:
    escaped = re.escape(text).replace(MARK, "{i}").replace(r"\-", "-")
    for char, spelt in (("\\\n", r"\n"), ("\\\r", r"\r"), ('"', r"\x22")):  # a rule is one line, in one kind of quotes
        escaped = escaped.replace(char, spelt)
    return escaped


def _template(forms: Sequence[_Form], known: Sequence[Names], last: int, tail: Sequence[str] | None) -> str | None:
    """A template for these names out of the numbers that the pattern finds; None where it takes more than that."""
    parts = [_plain(forms[0].texts[0])]
    for column, text in zip(_columns(forms), forms[0].texts[1:], strict=True):
        number = column[0] if len(set(column)) == 1 else _told(column, known)
        if number is None:
            return None
        parts += [number, _plain(text)]
    if tail is not None:
        parts.append(f".\\{last}" if len(tail) > 1 else f".{_plain(tail[0])}")
    joined = "".join(parts)
    return re.sub(r"\\(\d)(?=\d)", r"\\g<\1>", joined) if re.search(r"\\\d\d", joined) else joined


def _plain(text: str) -> str:
    """Text as a template has it."""
    doubled = text.replace("\\", r"\\").replace("{", "{{").replace("}", "}}")
    for char, spelt in (("\n", r"\n"), ("\r", r"\r"), ('"', r"\042")):
        doubled = doubled.replace(char, spelt)
    return doubled.replace(MARK, "{i}")


def _told(column: Names, known: Sequence[Names]) -> str | None:
    """How a number follows from those that are known: itself, or `a*n+b`."""
    for group, other in enumerate(known, 1):
        if other == column:
            return f"\\{group}"
    for group, other in enumerate(known, 1):
        told = _linear(other, column, group)
        if told is not None:
            return told
    return None


def _linear(xs: Names, ys: Names, group: int) -> str | None:
    if any(len(value) > 1 and value[0] == "0" for value in (*xs, *ys)):
        return None
    points = sorted({(int(x), int(y)) for x, y in zip(xs, ys, strict=True)})
    if len(points) < 2 or points[0][0] == points[1][0]:
        return None
    factor, rest = divmod(points[1][1] - points[0][1], points[1][0] - points[0][0])
    offset = points[0][1] - factor * points[0][0]
    if rest or not 0 < abs(factor) <= _MOST_FACTOR or any(y != factor * x + offset for x, y in points):
        return None
    product_ = f"\\{group}" if factor == 1 else f"{factor}*\\{group}" if factor > 0 else f"-{-factor}*\\{group}"
    if factor == -1:
        return f"{{{offset}-\\{group}}}"
    return f"{{{product_}{offset:+d}}}" if offset else f"{{{product_}}}"


def _literal(edge: Edge) -> Line:
    return Line(tuple(f"^{_escaped(name)}$" for name in edge.there), tuple(map(_plain, edge.made)))


def numbers(name: str) -> Names:
    """The numbers in a name, in order."""
    return tuple(_DIGITS.findall(name))


def marked(names: Names, start: int) -> str | None:
    """Names numbered from `start` as one, in which a mark stands for the number; None where that is not all of it."""
    first, last = (_DIGITS.split(names[end]) for end in (0, -1))
    if len(first) != len(last):
        return None
    odd = range(1, len(first), 2)
    places = [i for i in odd if first[i] != last[i]] or [i for i in odd if first[i] == str(start)][-1:]
    made = "".join(MARK if i in places else part for i, part in enumerate(first))
    fine = bool(places) and all(made.replace(MARK, str(start + i)) == name for i, name in enumerate(names))
    return made if fine else None


# -- renames -----------------------------------------------------------------------------------


def _renames(goals: Mapping[str, str], universe: Collection[str]) -> list[tuple[str, str]] | None:
    """The rules, tried on the names one after another; None where a name would not be free when it is needed."""
    state = {name: goals.get(name, name) for name in universe}
    made: list[tuple[str, str]] = []
    left = {name for name, goal in goals.items() if name != goal}
    for pattern, template, example in _candidates({name: goals[name] for name in goals if name in left}, left):
        if example in left and (moved := _moved(state, pattern, template)):
            left -= moved
            made.append((pattern, template))
    for name in [name for name in goals if name in left]:
        if goals[name] in state:
            return None
        state[goals[name]] = state.pop(name)
        made.append((f"^{_escaped(name)}$", _plain(goals[name])))
    return made


def _moved(state: dict[str, str], pattern: str, template: str) -> set[str]:
    """Rename in `state` (name → the name that it is to have) if that is right for every name; the names renamed."""
    regex = re.compile(pattern)
    moves: dict[str, str] = {}
    for name, goal in state.items():
        if regex.search(name):
            try:
                new = expanded(regex, template, name, 0)
            except OperationError:  # a number below 0, elsewhere
                return set()
            if new != goal or new == name:
                return set()
            moves[name] = new
    if any(new in state and new not in moves for new in moves.values()):
        return set()
    for name in moves:
        del state[name]
    state.update({new: new for new in moves.values()})
    return set(moves)


def _candidates(goals: Mapping[str, str], left: Collection[str]) -> Iterable[tuple[str, str, str]]:
    """Rules to try, those for the most names first, each with a name that it is for; `left` are the names that no rule
    has renamed yet."""
    groups: dict[tuple[Names, Names, bool], list[tuple[_Form, _Form, str]]] = {}
    for name, goal in goals.items():
        for end in _ends(name, goal):
            forms = (_Form.of(text[: len(text) - end], False) for text in (name, goal))
            old, new = forms
            groups.setdefault((old.texts, new.texts, end > 0), []).append((old, new, name))
    for (_, _, is_open), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        for part in _parts(members, left):
            columns = _columns([form for form, _, _ in part])
            varying = [column for column in columns if len(set(column)) > 1]
            template = _template([form for _, form, _ in part], varying, 0, None)
            if template is None or (len(part) == 1 and not is_open):
                continue
            for exact in (False, True) if varying else (False,):
                pattern = _pattern(part[0][0], columns, None, exact)
                yield pattern[:-1] if is_open else pattern, template, part[0][2]


_Member = tuple[_Form, _Form, str]


def _parts(members: list[_Member], left: Collection[str]) -> Iterable[list[_Member]]:
    """The members, and for where no rule is right for all of them, those of each value of one number."""
    if not any(name in left for _, _, name in members):
        return
    yield members
    if not any(name in left for _, _, name in members):
        return
    columns = {column for column in _columns([form for form, _, _ in members]) if len(set(column)) > 1}
    for column in sorted(columns, key=lambda column: (len(set(column)), column))[:_MOST_COLUMNS]:
        parts: dict[str, list[_Member]] = {}
        for value, member in zip(column, members, strict=True):
            parts.setdefault(value, []).append(member)
        if len(parts) < len(members):
            yield from parts.values()


def _ends(a: str, b: str) -> list[int]:
    """The lengths of ends that both have in common and that begin behind a dot, or are one of them; and 0."""
    size = 0
    while size < min(len(a), len(b)) and a[-1 - size] == b[-1 - size]:
        size += 1
    common = a[len(a) - size :]
    whole = [size] if size == min(len(a), len(b)) else []
    return [*whole, *(size - at - 1 for at, char in enumerate(common) if char == "." and at + 1 < size), 0]

"""What `ckpt align` found: a table of what goes where and why, the recipe with comments, and what is left."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from math import isfinite
from typing import Any

from ckptsurgeon.aligner import Alignment, Leftover, Match
from ckptsurgeon.report._text import columns, percent, plural, shown
from ckptsurgeon.report.checked import number
from ckptsurgeon.report.grouping import group
from ckptsurgeon.rules import document

SCHEMA = "ckptsurgeon.align/1"
_KINDS = {
    "other size": "of another size in the source",
    "computed": "computed",
    "new": "new in the target",
    "block": "blocks without a source",
    "open": "open",
    "unused": "without a place in the target",
    "again": "second names of tensors that are there",
}


def text(found: Alignment, output: os.PathLike[str] | None = None) -> str:
    """The matches with their evidence, the rules, and what is left over."""
    parts = [
        _matches(found),
        _rules(found),
        _left("missing in the source", found.missing),
        _left("not used", found.unused),
    ]
    return "\n".join(line for part in [*(one for one in parts if one), _end(found, output)] for line in [*part, ""])[
        :-1
    ]


def _matches(found: Alignment) -> list[str]:
    head = ["source", "target", "tensors", "how", "", "why"]
    rows = [
        [_names(one.sources), _names(one.targets), f"{one.count:,}", one.how, one.grade, "; ".join(one.why)]
        for one in found.matches
    ]
    return columns([[shown(cell) for cell in row] for row in [head, *rows]], frozenset({2})) if rows else []


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _rules(found: Alignment) -> list[str]:
    if not found.recipe.rules:
        return ["no rule is needed"] if found.edges else []
    return [f"{plural(len(found.recipe.rules), 'rule')}:", *(f"  {shown(rule.text)}" for rule in found.recipe.rules)]


def _left(title: str, some: tuple[Leftover, ...]) -> list[str]:
    if not some:
        return []
    groups = group((left.key, left.text if left.kind == "computed" else _about(left)) for left in some)
    return [
        f"{title}: {plural(len(some), 'key')}",
        *(f"  {shown(one.name)}: {shown(str(one.label))}" for one in groups),
    ]


def _about(left: Leftover) -> str:
    return f"{_KINDS[left.kind]}: {left.text}"


def _end(found: Alignment, output: os.PathLike[str] | None) -> list[str]:
    grades = Counter(edge.grade for edge in found.edges for _ in edge.targets)
    words = {"certain": "certain", "order": "by order", "tried": "by experiment", "open": "open"}
    counts = ", ".join(f"{count:,} {words[grade]}" for grade, count in grades.items())
    share = f"{percent(found.agreement)} of the parameters of {found.target.label} come from the source"
    lines = [shown(f"{share} ({counts or 'none'})")]
    if found.tried:
        lines.append(shown(f"by experiment: {found.tried}"))
    if output is not None:
        lines.append(f"wrote {shown(os.fspath(output))}: {plural(len(found.recipe.rules), 'rule')}")
    return lines


def data(found: Alignment, output: os.PathLike[str] | None = None) -> dict[str, Any]:
    """The JSON object of `ckpt align --json`."""
    return {
        "schema": SCHEMA,
        "source": found.source.origin.path if found.source.origin else None,
        "target": found.target.label,
        "certain": found.certain,
        "fits": not found.refusals(fit=True),
        "agreement": found.agreement,
        "rules": [rule.text for rule in found.recipe.rules],
        "matches": [_match(match) for match in found.matches],
        "edges": [
            {"sources": list(edge.sources), "targets": list(edge.targets), "grade": edge.grade} for edge in found.edges
        ],
        "questions": [
            {
                "text": one.text,
                "sources": list(one.sources),
                "targets": list(one.targets),
                "answers": list(one.answers),
            }
            for one in found.questions
        ],
        "tried": found.tried or None,
        "missing": [_leftover(left) for left in found.missing],
        "unused": [_leftover(left) for left in found.unused],
        "problems": [problem.text for problem in found.refusals(fit=True)],
        "written": None if output is None else os.fspath(output),
    }


def _match(match: Match) -> dict[str, Any]:
    return {
        "sources": list(match.sources),
        "targets": list(match.targets),
        "group": match.group,
        "tensors": match.count,
        "elements": match.numel,
        "how": match.how,
        "grade": match.grade,
        "margin": round(match.margin, 3) if isfinite(match.margin) else None,
        "why": list(match.why),
        "error": number(match.error),
    }


def _leftover(left: Leftover) -> dict[str, Any]:
    return {"key": left.key, "shape": list(left.shape), "kind": left.kind, "why": left.text}


def save(found: Alignment, path: str | os.PathLike[str], force: bool = False) -> None:
    """Write the recipe as YAML, with comments that a reviewer can follow; OutputError if the file exists."""
    document.write(path, recipe(found), force)


def recipe(found: Alignment) -> str:
    """The recipe as YAML: over every rule what it is for, below them what is left over."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    rules = CommentedSeq()
    for rule in found.recipe.rules:
        rules.append({"rule": rule.text, "note": rule.note} if rule.note else rule.text)
        note = found.notes.get(rule.text)
        if note:
            rules.yaml_set_comment_before_after_key(len(rules) - 1, before=_line(note), indent=2)
    made = CommentedMap(version=1)
    made["description"] = _line(found.recipe.description)
    made["rules"] = rules
    said = list(_comments(found))
    made.yaml_set_start_comment("\n".join(said))
    return document.dumped(made)


def _comments(found: Alignment) -> Iterator[str]:
    yield _line(f"{percent(found.agreement)} of the parameters of {found.target.label} come from the source")
    if any(match.grade == "tried" for match in found.matches):
        yield _line(f"Found by experiment, where it says so: {found.tried}")
    for title, some in (("missing in the source", found.missing), ("not used", found.unused)):
        for merged in group((left.key, _about(left)) for left in some):
            yield _line(f"{title}: {merged.name}: {merged.label}")
    if found.missing or any(left.kind != "again" for left in found.unused):
        yield "These are settled by policies: give --to and --fit, or --missing and --unexpected."


def _line(words: str) -> str:
    return " ".join(shown(words).split())

"""Whether one checkpoint is what a recipe makes of another: names, dtypes, shapes, and every bit.

What is copied must be there bit for bit, -0 and the payload of a NaN included.  Where a value was computed (a cast) a
NaN counts as a NaN, whatever its bits, for they depend on the processor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptsurgeon import charges, evaluate, formats, nonfinite
from ckptsurgeon.checkpoint import Checkpoint, Target
from ckptsurgeon.comparison import in_steps
from ckptsurgeon.errors import InputError, LimitError, UsageError, brief, shown
from ckptsurgeon.limits import current
from ckptsurgeon.ops import Args, Match, Names, Numbered
from ckptsurgeon.provenance import Provenance, header_digest
from ckptsurgeon.rules import Recipe, Rule
from ckptsurgeon.sources import Apply, Fill, Pieces, Source
from ckptsurgeon.tensor import TensorRef

if TYPE_CHECKING:
    from ckptsurgeon.stream import Progress

_STEP = 1 << 20
_MOST_RULES = 1000
_MOST_REPEATS = 4
_MOST_STEPS = 1_000_000_000
"""Of all recorded rules on all names."""
_LONGEST, _WIDE = 2000, 0xFFFF
"""Characters of a recorded pattern, and the last that a class of characters finds at once."""
_GROUP = re.compile(r"\((?!\?)|\(\?(?:[aimsu]*:|[aimsu]+\)|P<\w+>|<?[=!])")
"""The groups that a recorded pattern may have: no comment, no condition."""
_LITERAL = re.compile(r"\\.|\[[^\]\\]*+(?:\\.[^\]\\]*+)*+\]", re.DOTALL)
"""An escape, or a class; taken to end no later than it does, so that nothing behind it is overlooked."""
_MOST_CHARACTERS = 1 << 26
"""Of all names that a recorded rule makes, and of one name as far as its template tells."""


@dataclass(frozen=True)
class Difference:
    """A key, and in words how the file is not what the recipe makes."""

    key: str
    text: str


@dataclass(frozen=True)
class Proof:
    """Whether a file is what `rules` (and the policies beside them) make of `source`; `recorded` tells that they are
    the file's own, and `tensors` and `nbytes` what was compared."""

    source: str
    rules: tuple[str, ...]
    recorded: bool
    tensors: int
    nbytes: int
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        """Whether it is."""
        return not self.differences


def prove(
    made: Checkpoint, file: Checkpoint, source: str, recipe: Recipe, recorded: bool, progress: Progress | None = None
) -> Proof:
    """Hold a file against the result of a plan, block by block; every key that differs is named.

    The order of keys, ties, metadata and extras do not count; a quantised tensor is the integers, scale and zero point
    that safetensors has of it.  `progress` is called with the bytes of both that were read, and those to read.
    Raises InputError, with the key, for what cannot be read.
    """
    want, have = formats.expanded(made).tensors, formats.expanded(file).tensors
    both = [key for key in want if key in have and want[key].spec == have[key].spec]
    charges.reading(want[key] for key in both)
    charges.reading(have[key] for key in both)
    done, total = 0, 2 * sum(want[key].nbytes for key in both)

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    found: list[Difference] = []
    for key in (*want, *(key for key in have if key not in want)):
        if key not in have:
            found.append(Difference(key, f"the recipe makes it, {want[key].spec}, and the file lacks it"))
        elif key not in want:
            found.append(Difference(key, f"the file has it, {have[key].spec}, and the recipe does not make it"))
        elif want[key].spec != have[key].spec:
            found.append(Difference(key, f"the recipe makes {want[key].spec}, the file has {have[key].spec}"))
        elif differing := _differing(key, want[key], have[key], tick):
            unit = "element" if want[key].dtype.bits >= 8 else "byte"
            found.append(
                Difference(key, f"{differing} {unit}{'s' if differing > 1 else ''} not as the recipe makes them")
            )
    lines = tuple(rule.text for rule in recipe.rules)
    return Proof(source, lines, recorded, len(both), total // 2, tuple(found))


def _differing(key: str, want: TensorRef, have: TensorRef, tick: Callable[[int], None]) -> int:
    """The elements that differ, of tensors of one dtype and shape; bytes where elements share them."""
    import numpy as np

    lenient, count = nonfinite.can_be(want.dtype) and _is_computed(want.source), 0
    width = want.dtype.itemsize if want.dtype.bits >= 8 else 1
    try:
        for left, right in zip(in_steps(want, _STEP), in_steps(have, _STEP), strict=True):
            if left != right:
                pair = [np.frombuffer(side, np.uint8).reshape(-1, width) for side in (left, right)]
                apart = (pair[0] != pair[1]).any(1)
                if lenient:
                    apart &= ~(nonfinite.nan_and_inf(left, want.dtype)[0] & nonfinite.nan_and_inf(right, want.dtype)[0])
                count += int(apart.sum())
            tick(len(left) + len(right))
    except InputError as error:
        error.key = error.key or key
        raise
    return count


def _is_computed(source: Source) -> bool:
    """Whether any value is made, and not only moved."""
    if isinstance(source, Pieces):
        return any(_is_computed(part.source) for part in source.parts)
    if not isinstance(source, Apply):
        return isinstance(source, Fill)
    moved = source.kernel.moves_only or source.kernel.moves
    return not moved or any(_is_computed(part.source) for part in source.inputs)


def recorded_recipe(found: Provenance | None) -> Recipe:
    """The rules that a file says it was made by; they are text of our own language, and run no code.

    They are somebody else's words nevertheless: UsageError where there are none, or where their patterns could take
    for ever.  RuleError for lines that are no rules.
    """
    if found is None or found.problem:
        why = f": {found.problem}" if found is not None else ""
        raise UsageError(
            f"the file records no recipe that could be replayed{why}; give the rules with --rule or --recipe"
        )
    if found.rules is None or len(found.rules) > _MOST_RULES:
        raise UsageError("the file records too many rules to be replayed; give them with --recipe")
    recipe, steps = Recipe.of(found.rules), _Steps()
    return replace(recipe, rules=tuple(_patient(rule, steps) for rule in recipe.rules))


@dataclass
class _Steps:
    """What is left of the steps that all recorded rules may take together."""

    left: int = _MOST_STEPS


def _patient(rule: Rule, steps: _Steps) -> Rule:
    """The same rule; it refuses names on which its pattern could take very long, and to make names without end."""
    forms = [_form(pattern) for pattern in _patterns(rule)]
    template = "".join((rule.args.get("template", ""), *rule.args.get("templates", ())))
    if None in forms:
        raise _impatient(rule, "take very long")

    def match(args: Args, keys: Names, target: Target | None) -> Iterator[Match]:
        steps.left -= sum(form.steps(keys) for form in forms if form is not None)
        if steps.left < 0:
            raise _impatient(rule, f"take very long on {len(keys)} names")
        longest, left = max(map(len, keys), default=0), _MOST_CHARACTERS
        if template and (longest + 1) * (len(template) + template.count("\\") * longest) > left:
            raise _impatient(rule, "make names without end")
        for found in rule.operation.match(args, keys, target):
            left -= sum(map(len, found.outputs))
            if left < 0:
                raise _impatient(rule, "make names without end")
            yield found

    return replace(rule, operation=replace(rule.operation, match=match))


def check_memory(made: Checkpoint) -> None:
    """LimitError for what a recorded recipe makes that would take too much memory at once."""
    limits = current()
    for key, ref in made.items():
        if (needed := evaluate.holds(ref)) > limits.view_bytes:
            words = f"to make it as the file records takes {needed} bytes of memory at once"
            raise LimitError(words, "view_bytes", limits.view_bytes, key=key)


def _patterns(rule: Rule) -> Iterator[str]:
    """The texts of all patterns of a rule."""
    for value in rule.args.values():
        for pattern in value if isinstance(value, tuple) else (value,):
            if isinstance(pattern, Numbered):
                yield pattern.text.replace("{i}", r"\d+")
            elif isinstance(pattern, re.Pattern):
                yield pattern.pattern


def _impatient(rule: Rule, what: str) -> UsageError:
    line = brief(shown(rule.text))
    return UsageError(f"the file records `{line}`, whose pattern may {what}; if you trust it, give it by --rule")


@dataclass(frozen=True)
class _Form:
    """What of a pattern tells how long it can take: what it `repeats`, where it has `choices`, whether it is tried at
    the beginning of a name alone."""

    repeats: int
    choices: int
    anchored: bool

    def steps(self, names: Iterable[str]) -> int:
        """At most about so many steps on these names."""
        power = self.repeats + (not self.anchored)
        total: int = sum((len(name) + 1) ** power for name in names)
        return total << min(self.choices, 40)


def _form(pattern: str) -> _Form | None:
    """The form of a pattern; None where it repeats a group, or repeats anything more than a few times: what can take
    exponential time, or a high power of the name's length.  Many that would not are among these.

    >>> _form(r"(a+)+$"), _form(r"^layers\\.(\\d+)\\.(.*)$"), _form(r"(?:a|b)?\\(x\\)+?[)*|]")
    (None, _Form(repeats=2, choices=0, anchored=True), _Form(repeats=1, choices=2, anchored=False))
    """
    if len(pattern) > _LONGEST or any(ord(char) > _WIDE for char in pattern) or re.search(r"\\[1-9]", pattern):
        return None
    bare = _LITERAL.sub("x", pattern)
    if "[" in bare or ")*" in bare or ")+" in bare or "){" in bare:
        return None
    if not all(_GROUP.match(bare, found.start()) for found in re.finditer(r"\(", bare)):
        return None
    repeats = sum(map(bare.count, "*+{"))
    choices = bare.count("|") + len(re.findall(r"(?<![(*+}?])\?", bare))
    anchored = pattern.startswith("^") and "|" not in pattern
    return None if repeats > _MOST_REPEATS else _Form(repeats, choices, anchored)


def claims(said: Provenance, source: Checkpoint, target: Target | None) -> tuple[str, ...]:
    """Where the source and the target are not those that a file says it was made of and to fit."""
    found = []
    header = header_digest((key, ref.spec) for key, ref in source.items())
    if header != said.header:
        found.append(f"the file says that its source has the header {said.header}, and this one has {header}")
    wanted = None if target is None else header_digest((key, entry.spec) for key, entry in target.entries.items())
    if wanted != said.target:
        found.append(f"the file says that its target has the header {said.target}, and this one has {wanted}")
    return tuple(found)


def refuted(source: str, recipe: Recipe, *texts: str) -> Proof:
    """The answer where what a file says of its source is not so, and nothing has to be compared."""
    lines = tuple(rule.text for rule in recipe.rules)
    return Proof(source, lines, True, 0, 0, tuple(Difference("", text) for text in texts))

"""What is left on both sides, and whether that may be: a new head, a buffer, or a parameter that nobody thought of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from functools import cached_property

from ckptsurgeon.aligner import matching, reasons, relations, scores, slots
from ckptsurgeon.aligner.alignment import Edge, Leftover, Question
from ckptsurgeon.aligner.groups import Group
from ckptsurgeon.aligner.runs import pattern
from ckptsurgeon.aligner.slots import Slot
from ckptsurgeon.aligner.units import Leaf, Side, Unit

_SHOWN = 4
_MOST_ASKED = 20
_MOST_PAIRS = 100_000


def ties(target: Side, done: set[str]) -> list[tuple[str, str]]:
    """Names of the target that share a parameter with one that is there: the one that is there, and the other."""
    made = []
    for group in target.ties:
        there = [key for key in group if key in done]
        made += [(there[0], key) for key in group if there and key not in done]
    return made


class Left:
    """The keys that no edge touches."""

    def __init__(
        self,
        source: Side,
        target: Side,
        groups: Sequence[Group],
        edges: Sequence[Edge],
        ties: Sequence[tuple[str, str]],
    ) -> None:
        self.source, self.target, self.groups = source, target, groups
        self.used = {key for edge in edges for key in edge.sources}
        self.sure = {key for edge in edges if edge.grade != "open" for key in edge.targets} | {key for _, key in ties}
        self.asked = {key for edge in edges if edge.grade == "open" for key in edge.targets} - self.sure
        self.open_pairs = self._open_pairs()
        self.joins = self._joins()
        self.asked |= {key for question, _ in self.joins for key in question}
        self._known: dict[Hashable, str] = {}
        self.spare = {path for group in groups for path in group.spare[1]}

    def _open_pairs(self) -> list[tuple[Unit, list[Unit]]]:
        """Slots of the target without a partner, with those of the source without one that would fit in shape."""
        made = []
        for group in self.groups:
            sources: dict[Hashable, list[Slot]] = defaultdict(list)
            for slot in group.outcome.sources:
                sources[matching.signature(slot)].append(slot)
            known: dict[Hashable, list[Slot]] = {}
            for slot in group.outcome.targets:
                sign = matching.signature(slot)
                if sign not in known:
                    fits = [some for some in sources.values() if scores.fitting(some[0], slot) is not None]
                    known[sign] = [one for some in fits for one in some[:_SHOWN]][:_SHOWN]
                if known[sign]:
                    made.append((next(slot.every()), [next(one.every()) for one in known[sign]]))
        return made

    def _joins(self) -> list[tuple[tuple[str, ...], Question]]:
        """Keys of the target that may be cut from, or joined to, what has a name that says nothing; and the question.

        A tensor is asked about once."""
        made: list[tuple[tuple[str, ...], Question]] = []
        seen: set[str] = set()
        for group in self.groups:
            out = group.outcome
            found = [(parts, whole, True) for parts, whole in slots.unsaid_joins(out.targets, out.sources)]
            found += [(parts, whole, False) for parts, whole in slots.unsaid_joins(out.sources, out.targets)]
            for parts, whole, is_cut in found:
                targets = parts if is_cut else (whole,)
                keys = tuple(leaf.key for slot in targets for unit in slot.every() for leaf in unit.needed.values())
                if seen.isdisjoint(keys):
                    seen.update(keys)
                    made.append((keys, reasons.joined(parts, whole, is_cut)))
        return made

    def questions(self) -> list[Question]:
        made = [question for _, question in self.joins]
        for unit, others in self.open_pairs[:_MOST_ASKED]:
            names = ", ".join(repr(other.path) for other in others)
            answers = tuple(f"--hint '{other.path}={unit.path}'" for other in others)
            made.append(
                Question(
                    f"{unit.path!r} may come from {names}, but nothing in their names says so",
                    tuple(o.path for o in others),
                    (unit.path,),
                    answers,
                )
            )
        if (more := len(self.open_pairs) - _MOST_ASKED) > 0:
            made.append(Question(f"{more} more parts of {self.target.label} may come from several of the source"))
        for group in self.groups:
            for small, large in group.outcome.crowds:
                text = (
                    f"{len(small)} tensors of one shape are to go to {len(large)}, and names do not tell which to which"
                )
                made.append(
                    Question(text, tuple(slot.path for slot in small[:4]), tuple(slot.path for slot in large[:4]))
                )
        return made

    def missing(self) -> tuple[Leftover, ...]:
        open_ = {unit.path for unit, _ in self.open_pairs}
        left = [leaf for leaf in self.target.leaves if leaf.key not in self.sure and leaf.key not in self.asked]
        heads = self._heads()
        made = []
        paths = {leaf.key: unit.path for unit in self.target.units for leaf in unit.leaves.values()}
        whole = Counter(self._spare_of(paths[leaf.key]) for leaf in left)
        needed = Counter(self._spare_of(leaf_path) for leaf_path in paths.values())
        for leaf in left:
            path = paths[leaf.key]
            spare = self._spare_of(path)
            if leaf.computed:
                kind, text = "computed", "a buffer that the model computes itself"
            elif path in open_:
                kind, text = "open", "the source has tensors that would fit, and nothing says which"
            elif spare and whole[spare] == needed[spare]:
                kind, text = (
                    "block",
                    f"the source has no block for {spare!r}, as it has for the others of {pattern(spare)}",
                )
            elif fits := self._could_be(leaf, path):
                kind, text = "open", f"{fits!r} of the source is not used, and may hold it"
            elif path in heads:
                kind, text = "other size", f"in the source {heads[path]}"
            else:
                kind, text = "new", "nothing in the source is of its shape"
            made.append(Leftover(leaf.key, leaf.shape, kind, text))
        return tuple(made)

    def _could_be(self, leaf: Leaf, path: str) -> str:
        """A key of the source that is not used and could hold a tensor, whole or as a part; "" if there is none."""
        own = self._group_of(path)
        key = leaf.shape, id(own)
        if key not in self._known:
            self._known[key] = self._holder(leaf, own)
        return self._known[key]

    def _holder(self, leaf: Leaf, own: Group | None) -> str:
        for other in self._idle:
            if relations.relation(other.shape, leaf.shape) is not None or (
                other.numel == leaf.numel and leaf.numel > 1
            ):
                return other.key
            if own is not None and self._inside.get(other.key) is own and _is_part(leaf, other):
                return other.key
        return ""

    @cached_property
    def _idle(self) -> list[Leaf]:
        """Keys of the source that are not used, one for each shape and group."""
        found: dict[object, Leaf] = {}
        for leaf in self.source.leaves:
            if leaf.key not in self.used and not leaf.computed:
                found.setdefault((leaf.shape, id(self._inside.get(leaf.key))), leaf)
        return list(found.values())

    @cached_property
    def _inside(self) -> dict[str, Group]:
        """Keys of the source that are left in a group of blocks."""
        return {
            leaf.key: group
            for group in self.groups
            if group.meeting is not None
            for slot in group.outcome.sources
            for unit in slot.every()
            for leaf in unit.leaves.values()
        }

    def _group_of(self, path: str) -> Group | None:
        return self._targets.get(path)

    @cached_property
    def _targets(self) -> dict[str, Group]:
        return {
            unit.path: group
            for group in self.groups
            if group.meeting is not None
            for slot in group.outcome.targets
            for unit in slot.every()
        }

    def _spare_of(self, path: str) -> str:
        """The block without a partner that a path is in; "" if in none."""
        at = len(path)
        while at > 0:
            if path[:at] in self.spare:
                return path[:at]
            at = path.rfind(".", 0, at)
        return ""

    def _heads(self) -> dict[str, str]:
        """Units of the target whose like in the source has another size."""
        made: dict[str, str] = {}
        for group in self.groups:
            if len(group.outcome.targets) * len(group.outcome.sources) > _MOST_PAIRS:
                continue
            for slot in group.outcome.targets:
                for other in group.outcome.sources:
                    alike = set(slot.words) & set(other.words) or slot.path == other.path
                    if alike and set(slot.shapes) == set(other.shapes):
                        leaf = next(iter(next(other.every()).needed.values()))
                        for unit in slot.every():
                            made.setdefault(unit.path, f"{leaf.key!r} is {list(leaf.shape)}")
        return made

    def unused(self) -> tuple[Leftover, ...]:
        again = {key: group for group in self.source.ties for key in group if self.used & set(group)}
        made = []
        for leaf in (*self.source.leaves, *self.source.again):
            if leaf.key in self.used:
                continue
            if leaf.key in again:
                first = next(key for key in again[leaf.key] if key in self.used)
                kind, text = "again", f"another name of {first!r}"
            elif leaf.computed:
                kind, text = "computed", "a buffer that models compute themselves"
            else:
                kind, text = "unused", "the target has no place for it"
            made.append(Leftover(leaf.key, leaf.shape, kind, text))
        return tuple(made)

    def agreement(self, also: Collection[str] = ()) -> float:
        """The share of the elements of the target's parameters that come from the source, or are in `also`."""
        needed = [leaf for leaf in self.target.leaves if not leaf.computed]
        whole = sum(leaf.numel for leaf in needed)
        return sum(leaf.numel for leaf in needed if leaf.key in self.sure or leaf.key in also) / whole if whole else 0.0


def _is_part(a: Leaf, b: Leaf) -> bool:
    """Whether one tensor may be a part of the other: it has so many elements fewer, a whole number of times."""
    small, large = sorted((a.numel, b.numel))
    return small > 1 and large % small == 0

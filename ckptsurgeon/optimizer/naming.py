"""How names of one thing and keys of another are the same but for a wrapper around all of one side."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """`name = add + key`, of a key that begins with `cut`, without that."""

    add: str = ""
    cut: str = ""

    def key(self, name: str) -> str | None:
        """The key that a name stands for; None where it cannot be one."""
        return self.cut + name.removeprefix(self.add) if name.startswith(self.add) else None

    def name(self, key: str) -> str:
        """The name of a key, also of one that a surgery made."""
        return self.add + key.removeprefix(self.cut)


def naming(names: Iterable[str], keys: Collection[str], prefixes: Sequence[str]) -> Naming | None:
    """The naming by which every name is one of the keys, which all begin with `prefixes`; None where there is none."""
    names = list(names)
    for found in _guesses(names, prefixes):
        if all(found.key(name) in keys for name in names):
            return found
    return None


def _guesses(names: list[str], prefixes: Sequence[str]) -> Iterable[Naming]:
    yield Naming()
    for prefix in prefixes_of(names):
        yield Naming(add=prefix)
    for prefix in prefixes:
        yield Naming(cut=prefix)


def prefixes_of(names: Iterable[str]) -> list[str]:
    """The runs of leading segments that all names have, shortest first."""
    split = [name.split(".")[:-1] for name in names]
    common = split[0] if split else []
    for segments in split:
        shared = next((i for i, (a, b) in enumerate(zip(common, segments, strict=False)) if a != b), len(segments))
        common = common[:shared]
    return [".".join(common[: end + 1]) + "." for end in range(len(common))]

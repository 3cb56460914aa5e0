"""The zip kinds of torch: sound archives whose pickles, members and directory are changed."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

from .draw import Draw, number, pick, scratched, text
from .pickles import Ops, parsed, pickled
from .zips import NAMES, End, Member, assembled, lied

_CODE = (
    "class M(Module):", "class M(NamedTuple):", "class (", "class x", "  __parameters__ = [\"weight\", \"a\", ]",
    "  __buffers__ = [\"a\", ]", "  weight : Tensor", "  a : Tensor", "  __annotations__[\"0\"] = Tensor",
    "  __annotations__[\"\\x41\\777\"] = Tensor", "  training : bool", "  def forward(self: M) -> None:",
    "  __annotations__[\"\"] = __torch__.m.Inner", "class Inner(Module):", "  __annotations__[\"\\",
    "  __buffers__ = [",
    "  x : Final[int] = 3", "", "\0", "import os", "  __parameters__ = ['\\", "  a.b : Tensor",
)  # fmt: skip


@dataclass
class Archive:
    """A sound archive in parts: its members, and the opcodes of those that are pickles."""

    members: list[tuple[bytes, bytes]]
    pickles: dict[bytes, Ops]

    @classmethod
    def of(cls, raw: bytes) -> Archive:
        with zipfile.ZipFile(io.BytesIO(raw)) as opened:
            members = [(name.encode(), opened.read(name)) for name in opened.namelist()]
        pickles = {name: parsed(data) for name, data in members if name.endswith(b".pkl")}
        return cls(members, pickles)


def archive(draw: Draw, seeds: Sequence[Archive], pool: Sequence[Ops]) -> bytes:
    """A sound archive with changes in its pickles, then its members, then its directory."""
    seed = pick(draw, seeds)
    names = list(seed.pickles)
    members = [Member(name, data) for name, data in seed.members]
    how = draw.below(8)
    if how < 5 and names:
        name = pick(draw, names)
        own = [seed.pickles[name]]
        raw = pickled(draw, own if draw.below(3) < 2 else pool)
        for one in members:
            if one.name == name:
                one.data = raw
    if how in (4, 5, 6):
        _members(draw, members)
    end = End()
    if draw.below(4) == 3:
        for _ in range(1 + draw.below(2)):
            lied(draw, members, end)
    made = assembled(members, end)
    return scratched(draw, made) if draw.below(12) == 11 else made


def _members(draw: Draw, members: list[Member]) -> None:  # noqa: C901 - a line a change
    for _ in range(1 + draw.below(2)):
        if not members:
            return
        at, how = draw.below(len(members)), draw.below(8)
        one = members[at]
        if how == 0:
            del members[at]
        elif how == 1:
            members.insert(draw.below(len(members)), Member(one.name, one.data))
        elif how == 2:
            one.name = pick(draw, NAMES) if draw.below(2) else one.name + text(draw).encode("utf-8", "replace")
        elif how == 3:
            one.data = one.data[: number(draw) % (len(one.data) + 1)]
        elif how == 4:
            one.data += draw.raw(1 + draw.below(9))
        elif how == 5 and one.name.endswith(b".py"):
            one.data = _code(draw, one.data)
        elif how == 6 and one.name.endswith(b"byteorder"):
            one.data = pick(draw, (b"big", b"little", b"", b"middle", b"little\n", b"x" * 100))
        elif how == 7:
            one.method = 8
        else:
            one.data = scratched(draw, one.data)


def _code(draw: Draw, raw: bytes) -> bytes:
    """Code of a TorchScript archive with other lines."""
    lines = raw.decode("utf-8", "replace").split("\n")
    for _ in range(1 + draw.below(3)):
        at, how = draw.below(len(lines)), draw.below(4)
        if how == 0:
            lines.insert(at, pick(draw, _CODE))
        elif how == 1:
            lines[at] = pick(draw, _CODE)
        elif how == 2:
            lines.insert(at, lines[at])
        elif len(lines) > 1:
            del lines[at]
    return "\n".join(lines).encode()

"""Whatever the machine does, there is the old state or the new one, the error is ours, and nothing is left over."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from faulty import Faults, Tree, every, in_a_child, tree, visible
from helpers import bits, deflated
from safetensors.torch import save_file

import ckptsurgeon as cs

State = dict[str, torch.Tensor]
BIG = 20_000
"""Elements of a tensor that is not put together in memory with its neighbours."""


def state(seed: int) -> dict[str, torch.Tensor]:
    """Three large tensors and two small ones, other values for every seed."""
    chance = torch.Generator().manual_seed(seed)
    made = {f"layers.{i}.weight": torch.randn(200, BIG // 200, generator=chance) for i in range(3)}
    return made | {"layers.bias": torch.randn(7, generator=chance), "layers.scale": torch.tensor(float(seed))}


def pth(name: str, seed: int = 0) -> None:
    torch.save(state(seed), name)


def safe(name: str, seed: int = 0) -> None:
    save_file(state(seed), name)


def packed() -> None:
    pth("a.pth")
    deflated("a.pth")


def bundle() -> None:
    torch.save({"epoch": 3, "state_dict": state(0), "seen": [torch.arange(5), "x"]}, "a.pth")


def linked() -> None:
    os.mkdir("real")
    pth("real/a.pth", 1)
    os.symlink("real/a.pth", "b.pth")
    pth("a.pth")


def over(name: str, **how: Any) -> Callable[[], None]:
    """A source, and an older output of another one."""

    def make() -> None:
        pth("old.pth", 1)
        cs.convert("old.pth", name, **how)
        os.unlink("old.pth")
        pth("a.pth")

    return make


def both(*steps: Callable[[], object]) -> Callable[[], None]:
    def make() -> None:
        for step in steps:
            step()

    return make


RULES = ["layers => blocks"]
COMPUTED = [r"transpose layers\.\d", r"cast layers\.[01] bf16", "layers => blocks"]


def remap(source: str, output: str, rules: list[str] = RULES, **how: Any) -> Callable[[], Any]:
    return lambda: cs.remap(source, output, rules, **{"jobs": 1, **how})


def in_place(path: str, rules: list[str]) -> Callable[[], Any]:
    """Also when it was done before: then no rule matches."""
    return lambda: cs.remap_in_place(path, rules, allow_unused=True)


def shards_in_place() -> None:
    pth("a.pth")
    cs.convert("a.pth", "m/", shard_size=100_000)
    os.unlink("a.pth")


@dataclass(frozen=True)
class Case:
    """`make` makes what is there before, `do` is what may fail, `again` does it whatever is there by then, and `read`
    is what readers open; `parts` tells that this is more than one file, which take their places one by one."""

    make: Callable[[], object]
    do: Callable[[], Any]
    again: Callable[[], Any]
    read: str
    parts: bool = False
    in_place: bool = False


def written(make: Callable[[], object], source: str, output: str, rules: list[str] = RULES, **how: Any) -> Case:
    again = {**how, "force": True, "allow_unused": True}
    return Case(
        make,
        remap(source, output, rules, **how),
        remap(source, output, rules, **again),
        output.rstrip("/"),
        "m/" in output,
    )


def changed(make: Callable[[], object], path: str, rules: list[str]) -> Case:
    return Case(make, in_place(path, rules), in_place(path, rules), path, in_place=True)


PTH, SAFE, SMALL = partial(pth, "a.pth"), partial(safe, "a.safetensors"), 100_000
INDEX = "m/model.safetensors.index.json"
BINS = "m/pytorch_model.bin.index.json"
CASES: dict[str, Case] = {
    "a zip": written(SAFE, "a.safetensors", "b.pth"),
    "a safetensors file": written(PTH, "a.pth", "b.safetensors"),
    "over a zip": written(over("b.pth"), "a.pth", "b.pth", force=True),
    "over a safetensors file": written(over("b.safetensors"), "a.pth", "b.safetensors", force=True),
    "over its own source": written(PTH, "a.pth", "a.pth", force=True),
    "through a link": written(linked, "a.pth", "b.pth", force=True),
    "with extras": written(bundle, "a.pth", "b.pth", keep_extras=True),
    "computed": written(PTH, "a.pth", "b.pth", COMPUTED),
    "spooled": written(packed, "a.pth", "b.safetensors", COMPUTED),
    "spooled over a file": written(both(packed, partial(pth, "b.pth", 1)), "a.pth", "b.pth", COMPUTED, force=True),
    "shards in a new folder": written(PTH, "a.pth", "m/", shard_size=SMALL),
    "shards in a folder": written(both(PTH, partial(os.mkdir, "m")), "a.pth", "m/", shard_size=SMALL),
    "over more shards": written(over("m/", shard_size=1), "a.pth", "m/", shard_size=SMALL, force=True),
    "over shards of the same names": written(over("m/", shard_size=SMALL), "a.pth", "m/", shard_size=SMALL, force=True),
    "shards over one file": written(over("m/"), "a.pth", "m/", shard_size=SMALL, force=True),
    "one file over shards": written(over("m/", shard_size=SMALL), "a.pth", "m/", force=True),
    "zips as shards": written(both(PTH, partial(os.mkdir, "m")), "a.pth", BINS, shard_size=SMALL),
    "in place": changed(SAFE, "a.safetensors", RULES),
    "in place, cut off": changed(SAFE, "a.safetensors", [*RULES, "drop scale$"]),
    "shards in place": changed(shards_in_place, INDEX, RULES),
}


class World:
    """A case before and after, and the way back to before."""

    def __init__(self, case: Case) -> None:
        os.mkdir("w")
        os.chdir("w")
        case.make()
        self.case, self.old, self.state = case, tree(), None
        self.before: State | None = None
        self.checked: set[object] = set()
        self.before = self.found()
        os.rename("../w", "../before")
        self.back()
        case.do()
        self.new = tree()
        self.state = cs.open(case.read).state_dict()
        assert self.old != self.new

    def back(self, to: str = "before") -> None:
        os.chdir("..")
        shutil.rmtree("w", ignore_errors=True)
        shutil.copytree(to, "w", symlinks=True)
        os.chdir("w")

    def fails(self, fault: Faults) -> str | None:
        """Do it with a fault, from the beginning, and return what the error says; None when there is none."""
        self.back()
        with fault.active():
            try:
                self.case.do()
            except (cs.OutputError, cs.InputError) as error:
                return str(error)
        return None

    def killed(self, fault: Faults) -> int:
        """Do it in a process of its own, with a fault that it does not survive: its exit code, or minus the signal."""
        read, write = os.pipe()

        def do() -> None:
            try:
                with fault.active():
                    self.case.do()
            finally:
                os.write(write, b"%d" % len(fault.seen))

        status = os.waitpid(in_a_child(do), 0)[1]
        os.close(write)
        made = os.read(read, 100)  # nothing, where it was killed
        os.close(read)
        fault.seen = [""] * (int(made) if made else fault.at)
        return os.waitstatus_to_exitcode(status)

    def check_killed(self) -> None:
        """What a process leaves that could not tidy up is a whole checkpoint, or parts of one that wait for a repair;
        a repair makes it whole, and doing it again leaves the new one and nothing else."""
        now = tree()
        if outline(now) in self.checked:
            return
        self.checked.add(outline(now))
        if not self.case.parts and not self.case.in_place:
            assert visible(now) in (self.old, self.new), difference(visible(now), self.old, self.new)
        if self.found() is None and self.before is not None:
            assert self.case.parts
        shutil.rmtree("../left", ignore_errors=True)
        shutil.copytree(".", "../left", symlinks=True)
        self.check_repair()
        self.back("left")
        assert tree() == now
        self.case.again()
        assert visible(tree()) == tree(), sorted(tree())
        assert same(self.found(), self.state)

    def found(self) -> State | None:
        """What readers find, which is one of the two; None where there is nothing, or it says that a repair is due."""
        try:
            state = cs.open(self.case.read).state_dict()
        except cs.InputError as error:
            nothing = self.before is None and not is_begun()
            assert nothing or "`ckpt verify --repair`" in str(error), error
            return None
        known = [one for one in (self.before, self.state) if one is not None]
        assert not known or any(same(state, one) for one in known)
        return state

    def which(self, call: str = "", said: str | None = None) -> str:
        """Whether the files are those of before or after, by their names, modes and bytes.

        When it was a `call` that removes something that failed, hidden files may be there still, until it is done
        again; when the error says that a repair is needed, readers see one of the two before and after that."""
        now = tree()
        if said is not None and "`ckpt verify --repair`" in said:
            self.check_repair()
            now = tree()
        elif call in ("unlink", "rmdir") and visible(now) != now:
            self.case.again()
            assert visible(tree()) == tree(), sorted(tree())
            now = visible(now)
        assert now in (self.old, self.new), difference(now, self.old, self.new)
        return "old" if now == self.old else "new"

    def check_repair(self) -> None:
        """It makes whole what is begun; of one file readers find the same before and after it."""
        found = self.found()
        if found is None and not is_begun():
            return  # there is nothing that it could make whole
        assert cs.verify(self.case.read, repair=True).ok
        after = self.found()
        assert after is not None
        assert found is None or same(after, found) or (self.case.parts and same(after, self.state))


def is_begun() -> bool:
    """Whether several files are on the way to their places."""
    return any(name.endswith(".journal") for name in tree())


def outline(found: Tree) -> object:
    """What readers and a repair go by: what is not yet published may be what it likes."""
    hidden = {re.sub(r"[0-9a-f]{8}\.part", "part", name): len(raw) for name, (_, raw) in found.items()}
    return frozenset(visible(found).items()), frozenset(
        (name, size if name.endswith((".inplace", ".journal")) else 0) for name, size in hidden.items()
    )


def same(one: State | None, other: State | None) -> bool:
    assert one is not None
    assert other is not None
    return list(one) == list(other) and all(torch.equal(bits(one[key]), bits(other[key])) for key in one)


def difference(now: Tree, old: Tree, new: Tree) -> str:
    lines = [f"neither old nor new: {sorted(now)}"]
    for word, other in (("old", old), ("new", new)):
        names = [name for name in {*now, *other} if now.get(name) != other.get(name)]
        lines.append(f"{word}: {sorted(names)}")
    return "\n".join(lines)


@pytest.fixture
def world(case: str) -> World:
    return World(CASES[case])


ALL = pytest.mark.parametrize("case", CASES)


@ALL
@pytest.mark.parametrize("how", ["fail", "full"])
def test_a_call_that_fails_leaves_the_old_files_or_the_new_ones(world: World, how: str) -> None:
    """Every call, one after another; and what the error says of the outcome is true."""
    failed = 0
    for fault in every(how):
        said = world.fails(fault)
        words = f"{fault.at}: {fault.seen[fault.at - 1 : fault.at]}: {said}"
        found = world.which(fault.last, said)
        if said is None:
            assert found == "new", words
            continue
        failed += 1
        assert "\n" not in said
        assert (found == "new") == ("new file is in its place" in said or "the change is made" in said), words
        assert (found == "old") == ("nothing was written" in said or "puts back what was begun" in said), words
    assert failed > 3


@pytest.mark.no_cover
@ALL
@pytest.mark.parametrize("how", ["dead", "torn"])
def test_where_the_disk_is_gone_readers_see_the_old_or_the_new(world: World, how: str) -> None:
    """Nothing can be tidied up any more; what was done until then is what a killed process leaves.  Torn is every
    write: half of it is done."""
    for fault in every(how):
        if world.fails(fault) is None:
            assert visible(tree()) == world.new
        world.check_killed()


KILLED = ("over a zip", "spooled", "shards in a new folder", "over shards of the same names", "in place, cut off")


@pytest.mark.no_cover
@pytest.mark.parametrize("case", KILLED)
def test_a_process_that_is_killed_leaves_the_old_or_the_new(world: World) -> None:
    """In front of every call, by a signal that nothing can catch."""
    for fault in every("kill"):
        world.back()
        code = world.killed(fault)
        if fault.reached:
            assert code == -signal.SIGKILL
            world.check_killed()
        else:
            assert code == 0
            assert tree() == world.new


@ALL
@pytest.mark.parametrize("how", ["stop", "stopped"])
def test_a_command_that_is_stopped_tidies_up(world: World, how: str) -> None:
    """Ctrl-C and SIGTERM come as exceptions, in front of a call or behind it."""
    for fault in every(how):
        world.back()
        stopped = False
        with fault.active():
            try:
                world.case.do()
            except KeyboardInterrupt:
                stopped = True
        assert stopped or world.which() == "new"
        if how == "stop" and fault.last not in ("unlink", "rmdir") and visible(tree()) == tree():
            world.which(fault.last)
        else:
            world.check_killed()


@ALL
def test_writes_of_half_of_the_bytes_are_gone_on_with(world: World) -> None:
    for at in (1, 2, 3):
        assert world.fails(Faults("short", at)) is None
        assert world.which() == "new"

"""A real machine that says no: a full disk, a limit on the size of files, signals, sources that cannot be read."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import READING, every, in_a_child, tree
from helpers import deflated
from safetensors.torch import save_file
from test_faults import COMPUTED, RULES, State, state

import ckptsurgeon as cs
from ckptsurgeon.stream import flushing

OUTPUTS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "a zip": ("b.pth", RULES, {}),
    "a safetensors file": ("b.safetensors", RULES, {}),
    "computed": ("b.pth", COMPUTED, {}),
    "shards": ("m/", RULES, {"shard_size": 100_000}),
    "over a file": ("old.pth", RULES, {"force": True}),
    "over shards": ("old/", RULES, {"shard_size": 100_000, "force": True}),
}


def sources() -> None:
    torch.save(state(0), "a.pth")
    torch.save(state(1), "old.pth")
    cs.convert("old.pth", "old/", shard_size=1)


def said_in_a_child(do: Callable[[], Any]) -> str:
    """What the error of ours says that comes of it in a process of its own; nothing when there is none."""
    read, write = os.pipe()

    def tell() -> None:
        try:
            do()
        except cs.CkptError as error:
            os.write(write, str(error).encode())

    status = os.waitpid(in_a_child(tell), 0)[1]
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read().decode()
    assert os.waitstatus_to_exitcode(status) == 0, "an error that is none of ours, or a signal"
    return said


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_limit_on_the_size_of_files_is_a_full_disk(case: str) -> None:
    """Files of more bytes than that end with a signal, which Python ignores, and an error of the system."""
    sources()
    output, rules, how = OUTPUTS[case]
    before = tree()
    for limit in (0, 1, 100, 4096, 50_000, 70_000):

        def do(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            cs.remap("a.pth", output, rules, **how)

        said = said_in_a_child(do)
        assert said.endswith(": the file grows too large; nothing was written"), said
        assert tree() == before


def test_the_command_says_it_in_one_line_and_is_exit_2() -> None:
    sources()
    before = tree()
    command = [sys.executable, "-c", "from ckptsurgeon.cli.app import main; main()", "convert", "a.pth", "b.pth"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    ran = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "ckpt: error: b.pth: the file grows too large; nothing was written\n"
    assert tree() == before


FULL = """
import json, os, shutil, sys
sys.path[:0] = [{tests!r}]
os.environ["HOME"] = os.getcwd()
import ckptsurgeon as cs
from faulty import tree
from test_machine import OUTPUTS, sources
sources()
import torch
from test_faults import state
from safetensors.torch import save_file
save_file(state(0), "in.safetensors")
told = {{}}
for kept in (0, 4096, 100_000):
    before = tree()
    room = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize
    with open("filler", "wb") as file:
        file.write(bytes(max(0, room - kept)))
    for case, (output, rules, how) in OUTPUTS.items():
        try:
            cs.remap("a.pth", output, rules, **how)
            told[f"{{case}} {{kept}}"] = "written"
        except cs.OutputError as error:
            told[f"{{case}} {{kept}}"] = str(error)
        now = tree()
        assert {{name: now[name] for name in now if name != "filler"}} == before, case
    if kept == 0:
        try:
            cs.remap_in_place("in.safetensors", ["layers => blocks"])
            told["in place"] = "written"
        except cs.OutputError as error:
            told["in place"] = str(error)
        assert {{name: raw for name, raw in tree().items() if name != "filler"}} == before
    os.unlink("filler")
print(json.dumps(told))
"""


def test_a_disk_that_is_really_full() -> None:
    """A file system in memory of 2 MiB, in a mount namespace of its own, which ends with its process."""
    os.mkdir("disk")
    script = FULL.format(tests=str(Path(__file__).parent))
    mount = f'mount -t tmpfs -o size=2m tmpfs disk && cd disk && exec {sys.executable} -W ignore -c "$SCRIPT"'
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-r", "-m"]
    ran = subprocess.run(
        [*unshare, "sh", "-c", mount], capture_output=True, text=True, check=False, env={**os.environ, "SCRIPT": script}
    )
    assert ran.returncode == 0, ran.stderr
    import json

    told = json.loads(ran.stdout)
    assert len(told) == 3 * len(OUTPUTS) + 1
    for case, said in told.items():
        assert said.endswith(": the disk is full; nothing was written"), (case, said)
    assert os.listdir("disk") == []


@pytest.mark.parametrize("case", OUTPUTS)
def test_signals_in_the_middle_of_a_call_change_nothing(case: str) -> None:
    """A thousand times a second: what they interrupt is done again."""
    sources()
    output, rules, how = OUTPUTS[case]
    cs.remap("a.pth", output, rules, **how)
    want = cs.open(output).state_dict()
    met = 0

    def meet(number: int, frame: object) -> None:
        nonlocal met
        met += 1

    before = signal.signal(signal.SIGALRM, meet)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(5):
            cs.remap("a.pth", output, rules, **{**how, "force": True})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert met > 0
    assert same(cs.open(output).state_dict(), want)


def same(one: State, other: State) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_flush_that_fails_on_the_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes go out while more are written; what the disk says then is not lost."""
    torch.save({f"l{i}": torch.randn(400_000) for i in range(8)}, "a.pth")
    monkeypatch.setattr(flushing, "_EVERY", 100_000)
    called = threading.Event()

    def fdatasync(descriptor: int) -> None:
        called.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(cs.OutputError, match=r"^b\.pth: Input/output error; nothing was written$"):
        cs.convert("a.pth", "b.pth")
    assert called.is_set()
    assert os.listdir(".") == ["a.pth"]


def test_fewer_threads_than_asked_for_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({f"l{i}": torch.randn(400_000) for i in range(8)}, "a.pth")
    cs.convert("a.pth", "b.pth", jobs=4)
    monkeypatch.setattr(flushing, "_EVERY", 100_000)
    for allowed in (0, 1, 2):
        left, real = allowed, threading.Thread.start

        def start(thread: threading.Thread, real: Callable[[threading.Thread], None] = real) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise RuntimeError("can't start new thread")
            real(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            cs.convert("a.pth", "c.pth", jobs=4, force=True)
        assert Path("c.pth").read_bytes() == Path("b.pth").read_bytes()


# -- sources that cannot be read ---------------------------------------------------------------


def _zip() -> str:
    torch.save(state(0), "a.pth")
    return "a.pth"


def _packed() -> str:
    deflated(_zip())
    return "a.pth"


def _safe() -> str:
    save_file(state(0), "a.safetensors")
    return "a.safetensors"


def _legacy() -> str:
    torch.save(state(0), "a.pth", _use_new_zipfile_serialization=False)
    return "a.pth"


def _shards() -> str:
    cs.convert(_zip(), "m/", shard_size=100_000)
    os.unlink("a.pth")
    return "m"


SOURCES = {"zip": _zip, "deflated": _packed, "safetensors": _safe, "legacy": _legacy, "shards": _shards}


@pytest.mark.parametrize("rules", [[], COMPUTED], ids=["copied", "computed"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_read_that_fails_is_an_error_about_the_source(source: str, rules: list[str]) -> None:
    """Every call that looks at the disk, one after another; no output is left, and later everything works."""
    path = SOURCES[source]()
    before, failed = tree(), 0
    for fault in every("fail", READING):
        said = None
        with fault.active():
            try:
                cs.remap(path, "b.pth", rules, jobs=1)
            except (cs.InputError, cs.OutputError) as error:
                said = str(error)
        words = f"{fault.at}: {fault.last}: {said}"
        if said is None:
            os.unlink("b.pth")
        else:
            failed += 1
            assert "\n" not in said
            assert any(said.startswith(name) for name in (path, "b.pth", os.path.realpath("."))), words
        assert tree() == before, words
    assert failed >= 5


def test_a_failing_cache_fails_no_command(ckpt: Any) -> None:
    """Whatever call to it fails, in a process that has no torch yet; see `test_cache` for its contents."""
    torch.save({"w": torch.ones(2)}, "a.pth")
    Path("net.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 3)\n")
    script = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "import os, errno\nfrom ckptsurgeon.targets import cache\n"
        "from ckptsurgeon import surgery\n"
        "real = {name: getattr(os, name) for name in ('open', 'mkdir', 'replace', 'utime', 'listdir', 'unlink')}\n"
        "failed = []\n"
        "def failing(name):\n"
        "    def call(*args, **how):\n"
        "        if 'ckptsurgeon/targets' in str(args[0]):\n"
        "            failed.append(name)\n"
        "            raise OSError(errno.EIO, 'Input/output error')\n"
        "        return real[name](*args, **how)\n"
        "    return call\n"
        "os.__dict__.update({sys.argv[1]: failing(sys.argv[1])})\n"
        "print(len(surgery.target_of('net.py:make').entries), len(failed))\n"
    )
    for name in ("mkdir", "open"):
        ran = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=False)
        assert ran.stderr == ""
        entries, failed = map(int, ran.stdout.split())
        assert entries == 2
        assert failed > 0, name


def test_the_calls_that_fail_in_tests_are_all_that_the_package_writes_with() -> None:
    """A call of another name would never fail here."""
    import ast

    from conftest import ROOT
    from faulty import CHANGING

    asks = "fspath fsdecode fsencode close getpid lseek sched_getaffinity cpu_count urandom geteuid getcwd environ.get "
    asks += "environ.setdefault dup2 strerror makedirs"
    called = set()
    for path in (ROOT / "ckptsurgeon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.startswith("os.") and not name.startswith("os.path."):
                called.add(name.removeprefix("os.").partition("(")[0])
    assert called - set(asks.split()) - set(CHANGING) - set(READING) == set()


def test_a_source_that_may_not_be_read(ckpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything: the system's refusal is put in its place."""
    torch.save(state(0), "a.pth")
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **how: int) -> int:
        if str(path).endswith("a.pth"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest, **how)

    monkeypatch.setattr(os, "open", refuse)
    ran = ckpt("convert", "a.pth", "b.pth")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "ckpt: error: a.pth: cannot be opened: Permission denied\n"
    assert os.listdir(".") == ["a.pth"]

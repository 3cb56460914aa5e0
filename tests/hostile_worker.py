"""Run every reading verb over hostile files, in a process that an audit hook watches.

    python tests/hostile_worker.py FOLDER NAME…

makes each case in `FOLDER/NAME/case`, runs the verbs, and prints one line of JSON for each: what every verb said,
what it took, and what the hook saw that it should not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "fixtures" / "make")]

import typer  # noqa: E402
from hostile import Canary, build  # noqa: E402

from ckptsurgeon import formats  # noqa: E402
from ckptsurgeon.cli.commands.convert import convert  # noqa: E402
from ckptsurgeon.cli.commands.diff import diff  # noqa: E402
from ckptsurgeon.cli.commands.ls import ls  # noqa: E402
from ckptsurgeon.cli.commands.remap import remap  # noqa: E402
from ckptsurgeon.cli.commands.verify import verify  # noqa: E402
from ckptsurgeon.errors import CkptError  # noqa: E402
from ckptsurgeon.formats import Document  # noqa: E402

SECONDS = 10
"""What a verb may take of a processor before it counts as a hang: others may use this machine too."""
_LEDGER = 1 << 20
_LARGE = 1 << 30
"""Of larger (sparse) files only the header is looked at."""
_LONG = 0.1
"""An opening of more seconds is done once for all verbs of a case, which all begin with the same one."""
_WATCHED = ("import", "exec", "compile", "subprocess.", "os.", "socket.", "open", "ctypes.", "pickle.", "marshal.")
_WATCHED += ("shutil.", "urllib.", "http.", "ftplib.", "code.", "tempfile.", "webbrowser.", "pty.", "fcntl.", "mmap.")
_HARMLESS = frozenset(
    ("os.listdir", "os.scandir", "os.fork", "fcntl.flock", "os.putenv", "os.utime", "object.__getattr__")
)


class Hook:
    """Notes what happens inside of this process while it is armed."""

    def __init__(self) -> None:
        self.inside: tuple[str, ...] = ()
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.inside or not event.startswith(_WATCHED) or event in _HARMLESS:
            return
        paths = [part for part in args[:2] if isinstance(part, str | bytes | os.PathLike)]
        about_files = event == "open" or (event.startswith(("os.", "shutil.")) and event != "os.system")
        if about_files and all(self._is_ours(path) for path in paths):
            return
        self.seen.append(f"{event} {args!r}"[:300])

    def _is_ours(self, path: Any) -> bool:
        name = os.fsdecode(path)
        return os.path.abspath(name).startswith(self.inside) or name in ("r", "w", "rb")


HOOK = Hook()


class Opening:
    """Opens files as `formats.inspect` does. That of a case, when it took long, is not done again for the next verb,
    which gets the same error, or the same document anew, and is charged with its seconds. Of two documents that are
    held at one time (`twice`) both are opened."""

    def __init__(self) -> None:
        self.real = formats.inspect
        self.target = ""
        self.known: tuple[CkptError | Document, float] | None = None
        self.twice, self.saved = False, 0.0

    def of(self, target: Path) -> None:
        self.target, self.known = str(target), None

    def __call__(self, path: Any) -> Document:
        if os.fsdecode(path) != self.target:
            return self.real(path)
        if self.known is None or (self.twice and isinstance(self.known[0], Document)):
            found, took = self._opened(path)
            self.known = (found, took) if took > _LONG else None
        else:
            found, took = self.known
            self.saved += took
        if isinstance(found, CkptError):
            raise found.with_traceback(None)
        return dataclasses.replace(found)

    def _opened(self, path: Any) -> tuple[CkptError | Document, float]:
        began = time.process_time()
        try:
            found: CkptError | Document = self.real(path)
        except CkptError as error:
            found = error
        return found, time.process_time() - began


OPENING = Opening()


def verbs(target: Path, out: Path) -> dict[str, Callable[[], None]]:
    """The verbs by name; what they write goes to `out`."""
    return {
        "ls": lambda: ls(target),
        "ls --json": lambda: ls(target, as_json=True),
        "ls --tree": lambda: ls(target, tree=True),
        "ls --tree --json": lambda: ls(target, tree=True, as_json=True),
        "ls --extras": lambda: ls(target, extras=True),
        "ls --extras --json": lambda: ls(target, extras=True, as_json=True),
        "ls --select .": lambda: ls(target, select="."),
        "diff": lambda: diff(target, str(target)),
        "verify": lambda: verify(target),
        "convert": lambda: convert(target, str(out / "out.safetensors")),
        "remap": lambda: remap(target, str(out / "out.pth"), keep_extras=True, force=True),
    }


class Late(BaseException):
    """A verb took too long."""


def _late(number: int, frame: object) -> None:
    raise Late


def memory(field: str) -> int:
    """A size of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


def run(verb: Callable[[], None], seconds: float) -> dict[str, Any]:
    """What a verb said, how it ended and what it took."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before, began, ended = memory("VmRSS"), time.process_time(), "0"
    OPENING.saved = 0.0
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            verb()
    except typer.Exit as exit:
        ended = str(exit.exit_code)
    except Late:
        ended = "late"
    except CkptError as error:  # the command should have caught it
        ended = f"uncaught {error!r}"
    except BaseException:
        ended = f"traceback {traceback.format_exc()[-1500:]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    took, peak = time.process_time() - began + OPENING.saved, memory("VmHWM") - before
    return {"end": ended, "seconds": took, "peak": peak, "out": out.getvalue(), "err": err.getvalue()}


def ledger(folder: Path) -> list[tuple[Any, ...]]:
    """Every name below a folder with its kind, size, time and bytes (of long files the ends)."""
    found = []
    for path in sorted(folder.rglob("*")):
        there = path.lstat()
        digest = ""
        if stat.S_ISREG(there.st_mode):
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read(_LEDGER)).hexdigest()
        found.append((str(path), there.st_mode, there.st_size, there.st_mtime_ns, digest))
    return found


def examine(name: str, base: Path, seconds: float = SECONDS) -> dict[str, Any]:
    """Make a case and run the verbs over it."""
    folder, out, marker = base / name / "case", base / name / "out", base / name / "fired"
    folder.mkdir(parents=True)
    out.mkdir()
    target = folder / build(name, folder, Canary(str(marker)))
    size = target.stat().st_size if target.is_file() else 0
    before = ledger(folder)
    HOOK.seen = []
    OPENING.of(target)
    ran: dict[str, Any] = {}
    os.chdir(out)
    for verb, act in verbs(target, out).items():
        if size > _LARGE and not verb.startswith("ls"):
            continue
        HOOK.inside = (str(base / name) + os.sep, "/proc/self/")
        OPENING.twice = verb == "diff"
        try:
            ran[verb] = run(act, seconds)
        finally:
            HOOK.inside = ()
        left = sorted(os.listdir(out))
        ran[verb]["left"] = left
        for each in left:
            shutil.rmtree(out / each) if (out / each).is_dir() else (out / each).unlink()
    return {
        "name": name,
        "size": size,
        "ran": ran,
        "seen": HOOK.seen,
        "fired": marker.exists(),
        "changed": ledger(folder) != before,
    }


def warm(base: Path) -> None:
    """Import all that the verbs import on their way, so that what comes later is a file's doing."""
    for name in (
        "legacy-sound",
        "tar-sound",
        "script-sound",
        "shard-sound",
        "zip64-sound",
        "special-gzip-around-torch",
    ):
        examine(name, base / "warm", 60)
    for name in (
        "build-metadata-opaque",
        "deflate-sound",
        "name-zip-ansi",
        "tensor-expanded-small",
        "bits-conjugate-complex",
        "special-empty",
        "unicode-broken-escape",
        "special-bzip2-bomb",
    ):
        examine(name, base / "warm", 60)


def lines(base: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """The results, one after the other; what a case wrote is removed."""
    for name in names:
        yield examine(name, base)
        os.chdir(base)
        shutil.rmtree(base / name)


def main() -> None:
    base = Path(sys.argv[1]).resolve()
    signal.signal(signal.SIGPROF, _late)
    sys.addaudithook(HOOK)
    formats.inspect = OPENING
    canary = base / "path"
    canary.mkdir(parents=True)
    (canary / "hostile_canary.py").write_text(f"open({str(base / 'imported')!r}, 'w').close()\n")
    sys.path.insert(0, str(canary))
    warm(base)
    for result in lines(base, sys.argv[2:]):
        print(json.dumps(result), flush=True)
    assert not (base / "imported").exists(), "a module was imported that a file names"


if __name__ == "__main__":
    main()

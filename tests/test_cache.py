"""The header of a named model is kept, and an entry is believed only while everything is as it was."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Ran
from safetensors.torch import save_file

import ckptsurgeon as cs
from ckptsurgeon.checkpoint import Target
from ckptsurgeon.targets import cache, spec
from ckptsurgeon.targets.dependencies import Trace

HEAVY = {"torch", "numpy", "torchvision", "timm", "transformers", "models", "net", "parts"}
NOTE = "is from the cache; --no-cache builds the model anew\n"
NET = """
import torch
from parts import WIDTH
try:
    from faster import WIDTH
except ImportError:
    pass
def make(depth=1, settings=None):
    return torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(depth)])
"""
MODELS = """
import random
import numpy as np
import torch
from torch import nn
built = 0
class Odd(nn.Module):
    '''Ties, buffers of all kinds, state that is no tensor, and values that tell how often it was built.'''
    def __init__(self):
        super().__init__()
        global built
        built += 1
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer('mask', torch.ones(2, 3, dtype=torch.bool))
        self.register_buffer('gone', torch.ones(2), persistent=False)
        self.short = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.drawn = nn.Parameter(torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), built]))
    def get_extra_state(self): return {'a': 1}
    def set_extra_state(self, state): pass
"""


@pytest.fixture(autouse=True)
def _files() -> None:
    torch.save({"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3)}, "a.pth")


def run(*words: object, **variables: str) -> tuple[Ran, set[str]]:
    """A command in a process of its own, and which heavy modules it imported."""
    script = (
        "import json, sys\nfrom ckptsurgeon.cli.app import main\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "print(json.dumps([code or 0, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True, text=True, check=True, env={**os.environ, **variables},
    )  # fmt: skip
    *errors, last = ran.stderr.splitlines(keepends=True)
    code, names = json.loads(last)
    return Ran(code, ran.stdout, "".join(errors)), set(names) & HEAVY


def is_kept(text: str, folder: str = ".", **variables: str) -> bool:
    """Whether a process would take the header of a spec from the cache."""
    script = (
        "import sys\nfrom ckptsurgeon.targets import cache, spec\nmeant = spec.parse(sys.argv[1])\n"
        "place = cache._place(meant)\nprint(place is not None and cache._load(place, meant, None) is not None)\n"
        "assert 'torch' not in sys.modules"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, text],
        capture_output=True, text=True, check=True, cwd=folder, env={**os.environ, **variables},
    )  # fmt: skip
    return ran.stdout == "True\n"


def folder() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"], "ckptsurgeon", "targets")


def kept() -> list[Path]:
    return sorted(folder().iterdir()) if folder().exists() else []


def settled() -> None:
    """Files that were written just now might still change while the model is built: such a header is not kept."""
    time.sleep(0.05)


def write_code() -> None:
    os.mkdir("code")
    Path("code/parts.py").write_text("WIDTH = 3\n")
    Path("code/net.py").write_text(NET)
    Path("code/settings.txt").write_text("a")
    settled()


def write_bert() -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    os.mkdir("bert")
    Path("bert/config.json").write_text(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
    "text",
    [
        "torchvision:resnet18,num_classes=10",
        "timm:vit_tiny_patch16_224,num_classes=3",
        "transformers:bert",
        "code/net.py:make,depth=2",
        "package.module:make",
    ],
)
def test_the_second_diff_loads_no_torch_and_says_the_same(text: str) -> None:
    write_code()
    write_bert()
    os.mkdir("package")
    Path("package/module.py").write_text(NET.replace("from parts import WIDTH", "WIDTH = 4"))
    settled()
    first, loaded = run("diff", "a.pth", text)
    assert (first.code, first.err) == (1, "")
    assert "torch" in loaded
    second, loaded = run("diff", "a.pth", text)
    assert loaded == set()
    assert (second.code, second.out) == (1, first.out)
    assert second.err == f"ckpt: the header of {text} {NOTE}"


def test_json_tells_it_and_quiet_says_nothing() -> None:
    write_code()
    words = ["remap", "a.pth", "--to", "code/net.py:make", "-o", "b.pth", "--force", "--json"]
    assert run(*words)[0].json["target_is_cached"] is False
    ran, loaded = run(*words)
    assert (ran.json["target_is_cached"], ran.err, loaded) == (
        True,
        f"ckpt: the header of code/net.py:make {NOTE}",
        set(),
    )
    ran, _ = run("diff", "a.pth", "code/net.py:make", "--json")
    assert (ran.code, ran.json["target_is_cached"]) == (0, True)
    ran, loaded = run("diff", "a.pth", "code/net.py:make", "--quiet")
    assert (ran, loaded) == (Ran(0, "", ""), set())


@contextmanager
def written(path: str, text: str) -> Iterator[None]:
    """A file with other contents for a while."""
    before = Path(path).read_text() if os.path.exists(path) else None
    Path(path).write_text(text)
    yield
    if before is None:
        os.unlink(path)
    else:
        Path(path).write_text(before)


@contextmanager
def renamed(path: str) -> Iterator[None]:
    os.rename(path, f"{path}.away")
    yield
    os.rename(f"{path}.away", path)


@contextmanager
def touched(path: str) -> Iterator[None]:
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    yield
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_whatever_a_header_of_own_code_depends_on_makes_it_worthless_when_it_changes() -> None:
    write_code()
    os.makedirs("installed/thing-1.0.dist-info")
    os.mkdir("elsewhere")
    variables = {"PYTHONPATH": f"{os.path.abspath('installed')}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    text = "code/net.py:make,settings=code/settings.txt"
    assert run("diff", "a.pth", text, **variables)[0].code == 0
    assert is_kept(text, **variables)
    changes = {
        "the file": written("code/net.py", NET + "\n"),
        "a file that it imports": written("code/parts.py", "WIDTH = 4\n"),
        "a file that it imports is gone": renamed("code/parts.py"),
        "a file that it looked for in vain": written("code/faster.py", "WIDTH = 5\n"),
        "a file that hides one that it imports": written("installed/parts.py", "WIDTH = 5\n"),
        "the file that an argument names": written("code/settings.txt", "b"),
        "the file that an argument names is gone": renamed("code/settings.txt"),
        "an installed package": touched("installed/thing-1.0.dist-info"),
        "a package that is no longer installed": renamed("installed/thing-1.0.dist-info"),
        "an editable package": written("installed/__editable__.pth", ""),
    }
    for what, change in changes.items():
        with change:
            assert not is_kept(text, **variables), what
        assert is_kept(text, **variables), f"after {what}"
    assert not is_kept(f"{text},depth=2", **variables)
    assert not is_kept("code/net.py:make", **variables)
    assert not is_kept(text)  # another path
    os.symlink(os.path.abspath("code"), "elsewhere/code")
    assert not is_kept(text, "elsewhere", **variables)


def test_the_same_words_in_another_folder_mean_another_file() -> None:
    os.mkdir("elsewhere")
    for name in ("alone.py", "elsewhere/alone.py"):
        Path(name).write_text("import torch\ndef make(): return torch.nn.Linear(3, 3)\n")
    settled()
    variables = {"PYTHONSAFEPATH": "1"}  # as in the installed script, whose path does not begin with the current folder
    run("diff", "a.pth", "alone.py:make", **variables)
    assert is_kept("alone.py:make", **variables)
    assert not is_kept("alone.py:make", "elsewhere", **variables)


def test_whatever_a_folder_of_transformers_says_makes_its_header_worthless_when_it_changes() -> None:
    write_bert()
    run("diff", "a.pth", "transformers:bert")
    assert is_kept("transformers:bert")
    config = Path("bert/config.json").read_text()
    changes = {
        "the config": written("bert/config.json", config.replace('"vocab_size": 50', '"vocab_size": 51')),
        "another config": written("bert/generation_config.json", "{}"),
        "code": written("bert/modeling.py", ""),
        "the config is gone": renamed("bert/config.json"),
        "the folder is gone": renamed("bert"),
    }
    for what, change in changes.items():
        with change:
            assert not is_kept("transformers:bert"), what
        assert is_kept("transformers:bert"), f"after {what}"
    with written("bert/weights.txt", "…"):
        assert is_kept("transformers:bert")


def test_a_folder_is_meant_before_a_type_even_if_it_is_empty() -> None:
    by_type = cache._place(spec.parse("transformers:bert"))
    os.mkdir("bert")
    assert cache._place(spec.parse("transformers:bert")) != by_type


def test_a_changed_model_is_seen_anew() -> None:
    write_code()
    assert run("diff", "a.pth", "code/net.py:make")[0].code == 0
    Path("code/parts.py").write_text("WIDTH = 4\n")
    settled()
    for _ in range(2):
        ran, _ = run("diff", "a.pth", "code/net.py:make")
        assert ran.code == 1
        assert "[4, 4]" in ran.out
    assert len(kept()) == 1  # the entry was replaced


def test_values_are_the_same_bit_for_bit() -> None:
    """With and without the cache, also of a model whose values depend on how often it was built."""
    Path("models.py").write_text(MODELS)
    settled()
    words = ["remap", "a.pth", "--to", "models.py:Odd", "--fit", "--seed", "3", "-o"]
    _, loaded = run(*words, "fresh.safetensors")
    assert "torch" in loaded
    ran, loaded = run(*words, "cached.safetensors")
    assert f"the header of models.py:Odd {NOTE}" in ran.err
    assert "torch" in loaded
    assert Path("cached.safetensors").read_bytes() == Path("fresh.safetensors").read_bytes()
    assert cs.open("fresh.safetensors")["drawn"].read()[3] == 3  # on the meta device, on the CPU, and with values


def test_what_an_overlap_leaves_of_a_cached_model_is_the_models_own() -> None:
    import torchvision

    model = torchvision.models.resnet18()
    save_file(model.state_dict(), "full.safetensors")
    words = [
        "remap",
        "full.safetensors",
        "--to",
        "torchvision:resnet18,num_classes=1003",
        "--mismatched",
        "overlap",
        "-o",
    ]
    assert run(*words, "one.safetensors")[0].err == ""
    assert "from the cache" in run(*words, "two.safetensors")[0].err
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    torch.manual_seed(0)
    head = torchvision.models.resnet18(num_classes=1003).fc.weight
    made = cs.open("two.safetensors")["fc.weight"].read()
    assert torch.equal(made, torch.cat([model.fc.weight, head[1000:]]))


def keep(text: str, trace: Trace | None = None) -> tuple[Path, spec.Spec, Target]:
    """An entry made in this process, which has torch and would not keep one by itself."""
    meant = spec.parse(text)
    place = cache._place(meant)
    assert place is not None
    made = cs.target_of(text)
    cache._store(place, made, trace or Trace({}, {}))
    return Path(place), meant, made


def load(place: Path, meant: spec.Spec) -> Target | None:
    return cache._load(str(place), meant, lambda: spec._target(meant))


def test_ties_roles_and_state_that_is_no_tensor_come_back_as_they_were() -> None:
    Path("models.py").write_text(MODELS)
    place, meant, made = keep("models.py:Odd")
    found = load(place, meant)
    assert found is not None
    assert list(found.entries.items()) == list(made.entries.items())
    assert {entry.role for entry in found.entries.values()} == {"parameter", "buffer"}
    assert (found.label, found.is_model, found.tensors) == ("models.py:Odd", True, None)
    assert found.ties == made.ties == (("embed.weight", "head.weight"),)
    assert found.others == made.others == ("_extra_state",)
    assert (found.cached, made.cached) == (True, False)
    source, fresh = found.initial_source("short", 0), made.initial_source("short", 0)
    assert source.init.holds == fresh.init.holds > 0  # type: ignore[union-attr]


def framed(header: object) -> bytes:
    body = json.dumps(header, separators=(",", ":")).encode()
    return b'{"sha256":"%s","header":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


ENTRY = ["w", "float32", [2], "parameter", "Linear"]
HOSTILE: dict[str, dict[str, Any]] = {
    "another key": {"key": "0" * 64},
    "another spec": {"label": "torch.nn:Linear,in_features=3,out_features=2"},
    "entries that are no list": {"entries": {"w": 1}},
    "an entry too short": {"entries": [ENTRY[:4]]},
    "a key that is no text": {"entries": [[1, *ENTRY[1:]]]},
    "a key that stands twice": {"entries": [ENTRY, ENTRY]},
    "an unknown dtype": {"entries": [["w", "float33", *ENTRY[2:]]]},
    "a dtype that is no text": {"entries": [["w", ["float32"], *ENTRY[2:]]]},
    "a negative size": {"entries": [["w", "float32", [-2], *ENTRY[3:]]]},
    "a size that is true": {"entries": [["w", "float32", [True], *ENTRY[3:]]]},
    "a size that is a fraction": {"entries": [["w", "float32", [2.0], *ENTRY[3:]]]},
    "a size without measure": {"entries": [["w", "float32", [1 << 63], *ENTRY[3:]]]},
    "too many dimensions": {"entries": [["w", "float32", [1] * 65, *ENTRY[3:]]]},
    "a shape that is no list": {"entries": [["w", "float32", "22", *ENTRY[3:]]]},
    "an unknown role": {"entries": [[*ENTRY[:3], "tensor", "Linear"]]},
    "a module that is no text": {"entries": [[*ENTRY[:4], None]]},
    "others that are a text": {"others": "ab"},
    "another that is a key": {"others": ["weight"]},
    "another that stands twice": {"others": ["a", "a"]},
    "a tie of no key": {"ties": [["weight", "nothing"]]},
    "a tie of one": {"ties": [["weight"]]},
    "a tie of one key twice": {"ties": [["weight", "weight"]]},
    "bytes that are no number": {"nbytes": "24"},
    "negative bytes": {"nbytes": -1},
    "files that are a list": {"files": []},
    "a digest that is no text": {"files": {"a.pth": 3}},
    "a file that is not there": {"files": {"/no/such/file": "0" * 64}},
    "a file that is a device": {"files": {"/dev/zero": "0" * 64}},
    "a file with a NUL in its name": {"files": {"a\0b": "0" * 64}},
    "imports that are no list": {"imports": 3},
    "an import too short": {"imports": [["torch", None]]},
    "a module that was elsewhere": {"imports": [["torch", None, "/elsewhere/torch/__init__.py"]]},
    "a module with a NUL in its name": {"imports": [["a\0b", ["/"], "x"]]},
}


def test_an_entry_that_is_not_what_it_must_be_is_none() -> None:
    place, meant, _ = keep("torch.nn:Linear,in_features=2,out_features=2")
    whole = place.read_bytes()
    header = json.loads(whole)["header"]
    assert whole == framed(header)
    for what, change in HOSTILE.items():
        place.write_bytes(framed({**header, **change}))
        assert load(place, meant) is None, what
    for name in header:
        place.write_bytes(framed({key: value for key, value in header.items() if key != name}))
        assert load(place, meant) is None, f"without {name}"
    for cut in range(len(whole)):
        place.write_bytes(whole[:cut])
        assert load(place, meant) is None, f"cut at {cut}"
    for at in range(len(whole)):
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert load(place, meant) is None, f"damaged at {at}"
    deep = b"[" * 100_000 + b"]" * 100_000
    for body in (b"", b"[]", b"3", b"\xff", deep):
        place.write_bytes(b'{"sha256":"%s","header":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body))
        assert load(place, meant) is None
    place.write_bytes(whole)
    assert load(place, meant) is not None


def test_an_entry_that_is_no_file_of_the_user_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    place, meant, _ = keep("torch.nn:Linear,in_features=2,out_features=2")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert load(place, meant) is None
    monkeypatch.undo()
    other = place.with_name("other")
    place.rename(other)
    makers: list[Callable[[], None]] = [
        lambda: place.symlink_to(other),
        lambda: os.mkfifo(place),
        lambda: place.mkdir(),
    ]
    for make in makers:
        make()
        assert load(place, meant) is None
        place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()


def test_a_damaged_entry_is_replaced() -> None:
    write_code()
    run("diff", "a.pth", "code/net.py:make")
    (place,) = kept()
    whole = place.read_bytes()
    place.write_bytes(whole[:-3])
    ran, loaded = run("diff", "a.pth", "code/net.py:make")
    assert (ran.code, ran.err) == (0, "")
    assert "torch" in loaded
    assert kept() == [place]
    assert place.read_bytes() == whole
    assert (os.stat(place).st_mode & 0o777, os.stat(folder()).st_mode & 0o777) == (0o600, 0o700)


def test_no_cache_builds_anew_and_keeps_what_it_built() -> None:
    write_code()
    run("diff", "a.pth", "code/net.py:make")
    (place,) = kept()
    before = os.stat(place).st_ino, place.read_bytes()
    for words in (["diff", "a.pth", "code/net.py:make"], ["remap", "a.pth", "--to", "code/net.py:make", "--dry-run"]):
        ran, loaded = run(*words, "--no-cache")
        assert (ran.code, ran.err) == (0, "")
        assert "torch" in loaded
    assert kept() == [place]
    assert os.stat(place).st_ino != before[0]
    assert place.read_bytes() == before[1]


def test_a_cache_that_cannot_be_written_or_found_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    write_code()
    Path("file").write_text("")
    for base in (os.path.abspath("file"), "/dev/null"):
        ran, _ = run("diff", "a.pth", "code/net.py:make", XDG_CACHE_HOME=base)
        assert (ran.code, ran.err) == (0, "")
    meant = spec.parse("code/net.py:make")
    monkeypatch.setenv("HOME", "/home/somebody")
    for base in ("", "relative"):  # which the XDG specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert str(cache._place(meant)).startswith("/home/somebody/.cache/ckptsurgeon/targets/")
    monkeypatch.setenv("HOME", "relative")
    assert cache._place(meant) is None


def test_a_full_disk_leaves_no_half_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        keep("torch.nn:Linear,in_features=2,out_features=2")
    assert kept() == []


def test_a_model_that_cannot_be_built_is_the_same_error_every_time() -> None:
    Path("bad.py").write_text("def make(n=1): raise RuntimeError('no such architecture today')\n")
    settled()
    for text, words in (("bad.py:make", "no such architecture today"), ("bad.py:mak", "the nearest are make")):
        ran, _ = run("diff", "a.pth", text)
        assert ran.code == 2
        assert words in ran.err
        assert run("diff", "a.pth", text)[0] == ran
    assert kept() == []


def test_writers_side_by_side_never_show_half_an_entry() -> None:
    place, meant, made = keep("torchvision:resnet18")
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            while not stop.is_set():
                cache._store(str(place), made, Trace({}, {}))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert load(place, meant) is not None
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert kept() == [place]


def test_processes_that_miss_together_all_answer() -> None:
    write_code()
    script = "import ckptsurgeon as cs; print(cs.diff('a.pth', 'code/net.py:make').same)"
    ran = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0] for process in ran] == [b"True\n"] * 3
    assert len(kept()) == 1
    assert is_kept("code/net.py:make")


def test_a_process_that_has_torch_neither_asks_nor_fills_the_cache(ckpt: Any) -> None:
    """What its packages make may be other than what their files say."""
    write_code()
    assert ckpt("diff", "a.pth", "code/net.py:make").code == 0
    assert kept() == []
    keep("code/net.py:make")
    assert not cs.target_of("code/net.py:make").cached
    sources: list[Any] = [torch.nn.Linear(3, 3), "a.pth", cs.open("a.pth"), cs.target_of("code/net.py:make")]
    assert not any(cs.target_of(source).cached for source in sources)


@pytest.mark.parametrize(
    ("before", "text"),
    [
        ("sys.path.append('code'); import parts", "code/net.py:make"),
        ("pass", "own.py:rewrites_itself"),
        ("pass", "own.py:installs"),
        ("pass", "own.py:make,data=code"),
    ],
    ids=["code that was there before", "a file that changes meanwhile", "an installation meanwhile", "a folder"],
)
def test_what_cannot_be_traced_is_not_kept(before: str, text: str) -> None:
    write_code()
    os.mkdir("installed")
    Path("own.py").write_text(
        "import os, sys, torch\n"
        "def make(data=None): return torch.nn.Linear(3, 3)\n"
        "def rewrites_itself(): open(__file__, 'a').write('#'); return make()\n"
        "def installs(): os.makedirs('installed/a.dist-info', exist_ok=True); return make()\n"
    )
    settled()
    script = f"import sys; import ckptsurgeon as cs; {before}; print(len(cs.target_of({text!r}).entries))"
    path = f"{os.path.abspath('installed')}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    assert ran.stdout == "2\n"
    assert kept() == []


def test_files_that_are_too_large_to_hold_against_are_not_kept() -> None:
    Path("large.bin").touch()
    os.truncate("large.bin", (64 << 20) + 1)
    assert cache._place(spec.parse("models.py:Net,file=large.bin")) is None
    os.truncate("large.bin", 3)
    assert cache._place(spec.parse("models.py:Net,file=large.bin")) is not None
    assert cache._place(spec.parse("models.py:Net,file=[{'a':'/dev/zero'}]")) is None


def test_a_model_that_is_no_longer_what_was_kept_is_refused_and_forgotten() -> None:
    """Code that nothing traces, such as what the clock decides."""
    place, meant, _ = keep("torch.nn:Linear,in_features=2,out_features=2")
    header = json.loads(place.read_bytes())["header"]
    header["entries"][0][2] = [5, 5]
    place.write_bytes(framed(header))
    target = load(place, meant)
    assert target is not None
    plan = cs.plan(cs.Checkpoint({}), to=target, missing="init")
    with pytest.raises(cs.TargetError, match="is not what it was when its header was kept"):
        plan.result["bias"].read()
    assert kept() == []


def test_old_entries_go_and_what_is_used_stays() -> None:
    place, meant, _ = keep("torch.nn:Linear,in_features=2,out_features=2")
    day = 86_400
    names = {f"{number:064x}.json": number for number in range(300)}
    for name, age in names.items():
        place.with_name(name).write_text("")
        os.utime(place.with_name(name), (time.time() - 100 - age,) * 2)
    ancient, half, fresh = (place.with_name(name) for name in (f"{'f' * 64}.json", "old.part", "new.part"))
    for path, age in ((place, 89 * day), (ancient, 91 * day), (half, day), (fresh, 0)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    stranger = place.with_name("README")
    stranger.write_text("mine")
    assert load(place, meant) is not None  # which counts as use
    cache._tidy(str(folder()))
    youngest = [place.with_name(name) for name, age in names.items() if age < 255]
    assert kept() == sorted([place, fresh, stranger, *youngest])
    for path in youngest:
        path.unlink()
    place.with_name(ancient.name).touch()
    os.utime(ancient, (time.time() - 91 * day,) * 2)
    cache._tidy(str(folder()))
    assert kept() == sorted([place, fresh, stranger])

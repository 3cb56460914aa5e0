"""A remap in place rewrites headers and moves no tensor; what does not fit is refused, and all is as it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import KEY, assert_same_tensors, safetensors_bytes
from interrupted import FILE, INDEX, TENSORS, hidden, left, one_file, shard, three_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

import ckptsurgeon as cs


def header(path: str) -> tuple[int, dict[str, Any]]:
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return length, json.loads(raw[8 : 8 + length])


def data(path: str) -> bytes:
    raw = Path(path).read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def everything() -> dict[str, tuple[bytes, int]]:
    """Every file in `m`, with its time."""
    return {name: (Path("m", name).read_bytes(), os.stat(f"m/{name}").st_mtime_ns) for name in os.listdir("m")}


def refused(words: str, path: str, *rules: str, error: type[cs.CkptError] = cs.PlanError, **how: Any) -> str:
    """The error's text; nothing was written."""
    before = everything()
    with pytest.raises(error, match=words) as caught:
        cs.remap_in_place(path, rules, **how)
    assert everything() == before
    return str(caught.value)


# -- what fits -------------------------------------------------------------------------------------------------


def test_a_rename_leaves_the_data_where_it_is_and_the_file_the_same() -> None:
    one_file()
    before, inode, size = data(FILE), os.stat(FILE).st_ino, os.path.getsize(FILE)
    length, _ = header(FILE)
    written = cs.remap_in_place(FILE, ["strip module."])
    assert_same_tensors(load_file(FILE), left("abcdef"), ordered=False)
    assert (os.stat(FILE).st_ino, os.path.getsize(FILE), header(FILE)[0]) == (inode, size, length)
    assert data(FILE) == before
    assert header(FILE)[1]["__metadata__"] == {"format": "pt"}
    assert (written.path, written.format, written.tensors, written.files) == (FILE, "safetensors", 6, (FILE,))
    assert hidden() == []


def test_only_the_header_and_the_side_file_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    one_file()
    real, written = os.pwrite, []

    def counted(descriptor: int, raw: bytes, offset: int) -> int:
        written.append((os.readlink(f"/proc/self/fd/{descriptor}"), len(raw), offset))
        return real(descriptor, raw, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    cs.remap_in_place(FILE, ["strip module."])
    length = 8 + header(FILE)[0]
    assert [(n, o) for name, n, o in written if name.endswith("/a.safetensors")] == [(length, 0)]
    assert sum(n for _, n, _ in written) < 4 * length + 500


def test_shapes_change_where_the_bytes_stay_in_order() -> None:
    os.mkdir("m")
    state = {"module.aa": torch.randn(4, 1, 6), "module.bb": torch.randn(3, 1)}
    save_file(state, FILE)
    cs.remap_in_place(FILE, ["strip module.", "squeeze aa", "unsqueeze bb 0", "permute bb 2,1,0"])
    want = {"aa": state["module.aa"].squeeze(1), "bb": state["module.bb"].reshape(1, 3, 1)}
    assert_same_tensors(load_file(FILE), want, ordered=False)


@pytest.mark.parametrize(
    ("rule", "keys", "freed"), [("drop [ef]", "abcd", 120), ("drop [ab]", "cdef", 0), ("drop [af]", "bcde", 60)]
)
def test_a_drop_at_the_ends_cuts_the_file_off_or_grows_the_header(rule: str, keys: str, freed: int) -> None:
    one_file()
    size = os.path.getsize(FILE)
    cs.remap_in_place(FILE, ["strip module.", rule])
    assert_same_tensors(load_file(FILE), left(keys), ordered=False)
    assert os.path.getsize(FILE) == size - freed
    cs.remap_in_place(FILE, ["a|b|c|d|e|f => \\g<0>"], allow_unused=True)
    assert_same_tensors(cs.open(FILE), left(keys))


def test_everything_may_go() -> None:
    one_file()
    cs.remap_in_place(FILE, ["drop ."])
    assert load_file(FILE) == {}
    assert os.path.getsize(FILE) == 8 + header(FILE)[0]


def test_tensors_without_elements_go_where_they_are_allowed() -> None:
    os.mkdir("m")
    empty, full = torch.zeros(0, 3), torch.randn(4)
    save_file({"module.a": full, "module.b": empty, "module.c": full + 1, "module.d": empty.clone()}, FILE)
    cs.remap_in_place(FILE, ["strip module.", "drop a"])
    assert_same_tensors(load_file(FILE), {"b": empty, "c": full + 1, "d": empty}, ordered=False)


def test_a_room_made_by_a_drop_takes_longer_names() -> None:
    one_file()
    refused("the new header of m/a.safetensors has", FILE, "prefix a.rather.long.prefix.of.names.")
    cs.remap_in_place(FILE, [r"drop module\.[abc]", "prefix a.rather.long.prefix."])
    assert set(load_file(FILE)) == {f"a.rather.long.prefix.module.{key}" for key in "def"}


def test_shards_change_together_and_those_without_tensors_go() -> None:
    three_shards()
    text = json.loads(Path(INDEX).read_text())
    Path(INDEX).write_text(json.dumps({"more": 1, **text, "metadata": {**text["metadata"], "who": "me"}}))
    written = cs.remap_in_place(INDEX, ["strip module.", "drop [aef]"])
    index = json.loads(Path(INDEX).read_text())
    assert index["weight_map"] == {"b": shard(1), "c": shard(2), "d": shard(2)}
    assert index["metadata"].pop(KEY)
    assert (index["metadata"], index["more"]) == ({"total_size": 180, "who": "me"}, 1)
    assert sorted(os.listdir("m")) == [shard(1), shard(2), os.path.basename(INDEX)]
    got = {**load_file(f"m/{shard(1)}"), **load_file(f"m/{shard(2)}")}
    assert_same_tensors(got, left("bcd"), ordered=False)
    assert (written.removed, written.files) == ((shard(3),), (f"m/{shard(1)}", f"m/{shard(2)}", INDEX))
    assert cs.verify("m").remarks == ()


def test_a_rename_of_shards_keeps_a_size_that_others_count_otherwise() -> None:
    three_shards()
    index = json.loads(Path(INDEX).read_text())
    Path(INDEX).write_text(json.dumps({**index, "metadata": {"total_size": 9}}))
    cs.remap_in_place("m", [r"^module\.a$ => first"])
    index = json.loads(Path(INDEX).read_text())
    assert index["metadata"] == {"total_size": 9, KEY: index["metadata"][KEY]}
    assert list(index["weight_map"]) == ["first", *(f"module.{key}" for key in "bcdef")]


def test_aliases_in_the_metadata_are_renamed_along() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.Module()
            self.module.embed = torch.nn.Parameter(torch.randn(3, 2))
            self.module.head = self.module.embed

    os.mkdir("m")
    save_model(Tied(), FILE, metadata={"who": "me"})
    (kept,) = set(header(FILE)[1]) - {"__metadata__"}
    cs.remap_in_place(FILE, ["strip module."])
    other = {"embed": "head", "head": "embed"}[kept.removeprefix("module.")]
    assert header(FILE)[1]["__metadata__"] == {"who": "me", "format": "pt", other: kept.removeprefix("module.")}
    assert cs.open(FILE).tied() == (tuple(cs.open(FILE)),)
    assert set(cs.open(FILE)) == {"embed", "head"}
    cs.remap_in_place(FILE, [f"drop ^{kept.removeprefix('module.')}$"])
    assert set(load_file(FILE)) == {other}
    assert header(FILE)[1]["__metadata__"] == {"who": "me", "format": "pt"}


def test_metadata_that_a_rename_would_make_an_alias_is_a_reason_to_refuse() -> None:
    os.mkdir("m")
    save_file({"module.w": torch.ones(2)}, FILE, metadata={"best": "w"})
    refused("the metadata of m/a.safetensors would make 'best' an alias", FILE, "strip module.")


def test_metadata_alone_can_change() -> None:
    os.mkdir("m")
    save_file(TENSORS, FILE, metadata={"who": "somebody else", "format": "pt", "gone": "x"})
    from ckptsurgeon import inplace

    plan = cs.plan(FILE)
    changed = plan.result.replace(metadata={"who": "me", "format": "pt"})
    inplace.carry_out(inplace.fit(type(plan)(plan.source, None, changed, ()), ""))
    with safe_open(FILE, "pt") as file:
        assert file.metadata() == {"who": "me", "format": "pt"}
    assert_same_tensors(load_file(FILE), TENSORS, ordered=False)


def test_a_target_and_policies_that_only_drop_fit() -> None:
    one_file()
    save_file(left("abc"), "target.safetensors")
    cs.remap_in_place(FILE, to="target.safetensors", fit=True)
    assert_same_tensors(load_file(FILE), left("abc"), ordered=False)


def test_what_changes_nothing_writes_nothing() -> None:
    for make, path in ((one_file, FILE), (three_shards, INDEX)):
        make()
        before = everything()
        written = cs.remap_in_place(path, ["a => a"])
        assert everything() == before
        assert written.files == ()
        for name in os.listdir("m"):
            os.unlink(f"m/{name}")
        os.rmdir("m")


# -- what is refused -------------------------------------------------------------------------------------------


def test_what_moves_or_changes_bytes_names_the_rule_and_the_command() -> None:
    one_file()
    words = refused("in place", FILE, "strip module.", "cast [ab] bf16", "copy c => g", "permute d 1,0", "d => dd")
    assert words.splitlines() == [
        "in place only names and shapes can change, and `cast [ab] bf16` makes other bytes of 'a' and 1 more; this "
        "writes a copy: ckpt remap m/a.safetensors -o m/a-changed.safetensors --rule 'strip module.' "
        "--rule 'cast [ab] bf16' --rule 'copy c => g' --rule 'permute d 1,0' --rule 'd => dd'",
        "in place only names and shapes can change, and `copy c => g` makes other bytes of 'g'",
        "in place only names and shapes can change, and `permute d 1,0` makes other bytes of 'dd'",
    ]
    save_file({**TENSORS, "more": torch.ones(2)}, "target.safetensors")
    words = refused("`--missing init` makes other bytes of 'more'", FILE, to="target.safetensors", missing="init")
    assert words.endswith("-o m/a-changed.safetensors --to target.safetensors --missing init")
    refused("`--dtype float16` makes other bytes", FILE, dtype="float16")


def test_the_command_that_is_named_does_it(ckpt: Any) -> None:
    import shlex

    one_file()
    words = refused("this writes a copy", FILE, "strip module.", "drop c")
    assert ckpt(*shlex.split(words.rpartition("copy: ")[2])[1:]).code == 0
    assert_same_tensors(load_file("m/a-changed.safetensors"), left("abdef"), ordered=False)


def test_a_hole_in_the_middle_names_the_tensor() -> None:
    one_file()
    words = refused("leaves a hole", FILE, "drop [ce]$")
    assert words.startswith(
        "dropping 'module.c' leaves a hole of 60 bytes before 'module.d' in m/a.safetensors, which "
    )


def test_a_header_grows_only_so_far() -> None:
    os.mkdir("m")
    save_file({"a": torch.zeros(9 << 20, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.uint8)}, FILE)
    refused("'a' lies at the beginning of m/a.safetensors, and dropping it would leave 9437184 bytes", FILE, "drop a")


def test_other_kinds_and_parts_of_them_are_refused() -> None:
    os.mkdir("m")
    torch.save(TENSORS, "m/a.pth")
    refused("m/a.pth is torch-zip, and only headers of safetensors can", "m/a.pth", "strip module.")
    os.unlink("m/a.pth")
    os.rmdir("m")
    three_shards()
    refused(f"m/{shard(2)} is a shard of {INDEX}, which names its tensors", f"m/{shard(2)}", "strip module.")
    refused("no tensor would be left", INDEX, "drop .")
    os.unlink(INDEX)
    refused("the shards in m have no index", "m", "strip module.")
    refused("leave --select away", f"m/{shard(1)}", select="module.a", error=cs.UsageError)


def test_a_file_with_other_names_is_refused() -> None:
    one_file()
    os.link(FILE, "m/other")
    refused("m/a.safetensors: has 2 names", FILE, "strip module.", error=cs.OutputError)
    os.unlink("m/other")
    os.symlink("a.safetensors", "m/link.safetensors")
    refused("is a link to .*a.safetensors, which others may share", "m/link.safetensors", error=cs.OutputError)
    os.unlink("m/link.safetensors")
    cs.remap_in_place(FILE, ["strip module."])
    assert set(load_file(FILE)) == set("abcdef")


def test_a_shard_that_is_a_link_is_refused() -> None:
    three_shards()
    os.rename(f"m/{shard(2)}", "m/blob")
    os.symlink("blob", f"m/{shard(2)}")
    refused(f"m/{shard(2)}: is a link", INDEX, "strip module.", error=cs.OutputError)


def test_a_file_that_changes_under_way_is_left_alone() -> None:
    one_file()
    changes = cs.surgery.prepare_in_place(FILE, ["strip module."])
    save_file({"other": torch.ones(3)}, FILE)
    before = everything()
    with pytest.raises(cs.InputError, match=r"m/a.safetensors: changed since it was opened; open it again"):
        cs.surgery.carry_out_in_place(changes)
    assert everything() == before


@pytest.mark.parametrize(("make", "path"), [(one_file, FILE), (three_shards, INDEX)])
def test_two_at_a_time_do_not_mix(make: Any, path: str) -> None:
    make()
    with open(path, "rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused("another in-place change of it is under way", path, "strip module.", error=cs.OutputError)
    cs.remap_in_place(path, ["strip module."])
    assert set(cs.open(path)) == set("abcdef")


# -- the machine says no ---------------------------------------------------------------------------------------


def once_failing(name: str, number: int, do: Callable[[], Any]) -> tuple[str | None, bool]:
    """What the error says that comes of it when the `number`-th call of a function of `os` fails, and whether there
    are fewer such calls."""
    count, said, real = 0, None, getattr(os, name)

    def fail(*args: Any, **how: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(28, "No space left on device")
        return real(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        try:
            do()
        except (cs.OutputError, cs.InputError) as error:
            said = str(error)
    return said, count < number


@pytest.mark.parametrize(("make", "path"), [(one_file, FILE), (three_shards, INDEX)])
@pytest.mark.parametrize("name", ["open", "pwrite", "fsync", "replace", "ftruncate", "unlink", "fchmod"])
def test_whatever_fails_the_checkpoint_is_the_old_or_the_new_one(make: Any, path: str, name: str) -> None:
    """One call fails, the later ones work: a full disk that has room again, a signal, a mended cable."""
    rules, new, number, failed = ["strip module.", "drop [def]"], left("abc"), 0, 0
    while True:
        number += 1
        make()
        said, finished = once_failing(name, number, lambda: cs.remap_in_place(path, rules))
        if not finished:
            failed += 1
            assert said is not None
        made = said is None or "the change is made" in said
        assert set(cs.open(path)) == set(new if made else TENSORS), said
        assert said is None or "the disk is full" in said or "No space left on device" in said
        assert cs.verify(path, repair=True).ok
        assert hidden() == []
        assert set(cs.open(path)) == set(new if made else TENSORS), said
        for file in os.listdir("m"):
            os.unlink(f"m/{file}")
        os.rmdir("m")
        if finished:
            break
    assert failed


def test_a_file_that_may_not_grow_has_no_side_file_and_is_as_it_was() -> None:
    """The operating system's limit on the size of files ends the side file, not the file itself."""
    one_file()
    before = everything()
    command = [sys.executable, "-c", "from ckptsurgeon.cli.app import main; main()", "remap", FILE, "--in-place"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    ran = subprocess.run(
        [*command, "--rule", "strip module."], capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "ckpt: error: m/a.safetensors: the file grows too large; nothing was written\n"
    assert everything() == before


def test_no_permission_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no mode stops: the operating system's refusal is put in its place."""
    one_file()
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **how: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest, **how)

    monkeypatch.setattr(os, "open", refuse)
    refused("m/a.safetensors: Permission denied; nothing was written", FILE, "strip module.", error=cs.OutputError)


# -- the command line ------------------------------------------------------------------------------------------


def test_the_command_says_what_it_would_do_and_did(ckpt: Any) -> None:
    three_shards()
    before = everything()
    words = ["remap", INDEX, "--in-place", "--rule", "strip module.", "--rule", "drop [aef]"]
    dry = ckpt(*words, "--dry-run")
    assert dry.code == 0
    assert f"would rewrite 2 headers of the shards of {INDEX} and the index in place: " in dry.out
    assert everything() == before
    ran = ckpt(*words, "--json").json
    assert ran["in_place"]["files"] == [f"m/{shard(1)}", f"m/{shard(2)}", INDEX]
    assert ran["in_place"]["removed"] == [shard(3)]
    assert ran["in_place"]["freed"] > 120
    assert 400 < ran["in_place"]["rewritten"] < 1000
    assert ran["written"]["nbytes"] == sum(os.path.getsize(f"m/{shard(number)}") for number in (1, 2))
    assert "nothing to change: m/model.safetensors.index.json is left as it is\n" in ckpt(*words[:3]).out
    one = ckpt("remap", INDEX, "--in-place", "--rule", "drop ^c$", "--rule", "drop ^b$", "--json")
    assert (one.code, one.json["in_place"]) == (0, {**one.json["in_place"], "removed": [shard(1)]})


@pytest.mark.parametrize("option", [["-o", "x.pth"], ["--force"], ["--keep-extras"], ["--shard-size", "1GB"]])
def test_options_about_an_output_are_not_for_it(option: list[str], ckpt: Any) -> None:
    one_file()
    ran = ckpt("remap", FILE, "--in-place", *option)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"ckpt: error: --in-place writes no other file, and {option[0]} is about one; leave one of them away\n"
    )
    assert "and --tied is about one" in ckpt("remap", FILE, "--in-place", "--tied", "alias").err


def test_what_does_not_fit_is_exit_1(ckpt: Any) -> None:
    one_file()
    ran = ckpt("remap", FILE, "--in-place", "--rule", "cast . bf16")
    assert (ran.code, ran.out) == (1, "")
    assert "this writes a copy: ckpt remap m/a.safetensors -o m/a-changed.safetensors --rule" in ran.err


# -- size does not matter --------------------------------------------------------------------------------------


def test_a_sparse_file_of_100_gb_is_renamed_in_flat_memory_without_torch_or_numpy() -> None:
    size = 100 * 10**9
    text = f'{{"module.w":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    Path("s.safetensors").write_bytes(safetensors_bytes(text))
    os.truncate("s.safetensors", 8 + len(text) + size)
    script = (
        "import sys\nfrom ckptsurgeon.cli.app import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])\n"
        "print({'torch', 'numpy', 'rich'} & set(sys.modules))"
    )
    words = ["remap", "s.safetensors", "--in-place", "--rule", "strip module.", "--quiet"]
    ran = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    peak, modules = ran.stdout.splitlines()
    assert int(peak) < 60 * 1024, f"{int(peak) // 1024} MiB"
    assert modules == "set()"
    assert list(cs.open("s.safetensors")) == ["w"]
    assert os.stat("s.safetensors").st_blocks < 100
    assert os.listdir(".") == ["s.safetensors"]


def test_digests_of_the_data_are_the_same_before_and_after() -> None:
    os.mkdir("m")
    save_file({f"module.l{i}.w": torch.randn(50, 40) for i in range(100)}, FILE)
    before = hashlib.sha256(data(FILE)).digest()
    cs.remap_in_place(FILE, ["strip module.", r"l(\d+)\.w => \1"])
    assert hashlib.sha256(data(FILE)).digest() == before
    assert len(load_file(FILE)) == 100


# -- what comes in between -------------------------------------------------------------------------------------


def test_a_change_that_was_interrupted_since_the_plan_is_not_run_over() -> None:
    one_file()
    changes = cs.surgery.prepare_in_place(FILE, ["strip module."])
    Path("m/.a.safetensors.inplace").write_bytes(b"x")
    with pytest.raises(cs.OutputError, match="was interrupted just now; run the command again"):
        cs.surgery.carry_out_in_place(changes)
    assert set(load_file(FILE)) == set(TENSORS)


def test_the_hold_on_an_index_goes_over_to_the_new_one() -> None:
    from ckptsurgeon.inplace import disk

    three_shards()
    with disk.locked(INDEX) as lock:
        lock.replace(b"{}", 0o644)
        assert Path(INDEX).read_bytes() == b"{}"
        with pytest.raises(cs.OutputError, match="under way"), disk.locked(INDEX):
            pass
    with disk.locked(INDEX):
        pass


def test_a_header_that_changes_while_it_is_read_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon.formats import safetensors

    one_file()
    real = safetensors.parse

    def parse(*args: Any) -> Any:
        os.utime(FILE, (1, 1))
        return real(*args)

    monkeypatch.setattr(safetensors, "parse", parse)
    with pytest.raises(cs.InputError, match="changed while it was opened"):
        cs.open(FILE)


def test_a_plan_about_fewer_tensors_and_shards_elsewhere_are_refused() -> None:
    from ckptsurgeon import inplace

    one_file()
    plan = cs.plan(FILE)
    less = plan.source.replace(tensors={key: ref for key, ref in plan.source.items() if key != "module.a"})
    made = inplace.fit(type(plan)(less, None, less, ()), "").plan
    assert [problem.text for problem in made.problems] == [
        "the plan does not know 'module.a' of the file; this writes a copy: "
    ]
    os.unlink(FILE)
    os.rmdir("m")
    three_shards()
    os.mkdir("m/sub")
    os.rename(f"m/{shard(2)}", f"m/sub/{shard(2)}")
    Path(INDEX).write_text(Path(INDEX).read_text().replace(shard(2), f"sub/{shard(2)}"))
    with pytest.raises(cs.PlanError, match=r"sub/.* is not in the folder of its index"):
        cs.remap_in_place(INDEX, ["strip module."])
    assert set(cs.open(INDEX)) == set(TENSORS)


IN_PLACE_PARTS = {
    "split ^{n}$ => q k v": True,
    "concat ^b$ ^c$ => bc": True,
    "concat ^c$ ^b$ => cb": False,
    "split ^{n}$ => q k dim=1": False,
    "slice ^{n}$ 0:12": True,
    "slice ^{n}$ 0:4": True,
    "slice ^b$ 0:2": False,
    "tie ^b$ => z": False,
    "fill z 3 zeros": False,
    "pad ^b$ 1": False,
}


@pytest.mark.parametrize("rule", IN_PLACE_PARTS)
def test_parts_in_place_are_right_or_refused(rule: str) -> None:
    """What is arithmetic on whole stretches of the file is done in the header; all else is refused."""
    long = "x" * 200
    state = {long: torch.randn(12, 4), "b": torch.randn(4, 4), "c": torch.randn(4, 4)}
    save_file(state, "a.safetensors")
    rules = [rule.replace("{n}", long)]
    want = {key: ref.read() for key, ref in cs.plan("a.safetensors", rules).check().result.items()}
    if IN_PLACE_PARTS[rule]:
        cs.remap_in_place("a.safetensors", rules)
        assert_same_tensors(load_file("a.safetensors"), want, ordered=False)
    else:
        with pytest.raises(cs.PlanError):
            cs.remap_in_place("a.safetensors", rules)
        assert_same_tensors(load_file("a.safetensors"), state, ordered=False)

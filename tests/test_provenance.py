"""What an output says of how it came about, where it says it, and what a reader makes of whatever stands there."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import random
import socket
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import KEY, assert_same_tensors, bits, damaged_in, safetensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import state_dicts

import ckptsurgeon as cs
from ckptsurgeon.formats import _aliases

MEMBER = "archive/ckptsurgeon.json"
INDEX = "s/model.safetensors.index.json"
STATE = {"module.a": torch.arange(6.0).reshape(2, 3), "module.b": torch.ones(4, dtype=torch.int64)}


def line(key: str, tensor: torch.Tensor) -> list[Any]:
    return [key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def hashed(what: str, lines: list[list[Any]]) -> str:
    """A digest as docs/provenance.md says it."""
    text = "".join(f"{text}\n" for text in [what, *(json.dumps(one, separators=(",", ":")) for one in lines)])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def header_digest(state: dict[str, torch.Tensor]) -> str:
    return hashed("ckptsurgeon.header/1", [line(key, state[key]) for key in sorted(state)])


def content_digest(state: dict[str, torch.Tensor]) -> str:
    raw = {
        key: hashlib.sha256(bits(tensor.contiguous()).numpy().tobytes()).hexdigest() for key, tensor in state.items()
    }
    return hashed("ckptsurgeon.content/1", [[*line(key, state[key]), raw[key]] for key in sorted(state)])


def said(path: str | Path) -> Any:
    """The record in a file, read without the code under test; None where there is none."""
    name = str(path)
    if name.endswith(".safetensors"):
        with safe_open(name, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
    elif name.endswith(".json"):
        text = json.loads(Path(name).read_text())["metadata"].get(KEY)
    else:
        with zipfile.ZipFile(name) as archive:
            text = archive.read(MEMBER) if MEMBER in archive.namelist() else None
    return None if text is None else json.loads(text)


def stripped() -> dict[str, torch.Tensor]:
    return {key.removeprefix("module."): value for key, value in STATE.items()}


OUTPUTS = ("b.safetensors", "b.pth", "s/")


def record_of(output: str) -> Any:
    return said(INDEX if output == "s/" else output)


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_says_what_it_was_made_of_and_how(output: str, ckpt: Any) -> None:
    torch.save({"epoch": 3, "state_dict": STATE}, "a.pth")
    words = ["remap", "a.pth", "-o", output, "--rule", "strip module.", "--dtype", "bf16"]
    assert ckpt(*words, *(["--shard-size", "12"] if output == "s/" else [])).code == 0
    assert record_of(output) == {
        "schema": "ckptsurgeon.provenance/1",
        "version": cs.__version__,
        "source": {"format": "torch-zip", "select": "state_dict", "header": header_digest(STATE)},
        "rules": ["strip module."],
        "options": {"dtype": "bfloat16"},
    }
    shown = [text for text in ckpt("ls", output).out.splitlines() if text.startswith("provenance")]
    assert shown == [
        f"provenance, as the file says: by ckptsurgeon {cs.__version__} of a torch-zip at state_dict with the header "
        f"{header_digest(STATE)[:19]}…, `strip module.`, --dtype bfloat16"
    ]
    assert ckpt("ls", output, "--json").json["provenance"] == record_of(output)
    assert cs.open(output).provenance.rules == ("strip module.",)
    assert KEY not in cs.open(output).metadata


@pytest.mark.parametrize("output", OUTPUTS)
def test_it_is_left_out_where_it_is_not_wanted(output: str, ckpt: Any) -> None:
    save_file(STATE, "a.safetensors")
    cs.convert("a.safetensors", "b.safetensors")
    size = ["--shard-size", "24"] if output == "s/" else []
    assert ckpt("convert", "b.safetensors", output, "--no-provenance", "--force", *size).code == 0
    assert record_of(output) is None
    assert "provenance" not in ckpt("ls", output).out
    assert ckpt("ls", output, "--json").json["provenance"] is None


def test_shards_themselves_say_nothing() -> None:
    save_file(STATE, "a.safetensors")
    cs.convert("a.safetensors", "s/", shard_size=24)
    assert said(INDEX)["rules"] == []
    assert [said(path) for path in Path("s").glob("*.safetensors")] == [None, None]
    cs.convert("a.safetensors", "one/", shard_size="1GB")
    assert said("one/model.safetensors")["rules"] == []


def test_it_is_never_a_key_of_the_loaded_object() -> None:
    torch.save({"epoch": 3, "state_dict": STATE}, "a.pth")
    cs.remap("a.pth", "b.pth", ["strip module."], digest=True)
    cs.remap("a.pth", "c.pth", ["strip module."], keep_extras=True, digest=True)
    for how in ({}, {"mmap": True}, {"map_location": "meta"}):
        assert list(torch.load("b.pth", weights_only=True, **how)) == ["a", "b"]
        assert list(torch.load("c.pth", weights_only=True, **how)) == ["epoch", "state_dict"]
    assert_same_tensors(torch.load("b.pth", weights_only=True, mmap=True), stripped())
    for name in ("b.pth", "c.pth"):
        with zipfile.ZipFile(name) as archive:
            assert archive.testzip() is None
    cs.convert("b.pth", "b.safetensors")
    assert set(load_file("b.safetensors")) == {"a", "b"}
    assert list(cs.open("b.safetensors")) == ["a", "b"]


def test_a_second_step_replaces_it_and_keeps_eight_before() -> None:
    torch.save(STATE, "a.pth")
    cs.remap("a.pth", "0.pth", ["strip module."])
    for step in range(1, 12):
        suffix = ("pth", "safetensors")[step % 2]
        cs.remap(f"{step - 1}.{'pth' if step % 2 else 'safetensors'}", f"{step}.{suffix}", [f"^ => x{step}."])
    record = said("11.safetensors")
    assert record["rules"] == ["^ => x11."]
    assert [step["rules"] for step in record["history"]] == [[f"^ => x{step}."] for step in range(3, 11)]
    assert record["earlier"] == 3
    assert record["source"]["header"] == header_digest(torch.load("10.pth", weights_only=True))
    assert cs.open("11.safetensors").provenance.earlier == 3


def test_the_result_of_a_plan_knows_its_recipe_until_a_hand_changes_its_tensors() -> None:
    torch.save(STATE, "a.pth")
    cs.remap("a.pth", "b.pth", ["strip module."])
    result = cs.plan("b.pth", ["drop b"], dtype="float16").result
    cs.save(result, "c.safetensors")
    assert (said("c.safetensors")["rules"], said("c.safetensors")["options"]) == (["drop b"], {"dtype": "float16"})
    assert [step["rules"] for step in said("c.safetensors")["history"]] == [["strip module."]]
    other = result.replace(tensors={"z": result["a"]})
    cs.save(other, "d.safetensors")
    assert said("d.safetensors")["rules"] == []
    assert "history" not in said("d.safetensors")
    assert said("d.safetensors")["source"]["header"] == header_digest({"z": STATE["module.a"].half()})
    cs.save(cs.open("b.pth"), "e.safetensors")
    assert said("e.safetensors")["source"]["header"] == header_digest(stripped())
    assert [step["rules"] for step in said("e.safetensors")["history"]] == [["strip module."]]


def test_a_target_is_told_by_its_header_and_never_by_its_name(ckpt: Any) -> None:
    """What was initialised depends on the seed, so that is told then, and only then."""
    Path("secret_model.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a = torch.nn.Linear(3, 2)\n"
    )
    torch.save({"a.weight": torch.ones(2, 3)}, "a.pth")
    assert (
        ckpt("remap", "a.pth", "-o", "b.safetensors", "--to", "secret_model.py:Net", "--fit", "--seed", "5").code == 0
    )
    record = said("b.safetensors")
    assert record["target"] == header_digest({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)})
    assert record["options"] == {"fit": True, "seed": 5}
    assert b"secret" not in Path("b.safetensors").read_bytes()
    torch.save({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}, "full.pth")
    cs.remap("full.pth", "c.safetensors", to="secret_model.py:Net", seed=5)
    assert said("c.safetensors")["options"] == {}


def test_no_output_holds_a_path_or_a_name_of_the_machine(ckpt: Any, tmp_path: Path) -> None:
    """Whatever is written from a folder of a telling name, its name is nowhere in it, nor the user's or the host's."""
    folder = tmp_path / "telltale-folder"
    folder.mkdir()
    os.chdir(folder)
    torch.save({"epoch": 3, "state_dict": STATE}, "source-telltale.pth")
    Path("telltale.yaml").write_text(
        "version: 1\ndescription: telltale\nrules:\n  - rule: strip module.\n    note: telltale\n"
    )
    Path("telltale_model.py").write_text(
        "import torch\ndef make():\n    m = torch.nn.Module()\n    m.a = torch.nn.Parameter(torch.ones(2, 3))\n"
        "    m.register_buffer('b', torch.ones(4, dtype=torch.int64))\n    return m\n"
    )
    source = str(folder / "source-telltale.pth")
    recipe = ["--recipe", str(folder / "telltale.yaml"), "--to", f"{folder / 'telltale_model.py'}:make"]
    for output in ("b.safetensors", "b.pth", "s/"):
        size = ["--shard-size", "24"] if output == "s/" else []
        assert ckpt("remap", source, "-o", str(folder / output), *recipe, *size, "--digest").code == 0
    assert ckpt("remap", source, "-o", "c.pth", *recipe, "--keep-extras").code == 0
    cs.remap_in_place(str(folder / "b.safetensors"), ["a => c"])
    cs.remap_in_place(str(folder / "s"), ["a => c"])
    written = [
        path for path in folder.rglob("*") if path.is_file() and "telltale" not in path.name and path.suffix != ".pyc"
    ]
    assert len(written) == 6
    host, user = socket.gethostname().encode(), getpass.getuser().encode()
    for path in written:
        raw = path.read_bytes()
        assert b"telltale" not in raw
        assert str(tmp_path).encode() not in raw
        assert host not in raw
        assert user not in raw or user == b"root"


def test_the_same_input_and_rules_give_the_same_bytes_anywhere(tmp_path: Path) -> None:
    made = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        os.chdir(tmp_path / name)
        torch.save(STATE, "a.pth")
        cs.remap("a.pth", "b.safetensors", ["strip module."], digest=True)
        cs.remap("a.pth", "b.pth", ["strip module."], digest=True)
        cs.remap("b.pth", "s/", shard_size=24, digest=True)
        made.append({path.name: path.read_bytes() for path in Path().rglob("*") if path.is_file()})
    assert made[0] == made[1]


# -- digests ----------------------------------------------------------------------------------


def write_everywhere(state: dict[str, torch.Tensor], size: int, order: list[str]) -> dict[str, str]:
    """The digests of a state dict in every kind of file and order, by the name of the output."""
    torch.save(state, "in.pth")
    found = {}
    for output in ("o.safetensors", "o.pth", "o/", "i/pytorch_model.bin.index.json"):
        Path("i").mkdir(exist_ok=True)
        ckpt = cs.open("in.pth")
        turned = ckpt.replace(tensors={key: ckpt[key] for key in order})
        shards = size if output.endswith(("/", ".json")) else None
        found[output] = cs.save(turned, output, shard_size=shards, digest=True, force=True).digest
        assert cs.digest(output) == found[output]
        assert cs.open(output).provenance.content == found[output]
        assert cs.verify(output).digest == found[output]
        assert not [name for name in os.listdir(".") if name.endswith(".part")]
    return found


@settings(max_examples=25)
@given(state_dicts(), st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_digest_of_contents_is_that_of_the_documentation_in_every_format_order_and_shards(
    state: dict[str, torch.Tensor], size: int, chance: random.Random
) -> None:
    order = sorted(state)
    chance.shuffle(order)
    found = write_everywhere(state, size, order)
    assert set(found.values()) == {content_digest(state)}


@settings(max_examples=25)
@given(state_dicts(), st.data())
def test_any_change_of_a_bit_a_name_a_dtype_or_a_shape_is_another_digest(
    state: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    torch.save(state, "in.pth")
    ckpt = cs.open("in.pth")
    before = cs.digest(ckpt)
    key = data.draw(st.sampled_from(sorted(state)))
    ref = ckpt[key]

    def other(name: str, tensor: Any) -> str:
        rest = {k: r for k, r in ckpt.items() if k != key}
        return cs.digest(ckpt.replace(tensors={**rest, name: tensor}))

    assert other(key, ref) == before
    assert other(f"{key}x", ref) != before
    longer = cs.TensorRef(cs.TensorSpec(ref.dtype, (1, *ref.shape)), ref.source)
    if longer.source.strides is None:
        assert other(key, longer) != before
    if ref.nbytes:
        raw = bytearray(bits(state[key].contiguous()).numpy().tobytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        changed = torch.frombuffer(raw, dtype=torch.uint8).view(state[key].dtype).reshape(ref.shape)
        torch.save({key: changed}, "changed.pth")
        assert other(key, cs.open("changed.pth")[key]) != before
    twin = {"float16": "bfloat16", "bfloat16": "float16", "uint8": "int8", "int64": "float64", "float32": "int32"}
    if ref.shape and ref.dtype.name in twin:
        torch.save({key: state[key].contiguous().view(getattr(torch, twin[ref.dtype.name]))}, "retyped.pth")
        assert other(key, cs.open("retyped.pth")[key]) != before


def test_the_digest_of_a_header_knows_neither_order_nor_format() -> None:
    torch.save({"state_dict": STATE, "x": 1}, "a.pth")
    save_file(dict(reversed(STATE.items())), "a.safetensors")
    cs.convert("a.pth", "s/", shard_size=24)
    for source in ("a.pth", "a.safetensors", "s"):
        cs.convert(source, "out.pth", force=True)
        assert said("out.pth")["source"]["header"] == header_digest(STATE)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_tensor_counts_as_safetensors_holds_it() -> None:
    values = torch.arange(4, dtype=torch.int8)
    made = {f"q{scale}": torch._make_per_tensor_quantized_tensor(values + scale, float(scale), 3) for scale in (1, 2)}
    torch.save(made, "a.pth")
    pth, safe = (cs.convert("a.pth", name, digest=True).digest for name in ("b.pth", "b.safetensors"))
    assert pth == safe == content_digest(load_file("b.safetensors"))


def test_the_digest_with_extras_is_about_the_state_dict_in_its_place() -> None:
    torch.save({"epoch": 3, "0": {"model": STATE}, "ema": {"w": torch.ones(2)}}, "a.pth")
    made = cs.remap("a.pth", "b.pth", ["strip module."], select="0.model", keep_extras=True, digest=True)
    assert made.digest == content_digest(stripped())
    assert said("b.pth")["options"] == {"keep_extras": True}
    assert cs.verify("b.pth").ok
    assert_same_tensors(torch.load("b.pth", weights_only=True)["0"]["model"], stripped())


def test_what_is_written_with_a_digest_differs_from_what_is_without_in_nothing_else() -> None:
    torch.save({"w": torch.randn(300, 400), "v": torch.randn(5)}, "a.pth")
    for suffix in ("pth", "safetensors"):
        cs.convert("a.pth", f"with.{suffix}", digest=True)
        cs.convert("a.pth", f"without.{suffix}")
        assert_same_tensors(cs.open(f"with.{suffix}"), torch.load("a.pth", weights_only=True), ordered=False)
        record = said(f"with.{suffix}")
        assert record.pop("content") == cs.digest(f"without.{suffix}")
        assert record == said(f"without.{suffix}")


@pytest.mark.parametrize("output", OUTPUTS)
def test_verify_holds_the_recorded_digest_against_the_contents(output: str, ckpt: Any) -> None:
    """One bit of a tensor, or two names that change places, and it is damaged: exit 2."""
    state = {"a": torch.arange(6.0), "b": torch.arange(6.0) + 9}
    torch.save(state, "a.pth")
    cs.convert("a.pth", output, digest=True, shard_size=24 if output == "s/" else None)
    assert "(as the file says)" in ckpt("verify", output).out
    file = next(Path("s").glob("*-00002-of-*")) if output == "s/" else Path(output)
    raw = file.read_bytes()
    if output != "b.pth":  # its checksums would tell first
        for change in (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: raw.replace(b'"b":{', b'"c":{')):
            file.write_bytes(change(raw))
            if output == "s/":
                index = Path(INDEX).read_text()
                Path(INDEX).write_text(index.replace('"b"', '"c"') if b'"c"' in file.read_bytes() else index)
            ran = ckpt("verify", output)
            assert (ran.code, ran.out) == (2, "")
            assert "the contents have the digest" in ran.err
    else:
        with zipfile.ZipFile(output) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["archive/data/0"], members["archive/data/1"] = members["archive/data/1"], members["archive/data/0"]
        with zipfile.ZipFile(output, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        assert "the contents have the digest" in ckpt("verify", output).err
        assert ckpt("verify", output, "--json").json["ok"] is False


def test_verify_prints_a_digest_where_none_is_recorded(ckpt: Any) -> None:
    save_file(STATE, "a.safetensors")
    assert ckpt("verify", "a.safetensors", "--digest").out.splitlines()[-1] == f"contents: {content_digest(STATE)}"
    assert ckpt("verify", "a.safetensors", "--json").json["digest"] is None


def test_a_digest_has_no_other_place_than_the_provenance(ckpt: Any) -> None:
    save_file(STATE, "a.safetensors")
    ran = ckpt("convert", "a.safetensors", "b.safetensors", "--digest", "--no-provenance")
    assert (ran.code, "--digest needs it" in ran.err) == (2, True)
    assert ckpt("remap", "a.safetensors", "--in-place", "--digest", "--rule", "strip module.").code == 2
    assert sorted(os.listdir(".")) == ["a.safetensors"]


# -- in place ---------------------------------------------------------------------------------


def roomy(names: int = 40) -> dict[str, torch.Tensor]:
    return {f"a.rather.long.wrapper.{i}.weight": torch.ones(2) for i in range(names)}


def test_a_change_in_place_says_so_too_and_keeps_the_steps_before() -> None:
    save_file(roomy(), "a.safetensors")
    cs.remap_in_place("a.safetensors", [r"^a\.rather\.long\. => "])
    record = said("a.safetensors")
    assert record["rules"] == [r"^a\.rather\.long\. =>"]
    assert record["source"] == {"format": "safetensors", "select": ".", "header": header_digest(roomy())}
    cs.remap_in_place("a.safetensors", ["strip wrapper."])
    assert said("a.safetensors")["rules"] == ["strip wrapper."]
    assert [step["rules"] for step in said("a.safetensors")["history"]] == [[r"^a\.rather\.long\. =>"]]
    before = Path("a.safetensors").read_bytes()
    cs.remap_in_place("a.safetensors", ["0 => 0"])
    assert Path("a.safetensors").read_bytes() == before


def test_a_header_without_room_leaves_out_old_steps_first_and_then_all_of_it(ckpt: Any) -> None:
    """A record that is about other names never stays."""
    torch.save(STATE, "a.pth")
    cs.remap("a.pth", "a.safetensors", ["strip module."], digest=True)
    assert ckpt("remap", "a.safetensors", "--in-place", "--rule", "a => c").code == 0
    assert (said("a.safetensors")["rules"], said("a.safetensors")["earlier"]) == (["a => c"], 1)
    assert "content" not in said("a.safetensors")
    ran = ckpt("remap", "a.safetensors", "--in-place", "--rule", f"c(?#{'x' * 500}) => d")
    assert ran.code == 0
    assert "no room in the header for its provenance" in ran.out
    assert said("a.safetensors") is None
    assert set(load_file("a.safetensors")) == {"d", "b"}


def test_in_place_it_can_be_left_out() -> None:
    save_file(roomy(), "a.safetensors")
    cs.remap_in_place("a.safetensors", [r"^a\.rather\.long\. => "])
    cs.remap_in_place("a.safetensors", ["strip wrapper."], provenance=False)
    assert said("a.safetensors") is None


def test_the_index_of_shards_that_change_in_place_says_so() -> None:
    save_file(STATE, "a.safetensors")
    cs.convert("a.safetensors", "s/", shard_size=24, digest=True)
    cs.remap_in_place("s", ["strip module."])
    assert (said(INDEX)["rules"], said(INDEX).get("content")) == (["strip module."], None)
    assert [step["rules"] for step in said(INDEX)["history"]] == [[]]
    cs.remap_in_place("s", ["reshape ^a$ 3,2"])  # no name changes
    assert said(INDEX)["rules"] == ["reshape ^a$ 3,2"]
    cs.remap_in_place("s", ["reshape ^a$ 2,3"], provenance=False)
    assert said(INDEX) is None


# -- whatever stands there --------------------------------------------------------------------


GOOD = {
    "schema": "ckptsurgeon.provenance/1", "version": "9", "rules": ["x => y"], "options": {},
    "source": {"format": "torch-zip", "select": ".", "header": f"sha256:{'0' * 64}"},
}  # fmt: skip
BAD = {
    "no JSON": "{",
    "another schema": '{"schema": "ckptsurgeon.provenance/2"}',
    "a list": "[]",
    "a number of many digits": "1" * 5000,
    "NaN": "NaN",
    "nested deeply": "[" * 100_000,
    "a doubled key": '{"schema": "ckptsurgeon.provenance/1", "schema": "ckptsurgeon.provenance/1"}',
    "no source": json.dumps({**GOOD, "source": None}),
    "no digest": json.dumps({**GOOD, "source": {"header": "sha256:0"}}),
    "no text": json.dumps({**GOOD, "version": 3}),
    "a long version": json.dumps({**GOOD, "version": "9" * 1000}),
    "rules of numbers": json.dumps({**GOOD, "rules": [3]}),
    "an unknown option": json.dumps({**GOOD, "options": {"to": "evil.py:Net"}}),
    "an option of another type": json.dumps({**GOOD, "options": {"fit": 1}}),
    "an option in a list": json.dumps({**GOOD, "options": {"dtype": ["bfloat16"]}}),
    "a huge seed": json.dumps({**GOOD, "options": {"seed": 1 << 64}}),
    "a seed that is true": json.dumps({**GOOD, "options": {"seed": True}}),
    "a history of words": json.dumps({**GOOD, "history": ["x"]}),
    "a history that is none": json.dumps({**GOOD, "history": {}}),
    "fewer than no steps": json.dumps({**GOOD, "earlier": -1}),
    "a long one": json.dumps({**GOOD, "rules": ["x" * (1 << 20)]}),
    "escapes": '{"schema": "\x1b[31m"}',
}


def place(text: str, where: str) -> str:
    """A file that holds two tensors and this text as its record."""
    if where == "safetensors":
        save_file(stripped(), "h.safetensors", metadata={"who": "me", KEY: text})
        return "h.safetensors"
    if where == "zip":
        torch.save(stripped(), "h.pth")
        with zipfile.ZipFile("h.pth", "a") as archive:
            archive.writestr("h/ckptsurgeon.json", text)
        return "h.pth"
    Path("h").mkdir(exist_ok=True)
    save_file(stripped(), "h/model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(stripped(), "model-00001-of-00001.safetensors")
    index = {"metadata": {KEY: text}, "weight_map": weight_map}
    Path("h/model.safetensors.index.json").write_text(json.dumps(index))
    return "h"


@pytest.mark.parametrize("where", ["safetensors", "zip", "shards"])
@pytest.mark.parametrize("name", BAD)
def test_a_record_that_is_none_is_told_and_harms_nothing(name: str, where: str, ckpt: Any) -> None:
    path = place(BAD[name], where)
    listed = ckpt("ls", path)
    assert listed.code == 0
    (line,) = [text for text in listed.out.splitlines() if text.startswith("provenance")]
    assert line.startswith("provenance: cannot be read: ")
    assert line.isprintable()
    assert len(line) < 200
    assert list(ckpt("ls", path, "--json").json["provenance"]) == ["problem"]
    assert ckpt("verify", path).code == 0
    assert_same_tensors(cs.open(path), stripped(), ordered=False)
    cs.convert(path, "out.safetensors", force=True)
    assert "history" not in said("out.safetensors")
    assert ckpt("verify", path, "--against", path, "--recorded").code == 2


def test_one_of_a_hundred_megabytes_is_not_read(ckpt: Any) -> None:
    """Nor one that is packed: it says its size, or is cut off there."""
    torch.save(stripped(), "h.pth")
    with zipfile.ZipFile("h.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("h/ckptsurgeon.json", "x" * 100_000_000)
    assert "it has 100000000 bytes, over the 1048576 that are read" in ckpt("ls", "h.pth").out


def test_a_sound_record_is_shown_short_and_escaped(ckpt: Any) -> None:
    rules = ["\x1b[31m red => \u202e x", *(f"r{i} => {'y' * 500}" for i in range(30))]
    path = place(json.dumps({**GOOD, "rules": rules, "unknown": "\x1b", "version": "\x07"}), "safetensors")
    (line,) = [text for text in ckpt("ls", path).out.splitlines() if text.startswith("provenance")]
    assert line.isprintable()
    assert r"`\x1b[31m red => \u202e x`" in line
    assert line.endswith("28 more rules")
    assert len(line) < 500
    assert ckpt("ls", path, "--json").json["provenance"] == {**GOOD, "rules": rules, "version": "\x07"}


def test_a_damaged_record_is_told_by_ls_and_is_damage_to_verify(ckpt: Any) -> None:
    torch.save(STATE, "a.pth")
    cs.convert("a.pth", "b.pth")
    damaged_in("b.pth", "ckptsurgeon.json")
    assert "provenance: cannot be read: archive/ckptsurgeon.json does not have its checksum" in ckpt("ls", "b.pth").out
    ran = ckpt("verify", "b.pth")
    assert (ran.code, "ckptsurgeon.json does not have its checksum" in ran.err) == (2, True)


def test_a_recorded_digest_about_a_place_that_is_not_there_is_damage(ckpt: Any) -> None:
    digest = f"sha256:{'0' * 64}"
    source = {**GOOD["source"], "select": "no.such.place"}  # type: ignore[dict-item]
    path = place(json.dumps({**GOOD, "source": source, "options": {"keep_extras": True}, "content": digest}), "zip")
    ran = ckpt("verify", path)
    assert (ran.code, "is about 'no.such.place', which is not there" in ran.err) == (2, True)


def test_the_name_of_the_record_is_no_alias_and_no_tensor_hides_it() -> None:
    """A tied tensor of that very name is written in full, and a record that is a tensor's name makes none."""
    flat = torch.arange(3.0)
    torch.save({"w": flat, KEY: flat}, "a.pth")
    cs.convert("a.pth", "b.safetensors", tied="alias")
    assert set(load_file("b.safetensors")) == {"w", KEY}
    assert said("b.safetensors")["rules"] == []
    header = json.dumps(
        {"__metadata__": {KEY: "w"}, "w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    ).encode()
    Path("c.safetensors").write_bytes(safetensors_bytes(header, struct.pack("<3f", 0, 1, 2)))
    assert list(cs.open("c.safetensors")) == ["w"]
    save_file({"w": flat}, "d.safetensors", metadata={"v": "w"})
    with pytest.raises(cs.PlanError, match="would be an alias of 'w', and the metadata has an entry of that name"):
        cs.remap_in_place("d.safetensors", [f"^v$ => {KEY}"])
    ref = cs.open("d.safetensors")["w"]
    assert _aliases.restored({"w": ref}, {KEY: "w"})[0] == {"w": ref}


def test_a_recipe_too_long_to_be_kept_says_so(ckpt: Any) -> None:
    torch.save(STATE, "a.pth")
    cs.remap("a.pth", "b.pth", [f"{'x' * 4000}{i}? => y" for i in range(300)], allow_unused=True)
    assert said("b.pth")["rules"] is None
    assert "rules that are too many to be kept" in ckpt("ls", "b.pth").out
    assert ckpt("verify", "b.pth", "--against", "a.pth", "--recorded").code == 2

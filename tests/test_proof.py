"""`verify` proves what a recipe makes, counts NaN, and names what lies beside a checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import KEY, assert_same_tensors
from safetensors.torch import load_file, save_file

import ckptsurgeon as cs

NET = (
    "import torch\nclass Net(torch.nn.Module):\n    def __init__(self, n=4):\n        super().__init__()\n"
    "        self.conv = torch.nn.Conv2d(3, 4, 2)\n        self.fc = torch.nn.Linear(4, n)\n"
)


def source() -> dict[str, torch.Tensor]:
    state = {
        "module.conv.weight": torch.randn(4, 3, 1, 2, 2),
        "module.conv.bias": torch.randn(4),
        "module.fc.weight": torch.randn(9, 4),
        "module.fc.bias": torch.randn(9),
        "module.odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]),
    }
    torch.save({"epoch": 1, "state_dict": state}, "a.pth")
    Path("net.py").write_text(NET)
    return state


RECIPES: dict[str, list[str]] = {
    "nothing": ["--allow-unused"],
    "names": ["--rule", "strip module.", "--rule", r"^fc\. => head."],
    "dropped": ["--rule", "drop odd"],
    "shapes": [
        "--rule", "squeeze conv.weight 2", "--rule", "transpose fc.weight", "--rule", "permute conv.weight 1,0,2,3"
    ],
    "cast": ["--rule", "strip module.", "--dtype", "bf16"],
    "a copy": ["--rule", "copy fc.weight => twin"],
    "a turned cast": ["--rule", "cast fc.weight float16", "--rule", "transpose fc.weight"],
    "fit": ["--to", "net.py:Net", "--fit", "--seed", "7"],
    "policies": [
        "--to", "net.py:Net,n=12", "--rule", "strip module.", "--rule", "squeeze conv.weight 2",
        "--unexpected", "drop", "--mismatched", "overlap", "--missing", "init", "--seed", "3",
    ],
}  # fmt: skip
OUTPUTS = ("b.safetensors", "b.pth", "s/")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", RECIPES)
def test_whatever_remap_wrote_is_what_its_recipe_makes(name: str, output: str, ckpt: Any) -> None:
    """Given once more, and as the file records it; and it is whole."""
    source()
    words = RECIPES[name]
    size = ["--shard-size", "64"] if output == "s/" else []
    assert ckpt("remap", "a.pth", "-o", output, *words, *size, "--digest").code == 0
    assert ckpt("verify", output).code == 0
    ran = ckpt("verify", output, "--against", "a.pth", *words)
    assert ran.code == 0, ran.out
    assert ran.out.splitlines()[-1].startswith("it is what ")
    target = words[:2] if words[0] == "--to" else []
    assert ckpt("verify", output, "--against", "a.pth", "--recorded", *target).code == 0
    if words[0] == "--to":
        other = ckpt("verify", output, "--against", "a.pth", *words, "--seed", "8")
        assert other.code == 1, other.out


def test_extras_that_were_kept_are_no_hindrance(ckpt: Any) -> None:
    source()
    assert ckpt("remap", "a.pth", "-o", "b.pth", "--rule", "strip module.", "--keep-extras").code == 0
    assert ckpt("verify", "b.pth", "--against", "a.pth", "--rule", "strip module.").code == 0
    assert ckpt("verify", "b.pth", "--against", "a.pth", "--recorded").code == 0


def test_every_difference_is_named_and_is_a_no(ckpt: Any) -> None:
    state = {key.removeprefix("module."): value for key, value in source().items()}
    changed = dict(state)
    changed["fc.bias"] = state["fc.bias"].clone()
    changed["fc.bias"][3:5] += 1
    changed["fc.weight"] = state["fc.weight"].double()
    changed["conv.weight"] = state["conv.weight"].reshape(4, 3, 4)
    changed["more"] = changed.pop("conv.bias")
    save_file(changed, "b.safetensors")
    ran = ckpt("verify", "b.safetensors", "--against", "a.pth", "--rule", "strip module.")
    assert ran.code == 1
    assert ran.out.splitlines()[2:] == [
        "conv.weight: the recipe makes float32 [4, 3, 1, 2, 2], the file has float32 [4, 3, 4]",
        "conv.bias: the recipe makes it, float32 [4], and the file lacks it",
        "fc.weight: the recipe makes float32 [9, 4], the file has float64 [9, 4]",
        "fc.bias: 2 elements not as the recipe makes them",
        "more: the file has it, float32 [4], and the recipe does not make it",
        "it is not what 1 rule makes of a.pth: 5 differences",
    ]
    found = cs.verify("b.safetensors", "a.pth", ["strip module."]).proof
    assert found is not None
    assert [one.key for one in found.differences] == ["conv.weight", "conv.bias", "fc.weight", "fc.bias", "more"]
    assert (found.same, found.recorded, found.tensors, found.nbytes) == (False, False, 2, 36 + 16)


@pytest.mark.parametrize(
    ("have", "want", "same"),
    [
        (0x80000000, 0x00000000, False),  # -0 and 0
        (0x7FC00001, 0x7FC00000, False),  # NaN of other bits
        (0x7F800000, 0x7F800000, True),
        (0x3F800000, 0x3F800001, False),
    ],
)
def test_what_is_moved_counts_by_its_bits(have: int, want: int, same: bool) -> None:
    for name, bits in (("a", want), ("b", have)):
        tensor = torch.frombuffer(bytearray(struct.pack("<2I", 1, bits)), dtype=torch.float32)
        save_file({"x.w": tensor}, f"{name}.safetensors")
    proof = cs.verify("b.safetensors", "a.safetensors", ["x => x"]).proof
    assert proof is not None
    assert proof.same is same


def test_where_a_value_is_computed_a_nan_is_a_nan() -> None:
    """And nothing else is: an infinity, a zero of the other sign, the last bit."""
    save_file({"w": torch.tensor([float("nan"), float("inf"), -0.0, 1.5])}, "a.safetensors")
    for bits, differing in (
        ((0xFFC1, 0x7F80, 0x8000, 0x3FC0), 0),
        ((0x7F81, 0x7F80, 0x8000, 0x3FC0), 0),
        ((0x7F80, 0x7F80, 0x8000, 0x3FC0), 1),
        ((0x7FC0, 0x7FC0, 0x0000, 0x3FC1), 3),
    ):
        raw = bytearray(struct.pack("<4H", *bits))
        save_file({"w": torch.frombuffer(raw, dtype=torch.bfloat16)}, "b.safetensors")
        proof = cs.verify("b.safetensors", "a.safetensors", dtype="bf16").proof
        assert proof is not None
        words = [f"{differing} element{'s' if differing > 1 else ''} not as the recipe makes them"] if differing else []
        assert [one.text for one in proof.differences] == words


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_and_narrow_tensors_are_proven_too() -> None:
    quantized = torch._make_per_tensor_quantized_tensor(torch.arange(4, dtype=torch.int8), 0.5, 3)
    narrow = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({"q": quantized, "n": narrow}, "a.pth")
    cs.remap("a.pth", "b.safetensors", ["^ => x."])
    proof = cs.verify("b.safetensors", "a.pth", ["^ => x."]).proof
    assert proof is not None
    assert (proof.same, proof.tensors) == (True, 4)
    raw = bytearray(Path("b.safetensors").read_bytes())
    at = raw.index(bytes(range(8)))
    raw[at + 5] ^= 0xFF
    Path("b.safetensors").write_bytes(raw)
    proof = cs.verify("b.safetensors", "a.pth", ["^ => x."]).proof
    assert proof is not None
    assert [(one.key, one.text) for one in proof.differences] == [("x.n", "1 byte not as the recipe makes them")]


def test_rules_that_do_not_fit_the_source_are_a_no(ckpt: Any) -> None:
    source()
    ckpt("convert", "a.pth", "b.pth")
    ran = ckpt("verify", "b.pth", "--against", "a.pth", "--rule", "strip nothing.")
    assert (ran.code, "no key begins with this prefix" in ran.err) == (1, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rule", "x => y"], "name it with --against"),
        (["--dtype", "bf16"], "name it with --against"),
        (["--recorded"], "name it with --against"),
        (["--against", "a.pth", "--recorded", "--rule", "x => y"], "--recorded takes the rules and options"),
        (["--against", "a.pth", "--recorded", "--fit"], "--recorded takes the rules and options"),
        (["--against", "a.pth", "--recorded"], "records no recipe that could be replayed"),
        (["--against", "a.pth", "--fit"], "name one with --to"),
    ],
)
def test_options_that_contradict_each_other_are_bad_usage(words: list[str], told: str, ckpt: Any) -> None:
    source()
    ran = ckpt("verify", "a.pth", *words)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err


def test_a_damaged_file_is_not_compared(ckpt: Any) -> None:
    source()
    ckpt("convert", "a.pth", "b.safetensors", "--digest")
    raw = Path("b.safetensors").read_bytes()
    Path("b.safetensors").write_bytes(raw[:-1] + b"\1")
    found = ckpt("verify", "b.safetensors", "--against", "a.pth", "--recorded", "--nan", "--json")
    assert found.code == 2
    assert (found.json["proof"], found.json["against"], found.json["nan_inf"]) == (None, None, None)


# -- the file's own recipe --------------------------------------------------------------------


def test_a_recorded_recipe_is_about_the_source_that_it_names(ckpt: Any) -> None:
    state = source()
    ckpt("remap", "a.pth", "-o", "b.safetensors", "--rule", "strip module.")
    torch.save({"epoch": 1, "state_dict": {**state, "more": torch.ones(1)}}, "other.pth")
    ran = ckpt("verify", "b.safetensors", "--against", "other.pth", "--recorded")
    assert ran.code == 1
    assert "provenance: the file says that its source has the header sha256:" in ran.out
    torch.save(state, "flat.pth")
    assert ckpt("verify", "b.safetensors", "--against", "flat.pth", "--recorded").code == 1
    assert ckpt("verify", "b.safetensors", "--against", "flat.pth", "--rule", "strip module.").code == 0
    changed = {key: value + 1 for key, value in state.items()}
    torch.save({"epoch": 1, "state_dict": changed}, "changed.pth")
    assert ckpt("verify", "b.safetensors", "--against", "changed.pth", "--recorded").code == 1


def test_a_recorded_target_is_to_be_named_and_must_be_the_one(ckpt: Any) -> None:
    source()
    ckpt("remap", "a.pth", "-o", "b.safetensors", "--to", "net.py:Net", "--fit")
    ran = ckpt("verify", "b.safetensors", "--against", "a.pth", "--recorded")
    assert (ran.code, "name it with --to" in ran.err) == (2, True)
    ran = ckpt("verify", "b.safetensors", "--against", "a.pth", "--recorded", "--to", "net.py:Net,n=5")
    assert (ran.code, "its target has the header" in ran.out) == (1, True)


def recording(rules: list[str], *, name: str = "w", names: int = 0, **more: Any) -> None:
    """b.safetensors, which says that these rules made it of a.safetensors."""
    save_file({name: torch.ones(2), **{f"n{n}": torch.ones(1) for n in range(names)}}, "a.safetensors")
    cs.convert("a.safetensors", "b.safetensors", force=True)
    (text,) = [load_metadata("b.safetensors")[KEY]]
    record = {**json.loads(text), "rules": rules, **more}
    save_file(load_file("b.safetensors"), "b.safetensors", metadata={KEY: json.dumps(record)})


def load_metadata(path: str) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_record_that_names_a_model_runs_nothing(ckpt: Any) -> None:
    """Neither as an option nor as a target, nor as a field that nobody knows."""
    Path("evil.py").write_text("open('fired', 'w')\ndef make():\n    open('fired', 'w')\n")
    for more in ({"options": {"to": "evil.py:make"}}, {"to": "evil.py:make"}, {"target": "evil.py:make"}):
        recording(["w => w"], **more)
        for words in (["ls"], ["verify"], ["verify", "--against", "a.safetensors", "--recorded"]):
            assert ckpt(words[0], "b.safetensors", *words[1:]).code in (0, 2)
    assert not Path("fired").exists()


@pytest.mark.parametrize(
    "rule",
    [r"(a+)+$ => x", r"(a|a)* => x", r"'(?x) (a+) +' => x", r"drop (.*)\1", r"(?P<a>.)(?P=a) => x", "drop .*.*.*.*.*b",
     r"'(?#[)^(a+)+$(?#])' => x", r"'(a)?(?(1)b|c)' => x", "drop " + "a" * 2001,
     "'[" + "\U0001f600\U0001f602" * 9 + "]*zq' => x", r"drop []](x)+", r"drop [\]](x)+", "drop a(x)*?b",
     r"[)](a+){9,} => x", r"drop [^]](x)+", r"drop \\(a+)+"],
)  # fmt: skip
def test_a_recorded_pattern_that_could_take_for_ever_is_refused(rule: str, ckpt: Any) -> None:
    recording([rule])
    ran = ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded")
    assert (ran.code, "may take very long" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("drop " + "a?" * 40 + "a" * 40, "may take very long on"),
        ("drop " + "(a|a)" * 30 + "b", "may take very long on"),
        ("drop .*.*.*.*b", "may take very long on"),
        (r"^(.*)$ => " + r"\g<0>" * 5000, "may make names without end"),
        ("'' => " + "x" * 60_000, "may make names without end"),
    ],
)
def test_a_recorded_rule_that_could_take_for_ever_on_these_names_is_refused(rule: str, words: str, ckpt: Any) -> None:
    name = "a" * 1500
    recording([rule], name=name)
    ran = ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded")
    assert (ran.code, words in ran.err) == (2, True), ran.err
    assert "if you trust it, give it by --rule" in ran.err
    assert len(ran.err) < 2000


def test_the_steps_of_all_recorded_rules_count_together(ckpt: Any) -> None:
    recording([f"'a*z{number}' => x" for number in range(3)], name="a" * 20_000)
    assert "names nothing" not in ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded").err
    recording([f"'a*z{number}' => x" for number in range(9)], name="a" * 20_000)
    ran = ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded")
    assert (ran.code, "`'a*z2' => x`, whose pattern may take very long on 1 names" in ran.err) == (2, True), ran.err


def test_a_pattern_with_an_odd_class_says_nothing_of_python(ckpt: Any, recwarn: Any) -> None:
    recording(["'[[a]zz' => x"], options={"allow_unused": True})
    assert ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded").code == 0
    assert not recwarn.list


def test_recorded_rules_that_grow_names_end_before_memory_does(ckpt: Any) -> None:
    recording([r"^(.*)$ => \1\1\1\1\1\1\1\1"] * 9, name="a" * 100)
    ran = ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded")
    assert (ran.code, "may make names without end" in ran.err) == (2, True), ran.err


def test_the_names_that_a_recorded_rule_makes_count_together(ckpt: Any) -> None:
    """Each is short enough by itself."""
    recording([r"^n(\d+) => " + "x" * 1_000_000 + r"\1"], names=80)
    ran = ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded")
    assert (ran.code, "may make names without end" in ran.err) == (2, True), ran.err[:300]


def test_deep_recorded_patterns_are_no_rules(ckpt: Any) -> None:
    recording(["drop " + "(" * 20_000 + ")" * 20_000])
    ran = ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded")
    assert ran.code == 2
    assert len(ran.err) < 3000


@pytest.mark.parametrize("rule", ["concat (a+)+$ ^w$ => x", r"stack ^(a+)+\.{i}$ => x", "split (w+)+$ => a b"])
def test_every_pattern_of_a_recorded_rule_is_looked_at(rule: str, ckpt: Any) -> None:
    recording([rule])
    ran = ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded")
    assert (ran.code, "may take very long" in ran.err) == (2, True), ran.err


GREEDY = [
    "fill x 100000,100000 normal",
    "pad w 10000000000",
    "reshape w 1,1,1,-1|resize w 100000,100000 as=patch",
    "reshape w -1,1,1,1|channels w 4000000000",
    "reshape w -1,1,1,1|inflate w 4000000000",
]


@pytest.mark.parametrize("rules", GREEDY)
def test_a_recorded_rule_that_makes_a_large_tensor_is_refused(rules: str, ckpt: Any) -> None:
    recording(rules.split("|"))
    ran = ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded")
    assert (ran.code, "bytes of memory at once, over the limit of" in ran.err) == (2, True), ran.err


def test_usual_recorded_patterns_and_lines_that_are_no_rules(ckpt: Any) -> None:
    for rule in (r"^layers\.(\d+)\.(.*)\.(\w+)$ => \1.\2.\3", r"drop [)*+]\(x\)+", r"(?:a|w)? => \g<0>"):
        recording([rule], options={"allow_unused": True})
        assert ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded").code == 0, rule
    recording(["this is no rule"])
    assert ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded").code == 2
    recording(["w => w"] * 1001)
    assert "too many rules" in ckpt("verify", "b.safetensors", "--against", "a.safetensors", "--recorded").err


def test_a_comparison_that_fails_points_to_the_record_only_if_it_is_about_that_source(ckpt: Any) -> None:
    state = source()
    ckpt("remap", "a.pth", "-o", "b.safetensors", "--rule", "strip module.")
    hint = "hint: the file says that it was made of this one by `strip module.`; --recorded tells whether that is so"
    assert hint in ckpt("verify", "b.safetensors", "--against", "a.pth").out
    torch.save({"x": state["module.odd"]}, "other.pth")
    ran = ckpt("verify", "b.safetensors", "--against", "other.pth")
    assert (ran.code, "--recorded" in ran.out) == (1, False)


# -- NaN and infinities -----------------------------------------------------------------------


FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinities_are_counted_as_torch_counts_them(dtype: torch.dtype) -> None:
    """Of every bit pattern of up to 16 bits, and of many of the wider types."""
    width = dtype.itemsize
    if width <= 2:
        raw = b"".join(number.to_bytes(width, "little") for number in range(1 << (8 * width)))
    else:
        heads = [0x7F80, 0x7FF0, 0x7FC0, 0xFF80, 0xFFF0, 0x7F7F, 0x7FEF, 0, 0x8000]
        raw = b"".join(
            (head << (8 * width - 16) | tail).to_bytes(width, "little") for head in heads for tail in (0, 1, 1 << 15)
        )
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype)
    torch.save({"w": tensor}, "a.pth")
    wide = tensor.double()
    found = cs.verify("a.pth", nan=True).nan_inf
    assert found == (("w", int(wide.isnan().sum()), int(wide.isinf().sum())),)


def test_of_complex_numbers_either_part_counts_and_integers_have_none(ckpt: Any) -> None:
    nan, inf = float("nan"), float("inf")
    state = {
        "c": torch.tensor([complex(nan, 0), complex(0, inf), complex(nan, inf), 1j]),
        "d": torch.tensor([complex(nan, nan)], dtype=torch.complex128),
        "i": torch.ones(3, dtype=torch.int64),
        "w": torch.tensor([[nan, 1.0], [inf, -inf]]).t(),
        "s": torch.eye(2).to_sparse(),
    }
    torch.save({"net": state, "other": {"x": torch.tensor([nan])}}, "a.pth")
    ran = ckpt("verify", "a.pth", "--nan")
    assert ran.code == 0
    assert ran.out.splitlines()[3:] == [
        "c: 2 NaN, 2 infinite", "d: 1 NaN, 0 infinite", "w: 1 NaN, 2 infinite", "x: 1 NaN, 0 infinite",
        "5 NaN and 4 infinite in 4 of 5 tensors",
    ]  # fmt: skip
    assert {"key": "i", "nan": 0, "inf": 0} in ckpt("verify", "a.pth", "--nan", "--json").json["nan_inf"]
    assert ckpt("verify", "a.pth", "--json").json["nan_inf"] is None


def test_counting_and_proving_take_little_memory_and_no_torch() -> None:
    """Of 400 MB, in under 130 MB, renamed and cast."""
    torch.save({"m.w": torch.zeros(50_000_000), "m.v": torch.zeros(100_000_000, dtype=torch.float16)}, "a.pth")
    cs.remap("a.pth", "b.safetensors", ["strip m.", "cast ^w$ bf16"], digest=True)
    code = (
        "import sys; import ckptsurgeon as cs; found = cs.verify('b.safetensors', 'a.pth', recorded=True, nan=True); "
        "assert found.proof.same and found.digest and len(found.nan_inf) == 2; assert 'torch' not in sys.modules; "
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 130_000


# -- what lies beside -------------------------------------------------------------------------


def test_what_lies_beside_shards_is_named_and_is_no_damage(ckpt: Any) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, "a.safetensors")
    cs.convert("a.safetensors", "s/", shard_size=16)
    assert ckpt("verify", "s", "--json").json["orphans"] == []
    for name in ("model-00003-of-00003.safetensors", "model.safetensors"):
        shutil.copy("s/model-00001-of-00002.safetensors", f"s/{name}")
    for name in ("adapter_model.safetensors", "config.json", "other-00001-of-00001.safetensors", ".hidden"):
        Path(f"s/{name}").write_bytes(b"")
    os.mkdir("s/.model.safetensors.index.json.0123abcd.part")
    Path("s/.model-00001-of-00002.safetensors.0123abcd.part").write_bytes(b"")
    Path("s/.unrelated.safetensors.0123abcd.part").write_bytes(b"")
    Path("s/.model.safetensors.index.json.journal").write_text("{}")
    ran = ckpt("verify", "s/model.safetensors.index.json")
    assert ran.code == 0
    assert [text for text in ran.out.splitlines() if text.startswith("beside it")] == [
        "beside it: model-00003-of-00003.safetensors: model.safetensors.index.json does not name it",
        "beside it: model.safetensors: many programs load it instead of model.safetensors.index.json",
        "beside it: .model-00001-of-00002.safetensors.0123abcd.part: "
        "a run that was killed left it; the next one that writes there removes it",
        "beside it: .model.safetensors.index.json.0123abcd.part: "
        "a run that was killed left it; the next one that writes there removes it",
        "beside it: .model.safetensors.index.json.journal: "
        "shards were taking their places when their writer was stopped; --repair finishes it",
    ]
    names = [one["name"] for one in ckpt("verify", "s/model.safetensors.index.json", "--json").json["orphans"]]
    assert len(names) == 5


def test_what_a_living_run_holds_is_no_orphan() -> None:
    save_file({"a": torch.ones(4)}, "a.safetensors")
    staged = Path(".a.safetensors.0123abcd.part")
    staged.write_bytes(b"")
    assert [one.name for one in cs.verify("a.safetensors").orphans] == [staged.name]
    descriptor = os.open(staged, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert cs.verify("a.safetensors").orphans == ()
    finally:
        os.close(descriptor)


def test_a_whole_file_among_numbered_ones_has_no_orphans() -> None:
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        save_file({"a": torch.ones(4)}, name)
    assert cs.verify("model.safetensors").orphans == ()
    assert cs.verify("model-00001-of-00002.safetensors").orphans == ()


def test_a_link_or_a_pipe_of_the_name_of_what_is_staged_is_not_followed(ckpt: Any) -> None:
    save_file({"a": torch.ones(4)}, "a.safetensors")
    os.symlink("/dev/zero", ".a.safetensors.0123abcd.part")
    os.mkfifo(".a.safetensors.0123abce.part")
    os.mkfifo(".a.safetensors.journal")
    assert len(ckpt("verify", "a.safetensors", "--json").json["orphans"]) == 3


def test_which_state_dict_of_several_is_meant_is_said_by_select_or_by_the_record(ckpt: Any) -> None:
    state = source()
    torch.save({"netG": state, "netD": {"x": torch.ones(2)}}, "two.pth")
    rules = ["--rule", "strip module."]
    assert ckpt("remap", "two.pth", "-o", "b.pth", "--select", "netG", "--keep-extras", *rules).code == 0
    assert ckpt("verify", "b.pth", "--against", "two.pth", "--recorded").code == 0
    assert ckpt("verify", "b.pth", "--against", "two.pth", "--select", "netG", *rules).code == 0
    assert ckpt("verify", "b.pth", "--against", "two.pth", *rules).code == 2
    assert ckpt("verify", "b.pth", "--against", "two.pth", "--select", "netD", "--allow-unused").code == 0


def test_a_folder_that_may_not_be_listed_has_no_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(4)}, "a.safetensors")

    def refused(path: str) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    assert cs.verify("a.safetensors").orphans == ()


def test_in_place_changes_are_proven_by_their_record() -> None:
    state = {f"a.rather.long.wrapper.{i}.weight": torch.randn(3) for i in range(40)}
    save_file(state, "b.safetensors")
    shutil.copy("b.safetensors", "a.safetensors")
    cs.remap_in_place("b.safetensors", [r"^a\.rather\.long\.wrapper\. => "])
    proof = cs.verify("b.safetensors", "a.safetensors", recorded=True).proof
    assert proof is not None
    assert (proof.same, proof.tensors) == (True, 40)
    assert_same_tensors(
        load_file("b.safetensors"), {key.split("wrapper.")[1]: value for key, value in state.items()}, ordered=False
    )

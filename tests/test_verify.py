"""`ckpt verify`: every byte is read, every checksum is held against its bytes, all damage is named at once."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_legacy
from safetensors.torch import save_file

import ckptsurgeon as cs


def state() -> dict[str, torch.Tensor]:
    return {f"layers.{i}.weight": torch.randn(40, 50) for i in range(4)}


def damage(path: str, member: str, into: str = "bad.pth") -> None:
    """Turn one bit in the middle of a member of a zip archive."""
    info = zipfile.ZipFile(path).getinfo(member)
    raw = bytearray(Path(path).read_bytes())
    name, extra = (
        int.from_bytes(raw[info.header_offset + at : info.header_offset + at + 2], "little") for at in (26, 28)
    )
    raw[info.header_offset + 30 + name + extra + info.file_size // 2] ^= 1
    Path(into).write_bytes(raw)


def test_a_whole_archive_and_how_much_of_it_was_checked(ckpt: Any) -> None:
    torch.save(
        {"state_dict": state(), "optimizer": {"state": {0: {"exp": torch.ones(3)}}, "param_groups": []}}, "a.pth"
    )
    found = ckpt("verify", "a.pth", "--json").json
    members = zipfile.ZipFile("a.pth").infolist()
    assert (found["ok"], found["tensors"], found["problems"]) == (True, 5, [])
    assert found["checksums"] == len(members)
    assert found["nbytes"] == sum(info.file_size for info in members)
    assert ckpt("verify", "a.pth").out == (
        f"a.pth: torch-zip, whole\n5 tensors, {found['nbytes'] / 1024:.1f} KiB read; {len(members)} checksums right\n"
    )


def test_every_damaged_tensor_is_named_at_once(ckpt: Any) -> None:
    torch.save(state(), "a.pth")
    damage("a.pth", "a/data/1")
    damage("bad.pth", "a/data/3")
    ran = ckpt("verify", "bad.pth")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines() == [
        f"ckpt: error: bad.pth: 'layers.{i}.weight': the record a/data/{i} does not have its checksum: it is damaged"
        for i in (1, 3)
    ]
    found = ckpt("verify", "bad.pth", "--json").json
    assert [problem["key"] for problem in found["problems"]] == ["layers.1.weight", "layers.3.weight"]


@pytest.mark.parametrize("output", ["b.pth", "b.safetensors", "shards/"])
def test_nothing_damaged_is_copied(output: str, ckpt: Any) -> None:
    """Whole records are proven while they are copied; nothing takes its place."""
    torch.save(state(), "a.pth")
    damage("a.pth", "a/data/2")
    before = sorted(os.listdir("."))
    ran = ckpt("convert", "bad.pth", output)
    assert (ran.code, ran.out) == (2, "")
    assert "bad.pth: 'layers.2.weight': the record a/data/2 does not have its checksum" in ran.err
    assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize("form", ["transposed", "parts of one storage", "cast", "deflated"])
def test_damage_is_found_however_the_bytes_are_read(form: str, ckpt: Any) -> None:
    flat = torch.randn(2000)
    states = {"transposed": {"w": flat.view(40, 50).t()}, "parts of one storage": {"a": flat[:900], "w": flat[900:]}}
    torch.save(states.get(form, {"w": flat}), "a.pth")
    damage("a.pth", "a/data/0")
    if form == "deflated":
        with zipfile.ZipFile("a.pth") as old, zipfile.ZipFile("bad.pth", "w") as new:
            for info in old.infolist():
                raw = old.read(info)
                packed = info.filename.endswith("data/0")
                new.writestr(info.filename, raw, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
        raw = bytearray(Path("bad.pth").read_bytes())
        at = zipfile.ZipFile("bad.pth").getinfo("a/data/0")
        for place in (
            at.header_offset + 14,
            raw.rindex(b"PK\1\2", 0, raw.index(b"a/data/0", at.header_offset + 50)) + 16,
        ):
            raw[place] ^= 1  # both copies of its checksum
        Path("bad.pth").write_bytes(raw)
    dtype = ["--dtype", "bf16"] if form == "cast" else []
    ran = ckpt("convert", "bad.pth", "b.pth", *dtype)
    assert ran.code == 2
    assert "the record a/data/0 does not have its checksum" in ran.err
    assert not Path("b.pth").exists()


def test_damage_beside_the_tensors_is_found_too(ckpt: Any) -> None:
    torch.save(state(), "a.pth")
    damage("a.pth", "a/version")
    assert cs.open("bad.pth").numel == 8000
    ran = ckpt("verify", "bad.pth")
    assert ran.code == 2
    assert "the record a/version does not have its checksum" in ran.err


def test_archives_without_checksums_are_whole(ckpt: Any) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    ran = ckpt("verify", "a.pth")
    assert ran.code == 0
    assert "it has no checksums" in ran.out
    damage("a.pth", "a/data/1")
    assert ckpt("convert", "bad.pth", "b.pth").code == 0


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_other_kinds_are_read_to_their_last_byte(ckpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_legacy(state(), "a.pth")
    save_file(state(), "a.safetensors")
    torch.jit.script(torch.nn.Linear(3, 4)).save("a.pt")
    assert [ckpt("verify", name, "--json").json["nbytes"] for name in ("a.pth", "a.safetensors")] == [32000, 32000]
    assert ckpt("verify", "a.pt", "--json").json["tensors"] == 2
    real = os.preadv

    def failing(descriptor: int, buffers: list[Any], offset: int) -> int:
        if offset > 16_000:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    ran = ckpt("verify", "a.safetensors")
    assert ran.code == 2
    assert "a.safetensors: 'layers.2.weight': cannot be read: Input/output error" in ran.err


def test_shards_and_remarks_about_their_index(ckpt: Any) -> None:
    torch.save({**state(), "tied": torch.ones(3)}, "a.pth")
    ckpt("convert", "a.pth", "s/", "--shard-size", "16KB")
    found = ckpt("verify", "s", "--json").json
    assert (found["ok"], found["tensors"], found["nbytes"], len(found["files"])) == (True, 5, 32012, 3)
    assert found["remarks"] == []
    index = Path("s/model.safetensors.index.json")
    index.write_text(
        index.read_text().replace("32012", "7").replace('"tied"', '"layers.3.weight"').replace("}\n", "}", 0)
    )
    assert ckpt("verify", "s").code == 2  # the key stands twice now
    shutil.rmtree("s")
    ckpt("convert", "a.pth", "s/", "--shard-size", "16KB")
    index.write_text(index.read_text().replace("32012", "7"))
    ran = ckpt("verify", "s")
    assert ran.code == 0
    assert "note: the index says 7 bytes, the tensors have 32012" in ran.out


def test_against_another_file_values_count(ckpt: Any) -> None:
    first = state()
    torch.save(first, "a.pth")
    save_file(first, "b.safetensors")
    assert ckpt("verify", "a.pth", "--against", "b.safetensors").code == 0
    first["layers.1.weight"][3, 4] += 1
    save_file(first, "b.safetensors")
    ran = ckpt("verify", "a.pth", "--against", "b.safetensors")
    assert ran.code == 1
    assert "values: 3 of 4 tensors equal" in ran.out
    found = cs.verify("a.pth", "b.safetensors")
    assert found.ok
    assert found.against is not None
    assert [row.key for row in found.against.rows if row.status == "values"] == ["layers.1.weight"]


def test_tensors_without_bytes_are_told(ckpt: Any) -> None:
    torch.save({"s": torch.eye(3).to_sparse(), "w": torch.ones(2)}, "a.pth")
    assert "no bytes to read of s" in ckpt("verify", "a.pth").out


def test_a_large_file_is_verified_in_little_memory(tmp_path: Path) -> None:
    """300 MB, in under 100 MB of memory, without torch."""
    import subprocess
    import sys

    torch.save({"w": torch.zeros(300_000_000, dtype=torch.uint8)}, "a.pth")
    code = (
        "import sys; import ckptsurgeon as cs; found = cs.verify('a.pth'); assert found.ok; "
        "assert 'torch' not in sys.modules; "
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 100_000

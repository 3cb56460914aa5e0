"""Distributed checkpoints of torch: listed through the inert reader, held against torch's own, and not read yet."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import ckptsurgeon as cs

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's about saving without a process group


def trained() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def save(state: Any) -> None:
    dcp.save(state, checkpoint_id="d", no_dist=True)


def changed(change: Callable[[Metadata], object]) -> None:
    """The metadata, after a change to torch's own objects."""
    found = dcp.FileSystemReader("d").read_metadata()
    change(found)
    Path("d/.metadata").write_bytes(pickle.dumps(found))


def test_names_dtypes_shapes_and_nesting_are_those_of_what_was_saved() -> None:
    state = trained()
    state["half"] = {"w": torch.ones(2, 0, 3, dtype=torch.bfloat16)}
    save(state)
    found = cs.inspect("d")
    assert [candidate.name for candidate in found.candidates] == ["model", "half"]
    ckpt = cs.open("d", "model")
    assert {key: (str(ref.dtype), tuple(ref.shape)) for key, ref in ckpt.items()} == {
        key: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for key, value in state["model"].items()
    }
    half = cs.open("d", "half")["w"]
    assert (str(half.dtype), half.shape) == ("bfloat16", (2, 0, 3))
    assert set(ckpt.extras) == {"optimizer", "epoch", "half"}


def test_a_flat_one_is_its_own_state_dict_and_the_metadata_may_be_named(ckpt: Any) -> None:
    save(trained()["model"])
    for path in ("d", "d/.metadata"):
        ran = ckpt("ls", path, "--json").json
        assert [row["key"] for row in ran["tensors"]][:2] == ["0.weight", "0.bias"]
        assert ran["format"] == "torch-dcp"
    assert "distributed (DCP, 1 chunk); its bytes are not here" in ckpt("ls", "d").out
    assert ckpt("diff", "d", "d").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "d", "out.pth"),
        ("convert", "d", "out.safetensors", "--force"),
        ("remap", "d", "-o", "out/", "--rule", "prefix a."),
    ],
)
def test_writing_one_is_refused_in_a_line_that_says_what_to_do(words: tuple[str, ...], ckpt: Any) -> None:
    save(trained()["model"])
    ran = ckpt(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "ckpt: error: d/.metadata: is a distributed checkpoint of torch (DCP), which is listed and not read yet; where "
        "you trust it, `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT` makes "
        "a file of it\n"
    )
    assert os.listdir(".") == ["d"]
    with pytest.raises(cs.InputError, match="does not hold its bytes"):
        cs.open("d")["0.bias"].read()
    with pytest.raises(cs.InputError, match="listed and not read yet"):
        cs.save(cs.open("d"), "out.pth")


def test_what_it_advises_makes_a_checkpoint_that_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = trained()["model"]
    save(state)
    dcp_to_torch_save("d", "out.pth")
    assert torch.equal(cs.open("out.pth")["0.weight"].read(), state["0.weight"])


def test_verify_looks_at_the_files_and_says_that_it_read_no_tensor(ckpt: Any) -> None:
    save(trained()["model"])
    ran = ckpt("verify", "d")
    assert ran.code == 0
    assert "the tensors of a distributed checkpoint are listed, not read" in ran.out + ran.err
    os.truncate("d/__0_0.distcp", 100)
    ran = ckpt("verify", "d")
    assert ran.code == 2
    assert "__0_0.distcp has 100 bytes, and chunks reach to byte" in ran.err


def _chunks(metadata: Metadata) -> list[ChunkStorageMetadata]:
    return metadata.state_dict_metadata["0.weight"].chunks


def _moved(metadata: Metadata, path: str) -> None:
    next(iter(metadata.storage_data.values())).relative_path = path


def _sized(metadata: Metadata, **how: Any) -> None:
    for name, value in how.items():
        setattr(next(iter(metadata.storage_data.values())), name, value)


size = torch.Size
BAD: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a file above": (lambda m: _moved(m, "../x.distcp"), "'../x.distcp', which is no file in its own folder"),
    "an absolute file": (lambda m: _moved(m, "/etc/passwd"), "'/etc/passwd', which is no file in its own folder"),
    "a file that is not there": (lambda m: _moved(m, "x.distcp"), "its files are not all whole: x.distcp is not there"),
    "a chunk beyond the file": (lambda m: _sized(m, length=1 << 40), "and chunks reach to byte"),
    "a negative offset": (lambda m: _sized(m, offset=-1), "an offset is -1, no count"),
    "a length that is true": (lambda m: _sized(m, length=True), "a length is True, no count"),
    "no chunk": (lambda m: _chunks(m).clear(), "'0.weight': damaged: its chunks have 0 elements, it has 6"),
    "a doubled chunk": (lambda m: _chunks(m).append(_chunks(m)[0]), "'0.weight' has a chunk that is another one's too"),
    "a chunk outside": (
        lambda m: _chunks(m).append(ChunkStorageMetadata(size((2, 1)), size((2, 1)))),
        "a chunk of [2, 1] at [2, 1] leaves the tensor of [3, 2]",
    ),
    "a chunk without a place": (
        lambda m: _chunks(m).append(ChunkStorageMetadata(size((2, 1)), size((1, 1)))),
        "the chunk at [2, 1] lies nowhere",
    ),
    "a chunk of other dimensions": (
        lambda m: _chunks(m).append(ChunkStorageMetadata(size((2,)), size((1,)))),
        "a chunk of [1] at [2] in a tensor of [3, 2]",
    ),
    "two places for a chunk": (
        lambda m: (
            m.storage_data.update(
                {MetadataIndex("0.bias", size((0,)), 7): m.storage_data[MetadataIndex("0.bias", size((0,)), 0)]}
            )
            or setattr(m, "storage_data", dict(m.storage_data))
        ),
        "",
    ),
    "a tensor inside of a tensor": (
        lambda m: m.planner_data.update({"0.bias": ("a",), "1.bias": ("a", "b")}),
        "'1.bias' lies inside of another tensor",
    ),
    "two names at one place": (
        lambda m: m.planner_data.update({"0.bias": ("a",), "1.bias": ("a",)}),
        "two entries lie at 'a'",
    ),
    "no places": (lambda m: setattr(m, "storage_data", None), "it does not say where its chunks lie"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", []), "it names no tensors"),
    "many dimensions": (
        lambda m: setattr(m.state_dict_metadata["0.weight"], "size", size((1,) * 100_000)),
        "shape has 100000 dimensions, over the limit of 64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_metadata_that_disagrees_with_itself_or_its_files_is_refused(name: str, ckpt: Any) -> None:
    change, words = BAD[name]
    save(trained()["model"])
    changed(change)
    ran = ckpt("ls", "d")
    if words:
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("ckpt: error: d/.metadata: ")
        assert words in ran.err
    else:
        assert ran.code == 0  # equal for torch, whose index counts only where there is no offset


def test_the_metadata_runs_nothing(ckpt: Any) -> None:
    """torch unpickles this file with Python's own reader, and so would run what is in it."""

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, ("canary",)

    save(trained()["model"])
    changed(lambda m: setattr(m, "planner_data", Payload()))
    ran = ckpt("ls", "d")
    assert ran.code == 0
    assert not os.path.exists("canary")
    dcp.FileSystemReader("d").read_metadata()
    assert os.path.exists("canary")


def test_chunks_of_several_ranks_are_counted() -> None:
    """A tensor in rows, as two ranks would have saved it."""
    save({"w": torch.ones(4, 2)})

    def halves(metadata: Metadata) -> None:
        tensor = metadata.state_dict_metadata["w"]
        tensor.chunks = [ChunkStorageMetadata(size((row, 0)), size((2, 2))) for row in (0, 2)]
        (place,) = metadata.storage_data.values()
        metadata.storage_data = {MetadataIndex("w", size((row, 0)), 0): place for row in (0, 2)}

    changed(halves)
    assert cs.open("d")["w"].absent == "distributed (DCP, 2 chunks)"

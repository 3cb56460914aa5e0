"""What is beside the tensors: shown as a tree, or as plain data in JSON."""

from __future__ import annotations

import argparse
import datetime
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

import ckptsurgeon as cs


class Config(dict):  # type: ignore[type-arg]
    pass


def bundle() -> dict[str, Any]:
    return {
        "state_dict": {"w": torch.ones(2)},
        "epoch": 7,
        "best": float("inf"),
        "lr": [0.1, np.float64(0.01), float("nan")],
        "args": argparse.Namespace(depth=18, name="née", when=datetime.date(2026, 1, 2)),
        "hparams": Config(width=4, sizes=(1, 2)),
        "milestones": Counter({30: 1}),
        "clash": {1: "a", "1": "b"},
        "raw": b"abc",
        "z": 1 + 2j,
        "names": {"b", "a"},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "mean": np.zeros((2, 3), dtype="f4"),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "none": None,
        "flag": True,
        "order": OrderedDict(b=1, a=2),
    }


def test_extras_as_json_are_plain_data(ckpt: Any) -> None:
    torch.save(bundle(), "a.pth")
    found = ckpt("ls", "a.pth", "--extras", "--json").json
    assert (found["schema"], found["select"], found["format"]) == ("ckptsurgeon.extras/1", "state_dict", "torch-zip")
    extras = found["extras"]
    assert list(extras) == [key for key in bundle() if key != "state_dict"]
    date = extras["args"]["state"].pop("when")
    assert date["class"] == "datetime.date"
    assert extras == {
        "epoch": 7,
        "best": {"float": "inf"},
        "lr": [0.1, 0.01, {"float": "nan"}],
        "args": {"class": "argparse.Namespace", "state": {"depth": 18, "name": "née"}},
        "hparams": {"class": "test_extras.Config", "items": {"width": 4, "sizes": [1, 2]}},
        "milestones": {"30": 1},
        "clash": {"pairs": [[1, "a"], ["1", "b"]]},
        "raw": {"bytes": 3},
        "z": {"complex": "(1+2j)"},
        "names": ["a", "b"],
        "size": [2, 3],
        "dtype": {"class": "torch.bfloat16"},
        "mean": {"array": "float32", "shape": [2, 3]},
        "optimizer": {
            "state": {"0": {"exp_avg": {"tensor": "float32", "shape": [2]}}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "none": None,
        "flag": True,
        "order": {"b": 1, "a": 2},
    }


def test_arrays_and_storages_in_a_tree(ckpt: Any) -> None:
    extras = {"mean": np.zeros((2, 3), dtype="f4"), "s": torch.ones(3).untyped_storage()}
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": extras}, "a.pth")
    out = ckpt("ls", "a.pth", "--tree").out
    assert "mean  numpy.ndarray float32 [2, 3]" in out
    assert "s  storage uint8 [12]" in out


def test_extras_as_a_tree(ckpt: Any) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 7, "args": argparse.Namespace(depth=18)}, "a.pth")
    assert ckpt("ls", "a.pth", "--extras").out == (
        "a.pth  torch-zip, beside the tensors: dict of 2\n"
        "├── epoch  int 7\n"
        "└── args  argparse.Namespace (not imported)\n"
        "    └── depth  int 18\n"
    )
    torch.save({"w": torch.ones(2)}, "b.pth")
    assert ckpt("ls", "b.pth", "--extras").out == "b.pth: nothing beside the tensors\n"
    assert ckpt("ls", "b.pth", "--extras", "--json").json["extras"] == {}


def test_a_file_without_a_state_dict_is_all_extras(ckpt: Any) -> None:
    torch.save(argparse.Namespace(lr=0.1), "args.bin")
    found = ckpt("ls", "args.bin", "--extras", "--json").json
    assert (found["select"], found["extras"]) == (None, {"class": "argparse.Namespace", "state": {"lr": 0.1}})


def test_where_several_could_be_meant_all_is_shown_unless_one_is_selected(ckpt: Any) -> None:
    torch.save({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(3)}, "epoch": 3}, "g.pth")
    assert ckpt("ls", "g.pth", "--extras", "--json").json["extras"]["b"] == {"w": {"tensor": "float32", "shape": [3]}}
    found = ckpt("ls", "g.pth", "--extras", "--select", "a", "--json").json
    assert (found["select"], list(found["extras"])) == ("a", ["b", "epoch"])


def test_what_contains_itself_ends(ckpt: Any) -> None:
    loop: dict[str, Any] = {"n": 1}
    loop["self"] = loop
    torch.save({"state_dict": {"w": torch.ones(2)}, "loop": loop}, "a.pth")
    found = ckpt("ls", "a.pth", "--extras", "--json").json["extras"]["loop"]
    assert found == {"n": 1, "self": {"omitted": "it contains itself, or is too large"}}
    shared: Any = [1]
    for _ in range(60):
        shared = [shared, shared]
    torch.save({"state_dict": {"w": torch.ones(2)}, "bomb": shared}, "b.pth")
    assert ckpt("ls", "b.pth", "--extras", "--json").code == 0
    assert ckpt("ls", "b.pth", "--extras").code == 0


def test_extras_go_with_no_other_view(ckpt: Any) -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    for option in ("--tree", "--stats", "--match=w"):
        assert ckpt("ls", "a.pth", "--extras", option).code == 2


def test_why_a_small_tensor_costs_a_large_file(ckpt: Any) -> None:
    """A saved view carries its whole storage; what is written does not."""
    big = torch.zeros(1_000_000)
    torch.save({"w": big[:256], "v": torch.ones(3)}, "a.pth")
    out = ckpt("ls", "a.pth").out
    assert "storages: 3.8 MiB, of which these tensors use 1.0 KiB: w is 1.0 KiB of 3.8 MiB" in out
    assert "w  float32 [256], 1.0 KiB of a storage of 3.8 MiB" in ckpt("ls", "a.pth", "--tree").out
    cs.convert("a.pth", "b.pth")
    assert "storages" not in ckpt("ls", "b.pth").out
    flat = torch.zeros(1_000_000)
    torch.save({"a": flat[:400_000], "b": flat[400_000:]}, "c.pth")
    assert "storages" not in ckpt("ls", "c.pth").out

"""Loads a checkpoint in two processes that share a model, and holds what they have together against the file.

    python tests/sharded_worker.py CHECKPOINT FOLDER

It is a process of its own, because a process group is; it prints "2 processes" when all was well.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "fixtures")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from helpers import assert_same_tensors  # noqa: E402
from models import Net  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Shard  # noqa: E402

import ckptsurgeon as cs  # noqa: E402


def step(model: torch.nn.Module) -> None:
    model(torch.randn(2, 3, 4, 4)).sum().backward()


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def load(model: torch.nn.Module, path: str, want: dict[str, torch.Tensor]) -> None:
    """Before its first step and after one."""
    for _ in range(2):
        assert cs.load_into(model, path).coverage == 1
        assert_same_tensors(whole(model), want)
        step(model)


def flat(path: str, want: dict[str, torch.Tensor]) -> None:
    cpu = torch.device("cpu")
    for original in (True, False):
        model = Net()
        model.fc = FullyShardedDataParallel(model.fc, device_id=cpu, use_orig_params=original)
        load(FullyShardedDataParallel(model, device_id=cpu, use_orig_params=original), path, want)


def sharded(path: str, want: dict[str, torch.Tensor]) -> None:
    model = Net()
    fully_shard(model.blocks[1])
    fully_shard(model)
    load(model, path, want)
    along = fully_shard(Net(), shard_placement_fn=lambda value: Shard(1) if value[0].numel() % 16 == 0 else None)
    load(along, path, want)
    with torch.device("meta"):
        model = Net()
    fully_shard(model)
    try:
        cs.load_into(model, path, assign=True)
        raise AssertionError("a sharded model on the meta device was taken")
    except cs.PlanError as error:
        assert "use model.to_empty(device=" in str(error)
    load(model.to_empty(device="cpu"), path, want)


def run(rank: int, path: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    want = torch.load(path, weights_only=True)
    flat(path, want)
    sharded(path, want)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, args=tuple(sys.argv[1:]), nprocs=2)
    print("2 processes")

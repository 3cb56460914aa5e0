"""Loading into models that training code has wrapped, each for real, and from what such models save."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pytorch_lightning as lightning
import torch
import torch.distributed as dist
from conftest import ROOT
from helpers import assert_same_tensors
from models import Net, Tied
from resnet18 import telling
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ckptsurgeon as cs
from ckptsurgeon.finetune.names import peeled

pytestmark = pytest.mark.filterwarnings(
    "ignore:FSDP is switching to use `NO_SHARD`",
    "ignore:When using ``NO_SHARD`` for ``ShardingStrategy``",
    "ignore:FSDP will not all-gather",
)
Wrap = Callable[[Net], nn.Module]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fabric(model: nn.Module) -> nn.Module:
    from lightning_fabric.wrappers import _FabricModule

    class Strategy:
        pass

    return _FabricModule(model, Strategy())  # type: ignore[arg-type]


def flat(model: nn.Module, original: bool) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Wrap:
    """A wrapper around parts of the model."""

    def change(model: Net) -> nn.Module:
        model.blocks[1], model.fc = wrap(model.blocks[1]), wrap(model.fc)
        return model

    return change


PLAIN: dict[str, Wrap] = {
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DataParallel of compile": lambda model: nn.DataParallel(torch.compile(model)),
    "compile of DataParallel": lambda model: torch.compile(nn.DataParallel(model)),
    "Fabric": fabric,
    "parts compiled": inside(torch.compile),
    "parts with activation checkpointing": inside(checkpoint_wrapper),
    "parts in DataParallel": inside(nn.DataParallel),
    "compile of parts of all kinds": lambda model: torch.compile(
        nn.DataParallel(inside(lambda part: checkpoint_wrapper(torch.compile(part)))(model))
    ),
}
GROUPED: dict[str, Wrap] = {
    "DDP": DistributedDataParallel,
    "DDP of compile": lambda model: DistributedDataParallel(torch.compile(model)),
    "compile of DDP": lambda model: torch.compile(DistributedDataParallel(model)),
    "FSDP": lambda model: flat(model, True),
    "FSDP, flat": lambda model: flat(model, False),
    "FSDP in FSDP": lambda model: flat(inside(lambda part: flat(part, True))(model), True),
    "FSDP in FSDP, flat": lambda model: flat(inside(lambda part: flat(part, False))(model), False),
    "FSDP of parts": inside(lambda part: flat(part, False)),
    "FSDP of activation checkpointing": lambda model: flat(inside(checkpoint_wrapper)(model), False),
    "compile of FSDP": lambda model: torch.compile(flat(model, True)),
    "fully_shard": fully_shard,
    "fully_shard of parts": lambda model: fully_shard(inside(fully_shard)(model)),
    "compile of fully_shard": lambda model: torch.compile(fully_shard(model)),
}


def loads_and_is_loaded(wrap: Wrap) -> None:
    """A plain checkpoint loads into the wrapped model, what that saves into a plain one, and both into each other,
    bit for bit, by the names of the network itself."""
    want = telling(Net()).state_dict()
    torch.save(want, "plain.pth")
    model = wrap(telling(Net(), seed=5))
    report = cs.load_into(model, "plain.pth")
    assert set(report.loaded) == set(want)
    assert (report.kept, report.dropped, report.unwrapped, report.coverage) == ((), (), (), 1)
    named = [name for name, _ in model.named_parameters()]
    state = {key: dense(value) for key, value in model.state_dict().items()}
    torch.save(state, "wrapped.pth")
    plain = telling(Net(), seed=5)
    assert cs.load_into(plain, "wrapped.pth").coverage == 1
    assert_same_tensors(plain.state_dict(), want)
    again = wrap(telling(Net(), seed=5)) if not isinstance(model, FullyShardedDataParallel) else model
    assert cs.load_into(again, "wrapped.pth").coverage == 1
    found = {key: dense(value) for key, value in again.state_dict().items()}
    assert_same_tensors(found, state)
    assert named == [name for name, _ in model.named_parameters()]  # nothing else was registered


def dense(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


@pytest.mark.parametrize("name", PLAIN)
def test_wrapped_models_are_loaded_by_the_names_of_the_network(name: str) -> None:
    loads_and_is_loaded(PLAIN[name])


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.usefixtures("group")
def test_distributed_models_are_loaded_by_the_names_of_the_network(name: str) -> None:
    loads_and_is_loaded(GROUPED[name])


def test_two_processes_each_load_their_own_part(tmp_path: Path) -> None:
    """FullyShardedDataParallel with flat and with original parameters, and DTensors sharded along either dimension,
    before a first step and after one."""
    torch.save(telling(Net()).state_dict(), "a.pth")
    words = [sys.executable, str(ROOT / "tests" / "sharded_worker.py"), "a.pth", str(tmp_path)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert ran.stdout == "2 processes\n", ran.stderr


@pytest.mark.usefixtures("group")
def test_a_flat_model_is_as_it_was_when_its_plan_has_problems() -> None:
    model = flat(telling(Net(), seed=5), False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(telling(Net(num_classes=3)).state_dict(), "a.pth")
    with pytest.raises(cs.PlanError, match=r"'fc.weight': \[3, 8\] in the checkpoint, \[10, 8\] in the Net"):
        cs.load_into(model, "a.pth")
    assert_same_tensors(model.state_dict(), before)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [lambda model: flat(model, False), fully_shard], ids=["FSDP", "fully_shard"])
def test_a_part_of_a_tensor_goes_into_a_sharded_one_and_the_rest_stays(wrap: Callable[[nn.Module], nn.Module]) -> None:
    want = telling(Net(num_classes=3)).state_dict()
    torch.save(want, "a.pth")
    before = telling(Net(), seed=5).fc.weight.detach().clone()
    model = wrap(telling(Net(), seed=5))
    report = cs.load_into(model, "a.pth", mismatched="overlap")
    assert report.partly == ("fc.weight", "fc.bias")
    got = dense(model.state_dict()["fc.weight"])
    assert torch.equal(got[:3], want["fc.weight"])
    assert torch.equal(got[3:], before[3:])


class Holder(lightning.LightningModule):
    """A LightningModule that holds the network under a name, beside a loss with a weight of its own."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.add_module(name, network)
        self.register_buffer("class_weights", torch.ones(2), persistent=False)


@pytest.mark.parametrize("name", ["model", "net"])
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_lightning_modules_and_plain_checkpoints(name: str, wrap: Wrap) -> None:
    """Either way round, and the rule that it took stands in the report."""
    want = telling(Net()).state_dict()
    torch.save(want, "plain.pth")
    module = Holder(name, wrap(telling(Net(), seed=5)))
    report = cs.load_into(module, "plain.pth")
    assert report.unwrapped == (f"prefix {name}.",)
    assert report.loaded == tuple(f"{name}.{key}" for key in want)
    assert_same_tensors(peeled(module.get_submodule(name)).state_dict(), want)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("lightning.ckpt")
    plain = telling(Net(), seed=5)
    report = cs.load_into(plain, "lightning.ckpt")
    assert_same_tensors(plain.state_dict(), want)
    assert report.loaded == tuple(want)
    again = Holder(name, telling(Net(), seed=5))
    cs.load_into(again, "lightning.ckpt")
    assert_same_tensors(again.state_dict(), {f"{name}.{key}": value for key, value in want.items()})


def test_where_two_wrappers_would_do_equally_well_neither_is_chosen() -> None:
    """Of a checkpoint that could be either of two networks in a model, and the other way round."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = telling(Net()), telling(Net(), seed=5)

    model = Pair()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(Net().state_dict(), "plain.pth")
    torch.save(before, "pair.pth")
    for target, path in ((model, "plain.pth"), (telling(Net(), seed=7), "pair.pth")):
        with pytest.raises(cs.PlanError) as caught:
            cs.load_into(target, path, unexpected="drop", missing="skip")
        (problem,) = caught.value.problems
        assert problem.kind == "ambiguous"
        assert "student." in problem.text
        assert "teacher." in problem.text
    assert_same_tensors(model.state_dict(), before)
    report = cs.load_into(model, "plain.pth", ["prefix teacher."], missing="skip")
    assert report.unwrapped == ()
    assert set(report.kept) == {key for key in before if key.startswith("student.")}


def test_names_that_fit_are_left_alone() -> None:
    """A part of the model that is itself called `module` is no wrapper."""
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    torch.save({key: value + 1 for key, value in model.state_dict().items()}, "a.pth")
    report = cs.load_into(model, "a.pth")
    assert report.unwrapped == ()
    assert_same_tensors(model.state_dict(), torch.load("a.pth", weights_only=True))


def test_a_model_can_still_be_sharded_and_resized_after_loading() -> None:
    """Its storages are torch's own, as they were: NumPy would have pinned their sizes."""
    torch.save(telling(Tied()).state_dict(), "a.pth")
    model = Tied()
    cs.load_into(model, "a.pth")
    cs.diff("a.pth", model, values=True)
    assert model.embed.weight.untyped_storage().resizable()


class MyParallel(nn.DataParallel):
    """A wrapper of one's own."""


def named(name: str, **held: nn.Module | nn.Parameter) -> nn.Module:
    """A part of a network whose class is called as a wrapper's is."""
    made = type(name, (nn.Module,), {})()
    for step, one in {"module": nn.Linear(2, 2), **held}.items():
        setattr(made, step, one)
    return made


def test_wrappers_are_told_by_the_classes_that_they_are_made_from_and_by_having_nothing_of_their_own() -> None:
    torch.save(telling(Net()).state_dict(), "a.pth")
    model = MyParallel(Net())
    assert cs.load_into(model, "a.pth").unwrapped == ()
    assert_same_tensors(model.module.state_dict(), telling(Net()).state_dict())
    assert cs.freeze(model, "^fc").names == ("fc.weight", "fc.bias")
    for make in (
        lambda: named("DataParallel", scale=nn.Parameter(torch.ones(2))),
        lambda: named("DistributedDataParallel", other=nn.BatchNorm1d(2)),
    ):
        source, model = telling(nn.Sequential(make())), nn.Sequential(make())
        torch.save(source.state_dict(), "b.pth")
        assert set(cs.load_into(model, "b.pth").loaded) == set(source.state_dict())
        assert_same_tensors(model.state_dict(), source.state_dict())
        assert cs.freeze(model).names == tuple(name for name, _ in model.named_parameters())

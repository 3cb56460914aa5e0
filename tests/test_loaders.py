"""What we write is loaded by the tools that users have, and what they write is opened by us.

Equal bit for bit, with the same forward pass; weights are random everywhere (norms, biases and
buffers too), so that a tensor in the wrong place shows.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import pytorch_lightning as lightning
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from helpers import KEY, assert_same_tensors
from models import Tied
from pytorch_lightning.utilities.parsing import AttributeDict
from resnet18 import telling
from safetensors import safe_open

import ckptsurgeon as cs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are only slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


IMAGES = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
TOKENS = torch.arange(12).view(2, 6)


def assert_same_models(got: torch.nn.Module, want: torch.nn.Module, x: torch.Tensor) -> None:
    """Every parameter and buffer, ties, and what comes out for `x`."""
    assert_same_tensors(got.state_dict(), want.state_dict())
    places = [[value.data_ptr() for value in model.state_dict().values() if value.numel()] for model in (got, want)]
    assert [places[0].index(place) for place in places[0]] == [places[1].index(place) for place in places[1]]
    with torch.no_grad():
        outputs = [getattr(out := model.eval()(x), "logits", out) for model in (got, want)]
    assert torch.equal(*outputs)
    assert outputs[0].std() > 0


def shufflenet(seed: int = 0) -> torch.nn.Module:
    return telling(torchvision.models.shufflenet_v2_x0_5(num_classes=7), seed)


def gpt2(seed: int = 0) -> transformers.GPT2LMHeadModel:
    """Its head is tied to its embedding."""
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model: transformers.GPT2LMHeadModel = telling(transformers.GPT2LMHeadModel(config), seed)
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def saved(model: torch.nn.Module, path: str = "in.pth") -> str:
    torch.save(model.state_dict(), path)
    return path


# torch and torchvision


@pytest.mark.parametrize(("suffix", "mmap"), [("pth", False), ("pth", True), ("pt", False), ("ckpt", True)])
def test_torchvision_loads_our_torch_files_strictly(suffix: str, mmap: bool) -> None:
    want, got = shufflenet(), shufflenet(seed=1)
    cs.convert(saved(want), f"out.{suffix}")
    got.load_state_dict(torch.load(f"out.{suffix}", weights_only=True, mmap=mmap), strict=True)
    assert_same_models(got, want, IMAGES)


def test_a_state_dict_is_assigned_without_a_copy() -> None:
    """`load_state_dict(assign=True)` on a model of the meta device, from a mapped file."""
    want = shufflenet()
    cs.convert(saved(want), "out.pth")
    with torch.device("meta"):
        got = torchvision.models.shufflenet_v2_x0_5(num_classes=7)
    got.load_state_dict(torch.load("out.pth", weights_only=True, mmap=True), strict=True, assign=True)
    assert_same_models(got, want, IMAGES)


def test_torchvision_loads_our_safetensors_strictly() -> None:
    want, got = shufflenet(), shufflenet(seed=1)
    cs.convert(saved(want), "out.safetensors")
    got.load_state_dict(safetensors.torch.load_file("out.safetensors"), strict=True)
    assert_same_models(got, want, IMAGES)


# safetensors


def test_safe_open_gives_every_tensor_and_parts_of_it() -> None:
    state = shufflenet().state_dict()
    torch.save(state, "in.pth")
    cs.convert("in.pth", "out.safetensors")
    with safe_open("out.safetensors", "pt") as file:
        assert file.offset_keys() == list(state)
        assert_same_tensors({key: file.get_tensor(key) for key in state}, state)
        assert torch.equal(file.get_slice("fc.weight")[2:5], state["fc.weight"][2:5])
        assert file.metadata() == {"format": "pt", KEY: file.metadata()[KEY]}


def test_load_model_of_safetensors_takes_aliases_for_a_tied_model() -> None:
    """Strictly; a file with both names in full it takes only with `strict=False`, as any file that it did not write."""
    want, got = telling(Tied()), telling(Tied(), seed=1)
    cs.convert(saved(want), "alias.safetensors", tied="alias")
    cs.convert("in.pth", "full.safetensors")
    assert list(safetensors.torch.load_file("alias.safetensors")) == ["embed.weight"]
    assert safetensors.torch.load_model(got, "alias.safetensors", strict=True) == (set(), [])
    assert_same_models(got, want, TOKENS)
    got = telling(Tied(), seed=1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        safetensors.torch.load_model(got, "full.safetensors", strict=True)
    safetensors.torch.load_model(got, "full.safetensors", strict=False)
    assert_same_models(got, want, TOKENS)


def test_load_model_of_safetensors_takes_a_model_without_ties() -> None:
    want, got = shufflenet(), shufflenet(seed=1)
    cs.convert(saved(want), "out.safetensors")
    assert safetensors.torch.load_model(got, "out.safetensors", strict=True) == (set(), [])
    assert_same_models(got, want, IMAGES)


# transformers

OUTPUTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "safetensors": ("model.safetensors", {}, 1),
    "safetensors, aliases": ("model.safetensors", {"tied": "alias"}, 1),
    "a folder": ("", {}, 1),
    "shards": ("", {"shard_size": "2kB"}, 7),
    "shards, aliases": ("", {"shard_size": "2kB", "tied": "alias"}, 7),
    "shards by their index": ("model.safetensors.index.json", {"shard_size": 2000}, 7),
    "bin": ("pytorch_model.bin", {}, 1),
    "bin shards": ("pytorch_model.bin.index.json", {"shard_size": "2kB"}, 7),
}
"""Where it is written, how, and how many files at least that makes."""


@pytest.mark.parametrize("output", OUTPUTS)
def test_transformers_loads_a_folder_with_our_output_and_initialises_nothing(output: str) -> None:
    name, how, count = OUTPUTS[output]
    want = gpt2()
    os.mkdir("folder")
    want.config.save_pretrained("folder")
    written = cs.convert(saved(want), os.path.join("folder", name), **how)
    assert len(written.files or (written.path,)) >= count
    got, info = transformers.GPT2LMHeadModel.from_pretrained("folder", output_loading_info=True)
    assert {name: len(found) for name, found in info.items()} == dict.fromkeys(info, 0)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert_same_models(got, want, TOKENS)
    assert got.lm_head.weight is got.transformer.wte.weight


@pytest.mark.parametrize("output", ["model.safetensors", "pytorch_model.bin"])
def test_transformers_loads_a_model_in_half_precision_as_we_cast_it(output: str) -> None:
    want = gpt2()
    os.mkdir("folder")
    want.config.save_pretrained("folder")
    cs.convert(saved(want), f"folder/{output}", dtype="bf16")
    got = transformers.GPT2LMHeadModel.from_pretrained("folder", dtype="auto")
    assert got.dtype == torch.bfloat16
    assert_same_models(got, want.to(torch.bfloat16), TOKENS)


@pytest.mark.parametrize("size", ["2kB", "5GB"])
def test_what_transformers_saves_is_opened_with_all_keys(size: str) -> None:
    """It leaves out the name that is tied; loading ties it again."""
    model = gpt2()
    model.save_pretrained("folder", max_shard_size=size)
    found = cs.open("folder")
    want = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    assert_same_tensors(found, want, ordered=False)
    assert found.origin.format == ("sharded-safetensors" if size == "2kB" else "safetensors")
    assert os.path.exists("folder/model.safetensors.index.json") == (size == "2kB")
    cs.convert("folder", "again/", shard_size="3kB")
    model.config.save_pretrained("again")
    assert_same_models(transformers.GPT2LMHeadModel.from_pretrained("again"), model, TOKENS)


def test_what_transformers_saves_fits_its_own_model() -> None:
    model, got = gpt2(), gpt2(seed=1)
    model.save_pretrained("folder", max_shard_size="2kB")
    report = cs.load_into(got, "folder", missing="init")
    assert report.plan.missing == {"lm_head.weight": "tied to 'transformer.wte.weight', as in the GPT2LMHeadModel"}
    assert_same_models(got, model, TOKENS)


# timm


def resnet(seed: int = 0) -> torch.nn.Module:
    return telling(timm.create_model("test_resnet", num_classes=5), seed)


@pytest.mark.parametrize("output", ["out.safetensors", "out.pth", "out.bin"])
def test_timm_loads_our_output(output: str) -> None:
    want = resnet()
    cs.convert(saved(want), output)
    made = timm.create_model("test_resnet", num_classes=5, checkpoint_path=output)
    assert_same_models(made, want, IMAGES)
    got = resnet(seed=1)
    assert str(timm.models.load_checkpoint(got, output, strict=True)) == "<All keys matched successfully>"
    assert_same_models(got, want, IMAGES)


def test_timm_loads_a_training_bundle_whose_extras_were_kept() -> None:
    """Its own kind: an EMA beside the weights, which it takes first, and a Namespace that goes."""
    want, average = resnet(), resnet(seed=2)
    bundle = {"epoch": 3, "arch": "test_resnet", "args": Namespace(lr=0.1), "version": 2}
    torch.save({**bundle, "state_dict": want.state_dict(), "state_dict_ema": average.state_dict()}, "in.pth.tar")
    written = cs.convert("in.pth.tar", "out.pth", select="state_dict", keep_extras=True)
    assert written.lost == ("args (argparse.Namespace)",)
    for ema, model in ((True, average), (False, want)):
        got = resnet(seed=1)
        timm.models.load_checkpoint(got, "out.pth", use_ema=ema, strict=True)
        assert_same_models(got, model, IMAGES)


# huggingface_hub


HUB: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "file": ("out.safetensors", {}, {}),
    "torch file": ("out.bin", {}, {"safe": False}),
    "shards": ("out/", {"shard_size": 1_000_000}, {}),
    "bin shards": ("out/pytorch_model.bin.index.json", {"shard_size": 1_000_000}, {"safe": False}),
}


@pytest.mark.parametrize("output", HUB)
def test_huggingface_hub_loads_our_output(output: str) -> None:
    name, how, load = HUB[output]
    want, got = shufflenet(), shufflenet(seed=1)
    os.mkdir("out")
    cs.convert(saved(want), name, **how)
    place = name.partition("/")[0]
    missing, unexpected = huggingface_hub.load_torch_model(got, place, strict=True, **load)
    assert (list(missing), list(unexpected)) == ([], [])
    assert_same_models(got, want, IMAGES)
    state: dict[str, torch.Tensor] = {}
    files = sorted(Path("out").glob("*-of-*")) if place == "out" else [Path(name)]
    assert len(files) == (2 if how else 1)
    for file in files:
        part = huggingface_hub.load_state_dict_from_file(file, **load)
        assert not set(part) & set(state)
        state.update(part)
    assert_same_tensors(state, want.state_dict(), ordered=False)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["2kB", "5GB"])
def test_what_huggingface_hub_saves_is_opened_with_all_keys(safe: bool, size: str) -> None:
    """Tied names too, where the file has them or says of which tensor they are an alias."""
    model = gpt2()
    os.mkdir("folder")
    huggingface_hub.save_torch_model(model, "folder", max_shard_size=size, safe_serialization=safe)
    found = cs.open("folder")
    assert_same_tensors(found, model.state_dict(), ordered=False)
    assert found.tied() in (
        (("transformer.wte.weight", "lm_head.weight"),),
        (("lm_head.weight", "transformer.wte.weight"),),
    )
    assert found.origin.format == ("sharded-" if size == "2kB" else "") + ("safetensors" if safe else "torch-zip")


def test_an_index_of_huggingface_hub_may_count_whole_storages() -> None:
    """Of a view it counts the storage, which is in the torch file too: nothing is wrong with the shards."""
    state = {"half": torch.randn(8).half()[4:], "w": torch.randn(4)}
    os.mkdir("folder")
    huggingface_hub.save_torch_state_dict(state, "folder", max_shard_size=16, safe_serialization=False)
    assert index("folder/pytorch_model.bin.index.json")["metadata"]["total_size"] == 16 + 16
    assert_same_tensors(cs.open("folder"), state)
    assert cs.inspect("folder").remarks == ()


def test_what_save_model_of_safetensors_saves_is_opened_with_its_aliases() -> None:
    model = telling(Tied())
    safetensors.torch.save_model(model, "in.safetensors", metadata={"who": "me"})
    found = cs.open("in.safetensors")
    assert_same_tensors(found, model.state_dict(), ordered=False)
    assert len(found.tied()) == 1
    assert found.metadata["who"] == "me"
    cs.convert("in.safetensors", "out.pth")
    got = telling(Tied(), seed=1)
    got.load_state_dict(torch.load("out.pth", weights_only=True), strict=True)
    assert_same_models(got, model, TOKENS)


# Lightning


class Lit(lightning.LightningModule):
    def __init__(self, width: int = 4, name: str = "small", args: Namespace | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


ROWS = torch.linspace(-1, 1, 24).view(8, 3)


def fitted(model: Lit, epochs: int, **how: Any) -> lightning.Trainer:
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **dict.fromkeys(off, False))
    trainer.fit(model, torch.utils.data.DataLoader(ROWS, batch_size=4), **how)
    return trainer


quiet = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


@pytest.fixture
def lit() -> Lit:
    """A model of Lightning after an epoch, saved by its Trainer as `in.ckpt`."""
    model = telling(Lit(width=6, name="réseau"))
    fitted(model, 1).save_checkpoint("in.ckpt")
    return model


class TestLightning:
    pytestmark = quiet

    def test_a_bundle_whose_extras_were_kept_is_loaded_with_its_hyperparameters(self, lit: Lit) -> None:
        assert_same_tensors(cs.open("in.ckpt"), lit.state_dict())
        written = cs.convert("in.ckpt", "out.ckpt", keep_extras=True)
        assert written.lost == ()
        got = Lit.load_from_checkpoint("out.ckpt", weights_only=True)
        assert dict(got.hparams) == {"width": 6, "name": "réseau", "args": None}
        assert_same_models(got, lit, ROWS)

    def test_everything_else_in_the_bundle_is_equal(self, lit: Lit) -> None:
        cs.convert("in.ckpt", "out.ckpt", keep_extras=True)
        want, got = (torch.load(path, weights_only=True) for path in ("in.ckpt", "out.ckpt"))
        assert list(got) == list(want)
        assert len(got) == 10
        state = [bundle.pop("optimizer_states")[0]["state"] for bundle in (got, want)]
        assert [list(found) for found in state] == [list(range(6))] * 2
        for index in range(6):
            assert_same_tensors(state[0][index], state[1][index])
        assert_same_tensors(got.pop("state_dict"), want.pop("state_dict"))
        assert got == want

    def test_training_goes_on_from_our_bundle_as_from_its_own(self, lit: Lit) -> None:
        cs.convert("in.ckpt", "out.ckpt", keep_extras=True)
        models = []
        for path in ("in.ckpt", "out.ckpt"):
            torch.manual_seed(0)
            models.append(Lit(width=6))
            trainer = fitted(models[-1], 2, ckpt_path=path, weights_only=True)
            assert (trainer.current_epoch, trainer.global_step) == (2, 4)
        assert_same_models(models[1], models[0], ROWS)
        assert not torch.equal(models[0].net[0].weight, lit.net[0].weight)

    def test_renamed_keys_are_in_their_place_in_the_bundle(self, lit: Lit) -> None:
        cs.remap("in.ckpt", "away.ckpt", [r"^net\. => body."], keep_extras=True)
        cs.remap("away.ckpt", "back.ckpt", [r"^body\. => net."], keep_extras=True)
        assert_same_models(Lit.load_from_checkpoint("back.ckpt", weights_only=True), lit, ROWS)

    def test_hyperparameters_of_their_own_class_are_named_as_lost(self, lit: Lit) -> None:
        """A Namespace among them is None afterwards; an AttributeDict around them is a dict."""
        want = torch.load("in.ckpt", weights_only=True)
        plain = {"width": 6, "name": "x"}
        for value, lost, kept in (
            ({**plain, "args": Namespace(lr=0.1)}, "hyper_parameters.args (argparse.Namespace)", plain),
            (
                AttributeDict(plain),
                "hyper_parameters (pytorch_lightning.utilities.parsing.AttributeDict; a dict in its place)",
                plain,
            ),
            (Namespace(**plain), "hyper_parameters (argparse.Namespace)", None),
        ):
            torch.save({**want, "hyper_parameters": value}, "odd.ckpt")
            written = cs.convert("odd.ckpt", "out.ckpt", keep_extras=True, force=True)
            assert written.lost == (lost,)
            assert torch.load("out.ckpt", weights_only=True).get("hyper_parameters") == kept
            got = Lit.load_from_checkpoint("out.ckpt", weights_only=True, **(plain if kept is None else {}))
            assert (got.hparams["width"], got.hparams["name"]) == (6, "x")
            assert_same_models(got, lit, ROWS)


def test_an_index_by_others_says_what_ours_says() -> None:
    """The same cuts, names and sizes as huggingface_hub makes of a model without ties or tensors over the size."""
    model = shufflenet()
    os.mkdir("theirs")
    huggingface_hub.save_torch_state_dict(model.state_dict(), "theirs", max_shard_size=800_000)
    cs.convert(saved(model), "ours/", shard_size=800_000)
    theirs, ours = (index(f"{name}/model.safetensors.index.json") for name in ("theirs", "ours"))
    assert sorted(os.listdir("ours")) == sorted(os.listdir("theirs"))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert len(set(ours["weight_map"].values())) == 3


def index(path: str) -> Mapping[str, Any]:
    return json.loads(Path(path).read_text())

"""Optimizer state in the files that timm, Lightning and the Trainer of transformers write themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import transformers
from helpers import assert_same_tensor
from safetensors.torch import load_file
from test_optimizer import THERE, Fused, Split, telling
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

import ckptsurgeon as cs

quiet = [
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]


def small_vit(classes: int = 7) -> Any:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=classes)


def test_a_bundle_of_timm_takes_its_optimizer_and_its_average_along() -> None:
    model = small_vit()
    optimizer = create_optimizer_v2(model, "adamw", lr=0.01, weight_decay=0.05)
    average = ModelEmaV3(model, decay=0.5)
    for _ in range(2):
        model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()
        average.update(model)
    CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=".").save_checkpoint(3, 0.5)
    rules = [r"split (blocks\.\d+\.attn)\.qkv\.(\w+)$ => \1.q.\2 \1.k.\2 \1.v.\2", r"^head => classifier"]
    there: dict[str, torch.Tensor] = {}  # as the other model has them: q, k and v one after another
    for name, value in model.state_dict().items():
        if name.endswith("qkv.weight"):
            parts = [f"{name.removesuffix('qkv.weight')}{part}" for part in "qkv"]
            there |= {f"{part}.{end}": value[:16].clone() if end == "weight" else value[:16, 0].clone()
                      for part in parts for end in ("weight", "bias")}  # fmt: skip
        elif not name.endswith("qkv.bias"):
            there[name.replace("head.", "classifier.")] = value
    torch.save(there, "there.pth")
    unsure = cs.plan("last.pth.tar", rules, select="state_dict", extras=True)
    assert "in which order the new model has its parameters is not known" in unsure.warnings[0]
    written = cs.remap("last.pth.tar", "b.pth", rules, to="there.pth", select="state_dict", extras=True)
    assert written.warnings == ()
    held = torch.load("b.pth", weights_only=True)
    assert (held["epoch"], held["metric"]) == (3, 0.5)
    names = [name for group in optimizer.param_groups for name in _names(model, group)]
    sizes = [len(group["params"]) for group in held["optimizer"]["param_groups"]]
    assert sizes == [len(group["params"]) + 2 * 2 * (n == 0) + 2 * 2 * (n == 1) for n, group in
                     enumerate(optimizer.param_groups)]  # fmt: skip
    states = held["optimizer"]["state"]
    found = {key: states[position] for position, key in enumerate(_order(held["state_dict"], model, names))}
    for name, parameter in model.named_parameters():
        moment = optimizer.state[parameter]["exp_avg_sq"]
        if ".qkv." in name:
            for part, value in zip("qkv", moment.chunk(3), strict=True):
                assert_same_tensor(found[name.replace("qkv", part)]["exp_avg_sq"], value, name)
        else:
            assert_same_tensor(found[name.replace("head", "classifier")]["exp_avg_sq"], moment, name)
    ema = dict(average.module.state_dict())
    assert list(held["state_dict_ema"]) == list(held["state_dict"])
    assert_same_tensor(held["state_dict_ema"]["blocks.1.attn.k.weight"], ema["blocks.1.attn.qkv.weight"][16:32])
    assert_same_tensor(held["state_dict_ema"]["classifier.bias"], ema["head.bias"])


def _names(model: Any, group: dict[str, Any]) -> list[str]:
    ids = {id(parameter): name for name, parameter in model.named_parameters()}
    return [ids[id(parameter)] for parameter in group["params"]]


def _order(state: dict[str, Any], model: Any, names: list[str]) -> list[str]:
    """The keys of the result by position: vectors and tokens do not decay and come first, as timm has them."""
    first = [key for key in state if state[key].ndim == 1 or key in model.no_weight_decay()]
    return [*first, *(key for key in state if key not in first)]


class Lit(pl.LightningModule):
    """A network of either layout in a module of Lightning."""

    def __init__(self, layout: type[torch.nn.Module]) -> None:
        super().__init__()
        self.net = telling(layout())

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def fit(model: Lit, epochs: int, path: str | None = None) -> pl.Trainer:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 48).reshape(8, 6).sin())
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=path, weights_only=True)
    return trainer


class TestLightning:
    pytestmark = quiet

    def test_a_fit_goes_on_in_another_layout_from_its_checkpoint(self) -> None:
        fit(Lit(Fused), 2).save_checkpoint("a.ckpt")
        rules = [rule.replace("^", r"^net\.").replace(" => ", " => net.") for rule in THERE]
        rules[-1] = r"split ^net\.qkv\.(\w+)$ => net.q.\1 net.k.\1 net.v.\1"
        written = cs.remap("a.ckpt", "b.ckpt", rules, to=Lit(Split), extras=True)
        assert (written.lost, written.warnings) == ((), ())
        whole, other = Lit(Fused), Lit(Split)
        fit(whole, 4, "a.ckpt")
        trainer = fit(other, 4, "b.ckpt")
        assert (trainer.current_epoch, trainer.global_step) == (4, 8)
        x = torch.randn(5, 6)
        assert torch.allclose(other.net.eval()(x), whole.net.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_folder_of_the_trainer_goes_on_with_another_head(ckpt: Any) -> None:
    """Of safetensors, whose keys are sorted: the target has the same names, and so says the order."""

    def model(labels: int) -> Any:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            num_labels=labels,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)

    def trainer(net: Any) -> Any:
        rows = [{"input_ids": torch.arange(4) + n, "labels": n % 2} for n in range(8)]
        arguments = transformers.TrainingArguments(
            "run", max_steps=2, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, logging_strategy="no", weight_decay=0.1,
        )  # fmt: skip
        return transformers.Trainer(net, arguments, train_dataset=rows)

    first = trainer(model(3))
    first.train()
    first.model.config.save_pretrained("conf")
    folder = Path("run/checkpoint-2")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    other = model(2)
    plan = cs.plan(folder, to=other, mismatched="drop", missing="init")
    written = cs.remap_optimizer(plan, folder / "optimizer.pt", "new.pt")
    assert written.plan is not None
    (followed,) = written.plan.followed
    assert set(followed.fresh) == {"classifier.weight", "classifier.bias"}
    after = trainer(other)
    after.create_optimizer()
    after.optimizer.load_state_dict(torch.load("new.pt", weights_only=True))
    ids = [name for group in first.optimizer.param_groups for name in _names(first.model, group)]
    mine = {name: after.optimizer.state[parameter] for name, parameter in other.named_parameters()}
    for position, name in enumerate(ids):
        if not name.startswith("classifier."):
            assert_same_tensor(mine[name]["exp_avg_sq"], saved["state"][position]["exp_avg_sq"], name)
    assert mine["classifier.weight"] == {}
    rule = ["--rule", "^bert => encoder"]
    words = ["remap", folder, *rule, "-o", "c.safetensors", "--optimizer", f"{folder / 'optimizer.pt'}=c.pt"]
    assert ckpt(*words).code == 1
    assert ckpt(*words, "--order", "transformers:conf").code == 0
    assert len(load_file("c.safetensors")) == len(ids)
    got = torch.load("c.pt", weights_only=True)
    assert [group["params"] for group in got["param_groups"]] == [group["params"] for group in saved["param_groups"]]
    for position, state in saved["state"].items():
        assert_same_tensor(got["state"][position]["exp_avg"], state["exp_avg"], ids[position])

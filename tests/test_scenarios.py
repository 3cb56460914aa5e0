"""What people do by hand, on the models they do it to: the rows of docs/from-snippets.md, but for
those that are tested with the rest of their subject (freezing, groups, optimizers).

The checkpoint is that of `fixtures/make/resnet18.py`; what is written is loaded strictly by torch
and must give the forward pass of the weights that it was made from.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import ROOT
from helpers import assert_same_tensor, assert_same_tensors, save_legacy
from resnet18 import telling
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurgeon as cs

SPEC = "torchvision:resnet18,num_classes=10"


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The ResNet-18 of 1000 classes that the bundle was saved from, after its one step of training."""
    import resnet18

    model = torchvision.models.resnet18()
    state = resnet18.bundle()["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def loaded(path: str, **how: Any) -> nn.Module:
    """A new ResNet-18 that loads a file strictly."""
    model = torchvision.models.resnet18(**how)
    state = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
    model.load_state_dict(state, strict=True)
    return model.eval()


def features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Everything before the head."""
    return nn.Sequential(*list(model.children())[:-1])(x).flatten(1)


def assert_same_but_head(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    assert list(got) == list(want)
    for key, value in want.items():
        if not key.startswith("fc."):
            assert_same_tensor(got[key], value, key)


X = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)


def test_s1_load_what_matches(ckpt: Any, resnet_bundle: Path, trained: nn.Module) -> None:
    """Keys that the model lacks are dropped, the rest of the model stays as it is built, and both are said."""
    words = ["--rule", "strip module.", "--rule", r"drop ^fc\.", "--to", SPEC]
    ran = ckpt("remap", resnet_bundle, *words, "--unexpected", "drop", "--missing", "init", "-o", "a.safetensors")
    assert ran.code == 0
    assert "fc.weight: initialised as" in ran.out
    model = loaded("a.safetensors", num_classes=10)
    assert_same_but_head(model.state_dict(), trained.state_dict())
    assert torch.equal(features(model, X), features(trained, X))
    torch.manual_seed(0)
    assert_same_tensor(model.fc.weight.detach(), torchvision.models.resnet18(num_classes=10).fc.weight.detach())

    mine = telling(torchvision.models.resnet18(num_classes=10), seed=4).eval()
    head = mine.fc.weight.detach().clone()
    report = cs.load_into(mine, resnet_bundle, [r"strip module.", r"drop ^fc\."], unexpected="drop", missing="init")
    assert report.kept == ("fc.weight", "fc.bias")
    assert report.dropped == ("module.fc.weight", "module.fc.bias")
    assert torch.equal(features(mine, X), features(trained, X))
    assert_same_tensor(mine.fc.weight.detach(), head)


def test_s2_coverage_and_a_gate_instead_of_two_lists(ckpt: Any, resnet_bundle: Path) -> None:
    ran = ckpt("diff", resnet_bundle, SPEC, "--rule", "strip module.", "--json")
    assert ran.code == 1
    found = ran.json
    assert found["counts"] == {"matched": 120, "shape": 2, "dtype": 0, "missing": 0, "unexpected": 0}
    assert found["coverage"]["by_tensors"] == 120 / 122
    assert found["coverage"]["by_numel"] == pytest.approx(1 - 5130 / 11_191_262)
    gate = ["diff", resnet_bundle, SPEC, "--rule", "strip module.", "--min-coverage"]
    assert ckpt(*gate, "0.98").code == 0
    assert ckpt(*gate, "0.99").code == 1


@pytest.mark.parametrize("prefix", ["module.", "module.base_model."])
def test_s3_a_prefix_on_one_side(ckpt: Any, trained: nn.Module, prefix: str) -> None:
    """Stripped where the model has it not, added where it has; by rule, and found by itself."""
    state = trained.state_dict()
    wrapped = {prefix + key: value for key, value in state.items()}
    torch.save(wrapped, "wrapped.pth")
    torch.save(state, "plain.pth")
    for source, rule, target, want in (
        ("wrapped.pth", f"strip {prefix}", "plain.pth", state),
        ("plain.pth", f"prefix {prefix}", "wrapped.pth", wrapped),
    ):
        for output, how in (("ruled.pth", ["--rule", rule]), ("fitted.pth", ["--fit"])):
            assert ckpt("remap", source, "--to", target, *how, "-o", output, "--force").code == 0
            assert_same_tensors(torch.load(output, weights_only=True), want)
        assert f"{rule} (found by --fit)" in ckpt("remap", source, "--to", target, "--fit", "--dry-run").out


class Unit(nn.Module):
    """A layer that somebody wrapped."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def with_net() -> nn.Module:
    """A ResNet-18 in which the first convolution and one downsampling are wrapped."""
    model = torchvision.models.resnet18()
    model.conv1 = Unit(model.conv1)
    model.layer2[0].downsample[0] = Unit(model.layer2[0].downsample[0])
    return model


def test_s4_net_inside_the_keys_of_one_side_only(trained: nn.Module) -> None:
    """Removed where the shorter key exists in the model, added where the longer one does; one by one."""
    torch.save(trained.state_dict(), "plain.pth")
    there = cs.plan("plain.pth", [r"\.(weight)$ => .net.\1 when=target"], with_net()).check()
    assert [edge for step in there.steps for edge in step.edges] == [
        (("conv1.weight",), ("conv1.net.weight",)),
        (("layer2.0.downsample.0.weight",), ("layer2.0.downsample.0.net.weight",)),
    ]
    cs.save(there.result, "net.pth")
    model = with_net()
    model.load_state_dict(torch.load("net.pth", weights_only=True), strict=True)
    assert torch.equal(model.eval()(X), trained(X))
    back = cs.remap("net.pth", "back.pth", [r"\.net\. => . when=target"], "torchvision:resnet18")
    assert_same_tensors(torch.load(back.path, weights_only=True), trained.state_dict())


def test_s5_the_symmetric_difference(ckpt: Any, resnet_bundle: Path) -> None:
    left = set(cs.open(resnet_bundle))
    right = set(torchvision.models.resnet18().state_dict())
    rows = ckpt("diff", resnet_bundle, "torchvision:resnet18", "--json").json["keys"]
    assert {row["key"] for row in rows if row["status"] == "unexpected"} == left - right
    assert {row["key"] for row in rows if row["status"] == "missing"} == right - left


def test_s6_a_new_data_set_has_other_classes(ckpt: Any, resnet_bundle: Path, trained: nn.Module) -> None:
    """By name, or found by its shape."""
    base = ["remap", resnet_bundle, "--rule", "strip module.", "--to", SPEC, "--missing", "init"]
    assert ckpt(*base, "--rule", r"drop ^fc\.", "-o", "named.pth").code == 0
    assert ckpt(*base, "--mismatched", "drop", "-o", "found.pth").code == 0
    assert_same_tensors(torch.load("named.pth", weights_only=True), torch.load("found.pth", weights_only=True))
    assert torch.equal(features(loaded("found.pth", num_classes=10), X), features(trained, X))


def test_s7_another_modality_does_not_load_the_first_convolution(resnet_bundle: Path, trained: nn.Module) -> None:
    model = telling(torchvision.models.resnet18(), seed=4)
    model.conv1 = nn.Conv2d(10, 64, 7, 2, 3, bias=False)
    first = model.conv1.weight.detach().clone()
    report = cs.load_into(model, resnet_bundle, ["strip module.", r"drop ^conv1\.weight$"], missing="init")
    assert report.kept == ("conv1.weight",)
    want = {**trained.state_dict(), "conv1.weight": first}
    assert_same_tensors(model.state_dict(), want)


def test_s7_a_first_convolution_is_adapted_from_rgb(ckpt: Any, resnet_bundle: Path, trained: nn.Module) -> None:
    """To optical flow of ten channels and to grey, as timm does; the mean over the colours, as two-stream networks."""
    from timm.models import adapt_input_conv

    weight = trained.state_dict()["conv1.weight"]
    for count, rule in ((10, "channels ^conv1 10"), (1, "channels ^conv1 1"), (10, "channels ^conv1 10 how=mean")):
        output = f"{count}{'mean' in rule}.safetensors"
        ran = ckpt("remap", resnet_bundle, "--rule", "strip module.", "--rule", rule, "-o", output)
        assert ran.code == 0, ran.err
        model = torchvision.models.resnet18()
        model.conv1 = nn.Conv2d(count, 64, 7, 2, 3, bias=False)
        model.load_state_dict(load_file(output), strict=True)
        want = (
            weight.mean(1, keepdim=True).expand(-1, 10, -1, -1) if "mean" in rule else adapt_input_conv(count, weight)
        )
        torch.testing.assert_close(model.conv1.weight.detach(), want, rtol=1e-6, atol=0)
        assert_same_tensor(model.fc.weight.detach(), trained.state_dict()["fc.weight"])


def test_s19_weights_are_clamped_copied_and_set_by_hand(ckpt: Any, trained: nn.Module) -> None:
    state = trained.state_dict()
    torch.save(state, "a.pth")
    rules = [
        r"clamp \.weight$ min=0 where=rank==4,d2==1,d3==1",
        r"drop ^layer1\.1\.conv2\.weight$",
        r"copy ^layer1\.1\.conv1\.weight$ => layer1.1.conv2.weight",
        r"drop ^fc\.bias$",
        "fill fc.bias 1000 0.5",
    ]
    ran = ckpt(
        "remap", "a.pth", "--to", "torchvision:resnet18", "-o", "b.pth", *(w for r in rules for w in ("--rule", r))
    )
    assert ran.code == 0, ran.err
    want = dict(state)
    small = [key for key, value in state.items() if value.ndim == 4 and value.shape[2:] == (1, 1)]
    assert len(small) == 3
    want |= {key: state[key].clamp(min=0) for key in small}
    want |= {"layer1.1.conv2.weight": state["layer1.1.conv1.weight"], "fc.bias": torch.full((1000,), 0.5)}
    assert_same_tensors(loaded("b.pth").state_dict(), want)


def test_s20_channels_that_both_have_are_copied_and_counted(ckpt: Any, trained: nn.Module) -> None:
    torch.save(trained.state_dict(), "a.pth")
    model = telling(torchvision.models.resnet18(num_classes=1200), seed=5)
    model.layer2[0].conv1 = nn.Conv2d(64, 96, 3, 2, 1, bias=False)
    model.layer2[0].bn1 = nn.BatchNorm2d(96)
    model.layer2[0].conv2 = nn.Conv2d(96, 128, 3, 1, 1, bias=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = cs.load_into(model, "a.pth", mismatched="overlap")
    after, source = model.state_dict(), trained.state_dict()
    assert set(report.partly) == {key for key in before if before[key].shape != source[key].shape}
    assert after["layer2.0.conv1.weight"].shape == (96, 64, 3, 3)
    assert_same_tensor(after["layer2.0.conv1.weight"], source["layer2.0.conv1.weight"][:96])
    assert_same_tensor(after["fc.weight"][:1000], source["fc.weight"])
    assert_same_tensor(after["fc.weight"][1000:], before["fc.weight"][1000:])
    assert "fc.weight (512000 of 614400 elements copied (83.3 %)" in str(report)
    with_file = ["--to", "torchvision:resnet18,num_classes=1200", "--mismatched", "overlap", "--dry-run"]
    assert "512000 of 614400 elements copied (83.3 %)" in ckpt("remap", "a.pth", *with_file).out


def test_s8_sizes_of_one_are_squeezed_and_unsqueezed(ckpt: Any, trained: nn.Module) -> None:
    state = dict(trained.state_dict())
    state["conv1.weight"] = state["conv1.weight"].unsqueeze(2)
    state["fc.bias"] = state["fc.bias"][None]
    torch.save(state, "a.pth")
    rules = ["--rule", r"squeeze ^conv1\.weight$ 2", "--rule", r"squeeze ^fc\.bias$"]
    assert ckpt("remap", "a.pth", *rules, "--to", "torchvision:resnet18", "-o", "ruled.pth").code == 0
    assert (
        ckpt("remap", "a.pth", "--mismatched", "reshape", "--to", "torchvision:resnet18", "-o", "found.pth").code == 0
    )
    for output in ("ruled.pth", "found.pth"):
        assert torch.equal(loaded(output)(X), trained(X))
    inverse = ["--rule", r"unsqueeze ^conv1\.weight$ 2", "--rule", r"unsqueeze ^fc\.bias$ 0"]
    assert ckpt("remap", "ruled.pth", *inverse, "-o", "back.pth").code == 0
    assert_same_tensors(torch.load("back.pth", weights_only=True), state)


WHOLE = """
import sys, torch, torchvision
class Net(torchvision.models.ResNet):
    def __setstate__(self, state):
        open("ran", "w").close()
        super().__setstate__(state)
if __name__ == "__main__":
    import whole, resnet18
    model = whole.Net(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10)
    resnet18.telling(model)
    torch.save(model, "net.pth.tar")
    torch.save(model, "old.pth.tar", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), "want.pth")
"""


def test_s9_a_whole_pickled_model_without_its_class(ckpt: Any) -> None:
    """Saved where its class was at hand, by torch of today and of before 1.6; here that is gone, and nothing of it is
    imported or run."""
    Path("whole.py").write_text(WHOLE)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "fixtures" / "make")}
    subprocess.run([sys.executable, "whole.py"], check=True, env=env)
    os.unlink("whole.py")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("whole")
    want = torch.load("want.pth", weights_only=True)
    for file in ("net.pth.tar", "old.pth.tar"):
        state = cs.open(file).state_dict()
        assert_same_tensors(state, want)
        assert ckpt("ls", file, "--match", "^fc").out.splitlines()[1].split()[0] == "fc.weight"
        assert ckpt("convert", file, "clean.safetensors", "--force").code == 0
        model = torchvision.models.resnet18(num_classes=10)
        model.load_state_dict(state, strict=True)
        assert torch.equal(model.eval()(X), loaded("clean.safetensors", num_classes=10)(X))
        assert cs.load_into(torchvision.models.resnet18(num_classes=10), file).coverage == 1
        assert not Path("ran").exists()
        assert "whole" not in sys.modules


def test_s16_a_replaced_last_layer_and_a_replaced_inner_convolution(resnet_bundle: Path, trained: nn.Module) -> None:
    alexnet = telling(torchvision.models.alexnet())
    save_file({key: value.contiguous() for key, value in alexnet.state_dict().items()}, "alexnet.safetensors")
    model = telling(torchvision.models.alexnet(num_classes=7), seed=4).eval()
    head = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("classifier.6")}
    report = cs.load_into(model, "alexnet.safetensors", fit=True)
    assert report.kept == ("classifier.6.weight", "classifier.6.bias")
    assert_same_tensors(model.state_dict(), {**alexnet.state_dict(), **head})

    model = torchvision.models.resnet18()
    model.layer2[0].conv1 = nn.Conv2d(64, 256, 3, 2, 1, bias=False)
    model.layer2[0].bn1 = nn.BatchNorm2d(256)
    model.layer2[0].conv2 = nn.Conv2d(256, 128, 3, 1, 1, bias=False)
    new = {key for key, value in model.state_dict().items() if value.shape != trained.state_dict()[key].shape}
    norm = [f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert new == {f"layer2.0.{name}" for name in ("conv1.weight", *norm, "conv2.weight")}
    partly = cs.load_into(model, resnet_bundle, fit=True, mismatched="overlap")
    assert set(partly.partly) == new
    assert_same_tensor(model.layer2[0].conv1.weight.detach()[:128], trained.layer2[0].conv1.weight.detach())
    assert set(cs.load_into(model, resnet_bundle, fit=True).kept) == new


class Segmenter(nn.Module):
    """A ResNet-18 with a transposed convolution and a new classifier, as in the write-up."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        base = torchvision.models.resnet18()
        self.conv1, self.bn1, self.relu, self.maxpool = base.conv1, base.bn1, base.relu, base.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = base.layer1, base.layer2, base.layer3, base.layer4
        self.convtranspose1 = nn.ConvTranspose2d(512, 64, 3, 2, 1, 1, bias=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fclass = nn.Linear(64, num_classes)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def test_s17_pretrained_weights_into_a_changed_network(resnet_bundle: Path, trained: nn.Module) -> None:
    model = Segmenter().eval()
    new = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(("convt", "fclass"))}
    report = cs.load_into(model, resnet_bundle, ["strip module."], unexpected="drop", missing="init")
    assert report.kept == ("convtranspose1.weight", "fclass.weight", "fclass.bias")
    assert report.dropped == ("module.fc.weight", "module.fc.bias")
    assert torch.equal(model.body(X), nn.Sequential(*list(trained.children())[:-2])(X))
    assert_same_tensors({key: model.state_dict()[key] for key in new}, new)


def test_s18_what_was_not_loaded_is_initialised_by_a_scheme(ckpt: Any, resnet_bundle: Path, trained: nn.Module) -> None:
    """The rest is what was loaded, bit for bit, and the file has the bytes of the live model."""
    model = telling(torchvision.models.resnet18(num_classes=10), seed=4).eval()
    done = cs.init_missing(model, cs.load_into(model, resnet_bundle, fit=True), "normal:0.02", seed=7)
    assert done.made == {"fc.weight": "normal:0.02", "fc.bias": "zeros"}
    assert_same_but_head(model.state_dict(), trained.state_dict())
    assert float(model.fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not model.fc.bias.any()
    how = ["--mismatched", "drop", "--missing", "init", "--init", "normal:0.02", "--seed", "7"]
    ran = ckpt("remap", resnet_bundle, "--rule", "strip module.", "--to", SPEC, *how, "-o", "b.pth")
    assert ran.code == 0
    assert_same_tensors(loaded("b.pth", num_classes=10).state_dict(), model.state_dict())


def test_s21_a_look_at_the_values_of_one_layer(ckpt: Any, resnet_bundle: Path, trained: nn.Module) -> None:
    weight = trained.layer1[0].conv1.weight.detach()
    ran = ckpt("ls", resnet_bundle, "--match", r"layer1\.0\.conv1", "--stats", "--json")
    (row,) = ran.json["tensors"]
    assert row["key"] == "module.layer1.0.conv1.weight"
    assert row["stats"]["minimum"] == float(weight.min())
    assert row["stats"]["maximum"] == float(weight.max())
    assert row["stats"]["mean"] == pytest.approx(float(weight.double().mean()), rel=1e-9)
    assert row["stats"]["std"] == pytest.approx(float(weight.double().std(correction=0)), rel=1e-9)
    ref = cs.open(resnet_bundle)["module.layer1.0.conv1.weight"]
    assert_same_tensor(ref.read(), weight)
    assert_same_tensor(ref[3], weight[3])
    assert_same_tensor(ref[::2, 0, ..., 1:], weight[::2, 0, ..., 1:])


def test_s22_what_was_saved_on_a_gpu_is_written_for_any_machine(ckpt: Any, trained: nn.Module) -> None:
    """`torch.load` refuses the file without a GPU; ours comes out clean, and loads where the model is."""
    save_legacy(trained.state_dict(), "cpu.pth")
    raw = Path("cpu.pth").read_bytes()
    tag = b"X\x03\x00\x00\x00cpu"
    assert raw.count(tag) == 1
    Path("gpu.pth").write_bytes(raw.replace(tag, b"X\x06\x00\x00\x00cuda:3"))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load("gpu.pth", weights_only=True)
    for output in ("clean.pth", "clean.safetensors"):
        assert ckpt("convert", "gpu.pth", output).code == 0
        assert torch.equal(loaded(output)(X), trained(X))
    model = torchvision.models.resnet18().to(torch.float64)
    cs.load_into(model, "gpu.pth")
    assert model.conv1.weight.dtype == torch.float64
    assert torch.equal(model.conv1.weight.float(), trained.conv1.weight)


def test_s23_running_statistics_belong_to_the_checkpoint_and_are_named(ckpt: Any, trained: nn.Module) -> None:
    """A file of the parameters alone does not fit, and what it lacks is called by its name."""
    torch.save(dict(trained.named_parameters()), "parameters.pth")
    torch.save(trained.state_dict(), "all.pth")
    buffers = [key for key, _ in trained.named_buffers()]
    for target, owner in (("torchvision:resnet18", "BatchNorm2d"), ("all.pth", "norm")):
        ran = ckpt("diff", "parameters.pth", target)
        assert ran.code == 1
        rows = [line for line in ran.out.splitlines() if line.startswith("missing")]
        words = {"buffer: a count of batches", f"buffer: running statistics of a {owner}"}
        assert {line[line.index("buffer:") :] for line in rows} == words
        ran = ckpt("remap", "parameters.pth", "--to", target, "-o", "b.pth", "--missing", "init", "--force")
        assert ran.code == 0
        lines = [line for line in ran.out.splitlines() if line.startswith("  ") and "buffer:" in line]
        assert {line[line.index("(buffer:") :] for line in lines} == {f"({word})" for word in words}
    assert torch.equal(loaded("b.pth")(X), trained(X))

    model = torchvision.models.resnet18()
    report = cs.load_into(model, "parameters.pth", missing="init")
    assert list(report.kept) == buffers
    lines = [line for line in str(report).splitlines() if line.startswith("  kept as it was")]
    assert lines[0] == (
        "  kept as it was: bn1.running_mean (not in the checkpoint; buffer: running statistics of a BatchNorm2d)"
    )
    assert all("; buffer: " in line for line in lines)
    assert not torch.equal(model.eval()(X), trained(X))
    cs.load_into(model, "all.pth")
    assert torch.equal(model(X), trained(X))


def test_every_row_of_the_page_is_tested() -> None:
    """Here, or where the rest of its subject is: a test's name begins with the row, or with all of its rows."""
    page = (ROOT / "docs" / "from-snippets.md").read_text()
    rows = [line.split("|")[1].strip().lower() for line in page.splitlines() if line.startswith("| S")]
    names = [
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def test_((?:s\d+_)+)", path.read_text(), re.MULTILINE)
    ]
    tests = {row for name in names for row in name.split("_") if row}
    assert len(rows) == len(set(rows))
    assert set(rows) == tests == {f"s{number}" for number in range(1, 25)}

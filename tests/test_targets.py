"""Model specs, live modules and checkpoints as targets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from models import Net, Tied

import ckptsurgeon as cs
from ckptsurgeon.targets.spec import parse

MODELS = Path(__file__).parent.parent / "fixtures" / "models.py"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def assert_is_target_of(target: cs.Target, model: torch.nn.Module) -> None:
    state = model.state_dict()
    assert list(target.entries) == list(state)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, value in state.items():
        entry = target.entries[key]
        assert entry.spec.shape == tuple(value.shape)
        assert entry.spec.dtype.name == str(value.dtype).removeprefix("torch.")
        assert entry.role == ("parameter" if key in parameters else "buffer")
        assert entry.module == type(model.get_submodule(key.rpartition(".")[0])).__name__


def test_a_live_module() -> None:
    assert_is_target_of(cs.target_of(Net()), Net())


def test_ties_are_known() -> None:
    assert cs.target_of(Tied()).ties == (("embed.weight", "head.weight"),)


def test_torchvision() -> None:
    assert_is_target_of(
        cs.target_of("torchvision:resnet18,num_classes=10"), torchvision.models.resnet18(num_classes=10)
    )


def test_torchvision_detection_models_download_no_backbone() -> None:
    target = cs.target_of("torchvision:ssdlite320_mobilenet_v3_large,num_classes=3")
    assert "backbone.features.0.0.0.weight" in target.entries


def test_timm() -> None:
    spec = "timm:vit_tiny_patch16_224,num_classes=3,img_size=(32,64)"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=(32, 64))
    assert_is_target_of(cs.target_of(spec), model)


def test_transformers_by_type_folder_and_class() -> None:
    config = transformers.BertConfig(**SMALL, architectures=["BertForMaskedLM"])
    os.mkdir("folder")
    Path("folder/config.json").write_text(json.dumps(config.to_dict()))
    by_folder = cs.target_of("transformers:folder")
    assert_is_target_of(by_folder, transformers.BertForMaskedLM(config))
    assert by_folder.ties[0] == ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    args = ",".join(f"{name}={value}" for name, value in SMALL.items())
    assert_is_target_of(cs.target_of(f"transformers:bert,{args}"), transformers.BertModel(config))
    assert_is_target_of(
        cs.target_of("transformers:folder,cls=BertForSequenceClassification,num_labels=7"),
        transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=7)),
    )


def test_a_file_and_its_neighbours() -> None:
    os.mkdir("code")
    Path("code/parts.py").write_text("import torch\nWIDTH = 3\n")
    Path("code/net.py").write_text(
        "import torch\nfrom parts import WIDTH\n"
        "def make(depth=1):\n    return torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(depth)])\n"
    )
    assert list(cs.target_of("code/net.py:make,depth=2").entries) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_module_of_the_current_folder_never_poses_as_an_installed_one() -> None:
    Path("mine_here.py").write_text("import torch\nmake = lambda n: torch.nn.Linear(n, 1)\n")
    assert cs.target_of("mine_here:make,n=5").entries["weight"].spec.shape == (1, 5)
    Path("timm.py").write_text("raise SystemExit('posing')\n")
    Path("safetensors.py").write_text("raise SystemExit('posing')\n")
    assert "cls_token" in cs.target_of("timm:vit_tiny_patch16_224").entries
    with pytest.raises(cs.TargetError, match="safetensors has no 'make'"):
        cs.target_of("safetensors:make")


def test_a_module_instance_and_a_nested_name() -> None:
    assert list(cs.target_of(f"{MODELS}:instance").entries) == ["weight", "bias"]
    assert list(cs.target_of("torch.nn:Linear,in_features=2,out_features=1").entries) == ["weight", "bias"]
    assert list(cs.target_of("torch:nn.Linear,in_features=2,out_features=1").entries) == ["weight", "bias"]


def test_a_model_that_reads_its_weights_is_built_on_the_cpu_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    assert cs.target_of(f"{MODELS}:ReadsItsWeights").entries["scale"].spec.shape == (3,)
    assert capfd.readouterr() == ("", "")


def test_building_a_target_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    plan = cs.plan(cs.Checkpoint({}), to=f"{MODELS}:Net", missing="init", seed=3)
    first = plan.result["fc.weight"].read()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(first, Net().state_dict()["fc.weight"])


def test_a_seed_is_for_every_source_of_randomness_and_the_callers_state_stays() -> None:
    import random

    import numpy as np

    def drawn(seed: int) -> torch.Tensor:
        random.seed()
        np.random.seed()
        before = random.getstate(), np.random.get_state()[1].tolist()
        plan = cs.plan(cs.Checkpoint({}), to=f"{MODELS}:Random", missing="init", seed=seed)
        made = plan.result["w"].read()
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        return made

    first, second, other = drawn(3), drawn(3), drawn(4)
    assert torch.equal(first, second)
    assert not (first == other).any()


def test_an_instance_made_at_import_is_the_same_every_time() -> None:
    """Each process imports the file anew: another random state must not show."""
    import subprocess
    import sys

    Path("mine.py").write_text("import torch\nnet = torch.nn.Linear(3, 2)\n")
    torch.save({}, "a.pth")
    for name in ("b.pth", "c.pth"):
        script = f"import ckptsurgeon as cs; cs.remap('a.pth', '{name}', to='mine.py:net', missing='init')"
        subprocess.run([sys.executable, "-c", script], check=True)
    assert Path("b.pth").read_bytes() == Path("c.pth").read_bytes()


def test_state_that_is_no_tensor_is_told(ckpt: Any) -> None:
    Path("ext.py").write_text(
        "import torch\nclass Ext(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(2, 2)\n"
        "    def get_extra_state(self): return {'a': 1}\n    def set_extra_state(self, state): pass\n"
    )
    torch.save(torch.nn.Linear(2, 2).state_dict(), "a.pth")
    ran = ckpt("remap", "a.pth", "--to", "ext.py:Ext", "-o", "b.pth")
    assert ran.code == 0
    assert "warning: ext.py:Ext also wants '_extra_state': no tensors" in ran.err


def test_a_model_that_is_another_on_the_cpu_is_refused() -> None:
    plan = cs.plan(cs.Checkpoint({}), to=f"{MODELS}:OtherOnMeta", missing="init")
    with pytest.raises(cs.TargetError, match="is not what it was when its keys were taken"):
        plan.result["w"].read()


def test_arguments_are_literals_else_text() -> None:
    spec = parse("a.b:f,n=3,x=1e-3,t=(1,2),l=['a,b'],d={'k':[1,2]},s=hello,q='a,b',none=None,path=a/b:c,empty=")
    assert spec.args == {
        "n": 3,
        "x": 1e-3,
        "t": (1, 2),
        "l": ["a,b"],
        "d": {"k": [1, 2]},
        "s": "hello",
        "q": "a,b",
        "none": None,
        "path": "a/b:c",
        "empty": "",
    }


BAD = {
    "torchvision:resnet19": "torchvision has no model 'resnet19'; the nearest are resnet1",
    "timm:resnet19x": "timm has no model 'resnet19x'; the nearest are",
    "transformers:bertt": "has no model 'bertt'; the nearest are bert",
    "transformers:bert,cls=Nothing": "transformers has no class of models Nothing",
    "transformers:bert,cls=pipeline": "transformers has no class of models pipeline",
    "transformers:bert,cls=BertTokenizer": "transformers has no class of models BertTokenizer",
    "torchvision:resnet18,classes=3": "the model cannot be built: TypeError",
    "torchvision:resnet18,3": "'3' is no argument; write name=value",
    "torchvision:resnet18,a=1,a=2": "the argument a stands twice",
    "no_such_package:f": "no module 'no_such_package' is installed or in",
    "models.py:Net": "no such file: models.py",
    f"{MODELS}:Nett": "has no 'Nett'; the nearest are Net",
    f"{MODELS}:raises": "the model cannot be built: RuntimeError: no such architecture today",
    f"{MODELS}:exits": "the model cannot be built: SystemExit: 3",
    f"{MODELS}:no_module": "makes a int, no nn.Module",
    "torch:float32": "is a dtype, no factory",
    f"{MODELS}:lazy": "its state dict cannot be made: RuntimeError",
}


@pytest.mark.parametrize("spec", BAD)
def test_what_is_wrong_with_a_spec_is_said_in_one_line(spec: str, ckpt: Any) -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    for command in (["diff", "a.pth", spec], ["remap", "a.pth", "-o", "b.pth", "--to", spec]):
        ran = ckpt(*command)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith(f"ckpt: error: {spec}: ")
        assert BAD[spec] in ran.err
        assert ran.err.count("\n") == 1
    assert os.listdir(".") == ["a.pth"]


def test_what_is_neither_file_nor_spec(ckpt: Any) -> None:
    torch.save({"w": torch.ones(2)}, "a.pth")
    assert "b.pth: no such file" in ckpt("diff", "a.pth", "b.pth").err


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(cs.TargetError, match=r"timm is not installed; pip install 'ckptsurgeon\[timm\]'"):
        cs.target_of("timm:resnet18")


def test_an_existing_path_wins_over_a_spec() -> None:
    torch.save({"w": torch.ones(2)}, "torchvision:resnet18")
    assert list(cs.target_of("torchvision:resnet18").entries) == ["w"]


def test_a_target_of_seventy_billion_parameters_costs_no_memory() -> None:
    spec = (
        "transformers:llama,hidden_size=8192,num_hidden_layers=80,num_attention_heads=64,num_key_value_heads=8,"
        "intermediate_size=28672,vocab_size=32000,cls=LlamaForCausalLM"
    )
    assert cs.target_of(spec).numel == 68_976_648_192


def test_what_is_no_target() -> None:
    with pytest.raises(cs.TargetError, match="not int"):
        cs.target_of(3)

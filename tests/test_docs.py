"""Docs cannot lie: every block of code in them is run and its output compared, or it says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forward_models
import pytest
import reference
import torch
from conftest import ROOT
from markdown_it import MarkdownIt

import ckptsurgeon as cs

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NOT_RUN = "<!-- not run: "


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language, text and line of the fenced blocks that do not say why they are not run."""
    found: list[tuple[str, str, int]] = []
    excused = False
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "html_block":
            excused = token.content.startswith(NOT_RUN)
        elif token.type == "fence":
            if not excused:
                found.append((token.info, token.content, (token.map or [0])[0] + 1))
            excused = False
    return found


def run(command: str) -> str:
    """What a command prints on both streams."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "COLUMNS": "100"}
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=env)
    return ran.stdout + ran.stderr


def check_console(text: str, where: str) -> None:
    commands: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif line.startswith("> ") and commands and not commands[-1][1]:
            commands[-1] = (f"{commands[-1][0]}\n{line[2:]}", [])
        else:
            commands[-1][1].append(line)
    for command, expected in commands:
        assert run(command).rstrip().splitlines() == [line.rstrip() for line in expected], f"{where}: {command}"


@pytest.fixture
def _threads() -> Iterator[None]:
    """A page may set how many threads torch takes; other tests do not see it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def parameter(page: Path) -> Any:
    """Trainers of other libraries warn of much that is no business of ours."""
    marks = [pytest.mark.filterwarnings("ignore")] if page.name == "finetune.md" else []
    return pytest.param(page, marks=marks, id=page.name)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("page", [parameter(page) for page in PAGES])
def test_the_blocks_of_a_page_run_as_they_say(page: Path, resnet_bundle: Path) -> None:
    os.symlink(resnet_bundle, "resnet18-dataparallel.pth")
    os.symlink(ROOT / "fixtures", "fixtures")
    names: dict[str, Any] = {"torch": torch}
    for language, text, line in blocks(page):
        where = f"{page.name}:{line}"
        if language == "console":
            check_console(text, where)
        elif language == "python":
            exec(compile(text, where, "exec"), names)
        elif language == "yaml":
            Path("recipe.yaml").write_text(text)
            assert cs.Recipe.load("recipe.yaml").rules
        else:
            pytest.fail(f"{where}: a block of {language or 'no language'} is not run and does not say why")


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_made_pages_are_what_the_code_makes(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == reference.PAGES[name](), "run: python tests/reference.py"


def test_links_between_pages_lead_somewhere() -> None:
    import re

    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def fields(value: Any, path: str = "") -> set[str]:
    """The dotted places of everything in a JSON object; `[]` stands for the members of a list."""
    if isinstance(value, dict):
        return {path} - {""} | {p for key, inner in value.items() for p in fields(inner, f"{path}.{key}".lstrip("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {path} | {p for inner in value for p in fields(inner, f"{path}[]")} - {f"{path}[]"}
    return {path}


def documented(schema: str) -> set[str]:
    """The fields that docs/json.md lists for a schema."""
    text = (ROOT / "docs" / "json.md").read_text()
    section = text.split(f"`{schema}`", 1)[1].split("\n## ", 1)[0]
    return {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_json_objects_have_exactly_the_documented_fields(ckpt: Any, resnet_bundle: Path) -> None:
    torch.save({"netG": {"w": torch.ones(2)}, "netD": {"w": torch.ones(2)}}, "gan.pth")
    torch.save({"netG": {"w": torch.zeros(2)}, "netD": {"w": torch.ones(2)}}, "gan2.pth")
    quantized = torch._make_per_tensor_quantized_tensor(torch.ones(2, dtype=torch.int8), 0.5, 0)
    odd = {"q": quantized, "s": torch.eye(2).to_sparse(), "p": torch.nn.Parameter(torch.ones(1))}
    torch.save(odd, "odd.pth")
    cs.convert("gan.pth", "b.safetensors", select="netG")
    raw = Path("gan.pth").read_bytes()
    Path("bad.pth").write_bytes(raw.replace(b"\0\0\x80?" * 2, b"\0\0\x80@" * 2))
    cs.convert("gan.pth", "m.safetensors.index.json", select="netD")
    Path("m-00002-of-00002.safetensors").write_bytes(b"")
    torch.save({f"{name}.weight": torch.ones(2, 2) for name in ("one", "two")}, "one.pth")
    torch.save({f"{name}.weight": torch.ones(2, 2) for name in ("left", "right")}, "named.pth")
    torch.save({"w": torch.ones(2), "v": torch.ones(3)}, "more.pth")
    torch.save(forward_models.twins().state_dict(), "twins.pth")
    torch.save(forward_models.plain().state_dict(), "plain.pth")
    spec = "torchvision:resnet18,num_classes=10"
    seen: dict[str, set[str]] = {}
    for words in (
        ["ls", resnet_bundle, "--stats", "--limit", "3"],
        ["ls", "gan.pth"],
        ["ls", "odd.pth"],
        ["ls", "--tree", resnet_bundle],
        ["ls", "--extras", resnet_bundle],
        ["verify", "gan.pth", "--against", "gan.pth", "--select", "netG"],
        ["verify", "bad.pth"],
        ["verify", "m.safetensors.index.json", "--against", "b.safetensors", "--nan", "--rule", "w => v"],
        ["diff", resnet_bundle, spec],
        ["diff", resnet_bundle, spec, "--rule", "strip module."],
        ["diff", "gan.pth", "gan2.pth", "--select", ".", "--values"],
        ["remap", resnet_bundle, "--to", spec, "--fit", "--keep-extras", "-o", "b.pth"],
        ["remap", resnet_bundle, "--to", spec, "--dry-run"],
        ["remap", "b.safetensors", "--in-place", "--dry-run"],
        ["align", resnet_bundle, spec],
        ["align", "one.pth", "named.pth"],
        ["invert", "--for", "b.safetensors", "--rule", "w => v"],
        ["ls", "--params", spec],
        ["freeze-plan", spec, "^fc"],
        ["align", "twins.pth", "forward_models:other_twins", "--try", "--source", "forward_models:twins"],
        ["align", "gan2.pth", "b.safetensors", "--select", "."],
        ["align", "b.safetensors", "more.pth"],
        ["check", "plain.pth", "--source", "forward_models:plain", "--to", "forward_models:plain"],
        ["recipes"],
        ["rules"],
    ):
        data = ckpt(*words, "--json").json
        seen.setdefault(data["schema"], set()).update(fields(data))
    kinds = (
        *("align", "check", "diff", "extras", "freeze-plan", "invert", "ls", "params", "recipes", "remap", "rules"),
        *("tree", "verify"),
    )
    assert sorted(seen) == [f"ckptsurgeon.{kind}/1" for kind in kinds]
    for schema, got in seen.items():
        told = documented(schema)
        free = (
            "others[].",
            "metadata.",
            "dropped.",
            "followed[].reset.",
            "missing.",
            "mismatched.",
            "tree.",
            "extras.",
            "against.",
            "provenance.",
        )
        assert {f for f in got if not f.startswith(free)} == {f for f in told if not f.startswith(free)}, schema

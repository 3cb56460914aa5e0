"""Rules about the code are machines."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import ckptsurgeon

PACKAGE = ROOT / "ckptsurgeon"
TESTS = ROOT / "tests"
COMMANDS = {
    "layers and who may import what": ["lint-imports", "--no-cache"],
    "strict types": [sys.executable, "-m", "mypy"],
    "lint": [sys.executable, "-m", "ruff", "check", "."],
    "format": [sys.executable, "-m", "ruff", "format", "--check", "."],
}


@pytest.mark.parametrize("rule", COMMANDS)
def test_the_house_rules(rule: str) -> None:
    command = COMMANDS[rule]
    if command[0] == "lint-imports":
        command = [str(Path(sys.executable).parent / "lint-imports"), *command[1:]]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text())
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


FORBIDDEN = ("pickle.load", "pickle.loads", "torch.load", "torch.jit.load", "eval", "exec", "print", "breakpoint")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_calls_nothing_that_could_run_a_file(path: Path) -> None:
    found = [name for name, _ in calls(path) if name in FORBIDDEN]
    assert found == []


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.name)
def test_no_test_loads_what_may_run_or_skips_in_silence(path: Path) -> None:
    for name, call in calls(path):
        assert not (
            name == "torch.load"
            and any(k.arg == "weights_only" and ast.unparse(k.value) == "False" for k in call.keywords)
        )
        assert name not in ("pickle.load", "pickle.loads", "pytest.skip", "pytest.importorskip")


def test_the_public_names_are_sorted_and_there() -> None:
    assert ckptsurgeon.__all__ == sorted(ckptsurgeon.__all__)
    assert len(set(ckptsurgeon.__all__)) == len(ckptsurgeon.__all__)
    for name in ckptsurgeon.__all__:
        made = getattr(ckptsurgeon, name)
        assert made.__doc__, f"{name} has no docstring"
    assert set(ckptsurgeon.__all__) <= set(dir(ckptsurgeon))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ckptsurgeon.nothing


def test_no_module_shadows_a_verb() -> None:
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(ckptsurgeon.__all__)


def test_every_module_says_what_it_is() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_docstring_examples_run() -> None:
    import doctest

    ran = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        result = doctest.testmod(importlib.import_module(name))
        assert result.failed == 0, name
        ran += result.attempted
    assert ran >= 10

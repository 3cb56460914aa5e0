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


DANGEROUS = (
    "ctypes", "dill", "importlib", "joblib", "marshal", "multiprocessing", "pickle", "runpy", "shelve", "shutil",
    "socket", "subprocess", "tarfile", "tempfile", "urllib", "xml", "zipfile",
)  # fmt: skip
IMPORTS = {
    ("__init__.py", "importlib"): "the package's own names, when they are first used",
    ("cli/app.py", "importlib"): "the package's own commands",
    ("stream/commit.py", "shutil"): "the new folder that could not be finished",
    ("stream/staging.py", "shutil"): "the folder that a killed writer left",
    ("targets/spec.py", "importlib"): "the code that a model spec names, which the user asks to run",
    ("targets/dependencies.py", "importlib"): "which files that code came from",
}


def test_what_could_run_code_or_reach_out_is_imported_in_few_places() -> None:
    """Each with its reason; a place that no longer needs it leaves the list."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )  # fmt: skip
            found |= {(str(path.relative_to(PACKAGE)), name.partition(".")[0]) for name in names}
    assert {(path, name) for path, name in found if name in DANGEROUS} == set(IMPORTS)


ATTRIBUTES = {
    ("__init__.py", "_OTHER_NAMES.get(name, name)"): "a public name of the package, from its own table",
    ("cli/app.py", "word"): "a command, from its own table",
    ("evaluate/values.py", "dtype"): "a dtype of torch, by the closed table of dtypes",
    ("evaluate/values.py", "spec.dtype.name"): "the same",
    ("evaluate/values.py", "ref.dtype.name"): "the same",
    ("forward/shapes.py", "name"): "numbers that a live model says of its inputs, under names that are written there",
    ("ops/making.py", "spec.dtype.name"): "the same",
    ("ops/values.py", "self.dtype.name"): "the same",
    ("plans.py", "name"): "the policies of a plan, by their own names",
    ("targets/spec.py", "str(name)"): "the class of a transformers model, which must be one",
    ("targets/facts.py", "name"): "numbers of heads, under the names that libraries give them",
    ("targets/spec.py", "name"): "the factory that a model spec names, which the user asks to run",
}


def test_no_attribute_is_named_by_a_file() -> None:
    """Every `getattr` and its kin has a name that is written there, or one that is no data, with its reason."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for name, call in calls(path):
            if name in ("getattr", "setattr", "hasattr", "delattr", "operator.attrgetter", "attrgetter", "vars"):
                wanted = call.args[-1] if "attrgetter" in name or name == "vars" else call.args[1]
                if not isinstance(wanted, ast.Constant):
                    found.add((str(path.relative_to(PACKAGE)), ast.unparse(wanted)))
    assert found == set(ATTRIBUTES)


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

"""Fixtures that many tests share."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "fixtures" / "make"), str(ROOT / "fixtures")]

from ckptsurgeon.cli.app import COMMANDS, build  # noqa: E402

settings.register_profile("shared machines", deadline=None)
settings.load_profile("shared machines")


@dataclass(frozen=True)
class Ran:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache, nor another test's; processes that it starts inherit this."""
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}-cache")


@pytest.fixture(autouse=True)
def _syncing_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: what a process wrote is there without waiting for the disk, thousands of times. The
    descriptor must be one, and commands in processes of their own do wait."""
    there = os.fstat  # which a test may put something else in the place of
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: there(descriptor) and None)


@pytest.fixture
def ckpt() -> Any:
    """Run a command in this process, of an application with that command alone, as `main` builds it; anything but our
    own errors comes through as it is."""

    def run(*words: object) -> Ran:
        commands = [word for word in COMMANDS if word in words[:1]]
        result = CliRunner().invoke(build(commands or COMMANDS), [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def resnet_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training bundle of `fixtures/make/resnet18.py`."""
    import resnet18

    path = tmp_path_factory.mktemp("resnet") / "resnet18-dataparallel.pth"
    torch.save(resnet18.bundle(), path)
    return path


def leftovers() -> list[str]:
    """Files that a failed command left in the current folder."""
    return [name for name in os.listdir(".") if name.endswith(".part")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Property tests run the same lines hundreds of times: to watch each of them would double their time, and the
    examples beside them show the same branches. Tests that go through every step of a thing, or through very large
    ones, carry the mark themselves."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.no_cover)

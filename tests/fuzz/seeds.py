"""Sound files to begin with, one of each kind, made by torch and safetensors as `tests/kinds.py` does.

They are made in a process of their own and kept in a folder: what fuzzes imports no torch, so that memory is that of
the readers.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

WIDTHS = "widths"
"""The bytes of an element of each storage in the tar archives."""
TESTS = Path(__file__).resolve().parent.parent


def _states() -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    weight = torch.arange(6.0).reshape(2, 3)
    plain = OrderedDict([("layers.0.weight", weight), ("layers.1.weight", torch.ones(3)), ("n", torch.tensor(3))])
    views = OrderedDict(a=weight, tied=weight, turned=weight.t(), part=torch.arange(8.0)[2:6], empty=torch.zeros(0, 2))
    return {"plain": plain, "views": views}


def _objects() -> dict[str, Any]:
    """Objects of the rarer forms, for `torch.save`."""
    import torch
    from kinds import bundle, module

    plain = _states()["plain"]
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 1, torch.qint8)
    many = OrderedDict((f"layers.{i}.w", torch.zeros(2 + i // 4)) for i in range(7))
    forms = {
        "quantized": quantized,
        "sparse": torch.eye(2).to_sparse(),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "meta": torch.empty(2, device="meta"),
        "half": torch.zeros(2, dtype=torch.float8_e5m2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    sequence = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    return {
        "bundle": bundle(plain),
        "module": module({"a.weight": torch.ones(2), "b": torch.tensor(1)}),
        "forms": forms,
        "many": many,
        "versions": sequence.state_dict(),
        "arrays": {"w": torch.ones(2).numpy(), "b": torch.ones(2, dtype=torch.float64).numpy()[0]},
    }


def make(folder: Path) -> None:
    """Write every seed; a file of facts says what their parts are."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import torch
    import torch.distributed.checkpoint as dcp
    from helpers import save_legacy
    from kinds import KINDS

    widths: dict[str, list[int]] = {}
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, state in _states().items():
            for kind in ("zip 2", "zip 4", "zip, deflated", "legacy 2", "tar", "script", "package", "safetensors"):
                held = KINDS[kind].holding(state)
                made = KINDS[kind].save(held, folder / "made")
                made.rename(folder / f"{kind.replace(', ', '-').replace(' ', '-')}.{name}")
                storages = {t.untyped_storage()._cdata: t for t in held.values()}.values()
                widths[name] = [t.element_size() for t in storages]
        for name, obj in _objects().items():
            torch.save(obj, folder / f"zip-2.{name}")
            if name not in ("arrays", "module"):  # a module brings the source of its class along
                save_legacy(obj, folder / f"legacy-2.{name}")
        for name, state in {**_states(), "nested": {"model": _states()["plain"], "epoch": 3}}.items():
            dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
            (folder / "dcp" / ".metadata").rename(folder / f"dcp.{name}")
            shutil.rmtree(folder / "dcp")
    (folder / WIDTHS).write_text(json.dumps(widths))


if __name__ == "__main__":
    make(Path(sys.argv[1]))

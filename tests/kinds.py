"""Every kind of checkpoint as one line: who writes it, and what it can hold.

The writers use torch, safetensors, huggingface_hub or bytes made by hand, never the code under
test; only the kinds named `our …` are its own outputs, which closes the circle.
"""

from __future__ import annotations

import json
import keyword
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from helpers import save_legacy
from test_torch_tar import STORAGES, Legacy, tar
from torch.package import PackageExporter

import ckptsurgeon as cs

State = Mapping[str, torch.Tensor]
Save = Callable[[State, Path], Path]
EARLIEST = frozenset(STORAGES)
WIDEST = frozenset({torch.complex128})
SHARD = 256
"""Bytes of a shard: small tests have several."""


class CannotHold(Exception):
    """A state dict whose names this kind has no place for."""


@dataclass(frozen=True)
class Kind:
    """`save` writes a state dict beside a path without suffix and returns what is to be opened.

    `format` is what we call it.  `lacks` are the dtypes that it cannot hold, or `holds` the only ones
    that it can; `ties` and `versions` tell whether shared names and torch's `_metadata` survive in it,
    and `extras` whether it holds more than the state dict.  `order` gives the keys as the file has
    them, which need not be the order of the state dict.  `header` is the most that opening may read
    of a file, in bytes; `slack` are the bytes at a file's end that say nothing, so that nobody misses
    them.
    """

    save: Save
    format: str = "torch-zip"
    lacks: frozenset[torch.dtype] = frozenset()
    holds: frozenset[torch.dtype] | None = None
    ties: bool = True
    versions: bool = True
    extras: bool = False
    order: Callable[[State, Path], list[str]] = lambda state, path: list(state)
    header: int = 150_000
    slack: Callable[[bytes], int] = lambda raw: 0

    def holding(self, state: State) -> OrderedDict[str, torch.Tensor]:
        """The part of a state dict whose dtypes this kind holds."""
        return OrderedDict((key, value) for key, value in state.items() if self.can_hold(value.dtype))

    def can_hold(self, dtype: torch.dtype) -> bool:
        return dtype not in self.lacks and (self.holds is None or dtype in self.holds)


def files(path: Path) -> list[Path]:
    """All files that a checkpoint consists of."""
    folder = path if path.is_dir() else path.parent
    return sorted(folder.iterdir()) if path.is_dir() or path.suffix == ".json" else [path]


def _to(path: Path, suffix: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path.with_suffix(suffix)


@contextmanager
def _set(holder: Any, name: str, value: object) -> Iterator[None]:
    old = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, old)


# zip archives of torch


def _zip(state: Any, path: Path, protocol: int = 2) -> Path:
    out = _to(path, ".pth")
    torch.save(state, out, pickle_protocol=protocol)
    return out


def _repacked(
    state: State,
    path: Path,
    rename: Callable[[str], str] = lambda name: name,
    change: Callable[[str, bytes], bytes | None] = lambda name, raw: raw,
    method: int = zipfile.ZIP_STORED,
) -> Path:
    """A zip of torch, packed again by zipfile; a member is left out where `change` gives None."""
    source, out = _zip(state, path.with_name(path.name + "-source")), _to(path, ".pth")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", method, compresslevel=1) as new:
        for name in old.namelist():
            raw = change(name, old.read(name))
            if raw is not None:
                new.writestr(rename(name), raw)
    source.unlink()
    return out


def _without_new_records(name: str, raw: bytes) -> bytes | None:
    new = ("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
    return None if name.endswith(new) else raw


def _big_endian(state: State, path: Path) -> Path:
    """Torch numbers storages in the order in which it meets them."""
    kinds = dict.fromkeys((tensor.untyped_storage()._cdata, tensor.dtype) for tensor in state.values())
    dtypes = [dtype for _, dtype in kinds]

    def change(name: str, raw: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        if "/data/" not in name:
            return raw
        dtype = dtypes[int(name.rpartition("/")[2])]
        width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        return (
            torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, width).flip(1).numpy().tobytes()
            if raw
            else b""
        )

    return _repacked(state, path, change=change)


def _without_checksums(state: State, path: Path) -> Path:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return _zip(state, path)
    finally:
        torch.serialization.set_crc32_options(before)


def _aligned(state: State, path: Path) -> Path:
    from torch.utils.serialization import config

    with _set(config.save, "storage_alignment", 4096):
        return _zip(state, path)


def bundle(state: State) -> dict[str, Any]:
    """What the Trainer of Lightning saves."""
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.25)}},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(9.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
        ],
        "lr_schedulers": [{"last_epoch": 3, "_last_lr": [1e-3]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 8, "name": "réseau"},
    }


# modules


def module(state: State) -> torch.nn.Module:
    """A module whose parameters (of floating dtypes) and buffers are these tensors."""
    root = torch.nn.Module()
    made: dict[int, torch.nn.Parameter] = {}
    for key, tensor in state.items():
        *path, name = key.split(".")
        at = root
        for step in path:
            if step in at._parameters or step in at._buffers or (step not in at._modules and hasattr(at, step)):
                raise CannotHold(key)
            if step not in at._modules:
                at.register_module(step, torch.nn.Module())
            at = at._modules[step]
        if hasattr(at, name):
            raise CannotHold(key)
        if tensor.is_floating_point():
            same = made.setdefault(id(tensor), torch.nn.Parameter(tensor, requires_grad=False))
            at.register_parameter(name, same)
        else:
            at.register_buffer(name, tensor)
    return root


def _module_order(state: State, path: Path) -> list[str]:
    return list(module(state).state_dict())


def _script(state: State, path: Path) -> Path:
    if any(keyword.iskeyword(step) for key in state for step in key.split(".")):
        raise CannotHold
    if any(tensor.storage_offset() and not tensor.numel() for tensor in state.values()):
        raise CannotHold  # torch saves it and refuses to load it
    out = _to(path, ".pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module(state)).save(out)
    return out


def _script_order(state: State, path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(torch.jit.load(path).state_dict())


def _package(state: State, path: Path) -> Path:
    out = _to(path, ".pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with PackageExporter(out) as exporter:
            exporter.extern("torch.**")
            exporter.save_pickle("state", "state.pkl", state)
    return out


def _tar(state: State, path: Path) -> Path:
    made, seen, keys = Legacy(), {}, OrderedDict()
    for number, (key, tensor) in enumerate(state.items()):
        if id(tensor) not in seen:
            flat = tensor.untyped_storage()
            if flat._cdata not in seen:
                seen[flat._cdata] = 10_000 + number
                made.storage(seen[flat._cdata], torch.empty(0, dtype=tensor.dtype).set_(flat))
            shape, strides = list(tensor.shape), list(tensor.stride())
            seen[id(tensor)] = made.tensor(number, seen[flat._cdata], shape, strides, tensor.storage_offset())
        keys[key] = seen[id(tensor)]
    out = _to(path, ".tar")
    out.write_bytes(tar(made.members(keys)))
    return out


def _padding(raw: bytes) -> int:
    """What follows the two blocks of zeros that end a tar."""
    end = len(raw.rstrip(b"\0"))
    return len(raw) - (end + -end % 512 + 1024)


# safetensors and shards


def apart(state: State) -> OrderedDict[str, torch.Tensor]:
    """Contiguous, and no two tensors in one storage."""
    return OrderedDict((key, tensor.clone(memory_format=torch.contiguous_format)) for key, tensor in state.items())


def _together(state: State) -> OrderedDict[str, torch.Tensor]:
    """Contiguous, tied names still in one storage of their own."""
    made: dict[int, torch.Tensor] = {}
    for tensor in state.values():
        made.setdefault(id(tensor), tensor.clone(memory_format=torch.contiguous_format))
    return OrderedDict((key, made[id(tensor)]) for key, tensor in state.items())


def _safetensors(state: State, path: Path) -> Path:
    out = _to(path, ".safetensors")
    safetensors.torch.save_file(apart(state), out)
    return out


def _safetensors_model(state: State, path: Path) -> Path:
    out = _to(path, ".safetensors")
    safetensors.torch.save_model(module(_together(state)), str(out))
    return out


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, by hand."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        made: dict[str, Any] = json.loads(file.read(length))
    return made


def _header_order(state: State, path: Path) -> list[str]:
    """The names in the header; those that the metadata makes aliases of them follow."""
    found = header(path)
    metadata = found.pop("__metadata__", {})
    return [*found, *(alias for alias, kept in metadata.items() if kept in found)]


def _shard_order(state: State, path: Path) -> list[str]:
    """The keys in the order of the index, unless that is sorted: then of the shards, by their names."""
    folder = path if path.is_dir() else path.parent
    order: list[str] = []
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            order += _header_order(state, file)
        elif file.suffix == ".bin":
            order += torch.load(file, weights_only=True)
    for file in folder.glob("*.index.json"):
        keys = list(json.loads(file.read_text())["weight_map"])
        if keys != sorted(keys):
            order = [*keys, *(key for key in order if key not in keys)]
    return order


def _shards(state: State, path: Path, safe: bool, index: bool) -> Path:
    path.mkdir(parents=True)
    made = apart(state) if safe else dict(state)
    huggingface_hub.save_torch_state_dict(made, path, max_shard_size=SHARD, safe_serialization=safe)
    found = list(path.glob("*.index.json"))
    return found[0] if index and found else path


def _ours(state: State, path: Path, name: str, **how: Any) -> Path:
    """Our own output for a state dict that torch saved: a file, a folder (no suffix) or an index."""
    path.mkdir(parents=True)
    source = path.with_name(path.name + "-source")
    torch.save(state, source)
    out = path / name if name else path
    cs.convert(source, out, **how)
    source.unlink()
    return out if out.exists() else path


KINDS: dict[str, Kind] = {
    **{f"zip {n}": Kind(partial(_zip, protocol=n)) for n in (2, 3, 4, 5)},
    "zip, deflated": Kind(partial(_repacked, method=zipfile.ZIP_DEFLATED)),
    "zip, other root": Kind(partial(_repacked, rename=lambda name: "other name/" + name.partition("/")[2])),
    "zip, old records": Kind(partial(_repacked, change=_without_new_records)),
    "zip, big-endian": Kind(_big_endian),
    "zip, no checksums": Kind(_without_checksums),
    "zip, aligned to pages": Kind(_aligned),
    "zip, bundle": Kind(lambda state, path: _zip(bundle(state), path), extras=True),
    "zip, module": Kind(
        lambda state, path: _zip(module(state), path), versions=False, order=_module_order
    ),
    **{
        f"legacy {n}": Kind(
            lambda state, path, n=n: save_legacy(state, out := _to(path, ".pth"), n) or out,
            "torch-legacy", header=1_100_000,
        )
        for n in (2, 3, 4, 5)
    },
    "legacy, bundle": Kind(
        lambda state, path: save_legacy(bundle(state), out := _to(path, ".pth")) or out,
        "torch-legacy", extras=True, header=1_100_000,
    ),
    "tar": Kind(_tar, "torch-tar", holds=EARLIEST, versions=False, header=1_100_000, slack=_padding),
    "script": Kind(
        _script, "torchscript", lacks=frozenset({torch.float4_e2m1fn_x2}), versions=False, order=_script_order
    ),
    "package": Kind(_package, "torch-package"),
    "safetensors": Kind(
        _safetensors, "safetensors", lacks=WIDEST,
        ties=False, versions=False, order=_header_order,
    ),
    "safetensors, model": Kind(
        _safetensors_model, "safetensors", lacks=WIDEST, versions=False, order=_header_order,
    ),
    **{
        f"shards, {'safetensors' if safe else 'bin'}, {'index' if index else 'folder'}": Kind(
            partial(_shards, safe=safe, index=index),
            "sharded-safetensors" if safe else "sharded-torch-zip",
            lacks=WIDEST if safe else frozenset(),
            ties=not safe, versions=False, order=_shard_order,
        )
        for safe in (True, False)
        for index in (True, False)
    },
    "our pth": Kind(partial(_ours, name="a.pth")),
    "our safetensors": Kind(
        partial(_ours, name="a.safetensors"), "safetensors", lacks=WIDEST, ties=False,
        versions=False,
    ),
    "our safetensors, aliases": Kind(
        partial(_ours, name="a.safetensors", tied="alias"), "safetensors", lacks=WIDEST,
        versions=False, order=_header_order,
    ),
    "our shards": Kind(
        partial(_ours, name="", shard_size=SHARD), "sharded-safetensors", lacks=WIDEST,
        ties=False, versions=False,
    ),
    "our shards, aliases": Kind(
        partial(_ours, name="m.safetensors.index.json", tied="alias", shard_size=SHARD), "sharded-safetensors",
        lacks=WIDEST, versions=False, order=_shard_order,
    ),
    "our shards, bin": Kind(
        partial(_ours, name="pytorch_model.bin.index.json", shard_size=SHARD), "sharded-torch-zip", order=_shard_order
    ),
}  # fmt: skip

"""Which checkpoint a folder means: the one that the Hugging Face libraries would load, or the only one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice

from ckptsurgeon.errors import MOST_SHOWN, InputError, brief
from ckptsurgeon.formats import sharded, torch_dcp
from ckptsurgeon.formats._document import Document
from ckptsurgeon.formats._inside import part

_BASES = (
    ("model", "safetensors"),
    ("pytorch_model", "bin"),
    ("diffusion_pytorch_model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("adapter_model", "safetensors"),
    ("adapter_model", "bin"),
    ("open_clip_model", "safetensors"),
    ("open_clip_pytorch_model", "bin"),
)
"""In the order in which transformers, diffusers, peft and timm look; a whole file comes before an index."""
JOURNAL = re.compile(r"\.(.+)\.journal", re.DOTALL)
"""What lists the files that are to take their places, as long as they do (`stream.publishing`)."""
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_BESIDE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "trainer_state")
_OTHERS = (
    ("saved_model.pb", "a SavedModel of TensorFlow, no checkpoint of torch"),
    ("Manifest.json", "a CoreML package, no checkpoint of torch"),
    ("_CHECKPOINT_METADATA", "an Orbax checkpoint (JAX), no checkpoint of torch"),
)


def read(path: str, open_file: sharded.Open) -> Document:
    """The checkpoint in a folder; InputError when there is none, or several without a usual name."""
    try:
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    except OSError as error:
        raise InputError(f"cannot be opened: {error.strerror}", path=path) from None
    for base, suffix in _BASES:
        for name in (f"{base}.{suffix}", f"{base}.{suffix}.index.json"):
            if name in names:
                return open_file(part(path, name))
    if torch_dcp.FILE in names and not any(name.endswith(_SUFFIXES) for name in names):
        return open_file(part(path, torch_dcp.FILE))
    _refuse(path, names)
    indexes = [name for name in names if name.endswith(".index.json")]
    if indexes:
        return open_file(part(path, _only(path, indexes, "indexes of shards")))
    groups = sharded.numbered(name for name in names if name.endswith(_SUFFIXES))
    if groups:
        return sharded.unindexed(path, _complete(path, groups), open_file)
    whole = [name for name in names if name.endswith(_SUFFIXES) and not name.startswith(_BESIDE)]
    if not whole:
        inner = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != ".")
        more = f" and {len(inner) - MOST_SHOWN} more" if len(inner) > MOST_SHOWN else ""
        hint = f"name one of its folders: {', '.join(map(brief, inner[:MOST_SHOWN]))}{more}" if inner else None
        raise InputError(f"is a folder without a checkpoint file ({', '.join(_SUFFIXES)})", path=path, hint=hint)
    safe = [name for name in whole if name.endswith(".safetensors")]
    return open_file(part(path, _only(path, safe or whole, "checkpoint files")))


def _refuse(path: str, names: Sequence[str]) -> None:
    """InputError for the folders of other programs, and for shards that are only on their way there."""
    for known, words in _OTHERS:
        if known in names and not any(name.endswith(_SUFFIXES) for name in names):
            raise InputError(f"is {words}", path=path)
    if any(map(JOURNAL.fullmatch, names)):
        raise _unfinished(path)


def unfinished(path: str) -> InputError | None:
    """What is said of an index that is not there, if it is only on its way there."""
    folder, name = os.path.split(path)
    return _unfinished(path) if name and os.path.lexists(os.path.join(folder, f".{name}.journal")) else None


def _unfinished(path: str) -> InputError:
    return InputError(
        "shards were taking their places here when their writer was stopped, if it does not run still",
        path=path,
        hint="`ckpt verify --repair` of the folder finishes it, and so does writing there again",
    )


def _only(path: str, names: Sequence[str], what: str) -> str:
    if len(names) > 1:
        more = len(names) - MOST_SHOWN
        shown = ", ".join(map(brief, names[:MOST_SHOWN])) + (f" and {more} more" if more > 0 else "")
        raise InputError(f"is a folder with {len(names)} {what}: {shown}", path=path, hint="name one of them")
    return names[0]


def _complete(path: str, groups: dict[tuple[str, str, int], dict[int, str]]) -> list[str]:
    if len(groups) > 1:
        _only(path, [f"{stem}-*-of-*{suffix}" for stem, suffix, _ in groups], "sets of shards")
    ((stem, suffix, count), found) = next(iter(groups.items()))
    first = 0 if 0 in found else 1
    lacking = list(islice((n for n in range(first, first + count) if n not in found), MOST_SHOWN))
    if lacking or len(found) != count:
        words = ", ".join(map(str, lacking))
        raise InputError(
            f"has {len(found)} of the {count} shards {stem}-*{suffix}"
            + (f"; number {words} is missing" if lacking else ""),
            path=path,
        )
    return [found[number] for number in sorted(found)]

"""Where links in a checkpoint's folder may lead: into the folder, or into the blobs of a Hugging Face cache.

Source: huggingface_hub, "Understand caching" (`models--NAME/snapshots/REVISION/FILE` → `../../blobs/HASH`; its
older versions linked files of any folder into the cache).
"""

from __future__ import annotations

import os

from ckptsurgeon.errors import InputError, quoted

_REPOSITORIES = ("models--", "datasets--", "spaces--")


def check(folder: str, name: str) -> None:
    """InputError when a file of a folder is a link, or lies behind one, that leads to anywhere else."""
    path = os.path.join(folder, name)
    home, real = os.path.realpath(folder or "."), os.path.realpath(path)
    if real.startswith(os.path.join(home, "")) or _is_blob(home, real) or not os.path.isfile(real):
        return  # what is no regular file is never opened
    raise InputError(
        f"is a link that leads out of its folder, to {quoted(real)}",
        path=path,
        hint="copy the file into the folder, or name it itself where you trust it",
    )


def _is_blob(home: str, real: str) -> bool:
    """Whether a file is a blob of the cache that the folder `home` is a snapshot in, or of any such cache."""
    store = os.path.dirname(real)
    if os.path.basename(store) != "blobs":
        return False
    repository = os.path.dirname(store)
    snapshot = home.startswith(os.path.join(repository, "snapshots", ""))
    return snapshot or os.path.basename(repository).startswith(_REPOSITORIES)

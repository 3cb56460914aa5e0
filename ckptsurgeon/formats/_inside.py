"""What belongs to a checkpoint that is a folder: names stay inside of it, and so do links, but for those of a cache.

Source of the cache: huggingface_hub, "Understand caching" (`models--NAME/snapshots/REVISION/FILE` → `../../blobs/HASH`;
its older versions linked files of any folder into the cache).
"""

from __future__ import annotations

import os

from ckptsurgeon.errors import InputError, quoted

_REPOSITORIES = ("models--", "datasets--", "spaces--")


def is_inside(name: str) -> bool:
    """Whether a name that a file gives stays in the folder of that file."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and "\0" not in name and not os.path.isabs(name) and not {"", ".", ".."} & set(parts)


def part(owner: str, name: str) -> str:
    """The path of `name` beside the file `owner`, or in it where that is a folder.

    A link may lead anywhere inside of the folder, to where the owner itself leads (the files that lie beside the
    index's own file), and into the blobs of a Hugging Face cache.  Raises InputError for any other: a checkpoint from
    elsewhere could be unpacked with links to files that it is not made of.
    """
    folder = owner if os.path.isdir(owner) else os.path.dirname(owner)
    path = os.path.join(folder, name)
    home, real = os.path.realpath(folder or "."), os.path.realpath(path)
    homes = (home,) if owner == folder else (home, os.path.dirname(os.path.realpath(owner)))
    stays = any(real.startswith(os.path.join(one, "")) for one in homes) or _is_blob(home, real)
    if not stays and os.path.isfile(real):  # what is no regular file is never opened
        raise InputError(
            f"is a link that leads out of its folder, to {quoted(real)}",
            path=path,
            hint="copy the file into the folder, or name it itself where you trust it",
        )
    return path


def _is_blob(home: str, real: str) -> bool:
    """Whether a file is a blob of the cache that the folder `home` is a snapshot in, or of any such cache."""
    store = os.path.dirname(real)
    if os.path.basename(store) != "blobs":
        return False
    repository = os.path.dirname(store)
    snapshot = home.startswith(os.path.join(repository, "snapshots", ""))
    return snapshot or os.path.basename(repository).startswith(_REPOSITORIES)

"""What belongs to a checkpoint that is a folder: names stay inside of it, and so do links, but for those of a cache."""

from __future__ import annotations

import os

from ckptsurgeon.errors import InputError

_BLOBS = "blobs"


def is_inside(name: str) -> bool:
    """Whether a name that a file gives stays in the folder of that file."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and "\0" not in name and not os.path.isabs(name) and not {"", ".", ".."} & set(parts)


def part(owner: str, name: str) -> str:
    """The path of `name` beside the file `owner`, or in it where that is a folder.

    A link may lead anywhere inside of the folder, to where the owner itself leads (the files that lie beside the
    index's own file), and in a cache of Hugging Face from `snapshots/REVISION` to `blobs`.  Raises InputError for
    any other: a checkpoint from elsewhere could be unpacked with links to files that it is not made of.
    """
    folder = owner if os.path.isdir(owner) else os.path.dirname(owner)
    path = os.path.join(folder, name)
    real = os.path.realpath(path)
    homes = [os.path.realpath(folder), *_blobs(os.path.realpath(folder))]
    if owner != folder:
        homes.append(os.path.dirname(os.path.realpath(owner)))
    if not any(os.path.commonpath((home, real)) == home for home in homes):
        raise InputError(
            f"{name!r} is a link to a file outside of its folder ({real})",
            path=owner,
            hint="put the file itself there, or name it where it is",
        )
    return path


def _blobs(folder: str) -> list[str]:
    """Where the cache of Hugging Face keeps the files of a snapshot."""
    above, name = os.path.split(folder)
    while name:
        if os.path.basename(above) == "snapshots":
            return [os.path.join(os.path.dirname(above), _BLOBS)]
        above, name = os.path.split(above)
    return []

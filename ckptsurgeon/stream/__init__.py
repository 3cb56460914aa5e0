"""Checkpoint → bytes on disk: evaluate, schedule, commit.  One pass, flat memory, the whole output or nothing.

- `schedule`: which bytes go where and what must be checked, decided on layouts alone.
- `copying`: bytes from file to file inside the kernel.
- `digests`: checksums, of what is written and of what was read.
- `spool`: what must lie on a disk before it can be read in pieces.
- `filling`: a schedule carried out on one file, by several threads.
- `contents`: the digest of what a checkpoint holds, whatever file it lies in.
- `commit`: files beside their places, synced, and renamed into them.
"""

from ckptsurgeon.stream.budget import Budget, budget, problems
from ckptsurgeon.stream.commit import Progress, check, is_new_folder, older, write
from ckptsurgeon.stream.contents import content_digest
from ckptsurgeon.stream.publishing import no_kin, recover
from ckptsurgeon.stream.staging import is_held, staged_for

__all__ = [
    "Budget",
    "Progress",
    "budget",
    "check",
    "content_digest",
    "is_held",
    "is_new_folder",
    "no_kin",
    "older",
    "problems",
    "recover",
    "staged_for",
    "write",
]

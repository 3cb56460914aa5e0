"""How much memory tensors may take on their way, and how many threads move them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ckptsurgeon import evaluate
from ckptsurgeon.errors import Problem, UsageError
from ckptsurgeon.limits import BLOCK
from ckptsurgeon.tensor import TensorRef

_USUAL = 64 << 20
_LEAST = 4 << 20
_MOST_JOBS = 4
_BUFFERS = 4
"""Blocks that a thread holds at most: what it read, what it makes, and what lies between."""


@dataclass(frozen=True)
class Budget:
    """`memory` in bytes for all buffers together, beside Python, NumPy and torch themselves; `jobs` are
    threads.  `strict` tells that the memory was asked for, and is not only the usual."""

    memory: int = _USUAL
    jobs: int = 1
    strict: bool = False

    @property
    def block(self) -> int:
        """Bytes that one thread reads, changes and writes at a time."""
        return min(BLOCK, self.memory // (_BUFFERS * self.jobs))


def budget(memory: int | None = None, jobs: int | None = None) -> Budget:
    """The budget that was asked for, or the usual one: 64 MiB, and a thread for each of up to four processors.

    Raises UsageError for less than 4 MiB, or no thread.
    """
    if memory is not None and memory < _LEAST:
        raise UsageError(f"--max-memory takes at least 4MiB, not {memory} bytes")
    if jobs is not None and (type(jobs) is not int or not 1 <= jobs <= 256):
        raise UsageError(f"--jobs is a number of threads from 1 to 256, not {jobs!r}")
    strict, memory = memory is not None, memory or _USUAL
    there = min(_MOST_JOBS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return Budget(memory, min(jobs or there, memory // (1 << 20)), strict)


def problems(tensors: Mapping[str, TensorRef], given: Budget) -> list[Problem]:
    """What cannot be made within the budget, told before anything starts; one for all that takes the same memory."""
    found: dict[int, list[str]] = {}
    for key, ref in tensors.items():
        needed = evaluate.holds(ref)
        if needed > given.memory:
            found.setdefault(needed, []).append(key)
    made = []
    for needed, keys in found.items():
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        text = (
            f"making {keys[0]!r}{more} takes {needed:,} bytes of memory at once, since it cannot be done in slices; "
            f"--max-memory is {given.memory:,}"
        )
        made.append(Problem(text, key=keys[0], kind="memory"))
    return made

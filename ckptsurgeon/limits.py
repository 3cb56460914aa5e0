"""What a file may ask for before it is refused: one frozen value, which every reader keeps.

Real checkpoints stay far below; a file that meets a limit is damaged or hostile, or larger than this program
ever saw.  `with limited(Limits(...))` puts another value in force, which is what `--reader-limit` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that readers keep. Sizes are bytes, the rest are counts."""

    safetensors_header: int = 100_000_000
    """The JSON header of a safetensors file (the format's own bound)."""
    metadata_bytes: int = 32 << 20
    """The `__metadata__` in that header."""
    index_bytes: int = 64 << 20
    """The JSON index of a sharded checkpoint."""
    pickle_bytes: int = 2 << 30
    """The pickle of a torch file, without its tensors."""
    inflated_bytes: int = 64 << 20
    """A pickle, or a file of code, that is compressed in its archive."""
    inflated_view: int = 256 << 20
    """What of a compressed record is held for a tensor that does not lie in order in it."""
    pickle_memory: int = 384 << 20
    """What the objects of all pickles of one opening may take, beside twice the bytes of the pickles themselves."""
    opcodes: int = 16_000_000
    """Steps of all pickles of one opening."""
    marks: int = 10_000
    """Containers of a pickle that are open at one time."""
    code_bytes: int = 128 << 20
    """The code of a TorchScript archive, as far as its classes are looked up."""
    archive_members: int = 500_000
    """Members of one archive, entries of one header or index."""
    dimensions: int = 64
    """Dimensions of one tensor (torch's own bound)."""
    view_bytes: int = 1 << 30
    """A tensor that repeats its bytes (`expand`), and all tensors of a file together, may always take this …"""
    view_ratio: int = 64
    """… and beyond that, at most so many times the bytes that the file has for them."""
    name_characters: int = 1 << 27
    """The dotted names of what a file holds, all together: of nested containers they can be far longer than it."""
    modules: int = 1_000_000
    """Modules in one pickled model, each counted as often as it is used; tensors below one `--select`."""
    repeats: int = 100_000
    """What is met again below one state dict or in one model: what is shared counts each time but the first."""
    depth: int = 200
    """Nesting of containers in which state dicts are looked for."""


DEFAULT = Limits()


@dataclass(slots=True)
class Account:
    """What is left of the memory and the steps that all pickles of one opening may take together."""

    memory: int
    steps: int


_ACCOUNT: ContextVar[Account | None] = ContextVar("account", default=None)
_CURRENT: ContextVar[Limits] = ContextVar("limits", default=DEFAULT)
BLOCK = 8 << 20
"""Bytes that are read, changed and written at a time: tuning, not a limit."""


@contextlib.contextmanager
def account(limits: Limits) -> Iterator[Account]:
    """The account of the opening that goes on, or a new one for as long as the context lasts: a package, a set of
    shards and a legacy file hold many pickles, and are charged once."""
    going = _ACCOUNT.get()
    if going is not None:
        yield going
        return
    token = _ACCOUNT.set(made := Account(limits.pickle_memory, limits.opcodes))
    try:
        yield made
    finally:
        _ACCOUNT.reset(token)


@contextlib.contextmanager
def forgotten(limits: Limits) -> Iterator[None]:
    """What is charged for memory within the context is given back: what was read is not kept."""
    with account(limits) as books:
        before = books.memory
        yield
        books.memory = before


def current() -> Limits:
    """The limits in force."""
    return _CURRENT.get()


@contextlib.contextmanager
def limited(limits: Limits | None) -> Iterator[None]:
    """Other limits for all that is opened as long as the context lasts; None leaves them as they are.

    >>> with limited(Limits(dimensions=128)):
    ...     current().dimensions
    128
    """
    token = _CURRENT.set(limits or _CURRENT.get())
    try:
        yield
    finally:
        _CURRENT.reset(token)

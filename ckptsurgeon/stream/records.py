"""Checksums of records of which only parts are copied.

A record that is copied whole is proven while it is copied (`evaluate`); views and turned tensors
take their bytes out of it in another order, so it is read once more.
"""

from __future__ import annotations

from ckptsurgeon import evaluate
from ckptsurgeon.errors import InputError
from ckptsurgeon.formats import Layout
from ckptsurgeon.sources import Extent, File, Record

_WORTH = 4
"""A record is read only when it is at most so many times as large as what is copied of it: a small
slice of a huge storage stays cheap, and `verify` checks everything."""


def prove(layout: Layout) -> None:
    """Check every record that is copied in part; InputError, with the key, when one is damaged."""
    whole: set[tuple[File, Record]] = set()
    partly: dict[tuple[File, Record], tuple[Extent, int, str | None]] = {}
    for part in layout.parts:
        if isinstance(part, bytes):
            continue
        for extent in part.extents():
            if extent.record is None or extent.record.crc is None:
                continue
            identity = (extent.file, extent.record)
            if extent.is_whole:
                whole.add(identity)
            else:
                known = partly.get(identity, (extent, 0, layout.keys.get(id(part))))
                partly[identity] = (known[0], known[1] + extent.nbytes, known[2])
    for (file, record), (extent, used, key) in partly.items():
        if (file, record) not in whole and record.nbytes <= _WORTH * used:
            try:
                evaluate.check_record(extent)
            except InputError as error:
                error.key = error.key or key
                raise

"""The record of a file's provenance as text: read without trust, whatever it says."""

from __future__ import annotations

from collections.abc import Mapping

from ckptsurgeon.formats import _json
from ckptsurgeon.provenance import KEY, MOST, BadProvenance, Provenance, of_data

_WORDS = 200


def read(text: str | bytes) -> Provenance:
    """What a text says; where it cannot be understood, the reason."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > MOST:
        return too_long(len(raw))
    try:
        return of_data(_json.loads(raw))
    except RecursionError:
        return Provenance(problem="it is nested too deeply")
    except (ValueError, BadProvenance) as error:
        return Provenance(problem=str(error)[:_WORDS])


def too_long(nbytes: int) -> Provenance:
    """The record that is too long to be read."""
    return Provenance(problem=f"it has {nbytes} bytes, over the {MOST} that are read")


def taken(metadata: Mapping[str, str]) -> tuple[Mapping[str, str], Provenance | None]:
    """A text map without the record, and the record."""
    if KEY not in metadata:
        return metadata, None
    return {key: text for key, text in metadata.items() if key != KEY}, read(metadata[KEY])

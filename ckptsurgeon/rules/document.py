"""YAML files as plain data with line numbers and comments: no tags, no anchors, nothing that grows."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Any

from ckptsurgeon.errors import InputError, OutputError
from ckptsurgeon.writing import failures

LARGEST = 256 << 10
"""Bytes of a recipe: longer lists of numbers are given to a variable, from a file."""
_DEEPEST = 12


def read(path: str, shown: str) -> tuple[Any, str]:
    """The data of a YAML file, which keeps its comments, and its text; InputError, which calls it `shown`."""
    text = text_of(path, shown, LARGEST, "a recipe")
    return parsed(text, shown), text


def parsed(text: str, shown: str) -> Any:
    """The data of YAML text, which keeps its comments; InputError, which calls it `shown`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        _check(text, shown)
        return YAML(typ="rt", pure=True).load(text)
    except (YAMLError, RecursionError, ValueError) as error:
        words = " ".join(str(error).split())
        raise InputError(f"not YAML: {words}", path=shown) from None


def text_of(path: str, shown: str, most: int, what: str) -> str:
    """The text of a regular file of at most `most` bytes, which is `what`; InputError, which calls it `shown`."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise InputError(f"{what} is a regular file of at most {most} bytes", path=shown)
        with open(path, encoding="utf-8") as file:
            return file.read(most + 1)
    except FileNotFoundError:
        raise InputError(f"no such {what.partition(' ')[2]}", path=shown) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", path=shown) from None


def write(path: str | os.PathLike[str], text: str, force: bool) -> None:
    """Write a text file, whole or not at all; OutputError if it exists (without `force`) or cannot be written."""
    place = os.path.realpath(path)
    with failures(os.fspath(path)):
        if os.path.lexists(path) and not force:
            raise OutputError(path, "exists; --force replaces it")
        if os.path.exists(place) and not os.path.isfile(place):  # a device or a pipe, which is no place for a rename
            with open(place, "w", encoding="utf-8") as file:
                file.write(text)
            return
        part = os.path.join(os.path.dirname(place), f".{os.path.basename(place)[:200]}.{os.urandom(4).hex()}.part")
        try:
            with open(part, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, place)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise


def _check(text: str, shown: str) -> None:
    """InputError for what a recipe does not need and a hostile file does: tags, anchors and aliases, deep nesting."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent

    depth = 0
    for event in YAML(typ="rt", pure=True).parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise InputError(f"line {line}: nested too deeply for a recipe", path=shown)
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
            raise InputError(f"line {line}: a recipe has no anchors and aliases", path=shown)
        tagged = isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag is not None
        if tagged and not (isinstance(event, ScalarEvent) and any(event.implicit)):
            raise InputError(f"line {line}: a recipe has no tags, and {event.tag} is one", path=shown)


def line_of(holder: Any, entry: Any) -> int | None:
    """The line, counted from 1, of an entry of a mapping or a list; None where it is not known."""
    position = getattr(holder, "lc", None)
    if position is None:
        return None
    try:
        found = position.item(entry) if isinstance(entry, int) else position.key(entry)
    except (KeyError, AttributeError, TypeError):
        return None
    return int(found[0]) + 1


def dumped(data: Any) -> str:
    """Data, with the comments that it came with, as YAML."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.width = 1 << 20
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = StringIO()
    yaml.dump(data, out)
    return out.getvalue()

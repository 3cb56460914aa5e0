"""Schemes of initial values by the type of module: what a tensor begins with that a checkpoint does not bring.

A scheme is a table of words by type.  As text it is one word for all (`kaiming_fan_out`), or pairs with blanks between
them (`Conv2d=kaiming_fan_out Linear=normal:0.01 *=xavier_uniform`).  The values follow from the seed and a tensor's
name alone (`ops.making.Named`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ckptsurgeon.checkpoint import Target, TargetEntry
from ckptsurgeon.errors import UsageError
from ckptsurgeon.kinds import KINDS, NORM_STATISTICS, OwnerKind, of_kind
from ckptsurgeon.ops import Initial, OperationError

Choice = Initial | Callable[..., Any]
ALL = "*"
KEEP = "keep"
"""The word for what the model itself begins with."""
_PRESETS: Mapping[str, tuple[str, str]] = {
    "torchvision": ("kaiming_fan_out", "normal:0.01"),
    "timm": ("kaiming_fan_out", "normal:0.02"),
}
"""What convolutions and matrices begin with.  torchvision's is that of its ResNet, VGG and MobileNet; timm's that of
its ResNet and ViT, whose trunc_normal_(std=0.02) cuts at -2 and 2, a hundred deviations away: it is a normal one."""
_EMBEDDING = Initial("normal", (0.02,))
_BY_FANS = ("kaiming", "xavier", "orthogonal")
_WEIGHT = re.compile(r"(?:^|_)weight(?:_(?:ih|hh|hr)_l\d+(?:_reverse)?)?$")
_FROM_ZERO = re.compile(r"Gemma|Qwen3Next|Qwen\d_|MiniMaxM3|Step3|Muse")
"""Norms that multiply by 1 + weight, or whose kin do: what they begin with is the model's affair."""
_MOST = 2000
"""Characters of a scheme's text, as it stands in a record of provenance."""
_TYPE = re.compile(r"\w+|\*", re.ASCII)


@dataclass(frozen=True)
class Scheme:
    """Words, or functions, by the type of module, by kind (`norm`, `embedding`, `prelu`, `bias`), and for all others
    (`*`), in the order in which they were given."""

    table: tuple[tuple[str, str | Callable[..., Any]], ...]

    @classmethod
    def of(cls, thing: Any) -> Scheme:
        """The scheme that a text, a function or a mapping says; UsageError with the choices.

        >>> str(Scheme.of({"Conv2d": "kaiming_fan_out", "*": "normal_0.02"}))
        'Conv2d=kaiming_fan_out *=normal:0.02'
        """
        if isinstance(thing, Scheme):
            return thing
        if isinstance(thing, str):
            thing = _pairs(thing)
        elif (isinstance(thing, int | float) and not isinstance(thing, bool)) or callable(thing):
            thing = {ALL: thing}
        if not isinstance(thing, Mapping) or not thing:
            raise UsageError(f"an initialisation is the name of a scheme, or a table of them by type, not {thing!r}")
        made = cls(tuple((_type(name), word if callable(word) else _word(word)) for name, word in thing.items()))
        if len(str(made)) > _MOST:
            raise UsageError(f"a table of initialisations takes up to {_MOST} characters")
        return made

    def __str__(self) -> str:
        words = [
            (name, getattr(word, "__name__", "a function") if callable(word) else word) for name, word in self.table
        ]
        return words[0][1] if [name for name, _ in words] == [ALL] else " ".join(map("=".join, words))

    def written(self) -> Scheme:
        """This scheme; UsageError where it holds a function, which no file can say."""
        if any(callable(word) for _, word in self.table):
            raise UsageError("a function initialises live models alone (cs.init_missing); name a scheme here")
        return self

    def check(self, target: Target) -> Scheme:
        """This scheme; UsageError for a target whose types are not known, and for a type that it does not have."""
        if not target.is_model:
            raise UsageError(f"schemes go by the types of modules, and {target.label} is a checkpoint; name a model")
        known = {entry.module for entry in target.entries.values()}
        for name, _ in self.table:
            if name not in known and name != ALL and name not in KINDS:
                raise UsageError(f"{target.label} has no tensors of a {name}; {_near(name, sorted(known))}")
        return self

    def choice(self, key: str, entry: TargetEntry) -> Choice | None:
        """What a tensor begins with; None for what the model itself gives it.

        Norms begin with 1 and 0, their statistics with 0 and 1, PReLU with 0.25, and biases with 0, unless the table
        names them.  UsageError where a scheme cannot make such a tensor.
        """
        name, kind, table = key.rpartition(".")[2], entry.kind, dict(self.table)
        named = table.get(entry.module) or table.get(kind)
        if entry.role != "parameter":
            known = name in NORM_STATISTICS and named != KEEP
            return Initial("constant", (NORM_STATISTICS[name],)) if known else None
        is_bias = "bias" in of_kind(key, "") and len(entry.spec.shape) <= 1
        if is_bias and kind != "norm" and "bias" in table:
            named = table["bias"]
            is_bias = False  # it is made by a word of its own
        word = named or table.get(ALL)
        if callable(word):
            return word
        if named == KEEP or entry.spec.dtype.kind != "float" or entry.spec.dtype.bits < 8:
            return None
        if is_bias:
            return Initial("zeros") if kind == "norm" or word not in (None, KEEP) else None
        made = _weight(word, named is not None, kind, name, entry)
        if made is not None:
            _check(made, key, entry)
        return made


def _weight(word: str | None, named: bool, kind: OwnerKind, name: str, entry: TargetEntry) -> Initial | None:
    """What a parameter that is no bias begins with by a word, which its type or kind was `named` for."""
    dims, is_weight = len(entry.spec.shape), _WEIGHT.search(name) is not None
    if kind in ("norm", "prelu") and (not named or word in _PRESETS):
        if not is_weight or (kind == "norm" and _FROM_ZERO.search(entry.module)):
            return None
        return Initial("ones") if kind == "norm" else Initial("constant", (0.25,))
    if word is None or word == KEEP or not (named or (is_weight and dims >= 2)):
        return None
    if word in _PRESETS:
        return _EMBEDDING if kind == "embedding" else Initial.of(_PRESETS[word][dims == 2])
    made = Initial.of(word)
    return _EMBEDDING if not named and kind == "embedding" and made.scheme.startswith(_BY_FANS) else made


def _check(made: Initial, key: str, entry: TargetEntry) -> None:
    try:
        made.check(entry.spec)
    except OperationError as error:
        raise UsageError(
            f"{key!r} of a {entry.module}: {error}; give its type a scheme of its own, or `{entry.module}={KEEP}`"
        ) from None


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    if len(words) == 1 and "=" not in text:
        return {ALL: text.strip()}
    made: dict[str, str] = {}
    for word in words:
        name, equals, scheme = word.partition("=")
        if not equals or name in made:
            raise UsageError(
                f"{word!r}: write TYPE=SCHEME, each type once (`*` is for all others), or one scheme alone"
            )
        made[name] = scheme
    if not made:
        raise UsageError("an initialisation is the name of a scheme, or TYPE=SCHEME; this is empty")
    return made


def _type(name: Any) -> str:
    if isinstance(name, str) and _TYPE.fullmatch(name):
        return name
    made = getattr(name, "__name__", None) if isinstance(name, type) else None
    if made is None:
        raise UsageError(f"a table of initialisations goes by types of modules, kinds and `*`, not by {name!r}")
    return str(made)


def _word(word: Any) -> str:
    """A word as it is kept; UsageError for one that is none."""
    if isinstance(word, int | float) and not isinstance(word, bool):
        word = repr(word)
    if isinstance(word, str) and (word in _PRESETS or word == KEEP):
        return word
    try:
        return str(Initial.of(re.sub(r"^([a-z_]*[a-z])_(?=-?[\d.])", r"\1:", str(word))))
    except ValueError as error:
        choices = f"{error}; or {', '.join(_PRESETS)}, {KEEP}"
        near = get_close_matches(str(word), ["kaiming_fan_out", "xavier_uniform", "trunc_normal", *_PRESETS], 1, 0.6)
        raise UsageError(f"{choices}{f'; the nearest is {near[0]!r}' if near else ''}") from None


def _near(name: str, known: Iterable[str]) -> str:
    names = [*known, *KINDS]
    near = get_close_matches(name, names, 3, 0.4) or names[:5]
    return f"the nearest are {', '.join(map(repr, near))}"

"""What a parameter is to its network: of a norm, of an embedding, of a PReLU, or a bias.

Told by the type of the module that owns it, never by the module's name: `body.3.res_layer.1.weight` does not say that
it is of a norm.  Types are names of classes, that of the module and those that it is made from; the header of a model
keeps the kind that they tell, and so tells as much as the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

Kind = Literal["norm", "embedding", "prelu", "bias"]
OwnerKind = Literal["norm", "embedding", "prelu", ""]
"""What a module is by its type alone; "" for all others."""
KINDS: tuple[Kind, ...] = ("norm", "embedding", "prelu", "bias")
NORM_STATISTICS: Mapping[str, int] = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
"""The buffers of torch's norms, and what they begin with."""

_TYPES: dict[OwnerKind, re.Pattern[str]] = {
    "norm": re.compile(r"(?:norm(?:act|tlu|exp|fp\d+|\d+d\w{0,2})*|ABN)$", re.IGNORECASE),
    "embedding": re.compile(r"(?:Embeddings?|EmbeddingBag)$"),
    "prelu": re.compile(r"PReLU$"),
}
"""Of norms `BatchNorm2d`, `LlamaRMSNorm`, timm's `LayerNorm2d`, `BatchNormAct2d`, `RmsNormFp32`; not `NormLinear`."""
_BIAS = re.compile(r"(?:^|_)bias(?:$|_)")


def of_type(types: Iterable[str]) -> OwnerKind:
    """The kind of the parameters that a module owns itself, by the names of its class and of those it is made from.

    >>> of_type(["LlamaRMSNorm"]), of_type(["MyNorm2d", "BatchNorm2d"]), of_type(["Linear"])
    ('norm', 'norm', '')
    """
    names = tuple(types)
    return next((kind for kind, found in _TYPES.items() if any(map(found.search, names))), "")


def kinds(key: str, types: Iterable[str]) -> Iterator[Kind]:
    """Every kind that the parameter `key` is of; the bias of a norm is of two.

    A bias is told by its own name, the last step of the key: `bias`, `in_proj_bias`, `relative_position_bias_table`.

    >>> list(kinds("layer1.bn.bias", ["BatchNorm2d"])), list(kinds("attn.in_proj_bias", ["MultiheadAttention"]))
    (['norm', 'bias'], ['bias'])
    """
    return of_kind(key, of_type(types))


def of_kind(key: str, kind: OwnerKind) -> Iterator[Kind]:
    """The same by the kind of the module that owns the parameter, as a header keeps it ("" for none)."""
    if kind:
        yield kind
    if _BIAS.search(key.rpartition(".")[2]):
        yield "bias"

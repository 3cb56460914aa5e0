"""Numbers that a model says of itself and no header shows: how many heads its attention has, and whether it turns
positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_TURNS = ("rope_theta", "rope_scaling", "rope_parameters", "rotary_dim", "rotary_pct", "rotary_emb_base")


def of(module: torch.nn.Module) -> dict[str, int]:
    """`heads` and `kv_heads` where all of the model has the same, `rotary` 1 or 0 where that can be told.

    A transformers model tells by its config, others by the attributes of their modules.
    """
    made: dict[str, int] = {}
    config = getattr(module, "config", None)
    told = [config] if config is not None and not isinstance(config, dict) else []
    for name, words in (("heads", _HEADS), ("kv_heads", _KEYS)):
        values = {value for one in told for word in words if (value := _number(one, word)) is not None}
        if not told:
            values = {value for one in module.modules() for word in words if (value := _number(one, word)) is not None}
        if len(values) == 1:
            made[name] = values.pop()
    turns = any("rotary" in type(one).__name__.lower() for one in module.modules())
    if turns or told:
        made["rotary"] = int(turns or any(_value(one, word) is not None for one in told for word in _TURNS))
    return made


def _value(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name, None)
    except Exception:  # its own code
        return None


def _number(thing: Any, name: str) -> int | None:
    value = _value(thing, name)
    return value if type(value) is int and value > 0 else None

"""Models that no library builds, written after the papers and the published key names: nanoGPT, Meta's Llama,
Mixtral with each expert apart, attention with separate projections, and convolutions with weight norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int, length: int, mask: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if mask:
            self.register_buffer("bias", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class NanoMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int, mask: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = NanoAttention(width, heads, length, mask), NanoMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """GPT-2 as nanoGPT has it; with `mask` the causal mask is a buffer, as where torch has no flash attention."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int, mask: bool = False) -> None:
        super().__init__()
        blocks = nn.ModuleList(NanoBlock(width, heads, length, mask) for _ in range(layers))
        parts = {"wte": nn.Embedding(vocabulary, width), "wpe": nn.Embedding(length, width), "h": blocks}
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(width)})
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


class LlamaAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, heads * self.size, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wo = nn.Linear(heads * self.size, width, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        """Neighbouring rows as one complex number, times e^(i position angle)."""
        angles = 10000.0 ** (-torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(x.shape[1])[:, None] * angles)
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn[None, :, None]).flatten(3).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.turned(self.wq(x).view(batch, length, self.heads, -1)).transpose(1, 2)
        k = self.turned(self.wk(x).view(batch, length, self.kv_heads, -1)).transpose(1, 2)
        v = self.wv(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        times = self.heads // self.kv_heads
        k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, -1))


class LlamaFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention = LlamaAttention(width, heads, kv_heads)
        self.feed_forward = LlamaFeedForward(width, hidden)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    """Llama under the names of Meta's llama/model.py."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(LlamaBlock(width, hidden, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class SparseMoE(nn.Module):
    """The experts of Mixtral, each for itself: softmax over all, the two best, weighted anew."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(LlamaFeedForward(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        best, which = self.gate(x).softmax(-1).topk(2, dim=-1)
        best = best / best.sum(-1, keepdim=True)
        made = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (made.gather(-2, which[..., None].expand(*which.shape, x.shape[-1])) * best[..., None]).sum(-2)


def with_separate_experts(model: Any, width: int, hidden: int, experts: int) -> nn.Module:
    """transformers' Mixtral, whose layers have `block_sparse_moe` in the place of `mlp`."""
    for layer in model.model.layers:
        del layer.mlp
        layer.block_sparse_moe = SparseMoE(width, hidden, experts)
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (kind,), {"mlp": property(lambda self: self.block_sparse_moe)})
    return model


class SeparateAttention(nn.Module):
    """What torch.nn.MultiheadAttention does, with a linear layer each for queries, keys and values."""

    def __init__(self, width: int, heads: int, other: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(other or width, width), nn.Linear(other or width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


class TwoAttentions(nn.Module):
    """Attention of two kinds of tokens to each other, one after the other."""

    def __init__(self, make: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": make(), "norm": nn.LayerNorm(width)}) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["norm"](x + block["attn"](x, y, y)[0])
        return x


class Vocoder(nn.Module):
    """Layers with weight norm of one kind or the other, on one weight or on several."""

    def __init__(self, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.pre = norm(nn.Conv1d(5, 8, 3, padding=1))
        self.ups = nn.ModuleList(norm(nn.ConvTranspose1d(8, 8, 4, 2, 1), dim=1) for _ in range(2))
        self.cell = norm(norm(nn.GRUCell(8, 8), "weight_ih"), "weight_hh")
        self.post = nn.Conv1d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        for up in self.ups:
            x = up(F.leaky_relu(x, 0.1))
        return self.post(x + self.cell(x[..., 0], x[..., 1])[..., None])

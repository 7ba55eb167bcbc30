"""The Qwen3 decoder stack that the talker and the code predictor share.

Shapes: B batch, T positions, D hidden, H heads, d head size, C cache capacity. Weights keep their checkpoint names.
Architecture: Qwen3 (RMSNorm before each block, grouped-query attention with a norm on each query and key head,
rotary positions, SiLU-gated MLP), as in the official Qwen3-TTS code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from quaver.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Group:
    """Linears of one layer that read the same input, and the module whose output channels feed them.

    ``before`` absorbs their input scale: a norm (per channel), or a linear whose output rows are those channels.
    """

    name: str
    linears: tuple[str, ...]
    before: str


GROUPS: tuple[Group, ...] = (
    Group("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Group("o", ("self_attn.o_proj",), "self_attn.v_proj"),
    Group("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Group("down", ("mlp.down_proj",), "mlp.up_proj"),
)
"""The fused groups of a decoder layer: quantization, scale folding, kernels and saving all follow this one table."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 or wider (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if x.is_cuda:
            normed = F.rms_norm(wide, x.shape[-1:], eps=self.eps)
        else:
            # On a CPU the library's norm is a dozen small operators, half of a small model's step.
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosines and sines of a run of positions, each [B or 1, 1, T, d]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
        """The tables for ``positions`` [B or 1, T]; angles in float32, then ``dtype`` (Su et al. 2021)."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        angles = positions.float()[:, None, :, None] * (1.0 / theta**exponents)
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def turn(self, x: Tensor) -> Tensor:
        """``x`` [B, H, T, d] turned by its positions."""
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.sin


def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are kept in by a model that computes in ``dtype``.

    On a CPU float32 in bfloat16's place: over 300 positions attention in bfloat16 takes eight times as long there.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


class Past(Protocol):
    """What the layers of a decoder have heard before."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, H, n, d] at each row's next positions and returns all keys and values that may be attended to."""


class KVCache:
    """Keys and values of every layer, allocated once: [L, B, H, C, d] each.

    Each row of the batch has its own length: rows of different prompts decode side by side.
    """

    def __init__(self, config: DecoderConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        dtype = cache_dtype(like.device, like.dtype)
        self.keys, self.values = like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        everywhere = torch.arange(capacity, device=like.device)[None]
        self.turns = Rotary.at(everywhere, config.head_dim, config.rope_theta, like.dtype)
        self._rows = torch.arange(batch, device=like.device)
        self._longest = 0
        self._even = True

    def clear(self) -> None:
        """Forget every position; the memory stays."""
        self.lengths.zero_()
        self._longest, self._even = 0, True

    def positions(self, n: int) -> Tensor:
        """The next ``n`` positions of each row, [B, n]."""
        return self.lengths[:, None] + torch.arange(n, device=self.lengths.device)

    def rotary(self, n: int) -> Rotary:
        """The rotary tables of the next ``n`` positions of each row."""
        if self._even:
            new = slice(self._longest, self._longest + n)
            return Rotary(self.turns.cos[:, :, new], self.turns.sin[:, :, new])
        at = self.positions(n)
        return Rotary(self.turns.cos[0, 0][at][:, None], self.turns.sin[0, 0][at][:, None])

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, H, n, d] at each row's next positions and returns all keys and values up to the longest row."""
        n = keys.shape[2]
        end = self._longest + n
        if self._even:
            self.keys[layer, :, :, self._longest : end] = keys
            self.values[layer, :, :, self._longest : end] = values
        else:
            at = (self._rows[:, None], slice(None), self.positions(n))
            # Unlike a slice, an index takes no other type than its own.
            self.keys[layer][at] = keys.transpose(1, 2).to(self.keys.dtype)
            self.values[layer][at] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, n: int) -> Tensor | None:
        """What ``n`` new positions may attend to, [B, 1, n, end]; None where plain causality says it."""
        if self._longest == 0 or (self._even and n == 1):
            return None
        index = torch.arange(self._longest + n, device=self.lengths.device)
        return index[None, None, None, :] <= self.positions(n)[:, None, :, None]

    def advance(self, lengths: int | Tensor) -> None:
        """Declares the positions just written as past: one count for all rows, or one each [B]."""
        if isinstance(lengths, int):
            self.lengths += lengths
            self._longest += lengths
        else:
            self.lengths += lengths
            self._longest, shortest = int(self.lengths.max()), int(self.lengths.min())
            self._even = self._longest == shortest


def attend_once(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What one position of each row attends to: ``q`` [B, H', 1, d], H' a multiple of the H heads of ``keys``.

    Heads that share keys go as positions of one head: on a GPU nothing but the plainest way shares keys under a mask,
    by repeating them in float32.
    """
    shared = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(shared, keys, values, attn_mask=mask).reshape(q.shape)


class Attention(nn.Module):
    """Grouped-query self-attention with a norm on every query and key head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d, hidden = config.head_dim, config.hidden_size
        self.head_dim = d
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, hidden, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, cache: Past | None, layer: int, mask: Tensor | None) -> Tensor:
        batch, n, _ = x.shape
        heads = (batch, n, -1, self.head_dim)
        q = rotary.turn(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2))
        k = rotary.turn(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2))
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        q, causal = q.to(k.dtype), mask is None and n > 1
        if x.is_cuda and mask is not None and n == 1:
            y = attend_once(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, n, -1).to(x.dtype))
        return out


class MLP(nn.Module):
    """The SiLU-gated feed-forward block (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each after its norm and added to the stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: Rotary, cache: Past | None = None, layer: int = 0, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, layer, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Steps(Protocol):
    """Another way through a Decoder's layers, for few positions at once."""

    def takes(self, x: Tensor, cache: KVCache | None, lengths: Tensor | None) -> bool:
        """Whether it is the way for ``x`` [B, T, D]."""

    def __call__(self, x: Tensor, cache: KVCache) -> Tensor:
        """See Decoder.forward."""


class Decoder(nn.Module):
    """A causal stack of decoder layers and its last norm; the talker and the predictor add their embeddings."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.stepper: Steps | None = None

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """The rotary tables of ``positions`` [B or 1, T]."""
        return Rotary.at(positions, self.config.head_dim, self.config.rope_theta, dtype)

    def forward(self, x: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of the inputs ``x`` [B, T, D], after the last norm.

        Without a cache the rows start at position 0; rows padded on the right need no mask, since no position sees a
        later one. With a cache they go on from it; ``lengths`` [B] is how many of the T positions each row keeps.
        """
        n = x.shape[1]
        if cache is not None and self.stepper is not None and self.stepper.takes(x, cache, lengths):
            return self.stepper(x, cache)
        if cache is None:
            rotary, mask = self.rotary(torch.arange(n, device=x.device)[None], x.dtype), None
        else:
            rotary, mask = cache.rotary(n), cache.mask(n)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, cache, index, mask)
        if cache is not None:
            cache.advance(n if lengths is None else lengths)
        out: Tensor = self.norm(x)
        return out

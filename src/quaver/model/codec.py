"""The 12.5 Hz codec's decoder: codes to 24 kHz samples, whole or as an exact stream.

Shapes: B batch, T frames, Q codebooks, C channels, L steps of whatever rate a stage runs at, N samples. Weights keep
their checkpoint names. Architecture: Qwen3-TTS tokenizer 12 Hz (split residual codebooks, a sliding-window
transformer at frame rate, two ConvNeXt upsamplings, four snake-activated transposed convolutions), as in the
official code.

Every block takes a ``Memory`` or None. None means that the input starts at frame 0 and ends with the call; a Memory
supplies what came before. One code path serves both, so that a stream cannot drift from the whole.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.config import CodecDecoderConfig
from quaver.errors import CheckpointError
from quaver.model.layers import RMSNorm, Rotary
from quaver.model.snake import SnakeBeta
from quaver.model.sparing import Linear, apart, lent, parts
from quaver.recorded import Recorded, loose

_MOST_RECORDED = 16
"""Longer pushes, as a voice's own codes, keep a GPU busy by themselves, and what they hold would be large."""
_LARGE = 1 << 16
"""Smaller weights stay in float32: together they take nothing."""


def kept_in_half(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the decoder's tensor ``name`` may be kept in half precision: a large weight that is brought in parts."""
    parent, _, leaf = name.rpartition(".")
    brings = parent.endswith((".conv", "_proj", ".pwconv1", ".pwconv2")) and ".quantizer." not in parent
    return leaf == "weight" and brings and math.prod(shape) >= _LARGE


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, value)


class Memory:
    """What one stream keeps between two pushes: the last inputs of every block that looks back, and the position.

    Tensors are allocated by the first push and updated in place ever after, with shapes that do not depend on the
    position: a push of a fixed number of frames can be captured in a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        self.position = torch.zeros((), dtype=torch.long, device=device)
        self._kept: dict[nn.Module, Tensor] = {}

    def clear(self) -> None:
        """Back to frame 0; the allocations stay."""
        torch._foreach_zero_([self.position, *self._kept.values()])

    def extend(self, owner: nn.Module, x: Tensor, steps: int, dim: int = -1) -> Tensor:
        """``x`` with the ``steps`` steps before it along ``dim``, zeros before the first; remembers the last of all."""
        if owner not in self._kept:
            shape = list(x.shape)
            shape[dim] = steps
            self._kept[owner] = x.new_zeros(shape)
        extended = torch.cat((self._kept[owner], x), dim)
        self._kept[owner].copy_(extended.narrow(dim, extended.shape[dim] - steps, steps))
        return extended


class CausalConv(nn.Module):
    """A convolution that sees the present and the past only, stride 1: [B, C, L] -> [B, C', L]."""

    def __init__(self, channels: int, out: int, kernel: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, kernel, dilation=dilation, groups=groups)
        self.context = (kernel - 1) * dilation

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        if self.context:
            x = F.pad(x, (self.context, 0)) if memory is None else memory.extend(self, x, self.context)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        conv = self.conv
        if not apart(conv.weight, x):
            out: Tensor = conv(x)
            return out
        dilation, bias = conv.dilation, conv.bias
        found = [
            F.conv1d(x, part, None if bias is None else bias[rows], dilation=dilation)
            for rows, part in parts(conv.weight, x)
        ]
        return torch.cat(found, 1)


class CausalTransposedConv(nn.Module):
    """An upsampling by ``stride`` that sees the present and the past only: [B, C, L] -> [B, C', stride * L].

    ``kernel`` is a multiple of ``stride``; every output needs the ``kernel / stride - 1`` inputs before its own.
    One matmul and shifted sums: torch's own transposed convolution takes ten times as long on the few steps of a push.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, out, kernel, stride)
        self.context = kernel // stride - 1
        self.stride = stride

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        n = x.shape[-1]
        if self.context:
            x = F.pad(x, (self.context, 0)) if memory is None else memory.extend(self, x, self.context)
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        terms = (x[:, rows].transpose(1, 2) @ part.flatten(1) for rows, part in parts(weight, x))
        spread = reduce(torch.add, terms)
        spread = spread.view(*spread.shape[:2], weight.shape[1], -1, self.stride)
        # Tap j of an output's kernel belongs to the input j steps before it.
        taps = [spread[:, self.context - j :, :, j][:, :n] for j in range(self.context + 1)]
        y: Tensor = reduce(torch.add, taps) + bias.to(spread.dtype)[:, None]
        return y.transpose(1, 2).flatten(2)


class LayerScale(nn.Module):
    """One learned factor a channel on a residual branch (Touvron et al. 2021)."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class CodecAttention(nn.Module):
    """Causal grouped-query self-attention with rotary positions; with ``window``, over that many positions at most."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, window: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.grouped = heads != kv_heads
        self.window = window
        self.q_proj = Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, memory: Memory | None = None) -> Tensor:
        batch, n, _ = x.shape
        heads = (batch, n, -1, self.head_dim)
        q = rotary.turn(self.q_proj(x).view(heads).transpose(1, 2))
        k = rotary.turn(self.k_proj(x).view(heads).transpose(1, 2))
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if memory is not None and self.window is not None:
            k, v = memory.extend(self, torch.stack((k, v)), self.window - 1, dim=-2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, n, -1))
        return out


class GatedMLP(nn.Module):
    """The SiLU-gated feed-forward block (Shazeer 2020)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=False)
        self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class WindowLayer(nn.Module):
    """Windowed attention and MLP, each after its norm, scaled and added to the stream."""

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        hidden, scale = config.hidden_size, config.layer_scale_initial_scale
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.self_attn = CodecAttention(hidden, heads, kv_heads, config.head_dim, config.sliding_window)
        self.self_attn_layer_scale = LayerScale(hidden, scale)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.mlp_layer_scale = LayerScale(hidden, scale)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, memory: Memory | None) -> Tensor:
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), rotary, mask, memory))
        out: Tensor = x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))
        return out


class WindowTransformer(nn.Module):
    """The frame-rate transformer: [B, T, latent] -> [B, T, latent], each frame seeing the last ``sliding_window``."""

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.input_proj = Linear(config.latent_dim, config.hidden_size)
        self.layers = nn.ModuleList(WindowLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output_proj = Linear(config.hidden_size, config.latent_dim)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        n, window = x.shape[1], self.config.sliding_window
        queries = torch.arange(n, device=x.device)
        if memory is not None:
            queries = memory.position + queries
        mask = None
        if memory is not None or n > window:
            past = 0 if memory is None else window - 1
            keys = queries[0] - past + torch.arange(past + n, device=x.device)
            age = queries[:, None] - keys
            mask = (age >= 0) & (age < window) & (keys >= 0)
        x = self.input_proj(x)
        rotary = Rotary.at(queries[None], self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask, memory)
        out: Tensor = self.output_proj(self.norm(x))
        return out


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and a pointwise MLP, scaled and added: [B, C, L] -> [B, C, L] (Liu et al. 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = CausalConv(channels, channels, 7, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = Linear(channels, 4 * channels)
        self.pwconv2 = Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        y = self.norm(self.dwconv(x, memory).transpose(1, 2))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        out: Tensor = x + y.transpose(1, 2)
        return out


class ResidualUnit(nn.Module):
    """Two snake-activated convolutions, the first dilated, added to the input: [B, C, L] -> [B, C, L]."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(channels)
        self.conv1 = CausalConv(channels, channels, 7, dilation)
        self.act2 = SnakeBeta(channels)
        self.conv2 = CausalConv(channels, channels, 1)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        out: Tensor = x + self.conv2(self.act2(self.conv1(self.act1(x), memory)))
        return out


class UpsampleBlock(nn.Module):
    """One upsampling by ``rate`` that halves the channels, and three residual units of growing reach."""

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__()
        out = channels // 2
        units = [ResidualUnit(out, dilation) for dilation in (1, 3, 9)]
        self.block = nn.ModuleList([SnakeBeta(channels), CausalTransposedConv(channels, out, 2 * rate, rate), *units])

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        for module in self.block:
            x = module(x, memory)
        return x


class Codebook(nn.Module):
    """A codebook as the checkpoint stores it: running sums and counts, whose quotient is the vector of each code.

    They are statistics of training, so they are buffers: no gradient reaches them.
    """

    cluster_usage: Tensor
    embedding_sum: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("embedding_sum", torch.randn(size, dim))

    @property
    def embedding(self) -> Tensor:
        """The vectors [size, dim], in float32 at least."""
        return quotient(self.embedding_sum, self.cluster_usage)

    def forward(self, codes: Tensor) -> Tensor:
        """The vectors of ``codes`` [...], as [..., dim]."""
        # Looking up before dividing gives the same bits, and spares a stream the division of whole codebooks.
        sums = F.embedding(codes, self.embedding_sum)
        return quotient(sums, self.cluster_usage[codes]).to(sums.dtype)


def quotient(sums: Tensor, usage: Tensor) -> Tensor:
    """Codebook vectors [..., dim] from their running ``sums`` [..., dim] and ``usage`` counts [...]."""
    if sums.dtype in (torch.float16, torch.bfloat16):
        sums, usage = sums.float(), usage.float()
    return sums / usage.clamp(min=1e-5)[..., None]


class VectorLayer(nn.Module):
    """One step of the residual quantizer, a codebook."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self._codebook = Codebook(size, dim)

    @property
    def codebook(self) -> Codebook:
        """The codebook, under a public name."""
        return self._codebook


class VectorStack(nn.Module):
    """The codebooks of one residual quantizer."""

    def __init__(self, n_codebooks: int, size: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VectorLayer(size, dim) for _ in range(n_codebooks))

    @property
    def codebooks(self) -> list[Codebook]:
        """The codebooks, first to last."""
        return [layer.codebook for layer in self.layers if isinstance(layer, VectorLayer)]

    def forward(self, codes: Tensor) -> Tensor:
        """The sum [B, dim, T] of the vectors of ``codes`` [B, Q, T]."""
        vectors: list[Tensor] = [book(row) for book, row in zip(self.codebooks, codes.unbind(1), strict=True)]
        return reduce(torch.add, vectors).transpose(1, 2)


class ResidualDecoder(nn.Module):
    """One residual quantizer seen from the decoder: codes [B, Q, T] to latents [B, codebook_dim, T]."""

    def __init__(self, config: CodecDecoderConfig, n_codebooks: int) -> None:
        super().__init__()
        dim = config.codebook_dim // 2
        # The decoder never projects inwards; the weight is in every checkpoint and has to find its place.
        self.input_proj = nn.Conv1d(config.codebook_dim, dim, 1, bias=False)
        self.output_proj = nn.Conv1d(dim, config.codebook_dim, 1, bias=False)
        self.vq = VectorStack(n_codebooks, config.codebook_size, dim)

    def decode(self, codes: Tensor) -> Tensor:
        """The latents [B, codebook_dim, T] of ``codes`` [B, Q, T]."""
        out: Tensor = self.output_proj(self.vq(codes))
        return out


class SplitDecoder(nn.Module):
    """The semantic codebook and the acoustic ones, each behind its own projection."""

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        self.rvq_first = ResidualDecoder(config, 1)
        self.rvq_rest = ResidualDecoder(config, config.num_quantizers - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The latents [B, codebook_dim, T] of ``codes`` [B, Q, T]; codes must lie within the codebooks."""
        return self.rvq_first.decode(codes[:, :1]) + self.rvq_rest.decode(codes[:, 1:])


class CodecDecoder(nn.Module):
    """Codes to 24 kHz samples, whole or streaming; names and shapes are the checkpoint's ``decoder.*``."""

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = SplitDecoder(config)
        self.pre_conv = CausalConv(config.codebook_dim, config.latent_dim, 3)
        self.pre_transformer = WindowTransformer(config)
        latent = config.latent_dim
        self.upsample = nn.ModuleList(
            nn.ModuleList([CausalTransposedConv(latent, latent, factor, factor), ConvNeXtBlock(latent)])
            for factor in config.upsampling_ratios
        )
        widths = [config.decoder_dim // 2**i for i in range(len(config.upsample_rates) + 1)]
        blocks = [UpsampleBlock(width, rate) for width, rate in zip(widths, config.upsample_rates, strict=False)]
        first, last = CausalConv(latent, widths[0], 7), CausalConv(widths[-1], 1, 7)
        self.decoder = nn.ModuleList([first, *blocks, SnakeBeta(widths[-1]), last])

    @property
    def samples_per_frame(self) -> int:
        """How many samples one frame of codes becomes: 1,920 in the published model."""
        return math.prod(self.config.upsample_rates) * math.prod(self.config.upsampling_ratios)

    def forward(self, codes: Tensor) -> Tensor:
        """The samples [B, samples_per_frame * T] within [-1, 1] of ``codes`` [B, Q, T], all frames at once.

        Equals the official ``decoder(codes)``, and its ``decode`` up to 300 frames; beyond, the official ``decode``
        works in pieces of 300 with 25 frames before them, and so forgets what a 72-frame window still holds. The
        memory it takes grows with T: long speech is for ``stream``.
        """
        assert codes.dim() == 3 and codes.shape[1] == self.config.num_quantizers, tuple(codes.shape)
        return self.from_latents(self.quantizer.decode(codes))

    def from_latents(self, latents: Tensor) -> Tensor:
        """The samples [B, samples_per_frame * T] of quantized ``latents`` [B, codebook_dim, T]; differentiable."""
        return self._samples(latents, None)

    @torch.no_grad()
    def settle(self, device: torch.device, dtype: torch.dtype, *, on_host: bool = False) -> None:
        """Brings the decoder to ``device``, to compute in float32; its large weights are kept in ``dtype``.

        Activations in half precision are another matter: they come within a factor of four of float16's largest, and
        bfloat16 costs 20 dB. ``on_host``: large weights stay in pinned host memory, and codebooks are lent from it.
        Raises CheckpointError for a weight beyond the range of ``dtype``.
        """
        for name, value in list(self.named_parameters()):
            if kept_in_half(f"decoder.{name}", value.shape):
                kept = value.to(dtype)
                if not kept.isfinite().all():
                    raise CheckpointError(
                        f"codec tensor decoder.{name} leaves the range of {dtype}: keep it in float32"
                    )
                kept = kept.pin_memory() if on_host and device.type == "cuda" else kept.to(device)
            else:
                kept = value.to(device, torch.float32)
            _put(self, name, nn.Parameter(kept, requires_grad=False))
        for name, buffer in list(self.named_buffers()):
            wide = buffer.float()
            _put(self, name, lent(wide, device) if on_host else wide.to(device))

    def stream(self, batch: int = 1, *, recorded: bool = False) -> CodecStream:
        """A new stream of ``batch`` utterances side by side; ``recorded``: a short push of a known length is a step."""
        return CodecStream(self, batch, recorded)

    def _samples(self, latents: Tensor, memory: Memory | None) -> Tensor:
        x = self.pre_conv(latents, memory)
        x = self.pre_transformer(x.transpose(1, 2), memory).transpose(1, 2)
        for stage in self.upsample:
            assert isinstance(stage, nn.ModuleList)
            for module in stage:
                x = module(x, memory)
        for module in self.decoder:
            x = module(x, memory)
        out: Tensor = x.squeeze(1).clamp(-1.0, 1.0)
        return out


class CodecStream:
    """A decode that goes on where the last push ended: any cut into pushes gives the samples of the whole.

    Its state has a fixed size: the receptive field of every convolution and one attention window a layer.
    """

    def __init__(self, decoder: CodecDecoder, batch: int, recorded: bool) -> None:
        self._decoder = decoder
        self._batch = batch
        self._recorded = Recorded(loose(self._next)) if recorded else None
        # Biases are always where sound is made; weights may be elsewhere.
        bias = decoder.pre_conv.conv.bias
        assert bias is not None
        self._like = bias
        self._memory = Memory(bias.device)

    @torch.no_grad()
    def push(self, codes: Tensor) -> Tensor:
        """The samples [samples_per_frame * t] of the next frames ``codes`` [t, Q].

        A batched stream takes [B, t, Q] and gives [B, samples_per_frame * t].
        """
        batched = codes if codes.dim() == 3 else codes[None]
        assert batched.shape[0] == self._batch and batched.shape[2] == self._decoder.config.num_quantizers
        if not batched.shape[1]:
            return self._like.new_zeros((*codes.shape[:-2], 0))
        recorded = None if batched.shape[1] > _MOST_RECORDED else self._recorded
        (samples,) = (recorded or self._next)(batched)
        return samples if codes.dim() == 3 else samples[0]

    def _next(self, codes: Tensor) -> tuple[Tensor, ...]:
        latents = self._decoder.quantizer.decode(codes.transpose(1, 2))
        samples = self._decoder._samples(latents, self._memory)
        self._memory.position += codes.shape[1]
        return (samples,)

    def reset(self) -> None:
        """Back to frame 0 for another utterance; the memory stays allocated."""
        self._memory.clear()

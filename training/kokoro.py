"""Kokoro-82M in plain PyTorch, many clips at once: hours of training speech in minutes on one GPU.

    python -m training.kokoro convert kokoro.onnx kokoro.safetensors
    python -m training.kokoro pack kokoro.safetensors kokoro-a.bin kokoro-b.bin
    python -m training.kokoro speak --jobs JOBS.xz --weights kokoro-a.bin kokoro-b.bin --styles styles.npz --out SET \
        --share 0/2 --seconds 150 --device cuda:0

`convert` needs onnx; `speak` needs PyTorch, NumPy and safetensors alone. Jobs and sets are those of `synthesize.py`; a
speaker may also have "formant", "bend" and "colour" (see `warp.py`).

No masks are needed: durations are predicted for clips of equally many tokens, and clips of about equally many frames
are rendered together, the closing silence of each made longer until all are equally long.

Shapes: B clips, n tokens, T frames (25 ms, 600 samples), L steps, C channels, H hidden size.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training import synthesize, warp

STEP = 600
"""Samples a frame."""
_FFT, _HOP, _BINS = 20, 5, 11
_HARMONICS = 9
_AMPLITUDE, _VOICED_HZ = 0.1, 10.0
_DILATIONS = (1, 3, 5)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model's sizes; the defaults are Kokoro-82M's."""

    tokens: int = 178
    hidden: int = 512
    style: int = 128
    durations: int = 50
    bert: int = 768
    bert_inner: int = 2048
    bert_embedding: int = 128
    heads: int = 12
    layers: int = 12
    places: int = 512
    wide: int = 1024
    kernels: tuple[int, ...] = (3, 7, 11)


# The model


class Albert(nn.Module):
    """Contextual embeddings of phonemes: one layer, applied again and again."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        wide = sizes.bert
        self.heads, self.layers = sizes.heads, sizes.layers
        self.word = nn.Embedding(sizes.tokens, sizes.bert_embedding)
        self.place = nn.Embedding(sizes.places, sizes.bert_embedding)
        self.norm_in = nn.LayerNorm(sizes.bert_embedding, eps=1e-12)
        self.widen = nn.Linear(sizes.bert_embedding, wide)
        self.query, self.key, self.value, self.merge = (nn.Linear(wide, wide) for _ in range(4))
        self.norm_attention = nn.LayerNorm(wide, eps=1e-12)
        self.up, self.down = nn.Linear(wide, sizes.bert_inner), nn.Linear(sizes.bert_inner, wide)
        self.norm_out = nn.LayerNorm(wide, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, n, C] of ``ids`` [B, n]."""
        x = self.widen(self.norm_in(self.word(ids) + self.place.weight[: ids.shape[1]]))
        for _ in range(self.layers):
            heads = [f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
            attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = self.norm_attention(x + self.merge(attended))
            x = self.norm_out(x + self.down(F.gelu(self.up(x), approximate="tanh")))
        return cast("Tensor", x)


class StyledNorm(nn.Module):
    """Normalization over time, with gain and shift from the style."""

    def __init__(self, style: int, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(style, 2 * channels)

    def forward(self, x: Tensor, style: Tensor, more: Tensor | None = None) -> Tensor:
        """[B, C, L]; ``more`` [C] is added to the shift. Statistics are float32 whatever ``x`` is."""
        gain, shift = self.fc(style).chunk(2, 1)
        shift = shift if more is None else shift + more
        # One kernel for gain and shift as well: every channel of every clip is a channel of one batch.
        flat = x.reshape(1, -1, x.shape[2])
        gain, shift = (1.0 + gain).reshape(-1), shift.reshape(-1)
        return torch.native_batch_norm(flat, gain, shift, None, None, True, 0.0, 1e-5)[0].view_as(x)


class StyledBlock(nn.Module):
    """Two convolutions and a shortcut; may double the time steps."""

    def __init__(self, c_in: int, c_out: int, style: int, double: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = StyledNorm(style, c_in), StyledNorm(style, c_out)
        self.conv1, self.conv2 = nn.Conv1d(c_in, c_out, 3, padding=1), nn.Conv1d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv1d(c_in, c_out, 1, bias=False) if c_in != c_out else None
        self.pool = nn.ConvTranspose1d(c_in, c_in, 3, 2, 1, 1, groups=c_in) if double else None
        """Holds the weights; see :func:`_doubled`."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """[B, C, L or 2 L]."""
        y = F.leaky_relu(self.norm1(x, style), 0.2)
        if self.pool is not None:
            y, x = _doubled(y, self.pool), x.repeat_interleave(2, 2)
        y = self.conv2(F.leaky_relu(self.norm2(self.conv1(y), style), 0.2))
        out: Tensor = (y + (x if self.shortcut is None else self.shortcut(x))) * math.sqrt(0.5)
        return out


def _doubled(x: Tensor, pool: nn.ConvTranspose1d) -> Tensor:
    """What ``pool`` makes of ``x``, element by element: transposed convolutions of many groups are slow elsewhere."""
    assert pool.bias is not None
    left, middle, right = pool.weight[:, 0].unsqueeze(2).unbind(1)
    bias = pool.bias[:, None]
    odd = x * right + F.pad(x[:, :, 1:], (0, 1)) * left + bias
    return torch.stack([x * middle + bias, odd], 3).flatten(2)


class SnakeBlock(nn.Module):
    """Three dilated residual pairs of convolutions with periodic activations."""

    def __init__(self, channels: int, kernel: int, style: int) -> None:
        super().__init__()

        def convolutions(dilations: tuple[int, ...]) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2 * d, dilation=d) for d in dilations
            )

        self.convs1, self.convs2 = convolutions(_DILATIONS), convolutions((1, 1, 1))
        self.norms1 = nn.ModuleList(StyledNorm(style, channels) for _ in _DILATIONS)
        self.norms2 = nn.ModuleList(StyledNorm(style, channels) for _ in _DILATIONS)
        self.alphas1, self.alphas2 = (nn.Parameter(torch.ones(3, channels)) for _ in range(2))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """[B, C, L]."""
        for i in range(3):
            y = self.convs1[i](self._snake(x, style, self.norms1[i], self.alphas1[i]))
            x = x + self.convs2[i](self._snake(y, style, self.norms2[i], self.alphas2[i]))
        return x

    @staticmethod
    def _snake(x: Tensor, style: Tensor, norm: nn.Module, alpha: Tensor) -> Tensor:
        """norm(x) + sin(a norm(x))^2 / a, as y - cos(2 a y - 1) / 2 a with y = norm(x) + 1 / 2 a: fewer passes."""
        half = 0.5 / alpha
        y = norm(x, style, half)
        wave = torch.addcmul(y.new_full((), -1.0), y, (2.0 * alpha).to(y.dtype)[:, None]).cos_()
        return torch.addcmul(y, wave, half.to(y.dtype)[:, None], value=-1.0)


def _lstm(c_in: int, c_out: int) -> nn.LSTM:
    return nn.LSTM(c_in, c_out // 2, batch_first=True, bidirectional=True)


class Prosody(nn.Module):
    """Durations, and the curves of pitch and energy."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, style = sizes.hidden, sizes.style
        self.lstms = nn.ModuleList(_lstm(hidden + style, hidden) for _ in range(3))
        self.norms = nn.ModuleList(nn.Linear(style, 2 * hidden) for _ in range(3))
        self.lstm, self.shared = _lstm(hidden + style, hidden), _lstm(hidden + style, hidden)
        self.duration = nn.Linear(hidden, sizes.durations)
        self.pitch, self.energy = (
            nn.ModuleList(
                [
                    StyledBlock(hidden, hidden, style),
                    StyledBlock(hidden, hidden // 2, style, double=True),
                    StyledBlock(hidden // 2, hidden // 2, style),
                ]
            )
            for _ in range(2)
        )
        self.pitch_out, self.energy_out = nn.Conv1d(hidden // 2, 1, 1), nn.Conv1d(hidden // 2, 1, 1)

    def forward(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n, H + S] for :meth:`curves`, and how many frames each token lasts at speed 1 [B, n]."""
        beside = style[:, None].expand(-1, x.shape[1], -1)
        for lstm, norm in zip(self.lstms, self.norms, strict=True):
            x = lstm(torch.cat([x, beside], 2))[0]
            gain, shift = norm(style)[:, None].chunk(2, 2)
            x = F.layer_norm(x, x.shape[2:]) * (1.0 + gain) + shift
        x = torch.cat([x, beside], 2)
        return x, self.duration(self.lstm(x)[0]).sigmoid().sum(2)

    def curves(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """F0 in Hz and energy [B, 2 T] of frames [B, T, H + S]."""
        pitch = energy = self.shared(x)[0].transpose(1, 2)
        for block, other in zip(self.pitch, self.energy, strict=True):
            pitch, energy = block(pitch, style), other(energy, style)
        return self.pitch_out(pitch)[:, 0], self.energy_out(energy)[:, 0]


class Text(nn.Module):
    """What is said, as the decoder reads it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden = sizes.hidden
        self.embedding = nn.Embedding(sizes.tokens, hidden)
        self.convs = nn.ModuleList(nn.Conv1d(hidden, hidden, 5, padding=2) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.lstm = _lstm(hidden, hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, n, H]."""
        x = self.embedding(ids)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x.transpose(1, 2)).transpose(1, 2)), 0.2)
        return cast("Tensor", self.lstm(x)[0])


class Generator(nn.Module):
    """From features to sound: a source of harmonics, two upsampling stages, an inverse Fourier transform."""

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        style, wide = sizes.style, sizes.hidden
        half, quarter = wide // 2, wide // 4
        self.source = nn.Linear(_HARMONICS, 1)
        self.noise_convs = nn.ModuleList([nn.Conv1d(2 * _BINS, half, 12, 6, 3), nn.Conv1d(2 * _BINS, quarter, 1)])
        self.noise_blocks = nn.ModuleList([SnakeBlock(half, 7, style), SnakeBlock(quarter, 11, style)])
        self.ups = nn.ModuleList(
            [nn.ConvTranspose1d(wide, half, 20, 10, 5), nn.ConvTranspose1d(half, quarter, 12, 6, 3)]
        )
        self.blocks = nn.ModuleList(SnakeBlock(c, k, style) for c in (half, quarter) for k in sizes.kernels)
        self.post = nn.Conv1d(quarter, 2 * _BINS, 7, padding=3)
        angle = 2 * math.pi / _FFT * torch.arange(_BINS, dtype=torch.float64)[:, None] * torch.arange(_FFT)
        sines = -angle.sin()
        sines[[0, -1]] = 0.0
        waves = (torch.cat([angle.cos(), sines]) * torch.hann_window(_FFT, dtype=torch.float64)).float()
        # The frames overlap fourfold and are not divided by the sum of the squared windows: the published ONNX file
        # does not either, and the level is set anyway.
        weight = torch.full((_BINS, 1), 2.0 / _FFT)
        weight[[0, -1]] = 1.0 / _FFT
        self.register_buffer("analysis", waves, persistent=False)
        self.register_buffer("synthesis", (waves * weight.repeat(2, 1)).T.contiguous(), persistent=False)

    def forward(self, x: Tensor, style: Tensor, f0: Tensor, noise: float) -> Tensor:
        """[B, 300 L] samples of ``x`` [B, C, L] and ``f0`` [B, L] in Hz; the convolutions' own type, float32 around."""
        heard = self._heard(f0, noise).to(x.dtype)
        n_kernels = len(self.blocks) // 2
        for i in range(2):
            source = self.noise_blocks[i](self.noise_convs[i](heard), style)
            x = self.ups[i](F.leaky_relu(x, 0.1))
            x = source + (x if i == 0 else torch.cat([x[:, :, 1:2], x], 2))
            total = self.blocks[i * n_kernels](x, style)
            for block in self.blocks[i * n_kernels + 1 : (i + 1) * n_kernels]:
                total = total + block(x, style)
            x = total / n_kernels
        magnitude, angle = self.post(F.leaky_relu(x.float(), 0.01)).chunk(2, 1)
        magnitude, angle = magnitude.exp(), angle.sin()
        frames = self.synthesis @ torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], 1)
        batch, _, n_frames = frames.shape
        out = frames.new_zeros(batch, n_frames + 3, _HOP)
        for i in range(_FFT // _HOP):
            out[:, i : i + n_frames] += frames[:, i * _HOP : (i + 1) * _HOP].transpose(1, 2)
        return out.flatten(1)[:, _FFT // 2 : -_FFT // 2]

    def _heard(self, f0: Tensor, noise: float) -> Tensor:
        """[B, 2 bins, 60 L + 1]: magnitudes and phases of the harmonics of ``f0`` and of ``noise`` (1 as trained)."""
        size, device = STEP // 2, f0.device
        # The phase of each harmonic, in cycles, is linear between the middles of the steps. It is summed in float64 and
        # its whole cycles are dropped there: in float32 a long clip would be hoarse at its end.
        order = torch.arange(1, _HARMONICS + 1, device=device, dtype=torch.float64)
        slope = size * (f0.double()[:, None] * (order / warp.RATE_HZ)[:, None]).remainder(1.0)
        start = slope.cumsum(2).remainder(1.0)
        start = torch.cat([start[:, :, :1], start], 2).float()
        slope = F.pad(slope[:, :, 1:].float(), (1, 1))
        share = (torch.arange(size, device=device) + 0.5) / size
        wave = torch.zeros((), device=device)
        for k in range(_HARMONICS):
            cycles = start[:, k, :, None] + slope[:, k, :, None] * share
            wave = wave + self.source.weight[0, k] * torch.sin(2 * math.pi * (cycles - cycles.floor()))
        wave = wave.flatten(1)[:, size // 2 : -(size // 2)]
        voiced = (f0 > _VOICED_HZ).float().repeat_interleave(size, 1)
        wave = _AMPLITUDE * wave * voiced
        if noise:
            # Every harmonic has noise of its own: their weighted sum is noise again.
            amount = noise * self.source.weight.norm() * (0.003 * voiced + _AMPLITUDE / 3 * (1.0 - voiced))
            wave = wave + amount * torch.randn_like(wave)
        wave = F.pad((wave + self.source.bias).tanh()[:, None], (_FFT // 2, _FFT // 2), mode="reflect")[:, 0]
        real, imaginary = (self.analysis @ wave.unfold(1, _FFT, _HOP).transpose(1, 2)).chunk(2, 1)
        # The first and last bin are real: their phase is 0 or pi, never -pi, which a negative zero would give.
        return torch.cat([torch.hypot(real, imaginary), torch.atan2(imaginary + 0.0, real)], 1)


class Decoder(nn.Module):
    """Sound of text, pitch and energy."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, style, wide = sizes.hidden, sizes.style, sizes.wide
        beside = hidden // 8
        self.encode = StyledBlock(hidden + 2, wide, style)
        more = wide + 2 + beside
        self.decode = nn.ModuleList(StyledBlock(more, wide, style) for _ in range(3))
        self.decode.append(StyledBlock(more, hidden, style, double=True))
        self.pitch, self.energy = nn.Conv1d(1, 1, 3, 2, 1), nn.Conv1d(1, 1, 3, 2, 1)
        self.text = nn.Conv1d(hidden, beside, 1)
        self.generator = Generator(sizes)

    def forward(self, text: Tensor, f0: Tensor, energy: Tensor, style: Tensor, noise: float) -> Tensor:
        """[B, 600 T] of ``text`` [B, H, T], ``f0`` and ``energy`` [B, 2 T] and ``style`` [B, S]."""
        dtype = self.text.weight.dtype
        curves = torch.cat([self.pitch(f0[:, None]), self.energy(energy[:, None])], 1).to(dtype)
        text = text.to(dtype)
        x = self.encode(torch.cat([text, curves], 1), style)
        beside = torch.cat([self.text(text), curves], 1)
        for block in self.decode:
            x = block(torch.cat([x, beside], 1), style)
        return cast("Tensor", self.generator(x, style, f0, noise))


class Kokoro(nn.Module):
    """The whole model; a style is [2 S]: for the decoder, then for the prosody."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.bert = Albert(sizes)
        self.narrow = nn.Linear(sizes.bert, sizes.hidden)
        self.prosody = Prosody(sizes)
        self.text = Text(sizes)
        self.decoder = Decoder(sizes)
        self.requires_grad_(False).eval()

    def lighten(self) -> None:
        """Makes the large convolutions bfloat16; durations, pitch, phases and styles stay float32."""
        exact = {self.decoder.pitch, self.decoder.energy, self.decoder.generator.post}
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d) and module not in exact:
                module.to(torch.bfloat16)

    def plan(self, ids: Tensor, style: Tensor, speed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames of each token [B, n], and what :meth:`render` wants of it: [B, n, H + S] and [B, n, H]."""
        prosody, frames = self.prosody(self.narrow(self.bert(ids)), style[:, style.shape[1] // 2 :])
        return (frames / speed[:, None]).round().clamp(min=1).long(), prosody, self.text(ids)

    def render(self, prosody: Tensor, text: Tensor, style: Tensor, noise: float = 1.0) -> Tensor:
        """[B, 600 T] samples of ``prosody`` [B, T, H + S] and ``text`` [B, T, H]: the tokens' rows, each repeated."""
        voice, manner = style.chunk(2, 1)
        f0, energy = self.prosody.curves(prosody, manner)
        return cast("Tensor", self.decoder(text.transpose(1, 2), f0, energy, voice, noise))


# Weights


_ONNX_PATHS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^bert\.word$", "encoder/bert/embeddings/word_embeddings"),
    (r"^bert\.place$", "encoder/bert/embeddings/position_embeddings"),
    (r"^bert\.norm_in$", "encoder/bert/embeddings/LayerNorm"),
    (r"^bert\.widen$", "encoder/bert/encoder/embedding_hidden_mapping_in"),
    (r"^bert\.(query|key|value)$", r"encoder/bert/LAYER/attention/\1"),
    (r"^bert\.merge$", "encoder/bert/LAYER/attention/dense"),
    (r"^bert\.norm_attention$", "encoder/bert/LAYER/attention/LayerNorm"),
    (r"^bert\.up$", "encoder/bert/LAYER/ffn"),
    (r"^bert\.down$", "encoder/bert/LAYER/ffn_output"),
    (r"^bert\.norm_out$", "encoder/bert/LAYER/full_layer_layer_norm"),
    ("LAYER", "encoder/albert_layer_groups.0/albert_layers.0"),
    (r"^narrow$", "encoder/bert_encoder"),
    (r"^prosody\.lstms\.(\d)$", lambda m: f"encoder/predictor/text_encoder/lstms.{2 * int(m[1])}"),
    (r"^prosody\.norms\.(\d)$", lambda m: f"encoder/predictor/text_encoder/lstms.{2 * int(m[1]) + 1}/fc"),
    (r"^prosody\.lstm$", "encoder/predictor/lstm"),
    (r"^prosody\.shared$", "encoder/shared"),
    (r"^prosody\.duration$", "encoder/predictor/duration_proj/linear_layer"),
    (r"^prosody\.pitch", "encoder/F0"),
    (r"^prosody\.energy", "encoder/N"),
    (r"^encoder/(F0|N)_out$", r"encoder/\1_proj"),
    (r"^text\.(embedding|lstm)$", r"encoder/text_encoder/\1"),
    (r"^text\.convs\.(\d)$", r"encoder/text_encoder/cnn.\1/cnn.\1.0"),
    (r"^text\.norms\.(\d)$", r"encoder/text_encoder/cnn.\1/cnn.\1.1"),
    (r"^decoder\.pitch$", "decoder/decoder/F0_conv"),
    (r"^decoder\.energy$", "decoder/decoder/N_conv"),
    (r"^decoder\.text$", "decoder/decoder/asr_res/asr_res.0"),
    (r"^decoder\.generator\.", "decoder/decoder/generator/"),
    (r"^decoder\.", "decoder/decoder/"),
    (r"generator/source$", "generator/m_source/l_linear"),
    (r"generator/post$", "generator/conv_post"),
    (r"generator/noise_blocks", "generator/noise_res"),
    (r"generator/blocks", "generator/resblocks"),
    (r"\.norms([12])\.(\d)", r"/adain\1.\2"),
    (r"\.(fc|shortcut|pool|norm[12]|conv[12]|convs[12])\b", r"/\1"),
    ("shortcut", "conv1x1"),
)
"""Rules that lead, one after the other, from a module's name to the path of its node in the published ONNX file."""


def from_onnx(file: Path) -> dict[str, Tensor]:
    """Kokoro's weights under the names of :class:`Kokoro`. Raises KeyError when the graph is another one."""
    import onnx  # type: ignore[import-not-found, unused-ignore]
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}

    def given(node: str, count: int | None = None) -> list[Tensor]:
        inputs = [name for name in nodes[f"/{node}"].input if name in tensors][:count]
        return [torch.from_numpy(numpy_helper.to_array(tensors[name]).copy()) for name in inputs]

    found: dict[str, Tensor] = {}
    for name, module in Kokoro().named_modules():
        path = name
        for pattern, replacement in _ONNX_PATHS:
            path = re.sub(pattern, replacement, path)
        if isinstance(module, nn.LSTM):
            weight, recurrent, bias = given(f"{path}/LSTM", 3)
            for i, end in enumerate(("", "_reverse")):
                parts = (weight[i], recurrent[i], *bias[i].chunk(2))
                for kind, part in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), parts, strict=True):
                    # The gates come as input, output, forget, cell and are wanted as input, forget, cell, output.
                    gates = part.chunk(4)
                    found[f"{name}.{kind}_l0{end}"] = torch.cat([gates[0], gates[2], gates[3], gates[1]])
        elif isinstance(module, nn.Linear):
            if f"/{path}/Gemm" in nodes:
                weight, bias = given(f"{path}/Gemm")
            else:
                (weight,), (bias,) = given(f"{path}/MatMul"), given(f"{path}/Add")
                weight = weight.T.contiguous()
            found[f"{name}.weight"], found[f"{name}.bias"] = weight, bias
        elif isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.LayerNorm | nn.Embedding):
            kinds = {nn.LayerNorm: "LayerNormalization", nn.Embedding: "Gather"}
            values = given(f"{path}/{kinds.get(type(module), type(module).__name__.removesuffix('1d'))}")
            found.update(zip((f"{name}.weight", f"{name}.bias"), values, strict=False))
        elif isinstance(module, SnakeBlock):
            for number in "12":
                names = [f"{path.replace('/', '.')}.alpha{number}.{k}" for k in range(3)]
                alphas = [torch.from_numpy(numpy_helper.to_array(tensors[n]).copy()).reshape(-1) for n in names]
                found[f"{name}.alphas{number}"] = torch.stack(alphas)
    # Every token is of the first of two types.
    found["bert.place.weight"] += given("encoder/bert/embeddings/token_type_embeddings/Gather")[0][0]
    Kokoro().load_state_dict(found)
    return found


_STEPS = ((r"^decoder\.(encode|decode)\..*conv|^decoder\.(encode|decode).*shortcut", 0.30), (r"^decoder\.", 0.24))
"""Quantization steps, in standard deviations of an output channel, of the weights that stand the most."""
_FINE = 0.12
"""The step of all others: durations and pitch are heard at once when they are wrong."""
_SMALLEST = 4096
"""Tensors of fewer elements are kept as float16."""
_FILTERS: list[dict[str, int]] = [
    {"id": lzma.FILTER_LZMA2, "mode": lzma.MODE_NORMAL, "mf": lzma.MF_HC4, "dict_size": 4096, "lc": 0, "pb": 0}
]
"""The integers are independent draws: only their frequencies can be used, not what went before. The fast mode would
take chance repetitions, which cost more than they save."""


def pack(weights: dict[str, Tensor], files: list[Path]) -> None:
    """Writes ``weights`` as ``files``, about equally large: integers and a float16 scale for each output channel."""
    sizes, parts = [0.0] * len(files), [list[str]() for _ in files]

    def step(name: str) -> float:
        return next((s for pattern, s in _STEPS if re.search(pattern, name)), _FINE)

    for name in sorted(weights, key=lambda n: -weights[n].numel()):
        part = sizes.index(min(sizes))
        sizes[part] += weights[name].numel() * (2.05 - math.log2(step(name)))
        parts[part].append(name)
    for file, names in zip(files, parts, strict=True):
        # Those of one step follow each other: they share their frequencies.
        heads, scales, integers = list[tuple[str, list[int]]](), list[bytes](), list[bytes]()
        for name in sorted(names, key=step):
            values = weights[name].float()
            heads.append((name, list(values.shape)))
            if values.numel() < _SMALLEST:
                scales.append(values.half().numpy().tobytes())
                continue
            flat = values.reshape(values.shape[0], -1)
            scale = torch.maximum(flat.std(1) * step(name), flat.abs().amax(1) / 127).clamp(min=1e-7).half()
            scales.append(scale.numpy().tobytes())
            integers.append((flat / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).numpy().tobytes())
        blocks = [json.dumps(heads).encode(), b"".join(scales)]
        blocks.append(lzma.compress(b"".join(integers), lzma.FORMAT_RAW, filters=_FILTERS))
        file.write_bytes(b"".join(len(block).to_bytes(4, "little") + block for block in blocks))


def unpack(file: Path) -> dict[str, Tensor]:
    """The weights in one file of :func:`pack`, float32."""
    data, blocks = file.read_bytes(), list[bytes]()
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        blocks.append(data[4:end])
        data = data[end:]
    halves = torch.frombuffer(bytearray(blocks[1]), dtype=torch.float16).float()
    unpacked = lzma.decompress(blocks[2], lzma.FORMAT_RAW, filters=_FILTERS)
    integers = torch.frombuffer(bytearray(unpacked), dtype=torch.int8)
    found, at, place = dict[str, Tensor](), 0, 0
    for name, shape in json.loads(blocks[0]):
        count = math.prod(shape)
        width = count if count < _SMALLEST else shape[0]
        scale, at = halves[at : at + width], at + width
        if count < _SMALLEST:
            found[name] = scale.reshape(shape)
            continue
        values, place = integers[place : place + count].reshape(shape[0], -1), place + count
        found[name] = (values * scale[:, None]).reshape(shape)
    return found


def load(files: list[Path]) -> Kokoro:
    """The model with the weights of a .safetensors file, or of all files of :func:`pack`."""
    with ThreadPoolExecutor(len(files)) as side_by_side:
        parts = side_by_side.map(lambda f: load_file(f) if f.suffix == ".safetensors" else unpack(f), files)
    model = Kokoro()
    model.load_state_dict({name: value for part in parts for name, value in part.items()})
    return model


# Speaking


_CHUNK = 4096
"""Jobs that are planned together: enough of every length, and few enough for any beginning to be a fair sample."""
_PLANNED = 256
"""The most clips planned at once."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A clip whose durations are known."""

    job: synthesize.Job
    frames: np.ndarray
    """[n]"""
    prosody: Tensor
    text: Tensor
    style: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Finished clips on their way to the disk."""

    jobs: list[synthesize.Job]
    samples: Tensor
    """int16 [B, M]"""
    n_frames: Tensor
    """[B]: whole frames of 1920 samples, 0 for a clip that is dropped."""
    ready: Any
    """A CUDA event, or None."""


class Speaker:
    """Speaks jobs in batches."""

    def __init__(
        self,
        model: Kokoro,
        styles: dict[str, np.ndarray],
        speakers: dict[str, dict[str, Any]],
        device: torch.device,
        budget: int | None = None,
        noise: float = 1.0,
    ) -> None:
        """``budget``: frames of 25 ms that are rendered together, by default what fills the device."""
        self.model, self.styles, self.speakers, self.device = model.to(device), styles, speakers, device
        self.budget = budget or (16_000 if device.type == "cuda" else 600)
        self.noise = noise
        self.waiting: dict[int, list[Planned]] = {}
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False
            model.lighten()

    def _sent(self, values: Tensor) -> Tensor:
        """``values`` on the device, without waiting for what it is doing."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values

    def style(self, job: synthesize.Job) -> np.ndarray:
        """Kokoro has one style vector for every length of sentence."""
        shares = self.speakers[job["speaker"]]["weights"].items()
        style = sum(share * self.styles[name][len(job["tokens"]) - 1] for name, share in shares)
        return np.asarray(style, np.float32)

    @torch.inference_mode()
    def plan(self, jobs: list[synthesize.Job]) -> list[Planned]:
        """The jobs, which all have equally many tokens, with their durations."""
        ids = self._sent(torch.tensor([[0, *job["tokens"], 0] for job in jobs]))
        styles = self._sent(torch.from_numpy(np.stack([self.style(job) for job in jobs])))
        speeds = [job["tempo"] / self.speakers[job["speaker"]]["pitch"] for job in jobs]
        frames, prosody, text = self.model.plan(ids, styles, self._sent(torch.tensor(speeds)))
        return [Planned(*row) for row in zip(jobs, frames.cpu().numpy(), prosody, text, styles, strict=True)]

    @torch.inference_mode()
    def render(self, clips: list[Planned], n_frames: int) -> Tensor:
        """[B, 600 T] samples of ``clips``, the last token of each filling up ``n_frames`` T."""
        rows, begin = list[np.ndarray](), 0
        for clip in clips:
            filled = clip.frames.copy()
            filled[-1] += n_frames - filled.sum()
            rows.append(begin + np.repeat(np.arange(len(filled)), filled))
            begin += len(filled)
        index = self._sent(torch.from_numpy(np.stack(rows)))
        prosody, text = (torch.cat(parts)[index] for parts in ([c.prosody for c in clips], [c.text for c in clips]))
        return self.model.render(prosody, text, torch.stack([c.style for c in clips]), self.noise)

    @torch.inference_mode()
    def speak(self, clips: list[Planned], n_frames: int) -> Batch:
        """The finished clips, all filled up to ``n_frames`` of 25 ms."""
        jobs = [clip.job for clip in clips]
        speakers = [self.speakers[job["speaker"]] for job in jobs]
        pitch = [float(speaker["pitch"]) for speaker in speakers]
        samples = warp.resampled(self.render(clips, n_frames), pitch)
        colours = [speaker.get("colour") or [0.0, 0.0] for speaker in speakers]
        knots = max(map(len, colours))
        colours = [colour if any(colour) else [0.0] * knots for colour in colours]

        def sent(values: Any) -> Tensor:
            return self._sent(torch.tensor(values))

        formant = [float(speaker.get("formant", 1.0)) for speaker in speakers]
        bend = [float(speaker.get("bend", 0.0)) for speaker in speakers]
        samples = warp.warped(samples, sent(formant), sent(bend), sent(colours))
        lengths = [int(clip.frames.sum() * STEP / p) for clip, p in zip(clips, pitch, strict=True)]
        dice = [random.Random(f"{synthesize.SEED} kokoro {job['text']}") for job in jobs]
        lead = [int(warp.RATE_HZ * one.uniform(0.08, 0.16)) for one in dice]
        whole, counts = warp.finished(samples, sent(lengths), sent(lead))
        if self.device.type != "cuda":
            return Batch(jobs, whole, counts, None)
        whole, counts = whole.to("cpu", non_blocking=True), counts.to("cpu", non_blocking=True)
        ready = cast("Any", torch.cuda.Event)()
        ready.record()
        return Batch(jobs, whole, counts, ready)

    def batches(self, jobs: list[synthesize.Job]) -> Iterator[Batch]:
        """All clips, group by group: those of about equally many frames wait for each other until they fill a batch."""
        for start in range(0, len(jobs), _CHUNK):
            chunk = sorted(jobs[start : start + _CHUNK], key=lambda job: len(job["tokens"]))
            while chunk:
                n_tokens = len(chunk[0]["tokens"])
                n = next((i for i, job in enumerate(chunk) if len(job["tokens"]) != n_tokens), len(chunk))
                n = min(n, _PLANNED)
                for clip in self.plan(chunk[:n]):
                    self.waiting.setdefault(filled(int(clip.frames.sum())), []).append(clip)
                chunk = chunk[n:]
            # In any order of lengths: a run that ends early lacks no particular ones.
            for length in random.Random(start).sample(sorted(self.waiting), len(self.waiting)):
                clips = self.waiting[length]
                size = batch_size(self.budget, length)
                while len(clips) >= size or (clips and start + _CHUNK >= len(jobs)):
                    yield self.speak(clips[:size], length)
                    del clips[:size]


def filled(n_frames: int) -> int:
    """The frames to which a clip is filled up: few lengths, for every new one costs a search for algorithms."""
    step = 8 if n_frames <= 128 else 16
    return -(-n_frames // step) * step


def batch_size(budget: int, n_frames: int) -> int:
    """How many clips of ``n_frames`` are rendered together."""
    size = max(1, budget // n_frames)
    return size // 8 * 8 if size > 8 else size


@dataclass(slots=True)
class Written:
    """What a part of a set holds, as :meth:`Part.write` counts it."""

    clips: int = 0
    frames: int = 0
    dropped: int = 0


class Part:
    """One part of a set, written by a thread of its own: samples before the line that names them."""

    def __init__(self, stem: Path) -> None:
        self.stem, self.count = stem, Written()
        self.error: BaseException | None = None
        self.queue: queue.Queue[Batch | None] = queue.Queue(4)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def put(self, batch: Batch | None) -> None:
        """Writes ``batch`` soon; waits while four are waiting, so that the device's memory does not fill."""
        if self.error is not None:
            raise RuntimeError("the set cannot be written") from self.error
        self.queue.put(batch)

    def close(self) -> None:
        """Writes what is waiting."""
        self.put(None)
        self.thread.join()
        if self.error is not None:
            raise RuntimeError("the set cannot be written") from self.error

    def _run(self) -> None:
        try:
            with self.stem.with_suffix(".s16").open("ab") as audio, self.stem.with_suffix(".jsonl").open("a") as lines:
                offset = audio.tell() // 2
                while (batch := self.queue.get()) is not None:
                    offset = self._write(batch, offset, audio, lines)
        except BaseException as error:
            self.error = error
            while self.queue.get() is not None:
                pass

    def _write(self, batch: Batch, offset: int, audio: Any, lines: Any) -> int:
        if batch.ready is not None:
            batch.ready.synchronize()
        rows, samples = list[str](), batch.samples.numpy()
        for job, clip, n_frames in zip(batch.jobs, samples, batch.n_frames.tolist(), strict=True):
            if not n_frames:
                self.count.dropped += 1
                continue
            audio.write(clip[: n_frames * warp.FRAME].astype("<i2", copy=False).tobytes())
            row = {"text": job["text"], "speaker": job["speaker"], "offset": offset, "n_frames": n_frames}
            rows.append(json.dumps(row) + "\n")
            offset += n_frames * warp.FRAME
            self.count.clips += 1
            self.count.frames += n_frames
        audio.flush()
        lines.write("".join(rows))
        lines.flush()
        return offset


def spoken(out: Path, own: Path) -> set[int]:
    """The texts in the set ``out``; what a killed run left of half a clip is cut off part ``own``, of no other."""
    found: set[int] = set()
    if own.with_suffix(".jsonl").exists():
        found.update(synthesize.spoken_texts(own.with_suffix(".jsonl")))
    for index in out.glob("part-*.jsonl"):
        if index.stem != own.stem:
            # Another process may be writing there: its last line may be half a line.
            whole = index.read_text("utf-8", errors="replace").rpartition("\n")[0]
            found.update(int(json.loads(line)["text"]) for line in whole.splitlines())
    return found


def speak_share(
    jobs_file: Path,
    weights: list[Path],
    styles: Path,
    out: Path,
    share: tuple[int, int],
    seconds: float,
    device: torch.device,
    hours: float = math.inf,
    noise: float = 1.0,
) -> Written:
    """Speaks every n-th job from the i-th on, ``share`` (i, n), for ``seconds`` in all or until there are ``hours``."""
    started = told = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    number, n_shares = share
    speakers, jobs = synthesize.read_jobs(jobs_file)
    stem = out / f"part-{number:03d}"
    known = spoken(out, stem)
    jobs = [job for job in jobs[number::n_shares] if job["text"] not in known]
    with np.load(styles) as file:
        voices = {name: file[name].astype(np.float32) for name in file.files}
    torch.manual_seed(synthesize.SEED + number)
    speaker = Speaker(load(weights), voices, speakers, device, noise=noise)
    loaded = time.monotonic()
    after = f"loaded after {loaded - started:.0f} s"
    print(f"kokoro {number}: {len(jobs)} jobs, {len(known)} there already; {after}", flush=True)
    part = Part(stem)

    def tell(end: str) -> None:
        done, now = part.count, time.monotonic()
        speech = done.frames * warp.FRAME / warp.RATE_HZ
        print(
            f"kokoro {number}: {now - started:.0f} s, {done.clips} of {len(jobs)} clips, {done.dropped} dropped,"
            f" {speech / 3600:.2f} h of speech, {speech / max(1e-3, now - loaded):.1f} x real time{end}",
            flush=True,
        )

    for batch in speaker.batches(jobs):
        part.put(batch)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            tell("")
        if time.monotonic() - started > seconds or part.count.frames * warp.FRAME / warp.RATE_HZ / 3600 >= hours:
            break
    part.close()
    tell(", ended")
    return part.count


def main() -> None:
    """Convert, pack, or speak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="the weights of the published ONNX file under our names")
    convert.add_argument("onnx", type=Path)
    convert.add_argument("out", type=Path)
    packs = commands.add_parser("pack", help="weights small enough to travel")
    packs.add_argument("weights", type=Path)
    packs.add_argument("files", type=Path, nargs="+")
    speak = commands.add_parser("speak", help="make a part of a set")
    speak.add_argument("--jobs", type=Path, required=True)
    speak.add_argument("--weights", type=Path, nargs="+", required=True)
    speak.add_argument("--styles", type=Path, required=True)
    speak.add_argument("--out", type=Path, required=True)
    speak.add_argument("--share", default="0/1", help="i/n: every n-th job from the i-th on")
    speak.add_argument("--seconds", type=float, required=True, help="loading included")
    speak.add_argument("--hours", type=float, default=math.inf, help="of speech, then it ends")
    speak.add_argument("--device", type=torch.device, default="cuda:0" if torch.cuda.is_available() else "cpu")
    speak.add_argument("--noise", type=float, default=1.0, help="of the source: 1 as trained, 0 as in the ONNX file")
    args = parser.parse_args()
    if args.command == "convert":
        save_file(from_onnx(args.onnx), args.out)
    elif args.command == "pack":
        pack(load_file(args.weights), args.files)
        print(*(f"{file} {file.stat().st_size}" for file in args.files), sep="\n")
    else:
        number, n_shares = map(int, args.share.split("/"))
        share = (number, n_shares)
        device = torch.device(args.device)
        speak_share(args.jobs, args.weights, args.styles, args.out, share, args.seconds, device, args.hours, args.noise)


if __name__ == "__main__":
    main()

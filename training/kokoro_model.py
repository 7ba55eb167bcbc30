"""Kokoro-82M in plain PyTorch: phoneme ids and a style to speech, many clips at once.

A StyleTTS 2 model (Li et al. 2023) with an iSTFTNet vocoder (Kaneko et al. 2022); its weights are Apache-2.0. No masks:
rows have equally many tokens, and equally many frames.

Shapes: B clips, n tokens, T frames (25 ms, 600 samples), L steps, C channels, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import RATE_HZ

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
        slope = size * (f0.double()[:, None] * (order / RATE_HZ)[:, None]).remainder(1.0)
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

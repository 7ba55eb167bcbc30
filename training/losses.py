"""What the codec is trained against: multi-scale log-mel distances and two families of discriminators.

Multi-period discriminators as in HiFi-GAN (Kong et al. 2020), complex spectrogram discriminators as in EnCodec
(Défossez et al. 2022), least-squares objective. Shapes: B batch, N samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

RATE_HZ = 24_000
_INPUT_GAIN = 8.0
"""Speech samples are small; a discriminator fed with them unscaled learns little in minutes."""


def mel_filters(n_fft: int, n_mels: int) -> Tensor:
    """Triangular filters [n_mels, n_fft // 2 + 1] on the HTK mel scale, 0 to 12 kHz; none is empty."""
    top = 2595.0 * math.log10(1.0 + RATE_HZ / 2 / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, n_mels + 2) / 2595.0) - 1.0)
    bins = torch.linspace(0.0, RATE_HZ / 2, n_fft // 2 + 1)
    width = (edges[1:] - edges[:-1]).clamp(min=RATE_HZ / n_fft)
    rising = 1.0 - (edges[1:-1, None] - bins) / width[:-1, None]
    falling = 1.0 - (bins - edges[1:-1, None]) / width[1:, None]
    return torch.minimum(rising, falling).clamp(min=0.0)


class MelDistance(nn.Module):
    """Mean absolute difference of log-mel spectrograms over five window sizes."""

    SCALES = ((128, 16), (256, 32), (512, 48), (1024, 80), (2048, 128))

    def __init__(self) -> None:
        super().__init__()
        for n_fft, n_mels in self.SCALES:
            self.register_buffer(f"window{n_fft}", torch.hann_window(n_fft))
            self.register_buffer(f"filters{n_fft}", mel_filters(n_fft, n_mels))

    def forward(self, real: Tensor, made: Tensor) -> Tensor:
        """The distance of ``made`` from ``real``, both [B, N]."""
        batch = torch.cat((real, made)).float()
        total = batch.new_zeros(())
        for n_fft, _ in self.SCALES:
            window, filters = getattr(self, f"window{n_fft}"), getattr(self, f"filters{n_fft}")
            spectrum = torch.stft(batch, n_fft, n_fft // 4, window=window, return_complex=True)
            power = torch.view_as_real(spectrum).square().sum(-1)
            mel = (filters @ (power + 1e-9).sqrt() + 1e-4).log()
            target, got = mel.chunk(2)
            total = total + (target - got).abs().mean()
        return total / len(self.SCALES)


class PeriodDiscriminator(nn.Module):
    """Sees every ``period``-th sample as a column: feature maps, the last one the verdict."""

    def __init__(self, period: int, channels: tuple[int, ...] = (16, 32, 96, 192)) -> None:
        super().__init__()
        self.period = period
        widths = (1, *channels)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in zip(widths, channels, strict=False)
        )
        self.last = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.pad(x, (0, -x.shape[-1] % self.period)).reshape(len(x), 1, -1, self.period)
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            maps.append(x)
        return [*maps, self.last(x)]


class SpectrumDiscriminator(nn.Module):
    """Sees a complex spectrogram as an image of two channels."""

    def __init__(self, n_fft: int, channels: int = 32) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft))
        shape = [(2, 1, 2), (channels, 1, 2), (channels, 2, 2), (channels, 4, 2)]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(c, channels, (3, 9), (1, s), (d, 4), (d, 1))) for c, d, s in shape
        )
        self.last = weight_norm(nn.Conv2d(channels, 1, (3, 3), padding=(1, 1)))

    def forward(self, x: Tensor) -> list[Tensor]:
        window = self.get_buffer("window")
        spectrum = torch.stft(
            x.float(), self.n_fft, self.n_fft // 4, window=window, normalized=True, return_complex=True
        )
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1).contiguous()
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            maps.append(x)
        return [*maps, self.last(x)]


class Discriminators(nn.Module):
    """Five periods and three spectrograms, all asked at once."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            [PeriodDiscriminator(p) for p in (2, 3, 5, 7, 11)] + [SpectrumDiscriminator(n) for n in (512, 1024, 2048)]
        )

    def forward(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (of the discriminators, adversarial and feature-matching of the codec) of ``made`` beside ``real``."""
        batch = torch.cat((real, made)) * _INPUT_GAIN
        own, adversarial, matching = (batch.new_zeros((), dtype=torch.float32) for _ in range(3))
        for member in self.members:
            *maps, verdict = (m.float() for m in member(batch))
            yes, no = verdict.chunk(2)
            own = own + (1 - yes).square().mean() + no.square().mean()
            adversarial = adversarial + (1 - no).square().mean()
            for features in maps:
                target, got = features.chunk(2)
                target = target.detach()
                matching = matching + (target - got).abs().mean() / target.abs().mean().clamp(min=1e-3) / len(maps)
        n = len(self.members)
        return own / n, adversarial / n, matching / n

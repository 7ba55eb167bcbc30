"""How a frame sounds, as the codec's acoustic codebooks are to tell it: its picture, its pitch, and its hum.

The picture is the log-mel spectrogram of its 80 ms; a few dozen principal components of it, in fifteen codebooks, keep
a voice and what it says nearly whole (docs/VOICE.md). But it does not tell the phase of a voice, and from what does not
tell it no convolution can make a steady tone that goes on. So the pitch is told as well, and the hum: the fundamental
as a wave of even loudness, which a decoder reads as it is (from phases at a few moments it did not learn to make one).
The acoustic latent has the principal components of all that.

Shapes: B batch, N = 1920 T samples, T frames, C = 8 T columns, F features, D latent dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import data, recipe
from training.losses import mel_filters

_WINDOW, _HOP, _MELS = 1024, 240, 64
COLUMNS = recipe.SAMPLES_PER_FRAME // _HOP
"""Moments in a frame that are looked at, the first at its start."""
_HEARD = 960
"""Samples around a moment from which pitch and phase are told."""
_HIGHEST_HZ, _LOWEST_HZ, _MIDDLE_HZ = 420.0, 62.0, 160.0
_N_LAGS = 2048
_HUM = 10
"""Samples of the hum in a column: one for every millisecond."""
WIDTHS = {"picture": COLUMNS * _MELS, "pitch": 2 * COLUMNS, "hum": _HUM * COLUMNS}
SHARES = {"picture": 1.0, "pitch": 0.1, "hum": 0.15}
"""How much of the power of the features each kind has."""
WIDTH = sum(WIDTHS.values())


class Features(nn.Module):
    """What can be told of frames, column by column: a picture, pitch and hum, as they are measured."""

    window: Tensor
    filters: Tensor
    taper: Tensor
    smoothing: Tensor
    tapered: Tensor
    """The autocorrelation of ``taper``, by which that of a piece of sound is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(_WINDOW, _MELS), persistent=False)
        taper = torch.hann_window(_HEARD)
        self.register_buffer("taper", taper, persistent=False)
        self.register_buffer("tapered", _autocorrelation(taper) / taper.square().sum(), persistent=False)
        smoothing = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])[None, None] / 9.0
        self.register_buffer("smoothing", smoothing, persistent=False)
        self.lags = round(data.RATE_HZ / _HIGHEST_HZ), round(data.RATE_HZ / _LOWEST_HZ)

    def pictures(self, samples: Tensor) -> Tensor:
        """The log-mel pictures [B, C, mels] of ``samples`` [B, N]."""
        around = F.pad(samples.float(), (_WINDOW // 2, _WINDOW // 2 - _HOP))
        spectrum = torch.stft(around, _WINDOW, _HOP, window=self.window, center=False, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1)
        return (self.filters @ (power + 1e-9).sqrt() + 1e-4).log().transpose(1, 2)

    def voice(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Pitch [B, C, 2] (how voiced, and the logarithm of the pitch as far as it is) and hum [B, C, 10] (the
        fundamental, as loud as it is voiced and strong) of ``samples`` [B, N]."""
        around = F.pad(samples.float(), (_HEARD // 2, _HEARD // 2))
        pieces = around.unfold(1, _HEARD, _HOP)
        pieces = (pieces - pieces.mean(-1, keepdim=True)) * self.taper
        power = pieces.square().sum(-1, keepdim=True)
        like = _autocorrelation(pieces) / (power + 1e-5) / self.tapered.clamp(min=0.05)
        # A pitch goes on: over five columns the lag of a period comes again, that of two halves of it seldom.
        low, high = self.lags
        b, c, _ = like.shape
        smooth = F.conv1d(
            like[..., low - 1 : high + 2].transpose(1, 2).flatten(0, 1)[:, None], self.smoothing, padding=2
        )
        smooth = smooth.view(b, -1, c).transpose(1, 2)
        lag = torch.arange(low - 1, high + 2, device=like.device)
        liked = smooth - 0.03 * (lag / low).log2()
        found = liked[..., 1:-1].argmax(-1, keepdim=True) + 1
        left, peak, right = (smooth.gather(-1, found + i) for i in (-1, 0, 1))
        bent = (left - 2.0 * peak + right).clamp(max=-1e-6)
        offset = (0.5 * (left - right) / bent).clamp(-0.5, 0.5)
        hz = data.RATE_HZ / (found + (low - 1) + offset)
        voiced = torch.sigmoid((peak - 0.55) / 0.06)
        pitch = torch.cat((voiced - 0.5, voiced * (hz / _MIDDLE_HZ).log() / 0.35), -1)
        angle = (2.0 * math.pi / data.RATE_HZ) * hz * (torch.arange(_HEARD, device=like.device) - _HEARD // 2)
        turning = torch.cat(((pieces * angle.cos()).sum(-1, True), -(pieces * angle.sin()).sum(-1, True)), -1)
        size = turning.square().sum(-1, keepdim=True).sqrt()
        turning = voiced * turning / (size + 2.0 * power.sqrt() + 1e-4)
        # From every column on to the next and from that back, one fading into the other.
        share = torch.arange(_HUM, device=like.device) / _HUM
        turn = 2.0 * math.pi * _HOP / data.RATE_HZ * hz * share
        back = 2.0 * math.pi * _HOP / data.RATE_HZ * hz * (share - 1.0)
        on, before = (turning[..., :1] * a.cos() - turning[..., 1:] * a.sin() for a in (turn, back))
        return pitch[:, :-1], on[:, :-1] * (1.0 - share) + before[:, 1:] * share

    def forward(self, samples: Tensor) -> Tensor:
        """All of ``samples`` [B, N] as [B, T, F]: the kinds one after the other, in each column after column."""
        kinds = (self.pictures(samples), *self.voice(samples))
        return torch.cat([kind.reshape(len(samples), -1, COLUMNS * kind.shape[-1]) for kind in kinds], -1)


class Latents(nn.Module):
    """What the acoustic latent of a frame is to be, once `fit` has seen enough frames: kinds as loud as SHARES say,
    turned to their principal axes."""

    mean: Tensor
    gain: Tensor
    axes: Tensor
    spread: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = Features()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("gain", torch.ones(WIDTH))
        self.register_buffer("axes", torch.eye(WIDTH, width))
        self.register_buffer("spread", torch.ones(width))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> float:
        """Takes means, gains and axes from many ``batches`` of samples; the share of all variance they explain."""
        count, total = 0, self.mean.double() * 0.0
        moments = total.new_zeros(WIDTH, WIDTH)
        for samples in batches:
            found = self.features(samples).flatten(0, 1).double()
            count, total, moments = count + len(found), total + found.sum(0), moments + found.T @ found
        mean = total / count
        scatter = moments / count - mean[:, None] * mean
        gain, at = [], 0
        for kind, width in WIDTHS.items():
            power = scatter.diagonal()[at : at + width].sum()
            gain.append((SHARES[kind] / power).sqrt().expand(width))
            at += width
        gains = torch.cat(gain)
        power, axes = torch.linalg.eigh(scatter * gains[:, None] * gains)
        n = self.axes.shape[1]
        power, axes = power.flip(0), axes.flip(1)[:, :n]
        self.mean.copy_(mean)
        self.gain.copy_(gains)
        self.axes.copy_(axes)
        self.spread.copy_(power[:n].sqrt())
        return float(power[:n].sum() / power.sum())

    def normal(self, features: Tensor) -> Tensor:
        """``features`` [B, T, F] about their means, as loud as they count."""
        return (features - self.mean) * self.gain

    def forward(self, features: Tensor) -> Tensor:
        """The latents [B, T, D] of ``features`` [B, T, F]."""
        out: Tensor = self.normal(features) @ self.axes
        return out

    def steady(self) -> Tensor:
        """The projection [D, D] of latents on those of their directions that tell nothing of the hum."""
        hum = self.axes[-WIDTHS["hum"] :]
        share, directions = torch.linalg.eigh(hum.T @ hum)
        kept = directions[:, share < 0.5]
        found: Tensor = kept @ kept.T
        return found

    def told(self, latents: Tensor, features: Tensor) -> dict[str, float]:
        """The share of the power of every kind of ``features`` that is read linearly off ``latents``."""
        wanted, at = self.normal(features), 0
        missed, shares = wanted - latents @ self.axes.T, {}
        for kind, width in WIDTHS.items():
            part = slice(at, at + width)
            shares[kind] = 1.0 - float(missed[..., part].square().sum() / wanted[..., part].square().sum())
            at += width
        return shares


def by_column(features: Tensor, n: int) -> Tensor:
    """``features`` [B, T, F] as [B, n T, F / n], each of ``n`` parts of a frame with its own columns of every kind."""
    kinds = torch.split(features, list(WIDTHS.values()), -1)
    return torch.cat([kind.reshape(len(features), -1, kind.shape[-1] // n) for kind in kinds], -1)


def _autocorrelation(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, _N_LAGS)
    found: Tensor = torch.fft.irfft(torch.view_as_real(spectrum).square().sum(-1), _N_LAGS)
    return found[..., : _N_LAGS // 2]

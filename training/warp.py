"""Other throats for synthesized clips, and their last steps, batched on any device: resample, warp, trim and level.

Shapes: B clips, N samples at 24 kHz, M samples that come out, K gains, F bins and T frames of a Fourier transform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import RATE_HZ
from training.recipe import SAMPLES_PER_FRAME as FRAME

_FFT, _HOP = 1024, 256
_LIFTER_S = 1.6e-3
"""What varies faster along the frequency axis is pitch (up to 350 Hz), not the throat."""
_ENVELOPES = 3
"""How often the envelope is lifted to the peaks between which it fell."""
_BEND_HZ, _BEND = 1500.0, 0.08
_COLOUR_HZ = (100.0, 10_000.0)
_LIMIT_DB = 24.0
_TAPS = 32
_ROUND = 4 * FRAME
"""Lengths are rounded up to this many samples, so that few shapes occur."""
_STEP = RATE_HZ // 100


def resampled(samples: Tensor, pitch: Sequence[float]) -> Tensor:
    """[B, M]: each row of ``samples`` [B, N] ``pitch`` times as high and as fast, zeros behind (a windowed sinc)."""
    n, device = samples.shape[1], samples.device
    if all(p == 1.0 for p in pitch):
        return samples
    n_to = math.ceil(n / min(pitch) / _ROUND) * _ROUND
    step = torch.tensor(pitch, dtype=torch.float64).to(device)[:, None]
    place = torch.arange(n_to, device=device, dtype=torch.float64) * step
    first = place.floor()
    share = (place - first).float()
    index = first.long().clamp(max=n + _TAPS // 2)
    padded = F.pad(samples, (_TAPS // 2 - 1, _TAPS + 1))
    cutoff = (1.0 / step).clamp(max=1.0).float()
    out = torch.zeros_like(share)
    # One tap after the other: all at once would need 32 times the memory.
    for tap in range(_TAPS):
        off = (tap - _TAPS // 2 + 1) - share
        kernel = torch.sinc(off * cutoff) * torch.cos(off * (math.pi / _TAPS)).square()
        out.addcmul_(padded.gather(1, index + tap), kernel)
    return out * cutoff


def _mel(hz: Tensor) -> Tensor:
    return torch.log1p(hz / 700.0)


def knots(count: int) -> Tensor:
    """[K]: the frequencies in Hz of the gains of a colour."""
    low, high = _mel(torch.tensor(_COLOUR_HZ)).tolist()
    return torch.expm1(torch.linspace(low, high, count)) * 700.0


def _colour_db(colour: Tensor, hz: Tensor) -> Tensor:
    """[B, F]: the gains ``colour`` [B, K] at ``hz`` [F], smooth in log frequency and level beyond the knots."""
    at = knots(colour.shape[1]).to(hz.device).log()
    place = hz.clamp(min=1.0).log().clamp(at[0], at[-1])
    right = torch.searchsorted(at, place).clamp(1, len(at) - 1)
    share = (place - at[right - 1]) / (at[right] - at[right - 1])
    share = share * share * (3.0 - 2.0 * share)
    return colour[:, right - 1] * (1.0 - share) + colour[:, right] * share


def _source_bins(formant: Tensor, bend: Tensor, hz: Tensor) -> Tensor:
    """[B, F]: the bin of the old envelope that comes to lie at ``hz`` [F], within the old bins."""
    source = hz / formant[:, None]
    bump = torch.exp(-0.5 * ((source.clamp(min=1.0) / _BEND_HZ).log() / 0.6).square())
    source = source * (1.0 - _BEND * bend[:, None] * bump)
    return (source * (_FFT / RATE_HZ)).clamp(0, _FFT // 2)


def _smooth(logs: Tensor) -> Tensor:
    """``logs`` [B, T, F] without what varies fast along F."""
    quefrency = torch.arange(_FFT // 2 + 1, device=logs.device) / RATE_HZ
    # Whole up to three quarters of the cutoff, nothing from five quarters on.
    place = ((quefrency / _LIFTER_S - 0.75) / 0.5).clamp(0.0, 1.0)
    lifter = 0.5 + 0.5 * torch.cos(math.pi * place)
    cepstrum = torch.fft.irfft(logs, n=_FFT)
    cepstrum = cepstrum * torch.cat([lifter, lifter[1:-1].flip(0)])
    smooth: Tensor = torch.fft.rfft(cepstrum, n=_FFT).real
    return smooth


def envelope(magnitude: Tensor) -> Tensor:
    """[B, T, F]: the natural logarithm of the spectral envelope of ``magnitude`` [B, T, F]."""
    floor = 1e-4 * magnitude.amax((1, 2), keepdim=True) + 1e-9
    logs = torch.maximum(magnitude, floor).log()
    smooth = _smooth(logs)
    for _ in range(_ENVELOPES):
        smooth = _smooth(torch.maximum(logs, smooth))
    return smooth


def _overlapped(frames: Tensor) -> Tensor:
    """[B, 256 (T + 3)]: the sum of ``frames`` [B, T, 1024], each 256 samples after the one before."""
    n_frames, overlap = frames.shape[1], _FFT // _HOP
    out = frames.new_zeros(frames.shape[0], n_frames + overlap - 1, _HOP)
    for i, part in enumerate(frames.chunk(overlap, 2)):
        out[:, i : i + n_frames] += part
    return out.flatten(1)


def warped(samples: Tensor, formant: Tensor, bend: Tensor, colour: Tensor) -> Tensor:
    """[B, N]: ``samples`` [B, N] from another throat; the pitch stays.

    ``formant`` [B] stretches the spectral envelope in frequency, ``bend`` [B] from -1 to 1 moves the region about
    1.5 kHz by up to 8 %, ``colour`` [B, K] are gains in dB at the knots. 1, 0 and zeros change nothing.
    """
    n, window = samples.shape[1], torch.hann_window(_FFT, device=samples.device)
    spectrum = torch.stft(samples, _FFT, _HOP, window=window, return_complex=True, pad_mode="constant")
    spectrum = spectrum.transpose(1, 2)
    old = envelope(spectrum.abs())
    hz = torch.arange(_FFT // 2 + 1, device=samples.device) * (RATE_HZ / _FFT)
    place = _source_bins(formant, bend, hz)[:, None].expand_as(old)
    low = place.floor().clamp(max=_FFT // 2 - 1)
    new = torch.lerp(old.gather(2, low.long()), old.gather(2, low.long() + 1), place - low)
    limit = _LIMIT_DB * math.log(10) / 20
    gain = new - old + _colour_db(colour, hz)[:, None] * (math.log(10) / 20)
    frames = torch.fft.irfft(spectrum * gain.clamp(-limit, limit).exp(), n=_FFT) * window
    # Not torch.istft: it waits for the device to see whether the windows overlap.
    total = _overlapped(window.square().expand(1, frames.shape[1], -1))
    middle = slice(_FFT // 2, _FFT // 2 + n)
    return _overlapped(frames)[:, middle] / total[:, middle]


def finished(samples: Tensor, lengths: Tensor, lead: Tensor) -> tuple[Tensor, Tensor]:
    """int16 [B, M] and the whole frames [B] of each row: trimmed, levelled clips.

    Speech is looked for in the first ``lengths`` [B] samples of ``samples`` [B, N]; ``lead`` [B] samples stay before
    it, 160 to 240 ms behind. A row that is silent or not finite has no frames.
    """
    batch, n = samples.shape
    sound = samples.isfinite().all(1)
    samples = samples.nan_to_num(0.0, 0.0, 0.0)
    steps = n // _STEP
    place = torch.arange(steps, device=samples.device)
    valid = place < (lengths // _STEP)[:, None]
    power = samples[:, : steps * _STEP].view(batch, steps, _STEP).square().mean(2) * valid
    # The quantile of the valid steps: those beyond are sorted behind them.
    ranked = power.masked_fill(~valid, math.inf).sort(1).values
    rank = 0.95 * (valid.sum(1, keepdim=True) - 1).clamp(min=0)
    low, high = (ranked.gather(1, at.long()) for at in (rank.floor(), rank.ceil()))
    loudest = torch.lerp(low, high, (rank - rank.floor()).to(low.dtype))
    heard = (power > (1e-4 * loudest).clamp(min=1e-7)) & valid
    first = heard.int().argmax(1)
    last = steps - 1 - heard.int().flip(1).argmax(1)
    begin = first * _STEP - lead
    n_frames = (((last + 1) * _STEP + int(RATE_HZ * 0.16) - begin) + FRAME - 1) // FRAME
    n_frames = n_frames * (sound & (heard.sum(1) >= 20))
    n_to = (n + 2 * int(RATE_HZ * 0.16)) // FRAME * FRAME + FRAME
    at = torch.arange(n_to, device=samples.device)
    index = begin[:, None] + at
    inside = (index >= 0) & (index < n) & (at < (n_frames * FRAME)[:, None])
    clip = samples.gather(1, index.clamp(0, n - 1)) * inside
    # Halfway (in decibels) to one loudness: what is left of the difference is part of the speaker.
    loud = power > 0.02 * power.amax(1, keepdim=True)
    level = ((power * loud).sum(1) / loud.sum(1).clamp(min=1)).clamp(min=1e-12).sqrt()
    gain = torch.minimum((0.09 / level).sqrt(), 0.95 / clip.abs().amax(1).clamp(min=1e-9))
    return (clip * (gain * 32767.0)[:, None]).round().to(torch.int16), n_frames

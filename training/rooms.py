"""Clean speech as a microphone might have it, drawn on the device without a copy to the host. B batch, N samples."""

from __future__ import annotations

import torch
from torch import Tensor

from training import data

_TAIL_S = 1 / 3


def recorded(clean: Tensor, colour_db: float = 0.0) -> Tensor:
    """``clean`` [B, N] as loud as it was, in a room and by a line of its own for each row.

    Three of ten lose what is above 6 to 8 kHz, three of ten have a tail that falls by 60 dB within 0.08 to 0.38 s, all
    have white noise 16 to 60 dB below the speech; up to ``colour_db`` / 2 are added or taken away for every octave.
    """
    device, (n, n_samples) = clean.device, clean.shape
    uniform = torch.rand(6, n, 1, device=device)
    n_tail = int(_TAIL_S * data.RATE_HZ)
    n_fft = n_samples + n_tail
    hz = torch.linspace(0.0, data.RATE_HZ / 2, n_fft // 2 + 1, device=device)
    tilt_db = colour_db * (uniform[0] - 0.5) * (hz.clamp(min=100.0) / 1000.0).log2()
    edge_hz = torch.where(uniform[1] < 0.3, 6000.0 + 2000.0 * uniform[2], 1e6)
    gain = 10.0 ** (tilt_db / 20.0) * torch.sigmoid((edge_hz - hz) / 80.0)
    seconds = torch.arange(n_tail, device=device) / data.RATE_HZ
    tail = torch.randn(n, n_tail, device=device) * torch.exp(-6.9 * seconds / (0.08 + 0.3 * uniform[3]))
    loud = torch.where(uniform[4] < 0.3, 0.6 * uniform[4] / 0.3, 0.0)
    tail = tail * loud / (tail.square().sum(1, keepdim=True) + 1e-6).sqrt()
    size = (clean.square().mean(1, keepdim=True) + 1e-8).sqrt()
    spectrum = torch.fft.rfft(clean / size, n=n_fft) * gain * (1.0 + torch.fft.rfft(tail, n=n_fft))
    x = torch.fft.irfft(spectrum, n=n_fft)[:, :n_samples]
    x = x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt()
    out: Tensor = size * (x + 10.0 ** (-3.0 + 2.2 * uniform[5]) * torch.randn_like(x))
    return out

"""How a frame sounds, as the codec's acoustic latent is to tell it: the log-mel picture of its 80 ms.

Trained on the decoder's error alone, sixteen codebooks carried what three can, a dozen dimensions of that picture
(docs/VOICE.md). So the acoustic latent is given the picture's principal components to tell, each as large as it varies.

Shapes: B batch, N samples, T frames, K components.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import recipe
from training.losses import mel_filters

_WINDOW, _HOP, _MELS = 1024, 240, 64
COLUMNS = recipe.SAMPLES_PER_FRAME // _HOP
"""Spectra in a frame, each about its start."""
WIDTH = COLUMNS * _MELS
"""The values of a picture."""


class Patches(nn.Module):
    """Pictures of frames, and their principal components once `fit` has seen enough of them."""

    window: Tensor
    filters: Tensor
    mean: Tensor
    axes: Tensor
    scale: Tensor

    def __init__(self, n_components: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_WINDOW))
        self.register_buffer("filters", mel_filters(_WINDOW, _MELS))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("axes", torch.eye(WIDTH, n_components))
        self.register_buffer("scale", torch.ones(()))

    def pictures(self, samples: Tensor) -> Tensor:
        """The log-mel pictures [B, T, WIDTH] of ``samples`` [B, N], N = 1920 T."""
        around = F.pad(samples.float(), (_WINDOW // 2, _WINDOW // 2 - _HOP))
        spectrum = torch.stft(around, _WINDOW, _HOP, window=self.window, center=False, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1)
        mel = (self.filters @ (power + 1e-9).sqrt() + 1e-4).log()
        return mel.transpose(1, 2).reshape(len(samples), -1, WIDTH)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> float:
        """Takes mean and principal axes from many ``batches`` of samples; the share of all variance they explain."""
        count, total = 0, self.mean.double() * 0.0
        moments = total.new_zeros(WIDTH, WIDTH)
        for samples in batches:
            found = self.pictures(samples).flatten(0, 1).double()
            count, total, moments = count + len(found), total + found.sum(0), moments + found.T @ found
        mean = total / count
        power, axes = torch.linalg.eigh(moments / count - mean[:, None] * mean)
        n = self.axes.shape[1]
        power, axes = power.flip(0), axes.flip(1)[:, :n]
        self.mean.copy_(mean)
        self.axes.copy_(axes)
        self.scale.copy_(power[:n].mean().sqrt())
        return float(power[:n].sum() / power.sum())

    def components(self, pictures: Tensor) -> Tensor:
        """The principal components [B, T, K] of ``pictures`` [B, T, WIDTH]; their mean square is 1."""
        out: Tensor = (pictures - self.mean) @ self.axes / self.scale
        return out

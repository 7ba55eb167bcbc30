"""The activation between the codec's convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SnakeBeta(nn.Module):
    """x + sin²(e^alpha x) / e^beta, one alpha and beta a channel (Ziyin et al. 2020; Lee et al. 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self._kept: tuple[object, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, memory: object = None) -> Tensor:
        """The wave of ``x`` [B, C, L], each step by itself: nothing is remembered."""
        frequency, height = self._waves()
        wave = torch.sin(x * frequency)
        return torch.addcmul(x, wave * wave, height)

    def _waves(self) -> tuple[Tensor, Tensor]:
        """Frequency and height [C, 1]: kept where nobody trains them, since a push is hundreds of such small steps."""
        if self.alpha.requires_grad or self.beta.requires_grad:
            return self._worked_out()
        state = tuple((one.data_ptr(), one.dtype, one.device, _version(one)) for one in (self.alpha, self.beta))
        if self._kept is None or self._kept[0] != state:
            # What is kept outlives whatever mode this is called in.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (state, self._worked_out())
        return self._kept[1]

    def _worked_out(self) -> tuple[Tensor, Tensor]:
        return self.alpha.exp()[:, None], 1.0 / (self.beta.exp() + 1e-9)[:, None]


def _version(tensor: Tensor) -> int:
    """How often ``tensor`` was written to, as far as that is counted."""
    return 0 if tensor.is_inference() else tensor._version

"""The speaker encoder: what a voice sounds like, as one vector (the x-vector of a clone).

An ECAPA-TDNN (Desplanques et al. 2020, arXiv:2005.07143) over log-mel frames of 24 kHz speech. Shapes: B batch,
N samples, T mel frames (one every 256 samples), C channels. Parameter names are the checkpoint's
``speaker_encoder.*``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.audio import Audio, resample
from quaver.config import SpeakerConfig
from quaver.errors import AudioError, CheckpointError

SAMPLE_RATE_HZ = 24000
N_MELS = 128
N_FFT = 1024
HOP = 256
MAX_HZ = 12000.0
_PADDING = (N_FFT - HOP) // 2
_POWER_FLOOR = 1e-9
_LOG_FLOOR = 1e-5
_VARIANCE_FLOOR = 1e-12


def mel_filterbank() -> np.ndarray:
    """The triangular mel filters [128, 513] float32, each of unit area over frequency in Hz.

    The scale is that of Slaney's Auditory Toolbox (1998): linear up to 1 kHz, 200/3 Hz a step, logarithmic above,
    27 steps for a factor of 6.4.
    """
    knee_hz, linear_hz, log_step = 1000.0, 200.0 / 3.0, math.log(6.4) / 27.0
    knee = knee_hz / linear_hz
    top = knee + math.log(MAX_HZ / knee_hz) / log_step
    steps = np.linspace(0.0, top, N_MELS + 2)
    edges_hz = np.where(steps < knee, steps * linear_hz, knee_hz * np.exp(log_step * (steps - knee)))
    bins_hz = np.linspace(0.0, SAMPLE_RATE_HZ / 2, N_FFT // 2 + 1)
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    triangles = np.minimum((bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre))
    filters: np.ndarray = (np.maximum(triangles, 0.0) * (2.0 / (high - low))).astype(np.float32)
    return filters


@lru_cache(maxsize=8)
def _analysis(device: torch.device) -> tuple[Tensor, Tensor]:
    """The Hann window [1024] and the mel filters [128, 513] on ``device``."""
    # A constant first made under inference_mode could never take part in training later.
    with torch.inference_mode(False):
        window = torch.hann_window(N_FFT)
        return window.to(device), torch.from_numpy(mel_filterbank()).to(device)


def mel(samples: Tensor) -> Tensor:
    """Log-mel frames [B, T, 128] float32 of 24 kHz ``samples`` [B, N] in -1..1; T = N // 256.

    Differentiable. The constants are cached per device, so one call before a CUDA graph's capture suffices.
    Raises AudioError for 384 samples or fewer.
    """
    n_samples = samples.shape[-1]
    if n_samples <= _PADDING:
        raise AudioError(f"{n_samples} samples are too few for the speaker encoder: give at least 0.5 s of speech")
    window, filters = _analysis(samples.device)
    padded = F.pad(samples.float().unsqueeze(1), (_PADDING, _PADDING), mode="reflect").squeeze(1)
    spectrum = torch.stft(padded, N_FFT, hop_length=HOP, window=window, center=False, return_complex=True)
    magnitude = torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + _POWER_FLOOR)
    return torch.log((filters @ magnitude).clamp(min=_LOG_FLOOR)).transpose(1, 2)


class SpeakerEncoder(nn.Module):
    """Log-mel frames [B, T, 128] to speaker vectors [B, enc_dim].

    Raises CheckpointError for widths that do not fit together.
    """

    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        _check(config)
        channels, kernels, dilations = config.enc_channels, config.enc_kernel_sizes, config.enc_dilations
        first = _TimeDelay(config.mel_dim, channels[0], kernels[0], dilations[0])
        middle = (
            _SqueezedRes2Net(channels[i], kernels[i], dilations[i], config.enc_res2net_scale, config.enc_se_channels)
            for i in range(1, len(channels) - 1)
        )
        self.blocks = nn.ModuleList([first, *middle])
        self.mfa = _TimeDelay(channels[-1], channels[-1], kernels[-1], dilations[-1])
        self.asp = _AttentivePooling(channels[-1], config.enc_attention_channels)
        self.fc = nn.Conv1d(2 * channels[-1], config.enc_dim, 1)
        self.min_frames = 1 + max(d * (k - 1) - d * (k - 1) // 2 for k, d in zip(kernels, dilations, strict=True))

    def forward(self, mel: Tensor) -> Tensor:
        """Speaker vectors [B, enc_dim] of ``mel`` [B, T, 128], in the dtype of the weights.

        Raises AudioError for fewer frames than the widest convolution reaches over.
        """
        if mel.shape[1] < self.min_frames:
            raise AudioError(
                f"{mel.shape[1]} mel frames are too few for the speaker encoder, which needs {self.min_frames}"
            )
        hidden = mel.to(self.fc.weight.dtype).transpose(1, 2)
        outputs = []
        for block in self.blocks:
            hidden = block(hidden)
            outputs.append(hidden)
        pooled = self.asp(self.mfa(torch.cat(outputs[1:], dim=1)))
        vectors: Tensor = self.fc(pooled.unsqueeze(2)).squeeze(2)
        return vectors

    def embed(self, samples: Tensor) -> Tensor:
        """Speaker vectors [B, enc_dim] of 24 kHz ``samples`` [B, N] in -1..1. Raises AudioError when too short."""
        vectors: Tensor = self(mel(samples))
        return vectors

    @torch.inference_mode()
    def vector(self, audio: Audio) -> Tensor:
        """The speaker vector [enc_dim], float32 on the CPU, of any sound. Raises AudioError when too short."""
        weight = self.fc.weight
        samples = torch.from_numpy(resample(audio, SAMPLE_RATE_HZ).samples)[None].to(weight.device)
        found: Tensor = self(mel(samples).to(weight.dtype))[0]
        return found.float().cpu()


class _TimeDelay(nn.Module):
    """A convolution over time of unchanged length, its ends mirrored, and a ReLU."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(n_in, n_out, kernel, dilation=dilation, padding="same", padding_mode="reflect")

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(self.conv(hidden))


class _Res2Net(nn.Module):
    """Channel groups in a ladder: each but the first is convolved after adding the one before it."""

    def __init__(self, n_channels: int, kernel: int, dilation: int, scale: int) -> None:
        super().__init__()
        width = n_channels // scale
        self.blocks = nn.ModuleList(_TimeDelay(width, width, kernel, dilation) for _ in range(scale - 1))

    def forward(self, hidden: Tensor) -> Tensor:
        first, *rest = hidden.chunk(len(self.blocks) + 1, dim=1)
        outputs = [first]
        for i, (block, group) in enumerate(zip(self.blocks, rest, strict=True)):
            outputs.append(block(group if i == 0 else group + outputs[-1]))
        return torch.cat(outputs, dim=1)


class _SqueezeExcitation(nn.Module):
    """Each channel scaled by a gate in 0..1 that sees every channel's mean over time."""

    def __init__(self, n_channels: int, n_squeezed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(n_channels, n_squeezed, 1)
        self.conv2 = nn.Conv1d(n_squeezed, n_channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = torch.sigmoid(self.conv2(F.relu(self.conv1(hidden.mean(dim=2, keepdim=True)))))
        return hidden * gate


class _SqueezedRes2Net(nn.Module):
    """ECAPA-TDNN's block: TDNN, Res2Net, TDNN, squeeze-excitation, around a shortcut."""

    def __init__(self, n_channels: int, kernel: int, dilation: int, scale: int, n_squeezed: int) -> None:
        super().__init__()
        self.tdnn1 = _TimeDelay(n_channels, n_channels, 1, 1)
        self.res2net_block = _Res2Net(n_channels, kernel, dilation, scale)
        self.tdnn2 = _TimeDelay(n_channels, n_channels, 1, 1)
        self.se_block = _SqueezeExcitation(n_channels, n_squeezed)

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(hidden))))
        return changed + hidden


class _AttentivePooling(nn.Module):
    """Means and deviations over time [B, 2C], each channel weighing the frames by its own attention."""

    def __init__(self, n_channels: int, n_attention: int) -> None:
        super().__init__()
        self.tdnn = _TimeDelay(3 * n_channels, n_attention, 1, 1)
        self.conv = nn.Conv1d(n_attention, n_channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        n_frames = hidden.shape[2]
        flat = hidden.new_full((1, 1, n_frames), 1.0 / n_frames)
        context = [statistic.unsqueeze(2).expand_as(hidden) for statistic in _statistics(hidden, flat)]
        scores = self.conv(torch.tanh(self.tdnn(torch.cat([hidden, *context], dim=1))))
        return torch.cat(_statistics(hidden, scores.softmax(dim=2)), dim=1)


def _statistics(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over time, each [B, C], under ``weight`` that sums to 1 over time."""
    mean = (weight * hidden).sum(2)
    variance = (weight * (hidden - mean.unsqueeze(2)).square()).sum(2)
    return mean, variance.clamp(min=_VARIANCE_FLOOR).sqrt()


def _check(config: SpeakerConfig) -> None:
    """Raises CheckpointError unless the encoder of ``config`` can be built and fed by :func:`mel`."""
    channels = config.enc_channels
    if (config.sample_rate, config.mel_dim) != (SAMPLE_RATE_HZ, N_MELS):
        raise CheckpointError(
            f"speaker_encoder_config: {config.mel_dim} mels at {config.sample_rate} Hz; "
            f"quaver implements {N_MELS} mels at {SAMPLE_RATE_HZ} Hz only"
        )
    if len(channels) < 3 or not len(channels) == len(config.enc_kernel_sizes) == len(config.enc_dilations):
        raise CheckpointError(
            "speaker_encoder_config: enc_channels, enc_kernel_sizes and enc_dilations need one entry a layer, 3 or more"
        )
    if len(set(channels[:-1])) > 1 or channels[0] % config.enc_res2net_scale:
        raise CheckpointError(
            "speaker_encoder_config: enc_channels must agree in all but the last layer "
            f"and divide by enc_res2net_scale ({config.enc_res2net_scale}), not {list(channels)}"
        )
    if channels[-1] != sum(channels[1:-1]):
        raise CheckpointError(
            f"speaker_encoder_config: the last of enc_channels must be the sum of the middle ones, "
            f"{sum(channels[1:-1])}, not {channels[-1]}"
        )

"""Everything the codec hears, on the device in whole frames, and random crops of it.

Crops are drawn without a copy to the host and with fixed shapes: a CUDA graph may hold the drawing. Shapes: B batch,
F frames of the pool, N = 1920 T samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import data, recipe, shards

_SLOWEST, _FASTEST = 0.8, 1.25
_TAPS = 32


@dataclass(frozen=True, slots=True)
class Recording:
    """One clip: its voice, its samples (int16, whole frames), and which frame of the encoded sets is its first."""

    voice: str
    samples: np.ndarray
    first: int = 0


def chosen(folders: Iterable[Path], hours: float = math.inf) -> list[tuple[int, int, shards.Spoken]]:
    """Clips of sets, of each speaker in turn one more, until there are so many ``hours``: which clip of all it is,
    which frame of all is its first (as `training.encode` joins them), and the clip."""
    by_speaker: dict[str, list[tuple[int, int, shards.Spoken]]] = {}
    first = 0
    for i, clip in enumerate(clip for folder in folders for clip in shards.spoken(folder)):
        by_speaker.setdefault(clip.speaker, []).append((i, first, clip))
        first += clip.n_frames
    turns = max(map(len, by_speaker.values()), default=0)
    in_turn = (clips[turn] for turn in range(turns) for clips in by_speaker.values() if turn < len(clips))
    found, n_left = list[tuple[int, int, shards.Spoken]](), hours * 3600 * data.RATE_HZ / recipe.SAMPLES_PER_FRAME
    for placed in in_turn:
        n_left -= placed[2].n_frames
        if n_left < 0:
            break
        found.append(placed)
    return found


def from_sets(folders: Iterable[Path], hours: float = math.inf) -> list[Recording]:
    """The clips that `chosen` finds, read."""
    return [Recording(clip.speaker, clip.read(), first) for _, first, clip in chosen(folders, hours)]


class Pool:
    """Recordings one after the other, voice by voice; every voice is drawn equally often, however much it says.

    Raises ValueError where there are none.
    """

    def __init__(self, recordings: Iterable[Recording], device: torch.device) -> None:
        ordered = sorted(recordings, key=lambda r: r.voice)
        if not ordered:
            raise ValueError("a pool without recordings")
        counts = [len(list(group)) for _, group in groupby(ordered, lambda r: r.voice)]
        lengths = [len(r.samples) // recipe.SAMPLES_PER_FRAME for r in ordered]
        starts = np.cumsum([0, *lengths])[:-1]
        self.samples = torch.from_numpy(np.concatenate([r.samples for r in ordered])).to(device)
        places = [np.arange(r.first, r.first + n, dtype=np.int32) for r, n in zip(ordered, lengths, strict=True)]
        self.frames = torch.from_numpy(np.concatenate(places)).to(device)
        self.starts = torch.from_numpy(starts).to(device)
        self.counts = torch.tensor(counts, device=device)
        self.firsts = self.counts.cumsum(0) - self.counts
        hours = len(self.samples) / data.RATE_HZ / 3600
        self.described = f"{len(ordered)} clips, {hours:.2f} h, {len(counts)} voices"

    def draw(self, batch: int, n_frames: int, changed: float) -> Tensor:
        """Crops [B, N] of ``n_frames``, a share ``changed`` of them slower or faster (and so lower or higher).

        Half begin where a clip begins, half at a frame up to two seconds later. All differ in loudness; half as many
        as are changed in speed are tilted in spectrum, a quarter lose what is above 8 kHz, a quarter get noise.
        """
        device = self.samples.device

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(batch, 1, device=device).uniform_(low, high)

        def some(share: float, these: Tensor, those: float) -> Tensor:
            return torch.where(uniform(0.0, 1.0) < share, these, torch.full_like(these, those))

        start = self._starts(batch, n_frames)
        speed = some(changed, uniform(math.log(_SLOWEST), math.log(_FASTEST)).exp(), 1.0)
        cutoff = some(changed / 4, uniform(0.62, 0.68), 1.0).minimum(1.0 / speed).clamp(max=1.0)
        samples = self._resampled(start * recipe.SAMPLES_PER_FRAME, n_frames, speed, cutoff)
        tilt = some(changed / 2, uniform(-0.4, 0.6), 0.0)
        before = torch.nn.functional.pad(samples[:, :-1], (1, 0))
        samples = (samples + tilt * before) * (1.0 + tilt.square()).rsqrt() * uniform(0.6, 1.25)
        noise = some(changed / 4, 10.0 ** uniform(-4.0, -2.5), 0.0)
        return (samples + noise * torch.randn_like(samples)).clamp(-1.0, 1.0)

    def draw_as_said(self, batch: int, n_frames: int) -> tuple[Tensor, Tensor]:
        """Crops [B, N] as they were recorded, and which frames of the encoded sets they are [B, n_frames]."""
        frame = self._starts(batch, n_frames) + torch.arange(n_frames, device=self.samples.device)
        sample = torch.arange(recipe.SAMPLES_PER_FRAME, device=self.samples.device)
        samples = self.samples[frame[..., None] * recipe.SAMPLES_PER_FRAME + sample].flatten(1)
        return samples.float() / 32767.0, self.frames[frame].long()

    def _starts(self, batch: int, n_frames: int) -> Tensor:
        """The first frame [B, 1] of crops of random voices."""
        device = self.samples.device
        voice = torch.randint(len(self.counts), (batch,), device=device)
        clip = (torch.rand(batch, device=device) * self.counts[voice]).long()
        clip = self.firsts[voice] + torch.minimum(clip, self.counts[voice] - 1)
        later = torch.randint(25, (batch,), device=device) * torch.randint(2, (batch,), device=device)
        n_whole = len(self.samples) // recipe.SAMPLES_PER_FRAME
        last = max(0, n_whole - math.ceil(n_frames * _FASTEST) - 2)
        return (self.starts[clip] + later).clamp(max=last)[:, None]

    def _resampled(self, start: Tensor, n_frames: int, speed: Tensor, cutoff: Tensor) -> Tensor:
        """[B, N] from sample ``start`` [B, 1] on, at ``speed`` and below ``cutoff`` (1 = 12 kHz): a windowed sinc."""
        device = start.device
        place = torch.arange(n_frames * recipe.SAMPLES_PER_FRAME, device=device, dtype=torch.float64) * speed
        whole = place.floor()
        taps = torch.arange(1 - _TAPS // 2, 1 + _TAPS // 2, device=device)
        index = (start + whole.long())[..., None] + taps
        values = self.samples[index.clamp(0, len(self.samples) - 1)].float() / 32767.0
        off = taps - (place - whole).float()[..., None]
        kernel = torch.sinc(off * cutoff[..., None]) * cutoff[..., None]
        kernel = kernel * torch.cos(math.pi / _TAPS * off).square()
        return (values * kernel).sum(-1)

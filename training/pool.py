"""Everything the codec hears, on the device in whole frames, and random crops of it with what is said in them.

Crops are drawn without a copy to the host and with fixed shapes: a CUDA graph may hold the drawing. Shapes: B batch,
F frames of the pool, T frames of a crop, K target dimensions, N = 1920 T samples.
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

from training import data, phonetic, recipe, shards

_SLOWEST, _FASTEST = 0.8, 1.25
_TAPS = 32
_SLOTS = 8192


@dataclass(frozen=True, slots=True)
class Recording:
    """One clip: its voice, its samples (int16, whole frames) and its targets (float16 [frames, K]) where known."""

    voice: str
    samples: np.ndarray
    targets: Tensor | None = None


def from_corpus(folder: Path, n_clips: int | None = None) -> list[Recording]:
    """The clips of the folder that `training.phonetic distil` wrote, with their targets."""
    targets = phonetic.read(folder, "train")
    clips, ends = targets.clips[:n_clips], [*targets.starts[1:], len(targets.values)]
    found = []
    for clip, samples, start, end in zip(clips, data.read_clips(folder, clips), targets.starts, ends, strict=False):
        padded = np.pad(samples, (0, -len(samples) % recipe.SAMPLES_PER_FRAME))
        whole = (padded * 32767.0).clip(-32768, 32767).astype(np.int16)
        found.append(Recording(clip.voice, whole, targets.values[start:end]))
    return found


def from_set(folder: Path) -> list[Recording]:
    """The clips of a synthesized set, without targets."""
    return [Recording(clip.speaker, clip.read()) for clip in shards.spoken(folder)]


@dataclass(frozen=True, slots=True)
class Crops:
    """A batch of crops."""

    samples: Tensor
    """[B, N] within -1 and 1."""
    targets: Tensor
    """[B, T, K]"""
    known: Tensor
    """[B, T]: 1 where there are targets, 0 elsewhere."""


class Pool:
    """Recordings one after the other, voice by voice. Every voice is drawn equally often, however much it says; half of
    all draws are of recordings with targets, where there are both kinds.

    A pool for ``n_frames`` can be filled again with as many while a CUDA graph draws from it.
    """

    def __init__(self, recordings: Iterable[Recording], device: torch.device, n_frames: int | None = None) -> None:
        known = list(recordings)
        size = n_frames or sum(len(r.samples) for r in known) // recipe.SAMPLES_PER_FRAME
        width = max((r.targets.shape[1] for r in known if r.targets is not None), default=1)
        self.samples = torch.zeros(size * recipe.SAMPLES_PER_FRAME, dtype=torch.int16, device=device)
        self.values = torch.zeros(size, width, dtype=torch.float16, device=device)
        self.known = torch.zeros(size, device=device)
        self.starts = torch.zeros(size, dtype=torch.long, device=device)
        self.power = torch.ones((), device=device)
        """The mean square of a frame's targets, summed over K."""
        self.end = torch.zeros((), dtype=torch.long, device=device)
        """How many frames are filled."""
        self.counts, self.firsts = (torch.ones(_SLOTS, dtype=torch.long, device=device) for _ in range(2))
        self.described = ""
        self.fill(known)

    def fill(self, recordings: Iterable[Recording]) -> None:
        """Puts ``recordings`` in the place of all there are, as many as there is room for, those with targets first."""
        chosen, n_left = list[Recording](), len(self.values)
        for recording in sorted(recordings, key=lambda r: r.targets is None):
            n = len(recording.samples) // recipe.SAMPLES_PER_FRAME
            if n <= n_left:
                chosen.append(recording)
                n_left -= n
        if not chosen:
            raise ValueError("a pool without recordings")
        chosen.sort(key=lambda r: (r.targets is None, r.voice))
        starts = np.cumsum([0, *(len(r.samples) // recipe.SAMPLES_PER_FRAME for r in chosen)])
        values, known = torch.zeros(starts[-1], self.values.shape[1], dtype=torch.float16), torch.zeros(starts[-1])
        for recording, start, end in zip(chosen, starts, starts[1:], strict=False):
            if recording.targets is not None:
                values[start:end] = recording.targets
                known[start:end] = 1.0
        groups = [
            (told, len(list(group))) for (told, _), group in groupby(chosen, lambda r: (r.targets is None, r.voice))
        ]
        counts = np.array([n for _, n in groups])
        firsts = np.cumsum(counts) - counts
        kinds = [[i for i, (told, _) in enumerate(groups) if told == kind] for kind in (False, True)]
        kinds = [kind for kind in kinds if kind]
        slots = np.concatenate([np.resize(kind, _SLOTS // len(kinds)) for kind in kinds])
        samples = torch.from_numpy(np.concatenate([r.samples for r in chosen]))
        self.samples[: len(samples)].copy_(samples)
        for kept, new in ((self.values, values), (self.known, known), (self.starts, torch.from_numpy(starts[:-1]))):
            kept[: len(new)].copy_(new)
        self.end.fill_(int(starts[-1]))
        self.counts.copy_(torch.from_numpy(counts[slots]))
        self.firsts.copy_(torch.from_numpy(firsts[slots]))
        if known.any():
            self.power.copy_((values.float().square().sum(1) * known).sum() / known.sum())
        minutes = len(samples) / data.RATE_HZ / 60
        self.described = f"{len(chosen)} clips, {minutes:.1f} min, {len(counts)} voices"

    def draw(self, batch: int, n_frames: int, changed: float) -> Crops:
        """Crops of ``n_frames``, a share ``changed`` of them slower or faster (and so lower or higher).

        Half begin where a clip begins, half at a frame up to two seconds later. All differ in loudness; half as many
        as are changed in speed are tilted in spectrum, a quarter lose what is above 8 kHz, a quarter get noise.
        """
        device = self.samples.device

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(batch, 1, device=device).uniform_(low, high)

        def some(share: float, these: Tensor, those: float) -> Tensor:
            return torch.where(uniform(0.0, 1.0) < share, these, torch.full_like(these, those))

        slot = torch.randint(_SLOTS, (batch,), device=device)
        clip = (torch.rand(batch, device=device) * self.counts[slot]).long()
        clip = self.firsts[slot] + torch.minimum(clip, self.counts[slot] - 1)
        later = torch.randint(25, (batch,), device=device) * torch.randint(2, (batch,), device=device)
        last = (self.end - math.ceil(n_frames * _FASTEST) - 2).clamp(min=0)
        start = torch.minimum(self.starts[clip] + later, last)[:, None]

        speed = some(changed, uniform(math.log(_SLOWEST), math.log(_FASTEST)).exp(), 1.0)
        cutoff = some(changed / 4, uniform(0.62, 0.68), 1.0).minimum(1.0 / speed).clamp(max=1.0)
        samples = self._resampled(start * recipe.SAMPLES_PER_FRAME, n_frames, speed, cutoff)
        tilt = some(changed / 2, uniform(-0.4, 0.6), 0.0)
        before = torch.nn.functional.pad(samples[:, :-1], (1, 0))
        samples = (samples + tilt * before) * (1.0 + tilt.square()).rsqrt() * uniform(0.6, 1.25)
        noise = some(changed / 4, 10.0 ** uniform(-4.0, -2.5), 0.0)
        samples = (samples + noise * torch.randn_like(samples)).clamp(-1.0, 1.0)

        place = torch.arange(n_frames, device=device) * speed
        near = place.long()
        low, high = (start + near).clamp(max=len(self.values) - 1), (start + near + 1).clamp(max=len(self.values) - 1)
        share = (place - near)[..., None]
        targets = self.values[low].float() * (1.0 - share) + self.values[high].float() * share
        return Crops(samples, targets, self.known[low] * self.known[high])

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

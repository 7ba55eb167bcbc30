"""From logits to codes: a pure function of the logits, the knobs, the seed, the frame and the codebook.

The order is that of the official generation: repetition penalty, banned ids, temperature, top-k, top-p. Randomness is
counter-based: the same (seed, frame, codebook) gives the same number on any device, whoever shares the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quaver.errors import RecipeError

MIN_FRAMES = 2
"""No utterance stops before this many frames (official generation code)."""

ENDED = -1
"""The code of a row that has stopped."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The knobs; the defaults are the official ones. Temperature 0 takes the likeliest code.

    ``top_k`` 0 and ``top_p`` 1 leave all ids in; ``penalty`` 1 leaves repetition alone.
    Raises RecipeError for a value out of range.
    """

    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    penalty: float = 1.05

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("temperature", self.temperature, 0 <= self.temperature < 100, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("penalty", self.penalty, 0 < self.penalty < 100, "above 0 (1: none)"),
        ):
            if not fits:
                raise RecipeError(f"{name} is {value}: it must be {wanted}")


def distribution(
    logits: Tensor, sampling: Sampling, *, banned: Tensor | None = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities [B, K] and their ids [B, K], likeliest first, from ``logits`` [B, V].

    ``banned`` [V] marks ids that must not come, ``seen`` [B, V] those that the repetition penalty lowers.
    """
    scores = logits.float()
    if seen is not None and sampling.penalty != 1:
        lowered = torch.where(scores < 0, scores * sampling.penalty, scores / sampling.penalty)
        scores = torch.where(seen, lowered, scores)
    if banned is not None:
        scores = scores.masked_fill(banned, -torch.inf)
    if sampling.temperature == 0:
        ids = scores.argmax(-1, keepdim=True)
        return torch.ones_like(ids, dtype=torch.float32), ids
    n_kept = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    scores, ids = scores.div(sampling.temperature).topk(n_kept, dim=-1)
    probs = scores.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def draw(probs: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """The id [B] where ``uniform`` [B] falls in the cumulated ``probs`` [B, K]."""
    cumulated = probs.cumsum(-1)
    index = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(-1, keepdim=True)
    last = (probs > 0).sum(-1, keepdim=True) - 1
    return ids.gather(-1, torch.minimum(index, last)).squeeze(-1)


def uniforms(seeds: Tensor, frame: int, n_codebooks: int) -> Tensor:
    """Numbers in (0, 1), [B, n_codebooks], from the counters (seed, frame, codebook); ``seeds`` [B] int64."""
    codebooks = torch.arange(n_codebooks, device=seeds.device)
    x = _mix(seeds & 0xFFFFFFFF ^ 0x9E3779B9)
    x = _mix(x ^ (seeds >> 32 & 0xFFFFFFFF))
    x = _mix(x ^ (frame * 0x85EBCA6B & 0xFFFFFFFF))
    x = _mix(x[:, None] ^ (codebooks * 0xC2B2AE35 & 0xFFFFFFFF))
    return ((x >> 8).float() + 0.5) / 2**24


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that spreads every bit (xor-shift-multiply, two rounds)."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16

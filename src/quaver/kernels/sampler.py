"""Sampling on the device: one program a slot draws a code, as ``quaver.sampling`` does, and hands it on.

No sort: the k-th likeliest id, the edge of top-p and the drawn id are each a threshold on the scores above which a
given mass lies, found by halving the range of their bits. Ids of equal score are taken from the lowest up.
Shapes: B slots, V ids, Q codebooks, D the talker's width, E the predictor's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quaver.kernels.linear import overlapping
from quaver.sampling import ENDED, Sampling

_BLOCK = 256
_ENDED = tl.constexpr(ENDED)
_LOWEST = tl.constexpr(-(2**31) + 1)


@dataclass(frozen=True, slots=True)
class Slots:
    """What each of B slots is doing, all on the device. ``total`` [B, D] float32 sums the residual embeddings.

    ``seed`` int64; ``frame`` (the next), ``past`` (positions in the talker's cache), ``prompt`` (positions before the
    first frame), ``n_text`` and ``alive`` int32; ``seen`` [B, V] uint8; ``first`` [B, 4] and ``residual`` [B, 4]
    float32: temperature, top-k, top-p and penalty. ``texts`` [B, S, D] with ``n_text`` rows each: one a frame,
    the last for all later. ``codes`` [C, B, Q] int32: ENDED where a slot has stopped. ``stops`` [C, B] float32: how
    likely each slot was to end before that frame, before any knob.
    """

    seed: Tensor
    frame: Tensor
    past: Tensor
    prompt: Tensor
    n_text: Tensor
    alive: Tensor
    seen: Tensor
    first: Tensor
    residual: Tensor
    texts: Tensor
    codes: Tensor
    stops: Tensor
    total: Tensor

    @classmethod
    def of(cls, n_slots: int, capacity: int, n_lines: int, n_ids: int, n_codebooks: int, table: Tensor) -> Slots:
        """Idle slots of ``capacity`` positions and ``n_lines`` rows of text; ``table`` [V, D] is of their kind."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=table.device)

        return cls(
            seed=zeros(n_slots, dtype=torch.long),
            frame=zeros(n_slots),
            past=zeros(n_slots),
            prompt=zeros(n_slots),
            n_text=torch.ones(n_slots, dtype=torch.int32, device=table.device),
            alive=zeros(n_slots),
            seen=zeros(n_slots, n_ids, dtype=torch.uint8),
            first=torch.ones(n_slots, 4, device=table.device),
            residual=torch.ones(n_slots, 4, device=table.device),
            texts=zeros(n_slots, n_lines, table.shape[1], dtype=table.dtype),
            codes=torch.full((capacity, n_slots, n_codebooks), ENDED, dtype=torch.int32, device=table.device),
            stops=zeros(capacity, n_slots, dtype=torch.float32),
            total=zeros(n_slots, table.shape[1], dtype=torch.float32),
        )


def sample_first(
    logits: Tensor, slots: Slots, table: Tensor, projected: Tensor, x: Tensor, embedded: Tensor,
    *, stop_id: int, n_banned: int, min_frames: int, overlap: bool = False,
) -> None:  # fmt: skip
    """Draws codebook 0 from ``logits`` [B, V], and with it whether a slot has stopped; stores how likely that was.

    Writes row ``code`` of ``projected`` [V, E] into ``x`` [B, E] and of ``table`` [V, D] into ``embedded`` [B, D].
    The last ``n_banned`` ids never come, but for ``stop_id`` from frame ``min_frames`` on.
    """
    n_slots, n_ids = logits.shape
    launch = {"launch_pdl": True} if overlap else {}
    _sample[(n_slots,)](
        logits, slots.first, slots.seen, slots.seed, slots.frame, slots.alive, slots.codes, slots.stops, table,
        projected, x, embedded, slots.total, slots.texts, slots.n_text, slots.past, slots.prompt,
        slots.texts.shape[1], slots.codes.shape[0], 0, stop_id,
        n_ids - n_banned, min_frames,
        V=n_ids, Q=slots.codes.shape[2], D=table.shape[1], E=x.shape[1], FIRST=True, LAST=False,
        BLOCK_V=triton.next_power_of_2(n_ids), BLOCK_D=triton.next_power_of_2(table.shape[1]),
        BLOCK_E=triton.next_power_of_2(x.shape[1]), OVERLAP=overlap, num_warps=8, **launch,
    )  # fmt: skip


def sample_residual(
    codebook: int, logits: Tensor, slots: Slots, table: Tensor, projected: Tensor, x: Tensor, embedded: Tensor,
    *, overlap: bool = False,
) -> None:  # fmt: skip
    """Draws codebook ``codebook`` (1 to Q - 1) from ``logits`` [B, V] and hands it on.

    Adds row ``code`` of ``table`` [V, D] to the frame's sum and, before the last codebook, writes that row of
    ``projected`` [V, E] into ``x`` [B, E]. After the last, ``embedded`` [B, D] becomes the talker's next input: the
    embedding that codebook 0 left there, the sum, and the frame's text; and the slot goes on to its next frame.
    """
    n_slots, n_ids = logits.shape
    launch = {"launch_pdl": True} if overlap else {}
    _sample[(n_slots,)](
        logits, slots.residual, slots.seen, slots.seed, slots.frame, slots.alive, slots.codes, slots.stops, table,
        projected, x, embedded, slots.total, slots.texts, slots.n_text, slots.past, slots.prompt,
        slots.texts.shape[1], slots.codes.shape[0], codebook, 0,
        n_ids, 0,
        V=n_ids, Q=slots.codes.shape[2], D=table.shape[1], E=x.shape[1], FIRST=False,
        LAST=codebook == slots.codes.shape[2] - 1,
        BLOCK_V=triton.next_power_of_2(n_ids), BLOCK_D=triton.next_power_of_2(table.shape[1]),
        BLOCK_E=triton.next_power_of_2(x.shape[1]), OVERLAP=overlap, num_warps=8, **launch,
    )  # fmt: skip


def seat(slots: Slots, slot: int, seed: int, n_prompt: int, n_text: int, first: Sampling, residual: Sampling) -> None:
    """Begins an utterance in ``slot``, but for its text: one launch, and nothing that the host would wait for."""
    capacity, n_slots, n_codebooks = slots.codes.shape
    n_ids = slots.seen.shape[1]
    _seat[(triton.cdiv(max(capacity, n_ids), _BLOCK),)](
        slots.seed, slots.frame, slots.past, slots.prompt, slots.n_text, slots.alive, slots.seen, slots.codes,
        slots.stops, slots.first, slots.residual, slot, seed, n_prompt, n_text, *_four(first), *_four(residual),
        n_slots, capacity, V=n_ids, Q=n_codebooks, BLOCK_Q=triton.next_power_of_2(n_codebooks), BLOCK=_BLOCK,
        num_warps=4,
    )  # fmt: skip


def tune(slots: Slots, slot: int, first: Sampling, residual: Sampling) -> None:
    """Sets the knobs of ``slot``."""
    _tune[(1,)](slots.first, slots.residual, slot, *_four(first), *_four(residual))


def _four(knobs: Sampling) -> tuple[float, float, float, float]:
    return float(knobs.temperature), float(knobs.top_k), float(knobs.top_p), float(knobs.penalty)


@triton.jit
def _put(knobs, slot, temperature, top_k, top_p, penalty):
    tl.store(knobs + slot * 4, temperature)
    tl.store(knobs + slot * 4 + 1, top_k)
    tl.store(knobs + slot * 4 + 2, top_p)
    tl.store(knobs + slot * 4 + 3, penalty)


@triton.jit(do_not_specialize=["slot"])
def _tune(
    first, residual, slot, temperature, top_k, top_p, penalty, r_temperature, r_top_k, r_top_p, r_penalty
):  # fmt: skip
    _put(first, slot, temperature, top_k, top_p, penalty)
    _put(residual, slot, r_temperature, r_top_k, r_top_p, r_penalty)


# A seed of 32 bits and one of 64 are one compilation: its type is told.
@triton.jit(do_not_specialize=["slot", "seed", "n_prompt", "n_text", "n_slots", "capacity"])
def _seat(
    seeds, frames, past, prompts, n_texts, lives, seen, codes, stops, first, residual, slot, seed: tl.int64, n_prompt,
    n_text, temperature, top_k, top_p, penalty, r_temperature, r_top_k, r_top_p, r_penalty, n_slots, capacity,
    V: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(seen + slot * V + at, tl.zeros((BLOCK,), tl.uint8), mask=at < V)
    tl.store(stops + at * n_slots + slot, tl.zeros((BLOCK,), tl.float32), mask=at < capacity)
    book = tl.arange(0, BLOCK_Q)
    inside = (at[:, None] < capacity) & (book[None, :] < Q)
    tl.store(codes + (at * n_slots + slot)[:, None] * Q + book[None, :],
             tl.full((BLOCK, BLOCK_Q), _ENDED, tl.int32), mask=inside)  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(seeds + slot, seed)
        tl.store(frames + slot, 0)
        tl.store(past + slot, n_prompt)
        tl.store(prompts + slot, n_prompt)
        tl.store(n_texts + slot, n_text)
        tl.store(lives + slot, 1)
        _put(first, slot, temperature, top_k, top_p, penalty)
        _put(residual, slot, r_temperature, r_top_k, r_top_p, r_penalty)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _uniform(seed, frame, codebook):
    """``quaver.sampling.uniforms`` of one counter, in 32-bit integers that wrap."""
    # A vector of one: on scalars the interpreter warns of the wrapping that is meant here.
    none = tl.zeros((1,), tl.uint32)
    low, high = none + (seed & 0xFFFFFFFF).to(tl.uint32), none + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    x = _mix(low ^ 0x9E3779B9)
    x = _mix(x ^ high)
    x = _mix(x ^ ((none + frame.to(tl.uint32)) * 0x85EBCA6B))
    x = _mix(x ^ ((none + codebook) * 0xC2B2AE35))
    return tl.sum(((x >> 8).to(tl.float32) + 0.5) / 16777216.0, 0)


@triton.jit
def _ordered(scores):
    """Integers that are ordered as the float32 ``scores`` are."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(keys, mass, goal, STRICT: tl.constexpr):
    """The highest of ``keys`` at or above which a mass of ``goal`` lies (more than it, where ``STRICT``)."""
    low = tl.min(tl.where(mass > 0, keys, 0x7FFFFFFF), 0)
    top = tl.max(tl.where(mass > 0, keys, _LOWEST), 0)
    high = top + 1
    # ``low`` has the mass at or above it, ``high`` has not; done when one key is left between them.
    while low < top:
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.sum(tl.where(keys >= middle, mass, 0.0), 0)
        enough = above > goal if STRICT else above >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        between = (keys >= low) & (keys < high) & (mass > 0)
        low = tl.min(tl.where(between, keys, 0x7FFFFFFF), 0)
        top = tl.max(tl.where(between, keys, _LOWEST), 0)
    return low


@triton.jit
def _drawn(scores, inside, ids, temperature, top_k, top_p, uniform):
    """The id drawn from ``scores`` [V], of which ``inside`` can come."""
    keys = _ordered(scores)
    kept = inside
    n_inside = tl.sum(kept.to(tl.int32), 0)
    if (top_k > 0) & (top_k < n_inside):
        edge = _threshold(keys, kept.to(tl.float32), top_k, False)
        above = kept & (keys > edge)
        level = kept & (keys == edge)
        n_level = top_k.to(tl.int32) - tl.sum(above.to(tl.int32), 0)
        kept = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= n_level))
    top = tl.max(tl.where(kept, scores, -float("inf")), 0)
    mass = tl.where(kept, tl.exp(scores - top), 0.0)
    if top_p < 1.0:
        goal = top_p * tl.sum(mass, 0)
        edge = _threshold(keys, mass, goal, False)
        above = tl.sum(tl.where(keys > edge, mass, 0.0), 0)
        level = kept & (keys == edge)
        one = tl.max(tl.where(level, mass, 0.0), 0)
        before = above + (tl.cumsum(level.to(tl.int32), 0) - 1).to(tl.float32) * one
        mass = tl.where((keys > edge) | (level & (before < goal)), mass, 0.0)
    goal = uniform * tl.sum(mass, 0)
    edge = _threshold(keys, mass, goal, True)
    above = tl.sum(tl.where(keys > edge, mass, 0.0), 0)
    level = (keys == edge) & (mass > 0)
    one = tl.max(tl.where(level, mass, 0.0), 0)
    upto = above + tl.cumsum(level.to(tl.int32), 0).to(tl.float32) * one
    # Rounding may leave none of them beyond the goal: then it is the last.
    last = tl.max(tl.where(level, ids, -1), 0)
    return tl.minimum(tl.min(tl.where(level & (upto > goal), ids, 0x7FFFFFFF), 0), last)


# One program for all codebooks between the first and the last: each variant is a compilation of its own.
@triton.jit(do_not_specialize=["codebook", "stop_id", "n_free", "min_frames"])
def _sample(
    logits, knobs, seen, seeds, frames, lives, codes, stops, table, projected, x, embedded, total, texts, n_texts,
    past, prompts, n_lines, capacity, codebook, stop_id, n_free, min_frames,
    V: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, E: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    overlapping(OVERLAP)
    slot, n_slots = tl.program_id(0), tl.num_programs(0)
    frame, alive = tl.load(frames + slot), tl.load(lives + slot)
    temperature, top_k = tl.load(knobs + slot * 4), tl.load(knobs + slot * 4 + 1)
    top_p, penalty = tl.load(knobs + slot * 4 + 2), tl.load(knobs + slot * 4 + 3)
    ids = tl.arange(0, BLOCK_V)
    inside = ids < V
    scores = tl.load(logits + slot * V + ids, mask=inside, other=-float("inf")).to(tl.float32)
    at_frame = tl.minimum(frame, capacity - 1) * n_slots + slot
    if FIRST:
        mass = tl.exp(scores - tl.max(scores, 0))
        tl.store(stops + at_frame, tl.sum(tl.where(ids == stop_id, mass, 0.0), 0) / tl.sum(mass, 0))
        old = tl.load(seen + slot * V + ids, mask=inside, other=0) > 0
        scores = tl.where(old, tl.where(scores < 0, scores * penalty, scores / penalty), scores)
        inside = inside & ((ids < n_free) | ((ids == stop_id) & (frame >= min_frames)))
        scores = tl.where(inside, scores, -float("inf"))
    if temperature == 0.0:
        best = tl.max(scores, 0)
        code = tl.min(tl.where(inside & (scores == best), ids, BLOCK_V), 0)
    else:
        uniform = _uniform(tl.load(seeds + slot), frame, codebook)
        code = _drawn(scores / temperature, inside, ids, temperature, top_k, top_p, uniform)
    # Logits that are no numbers have no best: their slot may say anything, but nowhere else.
    code = tl.minimum(code, V - 1)
    if FIRST:
        alive = tl.where(code == stop_id, 0, alive)
        tl.store(lives + slot, alive)
        tl.store(seen + slot * V + code, 1)
        # A stopped slot goes on with any code: nobody reads it.
        code = tl.where(alive != 0, code, 0)
    spoken = tl.where(alive != 0, code, _ENDED)
    tl.store(codes + at_frame * Q + codebook, spoken)

    col = tl.arange(0, BLOCK_D)
    wide = col < D
    row = tl.load(table + code * D + col, mask=wide, other=0.0)
    if FIRST:
        tl.store(embedded + slot * D + col, row, mask=wide)
    else:
        value = row.to(tl.float32)
        given = tl.load(total + slot * D + col, mask=wide, other=0.0)
        value += tl.where(codebook > 1, given, 0.0)
        if not LAST:
            tl.store(total + slot * D + col, value, mask=wide)
        else:
            # Rounded where the model rounds: the sum of the residuals, then each of the two additions.
            dtype = embedded.dtype.element_ty
            first = tl.load(embedded + slot * D + col, mask=wide, other=0.0).to(tl.float32)
            value = (first + value.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            line = tl.minimum(frame, tl.load(n_texts + slot) - 1)
            text = tl.load(texts + (slot.to(tl.int64) * n_lines + line) * D + col, mask=wide, other=0.0)
            tl.store(embedded + slot * D + col, (value + text.to(tl.float32)).to(dtype), mask=wide)
            tl.store(past + slot, tl.minimum(tl.load(prompts + slot) + frame, capacity - 1))
            tl.store(frames + slot, tl.where(alive != 0, frame + 1, frame))
    if not LAST:
        narrow = tl.arange(0, BLOCK_E)
        line = tl.load(projected + code * E + narrow, mask=narrow < E, other=0.0)
        tl.store(x + slot * E + narrow, line, mask=narrow < E)

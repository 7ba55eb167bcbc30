"""Attention of a few new positions over a cache, or of a prompt: head norms, turns, cache write and sum, in one.

Shapes: B slots, T positions of a prompt, R rows (new positions one after the other, each B slots), H query heads, G key
heads, C capacity, d head size. Each slot has its own length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quaver.kernels.linear import overlapping

_BLOCK_T = 64
_SHORT = 256
_SOME_HEADS = 16
"""The fewest rows of a product on the tensor cores: the query heads of one key head are filled up to it."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Where the parts of one sum wait for each other: a long cache is read by several programs at once.

    ``sums`` [R, H, S, d], ``peaks`` and ``weights`` [R, H, S] float32; ``arrived`` [R, G] int32, zero between calls.
    """

    sums: Tensor
    peaks: Tensor
    weights: Tensor
    arrived: Tensor

    @classmethod
    def of(cls, n_rows: int, n_heads: int, n_key_heads: int, head_dim: int, n_splits: int, like: Tensor) -> Splits:
        """Room for ``n_splits`` parts."""
        shape = (n_rows, n_heads, n_splits)
        zeros = torch.zeros(*shape, 2, dtype=torch.float32, device=like.device)
        arrived = torch.zeros(n_rows, n_key_heads, dtype=torch.int32, device=like.device)
        sums = torch.zeros(*shape, head_dim, dtype=torch.float32, device=like.device)
        return cls(sums, zeros[..., 0].contiguous(), zeros[..., 1].contiguous(), arrived)


@dataclass(frozen=True, slots=True)
class Heads:
    """The gains [d] of the norms on queries and keys, their epsilon, and the turns [C, d / 2] of every position."""

    query_gain: Tensor
    key_gain: Tensor
    eps: float
    cos: Tensor
    sin: Tensor


def attend(
    qkv: Tensor,
    heads: Heads,
    keys: Tensor,
    values: Tensor,
    past: Tensor,
    splits: Splits,
    out: Tensor,
    *,
    overlap: bool = False,
) -> None:
    """Writes the attention of the new positions ``qkv`` [R, (H + 2 G) d] into ``out`` [R, H d], and their cache.

    ``keys`` and ``values`` [B, G, C, d] hold ``past`` [B] int32 positions of each slot; the R / B new ones follow.
    """
    n_slots, n_key_heads, capacity, head_dim = keys.shape
    n_rows, n_heads = len(qkv), splits.sums.shape[1]
    n_splits = splits.sums.shape[2]
    assert qkv.shape[1] == (n_heads + 2 * n_key_heads) * head_dim and qkv.is_contiguous() and out.is_contiguous()
    assert keys.is_contiguous() and values.is_contiguous() and n_rows % n_slots == 0
    launch = {"launch_pdl": True} if overlap else {}
    _attend[(n_rows, n_key_heads, n_splits)](
        qkv, heads.query_gain, heads.key_gain, heads.cos, heads.sin, keys, values, past,
        splits.sums, splits.peaks, splits.weights, splits.arrived, out, heads.eps, head_dim**-0.5,
        n_slots, capacity,
        H=n_heads, G=n_key_heads, D=head_dim, NEW=n_rows // n_slots, SPLITS=n_splits,
        ROWS=max(_SOME_HEADS, triton.next_power_of_2(n_heads // n_key_heads)), BLOCK_T=_BLOCK_T, OVERLAP=overlap,
        num_warps=4, num_stages=2, **launch,
    )  # fmt: skip


def attend_prompt(
    qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, out: Tensor, *, overlap: bool = False
) -> None:
    """Writes the causal attention of the prompt ``qkv`` [T, (H + 2 G) d] into ``out`` [T, H d].

    Its keys, normed and turned, and its values go into ``keys`` and ``values`` [G, T, d].
    """
    n_rows, (n_key_heads, n_positions, head_dim) = len(qkv), keys.shape
    n_heads = out.shape[1] // head_dim
    assert n_positions == n_rows and qkv.shape[1] == (n_heads + 2 * n_key_heads) * head_dim
    assert qkv.is_contiguous() and out.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
    per = triton.next_power_of_2(n_heads // n_key_heads)
    # A short prompt is spread over more programs.
    block_q = max(_SOME_HEADS // per, 16 if n_rows <= _SHORT else 32)
    launch = {"launch_pdl": True} if overlap else {}
    _attend_prompt[(triton.cdiv(n_rows, block_q), n_key_heads)](
        qkv, heads.query_gain, heads.key_gain, heads.cos, heads.sin, keys, values, out, heads.eps, head_dim**-0.5,
        n_rows, H=n_heads, G=n_key_heads, D=head_dim, PER=per, BLOCK_Q=block_q,
        BLOCK_T=32 if qkv.itemsize == 4 else _BLOCK_T, OVERLAP=overlap, num_warps=4, num_stages=2, **launch,
    )  # fmt: skip


@triton.jit
def _turned(left, right, left_gain, right_gain, cos, sin, eps, D: tl.constexpr):
    """Halves of heads [rows, d / 2], normed over both and turned by ``cos`` and ``sin`` [rows or 1, d / 2], float32."""
    rstd = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / D + eps)
    left = left * rstd[:, None] * left_gain[None, :]
    right = right * rstd[:, None] * right_gain[None, :]
    return left * cos - right * sin, right * cos + left * sin


@triton.jit
def _attend(
    qkv, query_gain, key_gain, cos_table, sin_table, keys, values, past, sums, peaks, weights, arrived, out, eps,
    scale, n_slots, capacity,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NEW: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    overlapping(OVERLAP)
    dtype = out.dtype.element_ty
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, own = row % n_slots, row // n_slots
    length = tl.load(past + slot)
    half = tl.arange(0, D // 2)
    whole = tl.arange(0, D)
    width: tl.constexpr = (H + 2 * G) * D
    per: tl.constexpr = H // G

    head = tl.arange(0, ROWS)
    present = head < per
    at = row * width + (group * per + head[:, None]) * D + half[None, :]
    at_own = (length + own) * (D // 2) + half
    cos = tl.load(cos_table + at_own).to(tl.float32)[None, :]
    sin = tl.load(sin_table + at_own).to(tl.float32)[None, :]
    gain_left = tl.load(query_gain + half).to(tl.float32)
    gain_right = tl.load(query_gain + D // 2 + half).to(tl.float32)
    left = tl.load(qkv + at, mask=present[:, None], other=0.0).to(tl.float32)
    right = tl.load(qkv + at + D // 2, mask=present[:, None], other=0.0).to(tl.float32)
    left, right = _turned(left, right, gain_left, gain_right, cos, sin, eps, D)
    q_left, q_right = left.to(dtype), right.to(dtype)

    peak = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, D), tl.float32)

    # The slot's past, this program's share of it. 64-bit offsets: a large batch's cache passes 2 G values.
    cache = (slot * G + group).to(tl.int64) * capacity * D
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_T) * BLOCK_T
    start, end = split * share, tl.minimum(length, (split + 1) * share)
    while start < end:
        position = start + tl.arange(0, BLOCK_T)
        inside = position < length
        at_keys = cache + position[:, None] * D + half[None, :]
        k_left = tl.load(keys + at_keys, mask=inside[:, None], other=0.0)
        k_right = tl.load(keys + at_keys + D // 2, mask=inside[:, None], other=0.0)
        score = tl.dot(q_left, tl.trans(k_left), input_precision="ieee")
        score = tl.dot(q_right, tl.trans(k_right), score, input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 1))
        part = tl.exp(score - higher[:, None])
        fade = tl.exp(peak - higher)
        v = tl.load(values + cache + position[:, None] * D + whole[None, :], mask=inside[:, None], other=0.0)
        weight = weight * fade + tl.sum(part, 1)
        total = tl.dot(part.to(dtype), v, total * fade[:, None], input_precision="ieee")
        peak = higher
        start += BLOCK_T

    # The new positions up to the row's own, from where the projection left them; each row stores its own.
    if split == 0:
        key_left = tl.load(key_gain + half).to(tl.float32)
        key_right = tl.load(key_gain + D // 2 + half).to(tl.float32)
        for new in tl.static_range(NEW):
            if new <= own:
                base = qkv + (slot + new * n_slots) * width + (H + group) * D
                turn = (length + new) * (D // 2) + half
                k_cos = tl.load(cos_table + turn).to(tl.float32)[None, :]
                k_sin = tl.load(sin_table + turn).to(tl.float32)[None, :]
                one_left, one_right = _turned(
                    tl.load(base + half).to(tl.float32)[None, :],
                    tl.load(base + D // 2 + half).to(tl.float32)[None, :],
                    key_left, key_right, k_cos, k_sin, eps, D,
                )  # fmt: skip
                k_low, k_high = one_left.to(dtype), one_right.to(dtype)
                one_v = tl.load(base + G * D + whole)
                if new == own:
                    at_new = cache + (length + new) * D
                    tl.store(keys + at_new + half[None, :], k_low)
                    tl.store(keys + at_new + D // 2 + half[None, :], k_high)
                    tl.store(values + at_new + whole, one_v)
                one = tl.sum(q_left.to(tl.float32) * k_low.to(tl.float32), 1)
                one = (one + tl.sum(q_right.to(tl.float32) * k_high.to(tl.float32), 1)) * scale
                risen = tl.maximum(peak, one)
                one, old = tl.exp(one - risen), tl.exp(peak - risen)
                weight = weight * old + one
                total = total * old[:, None] + one[:, None] * one_v.to(tl.float32)[None, :]
                peak = risen

    at_heads = row * H + group * per + head
    if SPLITS > 1:
        at_part = at_heads * SPLITS + split
        tl.store(peaks + at_part, peak, mask=present)
        tl.store(weights + at_part, weight, mask=present)
        tl.store(sums + at_part[:, None] * D + whole[None, :], total, mask=present[:, None])
        # Whoever comes last adds the parts up, in their order: the sum does not depend on who that is.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + row * G + group, 1, sem="acq_rel")
        if before == SPLITS - 1:
            peak = tl.full((ROWS,), -1e30, tl.float32)
            for part_index in range(SPLITS):
                at_part = at_heads * SPLITS + part_index
                peak = tl.maximum(peak, tl.load(peaks + at_part, mask=present, other=-1e30, cache_modifier=".cg"))
            weight = tl.zeros((ROWS,), tl.float32)
            total = tl.zeros((ROWS, D), tl.float32)
            for part_index in range(SPLITS):
                at_part = at_heads * SPLITS + part_index
                other = tl.load(peaks + at_part, mask=present, other=-1e30, cache_modifier=".cg")
                fade = tl.exp(other - peak)
                weight += fade * tl.load(weights + at_part, mask=present, other=0.0, cache_modifier=".cg")
                at_sum = at_part[:, None] * D + whole[None, :]
                total += fade[:, None] * tl.load(sums + at_sum, mask=present[:, None], other=0.0, cache_modifier=".cg")
            tl.store(arrived + row * G + group, 0)
            result = total / tl.where(present, weight, 1.0)[:, None]
            tl.store(out + at_heads[:, None] * D + whole[None, :], result.to(dtype), mask=present[:, None])
    else:
        result = total / weight[:, None]
        tl.store(out + at_heads[:, None] * D + whole[None, :], result.to(dtype), mask=present[:, None])


# One compilation serves every length.
@triton.jit(do_not_specialize=["n_rows"])
def _attend_prompt(
    qkv, query_gain, key_gain, cos_table, sin_table, keys, values, out, eps, scale, n_rows,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PER: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    overlapping(OVERLAP)
    dtype = out.dtype.element_ty
    first, group = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    half = tl.arange(0, D // 2)
    whole = tl.arange(0, D)
    width: tl.constexpr = (H + 2 * G) * D
    per: tl.constexpr = H // G

    # The query heads of a key head are rows side by side: they read the same keys.
    line = tl.arange(0, BLOCK_Q * PER)
    own, head = first + line // PER, line % PER
    present = (own < n_rows) & (head < per)
    at = own[:, None] * width + (group * per + head[:, None]) * D + half[None, :]
    at_own = own[:, None] * (D // 2) + half[None, :]
    cos = tl.load(cos_table + at_own, mask=present[:, None], other=0.0).to(tl.float32)
    sin = tl.load(sin_table + at_own, mask=present[:, None], other=0.0).to(tl.float32)
    left = tl.load(qkv + at, mask=present[:, None], other=0.0).to(tl.float32)
    right = tl.load(qkv + at + D // 2, mask=present[:, None], other=0.0).to(tl.float32)
    gain_left = tl.load(query_gain + half).to(tl.float32)
    gain_right = tl.load(query_gain + D // 2 + half).to(tl.float32)
    left, right = _turned(left, right, gain_left, gain_right, cos, sin, eps, D)
    q_left, q_right = left.to(dtype), right.to(dtype)
    key_left = tl.load(key_gain + half).to(tl.float32)
    key_right = tl.load(key_gain + D // 2 + half).to(tl.float32)

    peak = tl.full((BLOCK_Q * PER,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK_Q * PER,), tl.float32)
    total = tl.zeros((BLOCK_Q * PER, D), tl.float32)
    end = tl.minimum(first + BLOCK_Q, n_rows)
    for start in range(0, end, BLOCK_T):
        position = start + tl.arange(0, BLOCK_T)
        inside = position < end
        base = position[:, None] * width + (H + group) * D
        # Normed and turned anew by each block of queries: that is less than one more kernel for all but long prompts.
        turn = position[:, None] * (D // 2) + half[None, :]
        k_cos = tl.load(cos_table + turn, mask=inside[:, None], other=0.0).to(tl.float32)
        k_sin = tl.load(sin_table + turn, mask=inside[:, None], other=0.0).to(tl.float32)
        k_left = tl.load(qkv + base + half[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        k_right = tl.load(qkv + base + D // 2 + half[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        k_left, k_right = _turned(k_left, k_right, key_left, key_right, k_cos, k_sin, eps, D)
        k_low, k_high = k_left.to(dtype), k_right.to(dtype)
        v = tl.load(qkv + base + G * D + whole[None, :], mask=inside[:, None], other=0.0)
        # Each block of queries stores its own positions.
        mine = (inside & (position >= first))[:, None]
        at_new = (group * n_rows + position)[:, None] * D
        tl.store(keys + at_new + half[None, :], k_low, mask=mine)
        tl.store(keys + at_new + D // 2 + half[None, :], k_high, mask=mine)
        tl.store(values + at_new + whole[None, :], v, mask=mine)
        score = tl.dot(q_left, tl.trans(k_low), input_precision="ieee")
        score = tl.dot(q_right, tl.trans(k_high), score, input_precision="ieee") * scale
        score = tl.where(position[None, :] <= own[:, None], score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 1))
        part = tl.exp(score - higher[:, None])
        fade = tl.exp(peak - higher)
        weight = weight * fade + tl.sum(part, 1)
        total = tl.dot(part.to(dtype), v, total * fade[:, None], input_precision="ieee")
        peak = higher
    at_out = (own * H + group * per + head)[:, None] * D + whole[None, :]
    tl.store(out + at_out, (total / weight[:, None]).to(dtype), mask=present[:, None])

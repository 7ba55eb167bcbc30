"""Rounding a block of 128 inputs one after the other, all in one kernel: a program takes some rows from end to end.

What `awq_search` does in a thousand small steps, to its definition; a sum may be rounded once less. Shapes: O rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quaver.int4 import GROUP, LEVELS

_BLOCK_ROWS = 8
_HIGHEST = tl.constexpr(LEVELS - 1)
_N = tl.constexpr(GROUP)


def compensate(left: Tensor, scales: Tensor, zeros: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The levels of 128 inputs, and the errors [O, 128] that the inputs after them make up for.

    ``left``, ``scales`` and ``zeros`` [O, 128], ``inverse`` [128, 128] upper triangular: float32.
    """
    left, scales, zeros, inverse = map(_in_rows, (left, scales, zeros, inverse))
    levels, errors = (torch.empty(left.shape, device=left.device) for _ in range(2))
    _compensate[(triton.cdiv(len(left), _BLOCK_ROWS),)](
        left, scales, zeros, inverse, levels, errors, len(left),
        left.stride(0), scales.stride(0), zeros.stride(0), inverse.stride(0), ROWS=_BLOCK_ROWS, num_warps=4,
    )  # fmt: skip
    return levels, errors


def settle(
    values: Tensor, slope: Tensor, scales: Tensor, zeros: Tensor, moment: Tensor, power: Tensor
) -> tuple[Tensor, Tensor]:
    """The levels of 128 inputs after each has moved to its best, and by how much each did, [O, 128].

    ``values``, ``slope``, ``scales`` and ``zeros`` [O, 128], ``moment`` [128, 128], ``power`` [128]: float32.
    """
    values, slope, scales, zeros, moment = map(_in_rows, (values, slope, scales, zeros, moment))
    power = power.contiguous()
    levels, steps = (torch.empty(values.shape, device=values.device) for _ in range(2))
    _settle[(triton.cdiv(len(values), _BLOCK_ROWS),)](
        values, slope, scales, zeros, moment, power, levels, steps, len(values),
        values.stride(0), slope.stride(0), scales.stride(0), zeros.stride(0), moment.stride(0),
        ROWS=_BLOCK_ROWS, num_warps=4,
    )  # fmt: skip
    return levels, steps


def _in_rows(x: Tensor) -> Tensor:
    """``x`` with the values of a row side by side: a Cholesky factor comes column by column."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def _nearest(x, low, high):
    """``x`` rounded to the nearest integer, to even where two are, between the integers ``low`` and ``high``."""
    # Near enough first, so that adding what leaves no room for fractions, and taking it off again, rounds.
    near = tl.minimum(tl.maximum(x, low - 1.0), high + 1.0)
    return tl.minimum(tl.maximum((near + 12582912.0) - 12582912.0, low), high)


@triton.jit(do_not_specialize=["n_rows"])
def _compensate(
    left, scales, zeros, inverse, levels, errors, n_rows, by_left, by_scales, by_zeros, by_inverse, ROWS: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, _N)
    inside = row < n_rows
    tile = tl.load(left + row[:, None] * by_left + col[None, :], mask=inside[:, None], other=0.0)
    found, missed = tl.zeros_like(tile), tl.zeros_like(tile)
    for i in range(128):
        here = (col == i)[None, :]
        value = tl.sum(tl.where(here, tile, 0.0), 1)
        scale = tl.load(scales + row * by_scales + i, mask=inside, other=1.0)
        zero = tl.load(zeros + row * by_zeros + i, mask=inside, other=0.0)
        weights = tl.load(inverse + i * by_inverse + col)
        step = _nearest(tl.div_rn(value, scale), -zero, _HIGHEST - zero)
        error = tl.div_rn(value - step * scale, tl.load(inverse + i * by_inverse + i))
        tile -= error[:, None] * weights[None, :]
        found = tl.where(here, (step + zero)[:, None], found)
        missed = tl.where(here, error[:, None], missed)
    at = row[:, None] * _N + col[None, :]
    tl.store(levels + at, found, mask=inside[:, None])
    tl.store(errors + at, missed, mask=inside[:, None])


@triton.jit(do_not_specialize=["n_rows"])
def _settle(
    values, slope, scales, zeros, moment, power, levels, steps, n_rows,
    by_values, by_slope, by_scales, by_zeros, by_moment, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, _N)
    inside = row < n_rows
    tile = tl.load(slope + row[:, None] * by_slope + col[None, :], mask=inside[:, None], other=0.0)
    found, moved = tl.zeros_like(tile), tl.zeros_like(tile)
    for i in range(128):
        here = (col == i)[None, :]
        down = tl.sum(tl.where(here, tile, 0.0), 1)
        scale = tl.load(scales + row * by_scales + i, mask=inside, other=1.0)
        zero = tl.load(zeros + row * by_zeros + i, mask=inside, other=0.0)
        before = tl.load(values + row * by_values + i, mask=inside, other=0.0) - zero
        weights = tl.load(moment + i * by_moment + col)
        aim = before * scale - tl.div_rn(down, tl.load(power + i))
        after = _nearest(tl.div_rn(aim, scale), -zero, _HIGHEST - zero)
        step = (after - before) * scale
        tile += step[:, None] * weights[None, :]
        found = tl.where(here, (after + zero)[:, None], found)
        moved = tl.where(here, step[:, None], moved)
    at = row[:, None] * _N + col[None, :]
    tl.store(levels + at, found, mask=inside[:, None])
    tl.store(steps + at, moved, mask=inside[:, None])

"""Products of a few rows and a weight of 4, 8 or 16 bits, with what stands before and behind them in a decoder layer.

Shapes: M rows, K inputs, N outputs. One row is multiplied and added, more go through the tensor cores; both sum in
float32 in a fixed order. In front: the RMS norm of the row. Behind: the bias, SiLU(gate) * up, the residual stream.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from quaver.int4 import GROUP, Int4Linear, Lanes
from quaver.int8 import Int8Linear

_GROUP = tl.constexpr(GROUP)
_LANES = tl.constexpr(GROUP // 8)
_BLOCK_N = 16
_LEAST_ROWS = 16
_PROGRAMS = 128
"""About as many as a large GPU has processors."""
MANY_ROWS = 256
"""From so many rows on, a long prompt's, a weight is read and widened for 128 of them at a time."""
_LARGE = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))


Linear = nn.Linear | Int4Linear | Int8Linear


@dataclass(frozen=True, slots=True)
class Matrix:
    """The weight of the linears that read one input, one below the other: ``dense`` [N, K], or ``lanes`` in 4 bits.

    In 8 bits ``dense`` are whole numbers, which ``row_scales`` [N] float32 are times of.
    """

    dense: Tensor | None
    lanes: Lanes | None
    bias: Tensor | None
    row_scales: Tensor | None = None

    @classmethod
    def of(cls, *linears: Linear) -> Matrix:
        """The fused weight of ``linears``, which keep views of it: it is in memory once.

        In 4 or 8 bits where all of them are; where only some are, those are multiplied as they dequantize.
        """
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = torch.cat([value.detach() for value in biases]) if biases else None
        starts = itertools.accumulate((linear.out_features for linear in linears), initial=0)
        spans = list(zip(linears, itertools.pairwise(starts), strict=True))
        int4 = [linear for linear in linears if isinstance(linear, Int4Linear)]
        if len(int4) == len(linears):
            lanes = Lanes.cat([linear.lanes() for linear in int4])
            for linear, (start, end) in spans:
                assert isinstance(linear, Int4Linear)
                linear.hold(lanes.rows(start, end))
            return cls(None, lanes, bias)
        int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
        if len(int8) == len(linears):
            values = torch.cat([linear.weight_int8 for linear in int8])
            for linear, (start, end) in zip(int8, (span for _, span in spans), strict=True):
                linear.weight_int8 = values[start:end]
            return cls(values, None, bias, torch.cat([linear.weight_scale for linear in int8]).float())
        dtype = next(linear.weight.dtype for linear in linears if isinstance(linear, nn.Linear))
        parts = [
            linear.weight.detach() if isinstance(linear, nn.Linear) else linear.dequantize().to(dtype)
            for linear in linears
        ]
        dense = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
        for linear, (start, end) in spans:
            if isinstance(linear, nn.Linear):
                linear.weight = nn.Parameter(dense[start:end], requires_grad=False)
        return cls(dense, None, bias)

    @property
    def n_bytes(self) -> int:
        """What one product reads of it."""
        held = (self.dense, self.row_scales) if self.lanes is None else self.lanes.held
        return sum(tensor.nbytes for tensor in (*held, self.bias) if tensor is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        if self.lanes is not None:
            return len(self.lanes.packed), self.lanes.packed.shape[1] * 8
        assert self.dense is not None
        return self.dense.shape[0], self.dense.shape[1]


def linear(
    x: Tensor,
    matrix: Matrix,
    y: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    overlap: bool = False,
    tensor_cores: bool | None = None,
) -> None:
    """Writes the product of the rows ``x`` [M, K] into ``y`` [M, N]; all are contiguous and of one dtype.

    ``gain`` [K] and ``eps``: the row is RMS-normed first. ``gated``: the matrix is gate above up, and y gets
    SiLU(gate) * up. ``residual`` [M, N], which may be y, is added. ``overlap``: see ``overlapping``; of one row
    alone, since more ask for nothing before they have their rows. ``tensor_cores`` by default from two rows on.
    """
    n_rows, n_in = x.shape
    n_out = y.shape[1]
    assert matrix.shape == (n_out * (2 if gated else 1), n_in) and y.shape[0] == n_rows
    assert x.is_contiguous() and y.is_contiguous()
    lanes, dense = matrix.lanes, matrix.dense
    in_rows = x if matrix.row_scales is None else matrix.row_scales
    weight, scales, zeros = (lanes.packed, lanes.scales, lanes.zeros) if lanes is not None else (dense, in_rows, x)
    operands = (x, x if gain is None else gain, weight, scales, zeros, x if matrix.bias is None else matrix.bias)
    flags = {
        "K": n_in,
        "INT4": lanes is not None,
        "INT8": matrix.row_scales is not None,
        "NORM": gain is not None,
        "GATED": gated,
        "BIAS": matrix.bias is not None,
        "RESIDUAL": residual is not None,
    }
    extra = x if residual is None else residual
    if not (n_rows > 1 if tensor_cores is None else tensor_cores):
        assert n_rows == 1
        # A program takes so many rows of the weight that several hundred programs read at once, each all it needs.
        block_n = min(8, max(2, triton.next_power_of_2(n_out) // 512))
        width = triton.next_power_of_2(n_in)
        n_values = block_n * width * (2 if gated else 1)
        n_warps = min(8, max(1, n_values // (4096 if lanes is not None else 2048)))
        launch = {"launch_pdl": True} if overlap else {}
        _one_row[(triton.cdiv(n_out, block_n),)](
            *operands, extra, y, n_out, eps, **flags, OVERLAP=overlap, BLOCK_N=block_n, BLOCK_K=width,
            num_warps=n_warps, **launch,
        )  # fmt: skip
    else:
        tiles = _Tiles.of(x, n_out, int4=lanes is not None, gated=gated)
        grid = (triton.cdiv(n_out, tiles.n), triton.cdiv(n_rows, tiles.m))
        _some_rows[grid](
            *operands, extra, y, n_rows, n_out, eps, **flags,
            BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, num_warps=tiles.n_warps, num_stages=3,
        )  # fmt: skip


def norm(x: Tensor, gain: Tensor, eps: float, y: Tensor, *, overlap: bool = False) -> None:
    """Writes the RMS norm of the rows ``x`` [M, K] into ``y`` [M, K], a program a row.

    For many rows: each program of a product would read all of them twice to norm them itself.
    """
    n_rows, n_in = x.shape
    assert x.is_contiguous() and y.is_contiguous() and x.shape == y.shape
    launch = {"launch_pdl": True} if overlap else {}
    _norm[(n_rows,)](x, gain, y, eps, K=n_in, BLOCK_K=triton.next_power_of_2(n_in), OVERLAP=overlap, **launch)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """What a program on the tensor cores takes at a time: ``m`` rows, ``n`` outputs, ``k`` inputs."""

    m: int
    n: int
    k: int
    n_warps: int

    @classmethod
    def of(cls, x: Tensor, n_out: int, *, int4: bool, gated: bool) -> _Tiles:
        """Few rows: so many programs that all processors read. Many rows: as few readings of the weight as can be."""
        if len(x) >= MANY_ROWS and x.itemsize < 4 and _is_large(x.device):
            return cls(128, 64 if gated else 128, GROUP if int4 else 64, 8)
        m = min(64 if x.itemsize < 4 else 32, max(_LEAST_ROWS, triton.next_power_of_2(len(x))))
        # Three tiles of the rows and the weight are in shared memory at a time, of which small GPUs have 99 KB.
        if m * x.itemsize <= 64 or (int4 and x.itemsize < 4 and _is_large(x.device)):
            return cls(m, _BLOCK_N, 256, 4)
        # Each program reads all of its rows: where enough programs are left, each takes more outputs.
        wide = m == 64 and n_out >= 2 * _BLOCK_N * _PROGRAMS
        return cls(m, 2 * _BLOCK_N if wide else _BLOCK_N, GROUP, 4)


@cache
def _is_large(device: torch.device) -> bool:
    """Whether the processors of a GPU have 160 KB of shared memory, for large tiles; without one all is well."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in _LARGE


@triton.jit
def overlapping(OVERLAP: tl.constexpr) -> None:
    """Where a kernel that was started early waits for the one before it, and lets the one behind it start.

    What stands above the call may read nothing that an earlier kernel writes: in practice, the weights.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _level(words, zeros, J: tl.constexpr):
    """Nibble J less the zero point: exact, without a conversion of integers.

    The nibble is put into the mantissa of a number between 1 and 2; one multiply-add brings it back and takes zero off.
    """
    BIT: tl.constexpr = 4 * J + 3 if J < 5 else 4 * J - 13
    UNIT: tl.constexpr = (1 << (23 - BIT)) * 1.0
    aligned = words << 3 if J < 5 else words >> 13
    ones = (aligned & (15 << BIT)) | 0x3F800000
    return ones.to(tl.float32, bitcast=True) * UNIT - (zeros + UNIT)


@triton.jit
def _levels(words, zeros):
    """All weights less their zero points, [rows, groups, 128] float32, of ``words`` [rows, groups, 16]."""
    z = zeros[:, :, None]
    even = tl.join(tl.join(_level(words, z, 0), _level(words, z, 4)), tl.join(_level(words, z, 2), _level(words, z, 6)))
    odd = tl.join(tl.join(_level(words, z, 1), _level(words, z, 5)), tl.join(_level(words, z, 3), _level(words, z, 7)))
    by_word = tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1], words.shape[2], 8))
    return tl.reshape(tl.permute(by_word, (0, 1, 3, 2)), (words.shape[0], words.shape[1], words.shape[2] * 8))


@triton.jit
def _normed(x, gain, rstd, NORM: tl.constexpr):
    """``x`` in float32, normed as the model does it: rounded to its dtype before the gain and after it."""
    wide = x.to(tl.float32)
    if NORM:
        wide = (wide * rstd).to(x.dtype).to(tl.float32)
        wide = (wide * gain.to(tl.float32)).to(x.dtype).to(tl.float32)
    return wide


@triton.jit
def _norm(x, gain, y, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr):
    cols = tl.arange(0, BLOCK_K)
    by = tl.load(gain + cols, mask=cols < K, other=0.0)
    overlapping(OVERLAP)
    at = tl.program_id(0) * K + cols
    value = tl.load(x + at, mask=cols < K, other=0.0)
    wide = value.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
    tl.store(y + at, _normed(value, by, rstd, True).to(y.dtype.element_ty), mask=cols < K)


@triton.jit
def _words(weight, rows, n_rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The int32 words [rows, groups, 16] of 8 weights each."""
    group = tl.arange(0, BLOCK_K // _GROUP)
    lane = tl.arange(0, _LANES)
    at = rows[:, None, None] * (K // 8) + group[None, :, None] * _LANES + lane[None, None, :]
    inside = (rows[:, None, None] < n_rows) & (group[None, :, None] < K // _GROUP) & (lane[None, None, :] >= 0)
    return tl.load(weight + at, mask=inside, other=0)


@triton.jit
def _per_group(table, rows, n_rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales or zero points [rows, groups] in float32."""
    group = tl.arange(0, BLOCK_K // _GROUP)
    inside = (rows[:, None] < n_rows) & (group[None, :] < K // _GROUP)
    return tl.load(table + rows[:, None] * (K // _GROUP) + group[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _dense(weight, rows, n_rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
    cols = tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < n_rows) & (cols[None, :] < K)
    return tl.load(weight + rows[:, None] * K + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _row_scales(scales, rows, n_rows, INT8: tl.constexpr):
    """What the sums of ``rows`` are times of: their scales in 8 bits, else 1."""
    return tl.load(scales + rows, mask=rows < n_rows, other=0.0) if INT8 else tl.full(rows.shape, 1.0, tl.float32)


@triton.jit
def _times_int4(x, gain, rstd, words, scales, zeros, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr):
    """The products [rows] of the row ``x`` and the words [rows, groups, 16]."""
    group = tl.arange(0, BLOCK_K // _GROUP)
    at = group[:, None] * _GROUP + tl.arange(0, _LANES)[None, :]
    sums = tl.zeros(words.shape, tl.float32)
    # The small row is brought to where the words are, a nibble at a time, rather than the words to the row.
    for j in tl.static_range(8):
        value = tl.load(x + at + j * _LANES, mask=at < K, other=0.0)
        by = tl.load(gain + at + j * _LANES, mask=at < K, other=0.0) if NORM else value
        sums += _level(words, zeros[:, :, None], j) * _normed(value, by, rstd, NORM)[None, :, :]
    return tl.sum(tl.sum(sums, 2) * scales, 1)


@triton.jit
def _one_row(
    x, gain, weight, scales, zeros, bias, residual, y, n_out, eps,
    K: tl.constexpr, INT4: tl.constexpr, INT8: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n_out
    # All of the weight is asked for before anything is waited for.
    if INT4:
        tile = _words(weight, rows, n_out, K, BLOCK_K)
        s, z = _per_group(scales, rows, n_out, K, BLOCK_K), _per_group(zeros, rows, n_out, K, BLOCK_K)
        if GATED:
            up_tile = _words(weight, rows + n_out, 2 * n_out, K, BLOCK_K)
            up_s = _per_group(scales, rows + n_out, 2 * n_out, K, BLOCK_K)
            up_z = _per_group(zeros, rows + n_out, 2 * n_out, K, BLOCK_K)
    else:
        tile = _dense(weight, rows, n_out, K, BLOCK_K)
        s = _row_scales(scales, rows, n_out, INT8)
        if GATED:
            up_tile = _dense(weight, rows + n_out, 2 * n_out, K, BLOCK_K)
            up_s = _row_scales(scales, rows + n_out, 2 * n_out, INT8)
    overlapping(OVERLAP)
    cols = tl.arange(0, BLOCK_K)
    value = tl.load(x + cols, mask=cols < K, other=0.0)
    rstd, by = 1.0, value
    if NORM:
        wide = value.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
        by = tl.load(gain + cols, mask=cols < K, other=0.0)
    if INT4:
        out = _times_int4(x, gain, rstd, tile, s, z, K, NORM, BLOCK_K)
        if GATED:
            up = _times_int4(x, gain, rstd, up_tile, up_s, up_z, K, NORM, BLOCK_K)
    else:
        value = _normed(value, by, rstd, NORM)
        out = tl.sum(tile.to(tl.float32) * value[None, :], 1) * s
        if GATED:
            up = tl.sum(up_tile.to(tl.float32) * value[None, :], 1) * up_s
    if GATED:
        out = out * tl.sigmoid(out) * up
    if BIAS:
        out += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        out += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _grouped(table, rows, n_rows, start, K: tl.constexpr, INT4: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales or zero points [rows, groups] of the inputs from ``start`` on, as they are stored; nothing without INT4.

    They are too small to be copied ahead by the loop's own pipeline, so the loop asks for them a turn early.
    """
    if INT4:
        group = start // _GROUP + tl.arange(0, BLOCK_K // _GROUP)
        inside = (rows[:, None] < n_rows) & (group[None, :] < K // _GROUP)
        found = tl.load(table + rows[:, None] * (K // _GROUP) + group[None, :], mask=inside, other=0)
    else:
        found = tl.zeros((1, 1), tl.int32)
    return found


@triton.jit
def _tile(weight, scales, zeros, rows, n_rows, start, K: tl.constexpr, INT4: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weight [rows, BLOCK_K] of the inputs from ``start`` on: float32 where it comes from 4 bits."""
    if INT4:
        group = start // _GROUP + tl.arange(0, BLOCK_K // _GROUP)
        lane = tl.arange(0, _LANES)
        inside = (rows[:, None] < n_rows) & (group[None, :] < K // _GROUP)
        per_group = rows[:, None] * (K // _GROUP) + group[None, :]
        at = per_group[:, :, None] * _LANES + lane[None, None, :]
        words = tl.load(weight + at, mask=inside[:, :, None] & (lane[None, None, :] >= 0), other=0)
        levels = _levels(words, zeros.to(tl.float32))
        tile = tl.reshape(levels * scales.to(tl.float32)[:, :, None], (rows.shape[0], BLOCK_K))
    else:
        cols = start + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < n_rows) & (cols[None, :] < K)
        tile = tl.load(weight + rows[:, None] * K + cols[None, :], mask=inside, other=0.0)
    return tile


# One compilation serves every batch of a block size.
@triton.jit(do_not_specialize=["n_lines"])
def _some_rows(
    x, gain, weight, scales, zeros, bias, residual, y, n_lines, n_out, eps,
    K: tl.constexpr, INT4: tl.constexpr, INT8: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rstd = tl.full((BLOCK_M,), 1.0, tl.float32)
    if NORM:
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            given = (lines[:, None] < n_lines) & (cols[None, :] < K)
            part = tl.load(x + lines[:, None] * K + cols[None, :], mask=given, other=0.0).to(tl.float32)
            squares += tl.sum(part * part, 1)
        rstd = tl.rsqrt(squares / K + eps)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    n_all = 2 * n_out if GATED else n_out
    s, z = (
        _grouped(scales, rows, n_all, 0, K, INT4, BLOCK_K),
        _grouped(zeros, rows, n_all, 0, K, INT4, BLOCK_K),
    )
    up_s, up_z = s, z
    if GATED:
        up_s = _grouped(scales, rows + n_out, n_all, 0, K, INT4, BLOCK_K)
        up_z = _grouped(zeros, rows + n_out, n_all, 0, K, INT4, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        next_s = _grouped(scales, rows, n_all, start + BLOCK_K, K, INT4, BLOCK_K)
        next_z = _grouped(zeros, rows, n_all, start + BLOCK_K, K, INT4, BLOCK_K)
        cols = start + tl.arange(0, BLOCK_K)
        given = (lines[:, None] < n_lines) & (cols[None, :] < K)
        value = tl.load(x + lines[:, None] * K + cols[None, :], mask=given, other=0.0)
        if NORM:
            by = tl.load(gain + cols, mask=cols < K, other=0.0)[None, :]
            value = _normed(value, by, rstd[:, None], NORM).to(x.dtype.element_ty)
        tile = _tile(weight, s, z, rows, n_all, start, K, INT4, BLOCK_K).to(x.dtype.element_ty)
        out = tl.dot(value, tl.trans(tile), out, input_precision="ieee")
        s, z = next_s, next_z
        if GATED:
            next_s = _grouped(scales, rows + n_out, n_all, start + BLOCK_K, K, INT4, BLOCK_K)
            next_z = _grouped(zeros, rows + n_out, n_all, start + BLOCK_K, K, INT4, BLOCK_K)
            tile = _tile(weight, up_s, up_z, rows + n_out, n_all, start, K, INT4, BLOCK_K)
            up = tl.dot(value, tl.trans(tile.to(x.dtype.element_ty)), up, input_precision="ieee")
            up_s, up_z = next_s, next_z
    out *= _row_scales(scales, rows, n_all, INT8)[None, :]
    if GATED:
        up *= _row_scales(scales, rows + n_out, n_all, INT8)[None, :]
        out = out * tl.sigmoid(out) * up
    inside = (lines[:, None] < n_lines) & (rows[None, :] < n_out)
    if BIAS:
        out += tl.load(bias + rows, mask=rows < n_out, other=0.0).to(tl.float32)[None, :]
    at = lines[:, None] * n_out + rows[None, :]
    if RESIDUAL:
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)

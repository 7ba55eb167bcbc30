"""The AWQ storage format (4 bits, groups of 128, GEMM layout) and the linear layer that computes with it.

A weight is ``W[o, i] = (q[o, i] - z[o, g]) * s[o, g]`` with ``g = i // 128`` and q, z in 0..15. On disk the input axis
comes first: ``qweight`` [in, out / 8] int32, ``qzeros`` [in / 128, out / 8] int32, ``scales`` [in / 128, out] float16.
Nibble i (from the lowest bits) of an int32 holds column ``ORDER[i]`` of its 8 output columns; zero points are stored as
they are. This module is the only place that decides how an INT4 product is computed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.errors import CheckpointError

GROUP = 128
"""Inputs that share a scale and a zero point."""
LEVELS = 16
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 columns each nibble of an int32 holds, lowest nibble first (AutoAWQ's GEMM layout)."""

IN_TURN = tuple(range(8))
"""The plain order: nibble i holds column i (compressed-tensors' layout)."""

_INVERSE = tuple(ORDER.index(column) for column in range(8))
# Rows are dequantized in tiles of about this many values, which stay in a core's cache until they are multiplied.
_TILE = 1 << 19
# And on a GPU in parts of so many, 6 bytes each while they are made.
_PART = 1 << 22


def pack(values: Tensor, order: Sequence[int] = ORDER) -> Tensor:
    """The int32 words [R, C / 8] of ``values`` [R, C], integers in 0..15; nibble i holds column ``order[i]``."""
    nibbles = values.to(torch.uint8).reshape(len(values), -1, 8)[..., list(order)]
    # Built from bytes: an int32 shifted into its sign bit is undefined where a byte is not.
    words = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return words.contiguous().view(torch.int32)[..., 0]


def unpack(words: Tensor) -> Tensor:
    """The values [R, C] uint8 in 0..15 of the int32 ``words`` [R, C / 8]."""
    packed = words.contiguous().unsqueeze(-1).view(torch.uint8)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return nibbles[..., list(_INVERSE)].flatten(1)


def representable(scales: Tensor) -> Tensor:
    """``scales`` (positive) moved to the nearest values that float16 and bfloat16 both hold exactly, as float32.

    So either dtype reads the same weights. Values below float16's smallest or above its largest are clamped.
    """
    smallest, largest = 2.0**-24, 65280.0
    # Rounding to bfloat16 leaves 8 bits; where float16 is subnormal, rounding again leaves fewer: both then hold it.
    return scales.float().clamp(smallest, largest).bfloat16().half().float()


@cache
def compiled() -> ModuleType | None:
    """``quaver.compiled``, which computes with quantized weights on a CPU; None where numba is not installed."""
    try:
        return importlib.import_module("quaver.compiled")
    except ImportError:
        return None


def require_shape(name: str, n_out: int, n_in: int) -> None:
    """Raises CheckpointError, naming the tensor, unless a weight [n_out, n_in] fits the format."""
    if n_in % GROUP or n_out % 8:
        raise CheckpointError(
            f"tensor {name} has shape ({n_out}, {n_in}): INT4 needs inputs in multiples of {GROUP} and outputs in "
            "multiples of 8, so this model cannot be quantized"
        )


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight in 4 bits: ``values`` [out, in] uint8; ``zeros`` uint8 and ``scales`` float32, both [out, in / 128]."""

    values: Tensor
    zeros: Tensor
    scales: Tensor

    @classmethod
    def read(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Weight:
        """The weight that the three stored tensors hold."""
        return cls(unpack(qweight).T.contiguous(), unpack(qzeros).T.contiguous(), scales.float().T.contiguous())

    def tensors(self) -> Mapping[str, Tensor]:
        """The three stored tensors by name."""
        return {
            "qweight": pack(self.values.T),
            "qzeros": pack(self.zeros.T),
            "scales": self.scales.T.to(torch.float16).contiguous(),
        }

    def dequantize(self) -> Tensor:
        """The weight [out, in], float32, exact."""
        groups = self.values.float().reshape(*self.zeros.shape, GROUP)
        return ((groups - self.zeros.float()[..., None]) * self.scales[..., None]).flatten(1)


@dataclass(frozen=True, slots=True)
class Lanes:
    """A weight in the GPU's layout: the stored integers, in the order in which a row is read.

    ``packed`` [out, in / 8] int32: nibble j of word c of a group's 16 holds input 16 j + c of the group's 128, so the
    same nibble of neighbouring words meets neighbouring inputs. ``zeros`` uint8 and ``scales`` float16 [out, in / 128].
    """

    packed: Tensor
    zeros: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Int4Weight) -> Lanes:
        """``weight`` in this layout: exact."""
        columns = weight.values.reshape(*weight.zeros.shape, 8, GROUP // 8).transpose(2, 3).flatten(1)
        return cls(pack(columns, IN_TURN), weight.zeros.contiguous(), weight.scales.to(torch.float16))

    @classmethod
    def cat(cls, parts: Sequence[Lanes]) -> Lanes:
        """The weights of ``parts``, one below the other."""
        return cls(
            torch.cat([part.packed for part in parts]),
            torch.cat([part.zeros for part in parts]),
            torch.cat([part.scales for part in parts]),
        )

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Its tensors."""
        return self.packed, self.zeros, self.scales

    def rows(self, start: int, end: int) -> Lanes:
        """Output rows ``start`` to ``end``: a view."""
        return Lanes(self.packed[start:end], self.zeros[start:end], self.scales[start:end])

    def weight(self) -> Int4Weight:
        """The weight that it holds: exact."""
        packed = self.packed.view(torch.uint8)
        columns = torch.stack((packed & LEVELS - 1, packed >> 4), dim=-1)
        values = columns.view(*self.zeros.shape, GROUP // 8, 8).transpose(2, 3).flatten(1)
        return Int4Weight(values, self.zeros, self.scales.float())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] rounded to ``dtype``."""
        weight = self.weight()
        levels = weight.values.view(torch.int8).view(*self.zeros.shape, GROUP) - self.zeros.view(torch.int8)[..., None]
        dense = torch.empty(levels.shape, dtype=dtype, device=levels.device)
        return torch.mul(levels, weight.scales[..., None], out=dense).flatten(1)

    def __call__(self, x: Tensor) -> Tensor:
        # Part by part: a whole weight, made for the prompt alone, would take more than all that is computed.
        n_rows = max(1, _PART // (GROUP * self.zeros.shape[1]))
        parts = (self.rows(start, start + n_rows) for start in range(0, len(self.packed), n_rows))
        return torch.cat([F.linear(x, part.dense(x.dtype)) for part in parts], dim=-1)


class Int4Linear(nn.Module):
    """A linear layer whose weight is in the AWQ format; its buffers carry the checkpoint's names.

    Until ``prepare`` it holds the stored tensors and multiplies by the exact weight: the reference. ``hold`` makes it
    a view of a fused weight in the GPU's layout. Prepared for a CPU it holds one other layout instead, half a byte a
    weight: bfloat16 activations go through ``compiled``, where numba is installed, or through PyTorch's int4 operator,
    others through float32 tiles of the exact weight. The operator takes float32 too, but as scalar code, some 20 times
    slower than its bfloat16, and with up to 9 times the rounding error of a matrix product: it sums a row in turn.
    """

    qweight: Tensor | None
    qzeros: Tensor | None
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        require_shape("of a linear layer", out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        n_groups = in_features // GROUP
        self.register_buffer("qweight", torch.zeros(in_features, out_features // 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(n_groups, out_features // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(n_groups, out_features, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._kernel: _Operator | _Tiles | Lanes | None = None

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that hold its weight now: as stored, or in the layout that it is prepared in."""
        return self._stored() or (() if self._kernel is None else self._kernel.held)

    @property
    def weight_bytes(self) -> int:
        """The memory its weight takes now, in bytes."""
        return sum(tensor.nbytes for tensor in self.held)

    def prepare(self, dtype: torch.dtype) -> None:
        """Repacks for activations of ``dtype`` on a CPU, and for kernels on a GPU; the stored tensors are let go."""
        stored = self._stored()
        if stored is None:
            return
        if stored[0].device.type == "cuda":
            self.hold(Lanes.of(Int4Weight.read(*stored)))
            return
        if stored[0].device.type != "cpu":
            return
        weight = Int4Weight.read(*stored)
        exact = compiled() is not None or not _Operator.fits(weight, dtype)
        self._kernel = _Tiles(weight) if exact else _Operator(weight)
        self.qweight = self.qzeros = self.scales = None

    def lanes(self) -> Lanes:
        """Its weight in the GPU's layout."""
        if isinstance(self._kernel, Lanes):
            return self._kernel
        stored = self._stored()
        if stored is not None:
            return Lanes.of(Int4Weight.read(*stored))
        assert isinstance(self._kernel, _Tiles), "PyTorch's operator keeps no exact weight"
        return Lanes.of(self._kernel.weight())

    def halves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its weight in the CPU's exact layout: packed, zeros, scales. Raises TypeError where it is in another one."""
        if not isinstance(self._kernel, _Tiles):
            raise TypeError("this weight is not prepared for a CPU, or for PyTorch's operator")
        return self._kernel.held

    def hold(self, lanes: Lanes) -> None:
        """Multiplies by ``lanes``, its own weight, from now on, and lets the stored tensors go."""
        self._kernel = lanes
        self.qweight = self.qzeros = self.scales = None

    def dequantize(self) -> Tensor:
        """The weight [out, in], float32: exact, but rounded to bfloat16 where PyTorch's operator is prepared."""
        stored = self._stored()
        if stored is not None:
            return Int4Weight.read(*stored).dequantize()
        assert self._kernel is not None
        if isinstance(self._kernel, Lanes):
            return self._kernel.weight().dequantize()
        dtype = torch.bfloat16 if isinstance(self._kernel, _Operator) else torch.float32
        return self._kernel(torch.eye(self.in_features, dtype=dtype)).float().T

    def forward(self, x: Tensor) -> Tensor:
        """The product [..., out] of ``x`` [..., in], in the dtype of ``x``."""
        if self._kernel is None:
            y = F.linear(x, self.dequantize().to(x.dtype))
        else:
            y = self._kernel(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _stored(self) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.qweight is None or self.qzeros is None or self.scales is None:
            return None
        return self.qweight, self.qzeros, self.scales


class _Operator:
    """PyTorch's CPU int4 operator: it reads ``(q - 8) * s + m`` with s and m in the dtype of the activations.

    In bfloat16 ``m = (8 - z) * s`` is rounded, by at most as much as a bfloat16 weight is.
    """

    def __init__(self, weight: Int4Weight) -> None:
        middle = (8.0 - weight.zeros.float()) * weight.scales
        self.steps = torch.stack((weight.scales, middle), dim=-1).transpose(0, 1).contiguous().bfloat16()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.values.int().contiguous(), 1)
        self.held = (self.packed, self.steps)

    @staticmethod
    def fits(weight: Int4Weight, dtype: torch.dtype) -> bool:
        """Whether the operator is the way to multiply ``weight`` by activations of ``dtype``."""
        return dtype == torch.bfloat16 and len(weight.values) % 16 == 0

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.bfloat16().contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.steps)
        return y.to(x.dtype)


class _Tiles:
    """The exact weight in the layout of ``compiled``, which multiplies it by bfloat16 where numba is installed.

    For other activations float32 weights are made tile by tile of rows, each multiplied while it is in the cache.
    """

    def __init__(self, weight: Int4Weight) -> None:
        halves = weight.values.reshape(*weight.zeros.shape, 2, GROUP // 2)
        self.packed = halves[:, :, 0] | halves[:, :, 1] << 4
        self.zeros = weight.zeros.contiguous()
        self.scales = weight.scales.to(torch.float16)
        self.held = (self.packed, self.zeros, self.scales)

    def weight(self) -> Int4Weight:
        """The weight that it holds: exact."""
        halves = torch.stack((self.packed & LEVELS - 1, self.packed >> 4), dim=2)
        return Int4Weight(halves.flatten(1), self.zeros, self.scales.float())

    def __call__(self, x: Tensor) -> Tensor:
        module = compiled() if x.dtype == torch.bfloat16 else None
        if module is not None:
            stored = module.matrix(module.INT4, self.packed, self.scales, self.zeros)
            y: Tensor = module.product(x, stored, len(self.zeros))
            return y
        n_out, n_groups, half = self.packed.shape
        n_rows = max(1, _TILE // (n_groups * GROUP))
        wide = x.float()
        made = wide.new_empty(len(x), n_out)
        tile = wide.new_empty(min(n_rows, n_out), n_groups, 2, half)
        for start in range(0, n_out, n_rows):
            rows = slice(start, start + n_rows)
            packed = self.packed[rows]
            part = tile[: len(packed)]
            part[:, :, 0] = packed & (LEVELS - 1)
            part[:, :, 1] = packed >> 4
            weight = part.view(len(packed), n_groups, GROUP)
            weight.sub_(self.zeros[rows, :, None].float()).mul_(self.scales[rows, :, None].float())
            made[:, rows] = wide @ weight.view(len(packed), -1).T
        return made.to(x.dtype)

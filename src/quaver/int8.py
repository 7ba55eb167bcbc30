"""Weights in 8 bits, a scale a row, and the layers that compute with them.

A weight is ``W[r, c] = q[r, c] * s[r]`` with q in -127..127. On disk: ``weight_int8`` [rows, columns] int8 and
``weight_scale`` [rows] bfloat16, whose range has room for the smallest rows. Another runtime stops at the missing
``weight`` rather than read the integers as one. This module is the only place that decides how an INT8 product is
computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SUFFIXES = (".weight_int8", ".weight_scale", ".kept_ids")
"""How the names of stored tensors end: the integers, their scales, and the ids of an embedding that lost rows."""
_LARGEST = 127
_SMALLEST = 2.0**-100
# The operator reads inputs in vectors of 8 or 16 and, unasked, beyond the end of rows that are no multiple of that.
_STRIDE = 32
# With AVX-512 and AMX it ends the process where inputs, or weights of four rows of inputs and more, begin elsewhere
# (bytes; PyTorch 2.13), as tensors of a mapped file do.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A matrix in 8 bits: ``values`` [R, C] int8 and ``scales`` [R] float32."""

    values: Tensor
    scales: Tensor

    @classmethod
    def nearest(cls, weight: Tensor) -> Int8Weight:
        """``weight`` [R, C] rounded to the nearest of 255 levels that span each row's range, 0 in the middle."""
        wide = weight.float()
        # Rounded before it is used, so that the levels are those that are read back; a row of zeros has one too.
        scales = (wide.abs().amax(1) / _LARGEST).clamp(min=_SMALLEST).bfloat16().float()
        values = (wide / scales[:, None]).round().clamp(-_LARGEST, _LARGEST)
        return cls(values.to(torch.int8), scales)

    def tensors(self) -> Mapping[str, Tensor]:
        """The two stored tensors by name."""
        return {"weight_int8": self.values, "weight_scale": self.scales.bfloat16()}

    def dequantize(self) -> Tensor:
        """The weight [R, C], float32."""
        return self.values.float() * self.scales.float()[:, None]


class Int8Linear(nn.Module):
    """A linear layer with its weight in 8 bits; its buffers carry the checkpoint's names.

    On a CPU bfloat16 activations go through PyTorch's int8 operator, which takes two fifths of the time of a plain
    bfloat16 product. In other types the operator is scalar code, some ten times slower than making the weight anew.
    """

    weight_int8: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight_int8", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def dequantize(self) -> Tensor:
        """The weight [out, in], float32."""
        return Int8Weight(self.weight_int8, self.weight_scale).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """The product [..., out] of ``x`` [..., in], in the dtype of ``x``."""
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and self.in_features % _STRIDE == 0:
            self.weight_int8 = _aligned(self.weight_int8)
            rows = _aligned(x.reshape(-1, self.in_features).contiguous())
            y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight_int8, self.weight_scale)
            y = y.view(*x.shape[:-1], self.out_features)
        else:
            # Sums of whole numbers up to 127 times an activation leave the range of float16.
            wide = x.float() if x.dtype == torch.float16 else x
            y = (F.linear(wide, self.weight_int8.to(wide.dtype)) * self.weight_scale.to(wide.dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


class Int8Embedding(nn.Module):
    """An embedding with its rows in 8 bits, of all ids or, where rows were pruned, of the ids in ``kept_ids``.

    It gives rows in ``dtype``, which loading sets to that of the model.
    """

    weight_int8: Tensor
    weight_scale: Tensor
    kept_ids: Tensor | None

    def __init__(self, n_rows: int, size: int, *, pruned: bool = False) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.register_buffer("weight_int8", torch.zeros(n_rows, size, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(n_rows, dtype=torch.bfloat16))
        self.register_buffer("kept_ids", torch.zeros(n_rows, dtype=torch.int32) if pruned else None)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows [..., size] of ``ids`` [...], wherever these are. Raises IndexError for an id without a row."""
        rows = self._rows(ids.to(self.weight_int8.device))
        found = self.weight_int8[rows].to(self.dtype) * self.weight_scale[rows].to(self.dtype)[..., None]
        return found.to(ids.device, non_blocking=True)

    def dequantize(self) -> Tensor:
        """All rows that are there [R, size], in ``dtype``."""
        return Int8Weight(self.weight_int8, self.weight_scale).dequantize().to(self.dtype)

    def pruned(self, ids: Tensor) -> Tensor:
        """Those of ``ids`` [...] that have no row, [N]."""
        if self.kept_ids is None:
            return ids[:0]
        ids = ids.to(self.kept_ids.device)
        return ids[self._rows(ids) == len(self.kept_ids)]

    def _rows(self, ids: Tensor) -> Tensor:
        """Where the ``ids`` are; one more than the last row for those that are nowhere."""
        if self.kept_ids is None:
            return ids
        n_rows = len(self.kept_ids)
        places = torch.searchsorted(self.kept_ids, ids.to(torch.int32)).clamp(max=n_rows - 1)
        return torch.where(self.kept_ids[places] == ids, places, n_rows)

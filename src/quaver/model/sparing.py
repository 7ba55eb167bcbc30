"""Weights that a GPU does not hold all the time, or not in full: kept in half precision, on the host, or lent from it.

Two ways, because weights are read in two ways. A *table* gives a few rows at a time: it stays on the host and is lent,
so that whoever reads a row reads across the bus, and nothing else knows. A *product* reads all of its weight: that is
brought part by part, each widened while it is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PART = 1 << 22
"""How many values of a weight that is kept elsewhere, or in another type, are brought at a time."""


def lent(table: Tensor, device: torch.device) -> Tensor:
    """``table`` as a tensor of the GPU ``device`` whose memory is the host's, pinned; on a CPU the table itself."""
    if device.type != "cuda":
        return table
    index = torch.cuda.current_device() if device.index is None else device.index
    flat = table.detach().contiguous().reshape(-1).view(torch.uint8)
    with torch.cuda.device(index):
        home = torch.empty(len(flat), dtype=torch.uint8, pin_memory=True).copy_(flat)
        # Pinned memory has one address for host and device; this is the way to tell PyTorch so.
        seen = torch.as_tensor(_Pinned(home), device=torch.device("cuda", index))
    return seen.view(table.dtype).view(table.shape)


class _Pinned:
    """Pinned bytes as what other libraries call a CUDA array; whoever views them keeps them alive."""

    def __init__(self, home: Tensor) -> None:
        self._home = home

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (len(self._home),), "typestr": "|u1", "data": (self._home.data_ptr(), False), "version": 3}


def apart(weight: Tensor, like: Tensor) -> bool:
    """Whether ``weight`` is kept on another device than ``like``, or in a narrower type (autocast has a wider one)."""
    return weight.device != like.device or weight.element_size() < like.element_size()


def brought(weight: Tensor, like: Tensor) -> Tensor:
    """``weight`` where ``like`` is and in its type; itself where it is not kept apart."""
    if not apart(weight, like):
        return weight
    # First across the bus, then wider: in one call the host would widen it, and wait for that.
    return weight.to(like.device, non_blocking=True).to(like.dtype)


def parts(weight: Tensor, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``weight`` along its first axis, brought to ``like`` part by part; whole where nothing is to be brought."""
    n = len(weight)
    if apart(weight, like):
        n = max(1, PART * n // max(1, weight.numel()))
    for start in range(0, len(weight), n):
        rows = slice(start, start + n)
        yield rows, brought(weight[rows], like)


class Linear(torch.nn.Linear):
    """A linear layer that brings its weight to what it is multiplied by."""

    def forward(self, input: Tensor) -> Tensor:
        """The product [..., out] of ``input`` [..., in]."""
        return F.linear(input, brought(self.weight, input), self.bias)

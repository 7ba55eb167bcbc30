"""Many small steps as one on a GPU, where starting them takes longer than doing them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Recorded:
    """A function of tensors that is called again and again on others of the same shapes, types and device.

    It gives what the function gives and changes nothing. On a GPU the second call records its steps as a CUDA graph,
    which later ones replay: what they return holds until the next call. The function must not look at values.
    """

    def __init__(self, fn: Callable[..., tuple[Tensor, ...]]) -> None:
        self._fn = fn
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function makes of ``inputs``."""
        if not inputs[0].is_cuda or not self._called:
            # Kernels are loaded when they are first run, which must not happen while recording.
            self._called = True
            return self._fn(*inputs)
        if self._graph is None:
            self._inputs = tuple(one.clone() for one in inputs)
            self._graph = self._record()
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        with torch.cuda.device(self._inputs[0].device):
            self._graph.replay()
        return self._outputs

    def _record(self) -> torch.cuda.CUDAGraph:
        # As torch.cuda.graph does, but for collecting garbage, which takes longer than recording.
        graph, device = torch.cuda.CUDAGraph(), self._inputs[0].device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        with torch.cuda.device(device), torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                self._outputs = self._fn(*self._inputs)
            finally:
                graph.capture_end()
        torch.cuda.synchronize(device)
        return graph

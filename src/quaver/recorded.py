"""Many small steps as one on a GPU, where starting them takes longer than doing them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from weakref import WeakMethod, WeakSet

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """A function of tensors that is called again and again on others of the same shapes, types and device.

    It gives what the function gives and changes nothing that is given. On a GPU the second call with inputs of some
    shapes and types records the steps as a CUDA graph, which later ones replay: what they return holds until the next
    such call. The function must not look at values; memory of its own that it works in must stay where it is, and is
    worked in once a call. Recordings and what they hold last as long as this, or until `forget`.
    Those of ``beside``, if given, work in the same memory: the two must take turns.
    """

    def __init__(self, fn: Function, beside: Recorded | None = None) -> None:
        self._fn, self._beside = fn, beside
        self._recordings: dict[object, _Recording | None] = {}
        _ALL.add(self)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function makes of ``inputs``."""
        if not inputs[0].is_cuda:
            return self._fn(*inputs)
        kind = tuple((one.shape, one.dtype, one.device) for one in inputs)
        if kind not in self._recordings:
            # Kernels are loaded when they are first run, which must not happen while recording.
            self._recordings[kind] = None
            return self._fn(*inputs)
        recording = self._recordings[kind]
        if recording is None:
            recording = self._recordings[kind] = _Recording.of(self._fn, inputs, self._room())
        return recording.replay(inputs)

    def _room(self) -> torch.cuda.CUDAGraph | None:
        """A graph whose memory recordings may work in, None where there is none: then each has its own."""
        there = () if self._beside is None else self._beside._recordings.values()
        return next((one.graph for one in there if one is not None), None)

    def forget(self) -> None:
        """Lets all recordings go."""
        self._recordings.clear()


def loose(method: Function) -> Function:
    """``method`` of an object that holds what calls this; held by that it would live until garbage is collected."""
    weak = WeakMethod(method)

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        held = weak()
        assert held is not None
        return held(*inputs)

    return call


_ALL: WeakSet[Recorded] = WeakSet()


def forget() -> None:
    """Lets the recordings of every function go: on a GPU they hold memory."""
    for one in _ALL:
        one.forget()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves garbage where it is meanwhile: an older graph that is found in it and destroyed ends a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Recording:
    """A graph, where it reads its inputs and where it leaves what it makes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, fn: Function, given: tuple[Tensor, ...], room: torch.cuda.CUDAGraph | None) -> _Recording:
        """The recording of ``fn`` on inputs like ``given``, that works in the memory of ``room``."""
        device = given[0].device
        inputs = tuple(one.clone(memory_format=torch.contiguous_format) for one in given)
        graph, stream = torch.cuda.CUDAGraph(), _stream(device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        with torch.cuda.device(device), torch.cuda.stream(stream), undisturbed():
            # As torch.cuda.graph does, but for collecting garbage, which takes longer than recording; and while this
            # thread records, others may go on copying to the device (see model.visiting).
            graph.capture_begin(pool=None if room is None else room.pool(), capture_error_mode="thread_local")
            try:
                outputs = fn(*inputs)
            finally:
                graph.capture_end()
        torch.cuda.synchronize(device)
        return cls(graph, inputs, outputs)

    def replay(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the function makes of ``given``, until the next replay."""
        for held, one in zip(self.inputs, given, strict=True):
            held.copy_(one)
        with torch.cuda.device(self.inputs[0].device):
            self.graph.replay()
        return self.outputs


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that is recorded on: matrix products keep a workspace for every stream they have run on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

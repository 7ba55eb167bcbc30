"""Decoder layers that stay in their files and visit the device one after the other: a model larger than its memory.

Two layers are in memory at a time, the next being read while one computes. The files are read, not mapped: what the
system keeps of them in its cache it can take back at any time, and no process counts it as its own.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quaver.checkpoint import Spec
from quaver.config import DecoderConfig
from quaver.errors import CheckpointError
from quaver.model.layers import DecoderLayer

_N_SLOTS = 2
_N_READERS = min(8, os.cpu_count() or 1)
_READ_BYTES = 1 << 23
"""What one reader reads at a time: a layer's tensors differ too much in size to share them out whole."""
_ALIGNMENT = 64
"""Where a tensor may begin in a slot, in bytes."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of a layer: its name there, what it is, and its first byte in its file."""

    name: str
    spec: Spec
    start: int


class Visiting(nn.ModuleList):
    """Takes the place of a decoder's list of layers. Whoever iterates runs each layer before asking for the next."""

    def __init__(
        self, config: DecoderConfig, specs: Mapping[str, Spec], prefix: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        """The layers of ``config`` whose tensors ``specs`` names ``prefix.INDEX.…``, computing in ``dtype``."""
        super().__init__()
        with torch.device("meta"):
            names = list(DecoderLayer(config).state_dict())
        starts: dict[Path, dict[str, int]] = {}
        self._layers: list[list[_Place]] = []
        for index in range(config.num_hidden_layers):
            full = {name: f"{prefix}.{index}.{name}" for name in names}
            for name in full.values():
                if specs[name].file not in starts:
                    starts[specs[name].file] = _starts(specs[name].file)
            self._layers.append(
                [_Place(name, specs[long], starts[specs[long].file][long]) for name, long in full.items()]
            )
        n_bytes = max(sum(_aligned(place.spec.n_bytes) for place in layer) for layer in self._layers)
        n_slots = min(_N_SLOTS, len(self._layers))
        # In a plain list, which hides them from the module: their weights belong to no layer in particular.
        self._slots = [_Slot(config, n_bytes, device, dtype) for _ in range(n_slots)]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[DecoderLayer]:
        # The threads live for one pass: a model that is dropped or fails half-way leaves none behind.
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(_N_READERS) as readers:
            slots = self._slots
            coming = deque(ahead.submit(slot.fill, self._layers[i], readers) for i, slot in enumerate(slots))
            for index in range(len(self)):
                slot = slots[index % len(slots)]
                coming.popleft().result()
                slot.enter()
                try:
                    yield slot.layer
                finally:
                    slot.leave()
                if index + len(slots) < len(self):
                    coming.append(ahead.submit(slot.fill, self._layers[index + len(slots)], readers))


class _Slot:
    """Room for one layer on the device, and on the host for its bytes as they are stored.

    On a GPU bytes are read into pinned memory, from which they are copied beside what is computed: two events tell when
    they have arrived, and when the layer before them has been run.
    """

    def __init__(self, config: DecoderConfig, n_bytes: int, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._on_gpu = device.type == "cuda"
        self._bytes = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        with torch.device("meta"):
            self.layer = DecoderLayer(config).requires_grad_(requires_grad=False).eval()
        if self._on_gpu:
            self.layer.to(dtype).to_empty(device=device)
            self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._arrived, self._used = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def fill(self, places: Sequence[_Place], readers: Executor) -> None:
        """Brings the layer that lies at ``places``; called beside what computes. Raises CheckpointError."""
        if self._on_gpu:
            self._arrived.synchronize()
        views, reading, start = [], [], 0
        for place in places:
            room = self._bytes[start : start + place.spec.n_bytes]
            views.append(room.view(place.spec.dtype).view(place.spec.shape))
            for first in range(0, len(room), _READ_BYTES):
                part = room[first : first + _READ_BYTES].numpy().data
                reading.append(readers.submit(_read, place.spec.file, place.start + first, part))
            start += _aligned(place.spec.n_bytes)
        for one in reading:
            one.result()
        if not self._on_gpu:
            for place, view in zip(places, views, strict=True):
                self._put(place.name, nn.Parameter(view.to(self._dtype), requires_grad=False))
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._copying):
            self._copying.wait_event(self._used)
            for place, view in zip(places, views, strict=True):
                self.layer.get_parameter(place.name).copy_(view, non_blocking=True)
            self._arrived.record(self._copying)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self.layer.get_submodule(module), leaf, parameter)

    def enter(self) -> None:
        """Lets what is asked for next wait until the layer has arrived."""
        if self._on_gpu:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)

    def leave(self) -> None:
        """Lets the next layer in once what was asked for before this is done."""
        if self._on_gpu:
            self._used.record(torch.cuda.current_stream(self._device))


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _starts(file: Path) -> dict[str, int]:
    """The first byte of every tensor in a safetensors file whose header has been checked."""
    with file.open("rb") as data:
        n_bytes = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(n_bytes))
    return {name: 8 + n_bytes + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _read(file: Path, start: int, into: memoryview) -> None:
    try:
        with file.open("rb", buffering=0) as data:
            data.seek(start)
            n_read = data.readinto(into)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if n_read != len(into):
        raise CheckpointError(f"{file} was cut short while it was in use: get the file again")

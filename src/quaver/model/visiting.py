"""Decoder layers that stay in their files and visit the device one after the other: a model larger than its memory.

Two layers are in memory at a time, the next being read while one computes. The files are read, not mapped: what the
system keeps of them in its cache it can take back at any time, and no process counts it as its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quaver.checkpoint import Spec
from quaver.config import DecoderConfig
from quaver.errors import CheckpointError
from quaver.model.layers import DecoderLayer

_N_SLOTS = 2
_N_READERS = min(16, os.cpu_count() or 1)
_ALIGNMENT = 64
"""Where a tensor may begin in a slot, in bytes."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of a layer: its name there, what it is, its first byte in its file, and in a slot."""

    name: str
    spec: Spec
    start: int
    at: int


@dataclass(frozen=True, slots=True)
class _Part:
    """So many bytes of a file, and where in a slot they go."""

    file: Path
    start: int
    at: int
    n_bytes: int


class _Layer:
    """A layer in its files: the ``places`` of its tensors, and the ``shares`` of reading it, one for each reader."""

    def __init__(
        self, specs: Mapping[str, Spec], names: Mapping[str, str], starts: Mapping[Path, Mapping[str, int]]
    ) -> None:
        self.places: list[_Place] = []
        self.n_bytes = 0
        for name, full in names.items():
            spec = specs[full]
            self.places.append(_Place(name, spec, starts[spec.file][full], self.n_bytes))
            self.n_bytes += _aligned(spec.n_bytes)
        # Tensors differ too much in size to be shared out whole, and each task costs the interpreter its time.
        share = -(-self.n_bytes // _N_READERS)
        self.shares: list[list[_Part]] = [[] for _ in range(_N_READERS)]
        for place in self.places:
            done = 0
            while done < place.spec.n_bytes:
                reader = (place.at + done) // share
                n_bytes = min(place.spec.n_bytes - done, (reader + 1) * share - place.at - done)
                self.shares[reader].append(_Part(place.spec.file, place.start + done, place.at + done, n_bytes))
                done += n_bytes


class Visiting(nn.ModuleList):
    """Takes the place of a decoder's list of layers. Whoever iterates runs each layer before asking for the next.

    While whatever stands between two passes is computed, the first layers are read for the next one.
    """

    def __init__(
        self, config: DecoderConfig, specs: Mapping[str, Spec], prefix: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        """The layers of ``config`` whose tensors ``specs`` names ``prefix.INDEX.…``, computing in ``dtype``."""
        super().__init__()
        with torch.device("meta"):
            names = list(DecoderLayer(config).state_dict())
        full = [{name: f"{prefix}.{index}.{name}" for name in names} for index in range(config.num_hidden_layers)]
        files = {specs[name].file for layer in full for name in layer.values()}
        starts = {file: _starts(file) for file in files}
        self._layers = [_Layer(specs, layer, starts) for layer in full]
        n_bytes = max(layer.n_bytes for layer in self._layers)
        # In a plain list, which hides them from the module: their weights belong to no layer in particular.
        self._slots = [_Slot(config, n_bytes, device, dtype) for _ in range(min(_N_SLOTS, len(self._layers)))]
        # Threads end when these are dropped, with the model.
        self._ahead, self._readers = ThreadPoolExecutor(1), ThreadPoolExecutor(_N_READERS)
        self._coming: list[Future[None]] = []
        self._waited_s = 0.0

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[DecoderLayer]:
        n_slots = len(self._slots)
        # What the last pass left coming are the first layers; one that was given up has left nothing of use.
        coming, self._coming = self._coming or [self._fill(index) for index in range(n_slots)], []
        for index in range(len(self)):
            slot = self._slots[index % n_slots]
            start = time.perf_counter()
            coming[index % n_slots].result()
            self._waited_s += time.perf_counter() - start
            slot.enter()
            try:
                yield slot.layer
            finally:
                slot.leave()
            following = index + n_slots
            coming[index % n_slots] = self._fill(following if following < len(self) else index % n_slots)
        self._coming = coming

    def take_waited_s(self) -> float:
        """The seconds that passes have waited for layers to be read since this was asked last."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _fill(self, index: int) -> Future[None]:
        """Has the layer ``index`` brought to its slot."""
        return self._ahead.submit(self._slots[index % len(self._slots)].fill, self._layers[index], self._readers)


class _Slot:
    """Room for one layer on the device, and on the host for its bytes as they are stored.

    On a GPU bytes are read into pinned memory, from which they are copied beside what is computed: two events tell when
    they have arrived, and when the layer before them has been run.
    """

    def __init__(self, config: DecoderConfig, n_bytes: int, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._on_gpu = device.type == "cuda"
        self._bytes = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        self._room = self._bytes.numpy().data
        with torch.device("meta"):
            self.layer = DecoderLayer(config).requires_grad_(requires_grad=False).eval()
        if self._on_gpu:
            self.layer.to(dtype).to_empty(device=device)
            self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._arrived, self._used = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def fill(self, layer: _Layer, readers: Executor) -> None:
        """Brings ``layer``; called beside what computes. Raises CheckpointError."""
        if self._on_gpu:
            self._arrived.synchronize()
        reading = [readers.submit(_read, share, self._room) for share in layer.shares]
        for one in reading:
            one.result()
        views = [
            (place.name, self._bytes[place.at : place.at + place.spec.n_bytes].view(place.spec.dtype))
            for place in layer.places
        ]
        if not self._on_gpu:
            for (name, view), place in zip(views, layer.places, strict=True):
                parameter = view.view(place.spec.shape).to(self._dtype)
                self._put(name, nn.Parameter(parameter, requires_grad=False))
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._copying):
            self._copying.wait_event(self._used)
            for name, view in views:
                self.layer.get_parameter(name).flatten().copy_(view, non_blocking=True)
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


def _read(parts: Sequence[_Part], room: memoryview) -> None:
    """Reads ``parts`` of files to where they belong in the slot ``room``."""
    try:
        for part in parts:
            into = room[part.at : part.at + part.n_bytes]
            with part.file.open("rb", buffering=0) as data:
                data.seek(part.start)
                if data.readinto(into) != part.n_bytes:
                    raise CheckpointError(f"{part.file} was cut short while it was in use: get the file again")
    except OSError as error:
        raise CheckpointError(f"{parts[0].file} cannot be read: {error.strerror}") from error

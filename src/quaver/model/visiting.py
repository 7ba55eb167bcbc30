"""Decoder layers that stay in their files and visit the device one after the other: a model larger than its memory.

Two layers are in memory at a time, the next being read while one computes. The files are read, not mapped: what the
system keeps of them in its cache it can take back at any time, and no process counts it as its own.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor, nn

from quaver.checkpoint import Spec
from quaver.config import DecoderConfig
from quaver.errors import CheckpointError
from quaver.model.layers import DecoderLayer

_N_SLOTS = 2
_N_READERS = min(16, os.cpu_count() or 1)
_SHARE_BYTES = 1 << 22
"""The least that is worth a reader: each has to be told, and to tell, through the interpreter."""
_ALIGNMENT = 64
"""Where a tensor may begin in a slot, in bytes."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of a layer: its name there, what it is, its first byte in its file, and in a slot."""

    name: str
    spec: Spec
    start: int
    at: int


@dataclass(slots=True)
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
        found = [specs[full] for full in names.values()]
        ats, self.n_bytes = _laid_out([spec.n_bytes for spec in found])
        self.places = [
            _Place(name, spec, starts[spec.file][full], at)
            for (name, full), spec, at in zip(names.items(), found, ats, strict=True)
        ]
        # Tensors differ too much in size to be shared out whole.
        share = max(_SHARE_BYTES, -(-self.n_bytes // _N_READERS))
        self.shares: list[list[_Part]] = [[] for _ in range(-(-self.n_bytes // share))]
        for place in self.places:
            done = 0
            while done < place.spec.n_bytes:
                reader = (place.at + done) // share
                n_bytes = min(place.spec.n_bytes - done, (reader + 1) * share - place.at - done)
                _add(self.shares[reader], _Part(place.spec.file, place.start + done, place.at + done, n_bytes))
                done += n_bytes


def _add(parts: list[_Part], new: _Part) -> None:
    """Adds ``new`` to the ``parts``, to the last of them where it only goes on with that."""
    if parts:
        last = parts[-1]
        if (last.file, last.start + last.n_bytes, last.at + last.n_bytes) == (new.file, new.start, new.at):
            last.n_bytes += new.n_bytes
            return
    parts.append(new)


class _Readers:
    """Threads that read, each with the files open for itself; they end, and the files close, when this is dropped."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises CheckpointError for a file that cannot be opened."""
        self._pool = ThreadPoolExecutor(_N_READERS)
        opened = ExitStack()
        finalize(self, opened.close)
        self._opened = [{file: opened.enter_context(_open(file)) for file in sorted(files)} for _ in range(_N_READERS)]

    def read(self, layer: _Layer, room: memoryview) -> None:
        """Reads ``layer`` into ``room``. Raises CheckpointError."""
        reading = [
            self._pool.submit(_read, opened, share, room)
            for opened, share in zip(self._opened, layer.shares, strict=False)
        ]
        for one in reading:
            one.result()


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
        files = {spec.file for name, spec in specs.items() if name.startswith(f"{prefix}.")}
        starts = {file: _starts(file) for file in files}

        def place(name: str) -> tuple[Path, int]:
            full = f"{prefix}.0.{name}"
            return specs[full].file, starts[specs[full].file][full]

        # As most files have them, so that what stands side by side there is read at once.
        names.sort(key=place)
        self._layers = [
            _Layer(specs, {name: f"{prefix}.{index}.{name}" for name in names}, starts)
            for index in range(config.num_hidden_layers)
        ]
        n_bytes = max(layer.n_bytes for layer in self._layers)
        shapes = {place.name: place.spec.shape for place in self._layers[0].places}
        # In a plain list, which hides them from the module: their weights belong to no layer in particular.
        self._slots = [_Slot(config, shapes, n_bytes, device, dtype) for _ in range(min(_N_SLOTS, len(self._layers)))]
        # Threads end when these are dropped, with the model.
        self._ahead, self._readers = ThreadPoolExecutor(1), _Readers(files)
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

    # The thread that fills it is in no inference mode, whatever mode this is called in.
    @torch.inference_mode(False)
    def __init__(
        self,
        config: DecoderConfig,
        shapes: Mapping[str, tuple[int, ...]],
        n_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Room for ``n_bytes`` of tensors of the ``shapes``, in their order, which compute in ``dtype``."""
        self._device, self._dtype = device, dtype
        self._on_gpu = device.type == "cuda"
        self._bytes = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        self._room = self._bytes.numpy().data
        with torch.device("meta"):
            self.layer = DecoderLayer(config).requires_grad_(requires_grad=False).eval()
        if self._on_gpu:
            sizes = [math.prod(shape) * dtype.itemsize for shape in shapes.values()]
            ats, n_there = _laid_out(sizes)
            self._there = torch.empty(n_there, dtype=torch.uint8, device=device)
            for (name, shape), at, size in zip(shapes.items(), ats, sizes, strict=True):
                self._put(name, self._there[at : at + size].view(dtype).view(shape))
            self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._arrived, self._used = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def fill(self, layer: _Layer, readers: _Readers) -> None:
        """Brings ``layer``; called beside what computes. Raises CheckpointError."""
        if self._on_gpu:
            self._arrived.synchronize()
        readers.read(layer, self._room)
        if not self._on_gpu:
            for place in layer.places:
                self._put(place.name, self._view(place).view(place.spec.shape).to(self._dtype))
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._copying):
            self._copying.wait_event(self._used)
            if all(place.spec.dtype == self._dtype for place in layer.places):
                # Then it lies there as it does here: one call, where each has to wait for the interpreter.
                self._there.copy_(self._bytes[: layer.n_bytes], non_blocking=True)
            else:
                for place in layer.places:
                    self.layer.get_parameter(place.name).flatten().copy_(self._view(place), non_blocking=True)
            self._arrived.record(self._copying)

    def _view(self, place: _Place) -> Tensor:
        """The bytes here of the tensor that has this ``place``, as what they are."""
        return self._bytes[place.at : place.at + place.spec.n_bytes].view(place.spec.dtype)

    def _put(self, name: str, value: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self.layer.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))

    def enter(self) -> None:
        """Lets what is asked for next wait until the layer has arrived."""
        if self._on_gpu:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)

    def leave(self) -> None:
        """Lets the next layer in once what was asked for before this is done."""
        if self._on_gpu:
            self._used.record(torch.cuda.current_stream(self._device))


def _laid_out(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where tensors of ``sizes`` in bytes begin side by side in a slot, and where the last of them ends."""
    ats, end = [], 0
    for size in sizes:
        ats.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return ats, end


def _starts(file: Path) -> dict[str, int]:
    """The first byte of every tensor in a safetensors file whose header has been checked."""
    with file.open("rb") as data:
        n_bytes = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(n_bytes))
    return {name: 8 + n_bytes + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _open(file: Path) -> FileIO:
    try:
        return FileIO(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _read(opened: Mapping[Path, FileIO], parts: Sequence[_Part], room: memoryview) -> None:
    """Reads ``parts`` of files that are ``opened`` to where they belong in the slot ``room``."""
    try:
        for part in parts:
            data = opened[part.file]
            data.seek(part.start)
            if data.readinto(room[part.at : part.at + part.n_bytes]) != part.n_bytes:
                raise CheckpointError(f"{part.file} was cut short while it was in use: get the file again")
    except OSError as error:
        raise CheckpointError(f"{parts[0].file} cannot be read: {error.strerror}") from error

"""What work takes, in seconds by stage and in memory of the host and of the device; and how it is held to less."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

WORKSPACE_BYTES = 4 << 20
"""What cuBLAS and cuBLASLt get to work in where memory is limited: what they get by themselves on small GPUs."""

_STATUS = Path("/proc/self/status")


class Clock:
    """Adds up the ``seconds`` of named stages of work on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.device = device

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time while open as that of ``name``; on a GPU until the work asked for is done."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Counts ``seconds`` more for the stage ``name``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def within(self, name: str, parts: Clock) -> None:
        """Counts the stages of ``parts``, which were part of the stage ``name``, as stages of their own."""
        for part, seconds in parts.seconds.items():
            self.add(part, seconds)
            self.add(name, -seconds)


def split(seconds: Mapping[str, float]) -> str:
    """The ``seconds`` of each stage, in words; those of no account left out."""
    return ", ".join(f"{name} {one:.1f}" for name, one in seconds.items() if one >= 0.05)


class Meter(Clock):
    """A Clock that also tells the most memory that PyTorch held on a GPU from here on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """As Clock.stage. What PyTorch holds on a GPU for reuse is given back: the next needs blocks of other sizes."""
        with super().stage(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()

    @property
    def device_bytes(self) -> int | None:
        """The most that PyTorch held on the GPU, cached blocks included, the driver's own not; None on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None


@contextmanager
def limited(device: torch.device, n_bytes: int) -> Iterator[None]:
    """While open, PyTorch takes ``n_bytes`` more of a GPU's memory at most; it gives back what it has cached first.

    Where more is needed at a time, torch.OutOfMemoryError is raised. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    # Not the device itself: these functions take none without a number, which means the current one.
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    before = torch.cuda.get_per_process_memory_fraction(index)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        min(before, (torch.cuda.memory_reserved(index) + n_bytes) / total), index
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


def cap(device: torch.device, n_bytes: int) -> None:
    """From here on PyTorch holds ``n_bytes`` of a GPU's memory at most, and a sixteenth more for its own rounding.

    Matrix products get WORKSPACE_BYTES to work in (by default 32 MB on compute capability 9.0), unless there were some
    before or the environment says how much. It is so for the whole process. On a CPU nothing changes.
    """
    if device.type == "cuda":
        # Read once, when the library is woken, by it and by PyTorch, which each set so much aside.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", f":{WORKSPACE_BYTES >> 10}:1")
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", str(WORKSPACE_BYTES >> 10))
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes * 17 / 16 / total), index)


def repack(device: torch.device, tensors: Iterable[Tensor]) -> None:
    """Lays out anew what of ``tensors`` is on ``device``, the largest first, so that it takes no more than it must.

    PyTorch takes memory of a GPU in segments of 20 MB that it never moves: where tensors were made and let go again,
    each is kept for the few that are left in it. Everything goes to the host for a moment, and its segments go back.
    Whoever views one of the tensors goes on doing so, at another address: no graph may have been captured yet.
    """
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # What lies in memory of others cannot be moved: that of the host is lent so (model.sparing).
        if tensor.device.type == device.type and storage.resizable() and storage.nbytes():
            storages[storage.data_ptr()] = storage

    def content(storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    with torch.no_grad():
        aside = []
        for storage in sorted(storages.values(), key=lambda one: -one.nbytes()):
            aside.append((storage, content(storage).to("cpu", copy=True)))
            storage.resize_(0)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for storage, kept in aside:
            storage.resize_(len(kept))
            content(storage).copy_(kept)


def shortage(error: BaseException) -> str | None:
    """What was wanted, in words, where ``error`` says that memory ran out; None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        # The rest tells of PyTorch's own settings.
        return ". ".join(text.split(". ")[:2]).removesuffix(".")
    if isinstance(error, MemoryError):
        return text or "the machine has no more"
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text:
        return text[text.index("DefaultCPUAllocator") :]
    return None


def host_bytes() -> int | None:
    """The most memory this process has had resident: mapped files and libraries included; None on Windows."""
    if _STATUS.exists():
        # What getrusage tells here includes the process this one was started from.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

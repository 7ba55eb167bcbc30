"""What a long piece of work takes: seconds by stage, and the most memory on the host and on the device."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


class Meter:
    """Adds up the seconds of named stages on ``device``, whose peak of memory it counts from here on."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time while open as that of ``name``; on a GPU until the work asked for is done.

        What PyTorch holds there for reuse is given back: the next stage needs blocks of other sizes.
        """
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Counts ``seconds`` more for the stage ``name``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def device_bytes(self) -> int | None:
        """The most that PyTorch held on the GPU, cached blocks included, the driver's own not; None on a CPU."""
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else None


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

    It is so for the whole process. On a CPU nothing changes.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes * 17 / 16 / total), index)


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

"""Several processes that train one model, one a GPU of one host, each with examples of its own (`torchrun`)."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process among those that `torchrun` started; alone without it. All leave a run at the same step."""

    def __init__(self, device: str | None) -> None:
        """``device``: such as cuda:1, the device of the first process; the others have those after it."""
        self.rank, self.world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        first = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        self.device = torch.device("cuda", (first.index or 0) + self.rank) if first.type == "cuda" else first
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self._clock = torch.zeros(1, device=self.device, dtype=torch.float64)
        self._begun = time.monotonic()

    def start(self, elapsed_s: float = 0.0) -> None:
        """Begins a run, ``elapsed_s`` of which are over."""
        self._begun = time.monotonic() - elapsed_s

    def elapsed_s(self) -> float:
        """The seconds since `start`, the same for all processes; all must ask equally often."""
        self._clock.fill_(time.monotonic() - self._begun)
        if self.world > 1:
            dist.broadcast(self._clock, 0)
        return float(self._clock)

    def everywhere(self, true: list[bool]) -> list[bool]:
        """Which of these are ``true`` for all processes; all must ask equally often."""
        if self.world == 1:
            return true
        flags = torch.tensor(true, device=self.device, dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return [bool(flag) for flag in flags.tolist()]

    def mean(self, gradients: list[Tensor]) -> None:
        """Gives ``gradients`` their mean over all processes."""
        if self.world == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])

    def end(self) -> None:
        """Leaves the group."""
        if self.world > 1:
            dist.destroy_process_group()

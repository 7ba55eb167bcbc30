"""Several processes that train one model agree on its gradients and on when to end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from training.ranks import Ranks

_PART = """
import torch
from training.ranks import Ranks
ranks = Ranks("cpu")
gradients = [torch.full((2, 3), 1.0 + ranks.rank), torch.arange(4.0) * ranks.rank]
ranks.mean(gradients)
ranks.start(100.0 * ranks.rank + 7.0)
print(ranks.rank, [g.flatten().tolist() for g in gradients], 7.0 <= ranks.elapsed_s() < 60.0,
      ranks.everywhere([True, ranks.rank == 0, ranks.rank == 1, False]))
ranks.end()
"""


def test_alone_nothing_changes() -> None:
    ranks = Ranks("cpu")
    gradients = [torch.arange(3.0)]
    ranks.mean(gradients)
    assert gradients[0].tolist() == [0.0, 1.0, 2.0]
    assert ranks.everywhere([True, False]) == [True, False]
    ranks.start(5.0)
    assert 5.0 <= ranks.elapsed_s() < 30.0
    assert (ranks.rank, ranks.world, ranks.device.type) == (0, 1, "cpu")


def test_two_processes_have_the_mean_and_the_first_ones_clock() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PART],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip().splitlines()[-1] for process in started]
    wanted = "[[1.5, 1.5, 1.5, 1.5, 1.5, 1.5], [0.0, 0.5, 1.0, 1.5]] True [True, False, False, False]"
    assert said == [f"0 {wanted}", f"1 {wanted}"]

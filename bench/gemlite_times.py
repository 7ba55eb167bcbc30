"""GemLite's product of one row and a 4-bit weight, beside ours (`products` in speed.py): the talker's shapes, BF16.

GemLite (Apache-2.0, Triton alone; `pip install gemlite`) is no part of quaver: where it is missing this says so. Ours
has the norm in front and SiLU or the residual stream behind it; GemLite's is the product alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from quaver.frame import Weights

GRAPH_MS = Callable[[Callable[[], None]], float]


def gemlite_times(weights: Weights, graph_ms: GRAPH_MS) -> list[dict[str, Any]]:
    """Microseconds and bandwidth of each shape; each call reads the next layer's weight, as ours do."""
    if find_spec("gemlite") is None:
        return [{"not here": "GemLite is not installed (pip install gemlite)"}]
    from gemlite import __version__
    from gemlite.helper import A16W4_HQQ_INT

    like = weights.tables[0]
    make = A16W4_HQQ_INT(device=str(like.device), dtype=like.dtype)
    found: list[dict[str, Any]] = [{"gemlite": __version__}]
    for name in ("qkv", "o", "gate_up", "down"):
        matrices = [getattr(layer, name) for layer in weights.talker]
        if any(matrix.lanes is None for matrix in matrices):
            return [{"not here": "the talker is not in 4 bits"}]
        layers = []
        for matrix in matrices:
            weight = matrix.lanes.weight()
            layers.append(make.from_weights(weight.values, weight.scales, weight.zeros))
        x = torch.randn(1, matrices[0].shape[1], device=like.device).to(like.dtype)
        wanted = x.float() @ matrices[0].lanes.dense(torch.float32).T
        error = (layers[0](x).float() - wanted).norm() / wanted.norm()
        us = 1e3 * graph_ms(partial(_all, layers, x)) / len(layers)
        row = {"product": f"talker {name}", "us": us, "tb_s": matrices[0].n_bytes / us / 1e6, "error": float(error)}
        found.append(row)
    return found


def _all(layers: list[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)

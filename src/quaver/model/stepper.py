"""Decoder stacks that take one position after the other on a CPU, compiled: what ``Decoder`` asks for a few positions.

A step of PyTorch is some sixty small operators a layer, and a frame of speech has a hundred layers to pass: half of its
time. Here a step is one call.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quaver.int4 import Int4Linear, compiled
from quaver.int8 import Int8Linear
from quaver.model.layers import GROUPS, Decoder, DecoderLayer, KVCache, Rotary

if TYPE_CHECKING:
    from quaver.compiled import Stack

_MOST = 2
"""How many rows times positions go step by step; more at once are faster through PyTorch."""
_LINEARS = tuple(path for group in GROUPS for path in group.linears)


class Stepper:
    """The layers of one Decoder, compiled. Its results are those of the layers, but for float rounding."""

    def __init__(self, decoder: Decoder, kernels: ModuleType) -> None:
        """``kernels`` is quaver.compiled. Raises TypeError where a layer is stored in a way that it does not know."""
        self._config, self._kernels, self._capacity = decoder.config, kernels, 0
        layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        # The tensors themselves: the table holds their addresses.
        self._held = [[_stored(layer.get_submodule(path), kernels) for path in _LINEARS] for layer in layers]
        norms = [(layer.input_layernorm.weight, layer.post_attention_layernorm.weight) for layer in layers]
        norms.append((decoder.norm.weight, decoder.norm.weight))
        heads = [(layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight) for layer in layers]
        self._gains, self._head_gains = (
            torch.stack([torch.stack(pair) for pair in pairs]).detach() for pairs in (norms, heads)
        )
        self._stack: Stack | None = None
        self._turns: Rotary | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy has weights of its own, elsewhere: it has no stepper until one is attached."""
        return type(None), ()

    def takes(self, x: Tensor, cache: KVCache | None, lengths: Tensor | None) -> bool:
        """Whether it is the way for ``x`` [B, n, D]."""
        return cache is not None and lengths is None and x.dtype == torch.bfloat16 and x.shape[0] * x.shape[1] <= _MOST

    def __call__(self, x: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, n, D] of ``x`` [B, n, D], after the last norm; see Decoder.forward."""
        stack, turns = self._ready(cache.keys.shape[3])
        y = torch.empty_like(x)
        for row, positions in enumerate(cache.positions(x.shape[1]).tolist()):
            for index, position in enumerate(positions):
                turn = turns.cos[position], turns.sin[position]
                y[row, index] = stack.step(x[row, index].detach(), turn, (cache.keys, cache.values), row, position)
        cache.advance(x.shape[1])
        return y

    def _ready(self, capacity: int) -> tuple[Stack, Rotary]:
        """The stack and the rotary tables [C, d], with room for ``capacity`` positions."""
        if self._stack is None or self._turns is None or capacity > self._capacity:
            module, config = self._kernels, self._config
            layers = [[module.matrix(*stored) for stored in layer] for layer in self._held]
            heads = config.num_attention_heads, config.num_key_value_heads
            shape = *heads, config.intermediate_size, capacity
            self._stack = module.Stack(layers, self._gains, self._head_gains, config.rms_norm_eps, shape)
            everywhere = torch.arange(capacity)[None]
            turns = Rotary.at(everywhere, config.head_dim, config.rope_theta, torch.float32)
            self._turns, self._capacity = Rotary(turns.cos[0, 0], turns.sin[0, 0]), capacity
        return self._stack, self._turns


def attach(decoder: Decoder) -> None:
    """Lets ``decoder`` take few positions step by step, where numba is installed and its layers are on a CPU."""
    kernels = compiled()
    try:
        decoder.stepper = None if kernels is None else Stepper(decoder, kernels)
    except TypeError:
        decoder.stepper = None


def _stored(linear: nn.Module, kernels: ModuleType) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
    """How the weight of ``linear`` is stored, and its tensors. Raises TypeError where no product is compiled for it."""
    if isinstance(linear, Int4Linear) and linear.bias is None:
        packed, zeros, scales = linear.halves()
        return kernels.INT4, packed, scales, zeros
    if isinstance(linear, Int8Linear) and linear.bias is None and linear.weight_int8.device.type == "cpu":
        return kernels.INT8, linear.weight_int8, linear.weight_scale, None
    if isinstance(linear, nn.Linear) and linear.bias is None:
        weight = linear.weight.detach()
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            return kernels.BFLOAT16, weight, None, None
    raise TypeError(f"no compiled product for {linear}")

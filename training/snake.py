"""The codec decoder's second half as it is trained on a GPU: the same function with the channels last.

Convolutions on a GPU want the channels last: as the package's modules have them, every one is turned around and back.
And the activation, six passes over the largest tensors of the model in float32, is one kernel each way here, in the
input's dtype. Same values, same gradients (`check` compares them). Shapes: B batch, L steps, C channels.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.model.codec import CausalConv, CausalTransposedConv, CodecDecoder, ResidualUnit, UpsampleBlock
from quaver.model.snake import SnakeBeta

_TILE = 4096
"""Values a program has in hand at a time."""
_PROGRAMS = 2048
"""So many programs share the rows: each adds up its own part of the gradients of alpha and beta."""


# ruff: noqa: ANN001, ANN202
# Triton reads a kernel's annotations as types of its own: only constexpr may stand there.
@triton.jit  # type: ignore[untyped-decorator]
def _forward(x, y, alpha, beta, n, channels, rows: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, width)
    own = channel < channels
    a, b = tl.exp(tl.load(alpha + channel, own, 0.0)), tl.exp(tl.load(beta + channel, own, 0.0)) + 1e-9
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    inside = (row < n)[:, None] & own[None, :]
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    wave = tl.sin(v * a[None, :])
    tl.store(y + at, v + wave * wave / b[None, :], inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    x, g, dx, alpha, beta, dalpha, dbeta, n, channels, blocks, rows: tl.constexpr, width: tl.constexpr
):
    channel = tl.arange(0, width)
    own = channel < channels
    a, b = tl.exp(tl.load(alpha + channel, own, 0.0)), tl.exp(tl.load(beta + channel, own, 0.0)) + 1e-9
    da, db = tl.zeros([width], tl.float32), tl.zeros([width], tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block * rows + tl.arange(0, rows)
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = (row < n)[:, None] & own[None, :]
        v = tl.load(x + at, inside, 0.0).to(tl.float32)
        up = tl.load(g + at, inside, 0.0).to(tl.float32)
        wave, double = tl.sin(v * a[None, :]), tl.sin(2.0 * v * a[None, :])
        slope = up * double * a[None, :] / b[None, :]
        tl.store(dx + at, up + slope, inside)
        da += tl.sum(slope * v, 0)
        db += tl.sum(-up * wave * wave / b[None, :], 0)
    tl.atomic_add(dalpha + channel, da, own)
    tl.atomic_add(dbeta + channel, db, own)


class _Snake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        x = x.contiguous()
        n, channels = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty_like(x)
        width = triton.next_power_of_2(channels)
        rows = max(1, _TILE // width)
        _forward[(triton.cdiv(n, rows),)](x, y, alpha, beta, n, channels, rows, width)
        ctx.save_for_backward(x, alpha, beta)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, alpha, beta = ctx.saved_tensors
        g = g.contiguous()
        n, channels = x.numel() // x.shape[-1], x.shape[-1]
        dx, dalpha, dbeta = torch.empty_like(x), torch.zeros_like(alpha), torch.zeros_like(beta)
        width = triton.next_power_of_2(channels)
        rows = max(1, _TILE // width)
        blocks = triton.cdiv(n, rows)
        grid = (min(blocks, _PROGRAMS),)
        _backward[grid](x, g, dx, alpha, beta, dalpha, dbeta, n, channels, blocks, rows, width)
        return dx, dalpha, dbeta


def _snake(x: Tensor, module: SnakeBeta) -> Tensor:
    out: Tensor = _Snake.apply(x, module.alpha, module.beta)  # type: ignore[no-untyped-call]
    return out


def _conv(x: Tensor, module: CausalConv) -> Tensor:
    """``module`` of ``x`` [B, L, C]."""
    conv = module.conv
    if conv.out_channels == 1:
        # One channel out suits no kernel: every tap by itself, and their shifted sum.
        taps = F.linear(F.pad(x, (0, 0, module.context, 0)), conv.weight[0].T)
        n = x.shape[1]
        return reduce(torch.add, [taps[:, i : i + n, i] for i in range(taps.shape[-1])])[..., None] + conv.bias  # type: ignore[operator]
    if not module.context:
        return F.linear(x, conv.weight[:, :, 0], conv.bias)
    image = F.pad(x, (0, 0, module.context, 0)).transpose(1, 2)[:, :, None]
    weight = conv.weight[:, :, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(image, weight, conv.bias, dilation=(1, conv.dilation[0]))[:, :, 0].transpose(1, 2)


def _transposed(x: Tensor, module: CausalTransposedConv) -> Tensor:
    n = x.shape[1]
    weight, bias = module.conv.weight, module.conv.bias
    assert bias is not None
    # [C, C', context + 1, stride] to [C, tap, step, C']: what comes out has its channels last already.
    kernel = weight.view(*weight.shape[:2], -1, module.stride).permute(0, 2, 3, 1)
    spread = F.pad(x, (0, 0, module.context, 0)) @ kernel.flatten(1)
    spread = spread.view(*spread.shape[:2], module.context + 1, -1)
    y = reduce(torch.add, [spread[:, module.context - j :, j][:, :n] for j in range(module.context + 1)])
    return y.reshape(len(x), n * module.stride, -1) + bias.to(y.dtype)


def _module(x: Tensor, module: nn.Module) -> Tensor:
    if isinstance(module, SnakeBeta):
        return _snake(x, module)
    if isinstance(module, CausalConv):
        return _conv(x, module)
    if isinstance(module, CausalTransposedConv):
        return _transposed(x, module)
    if isinstance(module, ResidualUnit):
        parts: tuple[nn.Module, ...] = (module.act1, module.conv1, module.act2, module.conv2)
        return x + reduce(_module, parts, x)
    assert isinstance(module, UpsampleBlock)
    return reduce(_module, module.block, x)


def sounded(decoder: CodecDecoder, middle: Tensor) -> Tensor:
    """The samples [B, N] that the second half of ``decoder`` makes of what the first half made [B, C, L]."""
    out = reduce(_module, decoder.decoder, middle.transpose(1, 2))
    return out.squeeze(-1).clamp(-1.0, 1.0)


def check(decoder: CodecDecoder, plain: Any) -> float:
    """The largest relative difference of samples and gradients from those of the function ``plain``, in float32."""
    weights = [p for p in decoder.decoder.parameters() if p.requires_grad]
    middle = torch.randn(2, decoder.config.latent_dim, 40, device=weights[0].device, requires_grad=True)
    worst, inputs = 0.0, [middle, *weights]
    found = []
    for function in (plain, sounded):
        made = function(decoder, middle)
        found.append((made, *torch.autograd.grad(made.square().sum(), inputs)))
    for a, b in zip(*found, strict=True):
        worst = max(worst, float(((a - b).norm() / a.norm().clamp(min=1e-9)).detach()))
    return worst

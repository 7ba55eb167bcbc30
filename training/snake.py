"""The codec's activation as one kernel each way, for training on a GPU.

In plain PyTorch it is six passes over the largest tensors of the model, in float32; this is one, in the input's
dtype, and about halves a training step. Same function, same gradients (`check` compares them).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor, nn

from quaver.model.codec import SnakeBeta

_BLOCK = 2048


# ruff: noqa: ANN001, ANN202
# Triton reads a kernel's annotations as types of its own: only constexpr may stand there.
@triton.jit  # type: ignore[untyped-decorator]
def _forward(x, y, alpha, beta, channels, length, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0), tl.program_id(1) * block + tl.arange(0, block)
    channel, inside = row % channels, at < length
    a, b = tl.exp(tl.load(alpha + channel)), tl.exp(tl.load(beta + channel)) + 1e-9
    start = row.to(tl.int64) * length
    v = tl.load(x + start + at, inside, 0.0).to(tl.float32)
    wave = tl.sin(v * a)
    tl.store(y + start + at, v + wave * wave / b, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    x, g, dx, alpha, beta, dalpha, dbeta, channels, length, block: tl.constexpr
):
    row, at = tl.program_id(0), tl.program_id(1) * block + tl.arange(0, block)
    channel, inside = row % channels, at < length
    a, b = tl.exp(tl.load(alpha + channel)), tl.exp(tl.load(beta + channel)) + 1e-9
    start = row.to(tl.int64) * length
    v = tl.load(x + start + at, inside, 0.0).to(tl.float32)
    up = tl.load(g + start + at, inside, 0.0).to(tl.float32)
    wave, double = tl.sin(v * a), tl.sin(2.0 * v * a)
    slope = up * double * a / b
    tl.store(dx + start + at, up + slope, inside)
    tl.atomic_add(dalpha + channel, tl.sum(slope * v, 0))
    tl.atomic_add(dbeta + channel, -tl.sum(up * wave * wave / b, 0))


class _Snake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        x = x.contiguous()
        batch, channels, length = x.shape
        y = torch.empty_like(x)
        _forward[(batch * channels, triton.cdiv(length, _BLOCK))](x, y, alpha, beta, channels, length, _BLOCK)
        ctx.save_for_backward(x, alpha, beta)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, alpha, beta = ctx.saved_tensors
        g = g.contiguous()
        batch, channels, length = x.shape
        dx, dalpha, dbeta = torch.empty_like(x), torch.zeros_like(alpha), torch.zeros_like(beta)
        grid = (batch * channels, triton.cdiv(length, _BLOCK))
        _backward[grid](x, g, dx, alpha, beta, dalpha, dbeta, channels, length, _BLOCK)
        return dx, dalpha, dbeta


def _snake(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    out: Tensor = _Snake.apply(x, alpha, beta)  # type: ignore[no-untyped-call]
    return out


def _call(module: SnakeBeta, x: Tensor, memory: object = None) -> Tensor:
    return _snake(x, module.alpha, module.beta)


def install(model: nn.Module) -> None:
    """Makes every SnakeBeta of ``model`` run as one kernel."""
    for module in model.modules():
        if isinstance(module, SnakeBeta):
            object.__setattr__(module, "forward", functools.partial(_call, module))


def check(device: torch.device) -> float:
    """The largest relative difference of output and gradients from the plain module on ``device``."""
    torch.manual_seed(0)
    plain = SnakeBeta(6).to(device)
    plain.alpha.data.normal_()
    plain.beta.data.normal_()
    x = torch.randn(3, 6, 5000, device=device, requires_grad=True)
    g = torch.randn(3, 6, 5000, device=device)
    worst = 0.0
    inputs = (x, plain.alpha, plain.beta)
    expected = (plain(x), *torch.autograd.grad(plain(x), inputs, g))
    got = (_snake(*inputs), *torch.autograd.grad(_snake(*inputs), inputs, g))
    for a, b in zip(expected, got, strict=True):
        worst = max(worst, float(((a - b).norm() / a.norm()).detach()))
    return worst

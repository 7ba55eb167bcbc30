"""The decoder stack and the code predictor as they are trained: the same functions in fewer, larger operators.

`tests/test_training.py` holds them against the package's own. Grouped queries get their keys repeated, so that float32
has a fused attention kernel on a GPU too. Shapes: B batch, T positions, D hidden, d head size, N frames, Q codebooks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.model.layers import Decoder, DecoderLayer, RMSNorm
from quaver.model.predictor import Predictor
from quaver.model.talker import Talker

_SHORT = 16
_broken: set[str] = set()
"""Kernels that `settle` found wrong on the device."""

_fused: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What `fuse` compiled instead of a function, for where gradients are wanted."""

Heads = tuple[Tensor, Tensor]
"""Queries and keys [B, T, d] of a layer's first head."""


def fuse() -> None:
    """From now on layers and losses are compiled, once for all batches; that takes some 20 s."""
    _fused[_layer] = torch.compile(_layer)
    _fused.update({function: torch.compile(function, dynamic=True) for function in (_strayed, _surprise)})


def unfuse() -> None:
    """From now on nothing is compiled."""
    _fused.clear()


def _best(function: Callable[..., Any]) -> Callable[..., Any]:
    return _fused.get(function, function) if torch.is_grad_enabled() else function


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``x`` over its last axis."""
    if x.is_cuda and not _broken:
        return F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention [B, H, T, d]."""
    n = query.shape[2]
    if n > _SHORT:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    # A fused kernel works on 64 positions or more; the code predictor has sixteen.
    scores = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    out: Tensor = scores.masked_fill(later, -math.inf).softmax(-1).to(value.dtype) @ value
    return out


def _layer(
    x: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, eps: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of ``x`` [B, T, D], and queries and keys [B, T, d] of its first head; ``weights`` as `_weights` has
    them."""
    before, q, k, v, q_norm, k_norm, o, after, gate, up, down = weights
    d, batch, n = q_norm.shape[0], x.shape[0], x.shape[1]
    n_query, n_key = q.shape[0] // d, k.shape[0] // d
    heads = F.linear(norm(x, before, eps), torch.cat((q, k, v))).view(batch, n, -1, d)
    turned, values = heads[:, :, : n_query + n_key], heads[:, :, n_query + n_key :]
    turned = norm(turned, torch.cat((q_norm.expand(n_query, d), k_norm.expand(n_key, d))), eps)
    left, right = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-right, left), dim=-1) * sin).to(values.dtype)
    query, key = turned[:, :, :n_query], turned[:, :, n_query:]
    key, values = (part.repeat_interleave(n_query // n_key, dim=2).transpose(1, 2) for part in (key, values))
    y = _attended(query.transpose(1, 2), key, values)
    x = x + F.dropout(F.linear(y.transpose(1, 2).reshape(batch, n, -1), o), dropout)
    gates, values = F.linear(norm(x, after, eps), torch.cat((gate, up))).chunk(2, dim=-1)
    x = x + F.dropout(F.linear(F.silu(gates) * values, down), dropout)
    return x, query[:, :, 0], turned[:, :, n_query]


def _weights(layer: DecoderLayer) -> tuple[Tensor, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight,
        attention.q_norm.weight, attention.k_norm.weight, attention.o_proj.weight,
        layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
    )  # fmt: skip


def states(decoder: Decoder, x: Tensor, kept: tuple[int, ...] = (), dropout: float = 0.0) -> tuple[Tensor, list[Heads]]:
    """Hidden states [B, T, D] of the inputs ``x`` [B, T, D], as ``decoder(x)``; first heads of the ``kept`` layers."""
    rotary = decoder.rotary(torch.arange(x.shape[1], device=x.device)[None], torch.float32)
    cos, sin = rotary.cos.transpose(1, 2), rotary.sin.transpose(1, 2)
    run, heads = _best(_layer), list[Heads]()
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        if _fused:
            long = x.shape[1] > _SHORT
            for sized, axes in ((x, (0, 1) if long else (0,)), *((part, (1,)) for part in (cos, sin) if long)):
                torch._dynamo.mark_dynamic(sized, axes)
        x, q, k = run(x, _weights(layer), cos, sin, layer.input_layernorm.eps, dropout)
        if index in kept:
            heads.append((q, k))
    return _normed(x, decoder.norm), heads


def _normed(x: Tensor, module: RMSNorm) -> Tensor:
    return norm(x, module.weight, module.eps)


def code_tables(talker: Talker) -> Tensor:
    """The embeddings of all codebooks one below the other: codebook 0 with the control ids, then 1 to Q - 1."""
    tables = [m.weight for m in talker.code_predictor.model.codec_embedding if isinstance(m, nn.Embedding)]
    return torch.cat((talker.model.codec_embedding.weight, *tables))


def code_rows(talker: Talker, device: torch.device) -> Tensor:
    """The first row [Q] of each codebook in `code_tables`."""
    predictor = talker.code_predictor
    rest = talker.config.vocab_size + predictor.config.vocab_size * torch.arange(predictor.n_residual, device=device)
    return F.pad(rest, (1, 0))


def force(predictor: Predictor, hidden: Tensor, given: Tensor) -> Tensor:
    """Logits [N, Q-1, V'] of codebooks 1 to Q - 1 from ``hidden`` [N, D] and the embeddings ``given`` [N, Q-1, D]
    of codebooks 0 to Q - 2."""
    x = predictor.small_to_mtp_projection(torch.cat((hidden[:, None], given.to(hidden.dtype)), dim=1))
    found, _ = states(predictor.model, x)
    heads = torch.stack([m.weight for m in predictor.lm_head if isinstance(m, nn.Linear)])
    logits: Tensor = torch.matmul(found[:, 1:].transpose(0, 1), heads.transpose(1, 2)).transpose(0, 1)
    return logits


def surprise(logits: Tensor, wanted: Tensor) -> Tensor:
    """The cross-entropies [...] in nats of the codes ``wanted`` [...] under ``logits`` [..., V]."""
    found: Tensor = _best(_surprise)(logits, wanted)
    return found


def _surprise(logits: Tensor, wanted: Tensor) -> Tensor:
    wide = logits.float()
    return wide.logsumexp(-1) - wide.gather(-1, wanted[..., None]).squeeze(-1)


def strayed(heads: Heads, query: Tensor, key: Tensor, paced: Tensor) -> Tensor:
    """How little of a head's attention falls where it is wanted: mean of minus the log of the wanted share.

    ``query`` [B, F]: positions that look, NOTHING-padded rows weigh 0 in ``paced``; ``key`` [B, F, T]: the log of how
    welcome each position is; ``paced`` [B, F]: the weight of each look.
    """
    found: Tensor = _best(_strayed)(*heads, query, key, paced)
    return found


def _strayed(q: Tensor, k: Tensor, query: Tensor, key: Tensor, paced: Tensor) -> Tensor:
    q = q.float().gather(1, query[..., None].expand(-1, -1, q.shape[-1]))
    scores = q @ k.float().transpose(1, 2) * q.shape[-1] ** -0.5
    later = torch.arange(scores.shape[-1], device=q.device) > query[..., None]
    scores = scores.masked_fill(later, -1e4)
    share = (scores + key).logsumexp(-1) - scores.logsumexp(-1)
    found: Tensor = -(share * paced).sum() / paced.sum()
    return found


def agreement(talker: Talker, device: torch.device) -> float:
    """The largest difference, in shares of its size, of any gradient of the stack on ``device`` from that on a CPU.

    Nan where one is not finite: a kernel of the device is broken then.
    """
    torch.manual_seed(0)
    x = torch.randn(3, 70, talker.config.hidden_size)
    found = []
    for where in (torch.device("cpu"), device):
        part = copy.deepcopy(talker.model).to(where)
        part.requires_grad_(True)
        out, _ = states(part, x.to(where))
        (out * torch.linspace(-1, 1, out.shape[-1], device=where)).square().sum().backward()  # type: ignore[no-untyped-call]
        found.append({n: p.grad.cpu() for n, p in part.named_parameters() if p.grad is not None})
    ours, theirs = found
    if not all(bool(g.isfinite().all()) for g in theirs.values()):
        return float("nan")
    return max(float((theirs[n] - g).norm() / g.norm().clamp(min=1e-9)) for n, g in ours.items())


def settle(talker: Talker, device: torch.device) -> None:
    """Tells whether the stack learns on ``device`` as on a CPU, and leaves its fused norm out where it does not."""
    differs = agreement(talker, device)
    print(f"the stack's gradients on the device differ by {differs:.1e}", flush=True)
    if not differs < 0.05:
        _broken.add("norm")
        print(f"without the fused norm they differ by {agreement(talker, device):.1e}", flush=True)

"""The decoder stack and the code predictor as they are trained: the same functions in fewer, larger operators.

`tests/test_training.py` holds them against the package's own. Grouped queries get their keys repeated, so that float32
has a fused attention kernel on a GPU too. Shapes: B batch, T positions, D hidden, d head size, N frames, Q codebooks.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.model.layers import Attention, Decoder, DecoderLayer, RMSNorm
from quaver.model.predictor import Predictor
from quaver.model.talker import Talker

_broken: set[str] = set()
"""Kernels that `settle` found wrong on the device."""

Heads = tuple[Tensor, Tensor]
"""Queries and keys [B, T, d] of a layer's first head."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``x`` over its last axis."""
    if x.is_cuda and not _broken:
        return F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _attention(x: Tensor, module: Attention, cos: Tensor, sin: Tensor) -> tuple[Tensor, Heads]:
    d, batch, n = module.head_dim, x.shape[0], x.shape[1]
    n_query, n_key = module.q_proj.out_features // d, module.k_proj.out_features // d
    y = F.linear(x, torch.cat((module.q_proj.weight, module.k_proj.weight, module.v_proj.weight)))
    heads = y.view(batch, n, -1, d)
    turned, values = heads[:, :, : n_query + n_key], heads[:, :, n_query + n_key :]
    scale = torch.cat((module.q_norm.weight.expand(n_query, d), module.k_norm.weight.expand(n_key, d)))
    turned = norm(turned, scale, module.q_norm.eps)
    left, right = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-right, left), dim=-1) * sin).to(values.dtype)
    q, k = turned[:, :, :n_query], turned[:, :, n_query:]
    k, v = (part.repeat_interleave(n_query // n_key, dim=2).transpose(1, 2) for part in (k, values))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
    return module.o_proj(out.transpose(1, 2).reshape(batch, n, -1)), (q[:, :, 0], turned[:, :, n_query])


def states(decoder: Decoder, x: Tensor, kept: tuple[int, ...] = (), dropout: float = 0.0) -> tuple[Tensor, list[Heads]]:
    """Hidden states [B, T, D] of the inputs ``x`` [B, T, D], as ``decoder(x)``; first heads of the ``kept`` layers."""
    rotary = decoder.rotary(torch.arange(x.shape[1], device=x.device)[None], torch.float32)
    cos, sin = rotary.cos.transpose(1, 2), rotary.sin.transpose(1, 2)
    heads = []
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        y, found = _attention(_normed(x, layer.input_layernorm), layer.self_attn, cos, sin)
        if index in kept:
            heads.append(found)
        x = x + F.dropout(y, dropout)
        mlp = layer.mlp
        gates = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        gate, up = F.linear(_normed(x, layer.post_attention_layernorm), gates).chunk(2, dim=-1)
        x = x + F.dropout(mlp.down_proj(F.silu(gate) * up), dropout)
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


def strayed(heads: Heads, query: Tensor, key: Tensor, paced: Tensor) -> Tensor:
    """How little of a head's attention falls where it is wanted: mean of minus the log of the wanted share.

    ``query`` [B, F]: positions that look, NOTHING-padded rows weigh 0 in ``paced``; ``key`` [B, F, T]: the log of how
    welcome each position is; ``paced`` [B, F]: the weight of each look.
    """
    q, k = heads
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

"""Training of the codec's split residual quantizer: straight-through codes, running-mean codebooks, k-means start.

The codebooks are the encoder's own (`embed_sum` and `cluster_usage` are exactly the running statistics kept here);
`export` copies them to the decoder. Shapes: B batch, T frames, Q codebooks, M vectors, K codes, d codebook width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.model.codec import VectorLayer
from quaver.model.codec_encoder import Codec, ResidualQuantizer, SearchedCodebook

_DECAY = 0.99
_DEAD = 0.1
"""A code used less often than this in a step, on the running mean, is moved onto a vector of the batch."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantizing a batch of latents gave."""

    latents: Tensor
    """[B, codebook_dim, T], for the decoder; gradients pass straight through the acoustic codebooks only."""
    semantic: Tensor
    """[2, B, T, d]: what codebook 0 had to code, with its gradient, and the vectors that it chose, without."""
    commitment: Tensor
    """The mean square of what each acoustic codebook missed."""
    codes: Tensor
    """[Q, M], M = B * T."""
    residuals: Tensor
    """[Q, M, d]: what each codebook had to code."""
    narrowness: Tensor
    """How far the acoustic projection is from using its whole width (see `narrowness`)."""


def branches(codec: Codec) -> list[tuple[ResidualQuantizer, nn.Module]]:
    """The semantic and the acoustic quantizer, each with the projection by which the decoder reads it."""
    search, read = codec.encoder.quantizer, codec.decoder.quantizer
    return [(search.semantic, read.rvq_first.output_proj), (search.acoustic, read.rvq_rest.output_proj)]


def codebooks(codec: Codec) -> list[SearchedCodebook]:
    """The sixteen codebooks, first to last."""
    return [book for quantizer, _ in branches(codec) for book in quantizer.codebooks]


def unquantized(codec: Codec, latents: Tensor) -> Tensor:
    """The decoder's latents [B, codebook_dim, T] with both bottlenecks but no codes, for the warm-up.

    What is semantic goes there without a gradient: it is learnt from its targets alone (see `quantize`).
    """
    (semantic, read_semantic), (acoustic, read_acoustic) = branches(codec)
    out: Tensor = read_semantic(semantic.input_proj(latents).detach()) + read_acoustic(acoustic.input_proj(latents))
    return out


def semantic(codec: Codec, latents: Tensor) -> Tensor:
    """What codebook 0 has to code of ``latents`` [B, hidden, T]: [B, T, d] in float32."""
    with torch.autocast(latents.device.type, enabled=False):
        projected: Tensor = branches(codec)[0][0].input_proj(latents.float())
    return projected.transpose(1, 2)


def quantize(codec: Codec, latents: Tensor, kept: Tensor | None = None) -> Quantized:
    """``latents`` [B, hidden, T] through the codebooks, in float32.

    ``kept`` [B]: how many acoustic codebooks of a row the decoder gets, all where it is None. Rows that lose the last
    ones make the first ones carry what must be heard (as in SoundStream, Zeghidour et al. 2021).
    The decoder's error reaches the encoder through the acoustic codebooks only. Codebook 0 follows its targets, and
    the decoder learns to read it as it is: else it would soon code whatever lowers the error most.
    """
    made, codes, residuals = list[Tensor](), list[Tensor](), list[Tensor]()
    commitment, narrow = (latents.new_zeros((), dtype=torch.float32) for _ in range(2))
    phonetic = semantic(codec, latents)
    with torch.autocast(latents.device.type, enabled=False):
        for quantizer, project in branches(codec):
            first = not codes
            projected = phonetic if first else quantizer.input_proj(latents.float()).transpose(1, 2)
            residual = projected.flatten(0, 1)
            total = torch.zeros_like(residual)
            if not first:
                narrow = narrow + narrowness(residual, spread=True)
            for number, book in enumerate(quantizer.codebooks):
                with torch.no_grad():
                    found = _nearest(residual, book.embedding)
                    vectors = F.embedding(found, book.embedding)
                codes.append(found)
                residuals.append(residual.detach())
                if not first:
                    commitment = commitment + (residual - vectors).square().mean()
                residual = residual - vectors
                if first or kept is None:
                    total = total + vectors
                else:
                    total = total + vectors * (number < kept).repeat_interleave(projected.shape[1])[:, None]
            total = total.view_as(projected)
            if first:
                heard = torch.stack((phonetic, total))
            else:
                total = projected + (total - projected).detach()
            made.append(project(total.transpose(1, 2)))
    commitment = commitment / (len(codes) - 1)
    return Quantized(made[0] + made[1], heard, commitment, torch.stack(codes), torch.stack(residuals), narrow)


def narrowness(x: Tensor, *, spread: bool) -> Tensor:
    """A penalty on vectors ``x`` [M, d] of mean square above 1 and, with ``spread``, on dead or parallel dimensions.

    Without it three to five dimensions of 64 carried everything: sixteen codebooks coded them ever more finely, and
    nothing else got through. After Bardes et al. 2022 (VICReg).
    """
    moments = x.T @ x / len(x)
    power = moments.diagonal()
    penalty = (power.mean() - 1.0).clamp(min=0.0)
    if spread:
        scale = (power + 1e-4).rsqrt()
        parallel = (moments * scale[:, None] * scale).square().sum() / len(power) - 1.0
        penalty = penalty + 2.0 * (0.4 - (power + 1e-4).sqrt()).clamp(min=0.0).mean() + 0.2 * parallel
    return penalty


@torch.no_grad()
def widen(codec: Codec, latents: Tensor, *, fold: bool = False) -> None:
    """Turns the acoustic projections to the principal axes of ``latents`` [M, hidden], nearly evened out.

    The path through both projections stays what it was, but for what lies outside these axes; faint axes, which a
    codebook would drop, come out a third as strong as the strongest. ``fold`` gives the acoustic path what passed the
    semantic one as well, and leaves nothing to that: it can then be learnt anew.
    """
    (semantic, read), (quantizer, project) = branches(codec)
    assert isinstance(quantizer.input_proj, nn.Conv1d) and isinstance(project, nn.Conv1d)
    assert isinstance(semantic.input_proj, nn.Conv1d) and isinstance(read, nn.Conv1d)
    inward, outward = quantizer.input_proj.weight[:, :, 0], project.weight[:, :, 0]
    passed = outward @ inward
    if fold:
        passed = passed + read.weight[:, :, 0] @ semantic.input_proj.weight[:, :, 0]
        read.weight.zero_()
        semantic.input_proj.reset_parameters()
    power, axes = torch.linalg.eigh(latents.double().T @ latents.double() / len(latents))
    power, axes = power.flip(0)[: len(inward)].float(), axes.flip(1)[:, : len(inward)].float()
    power = power.clamp(min=1e-4 * float(power[0]))
    strength = (power / power[0]) ** 0.15
    gain = strength / strength.square().mean().sqrt() / power.sqrt()
    outward.copy_((passed @ axes) / gain)
    inward.copy_(gain[:, None] * axes.T)


def _nearest(x: Tensor, embedding: Tensor) -> Tensor:
    return (embedding.square().sum(-1) - 2.0 * (x @ embedding.T)).argmin(-1)


def statistics(found: Quantized, n_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code was used [Q, K], and the sum of what it coded [Q, K, d]."""
    q, _, width = found.residuals.shape
    counts = found.residuals.new_zeros(q, n_codes).scatter_add_(1, found.codes, torch.ones_like(found.codes).float())
    index = found.codes[..., None].expand(-1, -1, width)
    return counts, found.residuals.new_zeros(q, n_codes, width).scatter_add_(1, index, found.residuals)


@torch.no_grad()
def follow(codec: Codec, counts: Tensor, sums: Tensor) -> None:
    """Moves the running means of every codebook towards the batch's statistics."""
    for book, count, total in zip(codebooks(codec), counts, sums, strict=True):
        book.cluster_usage.lerp_(count, 1.0 - _DECAY)
        book.embed_sum.lerp_(total, 1.0 - _DECAY)


@torch.no_grad()
def revive(codec: Codec, residuals: Tensor) -> int:
    """Moves codes that are hardly used onto vectors of ``residuals`` [Q, M, d]; returns how many."""
    n_dead = 0
    for book, vectors in zip(codebooks(codec), residuals, strict=True):
        dead = (book.cluster_usage < _DEAD).nonzero().flatten()[: len(vectors)]
        chosen = vectors[torch.randperm(len(vectors), device=vectors.device)[: len(dead)]]
        book.embed_sum[dead], book.cluster_usage[dead] = chosen, 1.0
        n_dead += len(dead)
    return n_dead


@torch.no_grad()
def start(codec: Codec, latents: Tensor, usage: float) -> None:
    """Codebooks by k-means on ``latents`` [M, hidden] of the warmed-up encoder.

    The acoustic projections are scaled to unit variance; the semantic one has its scale from its targets. ``usage`` is
    the expected count of a code in a batch: the weight of these first means against later ones.
    """
    for quantizer, project in branches(codec):
        assert isinstance(quantizer.input_proj, nn.Conv1d) and isinstance(project, nn.Conv1d)
        vectors = latents @ quantizer.input_proj.weight[:, :, 0].T
        if len(quantizer.codebooks) > 1:
            scale = vectors.std()
            quantizer.input_proj.weight /= scale
            project.weight *= scale
            vectors = vectors / scale
        for book in quantizer.codebooks:
            means = kmeans(vectors, book.embed_sum.shape[0])
            book.cluster_usage.fill_(usage)
            book.embed_sum.copy_(means * usage)
            vectors = vectors - means[_nearest(vectors, means)]


def kmeans(vectors: Tensor, n_means: int, n_rounds: int = 12) -> Tensor:
    """``n_means`` centres [K, d] of ``vectors`` [M, d], Lloyd's rounds; an empty centre takes a random vector."""
    means = vectors[torch.randperm(len(vectors), device=vectors.device)[torch.arange(n_means) % len(vectors)]].clone()
    for _ in range(n_rounds):
        found = _nearest(vectors, means)
        counts = torch.zeros(n_means, device=vectors.device).scatter_add_(0, found, torch.ones_like(found).float())
        sums = torch.zeros_like(means).index_add_(0, found, vectors)
        spare = vectors[torch.randint(len(vectors), (n_means,), device=vectors.device)]
        means = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], spare)
    return means


@torch.no_grad()
def export(codec: Codec) -> None:
    """Copies codebooks and input projections to the decoder, as the published files hold them twice, usage as 1."""
    read = codec.decoder.quantizer
    for (quantizer, _), target in zip(branches(codec), (read.rvq_first, read.rvq_rest), strict=True):
        assert isinstance(quantizer.input_proj, nn.Conv1d)
        target.input_proj.weight.zero_()
        for book, layer in zip(quantizer.codebooks, target.vq.layers, strict=True):
            assert isinstance(layer, VectorLayer)
            vectors = book.embedding
            book.embed_sum.copy_(vectors)
            book.cluster_usage.fill_(1.0)
            layer.codebook.embedding_sum.copy_(vectors)
            layer.codebook.cluster_usage.fill_(1.0)


def perplexity_bits(codes: Tensor, n_codes: int) -> Tensor:
    """The entropy in bits of each codebook's use in ``codes`` [Q, M]."""
    counts = torch.zeros(codes.shape[0], n_codes, device=codes.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes).float())
    share = counts / counts.sum(1, keepdim=True)
    return -(share * (share + 1e-12).log2()).sum(1)

"""Training of the codec's split residual quantizer: aimed projections, straight-through codes, running-mean codebooks.

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
_ANSWERED = 0.3
"""The share of the decoder's error that reaches the encoder: it has targets of its own to keep to."""
_DEAD = 0.1
"""A code used less often than this in a step, on the running mean, is moved onto a vector of the batch."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantizing a batch of latents gave."""

    latents: Tensor
    """[B, codebook_dim, T], for the decoder; gradients pass straight through the acoustic codebooks only."""
    semantic: Tensor
    """[2, B, T, d]: what codebook 0 had to code, with its gradient, and the vectors that it chose, without."""
    acoustic: Tensor
    """[2, B, T, d]: the same of the acoustic codebooks; the vectors are of those that were kept."""
    commitment: Tensor
    """The mean square of what each acoustic codebook missed."""
    codes: Tensor
    """[Q, M], M = B * T."""
    residuals: Tensor
    """[Q, M, d]: what each codebook had to code."""


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


def to_code(codec: Codec, latents: Tensor) -> list[Tensor]:
    """What codebook 0, and what the others, have to code of ``latents`` [B, hidden, T]: [B, T, d] each, float32."""
    with torch.autocast(latents.device.type, enabled=False):
        return [quantizer.input_proj(latents.float()).transpose(1, 2) for quantizer, _ in branches(codec)]


def quantize(codec: Codec, latents: Tensor, kept: Tensor | None = None) -> Quantized:
    """``latents`` [B, hidden, T] through the codebooks, in float32.

    ``kept`` [B]: how many acoustic codebooks of a row the decoder gets, all where it is None. Rows that lose the last
    ones make the first ones carry what must be heard (as in SoundStream, Zeghidour et al. 2021).
    The decoder's error reaches the encoder through the acoustic codebooks only. Codebook 0 follows its targets, and
    the decoder learns to read it as it is: else it would soon code whatever lowers the error most.
    """
    made, codes, residuals = list[Tensor](), list[Tensor](), list[Tensor]()
    commitment = latents.new_zeros((), dtype=torch.float32)
    heard = list[Tensor]()
    with torch.autocast(latents.device.type, enabled=False):
        for (quantizer, project), projected in zip(branches(codec), to_code(codec, latents), strict=True):
            first = not codes
            residual = projected.flatten(0, 1)
            total = torch.zeros_like(residual)
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
            heard.append(torch.stack((projected, total)))
            if not first:
                through = total + _ANSWERED * (projected - projected.detach())
                # What is left out cannot answer the error: passed on, it drove the latents apart without end.
                total = through if kept is None else torch.where((kept > number)[:, None, None], through, total)
            made.append(project(total.transpose(1, 2)))
    commitment = commitment / (len(codes) - 1)
    return Quantized(made[0] + made[1], heard[0], heard[1], commitment, torch.stack(codes), torch.stack(residuals))


@torch.no_grad()
def aim(codec: Codec, latents: Tensor, targets: tuple[Tensor, Tensor], known: Tensor) -> tuple[float, float]:
    """Turns both projections to what each has to tell of ``latents`` [M, hidden], by least squares.

    ``targets`` [M, d]: for codebook 0, counted where ``known`` [M] is 1, and for the others. The decoder goes on
    reading what it read, as far as the new projections tell it. Returns the shares of the targets' power they explain.
    """
    (semantic, read), (acoustic, project) = branches(codec)
    inward = [_weight(semantic.input_proj), _weight(acoustic.input_proj)]
    outward = [_weight(read), _weight(project)]
    x = latents.double()
    passed = x @ sum(o.double() @ i.double() for o, i in zip(outward, inward, strict=True)).T  # type: ignore[union-attr]
    every, explained, told = torch.ones_like(known, dtype=torch.float64), list[float](), list[Tensor]()
    for weight, target, counted in zip(inward, targets, (known.double(), every), strict=True):
        found = _regressed(x, target.double(), counted)
        told.append(x @ found)
        missed = ((told[-1] - target).square().sum(1) * counted).sum()
        explained.append(1.0 - float(missed / (target.double().square().sum(1) * counted).sum().clamp(min=1e-9)))
        weight.copy_(found.T)
    for weight, part in zip(outward, _regressed(torch.cat(told, 1), passed, every).chunk(2), strict=True):
        weight.copy_(part.T)
    return explained[0], explained[1]


@torch.no_grad()
def brighten(codec: Codec, latents: Tensor, strength: float = 0.5) -> None:
    """Lets the decoder see every dimension of what the acoustic codebooks code as strongly as any other, by adding it
    evened out in random directions to what is read: faint ones take a decoder too long to find.
    """
    _, (acoustic, project) = branches(codec)
    outward = _weight(project)
    told = latents @ _weight(acoustic.input_proj).T
    axes = torch.linalg.qr(torch.randn(len(outward), outward.shape[1], device=outward.device))[0]
    loud = (told @ outward.T).square().mean().sqrt() * outward.shape[0] ** 0.5 / outward.shape[1] ** 0.5
    outward += strength * loud * axes / told.square().mean(0).sqrt().clamp(min=1e-6)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Conv1d)
    return module.weight.data[:, :, 0]


def _regressed(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The matrix [a, b] that makes ``x`` [M, a] most like ``y`` [M, b], each row counted with its weight."""
    moments = x.T @ (x * weight[:, None])
    ridge = 1e-4 * moments.diagonal().mean() + 1e-9
    ridged = moments + ridge * torch.eye(len(moments), device=x.device)
    found: Tensor = torch.linalg.solve(ridged, x.T @ (y * weight[:, None]))
    return found


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

    ``usage`` is the expected count of a code in a batch: the weight of these first means against later ones.
    """
    for quantizer, _ in branches(codec):
        assert isinstance(quantizer.input_proj, nn.Conv1d)
        vectors = latents @ quantizer.input_proj.weight[:, :, 0].T
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

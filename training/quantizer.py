"""The codec's split residual quantizer, made from vectors: projections by least squares, codebooks by k-means.

Shapes: B batch, T frames, Q codebooks, M vectors, K codes, d codebook width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.model.codec import VectorLayer
from quaver.model.codec_encoder import Codec, CodecEncoder, ResidualQuantizer, SearchedCodebook

_ROUNDS = 12


def branches(codec: Codec) -> list[tuple[ResidualQuantizer, nn.Module]]:
    """The semantic and the acoustic quantizer, each with the projection by which the decoder reads it."""
    search, read = codec.encoder.quantizer, codec.decoder.quantizer
    return [(search.semantic, read.rvq_first.output_proj), (search.acoustic, read.rvq_rest.output_proj)]


def codebooks(encoder: CodecEncoder) -> list[SearchedCodebook]:
    """The sixteen codebooks, first to last."""
    return [*encoder.quantizer.semantic.codebooks, *encoder.quantizer.acoustic.codebooks]


def to_code(encoder: CodecEncoder, samples: Tensor) -> tuple[Tensor, Tensor]:
    """What codebook 0, and what the others, have to code of ``samples`` [B, N]: [B, T, d] each, float32."""
    latents = encoder.latents(samples)
    with torch.autocast(latents.device.type, enabled=False):
        said, sound = (
            branch.input_proj(latents.float()).transpose(1, 2)
            for branch in (encoder.quantizer.semantic, encoder.quantizer.acoustic)
        )
    return said, sound


@torch.no_grad()
def aim(encoder: CodecEncoder, latents: Tensor, targets: tuple[Tensor, Tensor]) -> None:
    """Turns both projections to what each has to tell, ``targets`` [M, d], of ``latents`` [M, hidden]."""
    for branch, target in zip((encoder.quantizer.semantic, encoder.quantizer.acoustic), targets, strict=True):
        weight(branch.input_proj).copy_(regressed(latents, target).T)


def weight(module: nn.Module) -> Tensor:
    """The matrix of a convolution over one step, to be changed in place."""
    assert isinstance(module, nn.Conv1d)
    return module.weight.data[:, :, 0]


def regressed(x: Tensor, y: Tensor) -> Tensor:
    """The matrix [a, b] that makes ``x`` [M, a] most like ``y`` [M, b], by least squares."""
    x, y = x.double(), y.double()
    moments = x.T @ x
    ridge = (1e-5 * moments.diagonal().mean() + 1e-12) * torch.eye(len(moments), device=x.device, dtype=x.dtype)
    found: Tensor = torch.linalg.solve(moments + ridge, x.T @ y)
    return found.float()


def nearest(x: Tensor, embedding: Tensor) -> Tensor:
    """The codes [...] of the vectors of ``embedding`` [K, d] nearest to ``x`` [..., d]."""
    return (embedding.square().sum(-1) - 2.0 * (x @ embedding.T)).argmin(-1)


def coded(x: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [Q, ...] of ``x`` [..., d] in residual codebooks ``books`` [Q, K, d], and the sum of their vectors."""
    codes, total = [], torch.zeros_like(x)
    for book in books:
        codes.append(nearest(x - total, book))
        total = total + F.embedding(codes[-1], book)
    return torch.stack(codes), total


@torch.no_grad()
def fit(x: Tensor, n_books: int, n_codes: int) -> Tensor:
    """Residual codebooks [Q, K, d] for the vectors ``x`` [M, d] by k-means."""
    books = list[Tensor]()
    for _ in range(n_books):
        books.append(kmeans(x, n_codes))
        x = x - F.embedding(nearest(x, books[-1]), books[-1])
    return torch.stack(books)


def kmeans(vectors: Tensor, n_means: int, n_rounds: int = _ROUNDS) -> Tensor:
    """``n_means`` centres [K, d] of ``vectors`` [M, d], Lloyd's rounds; an empty centre takes a random vector."""
    chosen = torch.randperm(len(vectors), device=vectors.device)[torch.arange(n_means) % len(vectors)]
    means = vectors[chosen].clone()
    for _ in range(n_rounds):
        found = nearest(vectors, means)
        counts = torch.zeros(n_means, device=vectors.device).scatter_add_(0, found, torch.ones_like(found).float())
        sums = torch.zeros_like(means).index_add_(0, found, vectors)
        spare = vectors[torch.randint(len(vectors), (n_means,), device=vectors.device)]
        means = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], spare)
    return means


@torch.no_grad()
def install(encoder: CodecEncoder, books: Tensor) -> None:
    """Gives ``encoder`` the codebooks ``books`` [Q, K, d]."""
    for book, vectors in zip(codebooks(encoder), books, strict=True):
        book.embed_sum.copy_(vectors)
        book.cluster_usage.fill_(1.0)


@torch.no_grad()
def export(codec: Codec) -> None:
    """Copies codebooks to the decoder, as the published files hold them twice, usage as 1."""
    read = codec.decoder.quantizer
    for (quantizer, _), target in zip(branches(codec), (read.rvq_first, read.rvq_rest), strict=True):
        target.input_proj.weight.zero_()
        for book, layer in zip(quantizer.codebooks, target.vq.layers, strict=True):
            assert isinstance(layer, VectorLayer)
            vectors = book.embedding
            book.embed_sum.copy_(vectors)
            book.cluster_usage.fill_(1.0)
            layer.codebook.embedding_sum.copy_(vectors)
            layer.codebook.cluster_usage.fill_(1.0)


def bits(codes: Tensor, n_codes: int) -> Tensor:
    """The entropy in bits of each codebook's use in ``codes`` [Q, M]."""
    counts = torch.zeros(codes.shape[0], n_codes, device=codes.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes).float())
    share = counts / counts.sum(1, keepdim=True)
    return -(share * (share + 1e-12).log2()).sum(1)

"""The code predictor: codebooks 1 to Q-1 of one frame, one after the other.

Its sequence is: the talker's hidden state, the embedding of codebook 0, then the embeddings of codebooks 1, 2, …;
the output at codebook i's embedding, through head i, predicts codebook i + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quaver.config import PredictorConfig
from quaver.model.layers import Decoder, KVCache


class PredictorModel(Decoder):
    """The predictor's decoder stack and the embeddings of codebooks 1 to Q-1, each of the talker's width."""

    def __init__(self, config: PredictorConfig, talker_size: int) -> None:
        super().__init__(config)
        n_residual = config.num_code_groups - 1
        self.codec_embedding = nn.ModuleList(nn.Embedding(config.vocab_size, talker_size) for _ in range(n_residual))


class Predictor(nn.Module):
    """Residual codes of a frame from the talker's hidden state."""

    def __init__(self, config: PredictorConfig, talker_size: int) -> None:
        super().__init__()
        self.config = config
        self.n_residual = config.num_code_groups - 1
        self.model = PredictorModel(config, talker_size)
        self.lm_head = nn.ModuleList(
            nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(self.n_residual)
        )
        # Absent from the checkpoint where the two widths agree.
        self.small_to_mtp_projection: nn.Module = (
            nn.Identity() if config.hidden_size == talker_size else nn.Linear(talker_size, config.hidden_size)
        )

    def embed(self, codes: Tensor) -> Tensor:
        """The sum of the embeddings of ``codes`` [..., Q-1] (codebooks 1 to Q-1), [..., D]."""
        return torch.stack([table(codes[..., i]) for i, table in enumerate(self.model.codec_embedding)]).sum(0)

    def force(self, hidden: Tensor, first: Tensor, codes: Tensor) -> Tensor:
        """Logits [N, Q-1, V'] of every residual codebook, the ones before it given.

        ``hidden`` [N, D] is the talker's, ``first`` [N, D] the embedding of codebook 0, ``codes`` [N, Q-1] the rest.
        """
        x = self.model(self.inputs(hidden, first, codes))
        return torch.stack([head(x[:, i + 1]) for i, head in enumerate(self.lm_head)], dim=1)

    def inputs(self, hidden: Tensor, first: Tensor, codes: Tensor) -> Tensor:
        """What the first layer reads of N whole frames (see ``force``), [N, Q, D']."""
        tables = list(self.model.codec_embedding)[:-1]
        given = [table(codes[:, i]) for i, table in enumerate(tables)]
        out: Tensor = self.small_to_mtp_projection(torch.stack([hidden, first, *given], dim=1))
        return out

    def cache(self, batch: int, like: Tensor) -> KVCache:
        """A cache for one frame of ``batch`` rows; clear it before the next."""
        return KVCache(self.config, batch, self.n_residual + 1, like)

    def start(self, hidden: Tensor, first: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, V'] of codebook 1, from ``hidden`` and ``first`` [B, D]; begins a frame in ``cache``."""
        cache.clear()
        x = self.model(self.small_to_mtp_projection(torch.stack((hidden, first), dim=1)), cache)
        logits: Tensor = self.lm_head[0](x[:, -1])
        return logits

    def step(self, codebook: int, codes: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, V'] of codebook ``codebook`` + 1, given ``codes`` [B] of codebook ``codebook`` (1 to Q-2)."""
        embedded = self.model.codec_embedding[codebook - 1](codes)[:, None]
        x = self.model(self.small_to_mtp_projection(embedded), cache)
        logits: Tensor = self.lm_head[codebook](x[:, -1])
        return logits

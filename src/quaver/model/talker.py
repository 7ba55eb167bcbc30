"""The talker: a Qwen3 decoder that speaks one frame of 80 ms a step.

Every input is a sum of a text embedding (through a two-layer projection) and a codec embedding; the output predicts
codebook 0 of the next frame, and the hidden state goes to the code predictor.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from quaver.config import TalkerConfig
from quaver.model.layers import Decoder, KVCache
from quaver.model.predictor import Predictor
from quaver.model.sparing import Linear


class TalkerModel(Decoder):
    """The talker's decoder stack, its codec embedding (codebook 0 and control ids) and its text embedding."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__(config)
        self.codec_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.text_hidden_size)


class TextProjection(nn.Module):
    """Text embeddings to the talker's width, through a hidden layer of the text width."""

    def __init__(self, text_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_fc1 = Linear(text_size, text_size)
        self.linear_fc2 = Linear(text_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_fc2(F.silu(self.linear_fc1(x)))
        return out


class Talker(nn.Module):
    """Codebook 0 of the next frame, and the code predictor for the others."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TalkerModel(config)
        self.text_projection = TextProjection(config.text_hidden_size, config.hidden_size)
        self.codec_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.code_predictor = Predictor(config.code_predictor_config, config.hidden_size)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Talker inputs [..., D] of the text ``ids`` [...], which may be on the host."""
        table, like = self.model.text_embedding, self.codec_head.weight
        # The table stays on the host, however it is stored: a prompt reads a few of its rows. In INT8 it has buffers.
        home = next(iter((*table.parameters(), *table.buffers()))).device
        rows = table(ids.to(home)).to(like.device, non_blocking=True).to(like.dtype)
        out: Tensor = self.text_projection(rows)
        return out

    def embed_codec(self, ids: Tensor) -> Tensor:
        """Talker inputs [..., D] of the ids [...] of codebook 0 and of the control ids."""
        out: Tensor = self.model.codec_embedding(ids)
        return out

    def embed_frames(self, codes: Tensor) -> Tensor:
        """Talker inputs [..., D] of whole frames ``codes`` [..., Q]: the sum over the codebooks."""
        return self.embed_codec(codes[..., 0]) + self.code_predictor.embed(codes[..., 1:])

    def code_tables(self) -> list[nn.Embedding]:
        """The embeddings of codes, codebook 0 first; of those in INT8 none."""
        tables = (self.model.codec_embedding, *self.code_predictor.model.codec_embedding)
        return [table for table in tables if isinstance(table, nn.Embedding)]

    def hidden(self, embeds: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of the inputs ``embeds`` [B, T, D] (see Decoder.forward)."""
        out: Tensor = self.model(embeds, cache, lengths)
        return out

    def cache(self, batch: int, capacity: int, like: Tensor) -> KVCache:
        """An empty cache of ``capacity`` positions for ``batch`` rows."""
        return KVCache(self.config, batch, capacity, like)

"""Calibration inputs on their way through a decoder, one layer after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quaver.awq_search import Moment
from quaver.model.layers import GROUPS, Decoder, DecoderLayer

_BATCH_POSITIONS = 4096


@dataclass(frozen=True, slots=True)
class Batch:
    """Streams of like length on the host, ``x`` [B, T, D] float32, and which positions are real, ``mask`` [B, T]."""

    x: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> list[Batch]:
        """``rows``, [T, D] each, shortest first, in batches that fit in little memory."""
        batches: list[list[Tensor]] = [[]]
        for row in sorted(rows, key=len):
            if batches[-1] and (len(batches[-1]) + 1) * len(row) > _BATCH_POSITIONS:
                batches.append([])
            batches[-1].append(row.float())
        padded = []
        for batch in batches:
            lengths = torch.tensor([len(row) for row in batch])
            x = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            padded.append(cls(x, torch.arange(x.shape[1]) < lengths[:, None]))
        return padded


class Stream:
    """Runs one layer after the other over the calibration batches, each of which visits the ``device`` for that."""

    def __init__(self, decoder: Decoder, rows: Sequence[Tensor], device: torch.device | str = "cpu") -> None:
        self.batches = Batch.of(rows)
        self._device = torch.device(device)
        longest = max(batch.x.shape[1] for batch in self.batches)
        positions = torch.arange(longest, device=self._device)[None]
        self._rotaries = [decoder.rotary(positions[:, : batch.x.shape[1]], torch.float32) for batch in self.batches]

    def advance(self, layer: DecoderLayer) -> None:
        """Every batch goes through ``layer``; padding never reaches a real position, which see only earlier ones."""
        for batch, rotary in zip(self.batches, self._rotaries, strict=True):
            batch.x.copy_(layer(batch.x.to(self._device), rotary))

    def observe(self, layer: DecoderLayer) -> dict[str, Moment]:
        """The moments of each group's inputs in ``layer``, by the group's name; the stream stays where it is."""
        sums: dict[str, Moment] = {}
        n_positions = sum(int(batch.mask.sum()) for batch in self.batches)
        for batch, rotary in zip(self.batches, self._rotaries, strict=True):
            with _listening(layer, batch.mask.to(self._device), sums):
                layer(batch.x.to(self._device), rotary)
        return {name: Moment(one.second / n_positions, one.size / n_positions) for name, one in sums.items()}


@contextmanager
def _listening(layer: DecoderLayer, mask: Tensor, sums: dict[str, Moment]) -> Iterator[None]:
    """While open, adds what each group's linears read at real positions to ``sums``."""

    def listen(name: str, x: Tensor) -> None:
        real = x[mask]
        if name not in sums:
            size = real.shape[1]
            sums[name] = Moment(real.new_zeros(size, size), real.new_zeros(size))
        sums[name].second.addmm_(real.T, real)
        sums[name].size.add_(real.abs().sum(0))

    handles = [
        layer.get_submodule(group.linears[0]).register_forward_pre_hook(
            lambda _, inputs, name=group.name: listen(name, inputs[0])
        )
        for group in GROUPS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""One position of every row through a decoder, a recording a layer: kernels take longer to start than to run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quaver.model.layers import Decoder, DecoderLayer, KVCache, Rotary
from quaver.recorded import Recorded


class RecordedSteps:
    """Takes ``cache`` a position further at a time, as ``decoder`` does but for float rounding.

    A recording knows addresses. So it attends to all of the cache under a mask, and where the rows stand, and which
    layer of the cache it is, are tensors; layers that visit have few places among them, and a recording each. They
    hold no more of this than its memory, and go with it.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder, self._cache = decoder, cache
        n_layers, n_rows, _, capacity, head_dim = cache.keys.shape
        device, turns = cache.lengths.device, cache.turns.cos
        self._everywhere = torch.arange(capacity, device=device)
        self._standing = _Standing(
            cache.keys,
            cache.values,
            torch.arange(n_rows, device=device),
            torch.zeros_like(cache.lengths),
            Rotary(turns.new_empty(n_rows, 1, 1, head_dim), turns.new_empty(n_rows, 1, 1, head_dim)),
            torch.zeros(n_rows, 1, 1, capacity, dtype=torch.bool, device=device),
        )
        self._indices = torch.split(torch.arange(n_layers, device=device), 1)
        self._layers: dict[DecoderLayer, Recorded] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Hidden states [B, 1, D] of ``x`` [B, 1, D], after the last norm; see Decoder.forward."""
        self._stand()
        for index, layer in zip(self._indices, self._decoder.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            if layer not in self._layers:
                first = next(iter(self._layers.values()), None)
                self._layers[layer] = Recorded(partial(_through, layer, self._standing), beside=first)
            (x,) = self._layers[layer](x, index)
        self._cache.advance(1)
        out: Tensor = self._decoder.norm(x)
        return out

    def _stand(self) -> None:
        """Notes where the rows stand now."""
        standing, turns, lengths = self._standing, self._cache.turns, self._cache.lengths
        standing.positions.copy_(lengths)
        standing.rotary.cos.copy_(turns.cos[0, 0][lengths][:, None, None])
        standing.rotary.sin.copy_(turns.sin[0, 0][lengths][:, None, None])
        standing.mask.copy_((self._everywhere <= lengths[:, None])[:, None, None])


@dataclass(frozen=True, slots=True)
class _Standing:
    """Where the rows of a cache stand: the memory, which stays in its place, that recordings share.

    ``keys`` and ``values`` [L, B, H, C, d] are the cache's, ``rows`` counts 0 to B - 1, ``positions`` [B] are the next
    ones with their ``rotary`` tables, ``mask`` [B, 1, 1, C] is what these may attend to.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    positions: Tensor
    rotary: Rotary
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _Past:
    """The past of the layer ``index`` [1]; whatever the layer is said to be, it is that."""

    standing: _Standing
    index: Tensor

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See layers.Past; all of the cache is returned."""
        del layer
        here = self.standing
        found = []
        for kept, new in ((here.keys, keys), (here.values, values)):
            kept[self.index, here.rows, :, here.positions] = new[:, :, 0].to(kept.dtype)
            found.append(kept.index_select(0, self.index)[0])
        return found[0], found[1]


def _through(layer: DecoderLayer, standing: _Standing, x: Tensor, index: Tensor) -> tuple[Tensor]:
    """``x`` [B, 1, D] through ``layer``, which is the layer ``index`` [1] of the cache."""
    return (layer(x, standing.rotary, _Past(standing, index), mask=standing.mask),)

"""The layers of a decoder in a checkpoint: how each is to be stored, what is kept of it, and how it runs then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quaver.awq_search import LayerSearch
from quaver.checkpoint import Checkpoint
from quaver.config import DecoderConfig
from quaver.corpus import Item
from quaver.int4 import Int4Weight
from quaver.int8 import Int8Weight
from quaver.model.layers import GROUPS, DecoderLayer
from quaver.model.tts import TTS

Store = Literal["keep", "int8", "int4"]
"""How a block's matrices are stored: as they are, in 8 bits with a scale a row, or in AWQ INT4."""

Inputs = Callable[[TTS, Sequence[Item], int], list[Tensor]]
"""Makes what the first of some layers reads for known speech, [T, D] each, on the host; cut at so many positions."""

_STREAMED = "float32."
"""Before the names of the norms of a finished layer as the stream runs them: what is stored of them is rounded."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Decoder layers, of which each is calibrated on what those before it give as they are ``stored``, one by one.

    ``name`` is what one of them is called, ``prefix`` what their tensors' names begin with, ``inputs`` makes what the
    first of them reads.
    """

    name: str
    prefix: str
    config: DecoderConfig
    stored: Sequence[Store]
    inputs: Inputs

    @property
    def int4(self) -> list[int]:
        """The layers that become INT4."""
        return [index for index, store in enumerate(self.stored) if store == "int4"]

    def piece(self, index: int) -> str:
        """What the INT4 layer ``index`` is called once it is finished."""
        return f"{self.name.replace(' ', '-')}-{index:03}"

    def norm_dtype(self, checkpoint: Checkpoint, index: int) -> torch.dtype:
        """The type that the norms of the layer ``index`` are stored in."""
        return checkpoint.specs[f"{self.prefix}.{index}.input_layernorm.weight"].dtype

    def read(self, checkpoint: Checkpoint, index: int, device: torch.device) -> DecoderLayer:
        """The layer ``index`` of ``checkpoint`` in float32 on ``device``."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config)
        names = layer.state_dict()
        tensors = {name: checkpoint.read(f"{self.prefix}.{index}.{name}").to(device) for name in names}
        layer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return layer.requires_grad_(requires_grad=False).eval()

    def finished(
        self, checkpoint: Checkpoint, index: int, found: LayerSearch
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is kept of the layer ``index`` once it is searched: tensors and a note, in JSON's values.

        The tensors are those to be stored, under their names in the checkpoint, and the norms to run on. The note has
        the ``groups``' figures, what ``absorbed`` which scales, and which tensor ``gives_way`` to which.
        """
        prefix, norm_dtype = f"{self.prefix}.{index}", self.norm_dtype(checkpoint, index)
        kept: dict[str, Tensor] = {}
        gives_way: dict[str, list[str]] = {}
        absorbed = {f"{prefix}.{linear}.weight": _ends(scale) for linear, scale in found.units.items()}
        for linear, weight in found.weights.items():
            stored = {f"{prefix}.{linear}.{key}": value for key, value in weight.tensors().items()}
            gives_way[f"{prefix}.{linear}.weight"] = list(stored)
            kept |= stored
        for norm in sorted({group.before for group in GROUPS} - found.weights.keys()):
            name, streamed = f"{prefix}.{norm}.weight", found.layer.get_parameter(f"{norm}.weight").data
            before, after = checkpoint.read(name).to(streamed.device), streamed.to(norm_dtype)
            kept[_STREAMED + name] = streamed
            if not torch.equal(after, before):
                kept[name], gives_way[name] = after, [name]
                # A channel that a weight of 0 silences took no scale.
                absorbed[name] = _ends((before.float() / after.float())[after != 0])
        groups = [asdict(group) for group in found.reports]
        return kept, {"groups": groups, "absorbed": absorbed, "gives_way": gives_way}

    def as_stored(
        self, checkpoint: Checkpoint, index: int, device: torch.device, kept: Mapping[str, Tensor]
    ) -> DecoderLayer:
        """The layer ``index`` as it runs once it is stored; in INT4 that is made of what was ``kept`` of it."""
        layer = self.read(checkpoint, index, device)
        if self.stored[index] == "int8":
            for linear in (linear for group in GROUPS for linear in group.linears):
                weight = layer.get_parameter(f"{linear}.weight").data
                weight.copy_(Int8Weight.nearest(weight).dequantize())
        elif self.stored[index] == "int4":
            for name, parameter in layer.named_parameters():
                full = f"{self.prefix}.{index}.{name}"
                module = full.removesuffix(".weight")
                if _STREAMED + full in kept:
                    parameter.data.copy_(kept[_STREAMED + full])
                elif f"{module}.qweight" in kept:
                    parts = (kept[f"{module}.{key}"].to(device) for key in ("qweight", "qzeros", "scales"))
                    parameter.data.copy_(Int4Weight.read(*parts).dequantize())
        return layer


def _ends(scale: Tensor) -> tuple[float, float]:
    """The least and the largest of ``scale``, to six digits."""
    low, high = (float(f"{float(end):.6g}") for end in scale.aminmax())
    return low, high

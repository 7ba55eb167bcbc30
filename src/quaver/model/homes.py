"""Where the tensors of a model are while it speaks, and what they take there.

On a GPU not all of them need be in its memory: the text embedding is read row by row, once a prompt; encoders are for
the moment in which a voice is enrolled; and where memory is short there is more that can wait on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quaver.checkpoint import Spec
from quaver.int4 import compiled
from quaver.model.codec import kept_in_half
from quaver.model.filling import PACKED_SUFFIXES, Place

SPEAKER, ENCODER = "speaker_encoder.", "encoder."
"""Before the names of the speaker encoder's tensors, and in the codec's files of its encoder's."""
TEXT_EMBEDDING = "talker.model.text_embedding"
TEXT_PROJECTION = "talker.text_projection."
LAYERS = "talker.model.layers"
"""Before the names of the talker's layers."""
TABLES = "codec_embedding."
"""In the names of the embeddings of codes."""

_FLOAT32_ON_CPU_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Placement:
    """What a GPU need not hold: tables of codes, with what projects text; the large weights of the codec's decoder.

    Either costs time: some 2 microseconds a row and code; and each push of the codec brings all of its weights.
    """

    tables_on_host: bool = False
    sound_on_host: bool = False


HELD = Placement()
"""A GPU holds all that every frame reads."""


def memory_bytes(
    specs: Mapping[str, Spec],
    codec_specs: Mapping[str, Spec],
    device: str | torch.device,
    placement: Placement = HELD,
    dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """What each stored tensor takes of the memory of ``device`` once loaded there, by name; ``dtype`` as for TTS.load.

    What stays in its file until a voice is enrolled takes none; nor, on a GPU, do the text embedding and what
    ``placement`` leaves on the host.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    sizes: dict[str, int] = {}
    for stored, becomes in ((specs, dtype or default_dtype(specs, device)), (codec_specs, torch.float32)):
        for name, spec in stored.items():
            if name.startswith((SPEAKER, ENCODER)) or (on_gpu and _on_host(name, spec, placement)):
                sizes[name] = 0
            elif on_gpu and name.startswith("decoder."):
                sizes[name] = spec.n_elements * (2 if kept_in_half(name, spec.shape) else 4)
            elif on_gpu and name.endswith(".qzeros"):
                # The layout for kernels has a byte for each.
                sizes[name] = 2 * spec.n_bytes
            elif device.type == "cpu" and name.endswith((".qzeros", ".scales")):
                # Compiled, zero points take a byte each; PyTorch's operator has them in a second row of scales.
                in_zeros, in_scales = (2, 1) if compiled() is not None else (0, 2)
                sizes[name] = spec.n_bytes * (in_zeros if name.endswith(".qzeros") else in_scales)
            elif becomes is None or not spec.dtype.is_floating_point or name.endswith(PACKED_SUFFIXES):
                sizes[name] = spec.n_bytes
            else:
                sizes[name] = spec.n_elements * becomes.itemsize
    return sizes


def _on_host(name: str, spec: Spec, placement: Placement) -> bool:
    """Whether a tensor that speaking needs is on the host where the model is on a GPU."""
    if name.startswith("decoder."):
        return placement.sound_on_host and (kept_in_half(name, spec.shape) or "._codebook." in name)
    return name.startswith(f"{TEXT_EMBEDDING}.") or (placement.tables_on_host and on_host_with_tables(name))


def on_host_with_tables(name: str) -> bool:
    """Whether the tensor ``name`` waits on the host where the tables of codes do."""
    return TABLES in name or (name.startswith(TEXT_PROJECTION) and name.endswith("weight"))


def default_dtype(specs: Mapping[str, Spec], device: torch.device) -> torch.dtype | None:
    """Float32 for a small unquantized model on a CPU; else as stored, in which PyTorch's operators are fast."""
    if device.type != "cpu" or any(name.endswith(PACKED_SUFFIXES) for name in specs):
        return None
    n_values = sum(spec.n_elements for spec in specs.values())
    return torch.float32 if 4 * n_values < _FLOAT32_ON_CPU_BYTES else None


def layers_bytes(specs: Mapping[str, Spec], dtype: torch.dtype | None) -> int:
    """What the talker's layers take in memory as ``dtype``, or as stored."""
    layers = (spec for name, spec in specs.items() if name.startswith(f"{LAYERS}."))
    return sum(spec.n_elements * dtype.itemsize if dtype else spec.n_bytes for spec in layers)


def homes(device: torch.device, placement: Placement, *, visits: bool) -> Place:
    """Where each tensor of the model goes: to ``device`` what every step calls for, but for what need not be there."""

    def place(name: str) -> torch.device | None:
        if name.startswith(SPEAKER) or (visits and name.startswith(f"{LAYERS}.")):
            return None
        waits = placement.tables_on_host and on_host_with_tables(name)
        return torch.device("cpu") if waits or name.startswith(f"{TEXT_EMBEDDING}.") else device

    return place

"""The encoders, which are read from their files for the moment in which a voice or a recording is enrolled."""

from __future__ import annotations

import torch

from quaver.checkpoint import Checkpoint
from quaver.model.codec_encoder import Codec, CodecEncoder
from quaver.model.filling import fill
from quaver.model.homes import ENCODER, SPEAKER
from quaver.model.speaker import SpeakerEncoder


def load_speaker_encoder(checkpoint: Checkpoint) -> SpeakerEncoder | None:
    """The speaker encoder of ``checkpoint`` alone, in float32 on the CPU; None where the model has none.

    Raises CheckpointError for a missing, left-over, mis-shaped or non-finite tensor, by name.
    """
    config = checkpoint.config.speaker_encoder_config
    if not checkpoint.config.has_speaker_encoder or config is None:
        return None
    with torch.device("meta"):
        encoder = SpeakerEncoder(config)
    stored = checkpoint.tensors(SPEAKER)
    tensors = ((name.removeprefix(SPEAKER), tensor) for name, tensor in stored)
    fill(encoder, tensors, str(checkpoint.path), lambda _: torch.device("cpu"), torch.float32)
    return encoder.eval()


def load_codec_encoder(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> CodecEncoder:
    """The encoder of the codec of ``checkpoint`` alone, in float32 on ``device``.

    It is for a moment: a voice is enrolled once, and what it takes is needed for speech. Raises CheckpointError.
    """
    with torch.device("meta"):
        encoder = Codec(checkpoint.codec_config).encoder
    stored = checkpoint.codec_tensors(ENCODER)
    tensors = ((name.removeprefix(ENCODER), tensor) for name, tensor in stored)
    fill(encoder, tensors, str(checkpoint.codec_path), lambda _: torch.device(device), torch.float32)
    return encoder.eval()

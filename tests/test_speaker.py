"""The speaker encoder by itself: sizes, errors, training after inference. The oracle tests hold its numbers."""

import dataclasses

import numpy as np
import pytest
import torch

import toy
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint
from quaver.config import SpeakerConfig
from quaver.errors import AudioError, CheckpointError
from quaver.model.encoders import load_speaker_encoder
from quaver.model.speaker import SpeakerEncoder, _analysis, mel, mel_filterbank

TINY = SpeakerConfig(enc_dim=32, enc_channels=(16, 16, 16, 16, 48), enc_attention_channels=8, enc_se_channels=8)


def test_every_filter_has_area_one_and_lies_in_order() -> None:
    filters = mel_filterbank()
    assert filters.shape == (128, 513)
    # The narrowest filters span fewer than four bins, so only the wide ones integrate well on the grid.
    areas = filters.sum(1) * (12000 / 512)
    assert abs(areas[100:] - 1).max() < 0.02
    peaks = filters.argmax(1)
    assert (peaks[1:] >= peaks[:-1]).all()


def test_vectors_can_be_trained_after_inference_on_the_same_device() -> None:
    _analysis.cache_clear()
    encoder = SpeakerEncoder(TINY)
    samples = torch.randn(2, 6000) / 10
    with torch.inference_mode():
        encoder.embed(samples)
    samples.requires_grad_()
    encoder.embed(samples).sum().backward()
    assert samples.grad is not None and samples.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_one_voice_of_a_batch_does_not_change_another() -> None:
    torch.manual_seed(0)
    encoder = SpeakerEncoder(TINY)
    samples = torch.randn(3, 6000) / 10
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(samples)[1:2], encoder.embed(samples[1:2]))


def test_bfloat16_weights_take_float32_samples() -> None:
    encoder = SpeakerEncoder(TINY).bfloat16()
    assert encoder.embed(torch.randn(1, 6000) / 10).dtype == torch.bfloat16


@pytest.mark.parametrize("n_samples", [0, 96, 384, 1024])
def test_too_short_speech_is_an_audio_error(n_samples: int) -> None:
    with pytest.raises(AudioError, match="too few"):
        SpeakerEncoder(TINY).embed(torch.zeros(1, n_samples))


def test_the_shortest_accepted_speech_gives_a_vector() -> None:
    encoder = SpeakerEncoder(TINY)
    assert encoder(mel(torch.randn(1, 256 * encoder.min_frames))).shape == (1, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mel_dim": 80}, "80 mels"),
        ({"sample_rate": 16000}, "16000 Hz"),
        ({"enc_kernel_sizes": (5, 3)}, "one entry a layer"),
        ({"enc_channels": (16, 8, 16, 16, 40)}, "agree"),
        ({"enc_channels": (12, 12, 12, 12, 36)}, "divide by"),
        ({"enc_channels": (16, 16, 16, 16, 40)}, "sum of the middle"),
    ],
)
def test_widths_that_do_not_fit_are_named(change: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        SpeakerEncoder(dataclasses.replace(TINY, **change))


def test_the_encoder_opens_alone_and_hears_what_the_whole_model_hears(toy_folder, toy_tts, tmp_path) -> None:
    alone = load_speaker_encoder(Checkpoint.open(toy_folder))
    sound = Audio(np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32), 16000)
    voice = toy_tts.enroll(sound)
    torch.testing.assert_close(alone.vector(sound), voice.speaker)
    assert alone.vector(sound).shape == (128,) and not alone.training
    assert load_speaker_encoder(Checkpoint.open(toy.checkpoint(tmp_path / "custom", "custom_voice"))) is None

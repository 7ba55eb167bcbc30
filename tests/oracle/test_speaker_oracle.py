"""The speaker encoder and its mel front end against the official code."""

import numpy as np
import pytest
import torch

from quaver.config import SpeakerConfig
from quaver.model.speaker import SpeakerEncoder, mel, mel_filterbank

pytestmark = pytest.mark.oracle

TINY = SpeakerConfig(enc_dim=32, enc_channels=(16, 16, 16, 16, 48), enc_attention_channels=8, enc_se_channels=8)


def _close(ours: torch.Tensor, official: torch.Tensor) -> None:
    assert ours.shape == official.shape
    assert (ours - official).abs().max() <= 1e-4 * official.abs().max()


def _official(config: SpeakerConfig) -> torch.nn.Module:
    from qwen_tts.core.models.configuration_qwen3_tts import Qwen3TTSSpeakerEncoderConfig
    from qwen_tts.core.models.modeling_qwen3_tts import Qwen3TTSSpeakerEncoder

    fields = ("enc_dim", "enc_channels", "enc_attention_channels", "enc_se_channels", "mel_dim", "sample_rate")
    given = {name: getattr(config, name) for name in fields}
    return Qwen3TTSSpeakerEncoder(Qwen3TTSSpeakerEncoderConfig(**given | {"enc_channels": list(config.enc_channels)}))


def _speech(n_samples: int, n_batch: int = 2) -> torch.Tensor:
    """Harmonics under a slow envelope and a little noise, from very soft to full scale."""
    t = np.arange(n_samples) / 24000
    tone = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 30)) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t))
    noise = np.random.default_rng(1729).standard_normal((n_batch, n_samples))
    scale = np.logspace(-3, 0, n_batch)[:, None]
    samples = scale * (tone / np.abs(tone).max() + 0.01 * noise) / 1.05
    return torch.from_numpy(samples.astype(np.float32)).clamp(-1, 1)


def _official_mel(samples: torch.Tensor) -> torch.Tensor:
    from qwen_tts.core.models.modeling_qwen3_tts import mel_spectrogram

    knobs = {"n_fft": 1024, "num_mels": 128, "sampling_rate": 24000, "hop_size": 256, "win_size": 1024}
    return mel_spectrogram(samples, fmin=0, fmax=12000, **knobs).transpose(1, 2)


def test_filterbank_is_librosas() -> None:
    from librosa.filters import mel as librosa_mel

    official = librosa_mel(sr=24000, n_fft=1024, n_mels=128, fmin=0, fmax=12000)
    np.testing.assert_allclose(mel_filterbank(), official, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("n_samples", [385, 12000, 24000, 24001, 36863])
def test_mel(n_samples: int) -> None:
    samples = _speech(n_samples)
    ours = mel(samples)
    assert ours.shape == (2, n_samples // 256, 128)
    _close(ours, _official_mel(samples))


def test_mel_of_silence_is_the_floor_in_both() -> None:
    _close(mel(torch.zeros(1, 4800)), _official_mel(torch.zeros(1, 4800)))


@pytest.mark.parametrize("config", [TINY, SpeakerConfig()], ids=["tiny", "0.6b"])
def test_speaker_vectors(config: SpeakerConfig) -> None:
    torch.manual_seed(0)
    official = _official(config).eval()
    ours = SpeakerEncoder(config)
    ours.load_state_dict(official.state_dict(), strict=True)
    for n_samples in (12000, 30000):
        samples = _speech(n_samples)
        with torch.no_grad():
            _close(ours.embed(samples), official(_official_mel(samples)))


def test_gradients_reach_the_weights_and_agree() -> None:
    torch.manual_seed(1)
    official = _official(TINY)
    ours = SpeakerEncoder(TINY)
    ours.load_state_dict(official.state_dict())
    samples = _speech(12000)
    ours.embed(samples).square().sum().backward()
    official(_official_mel(samples)).square().sum().backward()
    theirs = dict(official.named_parameters())
    difference, size = 0.0, 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and theirs[name].grad is not None
        difference += float((parameter.grad - theirs[name].grad).square().sum())
        size += float(theirs[name].grad.square().sum())
    assert difference**0.5 <= 1e-4 * size**0.5

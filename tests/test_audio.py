"""Sound read, checked, resampled and written, and every way a reference recording can be no use."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from quaver import audio
from quaver.audio import Audio
from quaver.errors import AudioError, BudgetError, RecipeError

RATE_HZ = 24000


def tone(seconds: float = 1.0, rate_hz: int = RATE_HZ, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


@pytest.mark.parametrize(("suffix", "tolerance"), [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.1)])
def test_written_sound_reads_back(tmp_path: Path, suffix: str, tolerance: float) -> None:
    sound = Audio(tone(), RATE_HZ)
    audio.write(tmp_path / f"a{suffix}", sound)
    back = audio.read(tmp_path / f"a{suffix}")
    assert back.rate_hz == RATE_HZ and back.seconds == 1.0
    assert np.abs(back.samples - sound.samples).max() < tolerance
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


def test_wav_is_pcm16_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        audio.write(tmp_path / name, Audio(tone(), RATE_HZ))
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert len((tmp_path / "a.wav").read_bytes()) == 44 + 2 * RATE_HZ


def test_loud_samples_are_clipped_not_wrapped(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.wav", Audio(np.array([0.0, 1.5, -1.5, 0.0]), RATE_HZ))
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav").samples, [0, 1, -1, 0], atol=1e-4)


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = tone(), tone(hz=660)
    soundfile.write(tmp_path / "s.wav", np.stack((left, right), axis=1), RATE_HZ, subtype="FLOAT")
    np.testing.assert_allclose(audio.read(tmp_path / "s.wav").samples, (left + right) / 2, atol=1e-6)


def test_8_khz_is_resampled_without_moving_the_tone(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "t.wav", tone(rate_hz=8000), 8000, subtype="FLOAT")
    sound = audio.read(tmp_path / "t.wav")
    up = audio.resample(sound, RATE_HZ)
    assert (sound.rate_hz, up.rate_hz, len(up.samples)) == (8000, RATE_HZ, RATE_HZ)
    inside = slice(2000, -2000)
    assert np.abs(up.samples[inside] - tone()[inside]).max() < 1e-3
    audio.require_speech(up, "t.wav")


def test_the_same_rate_is_not_resampled() -> None:
    sound = Audio(tone(), RATE_HZ)
    assert audio.resample(sound, RATE_HZ) is sound
    with pytest.raises(AudioError, match="0 Hz"):
        audio.resample(sound, 0)


def _faulty(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("Dear diary, " * 100)
    elif kind == "header":
        soundfile.write(path, tone(), RATE_HZ)
        path.write_bytes(path.read_bytes()[:30])
    elif kind == "no samples":
        soundfile.write(path, tone(0), RATE_HZ)
    elif kind == "nan":
        samples = tone()
        samples[7] = np.nan
        soundfile.write(path, samples, RATE_HZ, subtype="FLOAT")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder"),
        ("empty", "is empty"),
        ("text", "cannot be read as audio"),
        ("header", "cannot be read as audio|no samples"),
        ("no samples", "no samples"),
        ("nan", "1 samples that are NaN"),
    ],
)
def test_unreadable_recordings_are_named(tmp_path: Path, kind: str, words: str) -> None:
    path = _faulty(tmp_path, kind)
    with pytest.raises(AudioError, match=words) as failure:
        audio.read(path)
    assert path.name in str(failure.value)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (tone(0.004), "lasts 0.004 s"),
        (tone(0.49), "lasts 0.49 s"),
        (np.zeros(RATE_HZ), "silent"),
        (np.full(RATE_HZ, 0.3), "silent"),
        (tone() * 1e-4, "silent"),
        (np.where(np.arange(RATE_HZ) == 5, np.inf, tone()), "NaN or infinite"),
        (np.zeros(0), "lasts 0 s"),
    ],
)
def test_useless_references_are_refused(samples: np.ndarray, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        audio.require_speech(Audio(samples, RATE_HZ), "ref.wav")


def test_a_short_word_in_a_long_pause_is_speech() -> None:
    samples = np.zeros(10 * RATE_HZ, np.float32)
    samples[RATE_HZ : RATE_HZ + 2400] = tone(0.1) * 0.02
    audio.require_speech(Audio(samples, RATE_HZ), "ref.wav")


def test_opposite_channels_cancel_and_are_called_silent(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "s.wav", np.stack((tone(), -tone()), axis=1), RATE_HZ, subtype="FLOAT")
    with pytest.raises(AudioError, match="silent"):
        audio.require_speech(audio.read(tmp_path / "s.wav"), "s.wav")


@pytest.mark.parametrize(
    ("samples", "rate_hz", "words"), [(np.zeros((2, 2)), RATE_HZ, "shape"), (np.zeros(2), 0, "sample rate")]
)
def test_audio_is_one_row_at_a_rate(samples: np.ndarray, rate_hz: int, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        Audio(samples, rate_hz)


@pytest.mark.parametrize(
    ("name", "words"),
    [("no/such/a.wav", "does not exist"), (".", "is a folder"), ("a.mp4", "as .mp4"), ("a", "suffix")],
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        audio.write(tmp_path / name, Audio(tone(), RATE_HZ))
    assert list(tmp_path.iterdir()) == []


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="NaN"):
        audio.write(tmp_path / "a.wav", Audio(np.full(9, np.nan), RATE_HZ))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [(errno.ENOSPC, BudgetError, "no space left"), (errno.EIO, RecipeError, "cannot be written")],
)
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type, words: str
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=words):
        audio.write(path, Audio(tone(), RATE_HZ))
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"] and path.read_bytes() == b"old"

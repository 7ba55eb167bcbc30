"""Sound as a value: read, checked, resampled, written."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from quaver.errors import AudioError, RecipeError
from quaver.files import check_output, write_file

MIN_SPEECH_S = 0.5
_SILENCE_RMS = 1e-3
_LOUDNESS_WINDOW_S = 0.05
_FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """Mono sound: ``samples`` [N] float32, nominally in -1..1, at ``rate_hz``. Raises AudioError for anything else."""

    samples: np.ndarray
    rate_hz: int

    def __post_init__(self) -> None:
        if self.samples.ndim != 1:
            raise AudioError(f"audio has the shape {self.samples.shape}: one row of samples was expected")
        if self.rate_hz < 1:
            raise AudioError(f"audio has a sample rate of {self.rate_hz} Hz")
        object.__setattr__(self, "samples", np.ascontiguousarray(self.samples, dtype=np.float32))

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / self.rate_hz


def read(path: Path | str) -> Audio:
    """The sound in a file of any format that libsndfile knows, channels averaged.

    Raises AudioError when it is missing, empty, not audio, or holds NaN or infinite samples.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a recording" if path.is_dir() else "does not exist"
        raise AudioError(f"{path} {what}: name an audio file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is empty: 0 bytes")
    try:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{path} cannot be read as audio (WAV, FLAC, OGG, MP3, ...): {error}") from error
    if len(samples) == 0:
        raise AudioError(f"{path} holds no samples")
    _require_finite(samples, str(path))
    return Audio(samples.mean(axis=1, dtype=np.float32), rate_hz)


def encode(audio: Audio, suffix: str = ".wav") -> bytes:
    """``audio`` as the bytes of a file: 16-bit PCM for .wav and .flac, Vorbis for .ogg; clipped to -1..1.

    Raises RecipeError for another suffix, AudioError for NaN or infinite samples.
    """
    _require_format(suffix)
    _require_finite(audio.samples, "the audio to write")
    kind, subtype = _FORMATS[suffix.lower()]
    out = io.BytesIO()
    soundfile.write(out, np.clip(audio.samples, -1, 1), audio.rate_hz, format=kind, subtype=subtype)
    return out.getvalue()


def check_target(path: Path | str) -> Path:
    """``path`` as that of an audio file that can be written. Raises RecipeError for its folder or its suffix."""
    path = check_output(path)
    _require_format(path.suffix)
    return path


def write(path: Path | str, audio: Audio) -> None:
    """Writes ``audio`` to ``path`` in the format of its suffix (see :func:`encode`), whole or not at all.

    Raises RecipeError, AudioError, and BudgetError when the disk is full.
    """
    path = check_target(path)
    write_file(path, encode(audio, path.suffix))


def resample(audio: Audio, rate_hz: int) -> Audio:
    """``audio`` at another rate (soxr, high quality). Raises AudioError for a rate below 1 Hz."""
    if rate_hz < 1:
        raise AudioError(f"audio cannot be resampled to {rate_hz} Hz")
    if rate_hz == audio.rate_hz:
        return audio
    return Audio(soxr.resample(audio.samples, audio.rate_hz, rate_hz, quality="HQ"), rate_hz)


def require_speech(audio: Audio, where: str) -> None:
    """Raises AudioError, naming ``where``, unless ``audio`` is finite, not silent, and at least 0.5 s long."""
    _require_finite(audio.samples, where)
    if audio.seconds < MIN_SPEECH_S:
        raise AudioError(
            f"{where} lasts {audio.seconds:.3g} s: give at least {MIN_SPEECH_S} s of speech, better 3 to 10 s"
        )
    window = max(1, round(_LOUDNESS_WINDOW_S * audio.rate_hz))
    windows = audio.samples[: len(audio.samples) // window * window].reshape(-1, window).astype(np.float64)
    # The loudest twentieth of a second counts, without its mean: pauses are normal and an offset is not a sound.
    if windows.std(axis=1).max() < _SILENCE_RMS:
        raise AudioError(f"{where} is silent (nothing above -60 dB of full scale): give a recording of speech")


def _require_format(suffix: str) -> None:
    if suffix.lower() not in _FORMATS:
        raise RecipeError(f"audio cannot be written as {suffix or 'a file without suffix'}: use {', '.join(_FORMATS)}")


def _require_finite(samples: np.ndarray, where: str) -> None:
    n_bad = int(np.count_nonzero(~np.isfinite(samples)))
    if n_bad:
        raise AudioError(f"{where} holds {n_bad} samples that are NaN or infinite: record or export it again")

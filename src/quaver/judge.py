"""Judges from outside: what speech says, whose voice it is, how good it sounds, how long it is, and how sure that is.

Whisper hears, WeSpeaker's ResNet34 compares voices, DNSMOS P.835 says how good a sound is. All err: hold a figure
against the same judge's figure for a recording, never against the best there is. Their packages are the extra
``judge``; the weights of the first two come from a folder or the hub, those of the third are in the package speechmos.
Shapes: N samples, T frames of 10 ms, M mel bands, E values of an embedding.
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quaver.audio import Audio, resample
from quaver.errors import AudioError, MissingExtra, RecipeError, need
from quaver.files import sha256

Kind = Literal["whisper", "voices"]

RATE_HZ = 16_000
"""What all judges hear."""

MIN_VOICE_S = 0.1
"""Shorter sounds have no voice to compare."""

WORDLESS = frozenset({"chinese", "japanese"})
"""Languages that are written without spaces: an error rate of words would count nothing there."""

WORST_QUALITY = 1.0
"""What DNSMOS' scale begins with; it ends with 5."""

_LOOSE_SPACES = WORDLESS | {"korean"}
# Whisper writes Chinese in the old characters or the new ones as it pleases, unless it has seen some of one kind.
_BEGINNINGS = {"zh": "以下是普通话的句子。"}
_LETTERS_A_SECOND = 12
_RUNAWAY = 4
_QUIET = 0.01
_WINDOW_S = 0.02
_N_BOOTSTRAP = 2000
_N_MELS, _N_WINDOW, _N_HOP, _N_FFT = 80, 400, 160, 512
_QUALITY_S = 9.01
# From the model's raw overall score to the scale of the listeners (speechmos 0.0.1.1, dnsmos.py).
_TO_SCALE = (-0.06766283, 1.11546468, 0.04602535)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a judge's weights are: under a folder of judges, or on the hub."""

    name: str
    hub: str
    files: tuple[str, ...]


_SOURCES: dict[Kind, _Source] = {
    "whisper": _Source(
        "whisper-base", "Systran/faster-whisper-base", ("model.bin", "config.json", "tokenizer.json", "vocabulary.*")
    ),
    "voices": _Source("wespeaker-resnet34.onnx", "Wespeaker/wespeaker-voxceleb-resnet34-LM", ("*.onnx",)),
}


def resolve(kind: Kind, folder: Path | None = None) -> Path:
    """Where the weights of a judge are: in ``folder`` where one is given, else fetched once from the hub.

    ``folder`` holds whisper-base/ (CTranslate2) and wespeaker-resnet34.onnx. Raises RecipeError when they are neither.
    """
    source = _SOURCES[kind]
    if folder is not None:
        path = folder / source.name
        if not path.exists():
            raise RecipeError(f"{path} is missing: put {source.hub} of the hub there, or name another folder of judges")
        return path
    from huggingface_hub import errors, snapshot_download

    try:
        fetched = Path(snapshot_download(source.hub, allow_patterns=list(source.files)))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"the judge {source.hub} could not be fetched from the hub ({first}): "
            f"put it as {source.name} into a folder and name that folder"
        ) from error
    if kind == "whisper":
        return fetched
    found = sorted(fetched.glob("*.onnx"))
    if not found:
        raise RecipeError(f"the hub's {source.hub} holds no .onnx file: put one as {source.name} into a folder")
    return found[0]


def _quality_weights() -> Path:
    """DNSMOS P.835 as an ONNX file in the package speechmos, which is looked into and never imported: it needs librosa.

    Raises MissingExtra, or RecipeError for a package that has no such file.
    """
    package = importlib.util.find_spec("speechmos")
    if package is None or not package.submodule_search_locations:
        raise MissingExtra("speechmos is not installed: pip install 'quaver[judge]'")
    path = Path(package.submodule_search_locations[0]) / "dnsmos_models" / "sig_bak_ovr.onnx"
    if not path.is_file():
        raise RecipeError(f"{path} is missing: install speechmos 0.0.1.1 anew")
    return path


@dataclass(frozen=True, slots=True)
class Judges:
    """Where all judges are. They are found first and loaded last: a missing one should cost no minutes."""

    whisper: Path
    voices: Path
    quality: Path

    @classmethod
    def find(cls, folder: Path | None) -> Judges:
        """The judges whose weights are in ``folder``, or on the hub. Raises RecipeError or MissingExtra."""
        for module in ("faster_whisper", "onnxruntime"):
            need(module, extra="judge")
        return cls(quality=_quality_weights(), whisper=resolve("whisper", folder), voices=resolve("voices", folder))

    def sums(self) -> dict[str, str]:
        """The SHA-256 of each judge's weights, by its name."""
        files = {
            "Whisper base": self.whisper / "model.bin", "WeSpeaker ResNet34": self.voices, "DNSMOS P.835": self.quality
        }  # fmt: skip
        return {name: sha256(file) for name, file in files.items()}


def plain(text: str) -> str:
    """``text`` in small letters, digits and apostrophes, one space between words: what an error rate counts."""
    kept = (c if c.isalnum() or c == "'" else " " for c in unicodedata.normalize("NFKC", text).lower())
    return " ".join("".join(kept).split())


def cer(heard: str, said: str, language: str = "english") -> float:
    """The character error rate, 0..1: edits that turn :func:`plain` ``heard`` into ``said`` by the length of ``said``.

    Spaces count but in Chinese, Japanese and Korean, where they are a habit of who writes. Capped at 1: speech that
    goes on for ever is a runaway, it should not also drown the mean.
    """
    heard, said = plain(heard), plain(said)
    if language in _LOOSE_SPACES:
        heard, said = heard.replace(" ", ""), said.replace(" ", "")
    return min(1.0, _edits(heard, said) / max(1, len(said)))


def wer(heard: str, said: str, language: str = "english") -> float | None:
    """The word error rate, 0..1, counted and capped like :func:`cer`; None in the languages of WORDLESS."""
    if language in WORDLESS:
        return None
    words = plain(said).split()
    return min(1.0, _edits(plain(heard).split(), words) / max(1, len(words)))


def _edits(a: Sequence[str], b: Sequence[str]) -> int:
    """The Levenshtein distance."""
    above = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
        above = row
    return above[-1]


def most_seconds(text: str) -> float:
    """The length beyond which speech of ``text`` has run away: four times what its letters need, at least 4 s."""
    return _RUNAWAY * max(1.0, len(plain(text)) / _LETTERS_A_SECOND)


def speech_seconds(audio: Audio) -> float:
    """From the first to the last 20 ms within 40 dB of the loudest; 0 for silence.

    The silence that files have around speech is a habit of who made them and no part of a duration.
    """
    first, end = _loud_part(audio)
    return end - first


def leading_silence(audio: Audio) -> float:
    """Seconds before the first 20 ms within 40 dB of the loudest; all of it for silence."""
    return _loud_part(audio)[0]


def _loud_part(audio: Audio) -> tuple[float, float]:
    """Where speech begins and ends, in seconds; both at the end for silence."""
    size = max(1, round(_WINDOW_S * audio.rate_hz))
    windows = audio.samples[: len(audio.samples) // size * size].reshape(-1, size)
    loudness = np.sqrt((windows.astype(np.float64) ** 2).mean(1))
    loud = np.flatnonzero(loudness > _QUIET * loudness.max(initial=0.0))
    if not len(loud):
        return audio.seconds, audio.seconds
    return float(loud[0]) * size / audio.rate_hz, float(loud[-1] + 1) * size / audio.rate_hz


def interval(values: Sequence[float], seed: int = 1729) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean: of ``values`` drawn with replacement, so many as there are."""
    every = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(every), (_N_BOOTSTRAP, len(every)))
    low, high = np.percentile(every[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


class Whisper:
    """Hears speech: Whisper in CTranslate2's format, greedy, without timestamps. Raises MissingExtra."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        whisper = need("faster_whisper", extra="judge")
        self._model: Any = whisper.WhisperModel(str(path), device="cpu", compute_type="int8", cpu_threads=threads)

    def hear(self, audio: Audio, language: str | None = "en") -> str:
        """What ``audio`` says; ``language`` is Whisper's code of it, None lets it find out."""
        parts, _ = self._model.transcribe(
            resample(audio, RATE_HZ).samples, language=language, beam_size=1, temperature=0.0,
            without_timestamps=True, condition_on_previous_text=False,
            initial_prompt=None if language is None else _BEGINNINGS.get(language),
        )  # fmt: skip
        return " ".join(part.text.strip() for part in parts)


class Voices:
    """Tells voices apart: a speaker embedding by an ONNX model over log-mel frames. Raises MissingExtra."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self._session = _session(path, threads)

    def embed(self, audio: Audio) -> np.ndarray:
        """The voice [E] as a unit vector: the product of two is their similarity, -1..1.

        Raises AudioError for a sound too short to have a voice.
        """
        if audio.seconds <= MIN_VOICE_S:
            raise AudioError(f"a sound of {audio.seconds:.3g} s has no voice to compare: more than 0.1 s is needed")
        frames = log_mels(resample(audio, RATE_HZ).samples)
        centred = (frames - frames.mean(0)).astype(np.float32)[None]
        vector: np.ndarray = self._session.run(None, {self._session.get_inputs()[0].name: centred})[0][0]
        vector /= np.linalg.norm(vector)
        return vector


class Quality:
    """Says how good speech sounds to listeners: DNSMOS P.835 (Reddy et al. 2022), overall. Raises MissingExtra."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self._session = _session(path, threads)

    def rate(self, audio: Audio) -> float:
        """The mean opinion score, 1 to 5, of all stretches of 9 s a second apart; a shorter sound is repeated.

        Raises AudioError for no sound at all.
        """
        samples = np.clip(resample(audio, RATE_HZ).samples, -1, 1)
        if not len(samples):
            raise AudioError("a sound of 0 s cannot be rated")
        n_needed = int(_QUALITY_S * RATE_HZ)
        while len(samples) < n_needed:
            samples = np.append(samples, samples)
        n_more = int(len(samples) // RATE_HZ - _QUALITY_S)
        name, scores = self._session.get_inputs()[0].name, []
        for first in range(0, (n_more + 1) * RATE_HZ, RATE_HZ):
            stretch = samples[first : first + n_needed][None]
            scores.append(np.polyval(_TO_SCALE, float(self._session.run(None, {name: stretch})[0][0][2])))
        return float(np.mean(scores))


def _session(path: Path, threads: int) -> Any:
    """An ONNX model, to be run. Raises MissingExtra."""
    runtime = need("onnxruntime", extra="judge")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def log_mels(samples: np.ndarray) -> np.ndarray:
    """Kaldi's log filterbank energies [T, M] of ``samples`` [N] at 16 kHz, nominally in -1..1.

    25 ms Hamming windows every 10 ms, whole windows only, each without its mean and pre-emphasized by 0.97; power
    spectrum of 512; 80 triangles in mel from 20 Hz to 8 kHz; no dither. Computed in float64.
    """
    n_frames = max(0, 1 + (len(samples) - _N_WINDOW) // _N_HOP)
    starts = _N_HOP * np.arange(n_frames)[:, None]
    windows = (samples.astype(np.float64) * 32768)[starts + np.arange(_N_WINDOW)]
    windows -= windows.mean(1, keepdims=True)
    # Kaldi takes the sample before the first to be like the first.
    windows -= 0.97 * np.concatenate((windows[:, :1], windows[:, :-1]), axis=1)
    spectrum = np.fft.rfft(windows * np.hamming(_N_WINDOW), _N_FFT)[:, : _N_FFT // 2]
    power = spectrum.real**2 + spectrum.imag**2
    energies: np.ndarray = np.log(np.maximum(power @ _triangles().T, np.finfo(np.float32).eps))
    return energies


@functools.cache
def _triangles() -> np.ndarray:
    """The weights [M, bins] of the mel bands; straight in mel, not in Hz. The bin at 8 kHz is in none."""
    hz = np.arange(_N_FFT // 2) * RATE_HZ / _N_FFT
    low, high = _mel(np.array([20.0, RATE_HZ / 2]))
    edges = np.linspace(low, high, _N_MELS + 2)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    mel = _mel(hz)[None]
    rising, falling = (mel - left) / (centre - left), (right - mel) / (right - centre)
    weights: np.ndarray = np.maximum(0, np.minimum(rising, falling))
    return weights


def _mel(hz: np.ndarray) -> np.ndarray:
    mel: np.ndarray = 1127 * np.log1p(hz / 700)
    return mel

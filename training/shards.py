"""Speech between the steps of training: synthesized sets, encoded sets and reference recordings, in files of their own.

A *set* is a folder of `part-NNN.jsonl` and `part-NNN.s16` as the synthesizing workers append them: lines of text id,
speaker, first sample and frames, beside raw 16-bit samples at 24 kHz. An *encoded set* is `codes-N.safetensors` and
`speakers.json`. Every file that travels is at most 15 MiB. Shapes: T frames, Q codebooks, S speakers, N samples.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import data, recipe

_FRAMES_A_FILE = 800_000
_SPEAKERS_A_FILE = 12
REFERENCE_S = 14.0
N_REFERENCE = int(REFERENCE_S * data.RATE_HZ)


@dataclass(frozen=True, slots=True)
class Spoken:
    """One clip of a set: where its samples lie."""

    text: int
    speaker: str
    file: Path
    offset: int
    n_frames: int

    def read(self) -> np.ndarray:
        """The samples, int16 [n_frames * 1920]."""
        count = self.n_frames * recipe.SAMPLES_PER_FRAME
        return np.fromfile(self.file, "<i2", count, offset=2 * self.offset)


def spoken(folder: Path) -> Iterator[Spoken]:
    """The clips of the set in ``folder`` that are whole: a worker that was killed may leave half a line or clip."""
    for index in sorted(folder.glob("part-*.jsonl")):
        file = index.with_suffix(".s16")
        n_samples = file.stat().st_size // 2 if file.exists() else 0
        for line in index.read_text("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                clip = Spoken(int(row["text"]), str(row["speaker"]), file, int(row["offset"]), int(row["n_frames"]))
            except (ValueError, KeyError, TypeError):
                continue
            if clip.n_frames > 0 and clip.offset + clip.n_frames * recipe.SAMPLES_PER_FRAME <= n_samples:
                yield clip


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded set, clip after clip."""

    codes: Tensor
    """int16 [T, 16], the frames of all clips joined."""
    text: Tensor
    """int32 [n]: the id of each clip's text."""
    speaker: Tensor
    """int16 [n]: indices into ``names``."""
    n_frames: Tensor
    """int16 [n]."""
    names: list[str]


def write(folder: Path, encoded: Encoded) -> list[Path]:
    """Writes ``encoded`` to ``folder`` as codes-N.safetensors and speakers.json; 18 bytes a frame."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speakers.json").write_text(json.dumps(encoded.names) + "\n", "utf-8")
    ends = encoded.n_frames.long().cumsum(0)
    paths, first, begin = list[Path](), 0, 0
    while first < len(ends):
        last = max(first + 1, int(torch.searchsorted(ends, begin + _FRAMES_A_FILE, right=True)))
        end = int(ends[last - 1])
        codes = encoded.codes[begin:end].long()
        ninth = ((codes >> 8) << torch.arange(recipe.N_CODEBOOKS)).sum(1)
        tensors = {
            "low": (codes & 255).to(torch.uint8),
            "high": torch.stack((ninth & 255, ninth >> 8), 1).to(torch.uint8),
            "text": encoded.text[first:last].to(torch.int32),
            "speaker": encoded.speaker[first:last].to(torch.int16),
            "n_frames": encoded.n_frames[first:last].to(torch.int16),
        }
        paths.append(folder / f"codes-{len(paths)}.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, paths[-1])
        first, begin = last, end
    return paths


def _numbered(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*"), key=lambda path: int(path.stem.split("-")[1]))


def read(folder: Path) -> Encoded:
    """What ``write`` wrote to ``folder``. Raises FileNotFoundError when there is nothing."""
    parts = [load_file(path) for path in _numbered(folder, "codes")]
    if not parts:
        raise FileNotFoundError(f"{folder}/codes-0.safetensors is missing")
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    high = joined["high"].to(torch.int32)
    ninth = ((high[:, :1] | high[:, 1:] << 8) >> torch.arange(recipe.N_CODEBOOKS)) & 1
    codes = (joined["low"].to(torch.int32) | ninth << 8).to(torch.int16)
    names = json.loads((folder / "speakers.json").read_text("utf-8"))
    return Encoded(codes, joined["text"], joined["speaker"], joined["n_frames"], names)


def write_references(folder: Path, samples: np.ndarray, names: list[str], *, small: bool = True) -> list[Path]:
    """Writes ``samples`` int16 [S, N], a recording of 14 s a speaker in the order of ``names``, to references-N.ogg.

    Where they need not be ``small``, or this machine cannot write Opus: references-N.safetensors, mu-law.
    """
    if samples.shape != (len(names), N_REFERENCE):
        raise ValueError(f"references of shape {samples.shape} for {len(names)} speakers of {N_REFERENCE} samples")
    folder.mkdir(parents=True, exist_ok=True)
    opus = small and "OPUS" in soundfile.available_subtypes("OGG") and _keeps_length()
    size = _SPEAKERS_A_FILE if opus else 15 * 2**20 // N_REFERENCE

    def write_one(number: int) -> Path:
        some = samples[number * size : (number + 1) * size].reshape(-1)
        path = folder / f"references-{number}.{'ogg' if opus else 'safetensors'}"
        if opus:
            _write_opus(path, some)
        else:
            save_file({"mulaw": torch.from_numpy(_compress(some))}, path)
        return path

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(write_one, range(-(-len(samples) // size))))


def read_references(folder: Path) -> np.ndarray:
    """The recordings int16 [S, N] that ``write_references`` wrote. Raises FileNotFoundError when there are none."""

    def read_one(path: Path) -> np.ndarray:
        if path.suffix == ".ogg":
            return np.asarray(soundfile.read(path, dtype="int16")[0])
        return _expand(load_file(path)["mulaw"].numpy())

    paths = _numbered(folder, "references")
    if not paths:
        raise FileNotFoundError(f"{folder}/references-0 is missing")
    with ThreadPoolExecutor(32) as pool:
        return np.concatenate(list(pool.map(read_one, paths))).reshape(-1, N_REFERENCE)


def _write_opus(target: Path | io.BytesIO, samples: np.ndarray) -> None:
    with soundfile.SoundFile(target, "w", data.RATE_HZ, 1, "OPUS", format="OGG") as file:
        # One long write overflows libsndfile's stack.
        for first in range(0, len(samples), data.RATE_HZ):
            file.write(samples[first : first + data.RATE_HZ])


def _keeps_length() -> bool:
    """Whether this libsndfile reads back as many samples as it wrote, which old ones do not."""
    memory = io.BytesIO()
    try:
        _write_opus(memory, np.zeros(30_001, np.int16))
        memory.seek(0)
        return len(soundfile.read(memory)[0]) == 30_001
    except (RuntimeError, TypeError):
        return False


def _compress(samples: np.ndarray) -> np.ndarray:
    """int16 to mu-law uint8."""
    x = samples.astype(np.float32) / 32768.0
    y = np.sign(x) * np.log1p(255.0 * np.abs(x)) / np.log(256.0)
    return np.asarray(np.round(y * 127.0) + 128.0).astype(np.uint8)


def _expand(compressed: np.ndarray) -> np.ndarray:
    """mu-law uint8 to int16."""
    y = (compressed.astype(np.float32) - 128.0) / 127.0
    x = np.sign(y) * (256.0 ** np.abs(y) - 1.0) / 255.0
    return np.asarray(np.clip(np.round(x * 32768.0), -32768, 32767)).astype(np.int16)

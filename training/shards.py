"""Speech between the steps of training: synthesized sets, encoded sets and reference recordings, in files of their own.

A *set* is a folder of `part-NNN.jsonl` and `part-NNN.s16` as the synthesizing workers append them: lines of text id,
speaker, first sample and frames, beside raw 16-bit samples at 24 kHz. An *encoded set* is `codes-N.safetensors`,
`references.npy` and `speakers.json`. Shapes: T frames, Q codebooks, S speakers, N samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import data, recipe

_FRAMES_A_FILE = 800_000
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


def references(clips: list[Spoken]) -> tuple[list[str], np.ndarray]:
    """The names of all speakers, sorted, and 14 s of each, int16 [S, N]: clips one after the other, over and over where
    there are too few."""
    by_speaker: dict[str, list[Spoken]] = {}
    for clip in clips:
        by_speaker.setdefault(clip.speaker, []).append(clip)
    names, found = sorted(by_speaker), list[np.ndarray]()
    for name in names:
        said, n_samples = list[np.ndarray](), 0
        while n_samples < N_REFERENCE:
            said.append(by_speaker[name][len(said) % len(by_speaker[name])].read())
            n_samples += len(said[-1])
        found.append(np.concatenate(said)[:N_REFERENCE])
    return names, np.stack(found)


def write_references(folder: Path, samples: np.ndarray, names: list[str]) -> None:
    """Writes ``samples`` int16 [S, N], a recording of 14 s a speaker in the order of ``names``, to references.npy."""
    if samples.shape != (len(names), N_REFERENCE):
        raise ValueError(f"references of shape {samples.shape} for {len(names)} speakers of {N_REFERENCE} samples")
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "references.npy", samples, allow_pickle=False)


def read_references(folder: Path) -> np.ndarray:
    """The recordings int16 [S, N] that ``write_references`` wrote. Raises FileNotFoundError when there are none."""
    return np.asarray(np.load(folder / "references.npy", allow_pickle=False))

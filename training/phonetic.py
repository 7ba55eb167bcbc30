"""What is said in every 80 ms, and not who says it: targets for the codec's first codebook.

    python -m training.phonetic hear --data .data --held CORPUS --whisper WEIGHTS --features FEATURES
    python -m training.phonetic distil --data .data --held CORPUS --features FEATURES --out .data/carry-codec

`hear` (with faster-whisper and soxr; half an hour of one core) runs every training clip through Whisper's encoder.
`distil` keeps of it what stays the same when other voices say the same sentence: the crossed clips, laid over one
another by dynamic time warping, give the scatter between voices, and the directions in which all frames scatter most
against that become the targets. It writes a folder that the codec is trained from: the clips, and what is said in them.

Shapes: F frames of 80 ms, K target dimensions, W Whisper's width.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import data, recipe

_WIDTH = 512
_STEP = 320
"""Whisper's encoder gives a vector for every 20 ms: 320 samples at 16 kHz."""
_WINDOW = 1500
_GAP = 20
WIDTH = 40
"""How many target dimensions are kept."""


def n_frames(samples: np.ndarray) -> int:
    """How many codec frames ``samples`` [N] fill, the last perhaps not whole."""
    return -(-len(samples) // recipe.SAMPLES_PER_FRAME)


def held_clips(corpus: Path, n_each: int) -> list[data.Clip]:
    """The first ``n_each`` clips of unseen texts and of unseen voices, to measure with and never to train on."""
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text("utf-8").splitlines()]
    split = {name: [r for r in rows if r["split"] == name][:n_each] for name in ("unseen-text", "unseen-voice")}
    return [data.Clip(r["file"], r["text"], r["voice"], r["seconds"]) for rows in split.values() for r in rows]


def hear(folder: Path, held: Path, whisper: Path, out: Path) -> None:
    """Writes ``out``/features.npy, float16 [F, 512] at 12.5 Hz, and index.jsonl: file, first frame, frames, held.

    Clips that an earlier run of the same list heard are not heard again.
    """
    import soxr  # type: ignore[import-not-found, unused-ignore]
    from faster_whisper import WhisperModel  # type: ignore[import-not-found, unused-ignore]

    crossed = data.crossed_clips(folder, 10_000)
    clips = [(folder, c) for c in {c.file: c for c in (*crossed, *data.read_manifest(folder))}.values()]
    clips[len(crossed) : len(crossed)] = [(held, c) for c in held_clips(held, 30)]
    lengths = [n_frames(data.read_clips(root, [c])[0]) for root, c in clips]
    starts = np.cumsum([0, *lengths])
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"file": c.file, "start": int(s), "n_frames": n, "held": root == held, "voice": c.voice, "text": c.text}
        for (root, c), s, n in zip(clips, starts, lengths, strict=False)
    ]
    listed = "".join(json.dumps(row) + "\n" for row in rows)
    index = out / "index.jsonl"
    goes_on = index.exists() and index.read_text("utf-8") == listed
    mode: Literal["r+", "w+"] = "r+" if goes_on else "w+"
    features = np.lib.format.open_memmap(out / "features.npy", mode, np.float16, (int(starts[-1]), _WIDTH))
    index.write_text(listed, "utf-8")
    model: Any = WhisperModel(str(whisper), device="cpu", compute_type="float32", cpu_threads=1, num_workers=1)
    begun, window, laid = time.monotonic(), np.zeros(_WINDOW * _STEP, np.float32), list[tuple[int, int, int]]()
    place = _GAP
    for i, (root, clip) in enumerate(clips):
        if np.any(features[starts[i + 1] - 1]):
            continue
        samples = data.read_clips(root, [clip])[0]
        samples = samples * (0.06 / max(1e-4, float(np.sqrt(np.mean(samples**2)))))
        heard = soxr.resample(samples, data.RATE_HZ, 16_000)
        if place + 4 * lengths[i] + _GAP > _WINDOW:
            _encode(model, window, laid, features)
            place = _GAP
            if i % 50 < 5:
                print(f"{time.monotonic() - begun:.0f} s: {i} of {len(clips)} clips", flush=True)
        window[place * _STEP :][: len(heard)] = heard[: _WINDOW * _STEP - place * _STEP]
        laid.append((place, int(starts[i]), lengths[i]))
        place += 4 * lengths[i] + _GAP
    if laid:
        _encode(model, window, laid, features)
    features.flush()
    print(f"done: {len(clips)} clips in {time.monotonic() - begun:.0f} s", flush=True)


def _encode(model: Any, window: np.ndarray, laid: list[tuple[int, int, int]], features: np.ndarray) -> None:
    """Hears one window of clips, averages around every frame's first sample, and clears the window.

    Centred there, 40 ms before the middle of the frame: encoder and decoder are causal, and what the decoder is to
    begin saying in a frame must be in that frame's code.
    """
    mel = model.feature_extractor(window)[:, : 2 * _WINDOW]
    encoded = np.asarray(model.encode(mel)).reshape(-1, _WIDTH)
    weights = np.array([0.5, 1.0, 1.0, 1.0, 0.5], np.float32) / 4.0
    for place, start, length in laid:
        near = np.clip(place + 4 * np.arange(length)[:, None] + np.arange(-2, 3), 0, len(encoded) - 1)
        features[start : start + length] = weights @ encoded[near]
    window[:] = 0.0
    laid.clear()


@dataclass(frozen=True, slots=True)
class Heard:
    """One clip that was heard: frames ``start`` to ``start + n_frames`` of all; ``held`` is not for training."""

    file: str
    text: str
    voice: str
    start: int
    n_frames: int
    held: bool


def heard(features: Path) -> tuple[list[Heard], np.ndarray]:
    """What `hear` wrote, as far as it got: the clips and the features [F, W]."""
    vectors = np.load(features / "features.npy", mmap_mode="r")
    clips = [Heard(**json.loads(line)) for line in (features / "index.jsonl").read_text("utf-8").splitlines()]
    return [c for c in clips if np.any(vectors[c.start + c.n_frames - 1])], vectors


def warp(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest path of steps (i, j) through two sequences of vectors, from both beginnings to both ends."""
    cost = np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2.0 * a @ b.T, 0.0))
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    path, i, j = [(len(a) - 1, len(b) - 1)], len(a), len(b)
    while (i, j) != (1, 1):
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda at: total[at])
        path.append((i - 1, j - 1))
    return path[::-1]


@dataclass(frozen=True, slots=True)
class Map:
    """A linear map of features to targets."""

    mean: np.ndarray
    matrix: np.ndarray
    """[W, K]"""
    ratio: np.ndarray
    """[K]: how much each dimension scatters in all, for 1 between voices that say the same."""

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The targets [F, K] of ``features`` [F, W], of mean square 1 in all."""
        out: np.ndarray = (features.astype(np.float32) - self.mean) @ self.matrix
        return out


Pairs = list[tuple[Heard, Heard, list[tuple[int, int]]]]


def pairs_of(clips: list[Heard], view: np.ndarray) -> Pairs:
    """Every two clips that say the same sentence in two voices, with their path by ``view`` [F, any]."""
    said: dict[str, list[Heard]] = {}
    for clip in clips:
        said.setdefault(clip.text, []).append(clip)
    groups = [list({c.voice: c for c in group}.values()) for group in said.values()]
    return [
        (a, b, warp(view[a.start : a.start + a.n_frames], view[b.start : b.start + b.n_frames]))
        for group in groups
        for a, b in combinations(group, 2)
    ]


def fit(clips: list[Heard], features: np.ndarray, pairs: Pairs) -> Map:
    """The map for which frames scatter most in all against frames that say the same in other voices."""
    rows = np.concatenate([np.arange(c.start, c.start + c.n_frames) for c in clips])
    vectors = features[rows].astype(np.float32)
    mean = vectors.mean(0)
    total = np.cov(vectors.T, bias=True).astype(np.float64)
    within, n_steps = np.zeros_like(total), 0
    for a, b, path in pairs:
        for one, other, steps in ((a, b, path), (b, a, [(j, i) for i, j in path])):
            # Frames of 80 ms never meet exactly: a frame is held against the mean of those that it was laid over.
            weights = np.zeros((one.n_frames, other.n_frames), np.float32)
            weights[tuple(np.array(steps).T)] = 1.0
            near = weights @ features[other.start : other.start + other.n_frames].astype(np.float32)
            apart = features[one.start : one.start + one.n_frames] - near / weights.sum(1, keepdims=True)
            within += apart.T.astype(np.float64) @ apart
            n_steps += 2 * len(apart)
    within /= n_steps
    # Only some voices say the same; what all voices differ in on average is no part of the targets either.
    voices = sorted({c.voice for c in clips})
    own = [np.concatenate([np.arange(c.start, c.start + c.n_frames) for c in clips if c.voice == v]) for v in voices]
    apart = np.stack([features[i].astype(np.float64).mean(0) for i in own]) - mean
    within += 5.0 * apart.T @ apart / len(voices)
    within += 0.01 * np.trace(within) / len(within) * np.eye(len(within))
    root = np.linalg.inv(np.linalg.cholesky(within))
    ratio, axes = np.linalg.eigh(root @ total @ root.T)
    ratio, axes = ratio[::-1][:WIDTH], axes[:, ::-1][:, :WIDTH]
    # Of each dimension, only what is not scatter between voices counts.
    matrix = root.T @ axes * np.sqrt(np.maximum(1.0 - 1.0 / ratio, 0.0))
    matrix /= np.sqrt(np.trace(matrix.T @ total @ matrix) / WIDTH)
    return Map(mean, matrix.astype(np.float32), ratio)


def agreement(codes: np.ndarray, pairs: Pairs) -> tuple[float, float]:
    """How often two voices that say the same have the same code [F] (either way), and how often any two frames do."""
    same = n_steps = 0
    for a, b, path in pairs:
        for one, other, steps in ((a, b, path), (b, a, [(j, i) for i, j in path])):
            met = np.zeros(one.n_frames, bool)
            for i, j in steps:
                met[i] |= codes[one.start + i] == codes[other.start + j]
            same, n_steps = same + int(met.sum()), n_steps + len(met)
    used = np.concatenate([codes[a.start : a.start + a.n_frames] for a, _, _ in pairs])
    shares = np.bincount(used.astype(np.int64)) / len(used)
    return same / n_steps, float((shares**2).sum())


@dataclass(frozen=True, slots=True)
class Targets:
    """What is said in the frames of some clips."""

    clips: list[data.Clip]
    starts: list[int]
    """The first frame of each clip."""
    values: Tensor
    """float16 [F, K]."""


def write(folder: Path, name: str, clips: list[data.Clip], starts: list[int], values: np.ndarray) -> None:
    """Writes targets as ``folder``/``name``.jsonl and .safetensors, 8 bits a value."""
    scale = np.quantile(np.abs(values), 0.9995, 0) / 127.0
    whole = torch.from_numpy(np.clip(np.round(values / scale), -127, 127).astype(np.int8))
    save_file({"values": whole, "scale": torch.from_numpy(scale.astype(np.float32))}, folder / f"{name}.safetensors")
    rows = [{**asdict(clip), "start": start} for clip, start in zip(clips, starts, strict=True)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def read(folder: Path, name: str) -> Targets:
    """The targets that ``write`` wrote. Raises FileNotFoundError when there are none."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    tensors = load_file(folder / f"{name}.safetensors")
    starts = [row.pop("start") for row in rows]
    return Targets([data.Clip(**row) for row in rows], starts, (tensors["values"] * tensors["scale"]).half())


def distil(folder: Path, held: Path, features: Path, out: Path, limit_bytes: int) -> None:
    """Fits the map and writes ``out``: train and held targets with their audio, ``limit_bytes`` of it at most."""
    clips, vectors = heard(features)
    trained = [c for c in clips if not c.held]
    wanted = {c.file for c in data.crossed_clips(folder, 10_000)}
    crossed = [c for c in trained if c.file in wanted]
    sample = np.asarray(vectors[:: max(1, len(vectors) // 20_000)], np.float32)
    mean, spread = sample.mean(0), sample.std(0)
    view = np.zeros((len(vectors), _WIDTH), np.float32)
    for c in crossed:
        view[c.start : c.start + c.n_frames] = (vectors[c.start : c.start + c.n_frames] - mean) / spread
    # The last sentences are for measuring.
    n_fit = len(crossed) * 4 // 5
    made = fit(trained, vectors, pairs_of(crossed[:n_fit], view))
    for _ in range(2):
        values = made(vectors)
        made = fit(trained, vectors, pairs_of(crossed[:n_fit], values))
    values = made(vectors)
    print("scatter in all over scatter between voices:", np.round(made.ratio[[0, 1, 3, 7, 15, 23, 31, 39]], 2))
    out.mkdir(parents=True, exist_ok=True)
    np.savez(features / "map.npz", mean=made.mean, matrix=made.matrix, ratio=made.ratio, values=values)
    dropped, size = set[str](), sum((folder / c.file).stat().st_size for c in trained)
    for c in sorted(trained, key=lambda c: -c.n_frames):
        if size > limit_bytes:
            dropped.add(c.file)
            size -= (folder / c.file).stat().st_size
    kept = [c for c in trained if c.file not in dropped]
    for name, root, some in (("train", folder, kept), ("held", held, [c for c in clips if c.held])):
        rows = np.concatenate([np.arange(c.start, c.start + c.n_frames) for c in some])
        starts = np.cumsum([0, *(c.n_frames for c in some)])[:-1].tolist()
        seconds = recipe.SAMPLES_PER_FRAME / data.RATE_HZ
        listed = [data.Clip(c.file, c.text, c.voice, round(c.n_frames * seconds, 2)) for c in some]
        write(out, name, listed, starts, values[rows])
        for c in some:
            (out / c.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / c.file, out / c.file)
        print(f"{name}: {len(some)} clips, {len(rows) * seconds / 60:.1f} min, list {data.list_sha256(listed)[:16]}")


def main() -> None:
    """Hears or distils."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("hear", "distil"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held", type=Path, required=True, help="the corpus with its unseen clips, to measure with")
    parser.add_argument("--features", type=Path, required=True, help="where `hear` writes, and `distil` reads")
    parser.add_argument("--whisper", type=Path, help="the recogniser's CTranslate2 weights")
    parser.add_argument("--out", type=Path, help="the folder that travels")
    parser.add_argument("--megabytes", type=float, default=44.0, help="of audio; the longest clips are left out")
    args = parser.parse_args()
    if args.what == "hear":
        hear(args.data, args.held, args.whisper, args.features)
    else:
        distil(args.data, args.held, args.features, args.out, int(args.megabytes * 1e6))


if __name__ == "__main__":
    main()

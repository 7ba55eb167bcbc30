"""Encode synthesized sets: their samples to codes, and 14 s of every speaker to learn voices from.

    python -m training.encode --first CODEC --latents LATENTS --set SET --set SET --out OUT

CODEC and LATENTS as in `training.encoder`: the codes are those that its encoder learns to find, measured on the sound
itself. OUT gets codes-N.safetensors, references.npy and speakers.json (see `training.shards`). Speakers are numbered in
the order of their names. Clips of similar length are encoded together, filled up with silence.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from training import quantizer, recipe, shards
from training.encoder import Coding, first_codec, open_coding

_BATCH_FRAMES = 4_000
"""Frames in a batch, silence included: 320 s take about 6 GiB."""


def batches(n_frames: list[int], limit: int = _BATCH_FRAMES) -> list[list[int]]:
    """The indices of clips, longest first, in batches whose longest clip times their number is at most ``limit``."""
    found: list[list[int]] = []
    for i in sorted(range(len(n_frames)), key=lambda i: -n_frames[i]):
        if not found or (len(found[-1]) + 1) * n_frames[found[-1][0]] > limit:
            found.append([])
        found[-1].append(i)
    return found


def encode(
    codings: list[Coding], clips: list[np.ndarray], limit: int = _BATCH_FRAMES, log: Callable[[str], None] = print
) -> list[Tensor]:
    """The codes int16 [T, 16] of every clip, int16 samples in whole frames. ``codings``: one on each device."""
    lengths = [len(clip) // recipe.SAMPLES_PER_FRAME for clip in clips]
    codes = [torch.zeros(0, recipe.N_CODEBOOKS, dtype=torch.int16)] * len(clips)
    begun, left, lock = time.monotonic(), iter(batches(lengths, limit)), Lock()
    logged, n_done = 0.0, 0

    @torch.no_grad()
    def work(coding: Coding) -> None:
        nonlocal logged, n_done
        device = coding.books.device
        while True:
            with lock:
                batch = next(left, None)
            if batch is None:
                return
            # Few different shapes: a GPU picks its kernels anew for every one.
            longest = -(-lengths[batch[0]] // 8) * 8
            samples = np.zeros((len(batch), longest * recipe.SAMPLES_PER_FRAME), np.int16)
            for row, i in zip(samples, batch, strict=True):
                row[: len(clips[i])] = clips[i]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                said, sound, _ = coding(torch.from_numpy(samples).to(device).float() / 32768.0)
            first, rest = quantizer.coded(said, coding.books[:1])[0], quantizer.coded(sound, coding.books[1:])[0]
            whole = torch.cat((first, rest)).permute(1, 2, 0).to(torch.int16).cpu()
            with lock:
                for row, i in zip(whole, batch, strict=True):
                    codes[i] = row[: lengths[i]].clone()
                    n_done += lengths[i]
                if time.monotonic() - begun > logged + 10.0:
                    logged = time.monotonic() - begun
                    log(f"{logged:.0f} s: {n_done} of {sum(lengths)} frames")

    with ThreadPoolExecutor(len(codings)) as workers:
        list(workers.map(work, codings))
    return codes


def main() -> None:
    """Encodes and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=Path, required=True, help="a trained codec's safetensors file")
    parser.add_argument("--latents", type=Path, required=True, help="what `training.encoder measure` wrote")
    parser.add_argument("--set", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", nargs="+", help="such as cuda:1, or several")
    args = parser.parse_args()
    devices = args.device or ["cuda" if torch.cuda.is_available() else "cpu"]
    codings = [open_coding(first_codec(args.first), args.latents, torch.device(device)) for device in devices]
    begun = time.monotonic()
    listed = [clip for folder in args.set for clip in shards.spoken(folder)]
    samples = [clip.read() for clip in listed]
    hours = sum(clip.n_frames for clip in listed) * recipe.SAMPLES_PER_FRAME / 24_000 / 3600
    print(f"{len(listed)} clips, {hours:.2f} h, {time.monotonic() - begun:.0f} s", flush=True)
    names, references = shards.references(listed)
    number = {name: i for i, name in enumerate(names)}
    with ThreadPoolExecutor(1) as beside:
        written = beside.submit(shards.write_references, args.out, references, names)
        codes = encode(codings, samples, log=lambda text: print(text, flush=True))
        print(f"{time.monotonic() - begun:.0f} s: encoded", flush=True)
    encoded = shards.Encoded(
        torch.cat(codes),
        torch.tensor([clip.text for clip in listed], dtype=torch.int32),
        torch.tensor([number[clip.speaker] for clip in listed], dtype=torch.int16),
        torch.tensor([clip.n_frames for clip in listed], dtype=torch.int16),
        names,
    )
    written.result()
    paths = shards.write(args.out, encoded)
    bits = quantizer.bits(encoded.codes.T.long(), recipe.N_CODES)
    print("bits of each codebook:", " ".join(f"{b:.2f}" for b in bits.tolist()))
    for path in paths:
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB")
    print(f"done in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()

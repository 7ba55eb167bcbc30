"""Kokoro-82M in plain PyTorch, many clips at once: hours of training speech in minutes on one GPU.

    python -m training.kokoro convert kokoro.onnx kokoro.safetensors
    python -m training.kokoro pack kokoro.safetensors kokoro-a.bin kokoro-b.bin
    python -m training.kokoro speak --jobs JOBS.xz --weights kokoro-a.bin kokoro-b.bin --styles styles.npz --out SET \
        --share 0/2 --seconds 150 --device cuda:0

`convert` needs onnx; `speak` needs PyTorch, NumPy and safetensors alone. Jobs and sets are those of `synthesize.py`; a
speaker may also have "formant", "bend" and "colour" (see `warp.py`).

No masks are needed: durations are predicted for clips of equally many tokens, and clips of about equally many frames
are rendered together, the closing silence of each made longer until all are equally long.

Shapes: B clips, n tokens, T frames (25 ms, 600 samples), L steps, C channels, H hidden size.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import data, recipe, synthesize, warp
from training.kokoro_model import STEP, Kokoro
from training.kokoro_weights import from_onnx, load, pack

_CHUNK = 4096
"""Jobs that are planned together: enough of every length, and few enough for any beginning to be a fair sample."""
_PLANNED = 256
"""The most clips planned at once."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A clip whose durations are known."""

    job: synthesize.Job
    frames: np.ndarray
    """[n]"""
    prosody: Tensor
    text: Tensor
    style: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Finished clips on their way to the disk."""

    jobs: list[synthesize.Job]
    samples: Tensor
    """int16 [B, M]"""
    n_frames: Tensor
    """[B]: whole frames of 1920 samples, 0 for a clip that is dropped."""
    ready: Any
    """A CUDA event, or None."""


class Speaker:
    """Speaks jobs in batches."""

    def __init__(
        self,
        model: Kokoro,
        styles: dict[str, np.ndarray],
        speakers: dict[str, dict[str, Any]],
        device: torch.device,
        budget: int | None = None,
        noise: float = 1.0,
    ) -> None:
        """``budget``: frames of 25 ms that are rendered together, by default what fills the device."""
        self.model, self.styles, self.speakers, self.device = model.to(device), styles, speakers, device
        self.budget = budget or (16_000 if device.type == "cuda" else 600)
        self.noise = noise
        self.waiting: dict[int, list[Planned]] = {}
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False
            model.lighten()

    def _sent(self, values: Tensor) -> Tensor:
        """``values`` on the device, without waiting for what it is doing."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values

    def style(self, job: synthesize.Job) -> np.ndarray:
        """Kokoro has one style vector for every length of sentence."""
        shares = self.speakers[job["speaker"]]["weights"].items()
        style = sum(share * self.styles[name][len(job["tokens"]) - 1] for name, share in shares)
        return np.asarray(style, np.float32)

    @torch.inference_mode()
    def plan(self, jobs: list[synthesize.Job]) -> list[Planned]:
        """The jobs, which all have equally many tokens, with their durations."""
        ids = self._sent(torch.tensor([[0, *job["tokens"], 0] for job in jobs]))
        styles = self._sent(torch.from_numpy(np.stack([self.style(job) for job in jobs])))
        speeds = [job["tempo"] / self.speakers[job["speaker"]]["pitch"] for job in jobs]
        frames, prosody, text = self.model.plan(ids, styles, self._sent(torch.tensor(speeds)))
        return [Planned(*row) for row in zip(jobs, frames.cpu().numpy(), prosody, text, styles, strict=True)]

    @torch.inference_mode()
    def render(self, clips: list[Planned], n_frames: int) -> Tensor:
        """[B, 600 T] samples of ``clips``, the last token of each filling up ``n_frames`` T."""
        rows, begin = list[np.ndarray](), 0
        for clip in clips:
            filled = clip.frames.copy()
            filled[-1] += n_frames - filled.sum()
            rows.append(begin + np.repeat(np.arange(len(filled)), filled))
            begin += len(filled)
        index = self._sent(torch.from_numpy(np.stack(rows)))
        prosody, text = (torch.cat(parts)[index] for parts in ([c.prosody for c in clips], [c.text for c in clips]))
        return self.model.render(prosody, text, torch.stack([c.style for c in clips]), self.noise)

    @torch.inference_mode()
    def speak(self, clips: list[Planned], n_frames: int) -> Batch:
        """The finished clips, all filled up to ``n_frames`` of 25 ms."""
        jobs = [clip.job for clip in clips]
        speakers = [self.speakers[job["speaker"]] for job in jobs]
        pitch = [float(speaker["pitch"]) for speaker in speakers]
        samples = warp.resampled(self.render(clips, n_frames), pitch)
        colours = [speaker.get("colour") or [0.0, 0.0] for speaker in speakers]
        knots = max(map(len, colours))
        colours = [colour if any(colour) else [0.0] * knots for colour in colours]

        def sent(values: Any) -> Tensor:
            return self._sent(torch.tensor(values))

        formant = [float(speaker.get("formant", 1.0)) for speaker in speakers]
        bend = [float(speaker.get("bend", 0.0)) for speaker in speakers]
        samples = warp.warped(samples, sent(formant), sent(bend), sent(colours))
        lengths = [int(clip.frames.sum() * STEP / p) for clip, p in zip(clips, pitch, strict=True)]
        dice = [random.Random(f"{synthesize.SEED} kokoro {job['text']}") for job in jobs]
        lead = [int(data.RATE_HZ * one.uniform(0.08, 0.16)) for one in dice]
        whole, counts = warp.finished(samples, sent(lengths), sent(lead))
        if self.device.type != "cuda":
            return Batch(jobs, whole, counts, None)
        whole, counts = whole.to("cpu", non_blocking=True), counts.to("cpu", non_blocking=True)
        ready = cast("Any", torch.cuda.Event)()
        ready.record()
        return Batch(jobs, whole, counts, ready)

    def batches(self, jobs: list[synthesize.Job]) -> Iterator[Batch]:
        """All clips, group by group: those of about equally many frames wait for each other until they fill a batch."""
        for start in range(0, len(jobs), _CHUNK):
            chunk = sorted(jobs[start : start + _CHUNK], key=lambda job: len(job["tokens"]))
            while chunk:
                n_tokens = len(chunk[0]["tokens"])
                n = next((i for i, job in enumerate(chunk) if len(job["tokens"]) != n_tokens), len(chunk))
                n = min(n, _PLANNED)
                for clip in self.plan(chunk[:n]):
                    self.waiting.setdefault(filled(int(clip.frames.sum())), []).append(clip)
                chunk = chunk[n:]
            # In any order of lengths: a run that ends early lacks no particular ones.
            for length in random.Random(start).sample(sorted(self.waiting), len(self.waiting)):
                clips = self.waiting[length]
                size = batch_size(self.budget, length)
                while len(clips) >= size or (clips and start + _CHUNK >= len(jobs)):
                    yield self.speak(clips[:size], length)
                    del clips[:size]


def filled(n_frames: int) -> int:
    """The frames to which a clip is filled up: few lengths, for every new one costs a search for algorithms."""
    step = 8 if n_frames <= 128 else 16
    return -(-n_frames // step) * step


def batch_size(budget: int, n_frames: int) -> int:
    """How many clips of ``n_frames`` are rendered together."""
    size = max(1, budget // n_frames)
    return size // 8 * 8 if size > 8 else size


@dataclass(slots=True)
class Written:
    """What a part of a set holds, as :meth:`Part.write` counts it."""

    clips: int = 0
    frames: int = 0
    dropped: int = 0


class Part:
    """One part of a set, written by a thread of its own: samples before the line that names them."""

    def __init__(self, stem: Path) -> None:
        self.stem, self.count = stem, Written()
        self.error: BaseException | None = None
        self.queue: queue.Queue[Batch | None] = queue.Queue(4)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def put(self, batch: Batch | None) -> None:
        """Writes ``batch`` soon; waits while four are waiting, so that the device's memory does not fill."""
        if self.error is not None:
            raise RuntimeError("the set cannot be written") from self.error
        self.queue.put(batch)

    def close(self) -> None:
        """Writes what is waiting."""
        self.put(None)
        self.thread.join()
        if self.error is not None:
            raise RuntimeError("the set cannot be written") from self.error

    def _run(self) -> None:
        try:
            with self.stem.with_suffix(".s16").open("ab") as audio, self.stem.with_suffix(".jsonl").open("a") as lines:
                offset = audio.tell() // 2
                while (batch := self.queue.get()) is not None:
                    offset = self._write(batch, offset, audio, lines)
        except BaseException as error:
            self.error = error
            while self.queue.get() is not None:
                pass

    def _write(self, batch: Batch, offset: int, audio: Any, lines: Any) -> int:
        if batch.ready is not None:
            batch.ready.synchronize()
        rows, samples = list[str](), batch.samples.numpy()
        for job, clip, n_frames in zip(batch.jobs, samples, batch.n_frames.tolist(), strict=True):
            if not n_frames:
                self.count.dropped += 1
                continue
            audio.write(clip[: n_frames * recipe.SAMPLES_PER_FRAME].astype("<i2", copy=False).tobytes())
            row = {"text": job["text"], "speaker": job["speaker"], "offset": offset, "n_frames": n_frames}
            rows.append(json.dumps(row) + "\n")
            offset += n_frames * recipe.SAMPLES_PER_FRAME
            self.count.clips += 1
            self.count.frames += n_frames
        audio.flush()
        lines.write("".join(rows))
        lines.flush()
        return offset


def spoken(out: Path, own: Path) -> set[int]:
    """The texts in the set ``out``; what a killed run left of half a clip is cut off part ``own``, of no other."""
    found: set[int] = set()
    if own.with_suffix(".jsonl").exists():
        found.update(synthesize.spoken_texts(own.with_suffix(".jsonl")))
    for index in out.glob("part-*.jsonl"):
        if index.stem != own.stem:
            # Another process may be writing there: its last line may be half a line.
            whole = index.read_text("utf-8", errors="replace").rpartition("\n")[0]
            found.update(int(json.loads(line)["text"]) for line in whole.splitlines())
    return found


def speak_share(
    jobs_file: Path,
    weights: list[Path],
    styles: Path,
    out: Path,
    share: tuple[int, int],
    seconds: float,
    device: torch.device,
    hours: float = math.inf,
    noise: float = 1.0,
) -> Written:
    """Speaks every n-th job from the i-th on, ``share`` (i, n), for ``seconds`` in all or until there are ``hours``."""
    started = told = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    number, n_shares = share
    speakers, jobs = synthesize.read_jobs(jobs_file)
    stem = out / f"part-{number:03d}"
    known = spoken(out, stem)
    jobs = [job for job in jobs[number::n_shares] if job["text"] not in known]
    with np.load(styles) as file:
        voices = {name: file[name].astype(np.float32) for name in file.files}
    torch.manual_seed(synthesize.SEED + number)
    speaker = Speaker(load(weights), voices, speakers, device, noise=noise)
    loaded = time.monotonic()
    after = f"loaded after {loaded - started:.0f} s"
    print(f"kokoro {number}: {len(jobs)} jobs, {len(known)} there already; {after}", flush=True)
    part = Part(stem)

    def tell(end: str) -> None:
        done, now = part.count, time.monotonic()
        speech = done.frames * recipe.SAMPLES_PER_FRAME / data.RATE_HZ
        print(
            f"kokoro {number}: {now - started:.0f} s, {done.clips} of {len(jobs)} clips, {done.dropped} dropped,"
            f" {speech / 3600:.2f} h of speech, {speech / max(1e-3, now - loaded):.1f} x real time{end}",
            flush=True,
        )

    for batch in speaker.batches(jobs):
        part.put(batch)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            tell("")
        spoken_s = part.count.frames * recipe.SAMPLES_PER_FRAME / data.RATE_HZ
        if time.monotonic() - started > seconds or spoken_s >= 3600 * hours:
            break
    part.close()
    tell(", ended")
    return part.count


def main() -> None:
    """Convert, pack, or speak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="the weights of the published ONNX file under our names")
    convert.add_argument("onnx", type=Path)
    convert.add_argument("out", type=Path)
    packs = commands.add_parser("pack", help="weights small enough to travel")
    packs.add_argument("weights", type=Path)
    packs.add_argument("files", type=Path, nargs="+")
    speak = commands.add_parser("speak", help="make a part of a set")
    speak.add_argument("--jobs", type=Path, required=True)
    speak.add_argument("--weights", type=Path, nargs="+", required=True)
    speak.add_argument("--styles", type=Path, required=True)
    speak.add_argument("--out", type=Path, required=True)
    speak.add_argument("--share", default="0/1", help="i/n: every n-th job from the i-th on")
    speak.add_argument("--seconds", type=float, required=True, help="loading included")
    speak.add_argument("--hours", type=float, default=math.inf, help="of speech, then it ends")
    speak.add_argument("--device", type=torch.device, default="cuda:0" if torch.cuda.is_available() else "cpu")
    speak.add_argument("--noise", type=float, default=1.0, help="of the source: 1 as trained, 0 as in the ONNX file")
    args = parser.parse_args()
    if args.command == "convert":
        save_file(from_onnx(args.onnx), args.out)
    elif args.command == "pack":
        pack(load_file(args.weights), args.files)
        print(*(f"{file} {file.stat().st_size}" for file in args.files), sep="\n")
    else:
        number, n_shares = map(int, args.share.split("/"))
        share = (number, n_shares)
        device = torch.device(args.device)
        speak_share(args.jobs, args.weights, args.styles, args.out, share, args.seconds, device, args.hours, args.noise)


if __name__ == "__main__":
    main()

"""Which clips the small voice learns from: lists chosen by seed, named by their SHA-256, and the audio behind them.

The corpus (its README says what it is) holds every sentence in one voice only. What stays the same when another voice
says a sentence can only be learnt from several voices that say it, so `cross.py` speaks some of them in four voices.
The splits unseen-text and unseen-voice are never touched here.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

SEED = 1729
VOICES = ("af_heart", "am_michael", "bf_emma", "bm_george")
"""Two American and two British voices, two female and two male."""

RATE_HZ = 24_000
_PLAIN = re.compile(r"[A-Z][a-z' ,A-Z]+[.!?]")


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording: ``file`` is relative to the data folder, ``seconds`` its length."""

    file: str
    text: str
    voice: str
    seconds: float


def read_manifest(folder: Path) -> list[Clip]:
    """The corpus clips that may be trained on, in the order of the manifest in ``folder``."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]
    return [Clip(r["file"], r["text"], r["voice"], r["seconds"]) for r in rows if r["split"] == "train"]


def choose_sentences(clips: list[Clip]) -> list[Clip]:
    """The corpus clips whose sentences the voice learns, in learning order: short, plain, in one of VOICES."""
    chosen = [
        c
        for c in clips
        if c.voice in VOICES and 1.2 <= c.seconds <= 3.2 and 18 <= len(c.text) <= 64 and _PLAIN.fullmatch(c.text)
    ]
    random.Random(SEED).shuffle(chosen)
    return chosen


def crossed_file(clip: Clip, voice: str) -> str:
    """Where the sentence of ``clip`` lies spoken by ``voice``: the corpus clip itself, or a synthesized one."""
    if voice == clip.voice:
        return clip.file
    number = Path(clip.file).name.split("_")[0]
    return f"crossed/{number}_{voice}.ogg"


def crossed_clips(folder: Path, n_sentences: int) -> list[Clip]:
    """The first ``n_sentences`` chosen sentences in every voice, up to the first that is not yet spoken in all."""
    found: list[Clip] = []
    for clip in choose_sentences(read_manifest(folder))[:n_sentences]:
        files = {voice: crossed_file(clip, voice) for voice in VOICES}
        if not all((folder / file).exists() for file in files.values()):
            break
        for voice, file in files.items():
            found.append(Clip(file, clip.text, voice, soundfile.info(folder / file).duration))
    return found


def list_sha256(clips: list[Clip]) -> str:
    """The SHA-256 of a list of clips: their files, voices and texts, one a line."""
    lines = "".join(f"{c.file}\t{c.voice}\t{c.text}\n" for c in clips)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_clips(folder: Path, clips: list[Clip]) -> list[np.ndarray]:
    """The samples of every clip, float32 [N] at 24 kHz mono. Raises ValueError for another rate."""

    def read(clip: Clip) -> np.ndarray:
        samples, rate_hz = soundfile.read(folder / clip.file, dtype="float32")
        if rate_hz != RATE_HZ or samples.ndim != 1:
            raise ValueError(f"{clip.file}: {rate_hz} Hz, {samples.ndim} dimensions; 24 kHz mono was expected")
        return np.asarray(samples, dtype=np.float32)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, clips))

"""The corpus: which of its clips may be trained on, and the one rate of all training speech.

The splits unseen-text and unseen-voice are never touched here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

VOICES = ("af_heart", "am_michael", "bf_emma", "bm_george")
"""Two American and two British voices, two female and two male."""

RATE_HZ = 24_000


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

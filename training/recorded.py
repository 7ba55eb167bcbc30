"""The corpus clips as a set beside the synthesized ones, so that the talker learns from them too.

    python -m training.recorded --data FOLDER --texts .data/texts.jsonl --jobs jobs-kokoro.xz --out SET

FOLDER is what `training.phonetic distil` wrote. Clips whose sentence is not among the texts are left out. A voice of it
is the speaker of the synthesized set that is this voice alone: one voice under two names could not be told apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from training import data, phonetic, recipe
from training.synthesize import read_jobs

_QUIET = 0.01
"""Of a clip's peak: what is fainter before and after the speech is cut away, but for a little."""


def trimmed(samples: np.ndarray) -> np.ndarray:
    """Speech [N] with 0.1 s of silence before and 0.2 s behind, where there is as much, in whole frames."""
    loud = (np.abs(samples) > _QUIET * np.abs(samples).max()).nonzero()[0]
    start, end = max(0, loud[0] - data.RATE_HZ // 10), loud[-1] + data.RATE_HZ // 5
    kept = samples[start:end]
    return np.pad(kept, (0, -len(kept) % recipe.SAMPLES_PER_FRAME))


def main() -> None:
    """Writes the set as one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--jobs", type=Path, required=True, help="names the synthesized speakers")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = (json.loads(line) for line in args.texts.read_text("utf-8").splitlines())
    number = {row["text"]: row["id"] for row in rows}
    speakers = read_jobs(args.jobs)[1]
    alone = {next(iter(s["weights"])): name for name, s in speakers.items() if len(s["weights"]) == 1}
    clips = [c for c in phonetic.read(args.data, "train").clips if c.text in number and c.voice in alone]
    args.out.mkdir(parents=True, exist_ok=True)
    offset, lines = 0, []
    with (args.out / "part-000.s16").open("wb") as sink:
        for clip, samples in zip(clips, data.read_clips(args.data, clips), strict=True):
            whole = (trimmed(samples) * 32767.0).clip(-32768, 32767).astype("<i2")
            sink.write(whole.tobytes())
            n_frames = len(whole) // recipe.SAMPLES_PER_FRAME
            line = {"text": number[clip.text], "speaker": alone[clip.voice], "offset": offset, "n_frames": n_frames}
            lines.append(json.dumps(line) + "\n")
            offset += len(whole)
    (args.out / "part-000.jsonl").write_text("".join(lines), "utf-8")
    print(f"{len(lines)} clips, {offset / data.RATE_HZ / 60:.1f} min, list {data.list_sha256(clips)}", flush=True)


if __name__ == "__main__":
    main()

"""Let a checkpoint say sentences it knows, and write what an outside judge needs: rows of wav, text and reference.

    python -m training.judge --model src/quaver/voices/tiny --references src/quaver/voices/references --out judged -n 40

then `python JUDGE rows.jsonl` with a speech recogniser of your choice. Sentences and voices are drawn by seed; every
utterance is sampled with the model's own defaults.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch

from quaver import TTS, Engine, Utterance, audio


def main() -> None:
    """Speaks and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, help="sentences.jsonl, by default the model's")
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--language", default="english")
    parser.add_argument("--layout", choices=("stream", "whole"), default="stream")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = (args.sentences or args.model / "sentences.jsonl").read_text("utf-8").splitlines()
    known = [json.loads(line) for line in lines]
    random.Random(args.seed).shuffle(known)
    tts = TTS.load(args.model)
    engine = Engine(tts)
    paths = {p.stem: p for p in args.references.glob("*.ogg")}
    voices = {name: tts.enroll(audio.read(path), name=name) for name, path in paths.items()}
    rows, begun, seconds = [], time.monotonic(), 0.0
    for i, row in enumerate(known[: args.n]):
        utterance = Utterance(row["text"], args.language, voices[row["voice"]], seed=args.seed + i, layout=args.layout)
        speech = engine.say(utterance)
        path = args.out / f"{i:03}_{row['voice']}.wav"
        audio.write(path, speech.audio)
        seconds += speech.audio.seconds
        rows.append({"wav": str(path), "text": row["text"], "reference": str(paths[row["voice"]])})
    (args.out / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    spent = time.monotonic() - begun
    print(f"{len(rows)} utterances, {seconds:.1f} s of speech in {spent:.1f} s: {seconds / spent:.2f} x real time")


if __name__ == "__main__":
    main()

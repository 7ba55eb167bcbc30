"""Tells where speech is lost: clips with their true codes in the first codebooks and the model's own in the others.

    python bench/oracle.py MODEL [--given 16 8 4 1] [--temperature 0.1] [-n 20] [--codec-only] [--judges FOLDER]

Of each clip of bench/voice the history is true, as in training; codebooks from ``--given`` on are the code predictor's.
What is lost with 16 given the codec lost, what is lost with 1 given but not with 16 the predictor lost. With
--codec-only they are left out instead: what each codebook is worth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quaver import audio as audio_files
from quaver import judge
from quaver.audio import Audio
from quaver.cli import Progress
from quaver.model.encoders import load_codec_encoder
from quaver.model.tts import TTS, Logits, Utterance
from quaver.sampling import Sampling, distribution, draw
from voice import KIT, Judges, decode


def with_own(tts: TTS, found: Logits, codes: Tensor, given: int, sampling: Sampling, seed: int = 1729) -> Tensor:
    """``codes`` [T, Q] with those from codebook ``given`` on drawn from the predictor after the true history."""
    mixed, generator = codes.clone(), torch.Generator().manual_seed(seed)
    predictor, talker = tts.talker.code_predictor, tts.talker
    first = talker.embed_codec(codes[:, 0])
    for book in range(max(1, given), codes.shape[1]):
        logits = predictor.force(found.hidden[: len(codes)], first, mixed[:, 1:])[:, book - 1]
        mixed[:, book] = draw(*distribution(logits, sampling), torch.rand(len(codes), generator=generator))
    return mixed


def without_last(tts: TTS, codes: Tensor, given: int) -> Audio:
    """The sound of the first ``given`` codebooks of ``codes`` [T, Q] alone."""
    quantizer = tts.decoder.quantizer
    latents = quantizer.rvq_first.decode(codes[None, :, :1].transpose(1, 2))
    vectors = [book(row) for book, row in zip(quantizer.rvq_rest.vq.codebooks, codes.T[1:given], strict=False)]
    if vectors:
        latents = latents + quantizer.rvq_rest.output_proj(torch.stack(vectors).sum(0).T[None])
    samples = tts.decoder.from_latents(latents)[0].numpy()
    return Audio(samples, tts.checkpoint.codec_config.output_sample_rate)


def log_mel(sound: Audio) -> np.ndarray:
    """80 log-mel energies [frames, 80] every 10 ms, up to 8 kHz; what 16 bits cannot hold counts as silence."""
    return judge.log_mels(audio_files.resample(sound, judge.RATE_HZ).samples).clip(min=0.0)


def main() -> int:
    """Judges, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--given", type=int, nargs="+", default=[16, 8, 4, 2, 1], help="how many codebooks are true")
    parser.add_argument("--temperature", type=float, default=0.1, help="of the predicted codes")
    parser.add_argument("-n", type=int, default=20, help="clips, half of them in voices never trained on")
    parser.add_argument("--codec-only", action="store_true", help="leave the other codebooks out")
    parser.add_argument("--judges", type=Path, default=os.environ.get("QUAVER_JUDGES"), help="default: QUAVER_JUDGES")
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    tts, judges, progress = TTS.load(asked.model), Judges.open(asked.judges), Progress()
    rate_hz = tts.checkpoint.codec_config.output_sample_rate
    rows = [json.loads(line) for line in (KIT / "clips.jsonl").read_text("utf-8").splitlines()]
    seen, new = ([r for r in rows if (r["group"] == "seen") == known][: asked.n // 2] for known in (True, False))
    table: dict[int, list[tuple[float, float, float]]] = {given: [] for given in asked.given}
    sampling = Sampling(asked.temperature, 50, 1.0, 1.0)
    for index, row in enumerate([*seen, *new]):
        clip = audio_files.resample(audio_files.read(KIT / row["file"]), rate_hz)
        voice, real = judges.voices.embed(clip), log_mel(clip)
        with torch.inference_mode():
            codes = load_codec_encoder(tts.checkpoint).encode(torch.from_numpy(clip.samples)[None])[0].T
            prompt = tts.prompt(Utterance(row["text"], "english", tts.voice(KIT / row["file"])))
            (found,) = tts.force([prompt], [codes])
            for given, figures in table.items():
                if asked.codec_only:
                    made = without_last(tts, codes, given)
                else:
                    made = decode(tts, with_own(tts, found, codes, given, sampling))
                drawn = log_mel(made)
                n = min(len(real), len(drawn))
                away = float(np.abs(drawn[:n] - real[:n]).mean())
                missed = judge.cer(judges.whisper.hear(made), row["text"])
                figures.append((missed, float(judges.voices.embed(made) @ voice), away))
        progress("clips", index + 1, len(seen) + len(new))
    print("given | CER | similarity | log-mel distance")
    means = {given: np.mean(figures, axis=0) for given, figures in table.items()}
    for given, (missed, alike, away) in means.items():
        print(f"{given:5d} | {missed:.3f} | {alike:.3f} | {away:.3f}")
    if asked.json:
        found_means = {str(given): [round(float(x), 4) for x in mean] for given, mean in means.items()}
        asked.json.write_text(json.dumps(found_means, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

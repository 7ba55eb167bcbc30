"""Who speaks the training sentences, and which: speakers and jobs for `training.kokoro`.

    python -m training.synthesize --data .data --voices VOICE_FOLDER --round 0
    python -m training.synthesize --data .data --voices VOICE_FOLDER --round 1

Needs kokoro-onnx, for its phonemes, and the voices of the npm package kokoro-js. Every sentence of DATA/texts.jsonl
is spoken once a round. Round 0 has Kokoro's own English voices and a thousand mixtures of two or three of them, every
other round a thousand mixtures more. Half of the mixtures leave the convex hull of the voices, led away from one of
them by a negative share: they are as clear as the others and differ more. Half are resampled, which moves pitch and
formants together; two thirds have formants moved by themselves, half of them bent, half of them coloured (`warp.py`).
The engine speaks so much slower or faster that the tempo stays natural.

Writes DATA/carry/jobs-ROUND.xz and styles.npz. A set, what becomes of jobs, is a folder of `part-NNN.jsonl` and
`part-NNN.s16`: 24 kHz mono int16, and for each clip a line {"text", "speaker", "offset": first sample, "n_frames":
whole frames of 1920 samples}. Samples are written before their line, so a killed run leaves at worst samples that no
line names.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from training import recipe

SEED = 1729
UNHEARD = ("af_river", "am_puck", "bf_lily", "bm_lewis")
"""Voices kept for the test of unseen speakers: they speak nothing here, nor are they mixed in."""
WHISPERED = "af_nicole"
"""Speaks for itself, but a mixture with a whisper is hoarse."""
MIXTURES = 1000
PLAIN_TURNS = 6
"""How often a voice alone speaks while every mixture speaks once."""
HEAVIEST = 0.72
"""The largest part that one voice has in a mixture: with more it sounds like that voice."""
AWAY = (0.15, 0.45)
"""How far a speaker outside the hull is led away from a voice: the size of the negative share."""
PITCHES = (0.82, 1.2)
"""Least and greatest pitch of a resampled mixture, drawn evenly on a logarithmic scale."""
FORMANTS = (0.86, 1.16)
COLOURS, COLOUR_DB, COLOUR_MOST_DB = 6, 3.0, 7.0
TOKENS = (14, 130)
"""Fewest and most phoneme tokens of a sentence: about 1 to 8 seconds."""

Job = dict[str, Any]
"""One clip to be made: text (id), speaker (name), tokens, and tempo (1 is natural)."""


def mix(voices: list[str], dice: random.Random) -> dict[str, float]:
    """Positive shares of two or three voices."""
    chosen = dice.sample(voices, dice.choice((2, 2, 3)))
    while True:
        drawn = [dice.gammavariate(2.0, 1.0) for _ in chosen]
        shares = [share / sum(drawn) for share in drawn]
        if max(shares) <= HEAVIEST:
            return dict(zip(chosen, shares, strict=True))


def lead_away(voices: list[str], dice: random.Random) -> dict[str, float]:
    """Shares outside the hull: a voice, or a mixture of two, led away from another, whose share is negative."""
    away = dice.uniform(*AWAY)
    first, second, shunned = dice.sample(voices, 3)
    if dice.random() < 1 / 3:
        return {first: 1 + away, shunned: -away}
    part = dice.uniform(1 - HEAVIEST, HEAVIEST)
    return {first: (1 + away) * part, second: (1 + away) * (1 - part), shunned: -away}


def kokoro_speakers(voices: list[str], number: int = 0) -> dict[str, dict[str, Any]]:
    """The speakers of round ``number``: name -> {"weights": {voice: share}, "pitch": resample factor, "formant",
    "bend", "colour"}, each voice alone first in round 0, then the mixtures.

    Every other mixture has a negative share; every other pair of mixtures is resampled. Formants end where "formant"
    puts them, whatever the pitch: it is divided by that.
    """
    dice = random.Random(SEED + number)
    mixable = [voice for voice in voices if voice != WHISPERED]
    plain = {"pitch": 1.0, "formant": 1.0, "bend": 0.0, "colour": [0.0] * COLOURS}
    speakers = [{"weights": {voice: 1.0}, **plain} for voice in (() if number else voices)]
    pitches, formants = (tuple(map(math.log, limits)) for limits in (PITCHES, FORMANTS))
    for i in range(MIXTURES):
        shares = lead_away(mixable, dice) if i % 2 else mix(mixable, dice)
        pitch = math.exp(dice.uniform(*pitches)) if i // 2 % 2 else 1.0
        formant = math.exp(dice.uniform(*formants)) if i // 4 % 3 < 2 else 1.0
        bend = dice.uniform(-1.0, 1.0) if i // 12 % 2 else 0.0
        colour = [max(-COLOUR_MOST_DB, min(COLOUR_MOST_DB, dice.gauss(0.0, COLOUR_DB))) for _ in range(COLOURS)]
        speaker = {
            "weights": {voice: round(share, 3) for voice, share in shares.items()},
            "pitch": round(pitch, 3),
            "formant": round(formant / pitch, 3),
            "bend": round(bend, 3),
            "colour": [round(db, 3) for db in colour] if i // 24 % 2 else plain["colour"],
        }
        speakers.append(speaker)
    return {f"k{10_000 * number + i:05d}": speaker for i, speaker in enumerate(speakers)}


def is_british(speaker: dict[str, Any]) -> bool:
    """Whether more than half of a Kokoro speaker is British; a negative share takes away."""
    weights: dict[str, float] = speaker["weights"]
    return sum(share for voice, share in weights.items() if voice.startswith("b")) > 0.5


def in_turn(names: list[str], dice: random.Random) -> Iterator[str]:
    """The names for ever, each once a round, every round in a new order: any prefix covers them evenly."""
    while True:
        yield from dice.sample(names, len(names))


def make_jobs(
    texts: list[dict[str, Any]],
    speakers: dict[str, dict[str, Any]],
    tokenize: Callable[[str, dict[str, Any]], list[int]],
    number: int = 0,
) -> list[Job]:
    """A job for each of ``texts``, in their order, sentences of unfit length left out; round ``number``."""
    names = [name for name, s in speakers.items() for _ in range(PLAIN_TURNS if len(s["weights"]) == 1 else 1)]
    turn = in_turn(names, random.Random(f"{SEED} {number}"))
    jobs: list[Job] = []
    name = next(turn)
    for text in texts:
        tokens = tokenize(text["text"], speakers[name])
        if TOKENS[0] <= len(tokens) <= TOKENS[1]:
            jobs.append({"text": text["id"], "speaker": name, "tokens": tokens, "tempo": 1.0})
            name = next(turn)
    return jobs


def write_jobs(file: Path, speakers: dict[str, dict[str, Any]], jobs: list[Job]) -> None:
    """Write a jobs file: a line that names the speakers, then one job a line, compressed."""
    with lzma.open(file, "wt", encoding="utf-8") as sink:
        for row in ({"speakers": speakers}, *jobs):
            sink.write(json.dumps(row, separators=(",", ":")) + "\n")


def read_jobs(file: Path) -> tuple[dict[str, dict[str, Any]], list[Job]]:
    """The speakers and the jobs of ``file``."""
    with lzma.open(file, "rt", encoding="utf-8") as source:
        head, *jobs = (json.loads(line) for line in source)
    return head["speakers"], jobs


def write_styles(voices: dict[str, np.ndarray], file: Path) -> None:
    """Keep what the longest job needs of Kokoro's voices, float16 [tokens, 256] each."""
    rows = {name: style[: TOKENS[1] + 1].astype(np.float16) for name, style in voices.items()}
    with file.open("wb") as sink:
        np.savez_compressed(sink, allow_pickle=False, **rows)


def kokoro_tokenizer() -> Callable[[str, dict[str, Any]], list[int]]:
    """From a sentence and the speaker who will say it to Kokoro's token ids."""
    from kokoro_onnx.tokenizer import Tokenizer

    tokenizer = Tokenizer()

    def tokenize(text: str, speaker: dict[str, Any]) -> list[int]:
        phonemes = tokenizer.phonemize(text, "en-gb" if is_british(speaker) else "en-us")
        return cast("list[int]", tokenizer.tokenize(" ".join(phonemes.split()), None))

    return tokenize


def spoken_texts(index: Path) -> list[int]:
    """The texts of the whole clips of one part; what a killed worker left of another is cut off its two files."""
    audio = index.with_suffix(".s16")
    size, end, texts = audio.stat().st_size, 0, list[int]()
    whole = list[str]()
    for line in index.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            after = 2 * (row["offset"] + recipe.SAMPLES_PER_FRAME * row["n_frames"])
        except (ValueError, KeyError, TypeError):
            break
        if after > size:
            break
        whole.append(line + "\n")
        texts.append(row["text"])
        end = after
    os.truncate(audio, end)
    beside = index.with_name(index.name + ".part")
    beside.write_text("".join(whole), "utf-8")
    beside.replace(index)
    return texts


def main() -> None:
    """Makes the jobs of one round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds texts.jsonl; carry/jobs-ROUND.xz is written")
    parser.add_argument("--voices", type=Path, required=True, help="folder of Kokoro voices")
    parser.add_argument("--round", type=int, default=0)
    args = parser.parse_args()
    texts = [json.loads(line) for line in (args.data / "texts.jsonl").read_text("utf-8").splitlines()]
    files = sorted(f for f in args.voices.glob("[ab][fm]_*.bin") if f.stem not in UNHEARD)
    styles = {f.stem: np.fromfile(f, np.float32).reshape(-1, 256) for f in files}
    (args.data / "carry").mkdir(exist_ok=True)
    write_styles(styles, args.data / "carry" / "styles.npz")
    speakers = kokoro_speakers(list(styles), args.round)
    made = make_jobs(texts, speakers, kokoro_tokenizer(), args.round)
    file = args.data / "carry" / f"jobs-{args.round}.xz"
    write_jobs(file, speakers, made)
    print(f"{len(made)} of {len(texts)} texts by {len(speakers)} speakers, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()

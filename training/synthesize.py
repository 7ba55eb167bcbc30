"""Speech for the training sentences: two engines, a thousand speakers.

    python -m training.synthesize jobs kokoro --data .data --voices VOICE_FOLDER --clips 16000
    python -m training.synthesize jobs piper --data .data --voices VOICE.onnx.json --clips 20000 --first 10000
    python -m training.synthesize speak --jobs .data/carry/jobs-kokoro.xz --out SET --workers 24 --seconds 480

`jobs` needs kokoro-onnx and the voice files of the npm package kokoro-js, or piper-tts and the configuration file of a
Piper voice: it turns sentences into token ids and gives each a speaker. `speak` needs onnx, onnxruntime and NumPy alone
and runs wherever there are cores. Engines: Kokoro-82M (Apache-2.0) and Piper's en_US-joe-medium (CC0 data), both packed
by `packing.py` beside the jobs file as kokoro-a.bin, kokoro-b.bin and piper.bin, with Kokoro's voices as styles.npz.

Kokoro's speakers are its own English voices and mixtures of two or three. Half of the mixtures leave the convex hull of
the voices, led away from one of them by a negative share: they are as clear as the others and differ more. Half are
resampled, which moves pitch and formants together. Piper's one voice becomes many by resampling alone. The engine
speaks so much slower or faster that the tempo stays natural.

A set is a folder of `part-NNN.jsonl` and `part-NNN.s16`, one pair a worker: 24 kHz mono int16, and for each clip a line
{"text", "speaker", "offset": first sample, "n_frames": whole frames of 1920 samples}. Samples are written before their
line, so a killed worker leaves at worst samples that no line names; `speak` into the same set says what is missing.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

SEED = 1729
RATE_HZ = 24_000
FRAME = 1920
"""Samples a frame, as the codec cuts them (80 ms)."""
PIPER_RATE_HZ = 22_050
UNHEARD = ("af_river", "am_puck", "bf_lily", "bm_lewis")
"""Voices kept for the test of unseen speakers: they speak nothing here, nor are they mixed in."""
WHISPERED = "af_nicole"
"""Speaks for itself, but a mixture with a whisper is hoarse."""
MIXTURES = 1000
HEAVIEST = 0.72
"""The largest part that one voice has in a mixture: with more it sounds like that voice."""
AWAY = (0.15, 0.45)
"""How far a speaker outside the hull is led away from a voice: the size of the negative share."""
PITCHES = (0.82, 1.2)
"""Least and greatest pitch of a resampled mixture, drawn evenly on a logarithmic scale."""
PIPER_SPEAKERS = 32
TOKENS = (14, 96)
"""Fewest and most phoneme tokens of a sentence: about 1 to 6 seconds."""

Job = dict[str, Any]
"""One clip to be made: text (id), speaker (name), tokens, tempo (1 is natural) and, for Piper, noise."""


# Speakers and jobs


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


def kokoro_speakers(voices: list[str]) -> dict[str, dict[str, Any]]:
    """Speaker name -> {"weights": {voice: share}, "pitch": resample factor}: each voice alone, then the mixtures.

    Every other mixture has a negative share; every other pair of mixtures is resampled.
    """
    dice = random.Random(SEED)
    speakers: list[dict[str, Any]] = [{"weights": {voice: 1.0}, "pitch": 1.0} for voice in voices]
    mixable = [voice for voice in voices if voice != WHISPERED]
    low, high = (math.log(pitch) for pitch in PITCHES)
    for i in range(MIXTURES):
        shares = lead_away(mixable, dice) if i % 2 else mix(mixable, dice)
        pitch = math.exp(dice.uniform(low, high)) if i // 2 % 2 else 1.0
        weights = {voice: round(share, 3) for voice, share in shares.items()}
        speakers.append({"weights": weights, "pitch": round(pitch, 3)})
    return {f"k{i:04d}": speaker for i, speaker in enumerate(speakers)}


def piper_speakers() -> dict[str, dict[str, Any]]:
    """Speaker name -> {"pitch": resample factor}, evenly spread in pitch from 0.80 to 1.25."""
    steps = np.geomspace(0.80, 1.25, PIPER_SPEAKERS)
    return {f"p{i:02d}": {"pitch": round(float(step), 3)} for i, step in enumerate(steps)}


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
    n_clips: int,
    engine: str,
) -> list[Job]:
    """At most ``n_clips`` jobs in the order of ``texts``, sentences of unfit length left out."""
    dice = random.Random(f"{SEED} {engine}")
    turn = in_turn(list(speakers), dice)
    jobs: list[Job] = []
    name = next(turn)
    for text in texts:
        tokens = tokenize(text["text"], speakers[name])
        if not TOKENS[0] <= len(tokens) <= TOKENS[1]:
            continue
        job: Job = {"text": text["id"], "speaker": name, "tokens": tokens, "tempo": round(dice.uniform(0.92, 1.08), 3)}
        if engine == "piper":
            job["noise"] = round(dice.uniform(0.5, 0.75), 2)
        jobs.append(job)
        name = next(turn)
        if len(jobs) == n_clips:
            break
    return jobs


def write_jobs(file: Path, engine: str, speakers: dict[str, dict[str, Any]], jobs: list[Job]) -> None:
    """Write a jobs file: a line that names the engine and its speakers, then one job a line, compressed."""
    with lzma.open(file, "wt", encoding="utf-8") as sink:
        for row in ({"engine": engine, "speakers": speakers}, *jobs):
            sink.write(json.dumps(row, separators=(",", ":")) + "\n")


def read_jobs(file: Path) -> tuple[str, dict[str, dict[str, Any]], list[Job]]:
    """The engine, its speakers and the jobs of ``file``."""
    with lzma.open(file, "rt", encoding="utf-8") as source:
        head, *jobs = (json.loads(line) for line in source)
    return head["engine"], head["speakers"], jobs


def write_styles(voices: dict[str, np.ndarray], file: Path) -> None:
    """Keep what the longest job needs of Kokoro's voices, float16 [tokens, 256] each."""
    rows = {name: style[: TOKENS[1] + 1].astype(np.float16) for name, style in voices.items()}
    with file.open("wb") as sink:
        np.savez_compressed(sink, allow_pickle=False, **rows)


def kokoro_tokenizer() -> Callable[[str, dict[str, Any]], list[int]]:
    """From a sentence and the speaker who will say it to Kokoro's token ids."""
    from kokoro_onnx.tokenizer import Tokenizer  # type: ignore[import-not-found]

    tokenizer = Tokenizer()

    def tokenize(text: str, speaker: dict[str, Any]) -> list[int]:
        phonemes = tokenizer.phonemize(text, "en-gb" if is_british(speaker) else "en-us")
        return cast("list[int]", tokenizer.tokenize(" ".join(phonemes.split()), None))

    return tokenize


def piper_tokenizer(configuration: Path) -> Callable[[str, dict[str, Any]], list[int]]:
    """From a sentence to Piper's token ids, without the padding between them."""
    from piper.phonemize_espeak import EspeakPhonemizer  # type: ignore[import-not-found]

    phonemizer = EspeakPhonemizer()
    settings = json.loads(configuration.read_text("utf-8"))
    ids = settings["phoneme_id_map"]

    def tokenize(text: str, _speaker: dict[str, Any]) -> list[int]:
        sentences = phonemizer.phonemize(settings["espeak"]["voice"], text)
        joined = [*sentences[0], *(p for more in sentences[1:] for p in (" ", *more))]
        return [number for phoneme in joined for number in ids.get(phoneme, ())]

    return tokenize


# Engines


Engine = Callable[[Job], np.ndarray]
"""Speaks one job: float32 samples at 24 kHz."""


def open_session(model: Path) -> Any:
    """An ONNX Runtime session on one core."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def open_kokoro(model: Path, styles: Path, speakers: dict[str, dict[str, Any]]) -> Engine:
    """Kokoro-82M with the voices of ``styles``."""
    session = open_session(model)
    with np.load(styles) as file:
        voices = {name: file[name].astype(np.float32) for name in file.files}

    def speak(job: Job) -> np.ndarray:
        speaker, tokens = speakers[job["speaker"]], job["tokens"]
        # Kokoro has one style vector for every length of sentence.
        style = sum(share * voices[name][len(tokens) - 1] for name, share in speaker["weights"].items())
        feed = {
            "input_ids": np.array([[0, *tokens, 0]], np.int64),
            "style": np.asarray(style, np.float32)[None],
            "speed": np.array([job["tempo"] / speaker["pitch"]], np.float32),
        }
        return resample(session.run(None, feed)[0].ravel(), 1 / speaker["pitch"])

    return speak


def open_piper(model: Path, speakers: dict[str, dict[str, Any]]) -> Engine:
    """A Piper voice: begin, pad, token, pad, ..., end."""
    session = open_session(model)

    def speak(job: Job) -> np.ndarray:
        pitch = speakers[job["speaker"]]["pitch"]
        ids = [1, 0, *(number for token in job["tokens"] for number in (token, 0)), 2]
        feed = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array([job["noise"], pitch / job["tempo"], 0.8], np.float32),
        }
        return resample(session.run(None, feed)[0].ravel(), RATE_HZ / (PIPER_RATE_HZ * pitch))

    return speak


def resample(samples: np.ndarray, factor: float) -> np.ndarray:
    """``factor`` times as many samples of the same band-limited signal, float32 (through the Fourier transform)."""
    if factor == 1:
        return samples.astype(np.float32)
    n_from = math.ceil(len(samples) / 240) * 240  # a round number, for a fast transform; both ends are silent
    n_to = round(n_from * factor)
    spectrum = np.fft.rfft(samples, n_from)
    n_bins = min(len(spectrum), n_to // 2 + 1)
    wider = np.zeros(n_to // 2 + 1, spectrum.dtype)
    wider[:n_bins] = spectrum[:n_bins]
    resampled = np.fft.irfft(wider, n_to)[: round(len(samples) * factor)] * factor
    return np.asarray(resampled, np.float32)


def finish(samples: np.ndarray, dice: random.Random) -> np.ndarray:
    """Trimmed (80 to 160 ms before the speech, 160 to 240 ms behind), levelled int16 samples in whole frames.

    Raises ValueError for a clip that is silent or not finite.
    """
    if not np.isfinite(samples).all():
        raise ValueError("samples that are not finite")
    step = RATE_HZ // 100
    power = np.square(samples[: len(samples) // step * step].reshape(-1, step)).mean(1)
    heard = np.flatnonzero(power > max(1e-7, 1e-4 * float(np.quantile(power, 0.95))))
    if len(heard) < 20:
        raise ValueError("silence")
    begin = int(heard[0]) * step - int(RATE_HZ * dice.uniform(0.08, 0.16))
    end = (int(heard[-1]) + 1) * step + int(RATE_HZ * 0.16)
    end += -(end - begin) % FRAME
    clip = np.zeros(end - begin, np.float32)
    first, last = max(0, begin), min(len(samples), end)
    clip[first - begin : last - begin] = samples[first:last]
    # Halfway (in decibels) to one loudness: what is left of the difference is part of the speaker.
    loud = math.sqrt(float(power[power > 0.02 * power.max()].mean()))
    gain = min(math.sqrt(0.09 / loud), 0.95 / float(np.abs(clip).max()))
    return np.asarray(np.rint(clip * (gain * 32767)), np.int16)


# Workers


def spoken_texts(index: Path) -> list[int]:
    """The texts of the whole clips of one part; what a killed worker left of another is cut off its two files."""
    audio = index.with_suffix(".s16")
    size, end, texts = audio.stat().st_size, 0, list[int]()
    whole = list[str]()
    for line in index.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            after = 2 * (row["offset"] + FRAME * row["n_frames"])
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


@dataclass(frozen=True, slots=True)
class Work:
    """What one of ``n_workers`` has to do: every n-th job of those whose text is not ``known``, until ``deadline``."""

    number: int
    n_workers: int
    jobs_file: Path
    model: Path
    out: Path
    deadline: float
    """Wall clock, seconds."""
    known: frozenset[int]


def work(asked: Work, done: Any) -> None:
    """Speaks what is asked to the end of the worker's part, and counts clips and frames in ``done``."""
    os.nice(5)
    number = asked.number
    engine, speakers, jobs = read_jobs(asked.jobs_file)
    jobs = [job for job in jobs if job["text"] not in asked.known]
    styles, model = asked.jobs_file.parent / "styles.npz", asked.model
    speak = open_kokoro(model, styles, speakers) if engine == "kokoro" else open_piper(model, speakers)
    failures, part = 0, asked.out / f"part-{number:03d}"
    with part.with_suffix(".s16").open("ab") as audio, part.with_suffix(".jsonl").open("a") as lines:
        offset = audio.tell() // 2
        for job in jobs[number :: asked.n_workers]:
            if time.time() >= asked.deadline:
                break
            try:
                clip = finish(speak(job), random.Random(f"{SEED} {engine} {job['text']}"))
            except Exception:
                traceback.print_exc()
                failures += 1
                if failures > 20:
                    raise
                continue
            audio.write(clip.astype("<i2").tobytes())
            audio.flush()
            row = {"text": job["text"], "speaker": job["speaker"], "offset": offset, "n_frames": len(clip) // FRAME}
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            offset += len(clip)
            done[2 * number] += 1
            done[2 * number + 1] += len(clip) // FRAME


def speak_all(jobs_file: Path, out: Path, n_workers: int, seconds: float, model: Path | None) -> None:
    """Make a set: unpack the engine, start the workers, tell how far they are, end them in time."""
    started = time.time()
    out.mkdir(parents=True, exist_ok=True)
    carried = jobs_file.parent
    engine, _, jobs = read_jobs(jobs_file)
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            from training import packing

            model = Path(scratch) / f"{engine}.onnx"
            parts = ["kokoro-a.bin", "kokoro-b.bin"] if engine == "kokoro" else ["piper.bin"]
            packing.unpack([carried / part for part in parts], model)
            print(f"{engine}: unpacked after {time.time() - started:.0f} s", flush=True)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = "1"
        spawn = multiprocessing.get_context("spawn")
        done = spawn.Array("q", 2 * n_workers, lock=False)
        deadline = started + seconds
        known = frozenset(text for index in sorted(out.glob("part-*.jsonl")) for text in spoken_texts(index))
        if known:
            print(f"{engine}: {len(known)} clips are there already", flush=True)
        asked = [Work(i, n_workers, jobs_file, model, out, deadline, known) for i in range(n_workers)]
        workers = [spawn.Process(target=work, args=(one, done), daemon=True) for one in asked]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) and time.time() < deadline + 20:
            next(worker for worker in workers if worker.is_alive()).join(timeout=15)
            n_clips, n_frames = sum(done[0::2]), sum(done[1::2])
            print(
                f"{engine}: {time.time() - started:.0f} s, {n_clips} of {len(jobs)} clips,"
                f" {n_frames * FRAME / RATE_HZ / 3600:.2f} h of speech",
                flush=True,
            )
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        print(f"{engine}: ended, exit codes {sorted({str(worker.exitcode) for worker in workers})}", flush=True)


def main() -> None:
    """Make a jobs file, or speak one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    jobs = commands.add_parser("jobs", help="choose sentences and speakers for one engine")
    jobs.add_argument("engine", choices=("kokoro", "piper"))
    jobs.add_argument("--data", type=Path, required=True, help="holds texts.jsonl; carry/jobs-ENGINE.xz is written")
    jobs.add_argument("--voices", type=Path, required=True, help="folder of Kokoro voices, or a Piper configuration")
    jobs.add_argument("--clips", type=int, required=True)
    jobs.add_argument("--first", type=int, default=0, help="the first sentence of the list to use")
    jobs.add_argument("--out", type=Path, help="another name for the jobs file")
    speak = commands.add_parser("speak", help="make a set")
    speak.add_argument("--jobs", type=Path, required=True)
    speak.add_argument("--out", type=Path, required=True)
    speak.add_argument("--workers", type=int, default=1)
    speak.add_argument("--seconds", type=float, required=True, help="unpacking included")
    speak.add_argument("--model", type=Path, help="an ONNX file instead of the packed engine")
    args = parser.parse_args()
    if args.command == "speak":
        speak_all(args.jobs, args.out, args.workers, args.seconds, args.model)
        return
    texts = [json.loads(line) for line in (args.data / "texts.jsonl").read_text("utf-8").splitlines()][args.first :]
    if args.engine == "kokoro":
        files = sorted(f for f in args.voices.glob("[ab][fm]_*.bin") if f.stem not in UNHEARD)
        styles = {f.stem: np.fromfile(f, np.float32).reshape(-1, 256) for f in files}
        write_styles(styles, args.data / "carry" / "styles.npz")
        speakers, tokenize = kokoro_speakers(list(styles)), kokoro_tokenizer()
    else:
        speakers, tokenize = piper_speakers(), piper_tokenizer(args.voices)
    made = make_jobs(texts, speakers, tokenize, args.clips, args.engine)
    file = args.out or args.data / "carry" / f"jobs-{args.engine}.xz"
    write_jobs(file, args.engine, speakers, made)
    print(f"{len(made)} clips by {len(speakers)} speakers, {file.stat().st_size} bytes; last text {made[-1]['text']}")


if __name__ == "__main__":
    main()

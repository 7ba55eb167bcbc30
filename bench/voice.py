"""Judges voice models on the sentences, references and clips of bench/voice: what is heard, whose voice, how long.

    python bench/voice.py MODEL [--int4 MODEL ...] [--codec-too] [--judges FOLDER] [--out FOLDER] [--gate]

Every model says 60 sentences in cloned voices, half of them voices that the shipped model was never trained on; Whisper
and WeSpeaker judge (pip install 'quaver[judge]'). OUT holds results.json, report.html, card.md and every sound;
what is there already and was made in the same way is kept, so that a run can be broken off and repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quaver import audio as audio_files
from quaver import judge
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint
from quaver.cli import DTYPES, Progress
from quaver.config import FRAME_RATE_HZ
from quaver.engine import Engine, Knobs
from quaver.errors import QuaverError, RecipeError
from quaver.files import sha256, write_file
from quaver.model.encoders import load_codec_encoder
from quaver.model.tts import TTS, Utterance
from voice_figures import Decoded, Limits, Reference, Sentence, Spoken, card, report

KIT = Path(__file__).resolve().parent / "voice"


@dataclass(frozen=True, slots=True)
class Judges:
    """Both judges, and which weights they are."""

    whisper: judge.Whisper
    voices: judge.Voices
    sums: dict[str, str]

    @classmethod
    def open(cls, folder: Path | None) -> Judges:
        """The judges in ``folder`` or from the hub. Raises RecipeError or MissingExtra."""
        paths = {"whisper": judge.resolve("whisper", folder), "voices": judge.resolve("voices", folder)}
        threads = torch.get_num_threads()
        sums = {"Whisper base": sha256(paths["whisper"] / "model.bin"), "WeSpeaker ResNet34": sha256(paths["voices"])}
        return cls(judge.Whisper(paths["whisper"], threads), judge.Voices(paths["voices"], threads), sums)


def sentences(kit: Path = KIT) -> list[Sentence]:
    """The sentences of the kit with their references."""
    references = {
        row["name"]: Reference(row["name"], row["group"], kit / row["file"], row["text"], row["same_speaker"])
        for row in _rows(kit / "references.jsonl")
    }
    return [
        Sentence(index, row["text"], references[row["reference"]], row["seconds"])
        for index, row in enumerate(_rows(kit / "sentences.jsonl"))
    ]


def speak(
    tts: TTS, wanted: Sequence[Sentence], out: Path, asked: argparse.Namespace, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Speaks what is not yet in the folder ``out`` and returns, for each sentence, how it was made and how it ended.

    A model's codes depend on sentence, seed and knobs alone, whoever shares the batch (but for float rounding).
    """
    engine = Engine(tts)
    knobs = _knobs(engine.knobs, asked)
    recipe = {
        "model": _fingerprint(tts.checkpoint), "knobs": asdict(replace(knobs, max_frames=0)), "seed": asked.seed,
        "layout": asked.layout, "in_context": asked.in_context, "language": asked.language,
        "computed": f"{asked.device} {asked.dtype}",
    }  # fmt: skip
    keys = {s.index: _key({**recipe, "text": s.text, "reference": sha256(s.reference.path)}) for s in wanted}
    found = {s.index: _kept(out / f"{s.index:02}.json", keys[s.index]) for s in wanted}
    # Of like length, so that no row waits long for another; the limit leaves room to see that speech ran away.
    todo = sorted((s for s in wanted if found[s.index] is None), key=lambda s: (_most_frames(s), s.index))
    voices = {
        reference.name: tts.enroll(
            audio_files.read(reference.path), text=reference.text if asked.in_context else None, name=reference.name
        )
        for reference in {s.reference.name: s.reference for s in todo}.values()
    }
    for start in range(0, len(todo), asked.batch):
        if progress:
            progress(f"{out.name} speaks", start, len(todo))
        batch = todo[start : start + asked.batch]
        prompts = [
            tts.prompt(Utterance(s.text, asked.language, voices[s.reference.name], layout=asked.layout)) for s in batch
        ]
        spoken = engine.codes(
            prompts, [asked.seed + s.index for s in batch], replace(knobs, max_frames=_most_frames(batch[-1]))
        )
        for sentence, frames in zip(batch, spoken, strict=True):
            codes = frames[: _most_frames(sentence)]
            before = voices[sentence.reference.name].codes
            audio_files.write(out / f"{sentence.index:02}.wav", decode(tts, codes, before))
            finish = "length" if len(codes) == _most_frames(sentence) else "stop"
            found[sentence.index] = {"key": keys[sentence.index], "finish": finish}
            _write_json(out / f"{sentence.index:02}.json", found[sentence.index])
        if progress:
            progress(f"{out.name} speaks", start + len(batch), len(todo))
    return [row for row in found.values() if row is not None]


@torch.inference_mode()
def decode(tts: TTS, codes: torch.Tensor, before: torch.Tensor | None = None) -> Audio:
    """The sound of ``codes`` [T, Q], heard after the reference's codes ``before`` where the voice has any."""
    rate_hz = tts.checkpoint.codec_config.output_sample_rate
    n_before = 0 if before is None else len(before)
    whole = codes if before is None else torch.cat((before, codes))
    samples = tts.decoder(whole.T[None].to(tts.device))[0].float().cpu().numpy()
    return Audio(samples[n_before * len(samples) // max(1, len(whole)) :], rate_hz)


def judge_spoken(
    judges: Judges, wanted: Sequence[Sentence], made: Sequence[dict[str, Any]], out: Path, progress: Progress
) -> list[Spoken]:
    """What the judges say of the sounds in ``out``; what they said before is kept beside them."""
    embeddings = {s.reference.name: judges.voices.embed(audio_files.read(s.reference.path)) for s in wanted}
    # All references count, whichever sentences were asked for: "others" means the same in every run.
    every = {s.reference.name: s.reference for s in sentences()}
    embeddings |= {n: judges.voices.embed(audio_files.read(r.path)) for n, r in every.items() if n not in embeddings}
    found: list[Spoken] = []
    progress(f"{out.name} is judged", 0, len(wanted))
    for sentence, row in zip(wanted, made, strict=True):
        key = _key({"spoken": row["key"], "judges": judges.sums, "references": sorted(embeddings)})
        wav = out / f"{sentence.index:02}.wav"
        if row.get("judged_key") != key:
            sound = audio_files.read(wav)
            heard = judges.whisper.hear(sound)
            row |= {
                "judged_key": key,
                "heard": heard,
                "cer": judge.cer(heard, sentence.text),
                "seconds": sound.seconds,
                "speech_s": judge.speech_seconds(sound),
                "similarities": _similarities(judges.voices, sound, embeddings),
            }
            _write_json(out / f"{sentence.index:02}.json", row)
        found.append(
            Spoken(sentence, wav, row["finish"], row["heard"], row["cer"], row["seconds"], row["speech_s"],
                   row["similarities"])
        )  # fmt: skip
        progress(f"{out.name} is judged", len(found), len(wanted))
    return found


def _similarities(voices: judge.Voices, sound: Audio, embeddings: dict[str, np.ndarray]) -> dict[str, float]:
    if sound.seconds <= judge.MIN_VOICE_S:
        return dict.fromkeys(embeddings, -1.0)
    voice = voices.embed(sound)
    return {name: float(voice @ embedding) for name, embedding in embeddings.items()}


@torch.inference_mode()
def judge_codec(tts: TTS, judges: Judges, out: Path, progress: Progress, kit: Path = KIT) -> list[Decoded]:
    """The held-out clips of the kit through the codec alone."""
    rows = list(_rows(kit / "clips.jsonl"))
    model, found = _fingerprint(tts.checkpoint, codec_only=True), []
    progress(f"{out.name}: codec alone", 0, len(rows))
    for index, row in enumerate(rows):
        clip = kit / row["file"]
        key = _key({"model": model, "clip": sha256(clip), "judges": judges.sums})
        beside = out / f"codec-{index:02}.json"
        kept = _kept(beside, key)
        if kept is None:
            sound = audio_files.read(clip)
            encoder, decoder = load_codec_encoder(tts.checkpoint), tts.decoder
            codes = encoder.encode(torch.from_numpy(sound.samples)[None]).to(tts.device)
            whole = decoder(codes)[0].float().cpu().numpy()
            stream = decoder.stream()
            pieces = [stream.push(piece).float().cpu().numpy() for piece in torch.split(codes[0].T, 4)]
            decoded = Audio(whole, tts.checkpoint.codec_config.output_sample_rate)
            audio_files.write(out / f"codec-{index:02}.wav", decoded)
            heard = [judge.cer(judges.whisper.hear(take), row["text"]) for take in (sound, decoded)]
            kept = {
                "key": key,
                "original_cer": heard[0],
                "cer": heard[1],
                "similarity": float(judges.voices.embed(sound) @ judges.voices.embed(decoded)),
                "stream_error": float(np.abs(np.concatenate(pieces) - whole).max() / max(1e-9, np.abs(whole).max())),
            }
            _write_json(beside, kept)
        values = {name: value for name, value in kept.items() if name != "key"}
        found.append(Decoded(row["group"], row["text"], **values))
        progress(f"{out.name}: codec alone", index + 1, len(rows))
    return found


def _knobs(own: Knobs, asked: argparse.Namespace) -> Knobs:
    changes = {"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
    given = {name: value for name, value in changes.items() if value is not None}
    residual = {**given, **({} if asked.residual_temperature is None else {"temperature": asked.residual_temperature})}
    if asked.penalty is not None:
        given["penalty"] = asked.penalty
    return replace(own, sampling=replace(own.sampling, **given), residual=replace(own.residual, **residual))


def _most_frames(sentence: Sentence) -> int:
    return int(judge.most_seconds(sentence.text) * FRAME_RATE_HZ) + 2


def _fingerprint(checkpoint: Checkpoint, *, codec_only: bool = False) -> str:
    """The SHA-256 of the weights and settings that decide what a model says."""
    files = {spec.file for spec in checkpoint.codec_specs.values()}
    if not codec_only:
        files |= {spec.file for spec in checkpoint.specs.values()}
        files |= {f for f in checkpoint.path.iterdir() if f.suffix in (".json", ".txt") and f.name != "provenance.json"}
    return _key(sorted((file.name, sha256(file)) for file in files))


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    """What is in the file beside a sound that was made with ``key``, or None."""
    if not path.exists() or not path.with_suffix(".wav").exists():
        return None
    row: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return row if row["key"] == key else None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").splitlines():
        yield json.loads(line)


def _write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("model", help="a model's folder, a hub id, or tiny")
    parser.add_argument("--int4", nargs="+", default=[], metavar="MODEL", help="models to hold against the first")
    parser.add_argument("--codec", help="where the speech tokenizer is, if not with the model")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--codec-too", action="store_true", help="judge the codec alone as well")
    what.add_argument("--codec-alone", action="store_true", help="judge the codec alone and nothing else")
    parser.add_argument("--judges", type=Path, default=os.environ.get("QUAVER_JUDGES"), metavar="FOLDER",
                        help="whisper-base/ and wespeaker-resnet34.onnx; default: QUAVER_JUDGES, or the hub")
    parser.add_argument("--out", type=Path, default=Path("judged"), help="a folder, kept from run to run")
    parser.add_argument("-n", type=int, help="the first N sentences only (the kit mixes its groups)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--language", default="english")
    parser.add_argument("--layout", choices=("stream", "whole"), default="stream")
    parser.add_argument(
        "--in-context", action="store_true", help="clone with the reference's words too, not its vector alone"
    )
    parser.add_argument("--temperature", type=float, help="default for this and what follows: the model's own")
    parser.add_argument("--residual-temperature", type=float, help="default: --temperature")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--penalty", type=float)
    parser.add_argument("--batch", type=int, default=30, help="sentences spoken at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto")
    parser.add_argument("--gate", action="store_true", help="exit with 1 when a gate fails")
    parser.add_argument("--json", action="store_true", help="print results.json")
    # fmt: on
    return parser.parse_args(arguments)


def run(asked: argparse.Namespace) -> int:
    """Speaks, judges, writes and prints. Returns the exit code."""
    wanted, progress = sentences()[: asked.n], Progress()
    sources = [asked.model, *asked.int4]
    names = [Path(source).name for source in sources]
    if len(set(names)) < len(names):
        raise RecipeError(f"two models are named {max(names, key=names.count)}: their sounds need folders of two names")
    # Before anything is spoken: a judge that is missing should cost no minutes.
    judges = Judges.open(asked.judges and asked.judges.expanduser())
    made, codecs, lineage = {}, {}, {}
    codecs_seen: set[str] = set()
    for name, source in zip(names, sources, strict=True):
        out = asked.out / name
        out.mkdir(parents=True, exist_ok=True)
        tts = TTS.load(source, codec=asked.codec, device=asked.device, dtype=DTYPES[asked.dtype])
        lineage[name] = f"SHA-256 {_fingerprint(tts.checkpoint)}"
        if not asked.codec_alone:
            begun = time.perf_counter()
            made[name] = speak(tts, wanted, out, asked, progress)
            print(f"{name}: spoken in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        # Quantizing leaves the codec alone: the same codec is judged once, under the first name it comes with.
        codec = _fingerprint(tts.checkpoint, codec_only=True)
        if (asked.codec_alone or asked.codec_too) and codec not in codecs_seen:
            codecs[name] = judge_codec(tts, judges, out, progress)
        codecs_seen.add(codec)
        del tts
    models = {name: judge_spoken(judges, wanted, rows, asked.out / name, progress) for name, rows in made.items()}
    knobs = "temperature residual_temperature top_k top_p penalty layout in_context language seed".split()
    given = {name: getattr(asked, name) for name in knobs if getattr(asked, name) not in (None, False)}
    provenance = {
        **lineage,
        "asked": ", ".join(f"{name} {value}" for name, value in given.items()),
        **{name: f"SHA-256 {total}" for name, total in judges.sums.items()},
    }
    found = report(models, codecs, provenance, Limits())
    results = json.loads(found.to_json())
    results["utterances"] = {
        name: [
            {"text": s.sentence.text, "reference": s.sentence.reference.name, "group": s.sentence.reference.group,
             "wav": str(s.wav.relative_to(asked.out)), "heard": s.heard, "cer": s.cer, "seconds": s.seconds,
             "speech_s": s.speech_s, "natural_s": s.sentence.seconds, "finish": s.finish, "ran_away": s.ran_away,
             "similarity": s.similarity, "others": s.others}
            for s in spoken
        ]
        for name, spoken in models.items()
    }  # fmt: skip
    _write_json(asked.out / "results.json", results)
    write_file(asked.out / "report.html", found.to_html().encode())
    write_file(asked.out / "report.md", found.to_markdown().encode())
    if models:
        write_file(asked.out / "card.md", card(models).encode())
    if asked.json:
        print(json.dumps(results))
    else:
        brief = [replace(s, clips=(), tables=s.tables[:1]) for s in found.sections if s.tables]
        print(replace(found, sections=tuple(brief), provenance={}).to_markdown())
        print(asked.out / "report.html")
    return 0 if found.passed or not asked.gate else 1


def main() -> None:
    """Runs and exits: 0 done, 1 a gate failed and --gate was given, 2 anything that quaver explains."""
    try:
        sys.exit(run(parse()))
    except QuaverError as error:
        print(f"bench/voice.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

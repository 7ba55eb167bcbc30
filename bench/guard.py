"""Measures the guard against never-ending speech: what it cuts rightly, what wrongly, and what it costs.

    python bench/guard.py MODEL --donor DONOR [-n 600] [--broken 60] [--groups NAME ...] [--judges FOLDER] [--out OUT]

Each group is spoken once without a guard, far beyond its length, and kept with its stop probabilities in OUT; what is
there already and was made in the same way is not made again. The guard then watches the kept speech, so that its
verdict stands beside what the model would have done. With --judges, Whisper hears the speech that ran away: whole,
trimmed, and retried with the next seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from quaver import audio as audio_files
from quaver import blend, judge
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint
from quaver.cli import Progress
from quaver.config import FRAME_RATE_HZ
from quaver.corpus import Split, split_of
from quaver.corpus import sentences as shipped
from quaver.engine import Engine, Knobs
from quaver.files import write_file
from quaver.guard import Runaway, Watch, length
from quaver.model.encoders import load_codec_encoder
from quaver.model.speaker import SAMPLE_RATE_HZ
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.sampling import ENDED
from quaver.voice import Voice
from voice import decode

KIT = Path(__file__).resolve().parent / "voice"
BLENDS = (0.1, 0.3, 0.5, 0.7)
_BATCH = 16
_LONGEST = 240
_SLOWED = 1.5
_PAUSE_S = 1.5
_HURT = 0.05


@dataclass(frozen=True, slots=True)
class Said:
    """One utterance without a guard: ``codes`` [T, Q], ``stop`` [T], and whether it ended by itself."""

    text: str
    reference: str
    seed: int
    codes: Tensor
    stop: Tensor
    ended: bool
    voice_frames: int = 0
    voice_text: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Utterances made in one way. ``break_`` and ``sampling`` say what was done to the model, if anything."""

    name: str
    texts: Sequence[str]
    n: int
    break_: Callable[[Checkpoint], Checkpoint] | None = None
    sampling: Mapping[str, Any] | None = None
    in_context: float = 0.0
    """Clone in context, the recording slowed by this factor; 0 clones by the vector alone."""
    forced: float = 0.0
    """Not spoken but recorded: the clips slowed by this factor, as the model follows them."""
    pause_s: float = 0.0
    """Silence put into the middle of a forced clip."""


def deaf(strength: float) -> Callable[[Checkpoint], Checkpoint]:
    """A model that hears its stop id less: the id's row of the head times ``strength``."""

    def break_(checkpoint: Checkpoint) -> Checkpoint:
        stop_id = checkpoint.config.talker_config.codec_eos_token_id

        def edit(name: str, tensor: Tensor) -> dict[str, Tensor]:
            if name == "talker.codec_head.weight":
                tensor = tensor.clone()
                tensor[stop_id] *= strength
            return {name: tensor}

        return checkpoint.edit(Step("deafen"), edit)

    return break_


def groups(tts: TTS, asked: argparse.Namespace) -> list[Group]:
    """What is measured."""
    plain = _texts(tts)
    broken = asked.broken

    def blended(share: float) -> Callable[[Checkpoint], Checkpoint]:
        return lambda checkpoint: blend.blended(
            checkpoint, blend.Donor.open(asked.donor), blend.Recipe(alpha=share, force=True)
        )

    return [
        Group("healthy", plain, asked.n),
        Group("long", [_long(plain, i) for i in range(len(plain))], max(1, asked.n // 6)),
        Group("pauses", [_halting(text) for text in plain], max(1, asked.n // 6)),
        Group("in context", plain, max(1, asked.n // 6), in_context=1.0),
        Group("slow voice", plain, max(1, asked.n // 6), in_context=_SLOWED),
        *(Group(f"recorded, {x:g} times as long", (), 40, forced=x) for x in (1.0, 1.5, 2.0)),
        Group("recorded, with a pause", (), 40, forced=1.0, pause_s=_PAUSE_S),
        *(Group(f"blend {share:g}", plain, broken, blended(share)) for share in BLENDS if asked.donor),
        *(Group(f"deaf {x:g}", plain, broken, deaf(x)) for x in (0.5, 0.0)),
        Group("hot", plain, broken, sampling={"temperature": 2.5, "top_k": 0}),
    ]


def _texts(tts: TTS) -> list[str]:
    """The English texts of the package and of the voice bench, each once."""
    own = [row["text"] for row in shipped(tts) if row.get("language") == "english"]
    kit = [row["text"] for name in ("sentences", "clips") for row in _rows(KIT / f"{name}.jsonl")]
    return list(dict.fromkeys(own + kit))


def _long(texts: Sequence[str], start: int) -> str:
    """Sentences joined to one of up to 240 characters."""
    joined = texts[start].rstrip(".!?")
    for offset in range(1, len(texts)):
        following = texts[(start + offset) % len(texts)].rstrip(".!?")
        if len(joined) + len(following) + 7 > _LONGEST:
            break
        joined += ", and " + following[0].lower() + following[1:]
    return joined + "."


def _halting(text: str) -> str:
    """``text`` with an ellipsis after every second word."""
    words = text.split()
    return " ".join(word + "..." if index % 2 and word[-1].isalpha() else word for index, word in enumerate(words))


Plan = Sequence[tuple[str, str, int]]
"""Texts, their references and their seeds."""


def plan_of(group: Group) -> Plan:
    """Every text in its turn, each time in another voice, with a seed of its own."""
    names = [row["name"] for row in _rows(KIT / "references.jsonl")]
    return [
        (group.texts[i % len(group.texts)], names[(i + i // len(group.texts)) % len(names)], i) for i in range(group.n)
    ]


def speak(tts: TTS, group: Group, plan: Plan, out: Path, progress: Progress) -> list[Said]:
    """The utterances of ``plan``, spoken, or read from ``out`` where they were spoken before; the shortest first."""
    plan = sorted(plan, key=lambda row: (len(row[0]), row[2]))
    voices = _Voices(tts, group.in_context)
    engine, said = Engine(tts), list[Said]()
    knobs = engine.knobs
    if group.sampling:
        knobs = replace(knobs, sampling=replace(knobs.sampling, **group.sampling))
    for start in range(0, len(plan), _BATCH):
        batch = plan[start : start + _BATCH]
        make = partial(_speak, engine, batch, voices, knobs)
        said += kept(out / f"{start // _BATCH:03}.json", [batch, str(knobs)], make)
        progress(group.name, len(said), len(plan))
    return said


def _speak(engine: Engine, batch: Plan, voices: _Voices, knobs: Knobs) -> list[Said]:
    most = 50 + 3 * max(len(text) for text, _, _ in batch)
    clones = [voices[name] for _, name, _ in batch]
    utterances = [Utterance(text, "english", voice) for (text, _, _), voice in zip(batch, clones, strict=True)]
    steps = list(
        engine.frames(
            [engine.tts.prompt(u) for u in utterances], [seed for _, _, seed in batch], replace(knobs, max_frames=most)
        )
    )
    codes = torch.stack([step.codes for step in steps], 1)
    stops = torch.stack([step.stop for step in steps], 1)
    found = []
    for (text, name, seed), voice, row, stop in zip(batch, clones, codes, stops, strict=True):
        alive = row[:, 0] != ENDED
        n_voice = 0 if voice.codes is None else len(voice.codes)
        found.append(
            Said(text, name, seed, row[alive], stop[alive], int(alive.sum()) < most, n_voice, voice.text or "")
        )
    return found


class _Voices(dict[str, Voice]):
    """The kit's references as voices, enrolled when first asked for."""

    def __init__(self, tts: TTS, in_context: float) -> None:
        self._tts, self._in_context = tts, in_context
        self._rows = {row["name"]: row for row in _rows(KIT / "references.jsonl")}

    def __missing__(self, name: str) -> Voice:
        row = self._rows[name]
        sound = audio_files.read(KIT / row["file"])
        text = row["text"] if self._in_context else None
        self[name] = self._tts.enroll(_slowed(sound, self._in_context or 1.0), text=text, name=name)
        return self[name]


def follow(tts: TTS, group: Group, out: Path, progress: Progress) -> list[Said]:
    """The kit's clips as the model follows them: their true codes with the stop probabilities it gives on the way."""
    rows, said = list(_rows(KIT / "clips.jsonl"))[: group.n], list[Said]()
    for index, row in enumerate(rows):
        make = partial(_follow, tts, row, group)
        said += kept(out / f"{index:03}.json", [row, group.forced, group.pause_s], make)
        progress(group.name, len(said), len(rows))
    return said


@torch.inference_mode()
def _follow(tts: TTS, row: Mapping[str, Any], group: Group) -> list[Said]:
    sound = _slowed(audio_files.resample(audio_files.read(KIT / row["file"]), SAMPLE_RATE_HZ), group.forced)
    middle, rate_hz = len(sound.samples) // 2, sound.rate_hz
    gap = np.zeros(round(group.pause_s * rate_hz), np.float32)
    sound = Audio(np.concatenate((sound.samples[:middle], gap, sound.samples[middle:])), rate_hz)
    codes = load_codec_encoder(tts.checkpoint).encode(torch.from_numpy(sound.samples)[None])[0].T
    prompt = tts.prompt(Utterance(row["text"], "english", tts.enroll(sound)))
    stop_id = tts.config.talker_config.codec_eos_token_id
    stop = tts.force([prompt], [codes])[0].talker[:-1].softmax(-1)[:, stop_id]
    return [Said(row["text"], row["voice"], 0, codes, stop, ended=True)]


def _slowed(sound: Audio, factor: float) -> Audio:
    """``sound`` played ``factor`` times slower, and so lower."""
    if factor == 1:
        return sound
    return replace(audio_files.resample(sound, round(sound.rate_hz * factor)), rate_hz=sound.rate_hz)


def kept(path: Path, recipe: Any, make: Callable[[], list[Said]]) -> list[Said]:
    """What is in the file ``path`` if it was made by ``recipe``, else what ``make`` makes."""
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    if path.exists():
        stored = json.loads(path.read_text("utf-8"))
        if stored["key"] == key:
            return [_said(row) for row in stored["said"]]
    said = make()
    rows = [
        {**asdict(one), "codes": one.codes.tolist(), "stop": [float(f"{p:.4g}") for p in one.stop.tolist()]}
        for one in said
    ]
    write_file(path, json.dumps({"key": key, "said": rows}).encode())
    return said


def _said(row: Mapping[str, Any]) -> Said:
    codes = torch.tensor(row["codes"], dtype=torch.long).reshape(len(row["codes"]), -1)
    return Said(**{**row, "codes": codes, "stop": torch.tensor(row["stop"], dtype=torch.float32)})


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").splitlines():
        yield json.loads(line)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the guard makes of an utterance, and how long the text was expected to take."""

    said: Said
    runaway: Runaway | None
    expected: int

    @property
    def natural(self) -> bool:
        """Whether speech without a guard ended by itself and in good time, as the voice bench counts (no prior)."""
        return self.said.ended and _in_time(self.said.text, len(self.said.codes))

    @property
    def n_kept(self) -> int:
        """Frames that are left of it."""
        return len(self.said.codes) if self.runaway is None else self.runaway.keep


def watch(said: Sequence[Said], silence: Set[int]) -> list[Seen]:
    """The guard's verdicts."""
    found = []
    for one in said:
        voice = None
        if one.voice_frames:
            voice = Voice(
                one.reference, torch.ones(1), torch.zeros(one.voice_frames, 16, dtype=torch.long), one.voice_text
            )
        expected = length(Utterance(one.text, "english", voice))
        guard, runaway = Watch(expected, lambda: silence), None
        for code, stop in zip(one.codes[:, 0].tolist(), one.stop.tolist(), strict=True):
            runaway = guard.push(code, stop)
            if runaway is not None:
                break
        found.append(Seen(one, runaway, expected.expected))
    return found


def _in_time(text: str, n_frames: int) -> bool:
    return n_frames / FRAME_RATE_HZ <= judge.most_seconds(text)


def figures(name: str, seen: Sequence[Seen]) -> dict[str, Any]:
    """The group's row: counts, and lengths by the expected ones."""
    fired = [(s, s.runaway) for s in seen if s.runaway is not None]
    before = [len(s.said.codes) / s.expected for s in seen]
    kept_to = [s.n_kept / s.expected for s, _ in fired]
    return {
        "group": name,
        "n": len(seen),
        "runaways before": sum(not s.natural for s in seen),
        "runaways after": sum(not _in_time(s.said.text, s.n_kept) for s in seen),
        "cut": len(fired),
        "cut though it ended in time": sum(s.natural for s, _ in fired),
        "signs": dict(Counter(runaway.sign for _, runaway in fired)),
        "length by expected, 1 50 99 %": [round(float(q), 2) for q in np.quantile(before, (0.01, 0.5, 0.99))],
        "longest": round(max(before), 2),
        "cut to, of expected, 5 50 95 %": [round(float(q), 2) for q in np.quantile(kept_to, (0.05, 0.5, 0.95))]
        if fired
        else None,
        "cut to a length that healthy speech has": sum(0.7 <= x <= 1.3 for x in kept_to),
        "frames without a guard": sum(len(s.said.codes) for s in seen),
        "frames with": sum(len(s.said.codes) if s.runaway is None else s.runaway.at for s in seen),
    }


def hear(tts: TTS, ears: judge.Whisper, seen: Sequence[Seen], again: Sequence[Seen], out: Path) -> dict[str, Any]:
    """Mean character error rates of the speech that was cut: whole, cut, and tried again (cut where that runs away)."""
    retried = {(s.said.text, s.said.reference): s for s in again}
    rows = []
    for one in (s for s in seen if s.runaway is not None):
        second = retried[one.said.text, one.said.reference]
        best = second if second.runaway is None else one
        rows.append([
            _cer(tts, ears, out, one.said, len(one.said.codes)), _cer(tts, ears, out, one.said, one.n_kept),
            _cer(tts, ears, out, best.said, best.n_kept),
        ])  # fmt: skip
    means = np.mean(rows, axis=0).round(3).tolist() if rows else [None] * 3
    ended = sum(s.runaway is None for s in again)
    worse = sum(cut > whole + _HURT for whole, cut, _ in rows)
    return {
        "retries that ended": f"{ended} of {len(again)}",
        "cuts that lost words": worse,
        **dict(zip(("CER whole", "CER cut", "CER retried"), means, strict=True)),
    }


def _cer(tts: TTS, ears: judge.Whisper, out: Path, said: Said, n_frames: int) -> float:
    """The character error rate of the first ``n_frames`` frames, kept in ``out``."""
    codes = said.codes[:n_frames]
    path = out / f"{hashlib.sha256(str([said.text, codes.tolist()]).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        heard = ears.hear(decode(tts, codes))
        write_file(path, json.dumps({"text": said.text, "heard": heard}).encode())
    return judge.cer(json.loads(path.read_text("utf-8"))["heard"], said.text)


def pace(seen: Sequence[Seen], split: str) -> float:
    """Characters a minute in the texts of ``split``, 0.3 s of beginning and end aside: the median."""
    rows = [s.said for s in seen if split_of(s.said.text) == split]
    return float(np.median([60 * len(s.text) / (len(s.codes) / FRAME_RATE_HZ - 0.3) for s in rows]))


def cost_us(seen: Sequence[Seen], silence: Set[int]) -> float:
    """Microseconds that a frame is watched for."""
    begun = time.perf_counter()
    watch([s.said for s in seen], silence)
    n_frames = sum(len(s.said.codes) if s.runaway is None else s.runaway.at for s in seen)
    return 1e6 * (time.perf_counter() - begun) / n_frames


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder, a hub id, or tiny")
    parser.add_argument("--donor", help="a model whose feed-forward weights break it (bench/random_model.py)")
    parser.add_argument("-n", type=int, default=600, help="healthy utterances; a sixth of it in the other whole groups")
    parser.add_argument("--broken", type=int, default=60, help="utterances in each broken group")
    parser.add_argument("--judges", type=Path, help="a folder with whisper-base/: hear what was cut")
    parser.add_argument("--groups", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=Path("guarded"), help="a folder, kept from run to run")
    return parser.parse_args(arguments)


def run(asked: argparse.Namespace) -> int:
    """Speaks, watches, hears, prints."""
    whole = Checkpoint.open(asked.model)
    tts, progress = TTS.load(whole), Progress()
    silence = Engine(tts).silence
    ears = None
    if asked.judges is not None:
        ears = judge.Whisper(judge.resolve("whisper", asked.judges.expanduser()), torch.get_num_threads())
    rows = []
    for group in groups(tts, asked):
        if asked.groups and group.name not in asked.groups:
            continue
        model = TTS.load(group.break_(whole)) if group.break_ else tts
        out = asked.out / group.name.replace(" ", "-")
        out.mkdir(parents=True, exist_ok=True)
        spoken = partial(follow, model, group) if group.forced else partial(speak, model, group, plan_of(group))
        seen = watch(spoken(out, progress), silence)
        row = figures(group.name, seen)
        if group.name == "healthy":
            row |= {f"characters a minute, {split} texts": round(pace(seen, split)) for split in get_args(Split)}
            row["microseconds a frame"] = round(cost_us(seen, silence), 1)
        if ears is not None and not group.forced and not group.in_context:
            plan = [(s.said.text, s.said.reference, s.said.seed + 1) for s in seen if s.runaway is not None]
            (out / "again").mkdir(exist_ok=True)
            again = watch(speak(model, group, plan, out / "again", progress), silence)
            row |= hear(model, ears, seen, again, out / "heard")
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_file(asked.out / "results.json", (json.dumps(rows, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(run(parse()))

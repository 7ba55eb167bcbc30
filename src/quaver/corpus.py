"""Utterances with their speech codes: what calibration and validation run on.

They come from a user's recordings, or are spoken by the model itself. A text is either for calibration or held out,
by the hash of the text alone, so that no text is ever in both, whatever the seed, the voice or the list.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quaver import audio as audio_files
from quaver.config import FRAME_RATE_HZ
from quaver.engine import Engine
from quaver.errors import RecipeError, VoiceError
from quaver.files import sha256
from quaver.meter import Clock
from quaver.model.codec_encoder import CodecEncoder
from quaver.model.encoders import load_codec_encoder
from quaver.model.speaker import SAMPLE_RATE_HZ
from quaver.model.tts import TTS, Prompt, Utterance, references
from quaver.voice import Voice

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and how many there are."""

Split = Literal["calibration", "held-out"]

SENTENCES = "sentences.jsonl"
_HELD_OUT_BYTES = 64
_BATCH = 64
_MOST_LETTERS_A_SECOND = 24
_CACHE_VALUES = 500_000_000
"""Keys and values that a batch may hold: 1 GB of a model that computes in 16 bits. Small models never get there."""

INSTRUCTS = (
    "A calm middle-aged woman with a warm, low voice.",
    "A lively young man who speaks fast and smiles.",
    "An old storyteller, slow, hoarse and friendly.",
    "A clear, neutral newsreader.",
    "A shy teenager who almost whispers.",
    "A cheerful child in high spirits.",
)
"""Designed voices, for models that take a description."""


@dataclass(frozen=True, slots=True)
class Item:
    """An utterance and the frames ``codes`` [T, Q] that say it."""

    utterance: Utterance
    codes: Tensor


def split_of(text: str) -> Split:
    """The half that ``text`` belongs to: one text in four is held out, by its SHA-256."""
    return "held-out" if hashlib.sha256(text.strip().encode()).digest()[0] < _HELD_OUT_BYTES else "calibration"


def fingerprint(items: Sequence[Item]) -> str:
    """The SHA-256 of all texts, languages, voice names and codes, in hexadecimal."""
    total = hashlib.sha256()
    for item in items:
        said = item.utterance
        head = [said.text, said.language, said.voice.name if said.voice else said.instruct, list(item.codes.shape)]
        total.update(json.dumps(head).encode() + item.codes.to(torch.int32).contiguous().cpu().numpy().tobytes())
    return total.hexdigest()


def identity(calibration: str | Path | Sequence[Item] | None) -> str:
    """The SHA-256 of all that a calibration set is made of beside the model: "own" for speech that it makes itself.

    A file's identity is that of its text and of every recording and voice file it names. Raises RecipeError.
    """
    if calibration is None:
        return "own"
    total = hashlib.sha256()
    if not isinstance(calibration, str | Path):
        total.update(fingerprint(calibration).encode())
        for item in calibration:
            voice = item.utterance.voice
            parts = () if voice is None else (voice.speaker, voice.codes)
            total.update(json.dumps([item.utterance.layout, voice.text if voice else None]).encode())
            total.update(b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts if part is not None))
        return total.hexdigest()
    path = Path(calibration)
    for row in _read_rows(path):
        total.update(json.dumps(row, sort_keys=True).encode())
        for name in (row.get("audio"), row.get("voice")):
            places = (path.parent / name, Path(name)) if isinstance(name, str) else ()
            total.update("".join(sha256(one) for one in places if one.is_file()).encode())
    return total.hexdigest()


def builtin(
    tts: TTS,
    n: int,
    *,
    seed: int = 1729,
    split: Split = "calibration",
    voices: Sequence[Voice] | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> list[Item]:
    """``n`` utterances of ``split``, spoken by the model itself with its own sampling; the same for the same seed.

    The texts are the checkpoint's own sentences.jsonl where it has one (a voice that knows only its sentences), else
    those that ship with quaver in the languages of the model. The voices are ``voices``, else the recordings that
    ship with quaver, the model's presets, or descriptions. Languages take turns, so that few utterances hear all of
    them. Where ``n`` exceeds the texts they return in other voices. ``clock`` counts what speaking takes (see Engine).
    Raises RecipeError when there is no text, VoiceError when there is no voice.
    """
    rows = [row for row in sentences(tts) if split_of(row["text"]) == split]
    if not rows:
        raise RecipeError(
            f"{tts.checkpoint.path} knows no language that quaver has {split} sentences for: give recordings"
        )
    random.Random(seed).shuffle(rows)
    rows = _in_turns(rows)
    speakers = _speakers(tts, voices)
    utterances = []
    for index in range(n):
        n_pass, place = divmod(index, len(rows))
        row = rows[place]
        plain = Utterance(row["text"], row.get("language", "auto"), seed=seed + index)
        # A text has its own voice first, the next on each further pass: no pair returns before all have been.
        own = speakers.names.get(row.get("voice", ""), place)
        utterances.append(speakers.give(plain, own + n_pass))
    return speak(tts, utterances, progress, clock)


def _in_turns(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each language in their order, one of each language after the other."""
    n_before = Counter[str]()
    turns = []
    for row in rows:
        language = row.get("language", "auto")
        turns.append(n_before[language])
        n_before[language] += 1
    return [rows[index] for index in sorted(range(len(rows)), key=lambda index: (turns[index], index))]


def load(tts: TTS, path: str | Path, n: int | None = None, progress: Progress | None = None) -> list[Item]:
    """The first ``n`` utterances (all, by default) of a JSON-lines file.

    A row has ``text`` and ``audio``, and where wanted ``language``, ``voice`` and ``instruct``. ``audio`` is a
    recording, its path relative to the file; its codes are made by the model's own codec. ``voice`` is what TTS.voice
    takes, or a relative path; a Base model clones the recording itself where there is none.
    Raises RecipeError for a file or row that cannot be used, by line, and what TTS.voice and TTS.prompt raise.
    """
    path = Path(path)
    rows = list(_read_rows(path))[:n]
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("audio"), str):
            raise RecipeError(f'{path}, line {number}: it needs an "audio": the recording that says the text')
    encoder = load_codec_encoder(tts.checkpoint, tts.device)
    items = []
    for number, row in enumerate(rows, 1):
        items.append(_recorded(tts, encoder, row, path.parent))
        if progress:
            progress("encoding recordings", number, len(rows))
    return items


@torch.inference_mode()
def _recorded(tts: TTS, encoder: CodecEncoder, row: dict[str, Any], folder: Path) -> Item:
    recording = audio_files.read(folder / row["audio"])
    audio_files.require_speech(recording, row["audio"])
    samples = torch.from_numpy(audio_files.resample(recording, SAMPLE_RATE_HZ).samples)[None]
    codes = encoder.encode(samples.to(tts.device))[0].T.cpu()
    voice = None
    if row.get("voice"):
        near = folder / row["voice"]
        voice = tts.voice(near if near.is_file() else row["voice"])
    elif tts.config.has_speaker_encoder:
        voice = tts.enroll(recording, name=Path(row["audio"]).stem)
    utterance = Utterance(row["text"], row.get("language", "auto"), voice, row.get("instruct"))
    tts.prompt(utterance)
    return Item(utterance, codes)


def sentences(tts: TTS) -> list[dict[str, Any]]:
    """The rows that the model can say."""
    own = tts.checkpoint.path / SENTENCES
    shipped = Path(str(resources.files("quaver"))) / "data" / SENTENCES
    rows = _read_rows(own if own.exists() else shipped)
    return [row for row in rows if row.get("language", "auto").lower() in tts.config.languages]


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecipeError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
            raise RecipeError(f'{path}, line {number}: it needs a "text"')
        yield row


@dataclass(frozen=True, slots=True)
class _Speakers:
    """The voices or descriptions that say the texts, in order, and the voices' places by name."""

    voices: Sequence[Voice]
    instructs: Sequence[str]
    names: Mapping[str, int]

    def give(self, plain: Utterance, index: int) -> Utterance:
        """``plain`` in the voice ``index``, counted round and round."""
        if self.voices:
            return replace(plain, voice=self.voices[index % len(self.voices)])
        return replace(plain, instruct=self.instructs[index % len(self.instructs)])


def _speakers(tts: TTS, voices: Sequence[Voice] | None) -> _Speakers:
    if tts.config.tts_model_type == "voice_design":
        return _Speakers((), INSTRUCTS, {})
    if voices is None:
        presets = sorted(tts.config.talker_config.spk_id)
        voices = [tts.voice(name) for name in (references() if tts.config.has_speaker_encoder else presets)]
    if not voices:
        raise VoiceError(f"{tts.checkpoint.path} has no voice to calibrate with: give recordings to clone")
    return _Speakers(voices, (), {voice.name: index for index, voice in enumerate(voices)})


def speak(
    tts: TTS, utterances: Sequence[Utterance], progress: Progress | None = None, clock: Clock | None = None
) -> list[Item]:
    """The utterances with the codes that the model says them with, in batches of like length.

    The batches depend on the prompts and the widths alone, so that two models are asked alike. Speech longer than
    :func:`most_frames` of its text may have been cut.
    """
    engine = Engine(tts, clock=clock)
    caps = [most_frames(utterance.text) for utterance in utterances]
    items: dict[int, Item] = {}
    for batch, prompts in _batches(tts, utterances, caps):
        knobs = replace(engine.knobs, max_frames=caps[batch[-1]])
        codes = engine.codes(prompts, [utterances[index].seed for index in batch], knobs)
        # Cut at its own cap, not at the batch's: an item does not depend on who shares its batch.
        items |= {
            index: Item(utterances[index], frames[: caps[index]]) for index, frames in zip(batch, codes, strict=True)
        }
        if progress:
            progress("speaking", len(items), len(utterances))
    return [items[index] for index in range(len(utterances))]


def _batches(
    tts: TTS, utterances: Sequence[Utterance], caps: Sequence[int]
) -> Iterator[tuple[list[int], list[Prompt]]]:
    """The utterances' places and prompts, those of the least ``caps`` first, as many as the cache has room for."""
    config = tts.config.talker_config
    n_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    batch: list[int] = []
    prompts: list[Prompt] = []
    for index in sorted(range(len(utterances)), key=lambda index: (caps[index], index)):
        prompt = tts.prompt(utterances[index])
        n_positions = max(len(one.embeds) for one in (*prompts, prompt)) + caps[index]
        full = len(batch) == _BATCH or (len(batch) + 1) * n_positions * n_values > _CACHE_VALUES
        if batch and full:
            yield batch, prompts
            batch, prompts = [], []
        batch.append(index)
        prompts.append(prompt)
    if batch:
        yield batch, prompts


def most_frames(text: str) -> int:
    """A length that speech of ``text`` seldom passes: twice a frame a UTF-8 byte, which fits letters and syllables."""
    return 16 + 2 * len(text.encode())


def least_frames(text: str) -> int:
    """A length that whole speech of ``text`` is seldom under: twice as fast as people speak.

    24 letters and digits a second, an East Asian character (a syllable or more) for 2.5 of them.
    """
    letters = [2.5 if unicodedata.east_asian_width(c) in "WF" else 1.0 for c in text if c.isalnum()]
    return int(FRAME_RATE_HZ * sum(letters) / _MOST_LETTERS_A_SECOND)

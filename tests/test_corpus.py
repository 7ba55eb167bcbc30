"""Utterances for calibration and validation: the split, the texts and voices of each kind of model, and recordings."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toy
from quaver import audio, corpus
from quaver.audio import Audio
from quaver.config import LANGUAGES
from quaver.engine import Engine
from quaver.errors import AudioError, RecipeError, VoiceError
from quaver.model.encoders import load_codec_encoder
from quaver.model.tts import TTS
from quaver.voice import Voice

RATE_HZ = 24000
SHORT = [
    {"text": "Ah.", "voice": "second"},
    {"text": "Oh!", "language": "english"},
    {"text": "Eh?", "language": "spanish"},
    {"text": "Hm.", "language": "klingon"},
    *({"text": f"No {number}."} for number in range(8)),
]


@pytest.fixture(scope="module")
def own(toy_folder, tmp_path_factory):
    """The toy with sentences of its own."""
    folder = shutil.copytree(toy_folder, tmp_path_factory.mktemp("corpus") / "own")
    (folder / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SHORT))
    return TTS.load(folder)


@pytest.fixture
def mute(monkeypatch):
    """Makes engines say three frames of zeros at once."""
    monkeypatch.setattr(
        Engine, "codes", lambda _, prompts, *__: [torch.zeros(3, 16, dtype=torch.long) for _ in prompts]
    )


def voices(n=3):
    generator = torch.Generator().manual_seed(0)
    names = ("first", "second", "third", "fourth")
    return [Voice(name, torch.randn(128, generator=generator)) for name in names[:n]]


@given(st.text(min_size=1))
def test_a_text_is_in_one_split_whatever_surrounds_it(text):
    assert corpus.split_of(text) == corpus.split_of(f"  {text}\n")


def test_the_shipped_sentences():
    path = Path(corpus.__file__).with_name("data") / "sentences.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["text"] for row in rows}) == len(rows) >= 160
    languages = Counter(row["language"] for row in rows)
    assert len(languages) == 10 and min(languages.values()) >= 12 and languages["english"] >= 60
    for language in languages:
        splits = Counter(corpus.split_of(row["text"]) for row in rows if row["language"] == language)
        # One in four is held out on the whole; a language without any could be neither calibrated nor validated.
        assert splits["held-out"] >= 3 and splits["calibration"] >= 4
    assert set(languages) == set(LANGUAGES)


@pytest.mark.usefixtures("mute")
def test_languages_take_turns(toy_tts):
    items = corpus.builtin(toy_tts, 9, split="held-out", voices=voices())
    assert Counter(item.utterance.language for item in items) == {"chinese": 3, "english": 3, "spanish": 3}


def test_the_model_speaks_the_same_codes_for_the_same_seed(own):
    first, again, other = (corpus.builtin(own, 2, seed=seed, voices=voices()) for seed in (1, 1, 2))
    assert corpus.fingerprint(first) == corpus.fingerprint(again) != corpus.fingerprint(other)
    assert all(torch.equal(one.codes, two.codes) for one, two in zip(first, again, strict=True))
    for item in first:
        assert item.codes.shape[1] == 16 and len(item.codes) <= corpus.most_frames(item.utterance.text)
        assert int(item.codes.min()) >= 0 and int(item.codes.max()) < toy.N_CODES


def test_an_item_does_not_depend_on_its_batch(own):
    one = corpus.builtin(own, 1, voices=voices())[0]
    longer = replace(one.utterance, text="Longer.")
    assert corpus.most_frames(longer.text) > corpus.most_frames(one.utterance.text)
    assert torch.equal(corpus.speak(own, [longer, one.utterance])[1].codes, one.codes)


@pytest.mark.usefixtures("mute")
def test_texts_of_the_checkpoint_in_its_languages(own):
    for split in ("calibration", "held-out"):
        expected = {
            row["text"] for row in SHORT if row.get("language") != "klingon" and corpus.split_of(row["text"]) == split
        }
        items = corpus.builtin(own, 60, split=split, voices=voices())
        assert {item.utterance.text for item in items} == expected
    assert {item.utterance.language for item in items} <= {"auto", "english", "spanish"}


@pytest.mark.usefixtures("mute")
def test_texts_return_in_other_voices_and_begin_in_their_own(own):
    n_texts = len({item.utterance.text for item in corpus.builtin(own, 60, voices=voices())})
    items = corpus.builtin(own, 4 * n_texts, voices=voices(4))
    pairs = {(item.utterance.text, item.utterance.voice.name) for item in items}
    assert len(pairs) == len(items)
    assert len({item.utterance.seed for item in items}) == len(items)
    if corpus.split_of("Ah.") == "calibration":
        assert next(item for item in items if item.utterance.text == "Ah.").utterance.voice.name == "second"


@pytest.mark.usefixtures("mute")
def test_shipped_texts_in_the_models_languages(toy_tts):
    told = []
    items = corpus.builtin(toy_tts, 40, voices=voices(), progress=lambda *event: told.append(event))
    assert {item.utterance.language for item in items} == {"english", "chinese", "spanish"}
    assert told[-1] == ("speaking", 40, 40)
    assert all(corpus.split_of(item.utterance.text) == "calibration" for item in items)


@pytest.mark.usefixtures("mute")
def test_presets_and_described_voices(tmp_path):
    custom = TTS.load(toy.checkpoint(tmp_path / "custom", "custom_voice"))
    items = corpus.builtin(custom, 8)
    assert {item.utterance.voice.preset for item in items} == {"anna", "dylan"}
    designed = TTS.load(toy.checkpoint(tmp_path / "designed", "voice_design"))
    items = corpus.builtin(designed, 12)
    assert {item.utterance.instruct for item in items} == set(corpus.INSTRUCTS)
    for tts, item in ((custom, items[0]), (designed, items[0])):
        assert tts.tokenizer.encode(item.utterance.text)


def test_no_voice_and_no_language_are_errors(own, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "references", dict)
    with pytest.raises(VoiceError, match="has no voice to calibrate with"):
        corpus.builtin(own, 2)
    lonely = shutil.copytree(own.checkpoint.path, tmp_path / "lonely")
    (lonely / "sentences.jsonl").write_text('{"text": "nuqneH", "language": "klingon"}\n')
    with pytest.raises(RecipeError, match="knows no language"):
        corpus.builtin(TTS.load(lonely), 2, voices=voices())


@pytest.fixture
def recordings(tmp_path):
    """Two recordings, one of them at 16 kHz, and a file that lists them."""
    generator = np.random.default_rng(0)
    rows = []
    for name, rate_hz in (("a.wav", RATE_HZ), ("b.wav", 16000)):
        audio.write(tmp_path / name, Audio(generator.normal(0, 0.1, rate_hz).astype(np.float32), rate_hz))
        rows.append({"text": f"This is {name}", "audio": name, "language": "english"})
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_recordings_become_codes(toy_tts, recordings):
    told = []
    items = corpus.load(toy_tts, recordings, progress=lambda *event: told.append(event))
    assert [item.utterance.text for item in items] == ["This is a.wav", "This is b.wav"]
    # One second is 12.5 frames; the last is padded.
    assert [tuple(item.codes.shape) for item in items] == [(13, 16), (13, 16)]
    sound = torch.from_numpy(audio.read(recordings.with_name("a.wav")).samples)[None]
    with torch.inference_mode():
        assert torch.equal(items[0].codes, load_codec_encoder(toy_tts.checkpoint).encode(sound)[0].T)
    assert items[1].utterance.voice.name == "b" and items[1].utterance.voice.speaker.shape == (128,)
    assert told[-1] == ("encoding recordings", 2, 2)
    assert len(corpus.load(toy_tts, recordings, 1)) == 1


def test_a_voice_file_beside_the_list_is_used(toy_tts, recordings):
    voices(1)[0].save(recordings.with_name("her.safetensors"))
    recordings.write_text(json.dumps({"text": "Hello", "audio": "a.wav", "voice": "her.safetensors"}))
    item = corpus.load(toy_tts, recordings)[0]
    assert item.utterance.voice.name == "first" and item.utterance.language == "auto"


@pytest.mark.parametrize(
    ("line", "error", "match"),
    [
        ("{", RecipeError, "line 1: not JSON"),
        ("[]", RecipeError, 'line 1: it needs a "text"'),
        ('{"text": " ", "audio": "a.wav"}', RecipeError, 'line 1: it needs a "text"'),
        ('{"text": "Hello"}', RecipeError, 'line 1: it needs an "audio"'),
        ('{"text": "Hello", "audio": "none.wav"}', AudioError, "none.wav"),
        ('{"text": "Hello", "audio": "a.wav", "language": "klingon"}', RecipeError, "klingon"),
        ('{"text": "Hello", "audio": "a.wav", "voice": "nobody"}', VoiceError, "nobody"),
    ],
)
def test_a_bad_row_is_named(toy_tts, recordings, line, error, match):
    recordings.write_text(line + "\n")
    with pytest.raises(error, match=match):
        corpus.load(toy_tts, recordings)


def test_a_missing_list_is_named(toy_tts, tmp_path):
    with pytest.raises(RecipeError, match=r"none\.jsonl cannot be read"):
        corpus.load(toy_tts, tmp_path / "none.jsonl")

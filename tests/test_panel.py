"""What judges hear of two sides: fakes that hear what they are told to, figures made by hand, a whole validation."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import test_validate
import toy
from quaver import audio, judge, panel, validate
from quaver.audio import Audio
from quaver.card import card
from quaver.checkpoint import Checkpoint
from quaver.corpus import Item
from quaver.judge import Judges
from quaver.limits import JudgedLimits, Limits
from quaver.model.tts import TTS, Utterance, references
from quaver.panel import Heard, Pairs, Panel

RIGHT = Heard("Hello there.", 0.0, 0.0, 0.9, 0.8, 3.5, np.array([1.0, 0.0]))


class Ears:
    """Hears one text in everything, and keeps the languages it was asked for."""

    text, languages = "hello there", list[str | None]()

    def __init__(self, *_: object) -> None:
        self.languages.clear()

    def hear(self, sound: Audio, language: str | None) -> str:
        self.languages.append(language)
        return self.text


class Likeness:
    """Takes a few samples of a sound for its voice."""

    def __init__(self, *_: object) -> None:
        self.n_heard = 0

    def embed(self, sound: Audio) -> np.ndarray:
        self.n_heard += 1
        vector = np.resize(sound.samples[-5000:], 4).astype(np.float64) + 1e-3
        return vector / np.linalg.norm(vector)


class Taste:
    """Likes long sounds."""

    def __init__(self, *_: object) -> None:
        pass

    def rate(self, sound: Audio) -> float:
        return min(5.0, 1 + sound.seconds)


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judges:
    """Fakes in the places of the judges."""
    for name, fake in (("Whisper", Ears), ("Voices", Likeness), ("Quality", Taste)):
        monkeypatch.setattr(judge, name, fake)
    (tmp_path / "whisper").mkdir()
    for name in ("whisper/model.bin", "voices", "quality"):
        (tmp_path / name).write_text(name)
    return Judges(tmp_path / "whisper", tmp_path / "voices", tmp_path / "quality")


def _item(text: str = "Hello there.", language: str = "english", voice: object = None) -> Item:
    return Item(Utterance(text, language, voice), torch.zeros(10, 2, dtype=torch.long))


def _pairs(original: list[Heard], candidate: list[Heard], away: list[bool] | None = None, **said: str) -> Pairs:
    return Pairs([_item(**said)] * len(original), original, candidate, away or [False] * len(original), seed=0)


def _gates(pairs: Pairs) -> dict[str, panel.Gate]:
    return {gate.metric.name: gate for gate in panel.figures(pairs, JudgedLimits())[1]}


def test_like_speech_loses_nothing() -> None:
    metrics, gates = panel.figures(_pairs([RIGHT] * 3, [RIGHT] * 3), JudgedLimits())
    assert len(gates) == 5 and all(gate.passed and gate.metric.value == 0 for gate in gates)
    assert {m.name: m.value for m in metrics}["voices of the two sides alike, WeSpeaker"] == 1


@pytest.mark.parametrize(
    ("field", "worse", "name"),
    [
        ("cer", 0.2, "character errors added"),
        ("wer", 0.2, "word errors added"),
        ("own_similarity", 0.7, "similarity lost, own encoder"),
        ("similarity", 0.6, "similarity lost, WeSpeaker"),
        ("quality", 3.3, "sound quality lost, DNSMOS"),
    ],
)
def test_a_change_for_the_worse_fails_its_gate_alone_and_one_for_the_better_none(field, worse, name) -> None:
    changed = dataclasses.replace(RIGHT, **{field: worse})
    gates = _gates(_pairs([RIGHT] * 2, [changed] * 2))
    assert [gate.metric.name for gate in gates.values() if not gate.passed] == [name]
    assert gates[name].metric.value == pytest.approx(0.2)
    assert all(gate.passed for gate in _gates(_pairs([changed] * 2, [RIGHT] * 2)).values())


def test_differences_are_paired_and_their_intervals_too() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 0.8, 50)
    before = [dataclasses.replace(RIGHT, cer=value) for value in hard]
    after = [dataclasses.replace(RIGHT, cer=value) for value in hard + rng.uniform(0, 0.02, 50)]
    metrics, _ = panel.figures(_pairs(before, after), JudgedLimits())
    added = _gates(_pairs(before, after))["character errors added"].metric
    low, high = added.interval
    assert low < added.value < high and added.value == pytest.approx(0.01, abs=0.003)
    # Utterances differ far more than the two sides do: only pairs can tell 0.01.
    single = next(metric for metric in metrics if metric.name == "character error rate, original")
    assert high - low < 0.1 * (single.interval[1] - single.interval[0])


def test_gates_count_runaways_and_the_report_gives_both() -> None:
    lost = dataclasses.replace(RIGHT, cer=1.0, text="la la la")
    pairs = _pairs([RIGHT] * 4, [RIGHT, RIGHT, RIGHT, lost], [False, False, False, True])
    added = _gates(pairs)["character errors added"]
    assert added.metric.value == 0.25 and not added.passed and "without runaways 0" in added.metric.note
    table = panel.section(pairs).tables[0]
    rows = {row[:2]: row[2:6] for row in table.rows}
    assert rows["character error rate", "all"] == (4, 0, 0.25, 0.25)
    assert rows["character error rate", "without runaways"] == (3, 0, 0, 0)
    everywhere = _pairs([RIGHT], [lost], [True])
    assert "each with a runaway" in _gates(everywhere)["character errors added"].metric.note


def test_what_cannot_be_asked_has_no_gate_and_is_named() -> None:
    wordless = dataclasses.replace(RIGHT, wer=None, own_similarity=None, similarity=None)
    pairs = _pairs([wordless] * 2, [wordless] * 2, text="你好。", language="chinese")
    assert set(_gates(pairs)) == {"character errors added", "sound quality lost, DNSMOS"}
    text = panel.section(pairs).text
    assert "Written without spaces: Chinese." in text and "clones no voices" in text
    named = dataclasses.replace(RIGHT, similarity=None)
    assert "No recording of the voices" in panel.section(_pairs([named], [named])).text


def test_languages_are_told_apart() -> None:
    items = [_item("你好。", "chinese"), _item("Hallo.", "german"), _item("Guten Tag.", "german")]
    heard = [dataclasses.replace(RIGHT, wer=None, cer=0.5), RIGHT, dataclasses.replace(RIGHT, wer=0.5)]
    tables = panel.section(Pairs(items, heard, heard, [False] * 3, 0)).tables
    assert [table.title for table in tables][1] == "By language"
    assert tables[1].rows == (("chinese", 1, 0.5, 0.5, None, None), ("german", 2, 0, 0, 0.25, 0.25))


def test_voices_of_nobody_are_strangers() -> None:
    silent = dataclasses.replace(RIGHT, voice=None)
    assert _pairs([RIGHT, RIGHT], [RIGHT, silent]).likeness == [1, 0]


def test_each_judge_is_asked_what_it_can_answer(toy_folder: Path, toy_tts: TTS, judges: Judges) -> None:
    name, path = next(iter(references().items()))
    recording = audio.read(path)
    voice = toy_tts.voice(name)
    items = [_item(voice=voice), _item("Hola.", "spanish", voice), _item("Hm.", "auto", voice)]
    jury = Panel(judges, Checkpoint.open(toy_folder))
    told = []
    found = jury.listen(items, [recording] * 3, lambda *step: told.append(step))
    assert Ears.languages == ["en", "es", None] and told[-1][1:] == (3, 3)
    # Three sounds, and the reference once.
    assert jury._voices.n_heard == 4
    assert found[0].text == "hello there" and found[0].cer == 0 and found[0].wer == 0
    # The toy's own encoder knows the very recording that the voice was enrolled from.
    assert found[0].own_similarity == pytest.approx(1, abs=1e-5) and found[0].similarity == pytest.approx(1)
    assert found[0].quality == pytest.approx(min(5, 1 + recording.seconds))
    (silent,) = jury.listen([items[0]], [Audio(np.zeros(0, np.float32), 24000)], lambda *_: None)
    assert silent == Heard("", 1.0, 1.0, 0.0, 0.0, 1.0, None)
    (own,) = jury.listen([_item(voice=dataclasses.replace(voice, name="mine"))], [recording], lambda *_: None)
    assert own.similarity is None and own.own_similarity == pytest.approx(1, abs=1e-5)


def test_a_model_without_a_speaker_encoder_has_no_reference(tmp_path: Path, judges: Judges) -> None:
    model = Checkpoint.open(toy.checkpoint(tmp_path / "m", "custom_voice"))
    voice = TTS.load(model).voice("anna")
    sound = Audio(0.1 * np.ones(24000, np.float32), 24000)
    (found,) = Panel(judges, model).listen([_item(voice=voice)], [sound], lambda *_: None)
    assert found.own_similarity is None and found.similarity is None and found.voice is not None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return test_validate._eager(tmp_path_factory.mktemp("judged"))


def test_judges_come_when_the_models_are_gone_and_their_figures_stay(
    source: Checkpoint, tmp_path: Path, judges: Judges, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[TTS]] = []
    plain, listening = TTS.load.__func__, Panel.__init__

    def alive() -> int:
        gc.collect()
        return sum(one() is not None for one in loaded)

    def load(cls: type[TTS], *what: object, **how: object) -> TTS:
        assert alive() == 0, "one model at a time"
        tts = plain(cls, *what, **how)
        loaded.append(weakref.ref(tts))
        return tts

    def listen(self: Panel, *what: Judges) -> None:
        assert len(loaded) == 2 and alive() == 0, "judges come last"
        listening(self, *what)

    monkeypatch.setattr(TTS, "load", classmethod(load))
    monkeypatch.setattr(Panel, "__init__", listen)
    candidate = test_validate._noised(source, tmp_path / "noised", 0.01)
    limits = Limits(judged=JudgedLimits(quality=0.0, cer=0.5))
    told: list[str] = []
    recipe = validate.Recipe(4, n_clips=1, limits=limits, judges=judges)
    report = validate.validate(candidate, source, recipe, progress=lambda what, *_: told.append(what))
    assert list(dict.fromkeys(told))[-2:] == ["judges hear the original", "judges hear the candidate"]
    gates = {gate.metric.name: gate for gate in report.gates}
    assert gates["character errors added"].limit == 0.5 and gates["sound quality lost, DNSMOS"].limit == 0
    assert "not judged" not in report.summary and "DNSMOS P.835 SHA-256" in report.provenance["judges"]
    assert len(report.sections[0].clips) == 1 and len(report.sections[1].tables[-1].rows) == 4
    assert "What was heard" in report.to_html() and "as heard" in report.to_markdown()
    validate.record(candidate, source, report)
    kept = json.loads((candidate.path / "provenance.json").read_text())["validation"]
    assert {"character errors added"} < {row["name"] for row in kept["gates"]}
    assert "Whisper base SHA-256" in kept["asked"]["judges"]
    written = card(Checkpoint.open(candidate.path))
    assert "character error rate, candidate" in written and "Whisper base SHA-256" in written


@pytest.mark.skipif("QUAVER_JUDGES" not in os.environ, reason="QUAVER_JUDGES names no folder with the judges' weights")
def test_the_judges_themselves_understand_a_recording(toy_folder: Path, toy_tts: TTS) -> None:
    found = Judges.find(Path(os.environ["QUAVER_JUDGES"]).expanduser())
    kit = Path(__file__).parents[1] / "bench" / "voice"
    row = json.loads((kit / "clips.jsonl").read_text().splitlines()[0])
    voice, sound = toy_tts.voice(str(kit / row["file"])), audio.read(kit / row["file"])
    jury = Panel(found, Checkpoint.open(toy_folder))
    (heard,) = jury.listen([_item(row["text"], voice=voice)], [sound], lambda *_: None)
    assert heard.cer < 0.1 and heard.wer < 0.3 and heard.quality > 2
    assert heard.own_similarity == pytest.approx(1, abs=1e-4) and heard.similarity is None

"""The voice bench: its kit, its figures on made-up utterances, and whole runs on a toy with judges that guess."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
import voice as bench
from quaver import audio, judge
from quaver.audio import Audio
from quaver.errors import GateFailed, RecipeError
from quaver.model.tts import TTS, Utterance
from quaver.sampling import Sampling
from voice_figures import Decoded, Limits, Reference, Sentence, Spoken, card, figures, gates, paired, report

ROOT = Path(__file__).parent.parent
LETTER_S = 1 / 14
SOUND = min((bench.KIT / "clips").iterdir())


class GuessingEars:
    """Hears the same words in everything."""

    n_heard = 0

    def hear(self, sound: Audio, language: str = "en") -> str:
        self.n_heard += 1
        return "the same old words"


class GuessingVoices:
    """Takes the loudness of three parts of a sound for its voice."""

    def embed(self, sound: Audio) -> np.ndarray:
        vector = np.array([part.std() for part in np.array_split(sound.samples, 3)]) + 1e-6
        return vector / np.linalg.norm(vector)


@pytest.fixture
def ears(monkeypatch: pytest.MonkeyPatch) -> GuessingEars:
    found = GuessingEars()
    judges = bench.Judges(found, GuessingVoices(), {"ears": "1"})
    monkeypatch.setattr(bench.Judges, "open", classmethod(lambda cls, folder: judges))
    return found


def spoken(
    index: int, group: str = "seen", *, cer: float = 0.1, own: float = 0.6, ratio: float = 1.0, **more
) -> Spoken:
    reference = Reference(group, group, SOUND, "words", 0.8)
    sentence = Sentence(index, "A dozen letters or more of it.", reference, 2.0)
    values = {"finish": "stop", "seconds": 2.2 * ratio} | more
    return Spoken(sentence, SOUND, heard="", cer=cer, speech_s=2.0 * ratio,
                  similarities={group: own, "b": 0.1, "c": 0.3}, **values)  # fmt: skip


def test_the_kit_is_sixty_new_sentences_half_of_them_in_voices_never_trained_on():
    kit = bench.sentences()
    groups = [s.reference.group for s in kit]
    assert [groups.count(g) for g in ("seen", "unseen", "recording")] == [30, 15, 15]
    texts = {judge.plain(s.text) for s in kit}
    assert len(texts) == 60
    assert all(4 <= len(text.split()) <= 16 and not any(c.isdigit() for c in text) for text in texts)
    for known in (ROOT / "src/quaver/data/sentences.jsonl", ROOT / "src/quaver/voices/tiny/sentences.jsonl"):
        if known.exists():
            assert not texts & {judge.plain(json.loads(line)["text"]) for line in known.read_text("utf-8").splitlines()}
    for s in kit:
        assert 0.4 < s.seconds / (len(s.text) * LETTER_S) < 1.6
    for reference in {s.reference.name: s.reference for s in kit}.values():
        assert 4 <= audio.read(reference.path).seconds <= 8.5 and reference.text


def test_the_kit_is_small_and_its_clips_are_there():
    rows = [json.loads(line) for line in (bench.KIT / "clips.jsonl").read_text("utf-8").splitlines()]
    assert [sum(row["group"] == g for row in rows) for g in ("seen", "unseen")] == [20, 20]
    assert all((bench.KIT / row["file"]).exists() and row["text"] for row in rows)
    sizes = {name: sum(f.stat().st_size for f in (bench.KIT / name).iterdir()) for name in ("references", "clips")}
    assert sizes["references"] <= 1_500_000 and sizes["clips"] <= 600_000


def test_figures_by_group():
    rows = [
        spoken(0, cer=0),
        spoken(1, cer=0.5, ratio=0.4),
        spoken(2, "unseen", own=0.2, seconds=40.0, finish="length"),
    ]
    found = figures(rows)
    assert set(found) == {"trained voices", "new synthetic voices", "never trained on", "all"}
    trained, new = found["trained voices"], found["never trained on"]
    assert trained["mean CER"].value == 0.25 and trained["mean CER"].interval == (0, 0.5)
    assert trained["early stops"].value == 50 and trained["runaways"].value == 0
    assert new["runaways"].value == new["did not stop"].value == 100
    assert new["similarity to other voices"].value == pytest.approx(0.2)
    assert new["margin"].value == pytest.approx(0)


def test_gates_fail_one_by_one():
    good = [spoken(i, group) for i, group in enumerate(("seen", "unseen", "recording") * 4)]
    assert all(g.passed for g in gates(good, Limits(), "m"))
    for place, bad in enumerate(({"cer": 1.0}, {"seconds": 99.0}, {"own": 0.34}, {"own": 0.39})):
        worse = [spoken(s.sentence.index, s.sentence.reference.group, **bad) for s in good]
        failed = [i for i, g in enumerate(gates(worse, Limits(), "m")) if not g.passed]
        assert failed == ([2, 3] if place == 2 else [place])


def test_pairs_tell_a_small_change_from_the_noise_between_sentences():
    before = [spoken(i, cer=i / 40) for i in range(30)]
    after = [spoken(i, cer=i / 40 + 0.01 * (i % 2)) for i in range(30)]
    change = paired(before, after)[0]
    assert change.value == pytest.approx(0.005) and 0 < change.interval[0] < change.interval[1] < 0.01
    worse = [spoken(i, cer=i / 40 + 0.05) for i in range(30)]
    found = report({"a": before, "b": worse}, {}, {}, Limits(cer=2, similarity=0, margin=0))
    with pytest.raises(GateFailed, match=r"b: change of CER is 0.05, at most 0.03"):
        found.require()


def test_the_card_is_a_table():
    lines = card({"a": [spoken(0), spoken(1, "unseen")], "b": [spoken(0), spoken(1, "unseen")]}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| mean CER | 0.100 (0.10 to 0.10) |")


def test_a_codec_is_held_to_its_gates():
    found = report({}, {"a": [Decoded("seen", "t", 0.0, 0.06, 0.6, 1e-6)]}, {}, Limits())
    assert [g.passed for g in found.gates] == [False, True, True]


def test_a_toy_is_spoken_judged_and_kept(
    toy_folder: Path, tmp_path: Path, ears: GuessingEars, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "_most_frames", lambda sentence: 4)
    asked = [str(toy_folder), "-n", "4", "--out", str(tmp_path / "out"), "--gate"]
    assert bench.run(bench.parse(asked)) == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    rows = results["utterances"]["base"]
    assert len(rows) == 4 and all((tmp_path / "out" / row["wav"]).exists() for row in rows)
    assert all(row["cer"] > 0.5 for row in rows)
    assert "mean CER" in (tmp_path / "out/card.md").read_text() and "mean CER" in capsys.readouterr().out
    assert "<audio" in (tmp_path / "out/report.html").read_text()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out/base").iterdir()}
    (tmp_path / "out/base/02.wav").unlink()
    bench.run(bench.parse([*asked, "--json"]))
    assert {f for f, t in before.items() if f.stat().st_mtime_ns != t} == {
        tmp_path / "out/base/02.wav", tmp_path / "out/base/02.json"
    }  # fmt: skip
    assert ears.n_heard == 5
    assert json.loads(capsys.readouterr().out)["utterances"]["base"][2] == rows[2]
    bench.run(bench.parse([*asked, "--seed", "1", "--in-context", "--layout", "whole", "--temperature", "0.5"]))
    assert ears.n_heard == 9


def test_the_codec_alone(toy_tts: TTS, tmp_path: Path, ears: GuessingEars):
    kit = tmp_path / "kit"
    kit.mkdir()
    sound = 0.1 * np.random.default_rng(0).standard_normal(12000).astype(np.float32)
    audio.write(kit / "a.wav", Audio(sound, 24000))
    (kit / "clips.jsonl").write_text(json.dumps({"file": "a.wav", "text": "the same old words", "group": "seen"}))
    judges = bench.Judges.open(None)
    found = bench.judge_codec(toy_tts, judges, tmp_path, lambda *_: None, kit)
    assert found == bench.judge_codec(toy_tts, judges, tmp_path, lambda *_: None, kit)
    assert ears.n_heard == 2 and found[0].cer == 0 and found[0].stream_error < 1e-4


def test_a_missing_judge_and_twins_are_refused(toy_folder: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["voice.py", "tiny", "--judges", str(tmp_path), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "whisper-base is missing" in capsys.readouterr().err and not (tmp_path / "o").exists()
    with pytest.raises(RecipeError, match="two models are named base"):
        bench.run(bench.parse([str(toy_folder), "--int4", str(toy_folder)]))


def test_true_codes_stay_true_and_the_others_are_the_predictors(toy_tts: TTS) -> None:
    torch.manual_seed(0)
    codes = torch.randint(60, (6, 16))
    voice = toy_tts.voice(str(SOUND))
    with torch.inference_mode():
        (found,) = toy_tts.force([toy_tts.prompt(Utterance("A word or two.", "english", voice))], [codes])
        greedy = Sampling(0.0, 0, 1.0, 1.0)
        assert torch.equal(oracle.with_own(toy_tts, found, codes, 16, greedy), codes)
        mixed = oracle.with_own(toy_tts, found, codes, 4, greedy)
        assert torch.equal(mixed[:, :4], codes[:, :4])
        # Known codes give the predictor's own logits back: the likeliest code each time.
        assert torch.equal(mixed[:, 4], found.residual[:, 3].argmax(-1))
        whole = oracle.without_last(toy_tts, codes, 16).samples
        np.testing.assert_allclose(whole, bench.decode(toy_tts, codes).samples, atol=1e-5)
        assert np.abs(oracle.without_last(toy_tts, codes, 1).samples - whole).max() > 1e-4

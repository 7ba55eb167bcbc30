"""The judges without their weights: error rates, filterbanks, lengths, intervals, and one that is missing."""

import importlib.util
import sys
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quaver import audio, judge
from quaver.audio import Audio
from quaver.errors import AudioError, MissingExtra, RecipeError
from quaver.model.tts import references

TEXTS = st.text("abc '.XYZ", max_size=24)


@pytest.mark.parametrize(
    ("heard", "said", "rate"),
    [
        ("the cat sat", "The cat sat.", 0),
        ("the bat sat", "The cat sat.", 1 / 11),
        ("the cat", "The cat sat.", 4 / 11),
        ("", "The cat sat.", 1),
        ("blah " * 50, "Hi.", 1),
        ("it's  fine", "It\u2019s fine", 1 / 9),
        ("kitten", "sitting", 3 / 7),
    ],
)
def test_cer_counts_edits_of_plain_text(heard, said, rate):
    assert judge.cer(heard, said) == pytest.approx(rate)


@given(TEXTS, TEXTS)
def test_cer_lies_between_0_and_1_and_hears_no_punctuation(heard, said):
    assert 0 <= judge.cer(heard, said) <= 1
    assert judge.cer(said.upper() + "!", said) == 0
    assert (judge.cer(heard, said) == 0) == (judge.plain(heard) == judge.plain(said))


@pytest.mark.parametrize(
    ("heard", "said", "rate"),
    [
        ("the cat sat", "The cat sat.", 0),
        ("the bat sat", "The cat sat.", 1 / 3),
        ("the cat", "The cat sat down.", 2 / 4),
        ("", "The cat sat.", 1),
        ("blah " * 50, "Hi.", 1),
    ],
)
def test_wer_counts_edits_of_words(heard, said, rate):
    assert judge.wer(heard, said) == pytest.approx(rate)


def test_languages_without_spaces_have_no_words_and_no_spaces_to_miss():
    assert judge.wer("你好", "你好。", "chinese") is None and judge.wer("はい", "はい。", "japanese") is None
    assert judge.wer("비가 와요", "비가 와요.", "korean") == 0
    # Whisper puts spaces and the text puts commas where it likes.
    for language in ("chinese", "japanese", "korean"):
        assert judge.cer("雨停 了以后 孩子", "雨停了以后，孩子。", language) == 0
    assert judge.cer("雨停了以后，孩子", "雨停了以后孩子") > 0
    assert judge.cer("雨停了以后孩", "雨停了以后，孩子。", "chinese") == pytest.approx(1 / 7)


def test_a_runaway_is_four_times_what_the_letters_need():
    assert judge.most_seconds("Hi.") == 4
    assert judge.most_seconds("a" * 48 + "?!") == 16


def test_filterbanks_are_kaldis():
    """Golden numbers of kaldi-native-fbank 1.22 (Hamming, no dither, 80 bins) for a sweep, a tone and a click train."""
    t = np.arange(8000) / 16000
    sweep = 0.3 * np.sin(2 * np.pi * (200 * t + 900 * t * t)) + 0.1 * np.sin(2 * np.pi * 3000 * t)
    frames = judge.log_mels((sweep + 0.05 * np.sign(np.sin(2 * np.pi * 77 * t)) + 0.02).astype(np.float32))
    assert frames.shape == (48, 80)
    golden = [
        [16.4312, 19.4552, 15.5877, 17.0614, 17.8656, 17.8485, 18.0983, 18.3871, 18.7067],
        [16.4857, 15.1061, 23.0430, 17.0375, 17.8821, 17.8456, 18.1170, 18.3753, 18.7127],
        [16.3973, 15.4787, 15.8958, 25.2188, 17.9546, 17.8912, 18.0882, 18.3845, 18.7109],
    ]
    np.testing.assert_allclose(frames[[0, 20, 47]][:, [0, 9, 19, 29, 39, 49, 59, 69, 79]], golden, atol=2e-4)


def test_silence_and_scraps_have_filterbanks_too():
    assert judge.log_mels(np.zeros(399, np.float32)).shape == (0, 80)
    assert np.isfinite(judge.log_mels(np.zeros(1600, np.float32))).all()


def test_speech_is_measured_without_the_silence_around_it():
    sound = np.zeros(48000, np.float32)
    sound[12000:36000] = np.sin(np.arange(24000) / 9)
    sound[20000:24000] = 0
    assert judge.speech_seconds(Audio(sound, 24000)) == pytest.approx(1, abs=0.03)
    assert judge.speech_seconds(Audio(np.zeros(24000, np.float32), 24000)) == 0
    assert judge.speech_seconds(Audio(np.zeros(3, np.float32), 24000)) == 0


def test_silence_before_speech_is_measured_to_its_loud_part():
    sound = np.zeros(24000, np.float32)
    sound[6000:18000] = 0.5
    sound[3000:6000] = 0.001
    assert judge.leading_silence(Audio(sound, 24000)) == pytest.approx(0.25, abs=0.02)
    assert judge.leading_silence(Audio(np.zeros(24000, np.float32), 24000)) == 1
    assert judge.leading_silence(Audio(np.zeros(0, np.float32), 24000)) == 0


def test_intervals_are_repeatable_and_hold_the_mean():
    values = np.random.default_rng(0).normal(0.3, 0.1, 200).tolist()
    low, high = judge.interval(values)
    assert (low, high) == judge.interval(values) != judge.interval(values, seed=2)
    # 1.96 standard errors each way; the bootstrap's own noise is about a fiftieth of that.
    assert low < np.mean(values) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 200**0.5, rel=0.1)
    assert judge.interval([0.5]) == (0.5, 0.5)


def test_judges_are_found_in_a_folder(tmp_path: Path):
    with pytest.raises(RecipeError, match="whisper-base is missing: put Systran/faster-whisper-base"):
        judge.resolve("whisper", tmp_path)
    (tmp_path / "whisper-base").mkdir()
    assert judge.resolve("whisper", tmp_path) == tmp_path / "whisper-base"
    with pytest.raises(RecipeError, match="wespeaker-resnet34.onnx is missing"):
        judge.resolve("voices", tmp_path)


def test_judges_come_from_the_hub_or_the_error_says_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert judge.resolve("whisper") == tmp_path
    with pytest.raises(RecipeError, match="no .onnx file"):
        judge.resolve("voices")
    (tmp_path / "some.onnx").touch()
    assert judge.resolve("voices") == tmp_path / "some.onnx"
    assert set(asked) == {"Systran/faster-whisper-base", "Wespeaker/wespeaker-voxceleb-resnet34-LM"}

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(RecipeError, match=r"no network.*put it as wespeaker-resnet34.onnx into a folder"):
        judge.resolve("voices")


def test_a_missing_extra_is_an_error_with_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'quaver\[judge\]'"):
        judge.Whisper(tmp_path)
    for open_one in (judge.Voices, judge.Quality, judge.Judges.find):
        with pytest.raises(MissingExtra, match=r"pip install 'quaver\[judge\]'"):
            open_one(tmp_path)


def test_all_judges_are_found_before_any_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("faster_whisper", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    package = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "speechmos")])
    found = {"speechmos": None}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    with pytest.raises(MissingExtra, match="speechmos is not installed"):
        judge.Judges.find(tmp_path)
    found["speechmos"] = package
    with pytest.raises(RecipeError, match=r"sig_bak_ovr\.onnx is missing"):
        judge.Judges.find(tmp_path)
    files = "whisper-base/model.bin", "wespeaker-resnet34.onnx", "speechmos/dnsmos_models/sig_bak_ovr.onnx"
    for number, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]))
    judges = judge.Judges.find(tmp_path)
    assert judges == judge.Judges(tmp_path / "whisper-base", tmp_path / files[1], tmp_path / files[2])
    assert list(judges.sums()) == ["Whisper base", "WeSpeaker ResNet34", "DNSMOS P.835"]
    assert len(set(judges.sums().values())) == 3


def test_whisper_hears_16_khz_greedily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heard = {}

    class Model:
        def __init__(self, path: str, **how: object) -> None:
            heard["path"] = path

        def transcribe(self, samples: np.ndarray, **how: object):
            heard.update(n=len(samples), **how)
            return [types.SimpleNamespace(text=" Two "), types.SimpleNamespace(text="parts.")], None

    monkeypatch.setitem(sys.modules, "faster_whisper", types.SimpleNamespace(WhisperModel=Model))
    ears = judge.Whisper(tmp_path)
    assert ears.hear(Audio(np.zeros(24000, np.float32), 24000)) == "Two parts."
    assert heard["n"] == 16000 and heard["beam_size"] == 1 and heard["language"] == "en"
    assert heard["path"] == str(tmp_path) and heard["initial_prompt"] is None
    ears.hear(Audio(np.zeros(24000, np.float32), 24000), None)
    assert heard["language"] is None and heard["initial_prompt"] is None
    # Without it Whisper may answer in the old characters, each of them an error.
    ears.hear(Audio(np.zeros(24000, np.float32), 24000), "zh")
    assert heard["initial_prompt"] == "以下是普通话的句子。"


def test_voices_are_unit_vectors_of_centred_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Session:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_inputs(self):
            return [types.SimpleNamespace(name="feats")]

        def run(self, _: None, feeds: dict[str, np.ndarray]):
            frames = feeds["feats"]
            assert frames.dtype == np.float32 and frames.shape[0] == 1 and frames.shape[2] == 80
            assert abs(frames.mean(1)).max() < 1e-4
            return [np.array([[3.0, 4.0]])]

    runtime = types.SimpleNamespace(SessionOptions=types.SimpleNamespace, InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    voices = judge.Voices(tmp_path)
    sound = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    np.testing.assert_allclose(voices.embed(Audio(sound, 24000)), [0.6, 0.8])
    with pytest.raises(AudioError, match="more than 0.1 s is needed"):
        voices.embed(Audio(sound[:2400], 24000))


def tone(seconds: float) -> Audio:
    t = np.arange(round(seconds * 16000)) / 16000
    sweep = np.sin(2 * np.pi * (120 + 20 * t) * t) + 0.4 * np.sin(2 * np.pi * 950 * t)
    return Audio((0.2 * sweep * np.abs(np.sin(2 * np.pi * 1.7 * t))).astype(np.float32), 16000)


@pytest.mark.parametrize(("seconds", "starts"), [(0.5, 7), (4.04, 7), (9.01, 1), (12.0, 3), (12.9, 3), (30.5, 21)])
def test_quality_is_the_mean_of_stretches_a_second_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, starts: int
):
    asked = []

    class Session:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_inputs(self):
            return [types.SimpleNamespace(name="sound")]

        def run(self, _: None, feeds: dict[str, np.ndarray]):
            asked.append(feeds["sound"])
            return [np.array([[0.0, 0.0, float(len(asked))]])]

    runtime = types.SimpleNamespace(SessionOptions=types.SimpleNamespace, InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    sound = tone(seconds)
    score = judge.Quality(tmp_path).rate(sound)
    samples = sound.samples
    while len(samples) < 144160:
        samples = np.append(samples, samples)
    assert len(asked) == starts
    for number, stretch in enumerate(asked):
        np.testing.assert_array_equal(stretch[0], samples[16000 * number :][:144160])
    raw = np.arange(1, starts + 1)
    assert score == pytest.approx(np.mean(-0.06766283 * raw**2 + 1.11546468 * raw + 0.04602535))
    with pytest.raises(AudioError, match="0 s"):
        judge.Quality(tmp_path).rate(Audio(np.zeros(0, np.float32), 16000))


@pytest.mark.skipif(importlib.util.find_spec("speechmos") is None, reason="speechmos, of the extra judge, is not here")
@pytest.mark.parametrize(("name", "score"), [("af_heart", 3.423496), ("am_michael", 3.253827)])
def test_quality_is_that_of_speechmos(name: str, score: float):
    """Golden numbers of speechmos 0.0.1.1: dnsmos.run(samples, 16000)["ovrl_mos"], resampled by soxr."""
    pytest.importorskip("onnxruntime")
    quality = judge.Quality(judge._quality_weights())
    assert quality.rate(audio.read(references()[name])) == pytest.approx(score, abs=1e-4)

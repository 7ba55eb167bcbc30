"""Speakers and jobs of synthesized speech: no engine is needed."""

import random
from itertools import islice

import numpy as np
import pytest

from training import shards, synthesize

VOICES = [f"{group}_{name}" for group in ("af", "am", "bf", "bm") for name in ("ada", "ben", "cleo", "dan")]


def test_mixtures_lie_on_both_sides_of_the_hull():
    speakers = synthesize.kokoro_speakers([*VOICES, synthesize.WHISPERED])
    assert len(speakers) == len(VOICES) + 1 + synthesize.MIXTURES
    mixtures = [s for s in speakers.values() if len(s["weights"]) > 1]
    assert len(mixtures) == synthesize.MIXTURES
    negative = 0
    for speaker in mixtures:
        shares = sorted(speaker["weights"].values())
        assert sum(shares) == pytest.approx(1, abs=0.003)
        assert synthesize.WHISPERED not in speaker["weights"]
        assert shares[1] > 0
        if shares[0] < 0:
            negative += 1
            assert synthesize.AWAY[0] <= -shares[0] <= synthesize.AWAY[1]
        else:
            assert shares[-1] <= synthesize.HEAVIEST
    assert negative == synthesize.MIXTURES // 2


def test_half_of_the_mixtures_are_resampled_on_either_side_of_the_hull():
    speakers = synthesize.kokoro_speakers(VOICES)
    mixtures = [s for s in speakers.values() if len(s["weights"]) > 1]
    pitches = [s["pitch"] for s in mixtures if s["pitch"] != 1.0]
    assert len(pitches) == pytest.approx(synthesize.MIXTURES / 2, abs=5)
    assert synthesize.PITCHES[0] <= min(pitches) < 0.85
    assert 1.15 < max(pitches) <= synthesize.PITCHES[1]
    outside = [s for s in mixtures if min(s["weights"].values()) < 0]
    assert sum(s["pitch"] != 1.0 for s in outside) == pytest.approx(len(outside) / 2, abs=5)


def test_the_same_speakers_are_found_again():
    assert synthesize.kokoro_speakers(VOICES) == synthesize.kokoro_speakers(VOICES)


@pytest.mark.parametrize(
    ("weights", "british"),
    [
        ({"bf_ada": 1.0}, True),
        ({"af_ada": 0.5, "bf_ada": 0.5}, False),
        ({"bm_ben": 1.3, "af_ada": -0.3}, True),
        ({"af_ada": 1.3, "bm_ben": -0.3}, False),
        ({"bf_ada": 0.8, "af_ada": 0.5, "bm_ben": -0.3}, False),
        ({"bf_ada": 0.6, "am_ben": 0.7, "af_ada": -0.3}, True),
    ],
)
def test_british_by_the_sum_of_the_shares(weights, british):
    assert synthesize.is_british({"weights": weights}) is british


def test_any_prefix_of_turns_covers_the_names_evenly():
    names = [str(i) for i in range(7)]
    turns = list(islice(synthesize.in_turn(names, random.Random(3)), 30))
    counts = [turns.count(name) for name in names]
    assert max(counts) - min(counts) <= 1


def test_jobs_go_round_the_speakers_and_come_back_from_the_file(tmp_path):
    speakers = synthesize.kokoro_speakers(VOICES)
    texts = [{"id": i, "text": "x" * (5 if i % 3 == 0 else 20)} for i in range(4 * len(speakers))]
    jobs = synthesize.make_jobs(texts, speakers, lambda text, _: [1] * len(text), 2 * len(speakers), "kokoro")
    assert all(job["text"] % 3 for job in jobs)
    assert {job["speaker"] for job in jobs[: len(speakers)]} == set(speakers)
    synthesize.write_jobs(tmp_path / "jobs.xz", "kokoro", speakers, jobs)
    assert synthesize.read_jobs(tmp_path / "jobs.xz") == ("kokoro", speakers, jobs)


def _tone(job):
    return 0.3 * np.sin(2 * np.pi * 300 / synthesize.RATE_HZ * np.arange(8000 if job["text"] % 2 else 20000))


def test_speaking_goes_on_after_a_kill_with_the_same_clips(tmp_path, monkeypatch):
    jobs = [{"text": i, "speaker": "p00", "tokens": [1], "tempo": 1.0, "noise": 0.6} for i in range(8)]
    synthesize.write_jobs(tmp_path / "jobs.xz", "piper", {"p00": {"pitch": 1.0}}, jobs)
    monkeypatch.setattr(synthesize, "open_piper", lambda model, speakers: _tone)

    def speak(out, n_workers):
        known = frozenset(t for index in sorted(out.glob("part-*.jsonl")) for t in synthesize.spoken_texts(index))
        for i in range(n_workers):
            asked = synthesize.Work(i, n_workers, tmp_path / "jobs.xz", tmp_path, out, float("inf"), known)
            synthesize.work(asked, [0] * (2 * n_workers))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        out.mkdir()
        speak(out, 2)
    # The second part lost half a line and half a clip, and its last clip with them.
    index, audio = broken / "part-001.jsonl", broken / "part-001.s16"
    index.write_text(index.read_text()[:-20])
    audio.write_bytes(audio.read_bytes()[:-5000])
    (broken / "part-000.jsonl").write_text("")
    speak(broken, 3)

    def clips(out):
        return {c.text: c.read().tobytes() for c in shards.spoken(out)}

    assert clips(broken) == clips(whole)
    assert len(clips(whole)) == 8
    assert len(list(shards.spoken(broken))) == 8

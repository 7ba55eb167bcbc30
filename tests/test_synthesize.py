"""Speakers and jobs of synthesized speech: no engine is needed."""

import random
from itertools import islice

import numpy as np
import pytest

from training import synthesize

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


def test_every_round_has_speakers_of_its_own():
    first, second = (synthesize.kokoro_speakers(VOICES, number) for number in (0, 1))
    assert not first.keys() & second.keys()
    assert len(second) == synthesize.MIXTURES
    assert not any(s in list(first.values()) for s in second.values())


def test_throats_move_apart_from_pitch():
    speakers = [s for s in synthesize.kokoro_speakers(VOICES).values() if len(s["weights"]) > 1]
    low, high = synthesize.FORMANTS
    total = [s["formant"] * s["pitch"] for s in speakers]
    assert low - 0.01 < min(total) < 0.9
    assert 1.1 < max(total) < high + 0.01
    assert sum(abs(x - 1) > 1e-3 for x in total) == pytest.approx(2 / 3 * len(total), abs=15)
    assert abs(np.corrcoef(np.log([s["pitch"] for s in speakers]), np.log(total))[0, 1]) < 0.1
    assert sum(s["bend"] != 0 for s in speakers) == pytest.approx(len(speakers) / 2, abs=15)
    assert sum(any(s["colour"]) for s in speakers) == pytest.approx(len(speakers) / 2, abs=25)
    assert max(abs(db) for s in speakers for db in s["colour"]) <= synthesize.COLOUR_MOST_DB


def test_jobs_go_round_the_speakers_and_come_back_from_the_file(tmp_path):
    speakers = synthesize.kokoro_speakers(VOICES)
    n = len(speakers) + (synthesize.PLAIN_TURNS - 1) * len(VOICES)
    texts = [{"id": i, "text": "x" * (5 if i % 3 == 0 else 20)} for i in range(3 * n)]
    jobs = synthesize.make_jobs(texts, speakers, lambda text, _: [1] * len(text))
    assert all(job["text"] % 3 for job in jobs)
    names = [job["speaker"] for job in jobs[:n]]
    assert set(names) == set(speakers)
    assert {names.count(name) for name, s in speakers.items() if len(s["weights"]) == 1} == {synthesize.PLAIN_TURNS}
    synthesize.write_jobs(tmp_path / "jobs.xz", speakers, jobs)
    assert synthesize.read_jobs(tmp_path / "jobs.xz") == (speakers, jobs)

"""The watch over speech that may never end: what it must see, when, and what it must leave alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quaver.errors import RecipeError
from quaver.guard import CHARACTERS_A_MINUTE, Guard, Length, Watch, length
from quaver.model.tts import Utterance
from quaver.voice import Voice

SENTENCE = "The ferry leaves at six and the harbour is quiet."
TIMES = Length(expected=40, late=80, most=120)
SILENT = 7


def watched(codes, stops=None, times=TIMES, silence=frozenset({SILENT})):
    """The verdict on a whole utterance."""
    watch = Watch(times, lambda: silence)
    for code, stop in zip(codes, stops or [0.0] * len(codes), strict=True):
        if (found := watch.push(code, stop)) is not None:
            return found
    return None


def babble(n, seed=0):
    """Codes that never come twice within a second."""
    return [10 + (seed * 97 + i * 31) % 211 for i in range(n)]


frames = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=140)


@given(frames)
def test_nothing_is_judged_before_the_expected_length_and_all_is_at_the_most(said):
    codes, stops = [code for code, _ in said], [stop for _, stop in said]
    found = watched(codes, stops)
    if found is None:
        assert len(said) < TIMES.most
    else:
        assert TIMES.expected <= found.at <= TIMES.most
        assert 0 < found.keep <= found.at


@given(frames)
def test_what_is_kept_ends_at_a_clean_stop_where_there_is_one(said):
    codes, stops = [code for code, _ in said], [stop for _, stop in said]
    found = watched(codes, stops)
    if found is None:
        return
    clean = [n for n in range(TIMES.expected // 2, found.at) if stops[n] >= 0.03]
    assert found.keep in clean if clean else max(stops[TIMES.expected // 2 : found.at]) < 0.03


@pytest.mark.parametrize("period", [1, 2, 5, 8, 12])
def test_a_loop_is_found_within_three_rounds_or_two_seconds(period):
    before = babble(45)
    rounds = [100 + i for i in range(period)] * 60
    found = watched(before + rounds, times=Length(40, 400, 600))
    assert found is not None and found.sign == "loop"
    assert found.at <= 45 + max(3 * period, 25)


def test_rounds_of_more_than_a_second_are_left_to_the_length():
    found = watched(babble(40) + [100 + i for i in range(30)] * 20)
    assert found is not None and found.sign == "length"


def test_silence_is_found_though_other_codes_come_between():
    pause = [SILENT] * 9 + [50] + [SILENT] * 14 + [51]
    found = watched(babble(45) + pause * 2, times=Length(40, 400, 600))
    assert found is not None and found.sign == "silence"
    assert found.at <= 45 + 26
    assert found.keep == 45


def test_a_pause_of_a_second_and_a_half_is_speech():
    codes = babble(50) + [SILENT] * 19 + babble(10, seed=1)
    assert watched(codes) is None


def test_slow_speech_is_left_alone():
    """Twice as long as expected, and the model sees no end before the end."""
    assert watched(babble(80), [0.0] * 79 + [0.9]) is None


def test_speech_that_passed_its_stop_is_cut_there():
    stops = [0.0] * 120
    stops[44], stops[77] = 0.4, 0.3
    found = watched(babble(120), stops)
    assert found is not None
    assert (found.sign, found.at, found.keep) == ("passed its stop", 80, 44)


def test_a_stop_just_seen_may_still_come():
    stops = [0.0] * 85
    stops[78] = 0.4
    assert watched(babble(85), stops) is None


def test_a_probability_that_is_no_stop_is_none():
    found = watched(babble(200), [0.01] * 200)
    assert found is not None
    assert (found.sign, found.at, found.keep) == ("length", 120, 80)


def test_one_watch_knows_nothing_of_another():
    dice = random.Random(1)
    rows = [[dice.randrange(9) for _ in range(130)] for _ in range(4)]
    alone = [watched(row) for row in rows]
    watches = [Watch(TIMES, lambda: frozenset({SILENT})) for _ in rows]
    together = [None] * 4
    for codes in zip(*rows, strict=True):
        for index, code in enumerate(codes):
            together[index] = together[index] or watches[index].push(code, 0.0)
    assert together == alone


@pytest.mark.parametrize("language", [*CHARACTERS_A_MINUTE, "auto"])
def test_more_text_takes_longer_in_every_language(language):
    text = {"chinese": "水管里面是什么", "japanese": "水道管の中には何が", "korean": "물은 어디에서"}.get(
        language, SENTENCE
    )
    one, two = (length(Utterance(text * n, language)) for n in (1, 2))
    assert 0 < one.expected < one.late < one.most
    assert one.expected < two.expected < 2 * one.expected
    assert 1.0 < one.expected / 12.5 < 5.0


def test_what_takes_longer_than_its_letters():
    def expected(text, language="english"):
        return length(Utterance(text, language)).expected

    assert expected("It was 1973.") > expected("It was then.")
    assert expected("The BBC said so.") > expected("The two said so.")
    assert expected("100 % of it") > expected("all of it, all")
    assert expected("水管里面是什么", "auto") == expected("水管里面是什么", "chinese")


def test_pauses_and_instructions_are_waited_for():
    plain = length(Utterance("She waited and then she left.", "english"))
    paused = length(Utterance("She waited... and then, she left.", "english"))
    told = length(Utterance("She waited and then she left.", "english", instruct="Very slowly."))
    assert paused.late - plain.late > 2 * 0.6 * 12.5 - 2
    assert told.expected == plain.expected
    assert told.late == pytest.approx(2 * plain.late, abs=1)


def test_a_slow_speaker_has_time_and_a_fast_one_is_not_hurried():
    def pace(n_frames):
        voice = Voice("x", torch.ones(4), torch.zeros(n_frames, 16, dtype=torch.long), SENTENCE)
        return length(Utterance(SENTENCE, "english", voice)).expected

    plain = length(Utterance(SENTENCE, "english")).expected
    assert pace(2 * plain) == pytest.approx(2 * plain, abs=2)
    assert pace(plain // 2) == plain
    assert pace(20 * plain) == pytest.approx(3 * plain, abs=3)


def test_retries_that_cannot_be():
    with pytest.raises(RecipeError, match="retries is -1"):
        Guard(retries=-1)

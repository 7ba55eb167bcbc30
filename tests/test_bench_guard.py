"""The bench of the guard: its counts on made-up speech, and a run on a toy that is broken off and repeated."""

from __future__ import annotations

from dataclasses import replace

import torch

import guard as bench
from quaver.guard import Runaway
from quaver.judge import most_seconds

SAID = bench.Said(
    "The ferry leaves at six.", "a", 0, torch.zeros(30, 16, dtype=torch.long), torch.zeros(30), ended=True
)


def seen(n_frames, runaway=None, *, ended=True):
    said = replace(SAID, codes=torch.zeros(n_frames, 16, dtype=torch.long), stop=torch.zeros(n_frames), ended=ended)
    return bench.Seen(said, runaway, expected=22)


def test_the_counts_do_not_ask_the_guard_what_a_runaway_is():
    far = int(most_seconds(SAID.text) * 12.5) + 10
    row = bench.figures(
        "made up",
        [
            seen(25),
            seen(40, Runaway("silence", 40, 24)),
            seen(far, Runaway("length", 66, 50)),
            seen(far, None),
            seen(45, Runaway("loop", 45, 20), ended=False),
        ],
    )
    assert (row["n"], row["runaways before"], row["runaways after"]) == (5, 3, 1)
    assert (row["cut"], row["cut though it ended in time"]) == (3, 1)
    assert row["cut to a length that healthy speech has"] == 2
    assert row["signs"] == {"silence": 1, "length": 1, "loop": 1}
    assert row["frames with"] == 25 + 40 + 66 + far + 45


def test_speech_is_kept_and_made_again_only_when_it_was_made_otherwise(toy_tts, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_BATCH", 2)
    group = bench.Group("toy", ["Hello.", "You there."], 3)
    plan = bench.plan_of(group)
    assert len(plan) == 3 and len({name for _, name, _ in plan}) > 1
    told = lambda *_: None  # noqa: E731
    first = bench.speak(toy_tts, group, plan, tmp_path, told)
    assert [len(one.stop) for one in first] == [len(one.codes) for one in first]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = bench.speak(toy_tts, group, plan, tmp_path, told)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(first, again, strict=True))
    hot = replace(group, sampling={"temperature": 2.0})
    other = bench.speak(toy_tts, hot, plan, tmp_path, told)
    assert not all(torch.equal(a.codes, b.codes) for a, b in zip(first, other, strict=True))


def test_a_deafened_model_stops_less(toy_tts):
    broken = bench.TTS.load(bench.deaf(0.0)(toy_tts.checkpoint))
    stop_id = toy_tts.config.talker_config.codec_eos_token_id
    assert not broken.talker.codec_head.weight[stop_id].any()
    others = [i for i in range(len(broken.talker.codec_head.weight)) if i != stop_id]
    assert torch.equal(broken.talker.codec_head.weight[others], toy_tts.talker.codec_head.weight[others])

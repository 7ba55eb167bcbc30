"""The decode loop and what is made of it: laws 5 and 6, seeds, streams and joins, on a toy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import toy
from quaver.checkpoint import Checkpoint
from quaver.engine import Engine, Knobs
from quaver.errors import RecipeError, VoiceError
from quaver.guard import Guard, length
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.sampling import ENDED, Sampling, distribution
from quaver.voice import Voice

SPEAKER = torch.randn(128, generator=torch.Generator().manual_seed(5))
VOICE = Voice(name="x", speaker=SPEAKER)
HELLO = Utterance("Hello there, you.", "english", VOICE, seed=3)
GREEDY = Knobs(Sampling(temperature=0.0, penalty=1.0), Sampling(temperature=0.0, penalty=1.0), 30)
SHORT = Knobs(Sampling(), Sampling(penalty=1.0), 20)


@pytest.fixture(scope="module")
def engine(toy_folder):
    return Engine(TTS.load(Checkpoint.open(toy_folder).edit(Step("test"), toy.never_stop)))


def test_greedy_frames_fed_back_are_their_own_argmax(engine):
    prompt = engine.tts.prompt(HELLO)
    codes = engine.codes([prompt], [0], GREEDY)[0]
    assert codes.shape == (30, 16)
    logits = engine.tts.force([prompt], [codes])[0]
    assert torch.equal(logits.residual.argmax(-1), codes[:, 1:])
    for frame in range(30):
        banned = engine.tts.suppressed(stop_too=frame < 2)
        _, best = distribution(logits.talker[frame][None], GREEDY.sampling, banned=banned)
        assert best[0, 0] == codes[frame, 0]


def test_a_seed_fixes_the_codes_and_a_knob_changes_them(engine):
    prompt = engine.tts.prompt(HELLO)

    def codes(seed, knobs=SHORT):
        return engine.codes([prompt], [seed], knobs)[0]

    assert torch.equal(codes(1), codes(1))
    assert not torch.equal(codes(1), codes(2))
    assert not torch.equal(codes(1), codes(1, replace(SHORT, sampling=Sampling(temperature=0.3))))
    assert not torch.equal(codes(1), codes(1, replace(SHORT, residual=Sampling(temperature=0.3))))


def test_a_row_does_not_depend_on_the_batch(engine):
    prompts = [
        engine.tts.prompt(replace(HELLO, text=text)) for text in ("One.", "Quite a bit longer than one.", "Two!")
    ]
    together = engine.codes(prompts, [7, 8, 9], SHORT)
    for prompt, seed, codes in zip(prompts, [7, 8, 9], together, strict=True):
        assert torch.equal(engine.codes([prompt], [seed], SHORT)[0], codes)


def test_rows_stop_by_themselves(toy_tts):
    engine = Engine(toy_tts)
    prompts = [toy_tts.prompt(replace(HELLO, text=text)) for text in ("One.", "Two, three.", "Four.")]
    knobs = Knobs(Sampling(temperature=2.0, top_k=0), Sampling(), 40)
    steps = torch.stack([frame.codes for frame in engine.frames(prompts, [1, 2, 3], knobs)])
    lengths = (steps[:, :, 0] != ENDED).sum(0)
    assert len(set(lengths.tolist())) > 1
    for row, n_frames in enumerate(lengths):
        assert (steps[:n_frames, row] >= 0).all()
        assert (steps[n_frames:, row] == ENDED).all()
        assert n_frames >= 2
        assert torch.equal(engine.codes([prompts[row]], [row + 1], knobs)[0], steps[:n_frames, row])


@pytest.mark.parametrize("chunk_frames", [1, 3, 4, 20, 50])
def test_a_stream_is_the_whole(engine, chunk_frames):
    """Law 7 through the engine: chunking never changes a sample beyond float rounding."""
    whole = engine.say(HELLO, SHORT)
    chunks = list(engine.speak(HELLO, SHORT, chunk_frames=chunk_frames))
    joined = np.concatenate([chunk.audio.samples for chunk in chunks])
    assert len(joined) == 20 * 1920 == len(whole.audio.samples)
    assert np.abs(joined - whole.audio.samples).max() < 1e-5
    assert sum(chunk.n_frames for chunk in chunks) == 20
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert whole.finish_reasons == ("length",)


def test_in_context_speech_leaves_the_reference_out(engine):
    codes = torch.randint(0, toy.N_CODES, (6, 16), generator=torch.Generator().manual_seed(1))
    voice = Voice(name="icl", speaker=SPEAKER, codes=codes, text="What it says.")
    utterance = replace(HELLO, voice=voice)
    speech = engine.say(utterance, SHORT)
    assert len(speech.audio.samples) == 20 * 1920
    spoken = engine.codes([engine.tts.prompt(utterance)], [3], SHORT)[0]
    with torch.inference_mode():
        both = engine.tts.decoder(torch.cat((codes, spoken)).T[None]).flatten()
    expected = both[6 * 1920 :].numpy()
    middle = slice(200, -200)
    assert np.abs(speech.audio.samples[middle] - expected[middle]).max() < 1e-5


def test_long_text_is_joined_without_clicks(engine):
    text = "This is one sentence. This is the second one! And is this a third?"
    speech = engine.say(replace(HELLO, text=text), SHORT)
    assert len(speech.finish_reasons) == 3
    samples, gap = speech.audio.samples, round(0.12 * 24000)
    assert len(samples) == 3 * 20 * 1920 + 2 * gap
    loudest = np.abs(samples).max()
    for end in (38400, 38400 + gap, 2 * 38400 + gap, 2 * 38400 + 2 * gap):
        # Across a join the samples stay within 2 % of the loudest: a click is a jump.
        assert np.abs(samples[end - 2 : end + 2]).max() < 0.02 * loudest
    assert np.abs(samples[0]) < 0.02 * loudest
    assert np.abs(samples[-1]) < 0.02 * loudest


def test_sentences_have_seeds_of_their_own(engine):
    speech = engine.say(replace(HELLO, text="Same words here. Same words here."), SHORT).audio.samples
    half = 20 * 1920
    assert not np.allclose(speech[:half], speech[-half:], atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": ""}, RecipeError, "empty"),
        ({"text": "  \n"}, RecipeError, "empty"),
        ({"language": "klingon"}, RecipeError, "'klingon' is unknown.*auto, chinese, english, spanish"),
        ({"language": "beijing_dialect"}, RecipeError, "is unknown"),
        ({"voice": None}, VoiceError, "speaks in a cloned voice only"),
        ({"voice": Voice(name="p", preset="anna")}, VoiceError, "has no speaker vector"),
        ({"voice": Voice(name="w", speaker=torch.ones(7))}, VoiceError, "has 7 values, this model's have 128"),
        (
            {"voice": Voice(name="c", speaker=SPEAKER, codes=torch.full((2, 16), 64), text="a")},
            VoiceError,
            "codes above",
        ),
        (
            {"voice": Voice(name="c", speaker=SPEAKER, codes=torch.ones(2, 8).long(), text="a")},
            VoiceError,
            "8 codebooks",
        ),
        ({"instruct": "Louder"}, RecipeError, "takes no instruction"),
        ({"layout": "sideways"}, RecipeError, "layout 'sideways'"),
    ],
)
def test_requests_that_cannot_be(engine, changes, error, message):
    with pytest.raises(error, match=message):
        engine.speak(replace(HELLO, **changes), SHORT)


def test_presets_and_instructions_of_other_kinds(tmp_path):
    custom = TTS.load(toy.checkpoint(tmp_path / "c", "custom_voice"))
    with pytest.raises(VoiceError, match="one of anna, dylan"):
        custom.prompt(replace(HELLO, voice=None))
    with pytest.raises(VoiceError, match="no voice known here.*anna, dylan"):
        custom.voice("bob")
    assert custom.voice("Anna").preset == "anna"
    from quaver.audio import Audio

    with pytest.raises(VoiceError, match="cannot clone"):
        custom.enroll(Audio(np.ones(24000, np.float32), 24000))
    designed = TTS.load(toy.checkpoint(tmp_path / "d", "voice_design"))
    with pytest.raises(VoiceError, match="takes no voice"):
        designed.prompt(HELLO)


def test_enrolling(engine):
    from quaver.audio import Audio
    from quaver.errors import AudioError

    generator = np.random.default_rng(0)
    noise = generator.standard_normal(16000 * 2).astype(np.float32) * 0.1
    voice = engine.tts.enroll(Audio(noise, 16000), text="Some words.", name="n")
    assert voice.speaker.shape == (128,)
    assert voice.codes.shape == (25, 16)
    assert engine.tts.enroll(Audio(noise, 16000)).codes is None
    for bad, message in (
        (np.zeros(48000, np.float32), "silent"),
        (noise[:96], "lasts 0.004 s"),
        (np.full(48000, np.nan, np.float32), "NaN"),
    ):
        with pytest.raises(AudioError, match=message):
            engine.tts.enroll(Audio(bad, 24000))


def test_forcing_rows_of_any_length_is_forcing_each(engine):
    prompts = [engine.tts.prompt(replace(HELLO, text=text)) for text in ("Hm.", "A longer row of text.")]
    codes = [torch.randint(0, toy.N_CODES, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (3, 11)]
    together = engine.tts.force(prompts, codes)
    for prompt, frames, logits in zip(prompts, codes, together, strict=True):
        alone = engine.tts.force([prompt], [frames])[0]
        assert logits.talker.shape == (len(frames) + 1, 1088)
        assert torch.allclose(alone.talker, logits.talker, atol=1e-4)
        assert torch.allclose(alone.residual, logits.residual, atol=1e-4)


LONG = Knobs(Sampling(), Sampling(penalty=1.0), 200)
RUNS, STOPS = 0, 1
"""Seeds with which the toy goes on beyond what the text can take, and with which it ends by itself."""


def test_stop_probabilities_are_those_of_forced_speech(toy_tts):
    engine, knobs = Engine(toy_tts), replace(GREEDY, sampling=Sampling(temperature=2.0))
    prompts = [toy_tts.prompt(HELLO), toy_tts.prompt(replace(HELLO, text="Two words, or four."))]
    frames = list(engine.frames(prompts, [1, 2], knobs))
    for row, prompt in enumerate(prompts):
        codes = torch.stack([frame.codes[row] for frame in frames])
        codes = codes[codes[:, 0] != ENDED]
        stop = torch.stack([frame.stop[row] for frame in frames])[: len(codes)]
        expected = toy_tts.force([prompt], [codes])[0].talker[:-1].softmax(-1)[:, toy.STOP_ID]
        assert torch.allclose(stop, expected, atol=1e-6)


def test_healthy_speech_is_the_same_with_a_guard_and_without(toy_tts):
    engine = Engine(toy_tts)
    healthy = replace(HELLO, seed=STOPS)
    plain, guarded = engine.say(healthy, LONG, guard=None), engine.say(healthy, LONG)
    assert plain.finish_reasons == guarded.finish_reasons == ("stop",)
    assert np.array_equal(plain.audio.samples, guarded.audio.samples)


def test_speech_that_never_ends_is_cut_and_told(toy_tts):
    engine = Engine(toy_tts)
    endless = replace(HELLO, seed=RUNS)
    times = length(endless)
    plain, cut = engine.say(endless, LONG, guard=None), engine.say(endless, LONG)
    assert plain.n_frames > times.most
    assert cut.finish_reasons == ("runaway-trimmed",)
    assert cut.n_frames <= times.late
    # The last 5 ms are faded.
    same = cut.n_frames * 1920 - 120
    assert len(cut.audio.samples) == cut.n_frames * 1920
    assert np.abs(cut.audio.samples[:same] - plain.audio.samples[:same]).max() < 1e-5


@pytest.mark.parametrize("chunk_frames", [1, 4, 12, 100])
def test_a_stream_that_never_ends_begins_as_the_whole_and_ends_as_soon(toy_tts, chunk_frames):
    engine = Engine(toy_tts)
    endless = replace(HELLO, seed=RUNS)
    whole = engine.say(endless, LONG)
    chunks = list(engine.speak(endless, LONG, chunk_frames=chunk_frames))
    joined = np.concatenate([chunk.audio.samples for chunk in chunks])
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["runaway-trimmed"]
    assert whole.n_frames <= sum(chunk.n_frames for chunk in chunks) <= length(endless).most
    same = len(whole.audio.samples) - 120
    assert np.abs(joined[:same] - whole.audio.samples[:same]).max() < 1e-5
    if chunk_frames == 100:
        assert len(joined) == len(whole.audio.samples)


def test_a_sentence_is_tried_again_with_the_next_seed(toy_tts):
    engine = Engine(toy_tts)
    endless = replace(HELLO, seed=RUNS)
    speech = engine.say(endless, LONG, guard=Guard(retries=1))
    again = engine.say(replace(HELLO, seed=RUNS + 1), LONG)
    assert speech.finish_reasons == ("runaway-retried",) and again.finish_reasons == ("stop",)
    assert np.array_equal(speech.audio.samples, again.audio.samples)


def test_where_no_seed_ends_the_first_is_cut(engine):
    seeds = (0, 1)
    for seed in seeds:
        assert engine.say(replace(HELLO, seed=seed), LONG).finish_reasons == ("runaway-trimmed",)
    first = engine.say(replace(HELLO, seed=seeds[0]), LONG)
    tried = engine.say(replace(HELLO, seed=seeds[0]), LONG, guard=Guard(retries=1))
    assert tried.finish_reasons == ("runaway-trimmed",)
    assert np.array_equal(tried.audio.samples, first.audio.samples)


def test_what_was_sent_cannot_be_tried_again(engine):
    with pytest.raises(RecipeError, match="retries is 1: sound that was sent"):
        engine.speak(HELLO, SHORT, guard=Guard(retries=1))


def test_codes_are_the_models_own(toy_tts):
    """Calibration, validation and the benches ask for codes: no guard is in their way."""
    engine = Engine(toy_tts)
    codes = engine.codes([toy_tts.prompt(HELLO)], [RUNS], LONG)[0]
    assert len(codes) > length(HELLO).most

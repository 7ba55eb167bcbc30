"""The decode loop and what is made of it: laws 5 and 6, seeds, streams and joins, on a toy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import toy
from quaver.checkpoint import Checkpoint
from quaver.engine import ENDED, Engine, Knobs
from quaver.errors import RecipeError, VoiceError
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.sampling import Sampling, distribution
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
    for row, length in enumerate(lengths):
        assert (steps[:length, row] >= 0).all()
        assert (steps[length:, row] == ENDED).all()
        assert length >= 2
        assert torch.equal(engine.codes([prompts[row]], [row + 1], knobs)[0], steps[:length, row])


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
        both = engine.tts.codec.decoder(torch.cat((codes, spoken)).T[None]).flatten()
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

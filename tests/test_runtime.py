"""What speaking takes: told beforehand, held to, and survived where it is too much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from quaver import audio, cli, meter, plan, runtime
from quaver.checkpoint import Checkpoint
from quaver.engine import Engine, Knobs
from quaver.errors import BudgetError, CheckpointError
from quaver.guard import length
from quaver.int4 import Int4Linear
from quaver.model import codec, sparing
from quaver.model.homes import HELD, Placement
from quaver.model.talker import Talker
from quaver.model.tts import TTS, Utterance, references
from quaver.provenance import Step
from quaver.runtime import PLACEMENTS, Request
from quaver.sampling import Sampling
from quaver.voice import Voice

PUBLISHED = Path(__file__).parent / "oracle" / "published"
SPEAKER = torch.randn(128, generator=torch.Generator().manual_seed(5))
HELLO = Utterance("Hello there, you.", "english", Voice(name="x", speaker=SPEAKER))
ALL_ON_HOST = Placement(tables_on_host=True, sound_on_host=True)
BRIEF = Knobs(Sampling(0.0), Sampling(0.0), 6)


def published(profile, shape="1.7b"):
    return plan.imagined(
        PUBLISHED / f"config-{shape}-base.json", profile, codec=PUBLISHED / "speech_tokenizer-config.json"
    )


@pytest.fixture(scope="module")
def steady(toy_folder):
    """A toy that never stops."""
    return Checkpoint.open(toy_folder).edit(Step("test"), toy.never_stop)


def held(tts):
    """The bytes of everything that a loaded model holds."""
    modules = (*tts.model.modules(), *tts.decoder.modules())
    tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    packed = sum(m.weight_bytes for m in modules if isinstance(m, Int4Linear))
    return packed + sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_the_weights_told_are_those_that_are_held(toy_folder, tmp_path, kind):
    checkpoint = Checkpoint.open(toy_folder) if kind == "plain" else toy.rounded(toy_folder, tmp_path / "int4")
    told = runtime.weigh(checkpoint, Request.seconds(1))
    others = ("cache of", "text, codes", "state of")
    weights = sum(line.device_bytes for line in told.held if not line.name.startswith(others))
    assert weights == held(TTS.load(checkpoint))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_told_is_the_cache(toy_tts, dtype):
    told = runtime.weigh(toy_tts.checkpoint, Request(100, 20, 3), dtype=dtype)
    cache = toy_tts.talker.cache(3, told.request.n_positions, torch.zeros(1, dtype=dtype))
    wanted = cache.keys.nbytes + cache.values.nbytes + cache.turns.cos.nbytes // 2 + cache.turns.sin.nbytes // 2
    assert told.request.n_positions == 128
    assert {line.name: line.device_bytes for line in told.held}["cache of 128 positions"] == wanted


def test_the_published_1_7b_speaks_30_s_in_1_2_gb():
    found = runtime.fit(published("int4"), Request.seconds(30), "cuda", 1_200_000_000)
    assert found.placement == ALL_ON_HOST
    lines = {line.name: line for line in found.held}
    # 1,409.3 M weights in half a byte, with 2 bytes of scale and one of zero point for 128 of them; and the norms.
    assert 737e6 < lines["talker layers"].device_bytes < 739e6
    assert lines["text embedding"] == runtime.Line("text embedding", 0, 151_936 * 2048 * 2)
    assert lines["codec decoder"].device_bytes < 5e6
    assert "speaker encoder" not in lines
    assert "codec encoder" not in lines
    roomy = runtime.fit(published("int4"), Request.seconds(30), "cuda", 2_000_000_000)
    assert roomy.placement == HELD
    peaks = [runtime.weigh(published("int4"), Request.seconds(30), "cuda", one).peak_bytes for one in PLACEMENTS]
    assert max(peaks) == peaks[0]
    assert min(peaks) == peaks[-1]


def test_what_does_not_fit_is_refused_with_the_figures():
    with pytest.raises(BudgetError, match=r"takes 1,1\d\d\.\d MB .* 900\.0 MB are allowed: the cache takes 5\d"):
        runtime.fit(published("int4"), Request.seconds(30), "cuda", 900_000_000)
    with pytest.raises(BudgetError, match="2 utterances"):
        runtime.fit(published("int4"), Request(375, 64, 2), "cuda", 900_000_000)


def test_where_weights_are_makes_no_difference(steady, monkeypatch):
    monkeypatch.setattr(sparing, "PART", 1 << 10)
    here = Engine(TTS.load(steady, placement=ALL_ON_HOST)).say(HELLO, BRIEF)
    there = Engine(TTS.load(steady)).say(HELLO, BRIEF)
    assert (here.audio.samples == there.audio.samples).all()


@pytest.mark.parametrize(("dtype", "least_db"), [(torch.float16, 60), (torch.bfloat16, 35)], ids=str)
def test_sound_of_weights_kept_in_half(dtype, least_db, monkeypatch):
    plain, half = TTS.load("tiny"), TTS.load("tiny", sound_dtype=dtype)
    assert half.decoder.pre_conv.conv.weight.dtype == dtype
    recording = audio.read(references()["af_heart"])
    codes = plain.enroll(recording, text="so").codes[:20]
    with torch.no_grad():
        wanted, found = (tts.decoder(codes.T[None])[0] for tts in (plain, half))
    # The weights that ship are float16 themselves.
    error = (wanted - found).square().sum()
    assert not error or 10 * torch.log10(wanted.square().sum() / error) > least_db
    monkeypatch.setattr(sparing, "PART", 1 << 14)
    stream = half.decoder.stream()
    streamed = torch.cat([stream.push(part) for part in codes.split(7)])
    assert torch.allclose(streamed, found, atol=1e-4)


def test_weights_that_are_laid_out_anew_are_what_they_were(steady, tmp_path):
    tts = TTS.load(toy.rounded(steady.path, tmp_path / "int4"))
    held = list(tts.tensors())
    before = [one.clone() for one in held]
    meter.repack(tts.device, held)
    assert all(torch.equal(one, was) for one, was in zip(tts.tensors(), before, strict=True))
    # Views stay views, and what others own, as the host does what it lends, stays where it is.
    whole, lent = torch.arange(6.0), torch.from_numpy(np.ones(3))
    parts, address = whole.split(3), lent.data_ptr()
    meter.repack(whole.device, [*parts, lent, torch.empty(0)])
    parts[0].zero_()
    assert whole.tolist() == [0, 0, 0, 3, 4, 5]
    assert lent.data_ptr() == address
    assert lent.tolist() == [1, 1, 1]


def test_a_weight_beyond_half_precision_is_refused(steady):
    def grow(name, tensor):
        return {name: tensor * 1e9 if name == "decoder.pre_transformer.input_proj.weight" else tensor}

    monstrous = steady.edit(Step("test"), lambda name, tensor: {name: tensor}, codec=grow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_LARGE", 1)
        with pytest.raises(CheckpointError, match=r"decoder.pre_transformer.input_proj.weight leaves the range"):
            TTS.load(monstrous, sound_dtype=torch.float16)
    TTS.load(monstrous)


def test_encoders_are_there_for_a_moment(toy_tts):
    recording = audio.read(references()["af_heart"])
    voice = toy_tts.enroll(recording, text="Hello.")
    assert toy_tts.model.speaker_encoder is None
    assert not hasattr(toy_tts.decoder, "encoder")
    assert torch.equal(voice.speaker, toy_tts.enroll(recording).speaker)


def test_a_cache_is_as_long_as_the_text_can_take(steady, monkeypatch):
    sizes, plain = [], Talker.cache

    def noted(self, batch, capacity, like):
        sizes.append(capacity)
        return plain(self, batch, capacity, like)

    monkeypatch.setattr(Talker, "cache", noted)
    engine = Engine(TTS.load(steady))
    speech = engine.say(HELLO)
    most = length(HELLO).most
    assert sizes == [len(engine.tts.prompt(HELLO).embeds) + most]
    assert speech.finish_reasons == ("runaway-trimmed",)
    # Without a guard, as long as the model may speak.
    engine.say(HELLO, replace(BRIEF, max_frames=4), guard=None)
    assert sizes[1] == sizes[0] - most + 4


def fails_once(monkeypatch, owner, name, error):
    """Makes a method raise ``error`` at its next call."""
    plain, calls = getattr(owner, name), []

    def method(self, *args):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return plain(self, *args)

    monkeypatch.setattr(owner, name, method)


CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 8 GiB. See documentation for PyTorch"
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.parametrize(
    ("owner", "name", "error", "told"),
    [
        (Talker, "cache", CUDA, r"Tried to allocate 3\.50 GiB\): say less"),
        (Talker, "cache", CPU, "you tried to allocate 9 bytes"),
        (Talker, "embed_frames", MemoryError(), "the machine has no more"),
        (codec.CodecStream, "push", CUDA, r"Tried to allocate 3\.50 GiB"),
    ],
    ids=["cache", "cache on a CPU", "a frame", "sound"],
)
def test_the_engine_is_usable_after_memory_ran_out(steady, monkeypatch, owner, name, error, told):
    engine = Engine(TTS.load(steady))
    wanted = engine.say(HELLO, BRIEF).audio.samples
    fails_once(monkeypatch, owner, name, error)
    with pytest.raises(BudgetError, match=told) as caught:
        engine.say(HELLO, BRIEF)
    # Nothing of what was at work is held by the error.
    assert caught.value.__context__ is None
    assert (engine.say(HELLO, BRIEF).audio.samples == wanted).all()


@pytest.mark.parametrize("memory_bytes", [None, 1 << 40])
def test_a_model_that_is_too_large_to_load_is_told(steady, monkeypatch, memory_bytes):
    def fails(*_, **__):
        raise CUDA

    monkeypatch.setattr(TTS, "load", fails)
    with pytest.raises(BudgetError, match=r"was brought to cpu \(CUDA out of memory\. Tried .*smaller model") as caught:
        Engine.load(steady, memory_bytes=memory_bytes)
    assert caught.value.__context__ is None


def test_other_errors_are_not_taken_for_a_lack_of_memory(steady, monkeypatch):
    fails_once(monkeypatch, Talker, "cache", RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Engine(TTS.load(steady)).say(HELLO, BRIEF)
    assert meter.shortage(RuntimeError("shapes do not match")) is None


def test_an_engine_keeps_to_its_memory(steady):
    needs = runtime.weigh(steady, Request.seconds(1)).peak_bytes
    engine = Engine.load(steady, memory_bytes=needs, room_s=1)
    assert engine.say(HELLO, BRIEF).n_frames == 6
    with pytest.raises(BudgetError, match=r"of up to 81\.9 s at a time"):
        engine.speak(HELLO, replace(BRIEF, max_frames=1024), guard=None)
    with pytest.raises(BudgetError, match="3 utterances"):
        engine.codes([engine.tts.prompt(HELLO)] * 3, [1, 2, 3], replace(BRIEF, max_frames=100))
    assert engine.say(HELLO, BRIEF).n_frames == 6
    with pytest.raises(BudgetError, match="are allowed"):
        Engine.load(steady, memory_bytes=needs // 2)


def test_the_verb_tells_line_by_line(toy_folder, capsys, tmp_path):
    told = ["info", str(toy_folder), "--runtime", "--device", "cuda"]
    assert cli.run(told) == 0
    text = capsys.readouterr().out
    assert "text embedding                              0.0" in text
    assert "cache of 448 positions" in text
    assert cli.run([*told, "--json", "--memory", "1GB", "--seconds", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    told_so = runtime.weigh(Checkpoint.open(toy_folder), Request.seconds(2), "cuda", limited=True)
    assert found["peak_bytes"] == told_so.peak_bytes
    config = PUBLISHED / "config-1.7b-base.json"
    alone = ["info", str(config), "--runtime", "--codec", str(PUBLISHED / "speech_tokenizer-config.json")]
    assert cli.run([*alone, "--profile", "int4", "--device", "cuda", "--memory", "1.2GB"]) == 0
    assert "of 1,200.0 MB allowed" in capsys.readouterr().out
    for wrong, why in (
        ([*told, "--memory", "1MB"], "1.0 MB are allowed"),
        ([*told, "--seconds", "0"], "--seconds is 0"),
        (["info", str(toy_folder), "--memory", "1GB"], "add it, or see quaver plan"),
        (["info", str(config), "--runtime"], "name it with --codec"),
    ):
        assert cli.run(wrong) == 2
        assert why in capsys.readouterr().err


def test_say_refuses_before_it_loads(toy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TTS, "load", lambda *_, **__: pytest.fail("it was loaded"))
    out = tmp_path / "out.wav"
    assert cli.run(["say", str(toy_folder), "Hello.", "-o", str(out), "--memory", "1MB"]) == 2
    assert "1.0 MB are allowed" in capsys.readouterr().err
    assert not out.exists()

"""What the training code promises: plans are the model's own prompts, and quantizer surgery changes no function."""

from __future__ import annotations

import torch

import toy
from quaver.config import CodecConfig, parse
from quaver.model.codec_encoder import Codec
from quaver.model.tts import TTS, Utterance
from quaver.voice import Voice
from training import quantizer
from training.plans import Planner, Speech


def test_a_plan_sums_to_the_models_own_inputs(toy_tts: TTS) -> None:
    torch.manual_seed(0)
    codes, vector = torch.randint(toy.N_CODES, (20, 16)), torch.randn(128)
    planner = Planner(toy_tts.config, toy_tts.tokenizer, n_positions=96)
    reference, said = Speech("One.", 0, 0, 8), Speech("Two and three.", 0, 8, 12)
    talker = toy_tts.talker
    for language in ("auto", "english"):
        for layout in ("stream", "whole"):
            for heard in (None, reference):
                plan = planner.plan(said, language, layout, heard)
                assert plan is not None
                text, codec, frame = (torch.from_numpy(x).long() for x in (plan.text, plan.codec, plan.frame))
                with torch.no_grad():
                    x = talker.embed_text(text) + talker.embed_codec(codec.clamp(min=0)) * (codec >= 0)[:, None]
                    x += talker.embed_frames(codes[frame.clamp(min=0)]) * (frame >= 0)[:, None]
                x[plan.speaker] += vector
                voice = Voice("v", vector, codes[:8] if heard else None, heard.text if heard else None)
                prompt = toy_tts.prompt(Utterance(said.text, language, voice, layout=layout))
                expected = toy_tts.inputs(prompt, codes[8:])
                assert plan.first == len(prompt.embeds) - 1
                torch.testing.assert_close(x[: len(expected)], expected, rtol=0, atol=1e-6)
                assert plan.target[plan.first : plan.first + 12].tolist() == list(range(8, 20))
                assert (plan.target >= 0).sum() == 12


def test_a_plan_that_is_too_long_is_none(toy_tts: TTS) -> None:
    planner = Planner(toy_tts.config, toy_tts.tokenizer, n_positions=24)
    assert planner.plan(Speech("One.", 0, 0, 4), "auto", "stream") is not None
    assert planner.plan(Speech("One.", 0, 0, 24), "auto", "stream") is None


def _codec() -> Codec:
    torch.manual_seed(0)
    return Codec(parse(CodecConfig, toy.codec_settings(), "toy"))


def test_widening_keeps_the_function_and_evens_out_the_axes() -> None:
    codec = _codec()
    # As wide as the projection: then no axis is lost and the function must be the same.
    latents = torch.randn(4000, 16) * torch.logspace(0, -1.5, 16) @ torch.randn(16, 32)
    whole = latents.T[None]
    before = quantizer.unquantized(codec, whole)
    quantizer.widen(codec, latents)
    after = quantizer.unquantized(codec, whole)
    assert (after - before).norm() / before.norm() < 1e-2
    projected = codec.encoder.quantizer.acoustic.input_proj(whole)[0]
    spread = projected.square().mean(1).sqrt()
    assert spread.max() / spread.min() < 10.0


def test_codebooks_by_k_means_code_better_than_chance_and_export_fits_the_decoder() -> None:
    codec = _codec()
    latents = torch.randn(600, 32)
    quantizer.widen(codec, latents)
    quantizer.start(codec, latents, usage=2.0)
    found = quantizer.quantize(codec, latents.T[None])
    assert found.codes.shape == (16, 600)
    assert found.residuals[-1].var() < 0.3 * found.residuals[1].var()
    quantizer.export(codec)
    decoded = codec.decoder.quantizer.decode(found.codes[None])
    torch.testing.assert_close(decoded, found.latents, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(codec.encoder.quantizer.encode(latents.T[None], 16)[0], found.codes)


def test_narrowness_sees_dead_parallel_and_loud_dimensions() -> None:
    torch.manual_seed(0)
    good = 0.9 * torch.randn(5000, 16)
    dead, parallel = good.clone(), good.clone()
    dead[:, 8:] *= 1e-3
    parallel[:, 1:] = good[:, :1]
    baseline = float(quantizer.narrowness(good, spread=True))
    assert baseline < 0.01
    for bad in (dead, parallel, 3.0 * good):
        assert float(quantizer.narrowness(bad, spread=True)) > baseline + 0.2


def test_unused_codes_are_moved_onto_the_batch() -> None:
    codec = _codec()
    found = quantizer.quantize(codec, torch.randn(1, 32, 300))
    counts, sums = quantizer.statistics(found, toy.N_CODES)
    assert counts.sum(1).tolist() == [300.0] * 16
    for _ in range(400):
        quantizer.follow(codec, counts, sums)
    unused = int((counts == 0).sum())
    assert unused > 0
    assert quantizer.revive(codec, found.residuals) == unused

"""What the training code promises: plans are the model's own prompts, and quantizer surgery changes no function."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import toy
from quaver.config import CodecConfig, parse
from quaver.model.codec_encoder import Codec
from quaver.model.tts import TTS, Utterance
from quaver.text import Tokenizer
from quaver.verify import verify
from quaver.voice import Voice
from training import export, quantizer, recipe, stack
from training.latents import COLUMNS, SHARES, WIDTHS, Features, Latents, by_column
from training.plans import Planner, Speech, length
from training.tokenizer import learn, spelled, write


def _speech(rows: list[tuple[int, int, int, int]]) -> Speech:
    return Speech(*torch.tensor(rows).T)


def test_plans_sum_to_the_models_own_inputs(toy_tts: TTS) -> None:
    torch.manual_seed(0)
    codes, vector = torch.randint(toy.N_CODES, (20, 16)), torch.randn(128)
    words = ["One.", "Two and three, which are more.", "Two."]
    ids = [toy_tts.tokenizer.encode(text) for text in words]
    at = [0, len(ids[0]), len(ids[0]) + len(ids[1])]
    planner = Planner(toy_tts.config, toy_tts.tokenizer, torch.tensor([i for some in ids for i in some]))
    cases = [
        (said, told, whole, unnamed)
        for said in (1, 2)
        for told in (False, True)
        for whole in (False, True)
        for unnamed in (False, True)
    ]
    said = _speech([(at[c[0]], len(ids[c[0]]), 8, 12) for c in cases])
    reference = _speech([(at[0], len(ids[0]) * c[1], 0, 8 * c[1]) for c in cases])
    whole, unnamed = torch.tensor([c[2] for c in cases]), torch.tensor([c[3] for c in cases])
    n_positions = length(said.n_text, said.n_frames, reference.n_text, reference.n_frames, whole, unnamed)
    plan = planner.plan(said, reference, whole, unnamed, int(n_positions.max()) + 3)
    talker = toy_tts.talker
    with torch.no_grad():
        x = talker.embed_text(plan.text) + talker.embed_codec(plan.codec.clamp(min=0)) * (plan.codec >= 0)[..., None]
        x += talker.embed_frames(codes[plan.frame.clamp(min=0)]) * (plan.frame >= 0)[..., None]
    for i, (spoken, told, first, open_) in enumerate(cases):
        x[i, plan.speaker[i]] += vector
        voice = Voice("v", vector, codes[:8] if told else None, words[0] if told else None)
        language, layout = "auto" if open_ else "english", "whole" if first else "stream"
        prompt = toy_tts.prompt(Utterance(words[spoken], language, voice, layout=layout))
        expected = toy_tts.inputs(prompt, codes[8:])
        assert len(expected) == n_positions[i]
        assert plan.first[i] == len(prompt.embeds) - 1
        torch.testing.assert_close(x[i, : len(expected)], expected, rtol=0, atol=1e-6)
        assert plan.frame[i][plan.own[i]].tolist() == list(range(8, 20))
        if len(ids[spoken]) < 9:
            assert plan.text[i, plan.spoken[i]] == ids[spoken][0]


def test_the_trained_stack_is_the_models_own(toy_tts: TTS) -> None:
    torch.manual_seed(0)
    talker, x = toy_tts.talker, torch.randn(2, 9, 128)
    with torch.no_grad():
        found, heads = stack.states(talker.model, x, (1,))
        torch.testing.assert_close(found, talker.hidden(x), rtol=1e-4, atol=1e-5)
        codes = torch.randint(toy.N_CODES, (5, 16))
        tables, rows = stack.code_tables(talker), stack.code_rows(talker, torch.device("cpu"))
        torch.testing.assert_close(tables[codes + rows].sum(1), talker.embed_frames(codes), rtol=1e-4, atol=1e-5)
        given = tables[codes[:, :-1] + rows[:-1]]
        expected = talker.code_predictor.force(x[0, :5], talker.embed_codec(codes[:, 0]), codes[:, 1:])
        torch.testing.assert_close(stack.force(talker.code_predictor, x[0, :5], given), expected, rtol=1e-4, atol=1e-5)
    assert [part.shape for part in heads[0]] == [(2, 9, 32), (2, 9, 32)]
    assert stack.agreement(talker, torch.device("cpu")) == 0.0


def test_a_head_that_looks_where_it_should_has_not_strayed() -> None:
    position = torch.eye(6)[None]
    query, paced = torch.tensor([[3, 4, 5]]), torch.ones(1, 3)
    welcome = torch.full((1, 3, 6), -30.0)
    welcome[0, range(3), range(3)] = 0.0
    follows = position.roll(-3, dims=1)
    following = float(stack.strayed((40.0 * follows.roll(6, 1), position), query, welcome.roll(0), paced))
    wandering = float(stack.strayed((40.0 * position, position), query, welcome, paced))
    assert following < 0.2 < 2.0 < wandering


def test_spellings_say_the_same_text(toy_tts: TTS) -> None:
    tokenizer = learn(["the cat sat on the other mat"] * 50)
    with TemporaryDirectory() as folder:
        write(tokenizer, Path(folder))
        ours = Tokenizer.load(folder)
    texts = ["The cat sat on the mat.", "Another cat, 12 mats"]
    for text, variants in zip(texts, spelled(ours, texts, dropout=0.5), strict=True):
        assert variants[0] == ours.ids_speech(text)[3:-5] == ours.encode(text)
        assert any(len(ids) > len(variants[0]) for ids in variants[1:])


def _codec() -> Codec:
    torch.manual_seed(0)
    return Codec(parse(CodecConfig, toy.codec_settings(), "toy"))


def test_aimed_projections_tell_their_targets() -> None:
    encoder = _codec().encoder
    samples = torch.randn(2, 200 * encoder.samples_per_frame)
    with torch.no_grad():
        latents = encoder.latents(samples).transpose(1, 2).flatten(0, 1)
        wanted = latents @ torch.randn(32, 16), latents @ torch.randn(32, 16)
        quantizer.aim(encoder, latents, wanted)
        for told, target in zip(quantizer.to_code(encoder, samples), wanted, strict=True):
            torch.testing.assert_close(told.flatten(0, 1), target, atol=2e-3 * float(target.std()), rtol=1e-2)


def test_codebooks_by_k_means_code_better_than_chance_and_export_fits_the_decoder() -> None:
    codec = _codec()
    latents = torch.randn(600, 32)
    said, sound = (branch.input_proj(latents.T[None])[0].T.detach() for branch, _ in quantizer.branches(codec))
    first = quantizer.fit(said, 1, toy.N_CODES)
    rest = quantizer.fit(sound, 15, toy.N_CODES)
    codes, total = quantizer.coded(sound, rest)
    assert codes.shape == (15, 600)
    assert (total - sound).var() < 0.3 * (quantizer.coded(sound, rest[:1])[1] - sound).var()
    quantizer.install(codec.encoder, torch.cat((first, rest)))
    quantizer.export(codec)
    found = codec.encoder.quantizer.encode(latents.T[None], 16)
    assert torch.equal(found[0, 1:], codes)
    (_, read), (_, project) = quantizer.branches(codec)
    expected = read(quantizer.coded(said, first)[1].T[None]) + project(total.T[None])
    torch.testing.assert_close(codec.decoder.quantizer.decode(found), expected, rtol=1e-3, atol=1e-4)


def test_pictures_follow_the_sound() -> None:
    features, frame = Features(), recipe.SAMPLES_PER_FRAME
    time_ = torch.arange(8 * frame) / 24_000
    low, high = (torch.sin(2 * torch.pi * hz * time_)[None] for hz in (300.0, 3000.0))
    pictures = features.pictures(torch.cat((low, high))).view(2, 8, COLUMNS, -1)
    bins = pictures[:, 2:6].argmax(-1).unique(dim=2)
    assert bins.shape == (2, 4, 1)
    assert bool((bins[0] < bins[1]).all())
    # A sound in the third frame alone is seen in no other frame but by what a window overlaps.
    click = torch.zeros(1, 8 * frame)
    click[0, 2 * frame + frame // 2] = 1.0
    loud = features.pictures(click).view(8, COLUMNS, -1).amax((1, 2))
    assert int(loud.argmax()) == 2
    assert float(loud[[0, 1, 3, 4]].max()) < float(loud[2]) - 3.0


def test_pitch_and_hum_are_those_of_a_gliding_voice() -> None:
    time_ = torch.arange(20.0 * recipe.SAMPLES_PER_FRAME) / 24_000
    hz = 130.0 + 25.0 * torch.sin(2 * torch.pi * 1.5 * time_)
    phase = 2 * torch.pi * hz.cumsum(0) / 24_000
    voice = 0.05 * torch.stack([torch.cos(k * phase) / k for k in range(1, 20)]).sum(0)
    pitch, hum = (x[0, 8:-8] for x in Features().voice(voice[None]))
    at = torch.arange(8, 20 * COLUMNS - 8) * recipe.SAMPLES_PER_FRAME // COLUMNS
    assert float(pitch[:, 0].min()) > 0.4
    found = 160.0 * (0.35 * pitch[:, 1] / (pitch[:, 0] + 0.5)).exp()
    assert float((found / hz[at] - 1.0).abs().max()) < 0.01
    wave = torch.cos(phase[at[0] :][::24][: hum.numel()])
    likeness = torch.nn.functional.cosine_similarity(hum.flatten(), wave, dim=0)
    assert float(likeness) > 0.99
    # Noise has no pitch, and so no hum.
    pitch, hum = Features().voice(0.05 * torch.randn(1, 40 * recipe.SAMPLES_PER_FRAME))
    assert float(pitch[..., 0].mean()) < -0.4
    assert float(hum.square().mean()) < 0.02


def test_latents_have_the_principal_axes_of_what_is_told() -> None:
    torch.manual_seed(0)
    latents, frame = Latents(32), recipe.SAMPLES_PER_FRAME
    batches = [torch.randn(4, 6 * frame) * torch.rand(4, 6).repeat_interleave(frame, 1) for _ in range(12)]
    explained = latents.fit(batches)
    assert 0.3 < explained <= 1.0
    features = torch.cat([latents.features(x) for x in batches])
    found = latents(features).flatten(0, 1)
    torch.testing.assert_close(found.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.std(0), latents.spread, rtol=1e-2, atol=1e-4)
    assert bool((latents.spread[:-1] >= latents.spread[1:] - 1e-4).all())
    told = latents.told(latents(features), features)
    weighed = sum(SHARES[kind] * share for kind, share in told.items()) / sum(SHARES.values())
    assert abs(weighed - explained) < 0.02
    halves = by_column(features, 4)
    assert halves.shape == (48, 24, features.shape[-1] // 4)
    torch.testing.assert_close(halves[0, 0, : WIDTHS["picture"] // 4], features[0, 0, : WIDTHS["picture"] // 4])


def test_what_is_exported_is_summed(toy_tts: TTS, tmp_path: Path) -> None:
    checkpoint = toy_tts.checkpoint
    state, codec = dict(checkpoint.tensors()), dict(checkpoint.codec_tensors())
    export.checkpoint(tmp_path / "out", checkpoint.path, state, codec)
    found = verify(tmp_path / "out")
    assert found.steps == (f"training.export {metadata.version('quaver')}",)
    assert found.n_tensors == len(state) + len(codec)

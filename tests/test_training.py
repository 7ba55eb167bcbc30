"""What the training code promises: plans are the model's own prompts, and quantizer surgery changes no function."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import toy
from quaver.config import CodecConfig, parse
from quaver.model.codec_encoder import Codec
from quaver.model.tts import TTS, Utterance
from quaver.text import Tokenizer
from quaver.voice import Voice
from training import quantizer, recipe, stack
from training.patches import COLUMNS, Patches
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


def test_aimed_projections_tell_their_targets_and_the_decoder_reads_on() -> None:
    codec = _codec()
    latents = torch.randn(4000, 32)
    semantic, acoustic = (latents @ torch.linalg.qr(torch.randn(32, 32))[0]).chunk(2, dim=1)
    semantic = semantic.clone()
    known = (torch.arange(4000) % 2).float()
    # Where nothing is known the targets are none.
    semantic[known == 0] = 1e3
    whole = latents.T[None]
    before = quantizer.unquantized(codec, whole)
    explained = quantizer.aim(codec, latents, (semantic, acoustic), known)
    assert min(explained) > 0.999
    told = quantizer.to_code(codec, whole)
    torch.testing.assert_close(told[0][0][known > 0], semantic[known > 0], atol=0.05, rtol=0.01)
    torch.testing.assert_close(told[1][0], acoustic, atol=0.05, rtol=0.01)
    # Sixteen and sixteen dimensions tell all of thirty-two: then the function must be the same.
    after = quantizer.unquantized(codec, whole)
    assert (after - before).norm() / before.norm() < 1e-2


def test_brightened_dimensions_are_all_seen_by_the_decoder() -> None:
    codec = _codec()
    latents = torch.randn(4000, 32)
    (_, _), (acoustic, project) = quantizer.branches(codec)
    assert isinstance(acoustic.input_proj, torch.nn.Conv1d)
    assert isinstance(project, torch.nn.Conv1d)
    with torch.no_grad():
        # The decoder reads the first half alone, and the second half is faint.
        acoustic.input_proj.weight[8:] *= 1e-2
        project.weight[:, 8:] = 0.0
    before = project.weight.detach().clone()
    quantizer.brighten(codec, latents)
    told = latents @ acoustic.input_proj.weight[:, :, 0].T
    added = ((project.weight - before)[:, :, 0] * told.std(0)).detach()
    loud = added.square().sum(0)
    assert float(loud.max() / loud.min()) < 1.2
    assert float(loud.min()) > 0.0


def test_codebooks_by_k_means_code_better_than_chance_and_export_fits_the_decoder() -> None:
    codec = _codec()
    latents = torch.randn(600, 32)
    quantizer.start(codec, latents, usage=2.0)
    found = quantizer.quantize(codec, latents.T[None])
    assert found.codes.shape == (16, 600)
    assert found.residuals[-1].var() < 0.3 * found.residuals[1].var()
    quantizer.export(codec)
    decoded = codec.decoder.quantizer.decode(found.codes[None])
    torch.testing.assert_close(decoded, found.latents, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(codec.encoder.quantizer.encode(latents.T[None], 16)[0], found.codes)


def test_pictures_of_frames_follow_the_sound_and_have_components_of_unit_power() -> None:
    torch.manual_seed(0)
    patches = Patches(32)
    frame = recipe.SAMPLES_PER_FRAME
    time_ = torch.arange(8 * frame) / 24_000
    low, high = (torch.sin(2 * torch.pi * hz * time_)[None] for hz in (300.0, 3000.0))
    pictures = patches.pictures(torch.cat((low, high))).view(2, 8, COLUMNS, -1)
    bins = pictures[:, 2:6].argmax(-1).unique(dim=2)
    assert bins.shape == (2, 4, 1)
    assert bool((bins[0] < bins[1]).all())
    # A sound in the third frame alone is seen in no other frame but by what a window overlaps.
    click = torch.zeros(1, 8 * frame)
    click[0, 2 * frame + frame // 2] = 1.0
    loud = patches.pictures(click)[0].amax(1)
    assert int(loud.argmax()) == 2
    assert float(loud[[0, 1, 3, 4]].max()) < float(loud[2]) - 3.0
    batches = [torch.randn(4, 6 * frame) * torch.rand(4, 6).repeat_interleave(frame, 1) for _ in range(12)]
    assert 0.5 < patches.fit(batches) <= 1.0
    found = torch.cat([patches.components(patches.pictures(x)).flatten(0, 1) for x in batches])
    torch.testing.assert_close(found.mean(0), torch.zeros(32), atol=1e-2, rtol=0)
    assert abs(float(found.square().mean()) - 1.0) < 1e-3
    spread = found.std(0)
    assert bool((spread[:-1] >= spread[1:] - 1e-4).all())


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

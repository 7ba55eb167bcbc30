"""What the talker's training promises: once the talker is settled, the code predictor alone goes on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from quaver.model.tts import TTS, Model
from training import own, recipe, shards, talker


def _trainer(toy_tts: TTS) -> talker.Trainer:
    torch.manual_seed(0)
    texts = {i: f"the {word} is on the table" for i, word in enumerate(("lamp", "book", "cup", "map"), start=1)}
    n_frames = torch.tensor([12, 15, 10, 9], dtype=torch.int16)
    codes = torch.randint(recipe.N_CODES, (int(n_frames.sum()), recipe.N_CODEBOOKS), dtype=torch.int16)
    speakers = torch.tensor([0, 1, 0, 1], dtype=torch.int16)
    encoded = shards.Encoded(codes, torch.arange(1, 5, dtype=torch.int32), speakers, n_frames, ["a", "b"])
    references = np.random.default_rng(0).integers(-9000, 9000, (2, shards.N_REFERENCE)).astype(np.int16)
    settings = dataclasses.replace(
        recipe.TalkerRecipe(total_s=100.0), budget=400, n_rows=4, n_frames=8, n_frames_settled=16
    )
    examples = talker.Examples(encoded, references, texts, toy_tts.tokenizer, settings, torch.device("cpu"))
    config = talker.config_of(toy_tts.tokenizer, toy=True)
    model, books = Model(config), torch.randn(recipe.N_CODEBOOKS, recipe.N_CODES, 64)
    trainer = talker.Trainer(model.train(), examples, books, toy_tts.tokenizer, config)
    talker.initialise(model, trainer.readout, books)
    return trainer


def test_once_settled_the_code_predictor_alone_learns(toy_tts: TTS) -> None:
    trainer = _trainer(toy_tts)
    predictor = {n for n, _ in trainer.model.named_parameters() if "code_predictor" in n and "codec_embedding" not in n}
    batches = trainer.examples.batches()

    def changed(elapsed_s: float) -> set[str]:
        trainer.pace(elapsed_s)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.step(next(batches))
        return {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}

    assert not trainer.settled
    early = changed(20.0)
    assert predictor <= early
    assert "talker.model.layers.0.mlp.up_proj.weight" in early
    assert not any(name.startswith("speaker_encoder") for name in early)
    late = changed(80.0)
    assert trainer.settled
    # Neither the talker's own weights nor the tables by which it hears the codes.
    assert late <= predictor
    assert "talker.code_predictor.model.layers.0.mlp.up_proj.weight" in late
    assert trainer.n_failed == 0


def test_a_step_that_is_not_finite_is_left_out_and_after_five_in_a_row_the_run_goes_back(toy_tts: TTS) -> None:
    trainer = _trainer(toy_tts)
    batches = trainer.examples.batches()
    trainer.pace(20.0)
    trainer.step(next(batches))
    before = [p.detach().clone() for p in trainer.parameters]
    real = trainer.loss
    trainer.loss = lambda batch: real(batch) * float("nan")
    for n_failed in range(1, 5):
        trainer.step(next(batches))
        trainer.secure()
        assert trainer.n_failed == n_failed
    assert all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))
    with torch.no_grad():
        trainer.parameters[0].fill_(torch.nan)
    for n_returned in range(1, 4):
        for _ in range(5):
            trainer.step(next(batches))
        trainer.secure()
        assert trainer.n_returns == n_returned
        assert all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))
    for _ in range(5):
        trainer.step(next(batches))
    with pytest.raises(FloatingPointError, match="five in a row"):
        trainer.secure()
    trainer.loss = real
    trainer.step(next(batches))
    assert all(p.isfinite().all() for p in trainer.parameters)
    assert not all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))


def test_it_takes_the_voices_that_were_learnt_before_and_some_references_must_do_without(toy_tts: TTS) -> None:
    trainer = _trainer(toy_tts)
    learnt = {n: torch.randn_like(p) for n, p in trainer.encoder.named_parameters()}
    trainer.hear(learnt)
    assert all(torch.equal(p, learnt[n]) for n, p in trainer.encoder.named_parameters())
    assert all(torch.equal(trainer.averaged()[f"speaker_encoder.{n}"], p) for n, p in learnt.items())
    speakers = torch.zeros(200, dtype=torch.long)
    told = torch.arange(200) < 100
    vectors = trainer.vectors(speakers, told, 4)
    silent = (vectors == 0.0).all(1)
    assert 0.2 < float(silent[:100].float().mean()) < 0.6
    assert not silent[100:].any()
    assert not torch.equal(vectors[100], vectors[101])


def test_what_it_says_itself_is_the_predictors_and_only_where_it_was_asked(
    toy_tts: TTS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "OWN_TEMPERATURES", (1e-6, 1e-6))
    trainer = _trainer(toy_tts)
    sayer, examples = own.Sayer(trainer), trainer.examples
    hidden, first = torch.randn(5, trainer.readout.in_features), torch.randint(recipe.N_CODES, (5,))
    said = sayer.rest(hidden, first)
    talker_ = trainer.model.talker
    logits = talker_.code_predictor.force(hidden, talker_.model.codec_embedding(first), said)
    assert torch.equal(said, logits.argmax(-1))
    codes = sayer.say(np.array([1, 3]), lambda _: None)
    assert torch.equal(codes[:, 0], examples.codes[:, 0])
    starts, lengths = examples.on_device["start"], examples.on_device["n_frames"]
    for clip in range(4):
        frames = slice(int(starts[clip]), int(starts[clip] + lengths[clip]))
        changed = (codes[frames, 1:] != examples.codes[frames, 1:]).float().mean()
        assert changed > 0.9 if clip in (1, 3) else changed == 0.0


def test_batches_have_few_shapes_and_room_for_all_that_is_in_them(toy_tts: TTS) -> None:
    trainer = _trainer(toy_tts)
    examples, settings = trainer.examples, trainer.settings
    clips = np.repeat(examples.trained, 9)
    batches = examples.round(clips)
    seen = np.concatenate([batch.rows[0].numpy() for batch in batches])
    assert set(seen) == set(clips)
    for batch in batches:
        assert batch.n_positions in settings.lengths
        assert batch.rows.shape == (6, min(settings.n_rows, max(1, settings.budget // batch.n_positions)))
        n_frames = examples.n_frames[batch.rows[0].numpy()]
        assert n_frames.max() <= batch.n_frames < batch.n_positions
        clip, reference, told, whole, unnamed, spelling = batch.rows.numpy()
        size = examples._size(clip, reference, told, whole > 0, unnamed > 0, spelling)
        assert (size <= batch.n_positions).all()

"""What the speaker encoder's own training promises: speakers are told apart, by what is changed of them too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from quaver.config import SpeakerConfig, parse
from quaver.model.speaker import SpeakerEncoder
from training import parts, recipe, voices

_CPU = torch.device("cpu")


def _references(n_speakers: int) -> voices.References:
    """Two seconds each of a buzz of its own."""
    seconds = np.arange(48_000) / 24_000
    buzz = [np.sign(np.sin(2 * np.pi * 110.0 * 1.3**i * seconds)) for i in range(n_speakers)]
    return voices.References((6000 * np.stack(buzz)).astype(np.int16), _CPU)


def _trainer(n_speakers: int, **settings: float) -> voices.Trainer:
    torch.manual_seed(0)
    config = parse(SpeakerConfig, recipe.SPEAKER_ENCODER, "recipe")
    chosen = dataclasses.replace(recipe.VoicesRecipe(), batch=8, seconds=0.5, ema_decay=0.5, **settings)
    return voices.Trainer(SpeakerEncoder(config), _references(n_speakers), chosen)


def test_changed_excerpts_are_heard_and_differ_each_time() -> None:
    references, who = _references(3), torch.tensor([0, 2, 2])
    found = references.changed(who, 12_000)
    assert found.shape == (3, 12_000)
    assert found.isfinite().all()
    assert (found.square().mean(1).sqrt() > 0.005).all()
    assert not torch.allclose(found[1], found[2])
    assert references.changed(who, 1_000_000).shape == (3, 24_000)
    torch.testing.assert_close(references.plain(who, 100), references.samples[who, :100] / 32768.0)


def test_the_right_speaker_has_to_win_by_the_margin() -> None:
    directions, who = torch.eye(3), torch.tensor([1])
    near = torch.tensor([[0.0, 2.0, 0.1]])
    plain, strict = (float(voices.unsure(near, directions, who, 10.0, margin)) for margin in (0.0, 0.3))
    assert plain < 0.001 < strict < 0.01
    assert float(voices.unequal(torch.ones(2, 5))) == pytest.approx(0.0, abs=1e-9)
    assert float(voices.unequal(torch.full((2, 5), 50.0))) > 10.0


def test_speakers_are_learnt(tmp_path: Path) -> None:
    trainer = _trainer(5, total_s=0.5)
    trainer.lr.fill_(1e-3)
    missed = list[float]()
    for _ in range(50):
        trainer.report.zero_()
        trainer.step()
        missed.append(float(trainer.report))
    assert np.mean(missed[-10:]) < 0.3 * np.mean(missed[:10])
    lines = list[str]()
    voices.train(trainer, tmp_path, lines.append)
    assert (tmp_path / "done").exists()
    assert "0 not finite" in lines[-1]
    state = parts.read(tmp_path, "voices")
    assert set(state) == {"directions", *(f"encoder.{n}" for n, _ in trainer.encoder.named_parameters())}


def test_every_twentieth_speaker_is_held_out() -> None:
    trainer = _trainer(40)
    assert trainer.held_out.tolist() == [19, 39]
    before = trainer.directions.detach().clone()
    trainer.lr.fill_(1e-3)
    for _ in range(3):
        trainer.step()
    assert not torch.equal(trainer.directions[0], before[0])
    for held in (19, 39):
        assert torch.nn.functional.cosine_similarity(trainer.directions[held], before[held], dim=0) > 0.999
    assert 0.0 <= trainer.told() <= 1.0

"""What the speaker encoder's own training promises: speakers are told apart, by what is changed of them too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from quaver.model.speaker import SpeakerEncoder
from training import parts, quantizer, recipe, rooms, shards, voices

_CPU = torch.device("cpu")


def _references(n_speakers: int) -> voices.References:
    """Two seconds each of a buzz of its own."""
    seconds = np.arange(48_000) / 24_000
    buzz = [np.sign(np.sin(2 * np.pi * 110.0 * 1.3**i * seconds)) for i in range(n_speakers)]
    return voices.References((6000 * np.stack(buzz)).astype(np.int16), _CPU)


def _trainer(n_speakers: int, **settings: float) -> voices.Trainer:
    torch.manual_seed(0)
    config = recipe.speaker_config()
    chosen = dataclasses.replace(recipe.VoicesRecipe(), batch=8, seconds=0.5, ema_decay=0.5, **settings)
    wanted = torch.randn(n_speakers, config.enc_dim)
    return voices.Trainer(SpeakerEncoder(config), _references(n_speakers), wanted, chosen)


def test_changed_excerpts_are_heard_and_differ_each_time() -> None:
    references, who = _references(3), torch.tensor([0, 2, 2])
    found = references.changed(who, 12_000)
    assert found.shape == (3, 12_000)
    assert found.isfinite().all()
    assert (found.square().mean(1).sqrt() > 0.005).all()
    assert not torch.allclose(found[1], found[2])
    assert references.changed(who, 1_000_000).shape == (3, 24_000)
    torch.testing.assert_close(references.plain(who, 100), references.samples[who, :100] / 32768.0)


def test_what_is_recorded_is_as_loud_as_it_was_and_what_was_said() -> None:
    torch.manual_seed(0)
    clean = 0.1 * torch.randn(64, 12_000).cumsum(1).diff(n=2, dim=1, prepend=torch.zeros(64, 2)).clamp(-1, 1)
    heard = rooms.recorded(clean)
    assert heard.shape == clean.shape
    power = heard.square().mean(1) / clean.square().mean(1)
    assert 0.98 < power.min() <= power.max() < 1.05
    likeness = torch.nn.functional.cosine_similarity(heard, clean, dim=1)
    assert likeness.min() > 0.4
    assert len(set(likeness.tolist())) == 64
    assert rooms.recorded(torch.zeros(2, 12_000)).abs().max() < 1e-4
    wave = torch.sin(2 * torch.pi * 250.0 * torch.arange(12_000) / 24_000).expand(64, -1)
    louder = [rooms.recorded(wave, colour_db=db).square().mean(1).log().std() for db in (0.0, 12.0)]
    assert all(float(spread) < 0.05 for spread in louder)


def _said(shifts: torch.Tensor, n_frames: int) -> tuple[shards.Encoded, torch.Tensor]:
    """Speakers who say random sounds, each nearest to its usual place moved by ``shifts`` [S, C, d]; and books."""
    n_speakers, n_classes, width = shifts.shape
    first, rest = 10.0 * torch.randn(n_classes, width), torch.randn(recipe.N_CODES, width)
    books = torch.stack((first[torch.arange(recipe.N_CODES) % n_classes], rest))
    sound = torch.randint(n_classes, (n_speakers, n_frames))
    wanted = shifts.gather(1, sound[..., None].expand(-1, -1, width)) + 0.3 * torch.randn(n_speakers, n_frames, width)
    codes = torch.stack((sound, quantizer.nearest(wanted, rest)), -1).flatten(0, 1).to(torch.int16)
    numbers = torch.arange(n_speakers)
    names = [str(i) for i in range(n_speakers)]
    return shards.Encoded(
        codes, numbers.int(), numbers.short(), torch.full_like(numbers, n_frames).short(), names
    ), books


def test_manners_are_alike_where_voices_are_and_say_little_of_who_was_hardly_heard() -> None:
    torch.manual_seed(0)
    shifts = torch.randn(40, 4, 6)
    shifts[1] = shifts[0] + 0.1 * torch.randn(4, 6)
    encoded, books = _said(shifts, 300)
    settings = dataclasses.replace(recipe.VoicesRecipe(), n_classes=4, n_axes=24)
    found = voices.manners(encoded, books, settings, 32)
    assert found.shape == (40, 32)
    assert float(found.square().mean()) == pytest.approx(1.0, abs=1e-4)
    likeness = torch.nn.functional.cosine_similarity(found[:1], found)
    assert likeness[1] > 0.8 > 2 * likeness[2:].max()
    assert torch.equal(found, voices.manners(encoded, books, settings, 32))
    shorter = dataclasses.replace(encoded, n_frames=encoded.n_frames.clone(), codes=encoded.codes[299 - 4 :])
    shorter.n_frames[0] = 5
    hardly = voices.manners(shorter, books, settings, 32)
    assert hardly[0].norm() < 0.5 * found[0].norm()


def test_manners_are_learnt(tmp_path: Path) -> None:
    trainer = _trainer(5, total_s=0.5)
    trainer.lr.fill_(1e-3)
    missed = list[float]()
    for _ in range(50):
        trainer.report.zero_()
        trainer.step()
        missed.append(float(trainer.report))
    assert np.mean(missed[-10:]) < 0.5 * np.mean(missed[:10])
    lines = list[str]()
    voices.train(trainer, tmp_path, lines.append)
    assert (tmp_path / "done").exists()
    assert "0 not finite" in lines[-1]
    state = parts.read(tmp_path, "voices")
    trainer.encoder.load_state_dict(state)


def test_every_twentieth_speaker_is_held_out() -> None:
    trainer = _trainer(40)
    assert trainer.held_out.tolist() == [19, 39]
    assert set(trainer.trained.tolist()) == set(range(40)) - {19, 39}
    told, alike = trainer.told()
    assert told < 1.0
    assert 0.0 <= alike <= 1.0
    assert all(np.isnan(_trainer(20).told()))

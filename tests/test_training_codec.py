"""What the codec's training promises: sets survive their files, crops are the recordings, codebook 0 stays apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from quaver.config import CodecConfig, parse
from quaver.model.codec_encoder import Codec
from training import quantizer, recipe, shards
from training.encode import batches, encode, reference
from training.pool import Pool, Recording

_FRAME = recipe.SAMPLES_PER_FRAME


def _noise(n_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, n_frames * _FRAME).astype(np.int16)


def test_a_set_gives_its_whole_clips_and_skips_what_a_killed_worker_left(tmp_path: Path) -> None:
    first, second = _noise(3), _noise(2, 1)
    (tmp_path / "part-000.s16").write_bytes(first.tobytes() + second.tobytes()[:-2])
    lines = [
        {"text": 7, "speaker": "a", "offset": 0, "n_frames": 3},
        {"text": 8, "speaker": "b", "offset": 3 * _FRAME, "n_frames": 2},
    ]
    (tmp_path / "part-000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"text": 9, "spe')
    clips = list(shards.spoken(tmp_path))
    assert [(c.text, c.speaker) for c in clips] == [(7, "a")]
    np.testing.assert_array_equal(clips[0].read(), first)


def test_an_encoded_set_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_FRAMES_A_FILE", 100)
    torch.manual_seed(0)
    n_frames = torch.randint(5, 60, (40,), dtype=torch.int16)
    codes = torch.randint(recipe.N_CODES, (int(n_frames.sum()), recipe.N_CODEBOOKS), dtype=torch.int16)
    text, speaker = torch.arange(40, dtype=torch.int32), torch.arange(40, dtype=torch.int16) % 3
    paths = shards.write(tmp_path, shards.Encoded(codes, text, speaker, n_frames, ["x", "y", "z"]))
    assert len(paths) > 10
    back = shards.read(tmp_path)
    assert back.names == ["x", "y", "z"]
    for got, wanted in zip(
        (back.codes, back.text, back.speaker, back.n_frames), (codes, text, speaker, n_frames), strict=True
    ):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("opus", [True, False])
def test_references_come_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opus: bool) -> None:
    if opus and not shards._keeps_length():
        pytest.skip("this libsndfile writes no Opus")
    monkeypatch.setattr(shards, "_keeps_length", lambda: opus)
    time = np.arange(shards.N_REFERENCE) / 24_000
    samples = np.stack([8000 * np.sin(2 * np.pi * f * time) for f in (200, 300, 400)]).astype(np.int16)
    shards.write_references(tmp_path, samples, ["a", "b", "c"])
    back = shards.read_references(tmp_path)
    assert back.shape == samples.shape
    assert np.abs(back.astype(int) - samples).mean() < 400


def test_a_reference_is_fourteen_seconds_of_any_speaker() -> None:
    short = _noise(3)
    found = reference([short, _noise(2, 1)])
    assert found.shape == (shards.N_REFERENCE,)
    np.testing.assert_array_equal(found[5 * _FRAME : 8 * _FRAME], short)


def test_clips_encoded_together_have_the_codes_of_each_alone() -> None:
    torch.manual_seed(0)
    encoder = Codec(recipe.codec_config()).encoder
    clips = [_noise(n, n) for n in (2, 5, 1, 4)]
    assert batches([2, 5, 1, 4], 10) == [[1, 3], [0, 2]]
    together = encode(encoder, clips, limit=10)
    for clip, codes in zip(clips, together, strict=True):
        alone = encoder.encode(torch.from_numpy(clip)[None].float() / 32768.0)[0].T
        assert torch.equal(codes.long(), alone)


def test_an_unchanged_crop_is_the_recording_but_for_its_loudness() -> None:
    torch.manual_seed(0)
    recordings = [Recording(v, _noise(30, i), torch.full((30, 2), float(i)).half()) for i, v in enumerate("abc")]
    recordings.append(Recording("a", _noise(30, 9), torch.zeros(30, 2).half()))
    pool = Pool(recordings, torch.device("cpu"))
    crops = pool.draw(12, 4, changed=0.0)
    recorded = pool.samples.float() / 32767.0
    firsts = recorded.view(-1, _FRAME)
    for samples, targets, known in zip(crops.samples, crops.targets, crops.known, strict=True):
        likeness = firsts @ samples[:_FRAME]
        place = int(likeness.argmax()) * _FRAME
        span = recorded[place : place + 4 * _FRAME]
        gain = (samples @ span) / (span @ span)
        assert 0.6 <= gain <= 1.25
        torch.testing.assert_close(samples, gain * span, rtol=0, atol=1e-5)
        torch.testing.assert_close(targets, pool.values[place // _FRAME :][:4].float())
        assert torch.equal(known, pool.known[place // _FRAME :][:4])
    drawn = torch.cat([pool.draw(50, 1, changed=0.0).targets[:, 0, 0] for _ in range(6)])
    # Voice "a" has two clips, and is drawn no more often for it.
    assert ((drawn > 0).float().mean() - 2 / 3).abs() < 0.12


def test_a_pool_is_filled_again_in_place_and_half_of_its_draws_have_targets() -> None:
    torch.manual_seed(0)
    told = [Recording(v, np.full(40 * _FRAME, 4000, np.int16), torch.ones(40, 2).half()) for v in "ab"]
    pool = Pool(told, torch.device("cpu"), n_frames=400)
    kept = pool.samples.data_ptr(), pool.counts.data_ptr()
    assert float(pool.draw(40, 2, changed=0.0).known.mean()) == 1.0
    more = [Recording(f"x{i}", np.full(40 * _FRAME, -4000, np.int16)) for i in range(20)]
    pool.fill(told + more)
    assert (pool.samples.data_ptr(), pool.counts.data_ptr()) == kept
    # Two and eight of these clips fit; the other voices are left out.
    assert pool.described.startswith("10 clips")
    drawn = [pool.draw(50, 2, changed=0.0) for _ in range(20)]
    known = torch.cat([crops.known[:, 0] for crops in drawn])
    positive = torch.cat([crops.samples[:, 0] > 0 for crops in drawn])
    assert torch.equal(known > 0, positive)
    assert abs(float(known.mean()) - 0.5) < 0.06


def test_a_faster_crop_sounds_higher() -> None:
    wave = (9000 * torch.sin(2 * torch.pi * 3000 / 24_000 * torch.arange(60.0 * _FRAME))).short().numpy()
    pool = Pool([Recording("a", wave)], torch.device("cpu"))
    speed = torch.tensor([[1.13]])
    found = pool._resampled(torch.tensor([[_FRAME]]), 4, speed, 1 / speed)[0].double()
    place = _FRAME + 1.13 * torch.arange(4.0 * _FRAME, dtype=torch.float64)
    wanted = 9000 / 32767 * torch.sin(2 * torch.pi * 3000 / 24_000 * place)
    assert (found - wanted).abs().max() < 0.003


def test_the_decoders_error_never_reaches_codebook_0() -> None:
    torch.manual_seed(0)
    codec = Codec(parse(CodecConfig, toy.codec_settings(), "toy"))
    latents = torch.randn(1, 32, 20)
    (semantic, read), (acoustic, _) = quantizer.branches(codec)
    inward = [semantic.input_proj.weight, acoustic.input_proj.weight, read.weight]
    for made in (quantizer.quantize(codec, latents).latents, quantizer.unquantized(codec, latents)):
        gradients = torch.autograd.grad(made.square().sum(), inward, allow_unused=True)
        assert [g is not None for g in gradients] == [False, True, True]
    found = quantizer.quantize(codec, latents)
    (gradient,) = torch.autograd.grad(found.semantic[0].sum(), semantic.input_proj.weight)
    assert gradient.abs().sum() > 0


def test_rows_that_keep_fewer_codebooks_are_made_of_these() -> None:
    torch.manual_seed(0)
    codec = Codec(parse(CodecConfig, toy.codec_settings(), "toy"))
    latents = torch.randn(3, codec.encoder.config.hidden_size, 5)
    n_acoustic = len(quantizer.codebooks(codec)) - 1
    with torch.no_grad():
        whole = quantizer.quantize(codec, latents)
        some = quantizer.quantize(codec, latents, torch.tensor([n_acoustic, 1, 0]))
        (_, read), (_, project) = quantizer.branches(codec)
        vectors = torch.stack([b.embedding[c] for b, c in zip(quantizer.codebooks(codec), whole.codes, strict=True)])
        first, second = (v.view(3, 5, -1).transpose(1, 2) for v in vectors[:2])
        alone = read(first) + project(torch.zeros_like(second))
        with_one = read(first) + project(second)
    torch.testing.assert_close(some.latents[0], whole.latents[0])
    torch.testing.assert_close(some.latents[1], with_one[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(some.latents[2], alone[2], atol=1e-5, rtol=1e-4)
    assert torch.equal(some.codes, whole.codes)

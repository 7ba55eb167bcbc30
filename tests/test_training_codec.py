"""What the codec's training promises: sets survive their files, crops are the recordings, codebook 0 stays apart."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quaver.model.codec_encoder import Codec
from training import decoder, encode, encoder, parts, recipe, shards, voices
from training.encoder import Coding
from training.pool import Pool, Recording, from_sets

_CPU = torch.device("cpu")
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


def test_what_is_begun_is_read_from_a_file_or_from_parts(tmp_path: Path) -> None:
    state = {"a": torch.randn(3).half(), "n": torch.arange(4)}
    save_file(state, tmp_path / "model.safetensors")
    parts.write(tmp_path, "model", state, torch.float16)
    for found in (parts.begun(tmp_path / "model.safetensors"), parts.begun(tmp_path / "model")):
        assert found["a"].dtype == torch.float32
        assert torch.equal(found["a"], state["a"].float())
        assert torch.equal(found["n"], state["n"])


def test_references_come_back_in_order(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-9000, 9000, (3, shards.N_REFERENCE)).astype(np.int16)
    shards.write_references(tmp_path, samples, ["a", "b", "c"])
    np.testing.assert_array_equal(shards.read_references(tmp_path), samples)
    with pytest.raises(ValueError, match="2 speakers"):
        shards.write_references(tmp_path, samples, ["a", "b"])


def test_a_reference_is_fourteen_seconds_of_any_speaker(tmp_path: Path) -> None:
    clips, rows, offset = [_noise(3), _noise(2, 1), _noise(4, 2)], [], 0
    for text, (clip, name) in enumerate(zip(clips, ("b", "b", "a"), strict=True)):
        n_frames = len(clip) // recipe.SAMPLES_PER_FRAME
        rows.append(json.dumps({"text": text, "speaker": name, "offset": offset, "n_frames": n_frames}))
        offset += len(clip)
    (tmp_path / "part-000.jsonl").write_text("\n".join(rows) + "\n")
    np.concatenate(clips).astype("<i2").tofile(tmp_path / "part-000.s16")
    names, found = shards.references(list(shards.spoken(tmp_path)))
    assert names == ["a", "b"]
    assert found.shape == (2, shards.N_REFERENCE)
    np.testing.assert_array_equal(found[1, : 5 * _FRAME], np.concatenate(clips[:2]))
    np.testing.assert_array_equal(found[1, 5 * _FRAME : 8 * _FRAME], clips[0])


def test_clips_encoded_together_have_the_codes_of_each_alone_but_at_its_end() -> None:
    torch.manual_seed(0)
    coding = Coding(Codec(recipe.codec_config()).encoder)
    coding.books.normal_()
    clips = [_noise(n, n) for n in (2, 5, 1, 4)]
    assert encode.batches([2, 5, 1, 4], 10) == [[1, 3], [0, 2]]
    together, alone = encode.encode([coding], clips, limit=10), encode.encode([coding, coding], clips, limit=1)
    for some, same, clip in zip(together, alone, clips, strict=True):
        assert some.shape == (len(clip) // _FRAME, recipe.N_CODEBOOKS)
        # What is said is heard causally; how it sounds is looked at a little beyond the frame.
        assert torch.equal(some[:, 0], same[:, 0])
        assert torch.equal(some[:-1], same[:-1])


def test_an_unchanged_crop_is_the_recording_but_for_its_loudness() -> None:
    torch.manual_seed(0)
    recordings = [Recording(v, _noise(30, i)) for i, v in enumerate("abc")] + [Recording("a", _noise(30, 9))]
    pool = Pool(recordings, torch.device("cpu"))
    recorded = pool.samples.float() / 32767.0
    firsts = recorded.view(-1, _FRAME)
    for samples in pool.draw(12, 4, changed=0.0):
        likeness = firsts @ samples[:_FRAME]
        place = int(likeness.argmax()) * _FRAME
        span = recorded[place : place + 4 * _FRAME]
        gain = (samples @ span) / (span @ span)
        assert 0.6 <= gain <= 1.25
        torch.testing.assert_close(samples, gain * span, rtol=0, atol=1e-5)


def test_every_voice_is_drawn_equally_often_and_no_pool_is_empty() -> None:
    torch.manual_seed(0)
    loud = [Recording("a", np.full(40 * _FRAME, 4000, np.int16)) for _ in range(5)]
    pool = Pool([*loud, Recording("b", np.full(40 * _FRAME, -4000, np.int16))], torch.device("cpu"))
    drawn = torch.cat([pool.draw(50, 1, changed=0.0)[:, 0] > 0 for _ in range(8)])
    assert abs(float(drawn.float().mean()) - 0.5) < 0.1
    with pytest.raises(ValueError, match="without recordings"):
        Pool([], torch.device("cpu"))


def test_hours_of_a_set_are_shared_by_its_speakers(tmp_path: Path) -> None:
    lines = [{"text": i, "speaker": "abb"[i % 3], "offset": 2 * i * _FRAME, "n_frames": 2} for i in range(9)]
    (tmp_path / "part-000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (tmp_path / "part-000.s16").write_bytes(_noise(18).tobytes())
    assert len(from_sets([tmp_path])) == 9
    some = from_sets([tmp_path], hours=8.5 * 0.08 / 3600)
    assert [r.voice for r in some] == ["a", "b", "a", "b"]


def test_crops_as_said_are_the_frames_they_are_named_after(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lines = [{"text": i, "speaker": "abb"[i % 3], "offset": 20 * i * _FRAME, "n_frames": 20} for i in range(9)]
    (tmp_path / "part-000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    said = _noise(180)
    (tmp_path / "part-000.s16").write_bytes(said.tobytes())
    pool = Pool(from_sets([tmp_path], hours=100.5 * 0.08 / 3600), _CPU)
    samples, frames = pool.draw_as_said(16, 3)
    assert len(set(frames[:, 0].tolist())) > 4
    for row, places in zip(samples, frames, strict=True):
        for i, place in enumerate(places.tolist()):
            wanted = torch.from_numpy(said[place * _FRAME : (place + 1) * _FRAME].astype(np.float32)) / 32767.0
            torch.testing.assert_close(row[i * _FRAME : (i + 1) * _FRAME], wanted)


def test_a_faster_crop_sounds_higher() -> None:
    wave = (9000 * torch.sin(2 * torch.pi * 3000 / 24_000 * torch.arange(60.0 * _FRAME))).short().numpy()
    pool = Pool([Recording("a", wave)], torch.device("cpu"))
    speed = torch.tensor([[1.13]])
    found = pool._resampled(torch.tensor([[_FRAME]]), 4, speed, 1 / speed)[0].double()
    place = _FRAME + 1.13 * torch.arange(4.0 * _FRAME, dtype=torch.float64)
    wanted = 9000 / 32767 * torch.sin(2 * torch.pi * 3000 / 24_000 * place)
    assert (found - wanted).abs().max() < 0.003


def _run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object, toy: bool = True) -> None:
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, words), *(["--toy"] if toy else [])])
    module.main()


def test_encoder_and_decoder_are_trained_from_a_set_to_a_whole_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    time_ = np.arange(60 * _FRAME) / 24_000
    waves = [np.sin(2 * np.pi * hz * time_) * (1 + np.sin(9 * time_)) for hz in (120, 180, 250)]
    lines = [{"text": i, "speaker": "abc"[i], "offset": 60 * i * _FRAME, "n_frames": 60} for i in range(3)]
    (tmp_path / "part-000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (tmp_path / "part-000.s16").write_bytes((4000 * np.concatenate(waves)).astype("<i2").tobytes())
    torch.manual_seed(0)
    first = tmp_path / "first.safetensors"
    save_file(Codec(recipe.codec_config()).state_dict(), first)
    common = ("--set", tmp_path, "--first", first)
    _run(encoder, monkeypatch, "measure", *common, "--out", tmp_path / "latents")
    latents = ("--latents", tmp_path / "latents")
    _run(encoder, monkeypatch, "measure", *common, *latents, "--out", tmp_path / "again")
    old, again = (encoder.open_coding(encoder.first_codec(first), tmp_path / n, _CPU) for n in ("latents", "again"))
    assert torch.equal(old.latents.axes, again.latents.axes)
    for coding in (old, again):
        # The first acoustic codebooks tell nothing of the hum, the others do.
        missed = coding.books[1:] - coding.books[1:] @ coding.latents.steady()
        share = missed.square().sum((1, 2)) / coding.books[1:].square().sum((1, 2)).clamp(min=1e-12)
        assert (share[: recipe.N_STEADY] < 1e-6).all()
        assert share[recipe.N_STEADY] > 0.01
    _run(encoder, monkeypatch, "train", *common, *latents, "--out", tmp_path / "encoder", "--seconds", 0.5)
    assert (tmp_path / "encoder" / "done").exists()
    out = tmp_path / "decoder"
    _run(encode, monkeypatch, *common, *latents, "--out", tmp_path / "own", toy=False)
    (tmp_path / "own" / "done").touch()
    _run(voices, monkeypatch, "--set", tmp_path / "own", *latents, "--out", tmp_path / "voices", "--seconds", 0.1)
    _run(
        decoder,
        monkeypatch,
        *common,
        *latents,
        "--encoder",
        tmp_path / "encoder" / "codec",
        "--voices",
        tmp_path / "voices",
        "--own",
        tmp_path / "own",
        "--out",
        out,
        "--seconds",
        4,
    )
    found = capsys.readouterr().out
    assert "half of it in the encoder's codes, its voices are heard, some of it in the talker's own codes" in found
    last = [line for line in found.splitlines() if ": mel" in line][-1]
    assert all(float(last.split(f"{name} ")[1].split()[0]) > 0.0 for name in ("mel", "heard", "mel-own"))
    codec = Codec(recipe.codec_config())
    codec.load_state_dict(parts.read(out, "codec"))
    made = parts.read(tmp_path / "encoder", "codec")
    codes = codec.encoder.encode(torch.from_numpy(waves[0][None, : 9 * _FRAME]).float() * 0.1)
    with torch.no_grad():
        assert codec.decoder(codes).isfinite().all()
    # The decoder is another one than before, the encoder the trained one.
    assert torch.equal(codec.encoder.state_dict()["downsample.conv.weight"], made["encoder.downsample.conv.weight"])
    before = load_file(first)
    assert not torch.equal(codec.decoder.state_dict()["pre_conv.conv.weight"], before["decoder.pre_conv.conv.weight"])

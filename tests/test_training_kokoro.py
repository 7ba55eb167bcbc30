"""The batched speech model: a toy of it, without the published weights."""

import math

import numpy as np
import pytest
import torch

from training import data, kokoro, kokoro_model, kokoro_weights, recipe, shards, synthesize, warp

SIZES = kokoro_model.Sizes(
    tokens=20,
    hidden=32,
    style=8,
    durations=4,
    bert=24,
    bert_inner=32,
    bert_embedding=8,
    heads=2,
    layers=2,
    places=40,
    wide=48,
    kernels=(3, 5),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    made = kokoro_model.Kokoro(SIZES)
    made.prosody.pitch_out.bias.fill_(150.0)
    return made


@pytest.fixture
def speech():
    """[2, N]: harmonics of a gliding pitch with a formant each, and silence at both ends."""
    time = torch.arange(36_000) / data.RATE_HZ
    rows = []
    for f0, formant in ((110.0, 700.0), (210.0, 1100.0)):
        phase = 2 * torch.pi * f0 * (time + 0.02 * torch.sin(5 * time))
        waves = sum(
            torch.sin(k * phase) * (0.02 + np.exp(-(((k * f0 - formant) / 250) ** 2))) for k in range(1, int(9000 / f0))
        )
        rows.append(0.2 * waves * torch.sin(torch.pi * time / 1.5).clamp(min=0.0).sqrt() * (time > 0.3) * (time < 1.2))
    return torch.stack(rows).float()


def _jobs(count):
    dice = np.random.default_rng(3)
    counts = dice.integers(14, 18, count)
    return [
        {"text": i, "speaker": f"k{i % 3}", "tokens": dice.integers(1, 20, n).tolist(), "tempo": 1.0}
        for i, n in enumerate(counts)
    ]


SPEAKERS = {
    "k0": {"weights": {"a": 1.0}, "pitch": 1.0},
    "k1": {"weights": {"a": 0.4, "b": 0.6}, "pitch": 0.85, "formant": 1.1, "bend": 0.5},
    "k2": {"weights": {"a": 1.3, "b": -0.3}, "pitch": 1.2, "colour": [3.0, 0.0, -3.0, 0.0, 2.0, 0.0]},
}


def _styles():
    dice = np.random.default_rng(4)
    return {name: dice.normal(size=(97, 16)).astype(np.float32) for name in "ab"}


def _speaker(model, budget):
    return kokoro.Speaker(model, _styles(), SPEAKERS, torch.device("cpu"), budget, noise=0.0)


def test_a_batch_is_what_its_clips_are_alone(model, monkeypatch):
    # The same noise in every row: without any, the phases of the source's weak bins are mere rounding errors.
    noise = torch.randn(kokoro_model.STEP * 200)
    monkeypatch.setattr(torch, "randn_like", lambda rows: noise[: rows.shape[1]].expand_as(rows))
    speaker = kokoro.Speaker(model, _styles(), SPEAKERS, torch.device("cpu"), 200, noise=1.0)
    jobs = [{**job, "tokens": job["tokens"][:14]} for job in _jobs(5)]
    together = speaker.plan(jobs)
    n_frames = kokoro.filled(max(int(clip.frames.sum()) for clip in together))
    samples = speaker.render(together, n_frames)
    assert samples.shape == (5, kokoro_model.STEP * n_frames)
    for i, job in enumerate(jobs):
        (alone,) = speaker.plan([job])
        np.testing.assert_array_equal(alone.frames, together[i].frames)
        apart = (speaker.render([alone], n_frames)[0] - samples[i]).abs()
        # A phase close to pi may come out as -pi.
        assert apart.quantile(0.99) < 1e-3 * samples[i].std()


def test_speed_shortens(model):
    ids = torch.randint(1, 20, (2, 16))
    frames, _, _ = model.plan(ids, torch.zeros(2, 16), torch.tensor([0.5, 2.0]))
    assert (frames >= 1).all()
    assert frames[0].sum() > frames[1].sum()


def test_the_source_keeps_its_phase_over_a_long_clip(model):
    """After a minute the ninth harmonic is where it should be."""
    generator = model.decoder.generator
    f0 = torch.full((1, 4800), 200.25)
    heard = generator._heard(f0, 0.0)
    assert heard.shape == (1, 2 * 11, 60 * 4800 + 1)
    # Four seconds are a whole number of cycles.
    period = 4 * data.RATE_HZ // 5
    magnitude = heard[0, :11]
    torch.testing.assert_close(
        magnitude[:, 100:5000], magnitude[:, 100 + 14 * period : 5000 + 14 * period], atol=2e-4, rtol=0
    )


def test_noise_is_random_and_off_at_zero(model):
    f0 = torch.full((1, 20), 120.0)
    heard = model.decoder.generator._heard
    assert torch.equal(heard(f0, 0.0), heard(f0, 0.0))
    assert not torch.equal(heard(f0, 1.0), heard(f0, 1.0))


def test_all_clips_are_spoken_once_whatever_the_batches(model):
    jobs = _jobs(23)
    # Each length holds back its last clips until the end; none is lost.
    for budget in (60, 400):
        spoken = [job["text"] for batch in _speaker(model, budget).batches(jobs) for job in batch.jobs]
        assert sorted(spoken) == list(range(23))


def test_a_style_is_a_weighted_sum_of_rows(model):
    job = {"text": 1, "speaker": "k2", "tokens": [1] * 15, "tempo": 1.0}
    styles = _styles()
    expected = 1.3 * styles["a"][14] - 0.3 * styles["b"][14]
    np.testing.assert_allclose(_speaker(model, 60).style(job), expected, rtol=1e-5)


def test_packed_weights_come_back_closely(model, tmp_path):
    torch.manual_seed(1)
    weights = {
        "decoder.decode.0.conv1.weight": torch.randn(64, 40, 3) * torch.rand(64, 1, 1),
        "decoder.generator.post.weight": torch.randn(22, 128, 7),
        "prosody.lstm.weight_ih_l0": torch.randn(128, 64),
        "bert.word.weight": torch.randn(178, 32),
        "narrow.bias": torch.randn(512),
        "decoder.generator.source.bias": torch.randn(1),
    }
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    kokoro_weights.pack(weights, files)
    found = {**kokoro_weights.unpack(files[0]), **kokoro_weights.unpack(files[1])}
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        assert found[name].shape == values.shape
        flat, new = values.reshape(len(values), -1), found[name].reshape(len(values), -1)
        step = next(
            (s for pattern, s in kokoro_weights._STEPS if kokoro_weights.re.search(pattern, name)), kokoro_weights._FINE
        )
        limit = 0.51 * step * flat.std(1, keepdim=True) if values.numel() >= 4096 else 1e-3 * flat.abs() + 1e-6
        assert ((new - flat).abs() <= limit).all(), name


def test_a_throat_like_before_changes_nothing(speech):
    out = warp.warped(speech, torch.ones(2), torch.zeros(2), torch.zeros(2, 6))
    torch.testing.assert_close(out, speech, atol=1e-4, rtol=0)


def test_a_longer_throat_moves_the_formant_and_not_the_pitch(speech):
    out = warp.warped(speech, torch.tensor([1.15, 0.87]), torch.zeros(2), torch.zeros(2, 6))

    def peak_hz(row, low, high):
        power = torch.fft.rfft(row[12_000:20_192] * torch.hann_window(8192)).abs()
        envelope = warp.envelope(
            torch.stft(row, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs().T[None]
        )
        mean = envelope[0, 40:90].mean(0)
        hz = torch.arange(513) * 24_000 / 1024
        mean = mean.masked_fill((hz < low) | (hz > high), -99.0)
        return hz[mean.argmax()].item(), power[: int(300 * 8192 / 24_000)].argmax().item()

    for i, (formant, hz) in enumerate(((1.15, 700), (0.87, 1100))):
        (old, old_pitch), (new, new_pitch) = peak_hz(speech[i], 300, 2000), peak_hz(out[i], 300, 2000)
        assert old == pytest.approx(hz, abs=80)
        assert new / old == pytest.approx(formant, abs=0.07)
        assert old_pitch == new_pitch


def test_a_bend_moves_the_middle_and_leaves_the_ends():
    hz = torch.arange(513) * 24_000 / 1024
    places = warp._source_bins(torch.ones(3), torch.tensor([-1.0, 0.0, 1.0]), hz)
    torch.testing.assert_close(places[1], torch.arange(513.0))
    assert (places.diff(dim=1) > 0).all()
    middle = 64
    assert places[2, middle] / middle == pytest.approx(0.92, abs=0.002)
    assert places[0, middle] / middle == pytest.approx(1.08, abs=0.002)
    torch.testing.assert_close(places[:, [0, 512]], torch.tensor([[0.0, 512.0]] * 3), atol=0.5, rtol=0)


def test_a_colour_is_met_at_its_knots():
    colour = torch.tensor([[3.0, -2.0, 0.0, 5.0, 1.0, -4.0]])
    torch.testing.assert_close(warp._colour_db(colour, warp.knots(6)), colour, atol=1e-3, rtol=0)
    assert warp.knots(6)[[0, -1]].tolist() == pytest.approx([100, 10_000], rel=1e-4)


def test_resampling_moves_a_tone():
    time = torch.arange(24_000) / data.RATE_HZ
    tone = torch.sin(2 * torch.pi * 1000 * time).repeat(3, 1)
    pitch = [0.8, 1.0, 1.25]
    out = warp.resampled(tone, pitch)
    torch.testing.assert_close(out[1, :24_000], tone[1], atol=1e-5, rtol=0)
    for row, p in zip(out, pitch, strict=True):
        expected = torch.sin(2 * torch.pi * 1000 * p * time[:16_000])
        torch.testing.assert_close(row[100:16_000], expected[100:], atol=5e-3, rtol=0)


def _finished(samples, dice):
    """Trimmed (80 to 160 ms before the speech, 160 to 240 ms behind), levelled int16 samples in whole frames.

    Raises ValueError for a clip that is silent or not finite.
    """
    if not np.isfinite(samples).all():
        raise ValueError("samples that are not finite")
    step = data.RATE_HZ // 100
    power = np.square(samples[: len(samples) // step * step].reshape(-1, step)).mean(1)
    heard = np.flatnonzero(power > max(1e-7, 1e-4 * float(np.quantile(power, 0.95))))
    if len(heard) < 20:
        raise ValueError("silence")
    begin = int(heard[0]) * step - int(data.RATE_HZ * dice.uniform(0.08, 0.16))
    end = (int(heard[-1]) + 1) * step + int(data.RATE_HZ * 0.16)
    end += -(end - begin) % recipe.SAMPLES_PER_FRAME
    clip = np.zeros(end - begin, np.float32)
    first, last = max(0, begin), min(len(samples), end)
    clip[first - begin : last - begin] = samples[first:last]
    # Halfway (in decibels) to one loudness: what is left of the difference is part of the speaker.
    loud = math.sqrt(float(power[power > 0.02 * power.max()].mean()))
    gain = min(math.sqrt(0.09 / loud), 0.95 / float(np.abs(clip).max()))
    return np.asarray(np.rint(clip * (gain * 32767)), np.int16)


def test_clips_are_finished_as_one_by_one(speech):
    quiet, broken = torch.zeros_like(speech[:1]), speech[:1].clone()
    broken[0, 9000] = float("nan")
    lead = [2000, 3000, 2000, 2000]
    rows = torch.cat([speech * torch.tensor([[0.3], [1.0]]), quiet, broken])
    samples, n_frames = warp.finished(rows, torch.full((4,), rows.shape[1]), torch.tensor(lead))
    assert n_frames[2:].tolist() == [0, 0]

    class Dice:
        def __init__(self, value):
            self.value = value

        def uniform(self, low, high):
            return self.value

    for i in range(2):
        expected = _finished(rows[i].numpy(), Dice((lead[i] + 0.5) / data.RATE_HZ))
        assert len(expected) == n_frames[i] * recipe.SAMPLES_PER_FRAME
        np.testing.assert_allclose(samples[i, : len(expected)].numpy(), expected, atol=1.01)
    later = torch.tensor([rows.shape[1], 20_000, 0, 0])
    assert warp.finished(rows, later, torch.tensor(lead))[1][1] < n_frames[1]


def test_a_killed_run_resumes(model, tmp_path, monkeypatch):
    jobs = _jobs(12)
    synthesize.write_jobs(tmp_path / "jobs.xz", SPEAKERS, jobs)
    np.savez(tmp_path / "styles.npz", **_styles())
    monkeypatch.setattr(kokoro, "load", lambda files: model)
    # The toy's sound may be silent by the rules of real speech.
    monkeypatch.setattr(
        warp,
        "finished",
        lambda s, n, lead: ((s * 100).to(torch.int16)[:, : 2 * recipe.SAMPLES_PER_FRAME], torch.full((len(s),), 2)),
    )

    def speak(out, share):
        return kokoro.speak_share(
            tmp_path / "jobs.xz", [], tmp_path / "styles.npz", out, share, 1e6, torch.device("cpu"), noise=0.0
        )

    out = tmp_path / "set"
    assert speak(out, (0, 2)).clips == speak(out, (1, 2)).clips == 6
    index, audio = out / "part-001.jsonl", out / "part-001.s16"
    index.write_text(index.read_text()[:-20])
    audio.write_bytes(audio.read_bytes()[:-5000])
    before = (out / "part-000.s16").read_bytes()
    assert speak(out, (1, 2)).clips >= 1
    assert speak(out, (0, 2)).clips == 0
    assert (out / "part-000.s16").read_bytes() == before
    clips = list(shards.spoken(out))
    assert sorted(clip.text for clip in clips) == list(range(12))
    lines = sum(len(file.read_text().splitlines()) for file in out.glob("*.jsonl"))
    assert lines == 12
    assert all(clip.speaker == f"k{clip.text % 3}" for clip in clips)


def test_an_early_end_leaves_whole_clips(model, tmp_path, monkeypatch):
    synthesize.write_jobs(tmp_path / "jobs.xz", SPEAKERS, _jobs(12))
    np.savez(tmp_path / "styles.npz", **_styles())
    monkeypatch.setattr(kokoro, "load", lambda files: model)
    done = kokoro.speak_share(
        tmp_path / "jobs.xz", [], tmp_path / "styles.npz", tmp_path / "set", (0, 1), 0.0, torch.device("cpu")
    )
    assert done.clips + done.dropped < 12
    assert len(list(shards.spoken(tmp_path / "set"))) == done.clips

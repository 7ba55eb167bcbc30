"""Validation on toy checkpoints: a model against itself, against noised copies of itself, and against strangers."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from quaver import corpus
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint
from quaver.comparison import Comparison, Difference, Side, figures, ran_away, sections, stopped_early
from quaver.corpus import Item
from quaver.errors import GateFailed, RecipeError
from quaver.limits import JudgedLimits, Limits
from quaver.model.tts import Utterance
from quaver.provenance import Step
from quaver.report import Gate, Metric, Report
from quaver.validate import Recipe, validate

LOUDNESS = 8
RECIPE = Recipe(n_samples=8, n_clips=2)


def _eager(path: Path) -> Checkpoint:
    """A toy with short texts and a loud stop id: others never learned to stop and would all be cut."""
    texts = [text for i in range(60) if corpus.split_of(text := f"No {i}") == "held-out"]
    rows = [json.dumps({"text": text, "language": "english"}) for text in texts]
    quiet = Checkpoint.open(toy.checkpoint(path / "quiet", "custom_voice"))
    (quiet.path / "sentences.jsonl").write_text("\n".join(rows) + "\n")
    stop_id = quiet.config.talker_config.codec_eos_token_id

    def louder(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name == "talker.codec_head.weight":
            tensor = tensor.clone()
            tensor[stop_id] *= LOUDNESS
        return {name: tensor}

    return quiet.edit(Step("louder"), louder).save(path / "source")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _eager(tmp_path_factory.mktemp("toys"))


def _noised(source: Checkpoint, out: Path, strength: float, only: str = "talker.model.layers.") -> Checkpoint:
    generator = torch.Generator().manual_seed(1)

    def noise(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not (name.startswith(only) and name.endswith("weight") and tensor.ndim == 2):
            return {name: tensor}
        added = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * strength
        return {name: (tensor.float() + added).to(tensor.dtype)}

    return source.edit(Step("noise", {"strength": strength}), noise).save(out)


TOLD: list[tuple[str, int, int]] = []


@pytest.fixture(scope="module")
def itself(source: Checkpoint) -> Report:
    return validate(source, source, RECIPE, progress=lambda *step: TOLD.append(step))


def _value(report: Report, name: str) -> float:
    return _values(report.metrics, report.gates)[name]


def _values(metrics: tuple[Metric, ...], gates: tuple[Gate, ...]) -> dict[str, float]:
    return {metric.name: metric.value for metric in (*metrics, *(gate.metric for gate in gates))}


def test_a_model_against_itself_differs_in_nothing(itself: Report) -> None:
    itself.require()
    for which in ("codebook 0", "other codebooks"):
        assert _value(itself, f"KL divergence, {which}") == 0
        assert _value(itself, f"same likeliest code, {which}") == 100
    assert _value(itself, "lost chance to stop at the true end") == 0
    assert _value(itself, "gained chance to stop before it") == 0
    assert _value(itself, "duration ratio") == 1
    assert _value(itself, "disk, candidate by original") == 1
    takes = itself.sections[0].clips[0].takes
    np.testing.assert_array_equal(takes[0].audio.samples, takes[1].audio.samples)
    assert len(itself.sections[0].clips) == 2


def test_the_same_question_gets_the_same_report(source: Checkpoint, itself: Report) -> None:
    again = validate(source, source, RECIPE)
    assert again.to_json() == itself.to_json() and again.to_html() == itself.to_html()


def test_more_noise_means_more_divergence_and_a_failed_gate(source: Checkpoint, itself: Report, tmp_path: Path) -> None:
    slight = validate(_noised(source, tmp_path / "slight", 0.01), source, RECIPE)
    broken = validate(_noised(source, tmp_path / "broken", 1.0), source, RECIPE)
    name = "KL divergence, codebook 0"
    assert 0 < _value(slight, name) < 0.1 * _value(broken, name)
    assert _value(broken, "same likeliest code, codebook 0") < _value(slight, "same likeliest code, codebook 0")
    with pytest.raises(GateFailed, match="KL divergence, codebook 0") as failure:
        broken.require()
    assert failure.value.report is broken
    assert "gates failed" in broken.to_html()
    assert "noise" in broken.provenance["candidate"]


def test_a_broken_predictor_leaves_codebook_0_of_known_speech_alone(source: Checkpoint, tmp_path: Path) -> None:
    candidate = _noised(source, tmp_path / "predictor", 1.0, "talker.code_predictor.model.layers.")
    report = validate(candidate, source, RECIPE)
    assert _value(report, "KL divergence, codebook 0") == 0
    assert _value(report, "KL divergence, other codebooks") > 0.01


def test_progress_tells_both_sides_in_order(itself: Report) -> None:
    expected = [
        "the original speaks",
        "the original judges its speech",
        "the candidate judges it",
        "the candidate speaks",
    ]
    assert list(dict.fromkeys(what for what, _, _ in TOLD)) == expected
    assert all(0 < done <= total == RECIPE.n_samples for _, done, total in TOLD)


def test_models_that_answer_in_other_ids_cannot_be_compared(source: Checkpoint, tmp_path: Path) -> None:
    wider = Checkpoint.open(toy.checkpoint(tmp_path / "wider", "custom_voice", vocab_size=toy.N_CODES + 1024 + 8))
    with pytest.raises(RecipeError, match="vocab_size"):
        validate(wider, source, RECIPE)
    base = Checkpoint.open(toy.checkpoint(tmp_path / "base"))
    with pytest.raises(RecipeError, match="tts_model_type"):
        validate(base, source, RECIPE)


def test_a_recipe_for_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        Recipe(n_samples=0)


# Figures on answers made by hand.


def _item(n_frames: int, text: str = "Hello there.") -> Item:
    return Item(Utterance(text), torch.zeros(n_frames, 2, dtype=torch.long))


def _sound(lead_s: float, seconds: float = 1.0) -> Audio:
    samples = np.zeros(round(24000 * seconds), np.float32)
    samples[round(24000 * lead_s) :] = 0.5
    return Audio(samples, 24000)


def _difference(stops: list[float], candidate: list[float], kl: float = 0.0, agreed: float = 1.0) -> Difference:
    n_frames = np.array([len(stops), len(stops) - 1])
    return Difference(n_frames, kl * n_frames, agreed * n_frames, (np.array(stops), np.array(candidate)))


def _comparison(differences: list[Difference], lengths: list[tuple[int, int]]) -> Comparison:
    sides = [
        Side(name, [_item(pair[i]) for pair in lengths], [_sound(0.1)] * len(lengths), size, size)
        for i, (name, size) in enumerate((("original", 1000), ("candidate", 400)))
    ]
    return Comparison(differences, *sides, seed=0)


def test_stop_chances_skip_the_frames_where_none_may_stop() -> None:
    difference = _difference([0.9, 0.9, 0.0, 0.0, 0.8], [0.1, 0.1, 0.5, 0.5, 0.6])
    found = _comparison([difference], [(4, 4)])
    metrics = _values(*figures(found, Limits()))
    assert metrics["lost chance to stop at the true end"] == pytest.approx(0.2)
    assert metrics["gained chance to stop before it"] == pytest.approx(0.75)


def test_runaways_count_against_the_candidate_and_out_of_the_durations() -> None:
    cap = corpus.most_frames("Hello there.")
    assert ran_away(_item(cap)) and not ran_away(_item(cap - 1))
    lengths = [(10, 11), (10, cap), (20, 19), (cap, 10)]
    found = _comparison([_difference([0.0] * 11, [0.0] * 11)] * 4, lengths)
    metrics, gates = figures(found, Limits())
    values = _values(metrics, gates)
    assert values["runaways more than the original's"] == 0
    assert values["duration ratio"] == 1.0
    assert values["disk, candidate by original"] == 0.4
    more = dataclasses.replace(
        found, original=dataclasses.replace(found.original, spoken=[_item(n) for n in (10, 10, 20, 10)])
    )
    failed = [gate.metric.name for gate in figures(more, Limits())[1] if not gate.passed]
    assert failed == ["runaways more than the original's"]
    assert gates[0].passed


def test_means_are_over_frames_and_intervals_over_utterances() -> None:
    long = _difference([0.0] * 31, [0.0] * 31, kl=0.1)
    short = _difference([0.0] * 11, [0.0] * 11, kl=0.5)
    found = _comparison([long, short], [(30, 30), (10, 10)])
    metric = figures(found, Limits())[1][0].metric
    assert metric.value == pytest.approx((31 * 0.1 + 11 * 0.5) / 42)
    assert metric.interval == pytest.approx((0.1, 0.5))


def test_an_original_that_never_stops_fails_the_gates_that_need_an_end() -> None:
    cap = corpus.most_frames("Hello there.")
    found = _comparison([_difference([0.0] * (cap + 1), [0.0] * (cap + 1))], [(cap, cap)])
    metrics, gates = figures(found, Limits())
    assert math.isnan(_values(metrics, gates)["duration ratio"])
    failed = {gate.metric.name for gate in gates if not gate.passed}
    assert failed == {
        "lost chance to stop at the true end",
        "gained chance to stop before it",
        "duration ratio, longer by shorter",
    }
    assert "no true end" in sections(found, Limits())[3].text


def test_runaways_are_in_one_duration_ratio_and_out_of_the_other() -> None:
    cap = corpus.most_frames("Hello there.")
    found = _comparison([_difference([0.0] * 11, [0.0] * 11)] * 2, [(10, 10), (10, cap)])
    values = _values(*figures(found, Limits()))
    assert values["duration ratio"] == 1
    assert values["duration ratio, runaways included"] == (10 + cap) / 20


def test_early_stops_and_added_silence_count_against_the_candidate() -> None:
    least = corpus.least_frames("Hello there.")
    assert least == int(12.5 * 10 / 24) and stopped_early(_item(least - 1)) and not stopped_early(_item(least))
    # A Chinese character is said about as fast as two and a half letters.
    assert corpus.least_frames("你好你好") == int(12.5 * 10 / 24) and corpus.least_frames("?!") == 0
    found = _comparison([_difference([0.0] * 11, [0.0] * 11)] * 2, [(10, 10), (10, least - 1)])
    silent = dataclasses.replace(found.candidate, sounds=[_sound(0.5), _sound(0.3)])
    found = dataclasses.replace(found, candidate=silent)
    gates = {gate.metric.name: gate for gate in figures(found, Limits(duration=9))[1]}
    early, lead = gates["early stops more than the original's"], gates["leading silence added"]
    assert early.metric.value == 50 and not early.passed and "original 0 %, candidate 50 %" in early.metric.note
    assert lead.metric.value == pytest.approx(0.3) and not lead.passed
    assert lead.metric.interval == pytest.approx((0.2, 0.4))
    assert "candidate stopped early" in str(sections(found, Limits())[4].tables[0].rows)


def test_an_infinite_limit_is_a_figure_and_no_gate() -> None:
    found = _comparison([_difference([0.0] * 11, [0.0] * 11)], [(10, 10)])
    metrics, gates = figures(found, Limits(disk=math.inf))
    assert "disk, candidate by original" in {metric.name for metric in metrics}
    assert "disk, candidate by original" not in {gate.metric.name for gate in gates}


def test_gates_on_what_nobody_hears_are_refused() -> None:
    with pytest.raises(RecipeError, match="no judge"):
        Recipe(limits=Limits(judged=JudgedLimits()))


def test_without_judges_the_report_says_so(itself: Report) -> None:
    assert "Speech was not judged" in itself.summary
    assert itself.sections[1].title == "Heard by judges" and "--judge" in itself.sections[1].text
    assert itself.provenance["judges"] == "none"

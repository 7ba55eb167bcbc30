"""A sweep over blends: each share is what validating the written blend would say; only a report is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import test_blend
import test_panel
import test_validate
from quaver import blend, cli, sweep, validate
from quaver.blend import Donor
from quaver.checkpoint import Checkpoint
from quaver.errors import CheckpointError, RecipeError
from quaver.model.tts import TTS
from quaver.report import Report
from quaver.validate import Place

HOW = validate.Recipe(n_samples=4, n_clips=2)
ALPHAS = (0.0, 0.03, 0.5)
judges = test_panel.judges


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return test_validate._eager(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def donor(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Donor:
    return test_blend.donor_of(source, tmp_path_factory.mktemp("sweep") / "llm")


TOLD: list[str] = []


@pytest.fixture(scope="module")
def report(source: Checkpoint, donor: Donor) -> Report:
    place = Place(progress=lambda what, done, total: TOLD.append(what))
    return sweep.sweep(source, donor, ALPHAS, blend.Recipe(0.5, force=True), HOW, place)


def _rows(report: Report) -> dict[str, dict[str, object]]:
    table = report.sections[1].tables[0]
    return {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_no_share_changes_nothing_and_more_changes_more(report: Report) -> None:
    rows = _rows(report)
    assert list(rows) == ["original", "0", "0.03", "0.5"]
    assert rows["0"]["KL of codebook 0, nats"] == 0 and rows["0"]["duration ratio"] == 1
    assert rows["0"]["gates that failed"] == "none"
    assert 0 < rows["0.03"]["KL of codebook 0, nats"] < rows["0.5"]["KL of codebook 0, nats"]
    assert "KL divergence, codebook 0" in rows["0.5"]["gates that failed"]
    assert rows["original"]["KL of codebook 0, nats"] is None
    assert rows["original"]["stop rate, %"] == rows["0"]["stop rate, %"]
    assert "All gates hold up to alpha" in report.summary and "not judged" in report.summary
    assert "CER" not in report.sections[1].tables[0].columns and report.gates == ()


def test_a_share_is_what_validating_the_written_blend_says(
    source: Checkpoint, donor: Donor, report: Report, tmp_path: Path
) -> None:
    blend.blend(source, donor, tmp_path / "blend", blend.Recipe(0.03))
    alone = validate.validate(Checkpoint.open(tmp_path / "blend"), source, HOW)
    values = {metric.name: metric.value for metric in alone.metrics}
    values |= {gate.metric.name: gate.metric.value for gate in alone.gates}
    row = _rows(report)["0.03"]
    assert row["KL of codebook 0, nats"] == values["KL divergence, codebook 0"]
    assert row["duration ratio"] == pytest.approx(values["duration ratio"], nan_ok=True)
    gates = {row[0]: row for row in report.sections[2].tables[0].rows}
    assert set(gates) == {gate.metric.name for gate in alone.gates}


def test_the_original_is_asked_once_and_progress_names_each_share(report: Report) -> None:
    assert list(dict.fromkeys(TOLD)) == [
        "the original speaks",
        "the original judges its speech",
        *(f"alpha {alpha:g} {does}" for alpha in ALPHAS for does in ("judges it", "speaks")),
    ]
    assert TOLD.count("the original speaks") == 1


def test_the_report_draws_and_plays_every_share(report: Report, tmp_path: Path) -> None:
    plots = {plot.title: plot for plot in report.sections[1].plots}
    assert {"Stop rate, %", "KL of codebook 0, nats", "Duration ratio"} <= set(plots)
    assert plots["KL of codebook 0, nats"].labels == ("0", "0.03", "0.5")
    assert plots["KL of codebook 0, nats"].limit == 0.1
    assert [take.label for take in report.sections[0].clips[0].takes] == ["original", "0", "0.03", "0.5"]
    assert len(report.sections[0].clips) == 2
    report.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "report.json"}
    told = json.loads((tmp_path / "out" / "report.json").read_text())["provenance"]
    assert told["donor"] == "llm" and told["blend"] == "lerp, tensors *, shares 0, 0.03, 0.5"
    assert told["donor model-1.safetensors"].startswith("SHA-256 ")


def test_judges_hear_the_original_once_and_every_share(source: Checkpoint, donor: Donor, judges: object) -> None:
    told: list[str] = []
    how = validate.Recipe(2, n_clips=0, judges=judges)
    place = Place(progress=lambda what, *_: told.append(what))
    report = sweep.sweep(source, donor, (0.0, 0.05), blend.Recipe(), how, place)
    assert list(dict.fromkeys(told))[-3:] == [
        "judges hear the original",
        "judges hear alpha 0",
        "judges hear alpha 0.05",
    ]
    rows = _rows(report)
    assert (
        rows["0"]["CER"] == rows["original"]["CER"] and rows["0"]["sound quality"] == rows["original"]["sound quality"]
    )
    # A CustomVoice model clones nobody.
    assert "similarity, WeSpeaker" not in rows["0"]
    plot = next(plot for plot in report.sections[1].plots if plot.title == "CER")
    assert [series.name for series in plot.series] == ["blend", "original"]


@pytest.mark.parametrize("text", ["", "0,,0.1", "a", "0;0.1", "0.1,-0.1", "0.01,0.010"])
def test_shares_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="no shares|twice"):
        sweep.shares(text)


def test_shares_come_in_rising_order() -> None:
    assert sweep.shares("0.03, 0,.01") == (0.0, 0.01, 0.03)


def test_a_donor_that_does_not_fit_costs_no_speech(source: Checkpoint, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, object]) -> None:
        tensors.pop("model.layers.1.mlp.up_proj.weight")

    told: list[str] = []
    other = test_blend.donor_of(source, tmp_path / "llm", change=spoil)
    with pytest.raises(CheckpointError, match="is missing"):
        sweep.sweep(
            source, other, ALPHAS, blend.Recipe(0.5, force=True), HOW, Place(progress=lambda *_: told.append(""))
        )
    assert not told


def _run(capsys: pytest.CaptureFixture[str], source: Checkpoint, donor: Donor, *more: object) -> tuple[int, str, str]:
    code = cli.run(["blend", str(source.path), "--donor", str(donor.path), *map(str, more)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_verb(capsys: pytest.CaptureFixture[str], source: Checkpoint, donor: Donor, tmp_path: Path) -> None:
    asked = ("--sweep", "0,0.05", "--samples", "2", "-o", tmp_path / "out")
    code, out, _ = _run(capsys, source, donor, *asked, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    code, _, told = _run(capsys, source, donor, *asked)
    assert code == 2 and "exists already" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep", "0,0.1"), "alpha is 0.1: from 0.1 on speech may never stop"),
        (("--sweep", "0,1.5", "--force"), "alpha is 1.5"),
        (("--sweep", "much"), "'much' names no shares"),
        (("--sweep", ""), "names no shares"),
        (("--sweep", "0", "--alpha", "0.02"), "--alpha is for a blend without --sweep"),
        (("--sweep", "0", "--layers", "0=0"), "--layers is for a blend without --sweep"),
        (("--samples", "3"), "--samples is for a blend with --sweep"),
        (("--judge", "hub"), "--judge is for a blend with --sweep"),
        (("--sweep", "0", "--gates", "none.toml"), "none.toml cannot be read"),
        (("--sweep", "0", "--tensors", "*.nothing"), "no tensor of the 6 is named like"),
    ],
)
def test_what_does_not_go_together_is_named_and_nothing_written(
    capsys: pytest.CaptureFixture[str], source: Checkpoint, donor: Donor, tmp_path: Path, arguments, message: str
) -> None:
    code, out, told = _run(capsys, source, donor, *arguments, "-o", tmp_path / "out")
    assert code == 2 and message in told and len(told.strip().splitlines()) == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    source: Checkpoint,
    donor: Donor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_loaded, plain = 0, TTS.load.__func__

    def load(cls: type[TTS], *what: object, **how: object) -> TTS:
        nonlocal n_loaded
        n_loaded += 1
        if n_loaded == 3:
            raise KeyboardInterrupt
        return plain(cls, *what, **how)

    monkeypatch.setattr(TTS, "load", classmethod(load))
    code, _, told = _run(capsys, source, donor, "--sweep", "0,0.05", "--samples", "2", "-o", tmp_path / "out")
    assert code == 130 and "nothing half-written" in told
    assert list(tmp_path.iterdir()) == []

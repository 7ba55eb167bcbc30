"""Reports: gates, numbers for people, and the three forms, each safe against what it is given."""

import base64
import errno
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from quaver.audio import Audio
from quaver.errors import BudgetError, GateFailed, RecipeError
from quaver.plots import Plot, Series, svg, ticks
from quaver.report import Clip, Metric, Report, Section, Table, Take, gate, number

NASTY = "<script>alert(1)</script> & \"quotes\" | 'pipes'"


def _report() -> Report:
    kl = Metric("KL, codebook 0", 0.0312, "nats", (0.028, 0.034), "over 4,000 frames")
    plots = (
        Plot("bar", "bars", (Series("a", (1.0, 2.0, math.nan)),), "codebook", "nats", limit=1.5),
        Plot("line", NASTY, (Series(NASTY, (1.0, 2.0)), Series("b", (0.5, 0.7))), labels=(NASTY, "end")),
        Plot("histogram", "seconds", (Series("a", (1.0, 1.1, 5.0)),), limit=8.0),
    )
    sound = Audio(np.sin(np.arange(2400) / 9), 24000)
    return Report(
        title=NASTY,
        summary="Two models.",
        metrics=(kl, Metric("size", 1_234_567, "bytes"), Metric("odd", math.nan)),
        gates=(gate(kl, at_most=0.05), gate(kl, at_least=0.04)),
        sections=(
            Section("Known speech", NASTY, (Table(NASTY, ("text", "KL"), ((NASTY, 0.5), ("你好", None))),), plots),
            Section("Listen", clips=(Clip(NASTY, (Take("original", sound, "stop"), Take("candidate", sound))),)),
        ),
        provenance={"source": NASTY},
    )


class _Page(HTMLParser):
    """Collects tags and attributes, and checks that elements nest."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_gates_hold_to_their_side_and_nan_fails() -> None:
    metric = Metric("m", 1.0)
    assert gate(metric, at_most=1.0).passed and gate(metric, at_least=1.0).passed
    assert not gate(metric, at_most=0.99).passed and not gate(metric, at_least=1.01).passed
    assert not gate(Metric("m", math.nan), at_most=1.0).passed
    assert not gate(Metric("m", math.nan), at_least=1.0).passed


def test_require_names_the_gates_that_failed_and_carries_the_report() -> None:
    report = _report()
    with pytest.raises(GateFailed, match=r"KL, codebook 0 is 0.0312 nats, at least 0.04 nats is allowed") as failure:
        report.require()
    assert failure.value.report is report and not report.passed and report.verdict == "1 of 2 gates failed"
    Report("t", gates=report.gates[:1]).require()
    assert Report("t", gates=report.gates[:1]).verdict == "all 1 gates passed"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0312, "nats", "0.0312 nats"),
        (12, "of 32", "12 of 32"),
        (94.3121, "%", "94.31 %"),
        (1234.6, "s", "1,235 s"),
        (1_200_000, "", "1,200,000"),
        (3.2e-7, "", "3.2e-7"),
        (0.0, "", "0"),
        (0.00097, "", "0.00097"),
        (3e-7, "", "3e-7"),
        (math.nan, "nats", "not a number"),
        (math.inf, "", "infinite"),
        (1_234_567, "bytes", "1.3 MB"),
        (1_300_000, "bytes", "1.3 MB"),
        (1_300_001, "bytes", "1.4 MB"),
        (None, "", ""),
    ],
)
def test_numbers_for_people(value: float | None, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_json_holds_every_figure_and_no_nan() -> None:
    value = json.loads(_report().to_json(), parse_constant=pytest.fail)
    assert value["passed"] is False
    assert value["gates"][1] == {
        "name": "KL, codebook 0", "value": 0.0312, "unit": "nats", "interval": [0.028, 0.034],
        "note": "over 4,000 frames", "limit": 0.04, "direction": "at least", "passed": False,
    }  # fmt: skip
    assert value["metrics"][2]["value"] is None
    assert value["sections"][0]["plots"][0]["series"][0]["values"] == [1.0, 2.0, None]
    assert value["sections"][1]["clips"][0]["takes"][0] == {"label": "original", "seconds": 0.1, "note": "stop"}


def test_markdown_tables_line_up_and_pipes_are_escaped() -> None:
    text = _report().to_markdown()
    assert "| FAIL | KL, codebook 0 | 0.0312 nats | at least 0.04 nats | 0.028 to 0.034 nats |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 5, 7) for line in rows)
    table = text.split("### ")[1].splitlines()[2:6]
    # 你 and 好 take two columns each in a terminal.
    assert len({len(line) + line.count("你") + line.count("好") for line in table}) == 1


def test_html_is_one_page_that_needs_nothing_and_runs_nothing() -> None:
    report = _report()
    html = report.to_html()
    page = _Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert not any(tag in ("script", "link", "iframe", "img") for tag, _ in page.seen)
    sources = [value for _, attrs in page.seen for name, value in attrs.items() if name in ("src", "href")]
    assert len(sources) == 2 and all(source.startswith("data:audio/flac;base64,") for source in sources)
    assert "http" not in html and "@import" not in html and "url(" not in html
    assert html == report.to_html() == _report().to_html()
    assert "prefers-color-scheme: dark" in html


def test_sounds_in_the_page_are_the_sounds_given(tmp_path: Path) -> None:
    data = re.search(r"data:audio/flac;base64,([^\"]+)", _report().to_html())[1]
    (tmp_path / "a.flac").write_bytes(base64.b64decode(data))
    samples, rate_hz = soundfile.read(tmp_path / "a.flac")
    assert rate_hz == 24000
    np.testing.assert_allclose(samples, np.sin(np.arange(2400) / 9), atol=1e-4)


def test_an_empty_report_has_all_three_forms() -> None:
    report = Report("nothing yet")
    report.require()
    assert json.loads(report.to_json())["metrics"] == []
    assert report.to_markdown() == "# nothing yet\n"
    assert "no gates" in report.to_html()


def test_bars_stand_on_zero_and_the_limit_is_drawn() -> None:
    picture = svg(Plot("bar", "t", (Series("a", (2.0, 4.0)),), limit=3.0))
    bars = [
        (float(y), float(h))
        for y, h in re.findall(r'<rect class="f0"[^>]* y="([\d.]+)"[^>]* height="([\d.]+)"', picture)
    ]
    assert bars[0][0] + bars[0][1] == pytest.approx(bars[1][0] + bars[1][1], abs=0.2)
    assert bars[1][1] == pytest.approx(2 * bars[0][1], abs=0.3)
    limit = float(re.search(r'class="limit"[^>]* y1="([\d.]+)"', picture)[1])
    assert bars[1][0] < limit < bars[0][0]


def test_a_far_limit_does_not_flatten_the_bars() -> None:
    near, far = (svg(Plot("bar", "t", (Series("a", (2.0, 4.0)),), limit=limit)) for limit in (5.0, 500.0))
    assert 'class="limit"' in near and 'class="limit"' not in far
    assert svg(Plot("bar", "t", (Series("a", (2.0, 4.0)),))) == far


def test_long_tables_are_folded() -> None:
    rows = tuple((i, "x") for i in range(30))
    folded = Report("t", sections=(Section("s", tables=(Table("Rows", ("n", "x"), rows),)),)).to_html()
    assert "<summary>Rows (30 rows)</summary>" in folded


def test_a_histogram_counts_every_finite_value() -> None:
    values = (*np.random.default_rng(0).standard_normal(500), math.nan)
    counts = re.findall(r"<title>a: (\d+) in", svg(Plot("histogram", "t", (Series("a", values),))))
    assert sum(map(int, counts)) == 500


def test_nothing_finite_is_said_so() -> None:
    assert "no finite values" in svg(Plot("line", "t", (Series("a", (math.nan, math.inf)),)))


_VALUES = st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), min_size=1, max_size=30).map(tuple)


@given(st.sampled_from(["line", "bar", "histogram"]), st.lists(_VALUES, min_size=1, max_size=3), st.floats(-1e9, 1e9))
def test_any_values_give_a_well_formed_picture_within_its_frame(kind: str, rows: list, limit: float) -> None:
    picture = svg(Plot(kind, "t", tuple(Series(str(i), row) for i, row in enumerate(rows)), limit=limit))
    page = _Page()
    page.feed(picture)
    assert page.open == []
    assert "nan" not in picture and "inf" not in picture.replace("no finite", "")
    for number_text in re.findall(r' (?:y|y1|y2|cy)="(-?[\d.]+)"', picture):
        assert -1 <= float(number_text) <= 301


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_span_the_range_in_round_steps(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    tolerance = 1e-6 * (abs(low) + span)
    assert marks[0] <= low + tolerance and marks[-1] >= low + span - tolerance and 2 <= len(marks) <= 9


def test_save_writes_three_files_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = _report()
    report.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    assert (tmp_path / "out/report.html").read_text(encoding="utf-8") == report.to_html()
    with pytest.raises(RecipeError, match="exists already"):
        report.save(tmp_path / "out")
    with pytest.raises(RecipeError, match="does not exist"):
        report.save(tmp_path / "no/out")

    def full(self: Path, *_args: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BudgetError, match="no space left"):
        report.save(tmp_path / "second")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

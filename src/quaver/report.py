"""What came out, as a value: figures, gates, tables, plots and sounds; as JSON, Markdown, or one self-contained page.

The same report gives the same bytes: nothing here looks at a clock or a machine.
"""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from quaver import audio as audio_files
from quaver.audio import Audio
from quaver.errors import GateFailed
from quaver.files import new_folder
from quaver.plots import Plot, legend, scientific, svg

Cell = str | int | float | None

_LONG_TABLE = 12
_N_COLOURS = 5


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure: what it is, its value in ``unit``, the interval it lies in (95 % unless noted), and a note."""

    name: str
    value: float
    unit: str = ""
    interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit that ``metric`` must keep; built by :func:`gate`."""

    metric: Metric
    limit: float
    direction: Literal["at most", "at least"]
    passed: bool


def gate(metric: Metric, *, at_most: float | None = None, at_least: float | None = None) -> Gate:
    """The gate that holds ``metric`` to one limit. A value that is not a number fails."""
    assert (at_most is None) != (at_least is None), "a gate has one limit"
    if at_most is not None:
        return Gate(metric, at_most, "at most", metric.value <= at_most)
    assert at_least is not None
    return Gate(metric, at_least, "at least", metric.value >= at_least)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under ``columns``; numbers are set flush right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Take:
    """One version of a sentence to listen to."""

    label: str
    audio: Audio
    note: str = ""


@dataclass(frozen=True, slots=True)
class Clip:
    """A sentence and the versions of it, side by side."""

    text: str
    takes: tuple[Take, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report under its own heading."""

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    clips: tuple[Clip, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Figures and gates first, then sections; ``provenance`` says what was compared, with what, and how."""

    title: str
    summary: str = ""
    metrics: tuple[Metric, ...] = ()
    gates: tuple[Gate, ...] = ()
    sections: tuple[Section, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    @property
    def verdict(self) -> str:
        """The gates in one line."""
        if not self.gates:
            return "no gates"
        failed = [gate for gate in self.gates if not gate.passed]
        if not failed:
            return f"all {len(self.gates)} gates passed"
        return f"{len(failed)} of {len(self.gates)} gates failed"

    def require(self) -> None:
        """Raises GateFailed, naming each gate that failed with its value and limit, unless all passed."""
        failed = [
            f"{gate.metric.name} is {number(gate.metric.value, gate.metric.unit)}, "
            f"{gate.direction} {number(gate.limit, gate.metric.unit)} is allowed"
            for gate in self.gates
            if not gate.passed
        ]
        if failed:
            raise GateFailed(f"{self.title}: {'; '.join(failed)}", self)

    def to_json(self) -> str:
        """Every figure, table and plotted value as JSON, clips by their lengths; NaN and infinities are null."""
        value = {
            "title": self.title,
            "summary": self.summary,
            "passed": self.passed,
            "gates": [_gate_json(gate) for gate in self.gates],
            "metrics": [asdict(metric) for metric in self.metrics],
            "sections": [_section_json(section) for section in self.sections],
            "provenance": dict(self.provenance),
        }
        return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The report as Markdown whose tables also read well in a terminal."""
        lines = [f"# {self.title}", "", *([self.summary, ""] if self.summary else [])]
        if self.gates:
            lines += [f"**{self.verdict}**", "", *_markdown_table(_gate_table(self.gates)), ""]
        if self.metrics:
            lines += [*_markdown_table(_metric_table(self.metrics)), ""]
        for section in self.sections:
            lines += [f"## {section.title}", "", *([section.text, ""] if section.text else [])]
            for table in section.tables:
                lines += [*([f"### {table.title}", ""] if table.title else []), *_markdown_table(table), ""]
            if section.clips:
                lines += [*map(_markdown_clip, section.clips), ""]
        if self.provenance:
            lines += ["## Provenance", "", *(f"- {key}: {value}" for key, value in self.provenance.items()), ""]
        return "\n".join(lines)

    def to_html(self) -> str:
        """The report as one HTML page that needs nothing else: plots inline, sounds as FLAC data URIs."""
        style = resources.files("quaver").joinpath("report.css").read_text(encoding="utf-8")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
            + "\n".join(self._html_parts())
            + "\n</main></body></html>\n"
        )

    def _html_parts(self) -> Iterator[str]:
        state = "none" if not self.gates else "pass" if self.passed else "fail"
        yield f'<header><p class="over">quaver report</p><h1>{escape(self.title)}</h1>'
        yield f'<p class="verdict {state}">{escape(self.verdict)}</p>'
        if self.summary:
            yield f'<p class="summary">{escape(self.summary)}</p>'
        yield "</header>"
        if self.gates:
            yield "<section><h2>Gates</h2>" + _gates_html(self.gates) + "</section>"
        if self.metrics:
            yield (
                '<section><h2>Figures</h2><div class="tiles">' + "".join(map(_tile, self.metrics)) + "</div></section>"
            )
        for section in self.sections:
            yield _section_html(section)
        if self.provenance:
            rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in self.provenance.items())
            yield f'<section class="provenance"><h2>Provenance</h2><dl>{rows}</dl></section>'

    def save(self, out: Path | str) -> None:
        """Writes the new folder ``out`` with report.html, report.md and report.json, whole or not at all.

        Raises RecipeError when ``out`` exists or its parent does not, BudgetError when the disk is full.
        """
        contents = {"report.html": self.to_html(), "report.md": self.to_markdown(), "report.json": self.to_json()}
        with new_folder(out) as aside:
            for name, content in contents.items():
                (aside / name).write_text(content, encoding="utf-8")


def number(value: Cell, unit: str = "") -> str:
    """``value`` for people: four significant digits, integers whole, bytes with their megabytes rounded up."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "minus infinite")
    if unit == "bytes":
        tenths = -(-int(value) // 100_000)
        return f"{tenths // 10:,}.{tenths % 10} MB"
    if isinstance(value, int) or 1000 <= abs(value) < 1e6:
        text = f"{value:,.0f}"
    elif value == 0 or 1e-4 <= abs(value) < 1000:
        text = f"{value:.4g}"
    else:
        text = scientific(value, 3)
    return f"{text} {unit}".rstrip()


def _between(metric: Metric) -> str:
    if metric.interval is None:
        return ""
    low, high = metric.interval
    return f"{number(low)} to {number(high, metric.unit)}"


def _gate_table(gates: Sequence[Gate]) -> Table:
    rows = tuple(
        (
            "pass" if gate.passed else "FAIL",
            gate.metric.name,
            number(gate.metric.value, gate.metric.unit),
            f"{gate.direction} {number(gate.limit, gate.metric.unit)}",
            _between(gate.metric),
            gate.metric.note,
        )
        for gate in gates
    )
    return Table("", ("gate", "figure", "value", "limit", "interval", "note"), rows)


def _metric_table(metrics: Sequence[Metric]) -> Table:
    rows = tuple((m.name, number(m.value, m.unit), _between(m), m.note) for m in metrics)
    return Table("", ("figure", "value", "interval", "note"), rows)


def _markdown_table(table: Table) -> Iterator[str]:
    cells = [[number(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in table.rows]
    widths = [max(3, *(_columns(row[i]) for row in [list(table.columns), *cells])) for i in range(len(table.columns))]
    right = [_numeric(table, i) for i in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        padded = (
            " " * (width - _columns(cell)) + cell if flush else cell + " " * (width - _columns(cell))
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    yield line(table.columns)
    yield (
        "|"
        + "|".join("-" * (w + 1) + ":" if flush else "-" * (w + 2) for w, flush in zip(widths, right, strict=True))
        + "|"
    )
    yield from map(line, cells)


def _markdown_clip(clip: Clip) -> str:
    takes = (f"{take.label} {take.audio.seconds:.1f} s{f' ({take.note})' if take.note else ''}" for take in clip.takes)
    return f"- {clip.text}: {', '.join(takes)}"


def _columns(text: str) -> int:
    """How many columns of a terminal ``text`` takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _numeric(table: Table, column: int) -> bool:
    values = [row[column] for row in table.rows if row[column] is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)


def _gates_html(gates: Sequence[Gate]) -> str:
    rows = []
    for gate in gates:
        state = "pass" if gate.passed else "fail"
        note = f'<span class="note">{_small(gate.metric)}</span>'
        rows.append(
            f'<tr class="{state}"><td><span class="mark">{state}</span></td><td>{escape(gate.metric.name)}{note}</td>'
            f'<td class="num">{escape(number(gate.metric.value, gate.metric.unit))}</td>'
            f'<td class="num quiet">{gate.direction} {escape(number(gate.limit, gate.metric.unit))}</td>'
            f"<td>{_track(gate)}</td></tr>"
        )
    return f'<table class="gates"><tbody>{"".join(rows)}</tbody></table>'


def _track(gate: Gate) -> str:
    """The value and its limit on one line from 0."""
    value, limit = gate.metric.value, gate.limit
    if not math.isfinite(value) or value < 0 or limit < 0:
        return ""
    full = max(value, limit, 1e-12) * 1.08
    tick = 160 * limit / full
    bar = 'x="0" y="5" height="6" rx="3"'
    return (
        f'<svg class="track" viewBox="0 0 160 16" aria-hidden="true"><rect class="rail" {bar} width="160"/>'
        f'<rect class="fill" {bar} width="{160 * value / full:.1f}"/>'
        f'<line class="limit" x1="{tick:.1f}" x2="{tick:.1f}" y1="1" y2="15"/></svg>'
    )


def _small(metric: Metric) -> str:
    return " · ".join(escape(part) for part in (_between(metric), metric.note) if part)


def _tile(metric: Metric) -> str:
    exact = f' title="{metric.value:,.0f} bytes"' if metric.unit == "bytes" else ""
    value = escape(number(metric.value, metric.unit))
    small = _small(metric)
    return f'<div class="tile"><p>{escape(metric.name)}</p><strong{exact}>{value}</strong><small>{small}</small></div>'


def _section_html(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    if section.plots:
        figures = (
            f"<figure><figcaption>{escape(plot.title)}</figcaption>{legend(plot)}{svg(plot)}</figure>"
            for plot in section.plots
        )
        parts.append(f'<div class="plots">{"".join(figures)}</div>')
    parts += [_table_html(table) for table in section.tables]
    if section.clips:
        parts.append(f'<div class="clips">{"".join(map(_clip_html, section.clips))}</div>')
    return "".join([*parts, "</section>"])


def _table_html(table: Table) -> str:
    styles = [' class="num"' if _numeric(table, i) else "" for i in range(len(table.columns))]
    head = "".join(f"<th{style}>{escape(name)}</th>" for name, style in zip(table.columns, styles, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{s}>{escape(number(cell))}</td>" for cell, s in zip(row, styles, strict=True)) + "</tr>"
        for row in table.rows
    )
    whole = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if len(table.rows) > _LONG_TABLE:
        return f"<details><summary>{escape(table.title or 'Table')} ({len(table.rows)} rows)</summary>{whole}</details>"
    return f"<h3>{escape(table.title)}</h3>{whole}" if table.title else whole


def _clip_html(clip: Clip) -> str:
    takes = []
    for index, take in enumerate(clip.takes):
        sound = base64.b64encode(audio_files.encode(take.audio, ".flac")).decode()
        note = " · ".join(part for part in (f"{take.audio.seconds:.1f} s", take.note) if part)
        takes.append(
            f'<div class="take"><span class="key k{index % _N_COLOURS}">{escape(take.label)}</span>'
            f"<small>{escape(note)}</small>"
            f'<audio controls preload="metadata" src="data:audio/flac;base64,{sound}"></audio></div>'
        )
    return f'<article><p class="said">{escape(clip.text)}</p><div class="takes">{"".join(takes)}</div></article>'


def _gate_json(gate: Gate) -> dict[str, Any]:
    return {**asdict(gate.metric), "limit": gate.limit, "direction": gate.direction, "passed": gate.passed}


def _section_json(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "text": section.text,
        "tables": [asdict(table) for table in section.tables],
        "plots": [asdict(plot) for plot in section.plots],
        "clips": [
            {"text": c.text, "takes": [{"label": t.label, "seconds": t.audio.seconds, "note": t.note} for t in c.takes]}
            for c in section.clips
        ],
    }


def _finite(value: Any) -> Any:
    """``value`` with every number that JSON cannot hold replaced by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What follows from the figures of speed.py: what the bytes alone would take, here and on another card, and a plot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from quaver.config import FRAME_RATE_HZ

LAPTOP_GB_S = 360.0
"""What the memory of a laptop's card moves in a second."""

_WIDTH, _LEFT, _BAR, _GAP = 760, 210, 18, 8


@dataclass(frozen=True, slots=True)
class Timed:
    """A row: ``ms`` a frame of ``batch`` utterances, the megabytes a frame reads, and what these take here alone."""

    name: str
    batch: int
    ms: float
    mb: float | None
    bytes_ms: float | None

    def projected(self, gb_s: float) -> tuple[float, float] | None:
        """Milliseconds on a card of ``gb_s``: of the bytes alone, and with all that comes on top of them here."""
        if self.mb is None or self.bytes_ms is None:
            return None
        alone = self.mb / gb_s
        return alone, alone + max(0.0, self.ms - self.bytes_ms)


def timed(found: Mapping[str, Any]) -> Iterator[Timed]:
    """The rows of ``found`` that say what a frame takes, in their order; sampled codes where both were timed."""
    copy = found.get("copy_tb_s")
    for name, value in found.items():
        ms = value.get("sampled_ms", value.get("ms_per_frame")) if isinstance(value, dict) else None
        batch = re.search(r" b(\d+)$", name)
        if ms is None or batch is None:
            continue
        mb = found.get(f"{name.split()[0]} roofline", {}).get("frame_mb")
        alone = mb / copy / 1e3 if mb and isinstance(copy, float) else None
        yield Timed(name, int(batch[1]), ms, mb, alone)


def projection(found: Mapping[str, Any], gb_s: float = LAPTOP_GB_S) -> list[str]:
    """Lines of text: what rows of one utterance would take on a card of ``gb_s``. Projected, not measured.

    What is on top of the bytes is taken to be the same there. A smaller card has fewer and slower multiprocessors.
    """
    lines = [f"projected for a card of {gb_s:.0f} GB/s, not measured: ms of the bytes alone, with what is on top here"]
    for row in timed(found):
        projected = row.projected(gb_s) if row.batch == 1 else None
        if projected is not None:
            alone, all_in = projected
            times = 1e3 / FRAME_RATE_HZ / all_in
            lines.append(f"{row.name:32} {alone:9.2f} {all_in:9.2f}, {times:.1f} times real time")
    return lines if len(lines) > 1 else []


def plot(found: Mapping[str, Any]) -> str:
    """An SVG of its own: a bar a row of one utterance, and in it a mark at what its bytes alone take."""
    rows = [row for row in timed(found) if row.batch == 1]
    if not rows:
        return ""
    # Plain PyTorch takes so much longer that nothing else would be seen: its bar is cut, its figure is not.
    quick = [row.ms for row in rows if row.bytes_ms is None or row.ms < 20 * row.bytes_ms]
    longest = max(quick or [row.ms for row in rows])
    height = 70 + len(rows) * (_BAR + _GAP)
    machine = found.get("machine", {})
    title = f"{found.get('config', '')}, one utterance: milliseconds a frame; {machine.get('gpu', '')}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="12" y="22" font-size="14">{escape(title)}</text>',
    ]
    for index, row in enumerate(rows):
        y = 38 + index * (_BAR + _GAP)
        scale = (_WIDTH - _LEFT - 90) / longest
        width = min(row.ms, longest) * scale
        cut = " (cut)" if row.ms > longest else ""
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(row.name)}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="#4477aa"/>')
        parts.append(f'<text x="{_LEFT + width + 6:.1f}" y="{y + 13}">{row.ms:.2f}{cut}</text>')
        if row.bytes_ms is not None:
            x = _LEFT + row.bytes_ms * scale
            parts.append(f'<path d="M{x:.1f} {y - 3}v{_BAR + 6}" stroke="#cc3311" stroke-width="2.5"/>')
    legend = "red mark: what the bytes that a frame reads take at the speed of a copy"
    parts.append(f'<text x="{_LEFT}" y="{height - 12}">{legend}</text></svg>')
    return "".join(parts) + "\n"
